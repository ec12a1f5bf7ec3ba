"""
Availability poisons: perturbations that keep a classifier from learning anything useful from a data set.

A method is one file with a tuple `POISONS` of [`Poison`], and one line in `_FILES` for each name. A `Poison` declares
what the method needs and promises; the command, the tables, the cards and the tests read it from there.

    perturbation = poisons.get("lsp")(images, labels, seed=0, preset="published")
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ..devices import check_seed, usable_device
from .numbers import check_numbers


# Name -> file. Tables show the methods in this order.
_FILES = {
    "emn": "emn",
    "emn-class": "emn",
    "remn": "remn",
    "lsp": "lsp",
    "tap": "tap",
    "ops": "ops",
    "ar": "ar",
    "cuda": "cuda",
    "sem": "remn",
    "pil": "pil",
    "aue": "aue",
    "aap": "aap",
    "dune": "dune",
    "cp-c": "cp",
    "cp-s": "cp",
    "tue": "tue",
    "uc": "uc",
    "uc-clip": "uc",
}
NAMES = tuple(_FILES)


@dataclass(frozen=True)
class Poison:
    """
    One method, and what it declares.

    Args:
        name (`str`): What commands and records call it.
        title (`str`): What tables call it.
        source (`str`): The paper and, where there is one, the released program that it follows.
        presets (`dict`): Name -> frozen dataclass with every number of the method: `published`, `cpu` (scaled down
            where the method is costly) and `smoke` (a few steps, for tests) at least.
        budget (`Callable`): `budget(settings, shape)`, what the method promises of one image's perturbation before
            rounding to 8 bits, `shape` being `(C, H, W)`: a dict with any of `linf` (largest change of a value, in
            1/255), `l2` (Euclidean norm, images in [0, 1]) and `l0` (pixels changed); empty where there is no budget.
        perturb (`Callable`): `perturb(images, labels, settings, *, seed, device, checkpoint_dir, progress)`, which
            returns the perturbation, float `(N, C, H, W)`. It is called with checked input, in which every class from
            0 to the largest label has images, except for single pictures.
        uses_labels (`bool`, *optional*, defaults to `True`): Whether the perturbation depends on the labels. A method
            that does not is called with `labels=None`.
        surrogate (`str`, *optional*): How the network learned for which the method optimises the perturbation:
            `"supervised"` or `"contrastive"`, on these images, or `"pretrained"`, elsewhere. Such a method keeps its
            state in `checkpoint_dir`. `None`: no network.
        uses_seed (`bool`, *optional*, defaults to `True`): Whether the seed changes anything.
        least_classes (`int`, *optional*, defaults to 1): Classes that the labels must hold. A network that learns from
            labels, and whatever compares classes, needs two.
        suits_single_images (`bool`, *optional*, defaults to `False`): Whether one picture can be protected without a
            data set: its noise depends on no other image's pixels. It may depend on the number of classes and images,
            as LSP's does, and is then another one than the same picture has in a data set.
        needs_whole_patches (`bool`, *optional*, defaults to `False`): Whether its patches must fill an image. A single
            picture of any size is then protected as a part of a square that they fill.
    """

    name: str
    title: str
    source: str
    presets: Mapping[str, Any]
    budget: Callable[[Any, tuple[int, int, int]], dict[str, float]]
    perturb: Callable[..., torch.Tensor]
    uses_labels: bool = True
    surrogate: str | None = None
    uses_seed: bool = True
    least_classes: int = 1
    suits_single_images: bool = False
    needs_whole_patches: bool = False

    @property
    def file_digest(self) -> str:
        """16 hexadecimal digits of the method's file, by which a set that another version of it made is told apart."""
        file = Path(__file__).with_name(f"{_FILES[self.name]}.py")
        return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()

    def settings(self, preset: Any = "published") -> Any:
        """
        Every number of the method under one preset.

        Args:
            preset (`str` or dataclass): Name of a preset, or an object of the method's own dataclass, which is
                returned as it is.

        Raises:
            ValueError: If the method has no such preset, or could not use a number.
        """
        if type(preset) is type(self.presets["published"]):
            check_numbers(preset)
            return preset
        if not isinstance(preset, str) or preset not in self.presets:
            raise ValueError(f"preset is {preset!r}, but for {self.name} must be one of {', '.join(self.presets)}.")
        return self.presets[preset]

    def changed(self, preset: Any, changes: Mapping[str, Any], *, name: str = "settings") -> Any:
        """
        The numbers of the method under a preset, with some of them replaced.

        A dataclass may have a method `shared()`, by field that holds a dataclass the names that it has in common with
        it. Such a change is made in both.

        Args:
            preset (`str` or dataclass): See [`~Poison.settings`].
            changes (`dict`): By field of the method's dataclass, `start.rounds` for a field within a field. Nothing to
                replace leaves the preset as it is given.
            name (`str`): Of the argument or option, for the error.

        Returns:
            `str` or dataclass: What [`~Poison.settings`] takes.

        Raises:
            ValueError: If a field is unknown, or a value is of another type than the field.
        """
        if not changes:
            return preset
        settings = self.settings(preset)
        types = _types(type(settings))
        for field, value in changes.items():
            if field not in types:
                raise ValueError(f"{name} has {field!r}, but must have fields of {self.name}: {', '.join(types)}.")
            accepted = get_args(types[field]) or (types[field],)
            if type(value) not in accepted and not (type(value) is int and float in accepted):
                kinds = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in accepted)
                raise ValueError(f"{name} has {field} {value!r}, but it must be {kinds}.")
        return _replaced(settings, changes)

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        seed: int = 0,
        preset: Any = "published",
        device: str | torch.device = "cpu",
        checkpoint_dir: str | Path | None = None,
        progress: bool = False,
        keep_labels: bool = False,
    ) -> torch.Tensor:
        """
        The perturbation, to be added to the images and rounded once (`data.perturbations.apply_perturbation`).

        Neither the arguments nor the state of a global random generator change. The same seed gives the same
        perturbation.

        Methods number the classes that have images, in the order of their labels: labels 1, 3 and 7 give the
        perturbation of labels 0, 1 and 2.

        Args:
            images (`torch.Tensor`): Float `(N, C, H, W)` in [0, 1], one or three channels.
            labels (`torch.Tensor`, *optional*): int64 `(N,)`, from 0 on; needed where `uses_labels`.
            seed (`int`, *optional*, defaults to 0): Of everything random.
            preset (`str` or dataclass, *optional*, defaults to `"published"`): See [`~Poison.settings`].
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where networks run.
            checkpoint_dir (`str` or `Path`, *optional*): Folder in which a costly method keeps its state, so that the
                same call continues an interrupted one.
            progress (`bool`, *optional*, defaults to `False`): Show a bar with the time that remains.
            keep_labels (`bool`, *optional*, defaults to `False`): Whether a method takes labels as the numbers of
                classes although some have no images, for a single picture of one class among others.

        Returns:
            `torch.Tensor`: float32 `(N, C, H, W)` on the CPU.

        Raises:
            ValueError: If the images, the labels or the preset are not as described.
        """
        check_seed(seed)
        settings = self.settings(preset)
        _check_images(images)
        if self.uses_labels:
            _check_labels(labels, len(images), self.name, self.least_classes)
            labels = labels.detach().cpu()
            if not keep_labels:
                # A network would have an output, and an image a target, that stands for a class without images.
                labels = labels.unique(return_inverse=True)[1]
        return self.perturb(
            images.detach().cpu().float(),
            labels if self.uses_labels else None,
            settings,
            seed=seed,
            device=usable_device(device),
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
            progress=progress,
        )


