"""
Image shortcut squeezing (Liu et al., ICML 2023; liuzrcc/ImageShortcutSqueezing): lossy encodings of each image.

A poison that lives in colour is gone from a grey image, one that lives in small steps from a coarsely quantised one,
and one that lives in high frequencies from a strongly compressed one. The authors apply them whenever an image is
loaded; they have no chance in them, so once is the same.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageOps

from ..data.writing import as_picture
from . import Countermeasure


SOURCE = "Image shortcut squeezing (Liu, Zhao and Larson, ICML 2023; liuzrcc/ImageShortcutSqueezing)"
SAVES = (95, 75)  # as people save pictures: the least that programs call best, and Pillow's default
QUALITIES = (10, 30, 50, 70, 90, *SAVES)  # the authors' is 10
BITS = 2


def gray(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601, Pillow's) in every channel."""
    return _pixels(as_picture(image).convert("L"), image)


def jpeg(image: np.ndarray, quality: int = QUALITIES[0]) -> np.ndarray:
    """Through a JPEG file, with Pillow's chroma subsampling (4:2:0)."""
    file = io.BytesIO()
    as_picture(image).save(file, format="JPEG", quality=quality)
    return _pixels(Image.open(file), image)


def reduce_bit_depth(image: np.ndarray) -> np.ndarray:
    """The two highest bits of every value, the others set to 0."""
    return _pixels(ImageOps.posterize(as_picture(image), BITS), image)


def _pixels(picture: Image.Image, like: np.ndarray) -> np.ndarray:
    pixels = np.asarray(picture)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return np.repeat(pixels, like.shape[2] // pixels.shape[2], axis=2)


def _through_jpeg(quality: int) -> Countermeasure:
    source = SOURCE if quality == QUALITIES[0] else f"{SOURCE}, at another quality"
    function, settings = functools.partial(jpeg, quality=quality), {"quality": quality}
    return Countermeasure(
        f"jpeg-{quality}", "transform", source, "one JPEG per image", function, settings, takes="bytes"
    )


COUNTERMEASURES = (
    Countermeasure("gray", "transform", SOURCE, "one conversion per image", gray, takes="bytes"),
    *map(_through_jpeg, QUALITIES),
    Countermeasure(
        "bdr-2", "transform", SOURCE, "one pass over the bytes", reduce_bit_depth, {"bits": BITS}, takes="bytes"
    ),
)
