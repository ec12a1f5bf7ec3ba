"""PIL, AUE, AAP, DUNE and SEM: what is theirs alone, against closed forms and other people's programs."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional as F

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms
from jcdp_diffusers.poisons import aap, aue, dune, pil, remn, surrogate
from jcdp_diffusers.poisons.remn import SEMSettings
from jcdp_diffusers.victims import train_model


CPU = torch.device("cpu")


class Linear(nn.Module):
    """Logits that are linear in the image, so that attacks have a closed form."""

    def __init__(self, num_classes=3, values=3 * 8 * 8, seed=0):
        super().__init__()
        self.weight = 0.05 * torch.randn(num_classes, values, generator=torch.Generator().manual_seed(seed))

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


@pytest.fixture
def middle():
    """Images whose budget is never cut off by the valid range, and labels."""
    images = 0.3 + 0.4 * torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(12) % 3


def test_published_numbers_are_the_programs():
    settings = poisons.settings("pil")
    assert (settings.epsilon, settings.step, settings.steps, settings.weight) == (8, 0.8, 30, 0.9)
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == (30, 0.003, 512)
    settings = poisons.settings("aue")
    assert (settings.epsilon, settings.step, settings.steps, settings.strength, settings.epochs) == (
        8,
        0.8,
        5,
        0.6,
        60,
    )
    settings = poisons.settings("aap")
    assert (settings.steps, settings.strength, settings.epochs, settings.warmup, settings.learning_rate) == (
        250, 0.4, 40, 10, 0.5,
    )  # fmt: skip
    assert settings.step * settings.steps == pytest.approx(2.5 * settings.epsilon)
    settings = poisons.settings("dune")
    assert (settings.step, settings.steps, settings.networks, settings.offset) == (0.5, 30, 5, 3)
    assert asdict(poisons.settings("sem")) == asdict(poisons.settings("remn")) | {"noise_adversary_steps": 0}


def test_pil_takes_the_steps_of_its_closed_form(middle):
    """Of two linear layers the gradient is W.T (softmax - one-hot) for the noise, less what is left in the image."""
    images, labels = middle
    settings = replace(poisons.settings("pil"), steps=7, weight=0.6)
    torch.manual_seed(0)
    model = pil.linear_model(3 * 8 * 8, 3).requires_grad_(False)
    noise = pil.attack(model, images, labels, settings, torch.Generator().manual_seed(5))

    weights = (model[2].weight @ model[1].weight).double()
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(5))
    expected = (8 / 255 * (2 * start - 1)).flatten(1).double()
    for _ in range(7):
        read = (expected @ weights.T).softmax(1) - F.one_hot(labels, 3)
        left = ((images.flatten(1) - expected) @ weights.T).softmax(1) - 1 / 3
        gradient = (0.6 * read - 0.4 * left) @ weights
        expected = (expected - 0.8 / 255 * gradient.sign()).clamp(-8 / 255, 8 / 255)
    torch.testing.assert_close(noise.flatten(1).double(), expected, atol=1e-7, rtol=0)


def test_pil_subtracts_what_its_model_reads(images, labels):
    """A linear model that was fitted to the clean images finds the label in the noise, and less in what is left."""
    settings = replace(poisons.settings("pil"), epochs=60, learning_rate=0.01)
    perturbation = poisons.get("pil")(images, labels, preset=settings)
    torch.manual_seed(0)
    model = pil.linear_model(images[0].numel(), 4)
    pil.train(model, images, labels, settings, CPU)
    with torch.no_grad():
        assert (model(-perturbation).argmax(1) == labels).float().mean() > 0.9


def test_contrastive_augmentation_gets_stronger_and_keeps_images(images):
    distances = []
    for strength in (0.0, 0.4, 1.0):
        augment = surrogate.Contrastive((16, 16), strength, torch.Generator().manual_seed(0))
        seen = torch.cat([augment(images) for _ in range(8)])
        assert seen.shape == (320, 3, 16, 16) and seen.min() > -1e-5 and seen.max() < 1 + 1e-5
        mirrored = torch.minimum(
            *(
                (seen - one).abs().mean((1, 2, 3))
                for one in (images.repeat(8, 1, 1, 1), images.flip(-1).repeat(8, 1, 1, 1))
            )
        )
        distances.append(mirrored.mean())
    # Without strength nothing is left but mirroring.
    assert distances[0] < 1e-5 < 0.02 < distances[1] < distances[2]


def test_contrastive_augmentation_turns_images_grey_at_its_rate():
    images = torch.rand(2000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    augment = surrogate.Contrastive((8, 8), 1.0, torch.Generator().manual_seed(0))
    grey = (augment(images).std(dim=1).amax(dim=(1, 2)) < 1e-5).float().mean()
    assert grey == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 2000))


def test_contrastive_augmentation_differentiates_and_treats_one_channel_as_grey(grey):
    images = grey.tensor().requires_grad_()
    seen = surrogate.Contrastive((8, 8), 1.0, torch.Generator().manual_seed(0))(images)
    assert seen.shape == images.shape
    (gradient,) = torch.autograd.grad(seen.sum(), images)
    assert gradient.isfinite().all() and gradient.any()


def test_augmented_minimisation_reaches_the_closed_form_of_a_linear_network(middle):
    """With mirroring as the only augmentation, known: the noise is the mirrored closed form."""
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    noise = aue.minimise(
        model,
        images,
        labels,
        torch.zeros_like(images),
        replace(poisons.settings("aue"), steps=12),
        lambda x: x.flip(-1),
    )
    step = (model.weight[1] - model.weight[0]).sign().reshape(3, 8, 8).flip(-1)
    torch.testing.assert_close(noise, 8 / 255 * torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * step)


def test_learning_rates_are_the_published_schedules():
    assert [aue.cosine(0.1, epoch, 60) for epoch in (0, 30, 60)] == pytest.approx([0.1, 0.05, 1e-6], rel=1e-4)
    settings = poisons.settings("aap")
    rates = [aap.learning_rate(settings, epoch) for epoch in (0, 4, 9, 10, 25, 39)]
    last = 0.5 * (1 + math.cos(math.pi * 29 / 30)) / 2
    assert rates == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.25, last], rel=1e-3)


@pytest.mark.parametrize("targeted", [True, False])
def test_augmented_attack_reaches_the_closed_form_of_a_linear_network(middle, targeted, monkeypatch):
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    monkeypatch.setattr(surrogate, "Contrastive", lambda size, strength, draw: lambda batch: batch)
    settings = replace(poisons.settings("aap"), targeted=targeted)
    delta = aap.attack(model, images, labels, settings, torch.Generator())
    step = (model.weight[0] - model.weight[1]).sign().reshape(3, 8, 8)
    torch.testing.assert_close(delta, 8 / 255 * torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * step)


@pytest.mark.parametrize("channels", [1, 3])
def test_structural_similarity_is_scikit_images(channels):
    draw = np.random.default_rng(0)
    one = draw.random((4, channels, 12, 10))
    other = np.clip(one + 0.1 * draw.standard_normal(one.shape), 0, 1)
    expected = [structural_similarity(a, b, channel_axis=0, data_range=1) for a, b in zip(one, other)]
    found = dune.structural_similarity(torch.from_numpy(one), torch.from_numpy(other))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_unnatural_counts_only_what_lies_beyond(images):
    settings = poisons.settings("dune", "cpu")
    assert not dune.unnatural(images, images + 1e-4, settings, None).any()
    dark = (images - 0.3).clamp(0, 1)
    psnr = -10 * np.log10((images - dark).square().mean((1, 2, 3)).numpy())
    ssim = dune.structural_similarity(images, dark).numpy()
    expected = np.clip(20 - psnr, 0, None) + np.clip(0.8 - ssim, 0, None)
    np.testing.assert_allclose(dune.unnatural(images, dark, settings, None), expected, rtol=1e-5)
    lpips = dune.unnatural(images, dark, settings, lambda one, other: torch.full((len(one), 1, 1, 1), 0.5))
    np.testing.assert_allclose(lpips, expected + 0.47, rtol=1e-5)


def test_swarm_finds_the_shift_that_the_networks_ask_for():
    """Networks that see the target in red and the other class in blue: the best natural shift is redder and less blue."""

    class Colours(nn.Module):
        def forward(self, images):
            red, _, blue = images.mean(dim=(2, 3)).T
            return 40 * torch.stack([blue, red], dim=1)

    images = 0.4 + 0.2 * torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = replace(poisons.settings("dune", "cpu"), bfloat16=False, least_ssim=0.0)
    shift = dune.best_shift([Colours()], images, 1, settings, np.random.default_rng(0), None)
    red, _, blue = shift.tolist()
    assert red > 0.05 and blue < -0.05
    # Beyond a PSNR of 20 dB the penalty would cost more than the networks give.
    assert 10 * math.log10(1 / shift.square().mean()) > 18
    # Of all positions that were tried the best is returned, although particles move on.
    loss = dune._loss_of_shift([Colours()], images, shift.numpy(), 1, settings, None)
    at_start = np.random.default_rng(0).uniform(-0.1, 0.1, (10, 3))
    assert loss <= min(dune._loss_of_shift([Colours()], images, one, 1, settings, None) for one in at_start)


def test_ensemble_attack_follows_the_mean_gradient(middle):
    """Two classes: each network's gradient has a fixed direction, of a size that saturates little here."""
    images, labels = middle[0], middle[1] % 2
    networks = [Linear(num_classes=2, seed=seed) for seed in range(3)]
    settings = replace(poisons.settings("dune"), steps=1, step=2.0)
    delta = dune.attack(networks, images, labels, settings)
    gradient = torch.zeros_like(images)
    for network in networks:
        moved = images.clone().requires_grad_()
        F.cross_entropy(network(moved), labels, reduction="sum").backward()
        gradient += moved.grad / 3
    torch.testing.assert_close(delta, -2 / 255 * gradient.sign())


