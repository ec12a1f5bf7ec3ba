"""Bring your own poison: published perturbation files and folders of poisoned images.

Files come as tensors or arrays in `.pt`, `.pth`, `.npy`, `.npz` or `.safetensors`; one row per image (sample-wise) or
per class (class-wise); channels first or last; as perturbations or as poisoned images, in any scale that
:mod:`.readings` knows. What a file is, is found by comparing all readings with the clean images; what was found is
returned in words, and what does not fit the clean images is refused. Nothing is ever unpickled, except by torch's
loader for weights alone.

Sample-wise files for CIFAR are in the order of torchvision's data set. A data set from elsewhere (Parquet files, the
Hub) has an order of its own, so rows are matched by their ids, by numbers in file names, or by the content of the
images of a set in the file's order; rows of one order that do not suit the images are refused. Rows that are grouped
by class are put back where the images of each class stand.

What programs write, as their sources show it:

| | file | rows | holds |
|---|---|---|---|
| CP | `.pth`: a tensor, or a checkpoint with `model` and `delta` in it | images or classes | fractions of the bound |
| UC | folder of classes with `0.png`, `1.png`, ... in each | images, by class | images |
| UC | folder of `perturbation_0.pth`, ... beside a file with `pred_idx` | clusters | noise, not yet clamped |
| PIL | `.pt` with `data` and `labels` | images | images |
| AUE, AAP | `poison.pt`: a tensor | images or classes | noise in [-8/255, 8/255] |
| DUNE | `.pkl`: pairs of an image and a class; must be converted | images, by class | images |
| SEM | `.pkl`: an int8 array; must be converted | images | noise in 1/255 |
"""

import argparse
import codecs
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from ..data import LabelledImages, column_names, load_images
from ..data.arrays import LABEL_ARRAYS, read_npy, read_npz
from ..data.decoding import is_lfs_pointer
from ..data.labels import number_of
from ..data.perturbations import apply_perturbation, measured_norms
from .readings import (
    RESEMBLANCE,
    as_poisoned_images,
    likeness,
    points_outwards,
    row_in_another_place,
)


SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors")
ORDERS = ("checked", "given")
NORMS = ("linf", "l2", "l0")
# What programs call the rows' numbers in the clean set: "packed" files of TAP's.
_NUMBERS = ("poison_ids", "indices", "index")
_PREFERRED = ("poison_delta", "perturbation", "noise")
_CLUSTERS = "pred_idx"  # what UC's program calls the cluster of each image
# What torch's loader for weights alone may make beside tensors: NumPy arrays and the options of a program, which run
# no code. NumPy moved the first function.
_HARMLESS = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *(np._core.multiarray._reconstruct, np.ndarray, np.dtype, codecs.encode, argparse.Namespace),
    *{type(np.dtype(kind)) for kind in ("i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8")},
]
# Noise at black and white pixels, from which the order of rows can be told, and which share of it may point outwards
# by rounding; in a wrong order it is about a half.
_ENOUGH_SATURATED, _OUTWARDS = 50, 0.02
# How rows were found to belong to images that stand in their order, in more words.
_IN_ORDER = {
    "": "in the order of the clean images",
    "grouped by class": "grouped by class, in the order of the clean images within a class",
}
_CONVERT = (
    "plain tensors and arrays are accepted, so convert it with a program that you trust: load it there and save its "
    "array alone with numpy.save"
)


@dataclass
class _Rows:
    """What a file holds: an array of images or noise, and what says which row is which."""

    values: np.ndarray
    labels: np.ndarray | None = None
    ids: tuple[str, ...] | None = None
    numbers: np.ndarray | None = None


