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
