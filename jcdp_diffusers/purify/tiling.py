"""
Images of any size at the one size that a purifier knows.

`"exact"`: an image of another size is set aside.
`"resize"`: the shorter side is brought to that size and the centre is cropped (`data.decode_image`).
`"tile"`: the image keeps its size. It is cut into overlapping squares, each is purified on its own, and where they
overlap the results are blended with weights that fall linearly towards a square's edges, so that no edge shows. An
image whose shorter side is too short is enlarged until it fits.

Squares are views of the decoded image, and `Blending` holds one row of them. So a photograph costs its own bytes
twice, as it came and as it goes, however many squares it has.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..data import MAX_PIXELS, ImageRejected, decode_image, picture_size, to_uint8
from ..data.writing import as_picture, png
from .reader import Rows


FITS = ("exact", "resize", "tile")
SAMPLED_SIZES = 64  # images whose headers are read to find out how large they are


@dataclass(frozen=True)
class TiledImage:
    """
    An image and the squares that it is cut into.

    Args:
        image (`np.ndarray`): uint8 (H, W, C), the whole.
        size (`int`): Side of a square, in pixels.
        overlap (`int`): Least overlap of neighbouring squares, in pixels.
        places (`Sequence`): Top and left of each square, row of squares by row of squares.
        resized (`bool`): Whether the image as it came had another size.
        changes (`tuple`): What else was changed in it, in the words of `decode_image`.
    """

    image: np.ndarray
    size: int
    overlap: int
    places: Sequence[tuple[int, int]]
    resized: bool = False
    changes: tuple[str, ...] = ()

    def squares(self) -> Iterator[np.ndarray]:
        """Each square, uint8 (size, size, C), without a copy."""
        for top, left in self.places:
            yield self.image[top : top + self.size, left : left + self.size]

    def names(self, image_id: str) -> list[str]:
        """Id of each square: the image's own where there is only one."""
        if len(self.places) == 1:
            return [image_id]
        return [f"{image_id}#{top},{left}" for top, left in self.places]


def prepare(value, *, channels: int, size: int, fit: str, overlap: int) -> TiledImage | str:
    """Decode a stored image and bring it to the purifier's size; the reason, if it cannot be used."""
    changes: list[str] = []
    try:
        image = decode_image(value, channels, changes=changes)
        if fit == "tile":
            brought = _enlarged(image, size)
        elif image.shape[:2] == (size, size):
            brought = image
        elif fit == "resize":
            brought = decode_image(value, channels, size)
        else:
            raise ImageRejected(f"{image.shape[1]}x{image.shape[0]} pixels and not {size}x{size}")
        return replace(cut(brought, size, overlap), resized=brought is not image, changes=tuple(changes))
    except ImageRejected as rejection:
        return rejection.reason


def cut(image: np.ndarray, size: int, overlap: int) -> TiledImage:
    """Cut an image (H, W, C) into squares that overlap by at least `overlap` pixels."""
    height, width = image.shape[:2]
    places = [(top, left) for top in starts(height, size, overlap) for left in starts(width, size, overlap)]
    return TiledImage(image, size, overlap, places)


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where squares begin along a side: from end to end, evenly, overlapping by at least `overlap`."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return np.linspace(0, length - size, count).round().astype(int).tolist()


