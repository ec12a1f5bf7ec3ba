from itertools import product

import numpy as np
import pytest
import torch

from jcdp_diffusers import poisons
from jcdp_diffusers.poisons.ops import OPSSettings


def brute_force(images, labels):
    """Every class, position and colour in plain loops; images (N, C, H, W) in [0, 1]."""
    perturbation = np.zeros_like(images)
    taken = set()
    for label in sorted(set(labels.tolist())):
        members = images[labels == label]
        best = None
        for colour in product([0.0, 1.0], repeat=images.shape[1]):
            for row, column in product(range(images.shape[2]), range(images.shape[3])):
                distance = np.abs(np.array(colour) - members[:, :, row, column])
                score = distance.mean() / distance.std()
                if (colour, row, column) not in taken and (best is None or score > best[0]):
                    best = (score, colour, row, column)
        _, colour, row, column = best
        taken.add((colour, row, column))
        for index in np.flatnonzero(labels == label):
            perturbation[index, :, row, column] = np.array(colour) - images[index, :, row, column]
    return perturbation


@pytest.mark.parametrize("channels", [1, 3])
def test_finds_what_brute_force_finds(channels):
    images = np.random.default_rng(0).random((24, channels, 5, 4), dtype=np.float32)
    labels = np.arange(24) % 4
    perturbation = poisons.get("ops")(torch.from_numpy(images), torch.from_numpy(labels))
    np.testing.assert_array_equal(perturbation.numpy(), brute_force(images, labels))


def test_no_two_classes_share_a_pixel_and_colour():
    images = torch.full((6, 3, 2, 2), 0.4) + 0.01 * torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    poisoned = images + poisons.get("ops")(images, torch.arange(6))
    shortcuts = set()
    for image, clean in zip(poisoned, images, strict=True):
        (row, column) = torch.nonzero((image != clean).any(dim=0))[0].tolist()
        shortcuts.add((row, column, *image[:, row, column].tolist()))
    assert len(shortcuts) == 6


def test_a_pixel_that_never_changes_is_the_best_shortcut():
    images = torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    images[:, :, 1, 2] = 0
    perturbation = poisons.get("ops")(images, torch.zeros(8, dtype=torch.int64))
    assert torch.equal(perturbation[:, 0, 1, 2], torch.ones(8)) and perturbation.count_nonzero() == 8


@pytest.mark.parametrize("pixels", [1, 2, 3, 5])
def test_as_many_pixels_are_changed_as_declared(pixels):
    images = torch.rand(6, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    images[:, :, 1] /= 10  # a dark row: several bright colours in one place are better than any in another
    settings = OPSSettings(pixels=pixels)
    changed = poisons.get("ops")(images, torch.arange(6) % 2, preset=settings).any(dim=1).flatten(1).sum(dim=1)
    assert changed.tolist() == [pixels] * 6 and poisons.budget("ops", settings, (3, 3, 4)) == {"l0": pixels}


def test_more_pixels_than_can_be_changed_are_refused():
    with pytest.raises(ValueError, match="pixels is 5, but must be at most 4"):
        poisons.get("ops")(torch.rand(4, 1, 2, 2), torch.arange(4), preset=OPSSettings(pixels=5))
    # Two classes may have used up two of three positions.
    images = torch.rand(3, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    assert poisons.get("ops")(images[:2], torch.arange(2), preset=OPSSettings(pixels=2)).count_nonzero() == 4
    with pytest.raises(ValueError, match="labels has 3 classes, but must have at most 2"):
        poisons.get("ops")(images, torch.arange(3), preset=OPSSettings(pixels=2))


def test_more_classes_than_shortcuts_are_refused():
    with pytest.raises(ValueError, match="labels has 9 classes.*at most 8.*2 x 2"):
        poisons.get("ops")(torch.rand(9, 1, 2, 2), torch.arange(9))
