"""
Images of any size at the one size that a purifier knows.

`"exact"`: an image of another size is set aside.
`"resize"`: the shorter side is brought to that size and the centre is cropped (`data.decode_image`).
`"tile"`: the image keeps its size. It is cut into overlapping squares, each is purified on its own, and where they
overlap the results are blended with weights that fall linearly towards a square's edges, so that no edge shows. An
image whose shorter side is too short is enlarged until it fits.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..data import MAX_PIXELS, ImageRejected, decode_image


FITS = ("exact", "resize", "tile")


@dataclass(frozen=True)
class TiledImage:
    """
    Args:
        tiles: uint8, (number of tiles, size, size, C).
        places: top and left of each tile.
        shape: height and width of the whole.
        resized: whether the image as it came had another size.
    """

    tiles: np.ndarray
    places: Sequence[tuple[int, int]]
    shape: tuple[int, int]
    resized: bool = False

    def names(self, image_id: str) -> list[str]:
        """Id of each tile: the image's own where there is only one."""
        if len(self.places) == 1:
            return [image_id]
        return [f"{image_id}#{top},{left}" for top, left in self.places]


def prepare(value, *, channels: int, size: int, fit: str, overlap: int) -> TiledImage | str:
    """Decode a stored image and bring it to the purifier's size; the reason, if it cannot be used."""
    try:
        image = decode_image(value, channels)
        if fit == "tile":
            brought = _enlarged(image, size)
        elif image.shape[:2] == (size, size):
            brought = image
        elif fit == "resize":
            brought = decode_image(value, channels, size)
        else:
            raise ImageRejected(f"{image.shape[1]}x{image.shape[0]} pixels and not {size}x{size}")
        return replace(cut(brought, size, overlap), resized=brought is not image)
    except ImageRejected as rejection:
        return rejection.reason


def cut(image: np.ndarray, size: int, overlap: int) -> TiledImage:
    """Cut an image (H, W, C) into squares that overlap by at least `overlap` pixels."""
    height, width = image.shape[:2]
    places = [(top, left) for top in starts(height, size, overlap) for left in starts(width, size, overlap)]
    tiles = np.stack([image[top : top + size, left : left + size] for top, left in places])
    return TiledImage(tiles, places, (height, width))


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where squares begin along a side: from end to end, evenly, overlapping by at least `overlap`."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def blend(tiles: np.ndarray, places: Sequence[tuple[int, int]], shape: tuple[int, int], overlap: int) -> np.ndarray:
    """
    Put squares together again.

    Args:
        tiles: float32, (number of tiles, size, size, C).
        places, shape: As in `TiledImage`.
        overlap: Width of the ramp from a square's edge, in pixels.

    Returns:
        float32, (H, W, C): at each pixel a weighted mean of the squares that cover it.
    """
    if len(places) == 1:
        return tiles[0]
    size = tiles.shape[1]
    from_edge = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1))
    ramp = np.minimum(from_edge / (overlap + 1), 1).astype(np.float32)
    weight = (ramp[:, None] * ramp)[:, :, None]
    total = np.zeros((*shape, tiles.shape[3]), np.float32)
    weights = np.zeros((*shape, 1), np.float32)
    for tile, (top, left) in zip(tiles, places):
        place = slice(top, top + size), slice(left, left + size)
        total[place] += weight * tile
        weights[place] += weight
    return total / weights


def _enlarged(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    factor = size / min(height, width)
    if factor <= 1:
        return image
    target = round(width * factor), round(height * factor)
    if target[0] * target[1] > MAX_PIXELS:
        raise ImageRejected(f"too narrow: {width}x{height} would become {target[0]}x{target[1]}")
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize(target, Image.Resampling.LANCZOS)).reshape(target[1], target[0], -1)


def prepare_all(values: list, channels: int, size: int, fit: str, overlap: int) -> list[TiledImage | str]:
    """`prepare` for several images."""
    return [prepare(value, channels=channels, size=size, fit=fit, overlap=overlap) for value in values]


def encode_all(images: list[np.ndarray]) -> list[bytes]:
    """PNG files, lossless, of uint8 arrays (H, W, 1 or 3)."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files
