"""Images as arrays, in memory or in NumPy files."""

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from .decoding import is_lfs_pointer, one_line
from .labelled import LabelledImages, check_image_array
from .names import name_of


LABEL_ARRAYS = ("labels", "label", "targets", "target", "y")
MAX_UNPACKED = 2**30  # bytes of an array in a .npz; more is accepted where the file itself is of that order
MAX_RATIO = 20  # images pack two or three times, synthetic ones ten times; zeros a thousand times
ROUNDING = 1e-4  # what resizing and arithmetic in 16 bits leave beyond [0, 1]
# What reading a damaged archive raises; an encrypted member is a RuntimeError.
_DAMAGED = (
    *(ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError, MemoryError, RuntimeError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error),
)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def arrays_of(source: Any, split: str | None) -> LabelledImages | None:
    """`source` if it is arrays, in memory or in a NumPy file; None for all else."""
    if isinstance(source, LabelledImages):
        return source
    id_space, ids = None, None
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix in (".npz", ".npy") and Path(source).is_file():
        images, labels, ids = _read_numpy_file(Path(source))
        id_space = str(Path(source).resolve())
    elif isinstance(source, np.ndarray):
        images, labels = source, None
    elif isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], np.ndarray):
        images, labels = source
    else:
        return None
    images = _levels(images)
    check_image_array(images, "images")
    if ids is not None:
        return LabelledImages(images, labels, _texts(ids))
    ids = tuple(f"{split or 'train'}/{row}" for row in range(len(images)))
    return LabelledImages(images, labels, ids, id_space=id_space)


def _texts(ids: np.ndarray) -> tuple[str, ...]:
    if ids.ndim != 1:
        raise ValueError(f"ids has shape {ids.shape}; one per image is accepted.")
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in ids.tolist())


def _read_numpy_file(path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    if path.suffix == ".npy":
        return read_npy(path), None, None
    arrays = read_npz(path)
    labels = [name for name in LABEL_ARRAYS if name in arrays]
    others = [name for name in arrays if name not in ("images", "ids", *LABEL_ARRAYS)]
    if "images" not in arrays or others or len(labels) > 1:
        raise ValueError(
            f"source {name_of(path)} has the arrays {', '.join(arrays)}; images, ids and one of "
            f"{', '.join(LABEL_ARRAYS)} are accepted."
        )
    return arrays["images"], arrays[labels[0]] if labels else None, arrays.get("ids")


def read_npy(path: Path) -> np.ndarray:
    """
    The array of a `.npy` file, which stays on disk until it is used.

    Raises:
        ValueError: If it is damaged, or holds Python objects.
    """
    try:
        with open(path, "rb") as file:
            _check_header(file, os.path.getsize(path))
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError) as error:
        raise ValueError(f"source {name_of(path)} {_no_numpy(path, error)}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """
    All arrays of a `.npz` file by name.

    Raises:
        ValueError: If it is damaged, holds Python objects, or is a bomb: an array above `MAX_UNPACKED` that is packed
            more than `MAX_RATIO` times.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > MAX_UNPACKED and member.file_size > MAX_RATIO * member.compress_size:
                    raise ValueError(
                        f"{member.filename} grows from {member.compress_size} to {member.file_size} bytes; at most "
                        f"{MAX_RATIO} times above {MAX_UNPACKED} bytes is accepted"
                    )
                with archive.open(member) as file:
                    _check_header(file, member.file_size)
                with archive.open(member) as file:
                    name = member.filename.removesuffix(".npy")
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"source {name_of(path)} {_no_numpy(path, error)}") from error
    return arrays


def _check_header(file: IO[bytes], size: int) -> None:
    """Refuse a header that promises another number of bytes than there is, before memory is asked for."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"format version {version} is not known")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would run code (save the plain array to convert it)")
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + promised != size:
        raise ValueError(f"its header promises {promised} bytes of shape {shape}, but it has {size - file.tell()}")


def _no_numpy(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        if is_lfs_pointer(file.read(64)):
            return "is a Git LFS pointer; git lfs pull fetches the file."
    return f"is no NumPy file without pickles: {one_line(error)}"


def _levels(images: np.ndarray) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] rounded to 8 bits."""
    if images.dtype.kind != "f":
        return images
    if not np.isfinite(images).all():
        raise ValueError("images holds NaN or infinity; uint8 and floats in [0, 1] are accepted.")
    if images.size and (images.min() < -ROUNDING or images.max() > 1 + ROUNDING):
        raise ValueError(
            f"images goes from {images.min():.9g} to {images.max():.9g}; uint8 and floats in [0, 1] are accepted."
        )
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)