def get(name: str) -> Poison:
    """
    The poison called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in _FILES:
        raise ValueError(f"method is {name!r}, but must be one of {', '.join(NAMES)}.")
    offered = importlib.import_module(f"{__name__}.{_FILES[name]}").POISONS
    return next(poison for poison in offered if poison.name == name)


def settings(name: str, preset: Any = "published") -> Any:
    """The numbers of the poison called `name`; see [`~Poison.settings`]."""
    return get(name).settings(preset)


def budget(name: str, preset: Any, shape: tuple[int, int, int]) -> dict[str, float]:
    """What the poison called `name` promises of the perturbation of one image of shape `(C, H, W)`; see [`Poison`]."""
    return get(name).budget(settings(name, preset), shape)


def settings_of_card(name: str, numbers: Mapping[str, Any]) -> Any:
    """The settings of the poison called `name` from what a card holds of them: lists and dicts in place of objects."""
    return _from_card(type(get(name).presets["published"]), numbers)


def _from_card(kind: type, numbers: Mapping[str, Any]) -> Any:
    types, values = get_type_hints(kind), {}
    for field, value in numbers.items():
        if is_dataclass(types[field]):
            value = _from_card(types[field], value)
        values[field] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _types(kind: type) -> dict[str, Any]:
    """Types by field of a dataclass, those within a field under both names: `start.rounds`."""
    hints, found = get_type_hints(kind), {}
    for name in (entry.name for entry in fields(kind)):
        found[name] = hints[name]
        if is_dataclass(hints[name]):
            found |= {f"{name}.{inner}": type_ for inner, type_ in _types(hints[name]).items()}
    return found


def _replaced(settings: Any, changes: Mapping[str, Any]) -> Any:
    """Settings with other numbers, all at once, so that they are checked together."""
    own = {name: value for name, value in changes.items() if "." not in name}
    inner = {}
    for field, names in settings.shared().items() if hasattr(settings, "shared") else ():
        inner[field] = {name: own[name] for name in names if name in own}
    for name, value in changes.items():
        field, dot, rest = name.partition(".")
        if dot:
            inner[field] = inner.get(field, {}) | {rest: value}
    for field, numbers in inner.items():
        own[field] = _replaced(own.get(field, getattr(settings, field)), numbers)
    return replace(settings, **own)


def _check_images(images: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, but must have (N, 1 or 3, H, W) with N > 0.")
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images holds {images.dtype} in [{images.min():g}, {images.max():g}], but must hold floats in [0, 1]."
        )


def _check_labels(labels: torch.Tensor | None, count: int, name: str, least_classes: int) -> None:
    if labels is None:
        raise ValueError(f"labels is None, but {name} needs one for every image.")
    if labels.shape != (count,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {count} images must have as many labels.")
    if labels.dtype != torch.int64 or labels.min() < 0:
        raise ValueError(f"labels holds {labels.dtype} from {labels.min()} on, but must hold int64 from 0 on.")
    if (classes := len(labels.unique())) < least_classes:
        raise ValueError(f"labels holds {classes} class, but must hold at least {least_classes} for {name}.")
