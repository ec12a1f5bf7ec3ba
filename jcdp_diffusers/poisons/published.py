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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from ..data import LabelledImages, load_images, open_dataset
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
    row_unlike_its_image,
)


SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors")
ORDERS = ("checked", "given")
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
            are then matched by the pixels of the images.

    Returns:
        The perturbation, float32 `(N, C, H, W)` for images in [0, 1], one row per image of `data`, and what was
        recognised: `kind`, `rows` (how they were matched), `holds` and `norms` after rounding to 8 bits.

    Raises:
        ValueError: if the file cannot be read without unpickling, or does not fit `data` or the budget.
    """
    path = Path(path)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, but must be one of {', '.join(ORDERS)}.")
    if kind not in (None, "sample-wise", "class-wise"):
        raise ValueError(f"kind is {kind!r}, but sample-wise and class-wise are accepted.")
    if path.is_dir() and (patterns := sorted(path.glob("perturbation_*.pth"))):
        rows = _read_clusters(path, patterns, data, budget or {}, order)
    else:
        rows = _read_folder(path, data) if path.is_dir() else _read_file(path)
    rows.values = _channels_first(rows.values, data.images.shape[1:], path)
    kind = kind or _kind(len(rows.values), data if in_order_of is None else in_order_of, path)
    if kind == "class-wise":
        values, matched = _by_label(rows.values, data, path)
    elif in_order_of is not None:
        values, grouped = _ungrouped(rows.values, rows.labels, in_order_of)
        values, matched = _by_content(values, data, in_order_of, path), f"{grouped}by the pixels of in_order_of"
    else:
        values, matched = _by_row(rows, data, path)
    perturbation, holds = _recognise(values, data, kind, budget or {}, path)
    if kind == "sample-wise" and order == "checked" and "perturbations" in holds:
        _check_order(perturbation, data, path)
    if "grouped" in matched and "poisoned images" in holds:
        clean = data.tensor()
        if (row := row_unlike_its_image(clean + perturbation, clean)) is not None:
            raise ValueError(
                f"perturbation is {path.name!r}, whose labels are those of the clean images, grouped by class, but "
                f"whose image for row {row} is not like the clean one."
            )
    norms = measured_norms(data.images, apply_perturbation(data.images, perturbation))
    _check_budget(norms, budget or {}, data.images.shape[1:], path)
    stated = (
        f"linf {norms['linf']}/255, l2 {norms['l2_mean']:.3f} (at most {norms['l2_max']:.3f}), l0 {norms['l0_max']}"
    )
    return perturbation, {"kind": kind, "rows": matched, "holds": holds, "norms": stated}


def _read_folder(path: Path, data: LabelledImages) -> _Rows:
    dataset = open_dataset(path)
    poisoned = load_images(dataset, channels=data.images.shape[3])
    names = dataset["file_name"][:] if "file_name" in dataset.column_names else []
    numbers = [number_of(Path(name).stem) for name in names]
    complete = sorted(number for number in numbers if number is not None) == list(range(len(poisoned)))
    labels = None if poisoned.labels is None else _label_numbers(poisoned)
    given = "file_name" not in dataset.column_names and not _numbered_rows(poisoned)
    return _Rows(
        poisoned.images,
        labels if labels is not None and _comparable(poisoned, data) else None,
        poisoned.ids if given or set(poisoned.ids) == set(data.ids) and not complete else None,
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
    noise = torch.cat([torch.from_numpy(_read_file(path / name).values).float() for name in names])
    members = [
        np.asarray(_as_array(found[_CLUSTERS], file))
        for file in sorted(path.iterdir())
        if file.suffix in SUFFIXES and file not in patterns
        if isinstance(found := _load(file), Mapping) and _CLUSTERS in found
    ]
    if len(members) != 1 or members[0].shape != (len(data),) or members[0].max() >= len(noise):
        raise ValueError(
            f"perturbation is {path.name!r}, but must hold one file with {_CLUSTERS}, the cluster of each of "
            f"{len(data)} images, below {len(noise)}."
        )
    bound = budget["linf"] / 255
    noise = F.interpolate(noise.clamp(-bound, bound), data.images.shape[1:3])
    return _Rows(noise.numpy()[members[0]])


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
    labels = next((arrays[name] for name in LABEL_ARRAYS if name in arrays), None)
    ids = tuple(map(str, arrays["ids"].tolist())) if "ids" in arrays else None
    numbers = next((arrays[name] for name in _NUMBERS if name in arrays), None)
    return _Rows(arrays[images[0]], labels, ids, numbers)


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
    if isinstance(value, torch.Tensor):
        return (
            value.detach().float().numpy()
            if value.dtype in (torch.bfloat16, torch.float16)
            else value.detach().numpy()
        )
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, torch.Tensor) for row in value):
        return torch.stack(list(value)).detach().numpy()
    if isinstance(value, (np.ndarray, list)):
        return np.asarray(value)
    raise ValueError(
        f"perturbation is {path.name!r} with a {type(value).__name__}, but tensors and arrays are accepted."
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


def _by_label(values: np.ndarray, data: LabelledImages, path: Path) -> tuple[np.ndarray, str]:
    """The row of each image's class: its number where classes are named by numbers, else its place among the names."""
    if data.labels is None:
        raise ValueError(f"perturbation is {path.name!r}, which is class-wise, but the clean images have no labels.")
    names = data.class_names
    in_names_order = names is None or len(names) == len(values)
    numbers = data.labels if in_names_order else _label_numbers(data)
    if numbers.max() >= len(values):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but labels go up to {numbers.max()}."
        )
    if not in_names_order and any(number_of(name) is None for name in names):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but the clean images name {len(names)} classes."
        )
    pairs = sorted(set(zip(numbers.tolist(), data.labels.tolist())))
    shown = ", ".join(f"{row} for {label if names is None else names[label]}" for row, label in pairs[:12])
    return values[numbers], shown + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def _by_row(rows: _Rows, data: LabelledImages, path: Path) -> tuple[np.ndarray, str]:
    """The row of each image, by id, by number or in their order; and in words which."""
    values, labels = rows.values, rows.labels
    if len(values) != len(data):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but there are {len(data)} clean images."
        )
    matched = "in the order of the clean images"
    if rows.ids is not None:
        row_of = {row_id: row for row, row_id in enumerate(rows.ids)}
        missing = [row_id for row_id in data.ids if row_id not in row_of]
        if missing:
            raise ValueError(f"perturbation is {path.name!r}, but its ids lack {missing[0]!r} of the clean images.")
        order, matched = np.array([row_of[row_id] for row_id in data.ids]), "by id"
    elif rows.numbers is not None:
        numbers = np.asarray(rows.numbers)
        if numbers.dtype.kind not in "iu" or sorted(numbers.tolist()) != list(range(len(data))):
            raise ValueError(
                f"perturbation is {path.name!r}, whose row numbers are not 0 to {len(data) - 1}, each of them once."
            )
        order, matched = np.argsort(numbers), "by the numbers that the file has of them"
    else:
        order = np.arange(len(data))
    values, labels = values[order], None if labels is None else np.asarray(labels).ravel()[order]
    if rows.ids is None and rows.numbers is None:
        values, grouped = _ungrouped(values, labels, data)
        if grouped:
            return values, f"{grouped}{matched} within a class"
    if labels is not None and data.labels is not None and not np.array_equal(labels, _label_numbers(data)):
        row = int(np.argmax(labels != _label_numbers(data)))
        raise ValueError(
            f"perturbation is {path.name!r}, whose labels are not in the clean images' order, from row {row} on."
        )
    return values, matched