def test_dune_keeps_stages_of_one_run(images, labels):
    settings = poisons.settings("dune", "smoke")
    stages = dune.train_stages(images, labels, replace(settings, networks=2), 0, CPU, False)
    last = surrogate.build("resnet18", 4, images, labels, 0, CPU)
    train_model(last, images, labels, recipe=settings.recipe, seed=0)
    assert len(stages) == 2
    assert all(torch.equal(stages[1][name], value) for name, value in last.state_dict().items())
    assert not torch.equal(stages[0]["fc.weight"], stages[1]["fc.weight"])
    with pytest.raises(ValueError, match="networks is 3.*2 epochs"):
        dune.train_stages(images, labels, replace(settings, networks=3), 0, CPU, False)


def test_dune_changes_more_than_its_steps_and_promises_nothing(data):
    perturbation = poisons.get("dune")(data.tensor(), torch.from_numpy(data.labels), preset="smoke")
    measured = measured_norms(data.images, apply_perturbation(data.images, perturbation))
    assert measured["linf"] > 8 and poisons.budget("dune", "smoke", (3, 16, 16)) == {}


def test_sem_makes_its_noise_against_a_random_shift_and_trains_against_the_adversary(images, labels, monkeypatch):
    steps = []
    adversarial = remn.adversarial
    monkeypatch.setattr(
        remn, "adversarial", lambda *args, **options: steps.append(options["steps"]) or adversarial(*args, **options)
    )
    settings = poisons.settings("sem", "smoke")
    poisons.get("sem")(images, labels, preset=settings)
    # 3 training steps and 2 batches in the end, each of 2 steps under 2 augmentations.
    assert steps.count(0) == 5 * 2 * 2 and steps.count(settings.adversary_steps) == settings.model_steps
    assert isinstance(settings, SEMSettings)