def read_perturbation(
    path: str | Path,
    data: LabelledImages,
    *,
    kind: str | None = None,
    budget: Mapping[str, float] | None = None,
    order: str = "checked",
    in_order_of: LabelledImages | None = None,
    image_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, str]]:
    """Reads a perturbation that somebody published for `data`.

    Args:
        path: a file (see `SUFFIXES`) or a folder of poisoned images, numbered or in class subfolders.
        data: the clean images. Rows belong to them by ids (`.npz` with `ids`, a folder with an `id` column), by the
            numbers in the names of image files, or else in their order.
        kind: "sample-wise" or "class-wise"; found by the number of rows where that is enough.
        budget: the norms it is declared to keep, any of `linf` (in 1/255), `l2` (images in [0, 1]) and `l0` (pixels).

        order: "checked" refuses sample-wise noise that makes black and white pixels darker and lighter still, which
            noise in the right order never does; "given" takes the order as it is, for noise that was never clipped.
        in_order_of: the clean images in the order of the file (torchvision's, say), where `data` has another: rows
            are brought into that order by what the file says of them (numbers, ids, classes), and then matched by the
            pixels of the images.
        image_size: side of the square to which a folder's images are brought, as [`load_images`] does; that of
            `data`, where its images were brought to one.

    Returns:
        The perturbation, float32 `(N, C, H, W)` for images in [0, 1], one row per image of `data`, and what was
        recognised: `kind`, `rows` (how they were matched), `holds` and `norms` after rounding to 8 bits.

    Raises:
        ValueError: if the file cannot be read without unpickling, or does not fit `data` or the budget.
    """
    path, budget = Path(path), budget or {}
    check_budget(budget)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, but must be one of {', '.join(ORDERS)}.")
    if kind not in (None, "sample-wise", "class-wise"):
        raise ValueError(f"kind is {kind!r}, but sample-wise and class-wise are accepted.")
    ordered = data if in_order_of is None else in_order_of
    if path.is_dir() and (patterns := sorted(path.glob("perturbation_*.pth"))):
        rows = _read_clusters(path, patterns, ordered, budget, order)
    else:
        rows = _read_folder(path, ordered, image_size) if path.is_dir() else _read_file(path)
    rows.values = _channels_first(rows.values, data.images.shape[1:], path)
    kind = kind or _kind(len(rows.values), ordered, path)
    if kind == "class-wise":
        values, matched = _by_label(rows, data, path)
    elif in_order_of is None:
        values, how = _by_row(rows, data, path)
        matched = _IN_ORDER.get(how, how)
    else:
        values, matched = _by_order_of(in_order_of, rows, data, path)
    perturbation, holds = _recognise(values, data, kind, budget, path)
    if kind == "sample-wise" and order == "checked" and "perturbations" in holds:
        _check_order(perturbation, data, path)
    norms = measured_norms(data.images, apply_perturbation(data.images, perturbation))
    _check_norms(norms, budget, data.images.shape[1:], path)
    stated = (
        f"linf {norms['linf']}/255, l2 {norms['l2_mean']:.3f} (at most {norms['l2_max']:.3f}), l0 {norms['l0_max']}"
    )
    return perturbation, {"kind": kind, "rows": matched, "holds": holds, "norms": stated}


def check_budget(budget: Mapping[str, float]) -> None:
    """Refuse a declared budget with an unknown norm or a bound that bounds nothing."""
    for norm, bound in budget.items():
        if norm not in NORMS:
            raise ValueError(f"budget has {norm!r}, but {', '.join(NORMS)} are accepted.")
        if not 0 <= bound < math.inf:
            raise ValueError(f"budget has {norm} {bound}, but for {', '.join(NORMS)} numbers from 0 on are accepted.")


def _read_folder(path: Path, data: LabelledImages, image_size: int | None) -> _Rows:
    poisoned = load_images(path, image_size=image_size, channels=data.images.shape[3])
    names = poisoned.files if "file_name" in column_names(path) else ()
    numbers = [number_of(Path(name).stem) for name in names]
    complete = sorted(number for number in numbers if number is not None) == list(range(len(poisoned)))
    labels = None if poisoned.labels is None else _label_numbers(poisoned)
    # Row numbers mean nothing in another source, even where they are the same text.
    own = not _numbered_rows(poisoned)
    same = set(poisoned.ids) == set(data.ids)
    by_id = own and (same and not complete if names else same or not _numbered_rows(data))
    return _Rows(
        poisoned.images,
        labels if labels is not None and _comparable(poisoned, data) else None,
        poisoned.ids if by_id else None,
        np.array(numbers) if complete else None,
    )


