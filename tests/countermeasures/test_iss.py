"""Image shortcut squeezing against Pillow and torchvision, byte for byte."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from jcdp_diffusers import countermeasures


def prepared(name, data):
    return countermeasures.get(name).prepare(data).data.images


def test_gray_is_torchvisions(photos):
    pictures = [Image.fromarray(image) for image in photos.images]
    reference = np.stack([np.asarray(v2.Grayscale(3)(picture)) for picture in pictures])
    assert np.array_equal(prepared("gray", photos), reference)


def test_gray_is_luma(photos):
    luma = photos.images @ np.array([0.299, 0.587, 0.114])
    assert np.abs(prepared("gray", photos) - luma[..., None]).max() <= 0.51


@pytest.mark.parametrize("quality", [10, 30, 50, 70, 90])
def test_jpeg_is_pillows_file(quality, photos):
    assert countermeasures.get(f"jpeg-{quality}").settings == {"quality": quality}
    for image, squeezed in zip(photos.images, prepared(f"jpeg-{quality}", photos)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        assert np.array_equal(squeezed, np.asarray(Image.open(io.BytesIO(file.getvalue()))))


def test_jpeg_is_per_image(photos):
    """An image's bytes do not depend on the others."""
    assert np.array_equal(prepared("jpeg-10", photos.subset([3])), prepared("jpeg-10", photos)[3:4])


def test_jpeg_is_far_from_the_image_but_not_elsewhere(photos):
    change = np.abs(prepared("jpeg-10", photos).astype(int) - photos.images)
    assert 2 < change.mean() < 30


def test_two_bits_are_four_levels(photos):
    squeezed = prepared("bdr-2", photos)
    assert np.array_equal(squeezed, photos.images // 64 * 64)
    reference = v2.functional.posterize(torch.from_numpy(photos.images).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert np.array_equal(squeezed, reference.numpy())


@pytest.mark.parametrize("name", ["gray", "jpeg-10", "bdr-2"])
def test_one_channel_stays_one(name, photos):
    grey = photos.with_images(photos.images[..., :1])
    squeezed = prepared(name, grey)
    assert squeezed.shape == grey.images.shape
    if name == "gray":
        assert np.array_equal(squeezed, grey.images)


@pytest.mark.parametrize("name", ["gray", "bdr-2"])
def test_twice_is_once(name, photos):
    assert np.array_equal(prepared(f"{name}+{name}", photos), prepared(name, photos))