def test_without_steps_the_adversary_is_a_uniform_shift(middle):
    images, labels = middle
    settings = poisons.settings("sem")
    draw = torch.Generator().manual_seed(0)
    shift = remn.adversarial(Linear(), images, labels, settings, draw, steps=0) - images
    expected = 4 / 255 * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    torch.testing.assert_close(shift, expected, atol=1e-7, rtol=0)


def test_dune_opens_lpips_before_it_trains_anything(monkeypatch):
    monkeypatch.setattr(dune, "train_stages", None)
    settings = replace(poisons.settings("dune", "smoke"), perceptual="no-such-network")
    with pytest.raises(ValueError, match="no-such-network"):
        poisons.get("dune")(torch.rand(8, 3, 8, 8), torch.arange(8) % 2, preset=settings)


def test_dune_needs_windows_of_ssim_before_it_trains_anything():
    with pytest.raises(ValueError, match="images has 6 x 9 pixels.* 7 x 7"):
        poisons.get("dune")(torch.rand(4, 3, 6, 9), torch.arange(4) % 2, preset="smoke")


@pytest.mark.parametrize("classes, offset", [(3, 3), (2, 4), (4, 0)])
def test_dune_refuses_targets_that_are_the_images_own_classes(classes, offset, monkeypatch):
    monkeypatch.setattr(dune, "train_stages", None)  # nothing is trained
    settings = replace(poisons.settings("dune", "smoke"), offset=offset)
    with pytest.raises(ValueError, match=f"offset is {offset}, .* multiple of {classes}, .*--set offset=1"):
        poisons.get("dune")(torch.rand(8, 3, 8, 8), torch.arange(8) % classes, preset=settings)
