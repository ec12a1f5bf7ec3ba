"""Test images that come back in another file, turned round or under small noise are found between any two roles."""

import dataclasses
import io
import logging

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.data import LabelledImages, check_roles, find_overlap
from jcdp_diffusers.data.found import say_once


ROLES = ("protected", "collected", "test")


def scenes(count, first, side=32):
    """Smooth pictures of high contrast and little colour, as photographs are, each of its own."""
    images = []
    for seed in range(first, first + count):
        draw = np.random.default_rng(seed)
        light = draw.integers(20, 236, (5, 5, 1)) + draw.integers(-20, 21, (5, 5, 3))
        few = Image.fromarray(light.clip(0, 255).astype(np.uint8))
        images.append(np.asarray(few.resize((side, side), Image.Resampling.BICUBIC)))
    return LabelledImages(np.stack(images), None, tuple(f"{first}/{row}" for row in range(count)))


def stored(images, image_format, **options):
    """The images after they were saved and opened again."""
    again = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, image_format, **options)
        again.append(np.asarray(Image.open(file).convert("RGB")))
    return np.stack(again)


def few_large_values(images):
    """What AR leaves: one value in two hundred is changed by 44 levels, nearly all others by up to 6."""
    draw = np.random.default_rng(0)
    noise = draw.integers(-6, 7, images.shape)
    noise[draw.random(images.shape) < 1 / 200] = 44
    return (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


CHANGES = {
    "WebP": lambda images: stored(images, "WEBP", quality=90),
    "JPEG with less colour": lambda images: stored(images, "JPEG", quality=90, subsampling=2),
    "JPEG twice": lambda images: stored(stored(images, "JPEG", quality=92), "JPEG", quality=85),
    "mirrored": lambda images: images[:, :, ::-1].copy(),
    "mirrored JPEG": lambda images: stored(images[:, :, ::-1].copy(), "JPEG", quality=90),
    "a palette": lambda images: np.stack(
        [np.asarray(Image.fromarray(image).quantize(255).convert("RGB")) for image in images]
    ),
    "a little brighter": lambda images: images.clip(0, 252) + np.uint8(3),
    "few large values": few_large_values,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (1, 2)])
def test_pictures_that_come_back_are_found_between_any_two_roles(change, one, other):
    roles = [scenes(20, 1000 * role) for role in range(3)]
    check_roles(*roles)
    images = roles[other].images.copy()
    images[4:14] = CHANGES[change](roles[one].images[2:12])
    roles[other] = roles[other].with_images(images)
    pairs = find_overlap(roles[one], roles[other], budget=16 / 255)
    assert {tuple(pair) for pair in pairs.tolist()} <= {(row, row + 2) for row in range(2, 12)} and len(pairs) >= 9
    with pytest.raises(ValueError, match=rf"{ROLES[one]} has (9|10) images .* {ROLES[other]} one"):
        check_roles(*roles)


def test_clean_originals_under_noise_of_small_energy_are_all_found():
    protected, collected = scenes(30, 0), scenes(30, 500)
    leaked = dataclasses.replace(collected, images=few_large_values(protected.images))
    assert len(find_overlap(protected, leaked, budget=16 / 255)) == 30


def test_a_few_pictures_that_resemble_each_other_are_said_and_not_refused(caplog):
    say_once.cache_clear()
    roles = [scenes(250, 1000 * role, side=16) for role in range(3)]
    images = roles[2].images.copy()
    images[7] = roles[1].images[9, :, ::-1]
    roles[2] = roles[2].with_images(images)
    with caplog.at_level(logging.WARNING):
        check_roles(*roles)
    assert "1 images of one set are those of another" in caplog.text and "'1000/9' and '2000/7'" in caplog.text
    images[8] = roles[1].images[10, :, ::-1]
    with pytest.raises(ValueError, match="collected has 2 images that are the picture of a test one"):
        check_roles(roles[0], roles[1], roles[2].with_images(images))


def test_no_budget_compares_pixels_only():
    test = scenes(10, 0)
    leaked = dataclasses.replace(test, images=CHANGES["mirrored"](test.images), ids=tuple(map(str, range(10))))
    assert len(find_overlap(leaked, test)) == 0 and len(find_overlap(leaked, test, budget=1 / 255)) == 10
