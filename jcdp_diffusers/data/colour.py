"""Colour profiles: the colours of a photograph in sRGB, which is what networks and pages take pixels for."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms


# Many files name a profile that is sRGB in other words. One that moves no colour by more than this is left alone.
SAME_WITHIN = 2  # of 255
_STEPS = np.arange(0, 256, 51, dtype=np.uint8)


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """
    Colours by a profile, in sRGB.

    Args:
        picture (`Image.Image`): Mode L or RGB.
        profile (`bytes`): An ICC profile, as it lies in the file.

    Returns:
        `Image.Image`: Of the same mode; the picture itself where the profile is sRGB but for rounding, or is that of
        another kind of picture, such as a grey profile in a colour image.

    Raises:
        ImageCms.PyCMSError, OSError: If the profile is damaged.
    """
    transform = _transform(profile, picture.mode)
    if transform is None:
        return picture
    source = picture if picture.mode == transform.input_mode else picture.convert(transform.input_mode)
    return ImageCms.applyTransform(source, transform).convert(picture.mode)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts from a profile; None where that changes nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in ("RGB", "GRAY") or (space == "GRAY" and mode == "RGB"):
        return None
    taken = "RGB" if space == "RGB" else "L"  # a grey image may have the profile of the colour image that it was
    transform = ImageCms.buildTransform(source, _srgb(), taken, "RGB")
    grid = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(1, -1, 3)
    known = Image.fromarray(grid if taken == "RGB" else np.arange(256, dtype=np.uint8)[None])
    converted = np.asarray(ImageCms.applyTransform(known, transform)).astype(int)
    moved = np.abs(converted - np.asarray(known.convert("RGB")))
    return None if moved.max() <= SAME_WITHIN else transform


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")
