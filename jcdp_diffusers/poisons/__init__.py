"""Availability poisons: perturbations that keep a classifier from learning anything useful of a data set.

A method is one file and one line in `_FILES`. The file offers

* `SOURCE`: the paper and, where there is one, the released program that it follows;
* `PRESETS`: name -> frozen dataclass with every number of the method: `published`, `cpu` (scaled down where the method
  is costly) and `smoke` (a few steps, for tests) at least;
* `budget(settings, shape)`: what the method promises of one image's perturbation, `shape` being `(C, H, W)`: a
  dictionary with any of `linf` (in 1/255), `l2` (images in [0, 1]) and `l0` (pixels), empty where the method has no
  budget;
* `perturb(images, labels, settings, *, seed, device, checkpoint_dir, progress)`: the perturbation.

`get` puts one signature and the checks of the input around the latter.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


_FILES = {
    "lsp": "lsp",
    "emn": "emn",
    "emn-class": "emn_class",
    "remn": "remn",
    "tap": "tap",
    "ops": "ops",
    "ar": "ar",
    "cuda": "cuda",
}
NAMES = tuple(_FILES)


def method(name: str) -> ModuleType:
    """The file of one method.

    Raises:
        ValueError: if there is no poison called `name`.
    """
    if name not in _FILES:
        raise ValueError(f"method is {name!r}, but the poisons are {', '.join(NAMES)}.")
    return importlib.import_module(f"{__name__}.{_FILES[name]}")


def settings(name: str, preset: Any = "published") -> Any:
    """The numbers of one method: a frozen dataclass.

    Args:
        name: a poison's name, one of `NAMES`.
        preset: the name of a preset, or an object of the method's own dataclass, which is returned as it is.

    Raises:
        ValueError: if the method or the preset is unknown.
    """
    presets = method(name).PRESETS
    if isinstance(preset, type(presets["published"])):
        return preset
    if preset not in presets:
        raise ValueError(f"preset is {preset!r}, but {name} has {', '.join(presets)}.")
    return presets[preset]


def budget(name: str, preset: Any, shape: tuple[int, int, int]) -> dict[str, float]:
    """What a method promises of the perturbation of one image of shape `(C, H, W)`, before rounding to 8 bits.

    Returns:
        Any of `linf` (largest change of a value, in 1/255), `l2` (Euclidean norm, images in [0, 1]) and `l0` (pixels
        changed).
    """
    return method(name).budget(settings(name, preset), shape)


def get(name: str) -> Callable[..., torch.Tensor]:
    """The poison called `name`.

    Returns:
        `poison(images, labels, *, seed=0, preset="published", device="cpu", checkpoint_dir=None, progress=False)`, a
        function that returns the perturbation, float32 `(N, C, H, W)` on the CPU, to be added to images in [0, 1]
        (`apply_perturbation`). It changes neither its arguments nor the state of any global random generator; the same
        seed gives the same perturbation.

        Its arguments: `images`, float `(N, C, H, W)` in [0, 1] with one or three channels; `labels`, int64 `(N,)`;
        `preset`, a name or an object of the method's dataclass; `device`, where networks run; `checkpoint_dir`, a
        folder in which a costly method keeps its state, so that the same call goes on where it was cut off;
        `progress`, whether to show a bar with the time that remains.

    Raises:
        ValueError: if there is no poison called `name`.
    """
    module = method(name)

    def poison(
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        seed: int = 0,
        preset: Any = "published",
        device: str | torch.device = "cpu",
        checkpoint_dir: str | Path | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        chosen = settings(name, preset)
        _check_images(images, labels)
        return module.perturb(
            images.detach().cpu().float(),
            labels.detach().cpu(),
            chosen,
            seed=seed,
            device=torch.device(device),
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
            progress=progress,
        )

    poison.__name__ = poison.__qualname__ = module.__name__.rpartition(".")[2]
    poison.__doc__ = module.__doc__
    return poison


def apply_perturbation(images: np.ndarray, perturbation: torch.Tensor | np.ndarray) -> np.ndarray:
    """Adds a perturbation to 8-bit images: in floating point, clipped to the valid range, rounded once.

    Args:
        images: uint8 `(N, H, W, C)`.
        perturbation: float `(N, C, H, W)`, for images in [0, 1].

    Returns:
        uint8 `(N, H, W, C)`.

    Raises:
        ValueError: if the two do not belong together.
    """
    perturbation = np.asarray(perturbation)
    n, height, width, channels = images.shape
    if images.dtype != np.uint8:
        raise ValueError(f"images has dtype {images.dtype}, but uint8 is needed.")
    if perturbation.shape != (n, channels, height, width):
        raise ValueError(
            f"perturbation has shape {perturbation.shape}, but the images need {(n, channels, height, width)}."
        )
    poisoned = np.empty_like(images)
    for start in range(0, n, 1024):
        rows = slice(start, start + 1024)
        moved = images[rows] + 255.0 * perturbation[rows].transpose(0, 2, 3, 1).astype(np.float64)
        poisoned[rows] = np.rint(moved.clip(0, 255))
    return poisoned


def measured_norms(clean: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """Sizes of a perturbation as published: of the 8-bit images, after clipping and rounding.

    Args:
        clean, poisoned: uint8 `(N, H, W, C)`, in the same order.

    Returns:
        `linf`: largest change of any value, in 1/255; `l2_mean`, `l2_max`: Euclidean norm per image, images in [0, 1];
        `l0_mean`, `l0_max`: pixels changed per image.

    Raises:
        ValueError: if the two arrays differ in shape.
    """
    if clean.shape != poisoned.shape:
        raise ValueError(f"poisoned has shape {poisoned.shape}, but the clean images have {clean.shape}.")
    largest, l2, l0 = 0, [], []
    for start in range(0, len(clean), 1024):
        rows = slice(start, start + 1024)
        change = poisoned[rows].astype(np.int32) - clean[rows]
        largest = max(largest, int(np.abs(change).max()))
        l2.append(np.sqrt(np.square(change).sum(axis=(1, 2, 3))) / 255)
        l0.append((change != 0).any(axis=3).sum(axis=(1, 2)))
    l2, l0 = np.concatenate(l2), np.concatenate(l0)
    return {
        "linf": largest,
        "l2_mean": float(l2.mean()),
        "l2_max": float(l2.max()),
        "l0_mean": float(l0.mean()),
        "l0_max": int(l0.max()),
    }


def _check_images(images: torch.Tensor, labels: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, but (N, 1 or 3, H, W) with N > 0 is needed.")
    if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"images holds {images.dtype} in [{images.min():g}, {images.max():g}], but floats in [0, 1] are needed."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {len(images)} images need as many labels.")
    if labels.dtype != torch.int64 or labels.min() < 0:
        raise ValueError(f"labels holds {labels.dtype} from {labels.min()} on, but int64 from 0 on is needed.")
