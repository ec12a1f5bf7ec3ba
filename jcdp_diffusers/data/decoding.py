"""One stored picture: decoded to uint8 pixels, or rejected with a reason."""

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from PIL import Image, ImageCms

from .colour import to_srgb


# JPEG 2000 and AVIF are left out: Pillow reduces their 10 to 16 bits to 8 without a sign of it.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "HEIF")
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # what Pillow itself calls a decompression bomb
MAX_FILE_BYTES = 2**30  # no picture of MAX_PIXELS needs more
# Begins the path of a stored row that points to a file which the row's source has no right to.
OUTSIDE = "outside:"
# What `decode_image` may change in an image, in the words of its `changes`.
OVER_WHITE, TO_SRGB = "transparency laid over white", "colours converted to sRGB by the file's profile"
CHANGES = (OVER_WHITE, TO_SRGB)
_LFS_POINTER = b"version https://git-lfs"
_ORIENTATION = 0x0112  # the tag
# What it asks for. `ImageOps.exif_transpose` does the same, but writes all other tags anew
# and fails where one of them is damaged.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageRejected(ValueError):
    """One image cannot be used; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_image(
    value: Any, channels: int = 3, image_size: int | None = None, *, changes: list[str] | None = None
) -> np.ndarray:
    """One stored image as an array, or the reason why not.

    Lossless where the file is: palettes without transparency and 1-bit images are expanded, a grey image becomes RGB
    by repetition for `channels=3`, an RGB image whose three channels agree becomes grey for `channels=1`, and an alpha
    channel of 255 everywhere is left out. The orientation tag is applied (as `datasets.Image` does). Two things are
    changed, and told in `changes`: transparency is laid over white, and colours with a profile other than sRGB are
    converted to sRGB (`colour.to_srgb`). Refused, because something would be lost silently: CMYK and other colour
    spaces, more than 8 bits per channel, more than one frame, colour when `channels=1`. Of a HEIC file the primary
    image is taken; that format needs the package pillow-heif. A PNG is used only if all of its checksums are right;
    the other formats have none.

    With `image_size`, the shorter side is brought to `image_size` with Pillow's antialiased Lanczos filter and the
    centre is cropped, in one step: the largest centred square of the source becomes the result, so the scale is the
    same in both directions. A square of that size stays as it is.

    Args:
        value (`dict`, `bytes`, `str`, `os.PathLike` or `PIL.Image.Image`): `{"bytes": ..., "path": ...}` as
            `datasets.Image(decode=False)` gives, the bytes of a file, the path of a regular file or a PIL image. Of
            URLs only `hf://` is opened, which a streamed data set of the Hub has.
        channels (`int`): 3 or 1.
        image_size (`int`, *optional*): Side of the square wanted, in pixels; None keeps the size.
        changes (`list[str]`, *optional*): A list that takes what was changed, any of `CHANGES`.

    Returns:
        `np.ndarray`: uint8 (H, W, channels).

    Raises:
        ImageRejected: the image cannot be used; `reason` says why.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; 1 and 3 are accepted.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; 1 and above are accepted.")
    if not isinstance(value, (Mapping, Image.Image, str, os.PathLike, bytes, bytearray, memoryview, type(None))):
        raise TypeError(f"value is a {type(value).__name__}; bytes, a path, a PIL image and their dict are accepted.")
    stored = _stored(value)  # trouble on the way to the Hub is not the image's
    changes = [] if changes is None else changes
    try:
        picture = _open_picture(stored)
        _refuse_before_decoding(picture)
        picture.load()
        orientation, profile = _orientation(picture), picture.info.get("icc_profile")
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        picture = _as_grey_or_rgb(picture, changes)
        picture = _in_srgb(picture, profile, changes)
        if image_size is not None and picture.size != (image_size, image_size):
            picture = _resize_and_crop(picture, image_size)
        return _with_channels(np.asarray(picture), channels)
    except ImageRejected:
        raise
    except Exception as error:  # decoders raise whatever their bytes lead them to; it concerns this image alone
        raise ImageRejected(f"damaged or truncated ({one_line(error)})") from error


def _stored(value: Any) -> Image.Image | bytes:
    """The picture, or the bytes of its file."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ImageRejected("no image (null)")
    return _read_file(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else value


def _open_picture(value: Image.Image | bytes, *, verify: bool = True) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if len(value) == 0:
        raise ImageRejected("empty file (0 bytes)")
    if is_lfs_pointer(value):
        raise ImageRejected("a Git LFS pointer, not the image (git lfs pull fetches it)")
    picture = _identified(io.BytesIO(value))
    if verify and picture.format == "PNG":
        # Decoding alone passes over wrong checksums of the pixels.
        Image.open(io.BytesIO(value), formats=("PNG",)).verify()
    return picture


def _identified(file: BinaryIO) -> Image.Image:
    """The picture in a file, of which the header is read."""
    formats = IMAGE_FORMATS
    if file.read(8)[4:] == b"ftyp":  # HEIF's container, MP4's too
        if not _reads_heic():
            raise ImageRejected("a HEIC file, which needs the package pillow-heif: pip install 'jcdp-diffusers[heic]'")
    else:
        formats = IMAGE_FORMATS[:-1]  # Pillow knows the others only, as long as no HEIC file has been read
    file.seek(0)
    try:
        return Image.open(file, formats=formats)
    except Image.UnidentifiedImageError as error:
        raise ImageRejected(f"not a readable image ({', '.join(IMAGE_FORMATS)} are accepted)") from error
    except Image.DecompressionBombError as error:
        raise ImageRejected(f"decompression bomb: more than {MAX_PIXELS} pixels") from error


@functools.cache
def _reads_heic() -> bool:
    """Whether pillow-heif is there, which then is registered with Pillow."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def picture_size(value: Any) -> tuple[int, int]:
    """
    Width and height of a stored image by its header, without decoding it, turned as its orientation tag says.

    Args:
        value (`Any`): As for [`decode_image`].

    Raises:
        ImageRejected: the header cannot be read.
    """
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    try:
        with contextlib.ExitStack() as stack:
            if path is not None and os.path.isfile(path):  # of which no more is read than the header
                picture = _identified(stack.enter_context(open(path, "rb")))
            else:
                picture = _open_picture(_stored(value), verify=False)
            width, height = picture.size
            turned = _orientation(picture) in (5, 6, 7, 8) and picture.format != "TIFF"  # which Pillow has turned
            return (height, width) if turned else (width, height)
    except ImageRejected:
        raise
    except Exception as error:  # as in `decode_image`
        raise ImageRejected(f"damaged or truncated ({one_line(error)})") from error


