"""Bring your own poison: published perturbation files and folders of poisoned images.

Files come as tensors or arrays in `.pt`, `.pth`, `.npy`, `.npz` or `.safetensors`; one row per image (sample-wise, by
index) or per class (class-wise, by label); channels first or last; as perturbations or as poisoned images; in [0, 1],
[-0.5, 0.5], 0 to 255 or int8. What a file is, is found by trying what its shape and values allow and comparing with
the clean images; what was found is returned in words, and what does not fit the clean images is refused. Nothing is
ever unpickled, except by torch's loader for weights alone.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..data import LabelledImages, load_images
from ..data.perturbations import apply_perturbation, measured_norms


SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors")
LABEL_NAMES = ("label", "labels", "target", "targets")
# Poisoned images are taken for what they are when they resemble the clean ones at least this much: Pearson's
# correlation over the whole set. Images in another order come near 0; even CUDA, the strongest change, leaves more.
_RESEMBLANCE = 0.4


def read_perturbation(
    path: str | Path,
    data: LabelledImages,
    *,
    kind: str | None = None,
    budget: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, str]]:
    """Reads a perturbation that somebody published for `data`.

    Args:
        path: a file (see `SUFFIXES`) or a folder of poisoned images, numbered or in class subfolders.
        data: the clean images, in the order that the perturbation was made for. A `.npz` file with `ids` may be in any
            order.
        kind: "sample-wise" or "class-wise"; found by the number of rows where that is enough.
        budget: the norms it is declared to keep, any of `linf` (in 1/255), `l2` (images in [0, 1]) and `l0` (pixels).

    Returns:
        The perturbation, float32 `(N, C, H, W)` for images in [0, 1], one row per image of `data`, and what was
        recognised: `kind`, `holds` and `norms` after rounding to 8 bits.

    Raises:
        ValueError: if the file cannot be read without unpickling, or does not fit `data` or the budget.
    """
    path = Path(path)
    if kind not in (None, "sample-wise", "class-wise"):
        raise ValueError(f"kind is {kind!r}, but sample-wise and class-wise are accepted.")
    values, labels, ids = _read_folder(path, data) if path.is_dir() else _read_file(path)
    values = _channels_first(values, data.images.shape[1:], path)
    kind = kind or _kind(len(values), data, path)
    if kind == "class-wise":
        values = _by_label(values, data, path)
    else:
        values = _by_row(values, labels, ids, data, path)
    perturbation, holds = _recognise(values, data, kind, budget or {}, path)
    norms = measured_norms(data.images, apply_perturbation(data.images, perturbation))
    _check_budget(norms, budget or {}, data.images.shape[1:], path)
    stated = (
        f"linf {norms['linf']}/255, l2 {norms['l2_mean']:.3f} (at most {norms['l2_max']:.3f}), l0 {norms['l0_max']}"
    )
    return perturbation, {"kind": kind, "holds": holds, "norms": stated}


def _read_folder(path: Path, data: LabelledImages) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    poisoned = load_images(path, channels=data.images.shape[3])
    return poisoned.images, poisoned.labels, poisoned.ids if set(poisoned.ids) == set(data.ids) else None


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """The array of a file, and its labels and ids where it has them."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"perturbation is {path.name!r}, but {', '.join(SUFFIXES)} files are accepted.")
    if not path.exists():
        raise ValueError(f"perturbation is {str(path)!r}, but there is no such file.")
    found = _load(path)
    if not isinstance(found, Mapping):
        return _as_array(found, path), None, None
    arrays = {str(name): _as_array(value, path) for name, value in found.items()}
    images = [name for name, array in arrays.items() if array.ndim == 4]
    if len(images) != 1:
        raise ValueError(
            f"perturbation is {path.name!r} with {sorted(arrays)}, but one array of four dimensions is needed."
        )
    labels = next((arrays[name] for name in LABEL_NAMES if name in arrays), None)
    ids = tuple(arrays["ids"].tolist()) if "ids" in arrays else None
    return arrays[images[0]], labels, ids


