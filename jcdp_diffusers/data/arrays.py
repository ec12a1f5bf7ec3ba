"""Images as arrays, in memory or in NumPy files."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .decoding import one_line
from .labelled import LabelledImages, check_image_array
from .names import name_of


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
        return LabelledImages(images, labels, tuple(str(value) for value in ids))
    ids = tuple(f"{split or 'train'}/{row}" for row in range(len(images)))
    return LabelledImages(images, labels, ids, id_space=id_space)


def _read_numpy_file(path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    try:
        stored = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return stored, None, None
        with stored:
            arrays = {name: stored[name] for name in ("images", "labels", "ids") if name in stored.files}
            names = stored.files
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"source {name_of(path)} is no NumPy file without pickles: {one_line(error)}") from error
    if "images" not in arrays:
        raise ValueError(
            f"source {name_of(path)} has the arrays {', '.join(names)}; images, labels and ids are accepted."
        )
    return arrays["images"], arrays.get("labels"), arrays.get("ids")


def _levels(images: np.ndarray) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] rounded to 8 bits."""
    if images.dtype.kind != "f":
        return images
    if not np.isfinite(images).all():
        raise ValueError("images holds NaN or infinity; uint8 and floats in [0, 1] are accepted.")
    if images.size and (images.min() < 0 or images.max() > 1):
        raise ValueError(
            f"images goes from {images.min():g} to {images.max():g}; uint8 and floats in [0, 1] are accepted."
        )
    return np.rint(images * 255).astype(np.uint8)