def _read_clusters(
    path: Path, patterns: list[Path], data: LabelledImages, budget: Mapping[str, float], order: str
) -> _Rows:
    """
    What UC's program has after its first stage: one noise per cluster, and the cluster of each image.

    The noise is clamped and brought to the images' size as the program does it when it adds it.
    """
    if "linf" not in budget:
        raise ValueError(
            f"budget is {dict(budget)}, but {path.name!r} has noise that is clamped by linf when it is added."
        )
    if order != "given":
        raise ValueError(
            f"order is {order!r}, but {path.name!r} has the clusters of images whose order cannot be checked: 'given' "
            "takes them in the order of the clean images."
        )
    names = [f"perturbation_{number}.pth" for number in range(len(patterns))]
    if {pattern.name for pattern in patterns} != set(names):
        raise ValueError(
            f"perturbation is {path.name!r}, but its noises must be {names[0]} to {names[-1]}, all of them."
        )
    noises = [_read_file(path / name).values for name in names]
    if (shapes := {noise.shape for noise in noises}) != {(1, *noises[0].shape[-3:])}:
        raise ValueError(
            f"perturbation is {path.name!r}, whose noises have the shapes {', '.join(map(str, sorted(shapes)))}, but "
            "one shape (1, channels, height, width) is accepted."
        )
    members = [
        np.asarray(_as_array(found[_CLUSTERS], file))
        for file in sorted(path.iterdir())
        if file.suffix in SUFFIXES and file not in patterns
        if isinstance(found := _load(file), Mapping) and _CLUSTERS in found
    ]
    if len(members) != 1 or members[0].shape != (len(data),) or not _counts(members[0], len(noises)):
        raise ValueError(
            f"perturbation is {path.name!r}, but must hold one file with {_CLUSTERS}, the cluster of each of "
            f"{len(data)} images, below {len(noises)}: whole numbers from 0 on."
        )
    bound = budget["linf"] / 255
    noise = torch.from_numpy(np.concatenate(noises)).float().clamp(-bound, bound)
    return _Rows(F.interpolate(noise, data.images.shape[1:3]).numpy()[members[0]])


def _counts(numbers: np.ndarray, end: int) -> bool:
    """Whether they are whole numbers from 0 to below `end`."""
    return numbers.dtype.kind in "iu" and numbers.min() >= 0 and numbers.max() < end