def _load(path: Path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        if path.suffix in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if path.suffix == ".npz" else loaded
    except (pickle.UnpicklingError, ValueError) as error:
        # numpy and torch say at length how to unpickle all the same; that is no advice for a file from elsewhere.
        raise ValueError(
            f"perturbation is {path.name!r}, but it can only be read by running code from it, or is damaged; "
            "plain tensors and arrays are accepted."
        ) from error


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
    num_classes = None if data.labels is None else len(data.class_names or range(int(data.labels.max()) + 1))
    if rows == num_classes == len(data):
        raise ValueError(f"kind must say whether the {rows} rows of {path.name!r} are sample-wise or class-wise.")
    if rows == len(data):
        return "sample-wise"
    if rows == num_classes:
        return "class-wise"
    accepted = f"{len(data)} (one per image)" + ("" if num_classes is None else f" or {num_classes} (one per class)")
    raise ValueError(f"perturbation is {path.name!r} with {rows} rows, but {accepted} are accepted.")


def _by_label(values: np.ndarray, data: LabelledImages, path: Path) -> np.ndarray:
    if data.labels is None:
        raise ValueError(f"perturbation is {path.name!r}, which is class-wise, but the clean images have no labels.")
    if data.labels.max() >= len(values):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but labels go up to {data.labels.max()}."
        )
    return values[data.labels]


def _by_row(
    values: np.ndarray,
    labels: np.ndarray | None,
    ids: tuple[str, ...] | None,
    data: LabelledImages,
    path: Path,
) -> np.ndarray:
    if len(values) != len(data):
        raise ValueError(
            f"perturbation is {path.name!r} with {len(values)} rows, but there are {len(data)} clean images."
        )
    if ids is not None:
        row_of = {row_id: row for row, row_id in enumerate(ids)}
        missing = [row_id for row_id in data.ids if row_id not in row_of]
        if missing:
            raise ValueError(f"perturbation is {path.name!r}, but its ids lack {missing[0]!r} of the clean images.")
        order = [row_of[row_id] for row_id in data.ids]
        values, labels = values[order], None if labels is None else np.asarray(labels)[order]
    if labels is not None and data.labels is not None and not np.array_equal(labels, data.labels):
        row = int(np.argmax(np.asarray(labels) != data.labels)) if len(labels) == len(data) else 0
        raise ValueError(
            f"perturbation is {path.name!r}, whose labels are not in the clean images' order, from row {row} on."
        )
    return values


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
        scales = (
            ("in [0, 1]", 0.0, 1.0, 1.0, 0.0),
            ("in [-0.5, 0.5]", -0.5, 0.5, 1.0, 0.5),
            ("0 to 255", 0.0, 255.0, 1 / 255, 0.0),
        )
        for name, low, high, factor, offset in scales:
            # A set of natural images uses most of its range; a perturbation of that size could be seen in any image.
            fits = low <= lowest and highest <= high and highest - lowest > 0.5 * (high - low)
            if fits and _correlation(values, clean) > _RESEMBLANCE:
                return factor * values + offset - clean, f"poisoned images {name}, {range_text}"
        unit = 255 if highest > 1 else 1
        if lowest >= 0 and highest > 0.5 * unit and values.mean() > 0.1 * unit:
            raise ValueError(
                f"perturbation is {path.name!r} with {range_text}, which look like images, "
                "but not like the clean ones in their order."
            )
    if lowest < -255 or highest > 255:
        raise ValueError(f"perturbation is {path.name!r} with {range_text}, but values within 255 of 0 are accepted.")
    if integers or max(-lowest, highest) > 1:
        values, unit = values / 255, "in 1/255"
    else:
        unit = "for images in an interval of length 1"
    if not budget and values.square().mean().sqrt() > 0.5 * clean.std():
        raise ValueError(
            f"budget is empty, but {path.name!r} with {range_text} is as large as images are; declare linf, l2 or l0."
        )
    return values, f"perturbations {unit}, {range_text}"


def _correlation(values: torch.Tensor, clean: torch.Tensor) -> float:
    values, clean = values.flatten() - values.mean(), clean.flatten() - clean.mean()
    return float((values @ clean) / (values.norm() * clean.norm()).clamp(min=1e-12))


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