def _read_file(path: str) -> bytes:
    if path.startswith(OUTSIDE):
        raise ImageRejected(f"refers to {path.removeprefix(OUTSIDE)!r}, which is no file below its source")
    if "://" in path:
        if not path.split("::")[-1].startswith("hf://"):
            raise ImageRejected(f"refers to {path!r}, but URLs are not opened")
        with fsspec.open(path, "rb") as file:
            return file.read()
    try:
        # Opening a pipe waits for ever, and a device has no end.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageRejected(f"cannot be read (no regular file: {path})")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageRejected(f"cannot be read ({status.st_size} bytes are no image: {path})")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageRejected(f"cannot be read ({error.strerror}: {path})") from error


def _orientation(picture: Image.Image) -> int:
    try:
        found = picture.getexif()
        if _ORIENTATION not in found and (stored := picture.info.get("exif")):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Pillow only warns of a directory that is cut off, or not even that
                Image.Exif().load(stored)
        return found.get(_ORIENTATION, 1)
    except Exception as error:
        raise ImageRejected(f"damaged EXIF data, so that its orientation is unknown ({one_line(error)})") from error


def _refuse_before_decoding(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ImageRejected(f"decompression bomb: {width}x{height} is more than {MAX_PIXELS} pixels")
    # A JPEG with a preview or a depth map behind it (MPO, most phones) is one picture all the same, and so is a HEIC.
    frames = 1 if picture.format in ("MPO", "HEIF") else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise ImageRejected(f"animated or multi-page ({frames} frames)")
    if picture.info.get("bit_depth", 8) > 8:  # of a HEIC file
        raise ImageRejected(f"{picture.info['bit_depth']} bits per channel")
    for tile in getattr(picture, "tile", ()):
        # 16-bit colour opens as mode RGB; only the decoder's raw mode ("RGB;16B") tells.
        raw_mode = tile[3] if isinstance(tile[3], str) else tile[3][0] if isinstance(tile[3], tuple) else ""
        if ";16" in str(raw_mode) and picture.format != "BMP":  # which has so many bits for a pixel, not a channel
            raise ImageRejected("16 bits per channel")


def _as_grey_or_rgb(picture: Image.Image, changes: list[str]) -> Image.Image:
    mode = picture.mode
    if mode in ("RGBA", "LA") and picture.getchannel("A").getextrema() == (255, 255):
        return picture.convert(mode[:-1])
    if picture.has_transparency_data:
        return _over_white(picture, changes)
    if mode.startswith("I") or mode == "F":
        raise ImageRejected(f"more than 8 bits per channel (mode {mode})")
    if mode == "1":
        return picture.convert("L")
    if mode == "P":
        return picture.convert("RGB")
    if mode not in ("L", "RGB"):
        raise ImageRejected(f"colour space {mode}")
    return picture


def _over_white(picture: Image.Image, changes: list[str]) -> Image.Image:
    """A picture that is transparent somewhere, on white; a page that shows it is white as a rule."""
    grey = picture.mode in ("L", "LA", "1")
    picture = picture.convert("RGBA")
    if picture.getchannel("A").getextrema() != (255, 255):
        changes.append(OVER_WHITE)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB").convert("L") if grey else picture.convert("RGB")


def _in_srgb(picture: Image.Image, profile: bytes | None, changes: list[str]) -> Image.Image:
    if not profile:
        return picture
    try:
        converted = to_srgb(picture, profile)
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageRejected(f"damaged colour profile ({one_line(error)})") from error
    if converted is not picture:
        changes.append(TO_SRGB)
    return converted


def _resize_and_crop(picture: Image.Image, image_size: int) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Only the box is resampled, so a 1x100000 image costs no more than its square.
    box = (left, top, left + side, top + side)
    return picture.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if channels == 3 and image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 1 and image.shape[2] == 3:
        if (image != image[:, :, :1]).any():
            raise ImageRejected("colour, which would be dropped by channels=1")
        return np.ascontiguousarray(image[:, :, :1])
    return image


def is_lfs_pointer(content: bytes) -> bool:
    """Whether this is the beginning of what Git has of a large file that was not fetched."""
    return bytes(content[: len(_LFS_POINTER)]) == _LFS_POINTER


def one_line(error: BaseException) -> str:
    """An error's own words, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