def _read_file(path: Path) -> _Rows:
    """The array of a file, and its labels, ids and row numbers where it has them."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"perturbation is {path.name!r}, but {', '.join(SUFFIXES)} files are accepted; {_CONVERT}.")
    if not path.exists():
        raise ValueError(f"perturbation is {str(path)!r}, but there is no such file.")
    found = _load(path)
    if not isinstance(found, Mapping):
        return _Rows(_as_array(found, path))
    if isinstance(network := found.get("model"), Mapping) and "delta" in network:
        return _Rows(_as_array(network["delta"], path))  # a checkpoint of CP's, whose noise is a parameter
    # A "packed" file has settings and target images beside its noise.
    arrays = {str(name): _as_array(value, path) for name, value in found.items() if _is_array(value)}
    images = [name for name, array in arrays.items() if array.ndim == 4]
    images = [name for name in images if name in _PREFERRED][:1] or images
    if len(images) != 1:
        raise ValueError(
            f"perturbation is {path.name!r} with {sorted(map(str, found))}, but one array of four dimensions is "
            "needed."
        )
    labels, ids, numbers = (
        next((arrays[name].ravel() for name in names if name in arrays), None)
        for names in (LABEL_ARRAYS, ("ids",), _NUMBERS)
    )
    values = arrays[images[0]]
    for what, found in (("labels", labels), ("ids", ids), ("row numbers", numbers)):
        if found is not None and len(found) != len(values):
            raise ValueError(
                f"perturbation is {path.name!r} with {len(values)} rows and {len(found)} {what}, but one for each row "
                "is accepted."
            )
    return _Rows(values, labels, None if ids is None else tuple(map(str, ids.tolist())), numbers)


def _load(path: Path):
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True)
        return read_npz(path) if path.suffix == ".npz" else read_npy(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"perturbation is {path.name!r}, which {_damaged(path)}.") from error
    except Exception as error:  # what torch's loader raises depends on the bytes
        if "grows from" in str(error):  # a bomb
            raise ValueError(f"perturbation is {path.name!r}, but {error}") from error
        # torch says at length how to unpickle all the same; that is no advice for a file from elsewhere.
        reason = _damaged(path) if _pointer(path) else "can only be read by running code from it, or is damaged"
        raise ValueError(f"perturbation is {path.name!r}, but it {reason}; {_CONVERT}.") from error


def _damaged(path: Path) -> str:
    return "is a Git LFS pointer (git lfs pull fetches the file)" if _pointer(path) else "is damaged or cut off"


def _pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return is_lfs_pointer(file.read(64))


def _is_array(value) -> bool:
    if isinstance(value, (list, tuple)):
        same = {type(row) for row in value}
        return len(same) == 1 and same <= {torch.Tensor, int, float, str}
    return isinstance(value, (torch.Tensor, np.ndarray))


def _as_array(value, path: Path) -> np.ndarray:
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(row, torch.Tensor) for row in value):
            value = torch.stack(list(value))
        if isinstance(value, torch.Tensor):
            narrow = value.is_floating_point() and value.dtype != torch.float64  # NumPy lacks some of these
            return (value.detach().float() if narrow else value.detach()).numpy()
        if isinstance(value, (np.ndarray, list)):
            return np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # sparse, of several shapes, or of tensors and numbers
        raise _no_array(value, path) from error
    raise _no_array(value, path)


def _no_array(value, path: Path) -> ValueError:
    return ValueError(
        f"perturbation is {path.name!r} with a {type(value).__name__}, but dense tensors and arrays of one shape are "
        "accepted."
    )


def _channels_first(values: np.ndarray, shape: tuple[int, int, int], path: Path) -> np.ndarray:
    height, width, channels = shape
    if values.shape[1:] == (channels, height, width):
        return values
    if values.shape[1:] == (height, width, channels):
        return values.transpose(0, 3, 1, 2)
    raise ValueError(
        f"perturbation is {path.name!r} of shape {values.shape}, but images of {height} x {width} x {channels} need "
        f"(rows, {channels}, {height}, {width}) or (rows, {height}, {width}, {channels})."
    )


def _kind(rows: int, data: LabelledImages, path: Path) -> str:
    num_classes = None if data.labels is None else data.num_classes
    if rows == num_classes == len(data):
        raise ValueError(f"kind must say whether the {rows} rows of {path.name!r} are sample-wise or class-wise.")
    if rows == len(data):
        return "sample-wise"
    if rows == num_classes:
        return "class-wise"
    accepted = f"{len(data)} (one per image)" + ("" if num_classes is None else f" or {num_classes} (one per class)")
    raise ValueError(f"perturbation is {path.name!r} with {rows} rows, but {accepted} are accepted.")


def _by_label(rows: _Rows, data: LabelledImages, path: Path) -> tuple[np.ndarray, str]:
    """The row of each image's class: its number where classes are named by numbers, else its place among the names."""
    if data.labels is None:
        raise ValueError(f"perturbation is {path.name!r}, which is class-wise, but the clean images have no labels.")
    values, names = _in_order_of_classes(rows, data, path), data.class_names
    row_of = _class_numbers(data)
    if len(row_of) == len(values):  # classes 1 to 10, say, have rows 0 to 9
        row_of = np.argsort(np.argsort(row_of))
    row = row_of[data.labels]
    if row.max() >= len(values):
        raise ValueError(f"perturbation is {path.name!r} with {len(values)} rows, but labels go up to {row.max()}.")
    if len(row_of) != len(values) and any(number_of(name) is None for name in names or ()):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but the clean images name {len(names)} classes."
        )
    pairs = sorted(set(zip(row.tolist(), data.labels.tolist())))
    shown = ", ".join(f"{row} for {label if names is None else names[label]}" for row, label in pairs[:12])
    return values[row], shown + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def _in_order_of_classes(rows: _Rows, data: LabelledImages, path: Path) -> np.ndarray:
    """Class-wise rows by class, where the file says of each row which class it is of."""
    given = next((one for one in (rows.labels, rows.numbers, rows.ids) if one is not None), None)
    if given is None:
        return rows.values
    count, classes = len(rows.values), _as_class_numbers(given, data, path)
    if sorted(classes.tolist()) not in (list(range(count)), sorted(_class_numbers(data).tolist())):
        raise ValueError(
            f"perturbation is {path.name!r}, whose {count} class-wise rows are of the classes "
            f"{', '.join(map(str, classes[:12]))}, but each class once is accepted."
        )
    return rows.values[np.argsort(classes)]