def _ungrouped(values: np.ndarray, labels: np.ndarray | None, data: LabelledImages) -> tuple[np.ndarray, str]:
    """
    Rows that are grouped by class, each in the place of its image; others as they are.

    Labels tell, where there are some: they are those of the images, sorted. Without labels, poisoned images tell: they
    resemble the clean ones in that order and not in theirs.

    Returns:
        `tuple`: The rows, and "grouped by class, " or nothing.
    """
    if data.labels is None or len(values) != len(data):
        return values, ""
    own = _label_numbers(data)
    by_class = np.argsort(own, kind="stable")
    if np.array_equal(by_class, np.arange(len(data))):
        return values, ""
    if labels is not None:
        grouped = np.array_equal(np.asarray(labels).ravel(), own[by_class])
    else:
        clean, part = data.tensor(), torch.linspace(0, len(values) - 1, min(512, len(values))).long()
        found = torch.from_numpy(np.ascontiguousarray(values[part.numpy()]).astype(np.float32))
        likenesses = [likeness(found, clean[rows]) for rows in (part, torch.from_numpy(by_class)[part])]
        grouped = likenesses[0] <= RESEMBLANCE < likenesses[1]
    if not grouped:
        return values, ""
    return values[np.argsort(by_class)], "grouped by class, "


def _by_content(values: np.ndarray, data: LabelledImages, ordered: LabelledImages, path: Path) -> np.ndarray:
    """The row of each image, as the same image has in a set that is in the file's order."""
    if len(values) != len(ordered):
        raise ValueError(
            f"in_order_of has {len(ordered)} images, but {path.name!r} has {len(values)} rows; one image per row is "
            "accepted."
        )
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


def _label_numbers(data: LabelledImages) -> np.ndarray:
    """The labels, as numbers of another source: what the classes are called, where that is a number."""
    numbers = [number_of(name) for name in data.class_names or ()]
    if not numbers or None in numbers:
        return data.labels
    return np.array(numbers)[data.labels]


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
        if (reading := as_poisoned_images(values, clean, path.name)) is not None:
            return reading.images - clean, f"poisoned images {reading.words}, {range_text}"
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


def _check_budget(norms: Mapping[str, float], budget: Mapping[str, float], shape: tuple[int, ...], path: Path) -> None:
    # What rounding or truncation to 8 bits may add: one level, or the norm of one level at half the values' spread.
    measured = {"linf": norms["linf"], "l2": norms["l2_max"], "l0": norms["l0_max"]}
    slack = {"linf": 1.0, "l2": 0.5 / 255 * float(np.sqrt(np.prod(shape))), "l0": 0.0}
    for norm, bound in budget.items():
        if norm not in measured:
            raise ValueError(f"budget has {norm!r}, but {', '.join(measured)} are accepted.")
        if measured[norm] > bound + slack[norm]:
            raise ValueError(
                f"perturbation is {path.name!r} with {norm} {measured[norm]:.4g}, but {bound:g} was declared."
            )
