"""EMN, REMN and TAP: the poisons that attack a network of our own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interrupts import cut_off_at_save
from torch import nn
from torch.nn import functional as F

from jcdp_diffusers import poisons, victims
from jcdp_diffusers.poisons import checkpoint, emn, remn, surrogate, tap
from jcdp_diffusers.poisons.emn import EMNSettings
from jcdp_diffusers.poisons.remn import REMNSettings
from jcdp_diffusers.poisons.tap import TAPSettings


CPU = torch.device("cpu")


class Linear(nn.Module):
    """Logits that are linear in the image, so that attacks have a closed form."""

    def __init__(self, num_classes=4, size=8, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = 0.05 * torch.randn(num_classes, 3 * size * size, generator=draw)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


@pytest.fixture
def middle():
    """Images whose budget is never cut off by the valid range, and labels."""
    draw = torch.Generator().manual_seed(1)
    return 0.3 + 0.4 * torch.rand(12, 3, 8, 8, generator=draw), torch.arange(12) % 4


def two_classes(weight):
    """Two classes: the gradient's sign is that of the difference of their weights, wherever it is taken."""
    return (weight[1] - weight[0]).sign().reshape(3, 8, 8)


def test_a_network_that_drops_out_takes_the_same_step_whatever_the_global_state(middle):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 4))

    losses = {}
    for step in ((0, 0), (0, 1), (1, 0)):
        for state in (5, 6):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            torch.manual_seed(state)
            before = torch.get_rng_state()
            losses.setdefault(step, set()).add(
                surrogate.train_step(model, optimizer, *middle, step=step, bfloat16=False)
            )
            assert torch.equal(torch.get_rng_state(), before)
    assert [len(found) for found in losses.values()] == [1, 1, 1] and len(set.union(*losses.values())) == 3


def test_large_noise_does_not_wrap_around(middle):
    settings = replace(poisons.settings("remn", "smoke"), epsilon=200.0, step=200.0, steps=1, samples=1)
    draw, augment = torch.Generator().manual_seed(0), lambda images: images
    noise = remn.robust_noise(Linear(), *middle, settings, augment, draw)
    assert noise.min() == -200 and noise.max() == 200


def test_minimisation_reaches_the_closed_form_of_a_linear_network(middle):
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    settings = EMNSettings(steps=12)
    noise = emn.minimise(model, images, labels, torch.zeros_like(images), settings, CPU)
    towards = torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight)
    torch.testing.assert_close(noise, 8 / 255 * towards)


def test_minimisation_walks_one_step_per_step_and_starts_where_it_is(middle):
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    towards = torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight)
    start = 2 / 255 * torch.ones_like(images)
    noise = emn.minimise(model, images, labels, start, EMNSettings(steps=3), CPU)
    torch.testing.assert_close(noise, (start + 3 * 0.8 / 255 * towards).clamp(-8 / 255, 8 / 255))


def test_minimisation_starts_every_step_at_a_valid_image():
    """On black images only what lies above black is kept from step to step; the last step is not cut off."""
    images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    model = Linear(num_classes=2)
    noise = emn.minimise(model, images, labels, torch.zeros_like(images), EMNSettings(steps=5), CPU)
    towards = torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight)
    torch.testing.assert_close(noise, torch.where(towards > 0, 5 * 0.8 / 255, -0.8 / 255))


@pytest.mark.parametrize("name", ["emn", "emn-class"])
def test_clamped_variant_loses_the_negative_half(name, images, labels):
    settings = poisons.settings(name, "smoke")
    noise = poisons.get(name)(images, labels, preset=settings)
    clamped = poisons.get(name)(images, labels, preset=replace(settings, positive_only=True))
    assert noise.min() < 0 and torch.equal(clamped, noise.clamp(min=0))


@pytest.mark.parametrize("name", ["emn", "emn-class"])
def test_clamped_variant_can_be_had_by_name(name):
    presets = poisons.get(name).presets
    assert presets["clamped"] == replace(presets["published"], positive_only=True)
    assert presets["cpu-clamped"] == replace(presets["cpu"], positive_only=True)


