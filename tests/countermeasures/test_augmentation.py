"""Cutout, Mixup, CutMix and noise against their definitions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jcdp_diffusers.countermeasures.augmentation import Cutout, Mix, RandomNoise


def constant(values, channels=3, size=32):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, size, size).contiguous()


def distinct(count, size=16):
    """Images whose value names them, and their labels."""
    return constant([(row + 1) / (count + 1) for row in range(count)], size=size), torch.arange(count)


# -------------------------------------------------------------------------------------------------------------- cutout


@pytest.fixture(scope="module")
def holes():
    images, _ = Cutout().before_forward(torch.ones(4000, 1, 32, 32), None, torch.Generator().manual_seed(0))
    return images[:, 0] == 0


def test_each_hole_is_a_rectangle_of_at_most_16_pixels(holes):
    rows, columns = holes.any(2), holes.any(1)
    assert torch.equal(holes, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert side.sum(1).max() == 16 and side.sum(1).min() == 8  # half of it where the centre is on the border
        assert ((side[:, 1:] != side[:, :-1]).sum(1) <= 2).all()  # one piece


def test_centres_are_uniform(holes):
    """The area kept by a uniform centre, borders clipped: mean side (8 + ... + 16 + ... + 9) / 32, squared."""
    sides = [min(centre + 8, 32) - max(centre - 8, 0) for centre in range(32)]
    expected = (np.mean(sides) / 32) ** 2
    assert holes.float().mean() == pytest.approx(expected, abs=0.005)
    assert holes.float().mean(0).std() > 0.02  # less often at the borders


def test_all_channels_and_nothing_else(generator):
    images = torch.rand(8, 3, 32, 32, generator=generator) + 0.1
    cut, labels = Cutout().before_forward(images, torch.arange(8), generator)
    hole = cut == 0
    assert torch.equal(hole.any(1), hole.all(1)) and torch.equal(cut[~hole], images[~hole])
    assert labels.tolist() == list(range(8))


# ---------------------------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_labels_are_the_shares_of_the_images(method, generator):
    """With images of one value each, what an image holds of whom can be read off its pixels."""
    images, labels = distinct(12)
    mixed, weights = Mix(method, 12).before_forward(images, labels, generator)
    assert weights.shape == (12, 12) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(12))
    assert (weights.gt(0).sum(1) <= 2).all() and (weights.diagonal() > 0).any()
    if method == "mixup":
        expected = weights @ images.flatten(1)
        torch.testing.assert_close(mixed.flatten(1), expected)
    else:
        for image, row in zip(mixed, weights):
            shares = [(image[0] == value).float().mean() for value in images[:, 0, 0, 0]]
            torch.testing.assert_close(row, torch.stack(shares))


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_mixing_twice_keeps_the_account(method, generator):
    images, labels = distinct(10)
    mix = Mix(method, 10)
    once = mix.before_forward(images, labels, generator)
    mixed, weights = mix.before_forward(*once, generator)
    torch.testing.assert_close(weights.sum(1), torch.ones(10))
    means = (weights @ images.flatten(1)).mean(1)
    if method == "mixup":
        torch.testing.assert_close(mixed.flatten(1).mean(1), means)


def test_the_loss_is_the_mixture_of_losses(generator):
    """Cross-entropy is linear in the labels: mixed labels give Zhang's weighted sum of two losses."""
    images, labels = distinct(10)
    mixed, weights = Mix("mixup", 10).before_forward(images, labels, generator)
    logits = torch.randn(10, 10, generator=generator)
    own = weights.diagonal()
    partner = (weights - torch.diag(own)).argmax(1)
    two = own * F.cross_entropy(logits, labels, reduction="none")
    two += (1 - own) * F.cross_entropy(logits, torch.where(own < 1, partner, labels), reduction="none")
    torch.testing.assert_close(F.cross_entropy(logits, weights), two.mean())


def test_shares_of_mixup_are_uniform(generator):
    images, labels = distinct(2000, size=2)
    _, weights = Mix("mixup", 2000).before_forward(images, labels, generator)
    shares = weights.diagonal().sort().values
    assert (shares - torch.linspace(0, 1, 2000)).abs().max() < 1.63 / 2000**0.5  # Kolmogorov and Smirnov, 1 %


def test_global_randomness_is_left_alone(generator):
    before = torch.get_rng_state()
    Mix("cutmix", 4).before_forward(*distinct(4), generator)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_uniform_and_bounded(generator):
    images = torch.full((50, 3, 16, 16), 0.5)
    noise = RandomNoise().before_forward(images, None, generator)[0] - images
    assert noise.abs().max() <= 8 / 255 + 1e-6
    assert noise.mean().abs() < 1e-3 and noise.std() == pytest.approx(8 / 255 / 3**0.5, rel=0.02)


def test_noise_is_clipped(generator):
    noisy, _ = RandomNoise().before_forward(constant([0.0, 1.0]), None, generator)
    assert noisy.min() == 0 and noisy.max() == 1
