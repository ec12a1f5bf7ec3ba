"""
Pictures under their owner's file names, beside the Parquet files that programs read.

PNG by default, without loss: a protection that is saved as JPEG is weaker, and nobody can see that it is.
"""

import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..outputs import write_atomically
from .image_folder import IMAGE_SUFFIXES
from .writing import as_picture


# Suffix -> Pillow's name and options.
FORMATS = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True, "quality": 60}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
}
LONGEST_NAME = 255  # bytes of one part of a path, on most disks
NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are no UTF-8, ends of lines and paragraphs
LONGEST_SIDE = {"webp": 16_383, "jpg": 65_500}  # in pixels, of what their encoders take


def export_names(names: Sequence[str], suffix: str = "png") -> list[PurePosixPath]:
    """
    Where pictures go, relative to the folder of an export.

    Args:
        names (`Sequence[str]`): File of each image, relative to its source, or its id where it has no file.
        suffix (`str`, defaults to `"png"`): A key of `FORMATS`; it takes the place of the file's own.

    Returns:
        `list`: One path per image.

    Raises:
        ValueError: If two images would have one name, on a disk that does not tell capitals from small letters either,
            or a name leads out of the folder or is longer than a disk takes.
    """
    if suffix not in FORMATS:
        raise ValueError(f"export_format is {suffix!r}, but must be one of {', '.join(FORMATS)}.")
    places, taken = [], {}
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.name or any(part in ("..", "") or "\\" in part for part in path.parts):
            raise ValueError(f"export cannot be given to {name!r}, but needs names below its folder.")
        if any(unicodedata.category(letter) in NOT_IN_NAMES for letter in name):
            raise ValueError(f"export cannot be given to {name!r}, but needs names without control characters.")
        known = path.suffix.lower() in IMAGE_SUFFIXES
        place = path.with_suffix(f".{suffix}") if known else path.with_name(f"{path.name}.{suffix}")
        for part in place.parts:
            if (length := len(os.fsencode(part))) > LONGEST_NAME:
                raise ValueError(
                    f"export would write {part!r}, which has {length} bytes, but must have at most {LONGEST_NAME}."
                )
        key = place.as_posix().casefold()
        if key in taken:
            raise ValueError(
                f"export would write {taken[key]!r} and {name!r} to {place.as_posix()!r}, but needs two names."
            )
        taken[key] = name
        places.append(place)
    return places


def check_export(folder: str | os.PathLike, places: Iterable[PurePosixPath], *, fresh: bool) -> None:
    """
    Refuse a folder where an export would write over, or through a link to, what is not its own.

    Args:
        folder (`str` or `os.PathLike`): Made later if needed.
        places (`Iterable`): From `export_names`.
        fresh (`bool`): Whether nothing has been exported yet, so that no file may be there. Else a file may, and is
            compared when its picture is written.

    Raises:
        ValueError: Names the file.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"export is {str(folder)!r}, but must be a folder or a path where there is nothing yet.")
    for place in places:
        target = folder / place
        if fresh and os.path.lexists(target):
            raise ValueError(
                f"export is {str(folder)!r}, which holds {place.as_posix()!r}, but must be a folder without it."
            )
        if os.path.islink(target) or not target.parent.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"export is {str(folder)!r}, where {place.as_posix()!r} is behind a link, but must hold no links."
            )


def export_picture(folder: str | os.PathLike, place: PurePosixPath, image: np.ndarray | bytes) -> None:
    """
    Write one picture, whole or not at all; one that is there already, byte for byte, stays.

    Args:
        folder (`str` or `os.PathLike`): Of the export.
        place (`PurePosixPath`): From `export_names`; its suffix decides the format.
        image (`np.ndarray` or `bytes`): uint8 (H, W, 1 or 3), or a PNG file.

    Raises:
        ValueError: If another file has that name.
    """
    check_export(folder, [place], fresh=False)
    try:
        target, content = Path(folder) / place, encoded_picture(image, place.suffix.lstrip("."))
    except ValueError as error:
        raise ValueError(f"export cannot write {place.as_posix()!r}: {error}") from error
    if target.exists():
        if target.read_bytes() == content:
            return
        raise ValueError(
            f"export is {str(folder)!r}, which holds another {place.as_posix()!r}, but must be a folder without it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)


def encoded_picture(image: np.ndarray | bytes, suffix: str) -> bytes:
    """A file of that format; a PNG file stays as it is where PNG is wanted. ValueError if the picture is too large."""
    if isinstance(image, bytes) and suffix == "png":
        return image
    kind, options = FORMATS[suffix]
    stored = isinstance(image, bytes)
    picture = Image.open(io.BytesIO(image), formats=("PNG",)) if stored else as_picture(image)
    if max(picture.size) > LONGEST_SIDE.get(suffix, max(picture.size)):
        raise ValueError(
            f"it has {picture.width}x{picture.height} pixels, but {suffix} takes {LONGEST_SIDE[suffix]} a side; png "
            "takes it."
        )
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
