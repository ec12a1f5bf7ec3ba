"""Images cut into squares and blended again."""

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.purify.tiling import Blending, TiledImage, cut, prepare, starts


def blended(tiled: TiledImage, squares) -> np.ndarray:
    blending = Blending(tiled)
    for square in squares:
        assert not blending.finished
        blending.add(square)
    assert blending.finished
    return blending.whole


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
    whole = blended(tiled, (square.astype(np.float32) / 255 for square in tiled.squares()))
    assert np.array_equal(whole, image)


def test_blending_row_by_row_is_the_weighted_mean_over_the_whole_image():
    """Written out without any of the strips."""
    tiled, random = cut(np.zeros((37, 50, 3), np.uint8), 16, 5), np.random.default_rng(0)
    squares = random.uniform(size=(len(tiled.places), 16, 16, 3)).astype(np.float32)
    total, weights = np.zeros((37, 50, 3)), np.zeros((37, 50, 3))
    for square, (top, left) in zip(squares, tiled.places):
        for y in range(16):
            for x in range(16):
                weight = min((y + 1) / 6, (16 - y) / 6, 1) * min((x + 1) / 6, (16 - x) / 6, 1)
                total[top + y, left + x] += weight * square[y, x]
                weights[top + y, left + x] += weight
    expected = total / weights * 255
    assert np.abs(blended(tiled, squares) - expected).max() <= 0.5 + 1e-3


def test_squares_are_no_copies_and_blending_holds_one_row_of_them():
    tiled = cut(np.zeros((1000, 1200, 3), np.uint8), 64, 16)
    assert all(np.shares_memory(square, tiled.image) for square in tiled.squares())
    blending = Blending(tiled)
    assert blending.whole is None
    for _ in tiled.places[:-1]:
        blending.add(np.zeros((64, 64, 3), np.float32))
        assert blending.total.size == 64 * 1200 * 3


@pytest.mark.parametrize("overlap", [2, 4])
def test_squares_of_different_brightness_meet_without_a_step(overlap):
    """From one square to the next, brightness passes in overlap + 1 steps, none larger than its share."""
    tiled = cut(np.zeros((16, 100, 1), np.uint8), 16, overlap)
    levels = np.random.default_rng(0).uniform(size=len(tiled.places)).astype(np.float32)
    row = blended(tiled, (np.full((16, 16, 1), level, np.float32) for level in levels))[4, :, 0] / 255
    largest = np.abs(np.diff(levels)).max()
    assert np.abs(np.diff(row)).max() <= largest / (overlap + 1) + 1 / 255


def test_an_image_of_the_right_size_is_one_square_with_its_own_id():
    tiled = cut(np.zeros((8, 8, 3), np.uint8), 8, 2)
    assert tiled.names("a") == ["a"]
    assert cut(np.zeros((8, 14, 3), np.uint8), 8, 2).names("a") == ["a#0,0", "a#0,6"]


def test_small_images_are_enlarged_until_a_square_fits():
    tiled = prepare(Image.new("RGB", (3, 6)), channels=3, size=8, fit="tile", overlap=2)
    assert tiled.image.shape[:2] == (16, 8)


def test_too_narrow_images_are_refused_with_a_reason():
    reason = prepare(Image.new("L", (1, 60_000)), channels=1, size=64, fit="tile", overlap=8)
    assert reason == "too narrow: 1x60000 would become 64x3840000"