def _by_row(rows: _Rows, data: LabelledImages, path: Path) -> tuple[np.ndarray, str]:
    """The row of each image, by id, by number or in their order; and in words which."""
    values, labels = rows.values, None
    if len(values) != len(data):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but there are {len(data)} clean images."
        )
    if rows.labels is not None and data.labels is not None:
        labels = _as_class_numbers(rows.labels, data, path)
    how = ""
    if rows.ids is not None:
        row_of = {row_id: row for row, row_id in enumerate(rows.ids)}
        missing = [row_id for row_id in data.ids if row_id not in row_of]
        if missing:
            raise ValueError(f"perturbation is {path.name!r}, but its ids lack {missing[0]!r} of the clean images.")
        order, how = np.array([row_of[row_id] for row_id in data.ids]), "by id"
    elif rows.numbers is not None:
        numbers = rows.numbers
        if numbers.dtype.kind not in "iu" or sorted(numbers.tolist()) != list(range(len(data))):
            raise ValueError(
                f"perturbation is {path.name!r}, whose row numbers are not 0 to {len(data) - 1}, each of them once."
            )
        order, how = np.argsort(numbers), "by the numbers that the file has of them"
    else:
        order = np.arange(len(data))
    values, labels = values[order], None if labels is None else labels[order]
    if not how and (ungrouped := _ungrouped(values, labels, data)) is not None:
        return ungrouped, "grouped by class"
    if labels is not None and not np.array_equal(labels, _label_numbers(data)):
        row = int(np.argmax(labels != _label_numbers(data)))
        raise ValueError(
            f"perturbation is {path.name!r}, whose labels are not in the clean images' order, from row {row} on."
        )
    return values, how


def _ungrouped(values: np.ndarray, labels: np.ndarray | None, data: LabelledImages) -> np.ndarray | None:
    """
    Rows that are grouped by class, each in the place of its image; None for others.

    Labels tell, where there are some: they are those of the images, sorted. Without labels, poisoned images tell: they
    resemble the clean ones in that order and not in theirs.
    """
    if data.labels is None:
        return None
    own = _label_numbers(data)
    by_class = np.argsort(own, kind="stable")
    if np.array_equal(by_class, np.arange(len(data))):
        return None
    if labels is not None:
        grouped = np.array_equal(labels, own[by_class])
    else:
        clean, part = data.tensor(), torch.linspace(0, len(values) - 1, min(512, len(values))).long()
        found = torch.from_numpy(np.ascontiguousarray(values[part.numpy()]).astype(np.float32))
        likenesses = [likeness(found, clean[rows]) for rows in (part, torch.from_numpy(by_class)[part])]
        grouped = likenesses[0] <= RESEMBLANCE < likenesses[1]
    return values[np.argsort(by_class)] if grouped else None


def _by_order_of(ordered: LabelledImages, rows: _Rows, data: LabelledImages, path: Path) -> tuple[np.ndarray, str]:
    """The row of each image: that of the same image in `ordered`, to which rows belong as `_by_row` has it."""
    if set(rows.ids or ()) != set(ordered.ids):
        rows.ids = None  # of another source, in which they mean nothing
    values, how = _by_row(rows, ordered, path)
    return _by_content(values, data, ordered), f"{how}, by the pixels of in_order_of".removeprefix(", ")


def _by_content(values: np.ndarray, data: LabelledImages, ordered: LabelledImages) -> np.ndarray:
    """The row of each image, as the same image has in a set whose rows these are."""
    rows: dict[bytes, list[int]] = {}
    for row, image in enumerate(ordered.images):
        rows.setdefault(image.tobytes(), []).append(row)
    order = []
    for id_, image in zip(data.ids, data.images):
        found = rows.get(image.tobytes())
        if not found:
            raise ValueError(f"in_order_of lacks the clean image {id_!r}, but must hold the pixels of each of them.")
        # Of equal images, each takes a row of its own as long as there is one.
        order.append(found.pop(0) if len(found) > 1 else found[0])
    return values[order]


def _check_order(perturbation: torch.Tensor, data: LabelledImages, path: Path) -> None:
    """Refuse noise that was made for images in another order."""
    count, share = points_outwards(perturbation, data.images)
    if count >= _ENOUGH_SATURATED and share > _OUTWARDS:
        raise ValueError(
            f"perturbation is {path.name!r}, which makes {100 * share:.0f} % of the black and white values darker and "
            "lighter still, but noise in the clean images' order never does: give in_order_of (the same images in the "
            "file's order, which is torchvision's for most), or order 'given' for noise that was not clipped."
        )


def _class_numbers(data: LabelledImages) -> np.ndarray:
    """The classes, as numbers of another source: what they are called, where that is a number, else their places."""
    numbers = [number_of(name) for name in data.class_names or ()]
    return np.arange(data.num_classes) if not numbers or None in numbers else np.array(numbers)


