"""Countermeasures: what someone who wants to learn from protected images does against the protection.

A countermeasure is one of three kinds, each a function with one signature:

* `"dataset"`, data set to data set, before training: `function(data, context) -> LabelledImages`;
* `"transform"`, a per-image transform at load: `function(image) -> image`, uint8 (H, W, C), without chance;
* `"hook"`, a hook around the training step: `function(data, context) -> hook`, the hook being what
  `victims.training` describes.

`get(name).prepare(train)` hides the difference, so that any countermeasure goes with any poison and victim by name:

    prepared = countermeasures.get("jpeg-10").prepare(train, seed=0)
    train_victim(prepared.data, test, hooks=prepared.hooks)

Names may be joined: `"jcdp+corruption"` purifies and then trains with corrupted images. The order counts: a hook that
is fitted to images, such as `orthogonal-projection`, is fitted to what stands before it. Test images never pass
through any of this.

A family of countermeasures is one file with a tuple `COUNTERMEASURES`, and each of its names is a line in `_FILES`.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import LabelledImages
from .draws import Draws


KINDS = ("dataset", "transform", "hook", "combination")

_FILES = {
    "gray": "iss",
    "jpeg-10": "iss",
    "bdr-2": "iss",
    "impulse-filter": "impulse",
    "jcdp": "purifiers",
    "jcdp-code": "purifiers",
    "unconditional": "purifiers",
    "avatar": "purifiers",
    "diffpure": "purifiers",
    "diffpure-l2": "purifiers",
    "gdmp": "purifiers",
    "eclipse-purifier": "eclipse",
    "corruption": "eclipse",
    "orthogonal-projection": "orthogonal_projection",
    "cutout": "augmentation",
    "mixup": "augmentation",
    "cutmix": "augmentation",
    "fast-autoaugment": "fast_autoaugment",
    "random-noise": "augmentation",
    "ueraser-lite": "ueraser",
    "ueraser": "ueraser",
    "ueraser-max": "ueraser",
    "at-4": "adversarial_training",
    "at-8": "adversarial_training",
}
# Files whose hooks replace the loss, which only one hook may (`victims.training`).
_REPLACING_LOSS = ("ueraser", "adversarial_training")
# Of stored images in training: one makes floating-point numbers of them, the other needs their bytes.
_FLOATS, _8_BIT = "orthogonal-projection", "fast-autoaugment"
# Several that a paper takes together; "none" is plain training.
_COMBINATIONS = {"none": "", "eclipse": "eclipse-purifier+corruption"}
NAMES = (*_COMBINATIONS, *_FILES)


@dataclass(frozen=True)
class Context:
    """What a countermeasure may use beside the images.

    Args:
        seed: of whatever chance it has before training; hooks draw from the generator that training gives them.
        device: where networks run.
        num_classes: number of classes.
        purifier: a `JointConditionalPurificationPipeline`, or the folder or Hub id of one; None where there is none.
        purification: settings that replace those of the purifying countermeasures; see `PurificationConfig`.
        checkpoint_dir: folder in which costly work is kept, so that the same call goes on where it was cut off.
        progress: whether to show a bar.
    """

    seed: int = 0
    device: str | torch.device = "cpu"
    num_classes: int | None = None
    purifier: Any = None
    purification: Any = None
    checkpoint_dir: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class Prepared:
    """A training set and the hooks to train with.

    Args:
        data: the training set after everything that is done before training.
        hooks: for `train_victim`.
        seconds: what it took.
    """

    data: LabelledImages
    hooks: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Countermeasure:
    """One countermeasure.

    Args:
        name: what it is called in commands and records.
        kind: `"dataset"`, `"transform"`, `"hook"`, or `"combination"` of several in the order of `parts`.
        source: the paper and, where there is one, the released program that it follows.
        cost: what it costs beside plain training, in words.
        function: see the module's description; None for a combination.
        settings: every number of the method, for records.
        needs_purifier: whether `prepare` needs a `purifier`.
        parts: of a combination.
    """

    name: str
    kind: str
    source: str
    cost: str
    function: Callable | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_purifier: bool = False
    parts: tuple["Countermeasure", ...] = ()

    def prepare(
        self,
        data: LabelledImages,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        num_classes: int | None = None,
        purifier: Any = None,
        purification: Any = None,
        checkpoint_dir: str | Path | None = None,
        draws: int = 1,
        progress: bool = False,
    ) -> Prepared:
        """Does what is done before training, and makes the hooks for what is done while training.

        Args:
            data: the training set; it is not changed.
            num_classes: by default the number of class names, or the highest label plus one where there are none.
            draws: how often a countermeasure that purifies does it, with seed, seed + 1, ...; the victim trains on
                one draw per epoch in turn.
            seed, device, purifier, purification, checkpoint_dir, progress: see `Context`.

        Raises:
            ValueError: if a purifier is needed and none given, the countermeasure cannot use these images, or several
                draws are asked of one without a purifier.
        """
        if draws < 1 or (draws > 1 and not self.needs_purifier):
            accepted = "at least 1" if self.needs_purifier else "1, because nothing is purified"
            raise ValueError(f"draws is {draws}, but for countermeasure {self.name!r} it must be {accepted}.")
        self.require(purifier)
        if num_classes is None and data.labels is not None:
            num_classes = len(data.class_names) if data.class_names else int(data.labels.max()) + 1
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        context = Context(seed, device, num_classes, purifier, purification, folder, progress)
        start = time.perf_counter()
        sets, hooks = [data] * draws, []
        for part in self._parts:
            if part.kind == "hook":  # fitted to the images as they are at its place in the order
                hooks.append(part.function(sets[0], context))
            else:
                sets = [part.before_training(one, replace(context, seed=seed + draw)) for draw, one in enumerate(sets)]
        if draws > 1:
            hooks.insert(0, Draws(sets[1:]))
        return Prepared(sets[0], tuple(hooks), time.perf_counter() - start)

    def require(self, purifier: Any) -> None:
        """Raises a ValueError if a purifier is needed and none given."""
        if self.needs_purifier and purifier is None:
            raise ValueError(
                f"purifier is None, but countermeasure {self.name!r} needs one: a pipeline, a folder or a Hub id."
            )

    def before_training(self, data: LabelledImages, context: Context) -> LabelledImages:
        """What a countermeasure of kind `"dataset"` or `"transform"` makes of a data set."""
        if self.kind == "transform":
            return data.with_images(np.stack([self.function(image) for image in data.images]))
        return self.function(data, context)

    @property
    def _parts(self) -> tuple["Countermeasure", ...]:
        return self.parts if self.kind == "combination" else (self,)


def get(name: str) -> Countermeasure:
    """The countermeasure called `name`, or the combination of several called `"one+other"`.

    Raises:
        ValueError: if there is no countermeasure of that name, two of a combination replace the loss, or one leaves no
            image that the next could take.
    """
    if name in _FILES:
        family = importlib.import_module(f"{__name__}.{_FILES[name]}")
        return next(entry for entry in family.COUNTERMEASURES if entry.name == name)
    members = [part for part in _COMBINATIONS.get(name, name).split("+") if part or name != "none"]
    unknown = [part for part in members if part not in NAMES]
    if unknown:
        raise ValueError(
            f"countermeasure is {unknown[0]!r}, but accepted are {', '.join(NAMES)}, and several joined by '+'."
        )
    replacing = [part for part in members if _FILES.get(part) in _REPLACING_LOSS]
    if len(replacing) > 1:
        raise ValueError(
            f"countermeasure is {name!r}, but {' and '.join(replacing)} each replace the loss, which only one may."
        )
    behind = members[members.index(_FLOATS) + 1 :] if _FLOATS in members else []
    if _8_BIT in behind:
        raise ValueError(
            f"countermeasure is {name!r}, but {_8_BIT} works on 8-bit images, which {_FLOATS} leaves none of: name it "
            "first."
        )
    return join(name, [get(part) for part in members])


def join(name: str, members: list[Countermeasure]) -> Countermeasure:
    """Several countermeasures as one, called `name`, in the order given."""
    parts = tuple(part for member in members for part in (member.parts if member.kind == "combination" else (member,)))
    return Countermeasure(
        name,
        "combination",
        source="; ".join(part.source for part in parts) or "plain training",
        cost="; ".join(part.cost for part in parts) or "nothing",
        settings={part.name: dict(part.settings) for part in parts},
        needs_purifier=any(part.needs_purifier for part in parts),
        parts=parts,
    )
