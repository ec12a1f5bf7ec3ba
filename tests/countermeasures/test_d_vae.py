"""D-VAE: its loss written out, what it takes out of images, and interruptions."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from interrupts import cut_off_at_save

from jcdp_diffusers import countermeasures, saved_state
from jcdp_diffusers.countermeasures import Context, Countermeasure
from jcdp_diffusers.countermeasures.d_vae import SETTINGS, DisentanglingVAE, DVAESettings, disentangle, loss_of


TINY = DVAESettings(width=4, latent=4, epochs=3, batch_size=32, free_epochs=1)


def test_published_numbers_are_the_programs():
    settings = DVAESettings()
    assert (settings.width, settings.latent, settings.epochs, settings.batch_size) == (64, 256, 60, 128)
    assert (settings.learning_rate, settings.kl_targets, settings.kl_weight) == (5e-3, (1.0, 3.0), 0.01)
    assert (settings.least_perturbation, settings.clip_norm) == (0.002, 5.0)
    assert dict(countermeasures.get("d-vae").settings) == dataclasses.asdict(settings)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 12)])
def test_network_has_the_published_form(shape):
    settings = DVAESettings(width=8, latent=16)
    model = DisentanglingVAE(5, shape, settings)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, *shape, generator=generator)
    reconstruction, perturbation, divergence = model(images, torch.arange(4), generator)
    assert reconstruction.shape == perturbation.shape == images.shape and divergence.ndim == 0
    assert 0 < reconstruction.min() and reconstruction.max() < 1 and perturbation.min() < 0
    assert model.encoder(images).shape == (4, 16, shape[1] // 2, shape[2] // 2)
    assert model.embedding.weight.shape == (5, 16 * shape[1] // 2 * shape[2] // 2)


def test_perturbation_depends_on_the_label_and_the_reconstruction_does_not():
    model = DisentanglingVAE(2, (3, 8, 8), TINY).eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (one, first, _), (two, second, _) = (
        model(images, torch.full((2,), label), torch.Generator().manual_seed(1)) for label in (0, 1)
    )
    assert torch.equal(one, two) and not torch.allclose(first, second)


def test_divergence_is_torchs():
    model = DisentanglingVAE(2, (3, 8, 8), TINY).eval()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, _, divergence = model(images, torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(1))
    features = model.encoder(images)
    normal = torch.distributions.Normal(model.mean(features), (model.log_variance(features) / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(1).mean()
    torch.testing.assert_close(divergence, expected)


@pytest.mark.parametrize("epoch, least", [(10, 0.0), (11, 0.002)])
@pytest.mark.parametrize("divergence", [0.5, 7.0])
def test_loss_is_as_published(epoch, least, divergence):
    images, reconstruction = torch.full((2, 3, 4, 4), 0.9), torch.full((2, 3, 4, 4), 0.8)
    perturbation = torch.full((2, 3, 4, 4), 0.3)
    loss = loss_of(
        images, reconstruction, perturbation, torch.tensor(divergence), DVAESettings(), kl_target=3.0, epoch=epoch
    )
    size = 0.09 if least else 0.0
    assert loss.item() == pytest.approx(0.01 + 0.01 + 0.01 * max(divergence, 3.0) + max(size, least), rel=1e-5)
    small = loss_of(
        images, reconstruction, 0 * perturbation, torch.tensor(0.0), DVAESettings(), kl_target=3.0, epoch=epoch
    )
    assert small.item() == pytest.approx(0.01 + 0.01 + 0.03 + least, rel=1e-5)


def test_takes_a_shift_by_class_out_of_images(train):
    """Two classes of digits, one brightened and one darkened: afterwards their means are closer."""
    data = train.subset(train.labels < 2)
    levels = np.where(data.labels == 1, 30, -30)[:, None, None, None]
    shifted = data.with_images((data.images.astype(int) + levels).clip(0, 255).astype(np.uint8))
    settings = DVAESettings(width=8, latent=16, epochs=20, batch_size=16, free_epochs=6)
    cleaned = disentangle(shifted, Context(num_classes=2), settings, "d-vae")

    def gap(images):
        return abs(images[data.labels == 1].mean() - images[data.labels == 0].mean())

    assert cleaned.images.dtype == np.uint8 and cleaned.ids == data.ids
    assert gap(cleaned.images) < 0.7 * gap(shifted.images)


def test_a_run_that_was_cut_off_again_and_again_ends_as_if_it_had_not_been(train, tmp_path):
    """After each of its six saves, of both trainings."""
    data = train.subset(range(64))
    whole = disentangle(data, Context(num_classes=10), TINY, "d-vae").images
    context = Context(num_classes=10, checkpoint_dir=tmp_path)
    for _ in range(6):
        with cut_off_at_save(saved_state.SavedState):
            disentangle(data, context, TINY, "d-vae")
    assert np.array_equal(disentangle(data, context, TINY, "d-vae").images, whole)
    assert np.array_equal(disentangle(data, context, TINY, "d-vae").images, whole)
    with pytest.raises(ValueError, match="checkpoint_dir is .*another run"):
        disentangle(data.subset(range(32)), context, TINY, "d-vae")


def test_its_seconds_are_those_of_all_its_parts(train, tmp_path):
    data, path = train.subset(range(64)), tmp_path / "d-vae-0/state.pt"
    context = Context(num_classes=10, checkpoint_dir=tmp_path)
    assert context.kept_seconds("d-vae") is None
    with cut_off_at_save(saved_state.SavedState, 3):
        disentangle(data, context, TINY, "d-vae")
    state = torch.load(path, weights_only=True)
    assert state["seconds"] > 0
    torch.save(state | {"seconds": 1000.0}, path)
    disentangle(data, context, TINY, "d-vae")
    seconds = context.kept_seconds("d-vae")
    assert 1000 < seconds < 1100
    disentangle(data, context, TINY, "d-vae")  # nothing is left to do
    assert context.kept_seconds("d-vae") == seconds


def test_every_seed_and_combination_counts_the_work_that_is_kept(train, tmp_path):
    data = train.subset(range(64))
    slow = Countermeasure("slow", "hook", "", "", lambda data, context: time.sleep(0.1))
    together = countermeasures.join("d-vae-small+slow", [countermeasures.get("d-vae-small"), slow])
    alone = [countermeasures.get("d-vae-small").prepare(data, checkpoint_dir=tmp_path).seconds for _ in range(2)]
    assert alone[0] == alone[1] == Context(checkpoint_dir=tmp_path).kept_seconds("d-vae-small") > 0
    assert together.prepare(data, checkpoint_dir=tmp_path).seconds >= alone[0] + 0.1


def test_what_it_cannot_use_is_refused(train):
    with pytest.raises(ValueError, match="data has no labels.*d-vae"):
        countermeasures.get("d-vae").prepare(dataclasses.replace(train, labels=None))
    odd = train.with_images(train.images[:, :15])
    with pytest.raises(ValueError, match="15x16 pixels.*d-vae-small"):
        countermeasures.get("d-vae-small").prepare(odd)


def test_both_names_have_settings():
    assert set(SETTINGS) == {"d-vae", "d-vae-small"}
