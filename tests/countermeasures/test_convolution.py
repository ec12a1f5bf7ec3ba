"""RSK and COIN, against SciPy's convolution, cosine transform and interpolation."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import correlate, map_coordinates

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures.convolution import (
    RandomSharpening,
    RandomWarp,
    keep_low_frequencies,
    sharpen,
    warp,
)
from jcdp_diffusers.data import LabelledImages


@pytest.fixture
def images(photos):
    return photos.tensor()


def test_sharpening_is_a_convolution_per_image(images, generator):
    kernels = RandomSharpening().kernels(len(images), images.device, generator)
    sharpened = sharpen(images, kernels)
    for image, kernel, result in zip(images.numpy(), kernels.numpy(), sharpened.numpy()):
        expected = [correlate(channel, kernel, mode="nearest") for channel in image]
        np.testing.assert_allclose(result, np.clip(expected, 0, 1), atol=1e-5)


def test_kernels_have_the_published_distribution(generator):
    kernels = RandomSharpening().kernels(20_000, torch.device("cpu"), generator)
    assert not kernels[:, [0, 0, 2, 2], [0, 2, 0, 2]].any()
    centre = kernels[:, 1, 1]
    assert centre.mean() == pytest.approx(2.5, abs=0.004) and centre.std() == pytest.approx(0.1, rel=0.03)
    for row, column in ((0, 1), (1, 0), (1, 2), (2, 1)):
        rest = kernels[:, row, column] - (1 - centre) / 4
        assert rest.mean() == pytest.approx(0, abs=0.004) and rest.std() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("shape", [(32, 32), (16, 24)])
def test_low_frequencies_are_those_of_the_cosine_transform(shape, generator):
    images = torch.rand(2, 3, *shape, generator=generator)
    spectrum = dctn(images.numpy(), axes=(2, 3), norm="ortho")
    spectrum[:, :, int(0.3 * shape[0]) :] = 0
    spectrum[:, :, :, int(0.3 * shape[1]) :] = 0
    expected = idctn(spectrum, axes=(2, 3), norm="ortho").clip(0, 1)
    np.testing.assert_allclose(keep_low_frequencies(images, 0.3), expected, atol=1e-5)


def test_bytes_and_floats_are_sharpened_alike(photos):
    stored = torch.from_numpy(photos.images).permute(0, 3, 1, 2)
    one, other = (
        RandomSharpening().before_augmentation(images, torch.Generator().manual_seed(3))
        for images in (stored, stored / 255)
    )
    assert torch.equal(one, other) and one.shape == stored.shape and 0 <= one.min() and one.max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_warp_is_scipys_interpolation(size, generator):
    images = torch.rand(3, 3, *size, generator=generator)
    down, right = (2 * torch.rand(3, *size, generator=generator) * 2 - 2 for _ in range(2))
    warped = warp(images, down, right)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(float)
    for image, one, other, result in zip(images.numpy(), down.numpy(), right.numpy(), warped.numpy()):
        places = np.stack([rows + one, columns + other])
        expected = [map_coordinates(channel, places, order=1, mode="wrap") for channel in image]
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_every_pixel_moves_by_itself_within_reach(images, generator):
    """A ramp tells how far each pixel was moved."""
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 255
    moved, labels = RandomWarp().before_forward(ramp, torch.arange(2), generator)
    shift = 255 * moved[:, :, :, 4:-4] - torch.arange(4.0, 28.0)
    assert shift.min() >= -3 and shift.max() <= 2 and len(shift.unique()) >= 4  # rounded down
    assert torch.equal(moved[:, 0], moved[:, 2]) and not torch.equal(moved[0], moved[1])
    assert torch.equal(labels, torch.arange(2))


def test_warped_images_are_eight_bit(images, generator):
    moved, _ = RandomWarp().before_forward(images, torch.zeros(8, dtype=torch.int64), generator)
    assert torch.equal((255 * moved).round() / 255, moved)


def test_one_pixel_has_no_place_nearby():
    one = LabelledImages(np.zeros((2, 1, 1, 3), np.uint8), np.zeros(2, np.int64), ("a", "b"))
    with pytest.raises(ValueError, match="data has images of 1x1, but must have sides of at least 2 pixels for coin"):
        countermeasures.get("coin").prepare(one)
