"""Photographs of assorted sizes: the size at which they are compared."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import arrays_of
from .decoding import ImageRejected, picture_size
from .sources import open_dataset


# Sides to which photographs are brought. Larger ones are for an accelerator: a victim's cost grows with the pixels.
WORKING_SIZES = (32, 64, 128, 256)
LARGEST = {"cpu": 64, "cuda": 256}
# Sets whose images have one size stay as they are up to this side.
LARGEST_AS_IT_IS = {"cpu": 128, "cuda": 256}
SAMPLED = 64  # images whose headers are read


def stored_sizes(source: Any, **options) -> list[tuple[int, int]]:
    """
    Width and height of the first images of a source, by their headers.

    Args:
        source: What `data.open_dataset` takes.
        options: Of `data.open_dataset`.

    Returns:
        `list`: At most `SAMPLED` sizes; images whose header cannot be read are passed over, and so is the Hub.
    """
    if (arrays := arrays_of(source, options.get("split"))) is not None:
        height, width = arrays.images.shape[1:3]
        return [(width, height)]
    if isinstance(source, str) and not os.path.exists(source):
        return []  # of the Hub, where every look is a download
    sizes = []
    for row in open_dataset(source, streaming=True, **options).take(SAMPLED):
        try:
            sizes.append(picture_size(row["image"]))
        except ImageRejected:
            continue
    return sizes


def working_size(sizes: Mapping[str, list[tuple[int, int]]], device: str) -> int | None:
    """
    The side to which images are brought where nobody says one.

    Args:
        sizes (`dict`): Width and height of images, by role.
        device (`str`): `"cpu"` or `"cuda"`.

    Returns:
        `int`: One of `WORKING_SIZES`, than which at most half of the images are smaller; None where the images of each
        role are squares of one size that can stay as they are.
    """
    found = [size for of_role in sizes.values() for size in of_role]
    largest = LARGEST_AS_IT_IS.get(device, LARGEST_AS_IT_IS["cuda"])
    if all(len(set(of_role)) <= 1 for of_role in sizes.values()) and all(
        width == height <= largest for width, height in found
    ):
        return None
    usual = float(np.median([min(size) for size in found]))
    most = LARGEST.get(device, LARGEST["cuda"])
    return max((side for side in WORKING_SIZES if side <= min(usual, most)), default=WORKING_SIZES[0])
