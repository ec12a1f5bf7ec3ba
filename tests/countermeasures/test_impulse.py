"""The impulse filter against its definition, written out pixel by pixel, and against one-pixel shortcuts."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter

from jcdp_diffusers import countermeasures, poisons
from jcdp_diffusers.countermeasures.impulse import THRESHOLD, rank_ordered_difference, replace_impulses
from jcdp_diffusers.data.perturbations import apply_perturbation


def filtered(data):
    return countermeasures.get("impulse-filter").prepare(data).data.images


def road(image, row, column):
    """Of one pixel: the mean of the four smallest differences to its eight neighbours, mirrored at the edges."""
    height, width, _ = image.shape
    mirrored = lambda place, size: size - 2 if place == size else abs(place)  # noqa: E731
    pixel = image[row, column].astype(float)
    differences = [
        np.abs(image[mirrored(row + down, height), mirrored(column + right, width)] - pixel).mean() / 255
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    ]
    return np.mean(sorted(differences)[:4])


def test_detector_is_its_definition(photos):
    image = photos.images[2]
    slow = [[road(image, row, column) for column in range(image.shape[1])] for row in range(image.shape[0])]
    np.testing.assert_allclose(rank_ordered_difference(image), slow, atol=1e-12)


def test_outliers_become_the_median_and_nothing_else_changes(photos):
    for image, result in zip(photos.images, filtered(photos)):
        outliers = rank_ordered_difference(image) > THRESHOLD
        assert np.array_equal(result[~outliers], image[~outliers])
        medians = np.stack([median_filter(image[..., channel], size=3, mode="mirror") for channel in range(3)], axis=2)
        assert np.array_equal(result[outliers], medians[outliers])


def test_an_edge_is_no_impulse(photos):
    edge = np.zeros_like(photos.images[:1])
    edge[:, :, 16:] = 255
    edge[:, 10, :] = 255  # a line one pixel wide has two neighbours alike: it goes
    result = filtered(photos.subset([0]).with_images(edge))
    assert np.array_equal(result[0, 12:], edge[0, 12:])
    assert (result[0, 10, :15] == 0).all()


@pytest.mark.parametrize("place", [(0, 0), (0, 31), (31, 0), (31, 31), (0, 12), (17, 31), (9, 9)])
def test_one_pixel_is_found_wherever_it_is(place, photos):
    even = np.full_like(photos.images[:1], 90)
    changed = even.copy()
    changed[0][place] = (255, 0, 255)
    assert np.array_equal(filtered(photos.subset([0]).with_images(changed)), even)


def test_most_of_a_one_pixel_shortcut_goes(photos):
    clean = np.concatenate([np.rot90(photos.images, turns, axes=(1, 2)) for turns in range(4)])
    tensor = torch.from_numpy(clean.copy()).permute(0, 3, 1, 2).float() / 255
    protected = apply_perturbation(clean, poisons.get("ops")(tensor, torch.arange(32) % 4, seed=0))
    left = np.abs(np.stack([replace_impulses(image) for image in protected]).astype(int) - clean).max(axis=3)
    hit = np.abs(protected.astype(int) - clean).max(axis=3) > 100
    assert hit.sum() >= 16
    assert (left[hit] < 50).mean() > 0.8


def test_grey_images(photos):
    grey = photos.with_images(photos.images[..., :1])
    assert filtered(grey).shape == grey.images.shape
