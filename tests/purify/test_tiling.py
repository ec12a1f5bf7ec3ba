"""Images cut into squares and blended again."""

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.purify.tiling import blend, cut, prepare, starts


@pytest.mark.parametrize("length", [1, 7, 8, 9, 13, 14, 15, 31, 64])
@pytest.mark.parametrize("overlap", [0, 2, 7])
def test_squares_cover_a_side_and_overlap(length, overlap):
    begins = starts(length, 8, overlap)
    assert begins[0] == 0 and (length <= 8 or begins[-1] == length - 8)
    assert all(0 < after - before <= 8 - overlap for before, after in zip(begins, begins[1:]))
    if overlap < 7:  # and no more squares than it takes
        assert len(begins) == max(1, -(-(length - overlap) // (8 - overlap)))


@pytest.mark.parametrize("shape", [(8, 8), (9, 20), (33, 8), (40, 40)])
@pytest.mark.parametrize("overlap", [0, 2, 5])
def test_blending_untouched_squares_gives_the_image(shape, overlap):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    tiled = cut(image, 8, overlap)
    whole = blend(tiled.tiles.astype(np.float32) / 255, tiled.places, tiled.shape, overlap)
    assert whole.shape == image.shape
    np.testing.assert_allclose(whole * 255, image, atol=1e-4)


@pytest.mark.parametrize("overlap", [2, 4])
def test_squares_of_different_brightness_meet_without_a_step(overlap):
    """From one square to the next, brightness passes in overlap + 1 steps, none larger than its share."""
    tiled = cut(np.zeros((16, 100, 1), np.uint8), 16, overlap)
    levels = np.random.default_rng(0).uniform(size=len(tiled.places)).astype(np.float32)
    tiles = np.ones_like(tiled.tiles, np.float32) * levels[:, None, None, None]
    row = blend(tiles, tiled.places, tiled.shape, overlap)[4, :, 0]
    largest = np.abs(np.diff(levels)).max()
    assert np.abs(np.diff(row)).max() <= largest / (overlap + 1) + 1e-6


def test_an_image_of_the_right_size_is_one_square_with_its_own_id():
    tiled = cut(np.zeros((8, 8, 3), np.uint8), 8, 2)
    assert tiled.names("a") == ["a"]
    assert cut(np.zeros((8, 14, 3), np.uint8), 8, 2).names("a") == ["a#0,0", "a#0,6"]


def test_small_images_are_enlarged_until_a_square_fits():
    tiled = prepare(Image.new("RGB", (3, 6)), channels=3, size=8, fit="tile", overlap=2)
    assert tiled.shape == (16, 8)


def test_too_narrow_images_are_refused_with_a_reason():
    reason = prepare(Image.new("L", (1, 60_000)), channels=1, size=64, fit="tile", overlap=8)
    assert reason == "too narrow: 1x60000 would become 64x3840000"