def _label_numbers(data: LabelledImages) -> np.ndarray:
    """The labels, as numbers of another source."""
    return _class_numbers(data)[data.labels]


def _as_class_numbers(labels, data: LabelledImages, path: Path) -> np.ndarray:
    """Labels of a file as such numbers: texts are names of classes, or numbers themselves."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "US":
        return labels
    number = dict(zip(data.class_names or (), _class_numbers(data).tolist()))
    numbers = {text: number.get(text, number_of(text)) for text in labels.astype(str).tolist()}
    if unknown := [text for text, found in numbers.items() if found is None]:
        raise ValueError(
            f"perturbation is {path.name!r} with the label {unknown[0]!r}, but the clean images have no such class."
        )
    return np.array([numbers[text] for text in labels.astype(str).tolist()])


def _comparable(one: LabelledImages, other: LabelledImages) -> bool:
    """Whether labels of two sets mean the same classes: the same names, or numbers on one side."""
    names = [data.class_names for data in (one, other) if data.class_names is not None]
    numbers = any(all(number_of(name) is not None for name in of_one) for of_one in names)
    return len(names) < 2 or numbers or names[0] == names[1]


def _numbered_rows(data: LabelledImages) -> bool:
    """Whether the ids are row numbers, which mean nothing in another source."""
    return data.id_space != ""


def _recognise(
    values: np.ndarray, data: LabelledImages, kind: str, budget: Mapping[str, float], path: Path
) -> tuple[torch.Tensor, str]:
    """The perturbation for images in [0, 1], and in words what the file held."""
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"perturbation is {path.name!r} of {values.dtype}, but finite numbers are accepted.")
    lowest, highest = float(values.min()), float(values.max())
    integers = values.dtype.kind in "iu"
    range_text = f"values from {lowest:.4g} to {highest:.4g} ({values.dtype})"
    values = torch.from_numpy(values.astype(np.float32))
    clean = data.tensor()
    if kind == "sample-wise":
        if (found := as_poisoned_images(values, clean, path.name)) is not None:
            images, words = found
            return images - clean, f"poisoned images {words}, {range_text}"
        unit = 255 if highest > 1 else 1
        elsewhere = row_in_another_place(values, clean)
        if elsewhere is not None or (lowest >= 0 and highest > 0.5 * unit and values.mean() > 0.1 * unit):
            which = (
                "" if elsewhere is None else f": row {elsewhere[0]} resembles the clean image of row {elsewhere[1]}"
            )
            raise ValueError(
                f"perturbation is {path.name!r} with {range_text}, which look like images, "
                f"but not like the clean ones in their order{which}."
            )
    if lowest < -255 or highest > 255:
        raise ValueError(f"perturbation is {path.name!r} with {range_text}, but values within 255 of 0 are accepted.")
    if integers or max(-lowest, highest) > 1:
        values, unit = values / 255, "in 1/255"
    elif _is_fraction(values, clean, budget):
        values, unit = values * budget["linf"] / 255, f"as fractions of {budget['linf']:g}/255"
    else:
        unit = "for images in an interval of length 1"
    if not budget and values.square().mean().sqrt() > 0.5 * clean.std():
        raise ValueError(
            f"budget is empty, but {path.name!r} with {range_text} is as large as images are; declare linf, l2 or l0."
        )
    return values, f"perturbations {unit}, {range_text}"


def _is_fraction(values: torch.Tensor, clean: torch.Tensor, budget: Mapping[str, float]) -> bool:
    """Whether noise within [-1, 1] is in units of its bound, as CP's: else it would be as large as the images are."""
    largest, size = float(values.abs().max()), float(values.square().mean().sqrt())
    return "linf" in budget and largest > 2 * budget["linf"] / 255 and largest > 0.99 and size > 0.5 * clean.std()


def _check_norms(norms: Mapping[str, float], budget: Mapping[str, float], shape: tuple[int, ...], path: Path) -> None:
    # What rounding or truncation to 8 bits may add: one level, or the norm of one level at half the values' spread.
    measured = {"linf": norms["linf"], "l2": norms["l2_max"], "l0": norms["l0_max"]}
    slack = {"linf": 1.0, "l2": 0.5 / 255 * float(np.sqrt(np.prod(shape))), "l0": 0.0}
    for norm, bound in budget.items():
        if measured[norm] > bound + slack[norm]:
            raise ValueError(
                f"perturbation is {path.name!r} with {norm} {measured[norm]:.4g}, but {bound:g} was declared."
            )