def test_published_numbers_are_the_papers():
    settings = poisons.settings("emn")
    assert (settings.epsilon, settings.step, settings.steps, settings.model_steps) == (8, 0.8, 20, 10)
    settings = poisons.settings("emn-class")
    assert (settings.epsilon, settings.step, settings.steps, settings.subset) == (8, 0.8, 1, 0.2)
    settings = poisons.settings("remn")
    assert (settings.epsilon, settings.adversary_epsilon, settings.samples, settings.model_steps) == (8, 4, 5, 5000)
    settings = poisons.settings("tap")
    assert (settings.epsilon, settings.step, settings.steps, settings.restarts) == (8, 0.4, 250, 8)
    # The program divides 40 epochs by 2.667, 1.6 and 1.142 and drops the rest; 1.6 is a little more than that in binary.
    assert settings.recipe.milestones == tuple(int(40 // part) for part in (2.667, 1.6, 1.142)) == (14, 24, 35)


def test_error_minimising_noise_lowers_the_loss_of_its_surrogate(images, labels):
    model = surrogate.build("resnet18", 4, images, labels, 0, CPU)
    settings = EMNSettings(steps=10, batch_size=20)
    optimizer = emn.make_optimizer(model, settings)
    for number in range(20):
        emn.train_step(model, optimizer, images, labels, settings, (0, number), CPU)
    fixed = surrogate.frozen(model)
    noise = emn.minimise(fixed, images, labels, torch.zeros_like(images), settings, CPU)
    clean_loss, loss = (F.cross_entropy(fixed(batch), labels) for batch in (images, images + noise))
    assert loss < clean_loss - 0.05


def test_noise_that_never_gets_there_is_returned_with_a_warning(images, labels):
    settings = replace(poisons.settings("emn", "smoke"), stop_error=0.0, max_rounds=1)
    with pytest.warns(UserWarning, match="emn ended after max_rounds = 1 rounds with a training error of"):
        assert poisons.get("emn")(images, labels, preset=settings).any()


def test_class_wise_noise_is_one_pattern_per_class(images, labels):
    noise = poisons.get("emn-class")(images, labels, preset="smoke")
    for label in range(4):
        of_class = noise[labels == label]
        assert torch.equal(of_class, of_class[:1].expand_as(of_class))
    assert len({tuple(noise[row].flatten().tolist()) for row in range(4)}) == 4


def test_pattern_of_a_class_is_the_mean_over_its_images_in_the_batch():
    noise = torch.arange(8.0).reshape(4, 1, 1, 2)
    pattern = emn._class_means(noise, torch.tensor([0, 2, 0, 2]), torch.full((3, 1, 1, 2), 9.0))
    assert pattern.flatten().tolist() == [2.0, 3.0, 9.0, 9.0, 4.0, 5.0]


def test_subset_is_a_fifth_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [3] * 2)
    rows = emn._stratified(labels, 0.2, torch.Generator().manual_seed(0))
    assert labels[rows].bincount().tolist() == [10, 4, 0, 1] and len(rows.unique()) == len(rows)


@pytest.mark.parametrize("targeted", [True, False])
def test_adversarial_poison_reaches_the_closed_form_of_a_linear_network(middle, targeted):
    """Two classes: towards the next class and away from the own one are the same direction."""
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    settings = TAPSettings(targeted=targeted, steps=45, crop_padding=0)
    draw = torch.Generator().manual_seed(0)

    # Without mirroring, which would mix the weights of the two halves of the image.
    def no_augmentation(size, padding, generator):
        return lambda batch: batch

    original, surrogate.CropFlip = surrogate.CropFlip, no_augmentation
    try:
        delta, losses = tap.attack(model, images, labels, settings, draw)
    finally:
        surrogate.CropFlip = original
    away = torch.where(labels == 1, -1.0, 1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight)
    torch.testing.assert_close(delta, 8 / 255 * away)
    assert losses.shape == (12,)


def test_targeted_poison_makes_the_surrogate_see_the_next_class(images, labels):
    model = surrogate.build("resnet18", 8, images, labels, 0, CPU).eval()
    settings = TAPSettings(steps=20, step=1.0, crop_padding=1)
    delta, _ = tap.attack(model, images, labels, settings, torch.Generator().manual_seed(0))
    before, after = (F.cross_entropy(model(batch), (labels + 1) % 4) for batch in (images, images + delta))
    assert after < before and (images + delta).min() >= 0 and (images + delta).max() <= 1


def test_restart_with_the_lowest_loss_is_kept(images, labels, monkeypatch):
    """Attacks that return their own number as perturbation, with the loss 2, 1, 3."""
    calls = iter(range(3))

    def attack(model, images, labels, settings, draw):
        restart = next(calls)
        return torch.full_like(images, restart / 255), torch.full((len(images),), [2.0, 1.0, 3.0][restart])

    monkeypatch.setattr(tap, "attack", attack)
    settings = replace(poisons.settings("tap", "smoke"), restarts=3, batch_size=40)
    perturbation = poisons.get("tap")(images, labels, preset=settings)
    assert torch.equal(perturbation, torch.full_like(images, 1 / 255))


def test_untargeted_variant_differs_and_can_be_had_by_name(images, labels):
    settings = poisons.settings("tap", "smoke")
    targeted, untargeted = (
        poisons.get("tap")(images, labels, preset=replace(settings, targeted=which)) for which in (True, False)
    )
    assert not torch.equal(targeted, untargeted)
    assert not poisons.settings("tap", "untargeted").targeted and poisons.settings("tap").targeted


def test_adversary_reaches_the_closed_form_of_a_linear_network(middle):
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    attacked = remn.adversarial(model, images, labels, REMNSettings(), torch.Generator().manual_seed(0), steps=10)
    away = torch.where(labels == 1, -1.0, 1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight)
    torch.testing.assert_close(attacked, images + 4 / 255 * away)


def test_robust_noise_lowers_the_loss_that_the_adversary_leaves(images, labels):
    model = surrogate.build("resnet18", 8, images, labels, 0, CPU).eval()
    settings = REMNSettings(samples=2, adversary_steps=3, adversary_step=2.0, crop_padding=1)
    draw = torch.Generator().manual_seed(0)
    augment = surrogate.CropFlip((16, 16), 1, draw)
    noise = remn.robust_noise(model, images, labels, settings, augment, draw)
    assert noise.dtype == torch.int16 and noise.abs().max() == 8

    def loss_under_attack(batch):
        attacked = remn.adversarial(
            model, batch.clamp(0, 1), labels, settings, torch.Generator().manual_seed(1), steps=3
        )
        return F.cross_entropy(model(attacked), labels)

    assert loss_under_attack(images + noise / 255) < loss_under_attack(images)


@pytest.mark.parametrize("name", ["remn", "sem"])
def test_robust_noise_keeps_a_bound_between_two_levels(name, images, labels):
    settings = poisons.get(name).changed("smoke", {"epsilon": 7.6, "model_steps": 1})
    noise = 255 * poisons.get(name)(images, labels, preset=settings)
    assert noise.abs().max().round() == 7 and torch.equal(noise.round(), noise.round().clamp(-7, 7))


def test_robust_noise_is_pushed_through_the_augmentation(middle):
    """A linear network that sees the image mirrored: noise has the mirrored closed form."""
    images, labels = middle[0], middle[1] % 2
    model = Linear(num_classes=2)
    settings = REMNSettings(samples=1)
    noise = remn.robust_noise(
        model, images, labels, settings, lambda batch: batch.flip(-1), torch.Generator().manual_seed(0)
    )
    towards = torch.where(labels == 1, 1.0, -1.0).reshape(-1, 1, 1, 1) * two_classes(model.weight).flip(-1)
    assert torch.equal(noise, (8 * towards).to(torch.int8))


def test_frozen_surrogate_is_the_same_function(images):
    model = victims.get("resnet18")(4, width=8)
    draw = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))
    model.train()
    fixed = surrogate.frozen(model)
    assert model.training and not any(parameter.requires_grad for parameter in fixed.parameters())
    torch.testing.assert_close(fixed(images), model.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_transformer_is_frozen_and_attacked_though_it_cannot_be_traced(images, labels):
    model = victims.get("vit")(4, width=4).train()
    fixed = surrogate.frozen(model)
    assert model.training and not any(module.training for module in fixed.modules())
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(fixed(images), model.eval()(images))
    settings = replace(poisons.settings("emn", "smoke"), surrogate="vit", width=4)
    noise = poisons.get("emn")(images[:8], labels[:8], preset=settings)
    assert noise.any() and noise.abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("name", ["emn", "aue", "aap"])
def test_a_last_image_alone_is_no_batch(name):
    """Of 8x8 pixels, ResNet-18's last maps are 1x1, of which one image has no variance."""
    settings = replace(poisons.settings(name, "smoke"), batch_size=4)
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = poisons.get(name)(images, torch.arange(9) % 4, preset=settings)
    assert noise.any() and noise.isfinite().all()
    sizes = lambda count: [len(rows) for rows in surrogate.batches(torch.arange(count), 4)]
    assert [sizes(count) for count in (1, 4, 5, 8, 9, 10)] == [[1], [4], [5], [4, 4], [4, 5], [4, 4, 2]]


def test_augmentation_crops_mirrors_and_differentiates(images):
    augment = surrogate.CropFlip((16, 16), 2, torch.Generator().manual_seed(0))
    moved = images.clone().requires_grad_()
    seen = augment(moved)
    for image, result in zip(images, seen.detach(), strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        windows = [padded[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
        windows += [window.flip(-1) for window in windows]
        assert any(torch.allclose(result, window, atol=1e-5) for window in windows)
    (gradient,) = torch.autograd.grad(seen.sum(), moved)
    # Every pixel is seen once or cut off.
    assert set(gradient.round(decimals=4).unique().tolist()) == {0.0, 1.0}


# Changes of the preset `smoke` without which a method would be done before the third save.
LONGER = {
    "emn": {"stop_error": 0.0, "max_rounds": 2},
    "emn-class": {"stop_error": 0.0, "max_rounds": 4},
}


@pytest.mark.filterwarnings("ignore:emn")
@pytest.mark.parametrize("name", [name for name in poisons.NAMES if poisons.get(name).surrogate])
def test_a_run_that_was_cut_off_again_and_again_ends_as_if_it_had_not_been(name, images, labels, tmp_path):
    settings = replace(poisons.settings(name, "smoke"), **LONGER.get(name, {}))
    whole = poisons.get(name)(images, labels, preset=settings)
    asked = {"preset": settings, "checkpoint_dir": tmp_path}
    for _ in range(3):
        with cut_off_at_save(checkpoint.Checkpoint):
            poisons.get(name)(images, labels, **asked)
    assert torch.equal(poisons.get(name)(images, labels, **asked), whole)
    assert torch.equal(poisons.get(name)(images, labels, **asked), whole)


def test_state_of_another_run_is_refused(images, labels, tmp_path):
    poisons.get("emn")(images, labels, preset="smoke", checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="checkpoint_dir is .*another run"):
        poisons.get("emn")(images, labels, preset="smoke", seed=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        poisons.get("emn")(1 - images, labels, preset="smoke", checkpoint_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"no state", "half"])
def test_a_damaged_state_is_refused_in_one_sentence(content, images, labels, tmp_path):
    poisons.get("emn")(images, labels, preset="smoke", checkpoint_dir=tmp_path)
    file = tmp_path / "emn.pt"
    file.write_bytes(file.read_bytes()[:500] if content == "half" else content)
    with pytest.raises(ValueError, match="checkpoint_dir is .* its emn.pt must be a saved state"):
        poisons.get("emn")(images, labels, preset="smoke", checkpoint_dir=tmp_path)


@pytest.mark.parametrize("error", [PermissionError, MemoryError])
def test_a_state_that_the_machine_cannot_read_is_not_called_damaged(error, images, labels, tmp_path, monkeypatch):
    """Whoever believed it would delete hours of work."""
    poisons.get("emn")(images, labels, preset="smoke", checkpoint_dir=tmp_path)

    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error):
        poisons.get("emn")(images, labels, preset="smoke", checkpoint_dir=tmp_path)


def test_a_state_half_written_does_not_replace_the_last(images, labels, tmp_path, monkeypatch):
    kept = checkpoint.Checkpoint(tmp_path, "emn", "settings", 0, images, labels)
    kept.save({"done": 1})

    def torn(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        kept.save({"done": 2})
    assert kept.load()["done"] == 1


def test_random_draws_of_a_batch_do_not_depend_on_the_batches_before(images, labels, tmp_path):
    settings = replace(poisons.settings("tap", "smoke"), restarts=1, batch_size=10)
    whole = poisons.get("tap")(images, labels, preset=settings)
    assert np.array_equal(whole, poisons.get("tap")(images, labels, preset=settings, checkpoint_dir=tmp_path))
