"""Photographs of assorted sizes: at which size they are compared, and squares cut from them at full size."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from .arrays import arrays_of
from .decoding import ImageRejected, decode_image, picture_size
from .labelled import LabelledImages
from .sources import open_dataset
from .writing import as_picture


# Sides to which photographs are brought. Larger ones are for an accelerator: a victim's cost grows with the pixels.
WORKING_SIZES = (32, 64, 128, 256)
LARGEST = {"cpu": 64, "cuda": 256}
# Sets whose images have one size stay as they are up to this side.
LARGEST_AS_IT_IS = {"cpu": 128, "cuda": 256}
# Fraction of a set. Enlarged images have no fine detail; so few of them change no spectrum.
MOST_ENLARGED = 0.05
SQUARES_IN_ALL = 2048  # to train a purifier on
SQUARES_EACH = (2, 64)  # of a photograph, at least and at most


def stored_sizes(source: Any, **options) -> list[tuple[int, int]]:
    """
    Width and height of the images of a source, by their headers.

    Args:
        source (`Any`): What `data.open_dataset` takes.
        options: Of `data.open_dataset`.

    Returns:
        `list`: Sizes; images whose header cannot be read are passed over, and so is the Hub.
    """
    if (arrays := arrays_of(source, options.get("split"))) is not None:
        height, width = arrays.images.shape[1:3]
        return [(width, height)]
    if isinstance(source, str) and not os.path.exists(source):
        return []  # of the Hub, where every look is a download
    sizes = []
    for row in open_dataset(source, streaming=True, **options).select_columns(["image"]):
        try:
            sizes.append(picture_size(row["image"]))
        except ImageRejected:
            continue
    return sizes


def sizes_in_words(sizes: list[tuple[int, int]]) -> str:
    """The beginning of a sentence about images that are brought to another size."""
    small, large = min(sizes), max(sizes)
    if small == large:
        return f"Images of {small[0]}x{small[1]}"
    return f"Images of assorted sizes, from {small[0]}x{small[1]} to {large[0]}x{large[1]}"


def working_size(sizes: Mapping[str, list[tuple[int, int]]], device: str) -> int | None:
    """
    The side to which images are brought where nobody says one.

    Args:
        sizes (`dict`): Width and height of images, by role.
        device (`str`): `"cpu"` or `"cuda"`.

    Returns:
        `int`: One of `WORKING_SIZES`, than which at most half of the images of each role are smaller, if there is one;
        None where the images of each role are squares of one size that can stay as they are.
    """
    found = [size for of_role in sizes.values() for size in of_role]
    largest = LARGEST_AS_IT_IS.get(device, LARGEST_AS_IT_IS["cuda"])
    if all(len(set(of_role)) <= 1 for of_role in sizes.values()) and all(
        width == height <= largest for width, height in found
    ):
        return None
    usual = min(float(np.median([min(size) for size in of_role])) for of_role in sizes.values() if of_role)
    most = LARGEST.get(device, LARGEST["cuda"])
    return max((side for side in WORKING_SIZES if side <= min(usual, most)), default=WORKING_SIZES[0])


def detailed_side(sizes: Mapping[str, list[tuple[int, int]]]) -> int | None:
    """
    The largest side at which sets can be compared by their fine detail.

    Args:
        sizes (`dict`): Width and height of images, by role.

    Returns:
        `int`: The side, than which at most a fraction `MOST_ENLARGED` of the images of each role are smaller; None
        where no sizes are known.
    """
    shorter = [sorted(map(min, of_role)) for of_role in sizes.values() if of_role]
    return min((sides[int(MOST_ENLARGED * len(sides))] for sides in shorter), default=None)


def squares_of_photographs(
    source: Any, size: int, *, ids: frozenset[str] | None = None, channels: int = 3, seed: int = 0, **options
) -> LabelledImages:
    """
    Squares of every photograph of a source, for a purifier that is used on whole pictures and on their tiles.

    The first of each photograph is its largest centred square, as `data.load_images` gives it. The others lie
    anywhere. Their sides are drawn log-uniformly from `size` to the shorter side, so that fine and coarse detail are
    seen alike. One photograph is decoded at a time.

    Args:
        source (`Any`): What `data.open_dataset` takes.
        size (`int`): Side of the squares, in pixels.
        ids (`frozenset`, *optional*): The photographs to take; all by default.
        channels (`int`, defaults to 3): 1 or 3.
        seed (`int`, defaults to 0): Of places and sides.
        options: Of `data.open_dataset`.

    Returns:
        `LabelledImages`: uint8 (N, size, size, channels), without labels; N is about `SQUARES_IN_ALL`. Images that
        cannot be used are left out.
    """
    rows = open_dataset(source, streaming=True, **options).select_columns(["id", "image"])
    count = sum(ids is None or row["id"] in ids for row in rows.select_columns(["id"]))
    each = int(np.clip(SQUARES_IN_ALL // max(1, count), *SQUARES_EACH))
    squares, names = [], []
    for row in rows:
        if ids is not None and row["id"] not in ids:
            continue
        try:
            cut = list(_squares(row["image"], size, each, channels, np.random.default_rng([seed, len(names)])))
        except ImageRejected:
            continue
        squares += cut
        names += [f"{row['id']}#{number}" for number in range(len(cut))]
    return LabelledImages(np.stack(squares), None, tuple(names))


def _squares(stored: Any, size: int, count: int, channels: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    pixels = decode_image(stored, channels)
    picture = as_picture(pixels)
    yield decode_image(picture, channels, size)
    shorter = min(picture.size)
    for _ in range(count - 1):
        side = min(shorter, np.exp(draw.uniform(np.log(min(size, shorter)), np.log(shorter))))  # exp may round up
        left, top = draw.random(2) * (picture.width - side, picture.height - side)
        box = (left, top, left + side, top + side)
        square = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
        yield np.asarray(square).reshape(size, size, channels)