class Blending:
    """
    Puts the purified squares of an image together again, in their order.

    A pixel becomes the mean of the squares that cover it. A square's weight rises linearly over `overlap` pixels from
    its edges. Rows that no later square covers are rounded at once, so that floats exist for one row of squares only.

    Args:
        tiled (`TiledImage`): The image and its squares.
    """

    def __init__(self, tiled: TiledImage):
        self.tiled, self.done = tiled, 0
        self.whole: np.ndarray | None = None  # made with the first square: many images may wait for their turn

    @property
    def finished(self) -> bool:
        """Whether all squares are there, and `whole` is uint8 (H, W, C), the image."""
        return self.done == len(self.tiled.places)

    def add(self, square: np.ndarray) -> None:
        """The next purified square, float32 (size, size, C) in [0, 1], not rounded."""
        top, left = self.tiled.places[self.done]
        self.done += 1
        if len(self.tiled.places) == 1:
            self.whole = _rounded(square)
            return
        if self.whole is None:
            self._begin(square.shape[2])
        if top > self.top:
            self._round_rows(top)
        columns = slice(left, left + self.tiled.size)
        self.total[:, columns] += self.weight * square
        self.weights[:, columns] += self.weight
        if self.finished:
            self._round_rows(self.whole.shape[0])
            del self.total, self.weights

    def _begin(self, channels: int) -> None:
        (height, width), size, overlap = self.tiled.image.shape[:2], self.tiled.size, self.tiled.overlap
        from_edge = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1))
        ramp = np.minimum(from_edge / (overlap + 1), 1).astype(np.float32)
        self.weight = (ramp[:, None] * ramp)[:, :, None]
        self.whole = np.empty((height, width, channels), np.uint8)
        self.top = 0  # of the rows that are not rounded yet
        self.total = np.zeros((size, width, channels), np.float32)
        self.weights = np.zeros((size, width, 1), np.float32)

    def _round_rows(self, end: int) -> None:
        """Round the rows up to `end` (exclusive), which no later square covers."""
        rows = end - self.top
        self.whole[self.top : end] = _rounded(self.total[:rows] / self.weights[:rows])
        for sums in (self.total, self.weights):
            sums[:-rows] = sums[rows:]
            sums[-rows:] = 0
        self.top = end


def _rounded(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) of float32 in [0, 1]."""
    return to_uint8(torch.from_numpy(image).permute(2, 0, 1)[None])[0]


def _enlarged(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    factor = size / min(height, width)
    if factor <= 1:
        return image
    target = round(width * factor), round(height * factor)
    if target[0] * target[1] > MAX_PIXELS:
        raise ImageRejected(f"too narrow: {width}x{height} would become {target[0]}x{target[1]}")
    return np.asarray(as_picture(image).resize(target, Image.Resampling.LANCZOS)).reshape(target[1], target[0], -1)


def prepare_all(values: list, channels: int, size: int, fit: str, overlap: int) -> list[TiledImage | str]:
    """`prepare` for several images."""
    return [prepare(value, channels=channels, size=size, fit=fit, overlap=overlap) for value in values]


def encode_all(images: list[np.ndarray]) -> list[bytes]:
    """`png` for several images."""
    return [png(image) for image in images]


def usual_fit(rows: Rows, size: int, asked: str | None) -> tuple[str, str | None]:
    """
    What becomes of images by their sizes: `"exact"` where half of them or more have the purifier's, else `"tile"`.
    And for `"tile"` a sentence that says so, because nobody has asked for it.

    Args:
        rows (`Rows`): The source, of which the first images are looked at.
        size (`int`): Side of the square that the purifier works on.
        asked (`str`, *optional*): `"exact"`, if that was asked for.

    Raises:
        ValueError: If `"exact"` would set the first image aside, or most images are smaller than the purifier's: what
            to do then is for the caller to say, before all of them have been set aside one by one or enlarged.
    """
    sizes = first_sizes(rows, 1 if asked == "exact" else SAMPLED_SIZES)
    others = [found for found in sizes if found != (size, size)]
    if 2 * len(others) <= len(sizes):
        return "exact", None
    smaller = [found for found in others if min(found) < size]
    width, height = (smaller or others)[0]
    if asked == "exact" or 2 * len(smaller) > len(sizes):
        raise ValueError(
            f"dataset has images of {width}x{height}, but the purifier works on {size}x{size}: fit (--fit) must say "
            "what becomes of them, resize or tile."
        )
    width, height = others[0]
    return "tile", (
        f"Images of other sizes than {size}x{size}, the purifier's, such as {width}x{height}: each is purified in "
        "overlapping squares and keeps its size (fit: tile)."
    )


def first_sizes(rows: Rows, count: int) -> list[tuple[int, int]]:
    """Width and height of the first images, by their headers; those that cannot be read are passed over."""
    sizes = []
    for table in rows.read(0, count):
        for value in table["image"].to_pylist():
            with contextlib.suppress(ImageRejected):
                sizes.append(picture_size(value))
    return sizes


def squares_per_image(rows: Rows, size: int, overlap: int) -> float:
    """Mean number of squares that the first images are cut into."""
    counts = [
        len(starts(height, size, overlap)) * len(starts(width, size, overlap))
        for width, height in first_sizes(rows, SAMPLED_SIZES)
    ]
    return sum(counts) / len(counts) if counts else 1.0
