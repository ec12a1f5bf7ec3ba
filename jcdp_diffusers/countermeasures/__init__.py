"""
Countermeasures: what someone who wants to learn from protected images does against the protection.

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

import contextlib
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import LabelledImages
from ..data.checks import match_originals
from ..engines import folder_lock, ranks
from ..purify.dataset_card import SUMMARY_NAME
from .draws import Draws


KINDS = ("dataset", "transform", "hook", "combination")
LEARNING = ("supervised", "contrastive")

_FILES = {
    "gray": "iss",
    "jpeg-10": "iss",
    "jpeg-30": "iss",
    "jpeg-50": "iss",
    "jpeg-70": "iss",
    "jpeg-75": "iss",
    "jpeg-90": "iss",
    "jpeg-95": "iss",
    "bdr-2": "iss",
    "impulse-filter": "impulse",
    "jcdp": "purifiers",
    "jcdp-code": "purifiers",
    "unconditional": "purifiers",
    "avatar": "purifiers",
    "diffpure": "purifiers",
    "diffpure-l2": "purifiers",
    "gdmp": "purifiers",
    "d-vae": "d_vae",
    "d-vae-small": "d_vae",
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
    "rsk": "convolution",
    "coin": "convolution",
    "advcl": "advcl",
    "advcl-plain": "advcl",
    "paired": "paired",
    "paired-small": "paired",
}
# Several that a paper takes together; "none" is plain training.
_COMBINATIONS = {"none": "", "eclipse": "eclipse-purifier+corruption"}
NAMES = (*_COMBINATIONS, *_FILES)


class Pairs(NamedTuple):
    """
    Images that somebody has protected with the tool that made the protected set, and their originals, row by row.

    Args:
        protected (`LabelledImages`): After the tool.
        originals (`LabelledImages`): Before it, under the same ids.
    """

    protected: LabelledImages
    originals: LabelledImages


def make_pairs(protected: LabelledImages, originals: LabelledImages) -> Pairs:
    """
    Join images after a protection tool with those before it, by id.

    Raises:
        ValueError: If an original is missing or does not resemble its image, or the tool has changed nothing.
    """
    try:
        pairs = Pairs(protected, match_originals(originals, protected))
    except ValueError as error:  # which calls the originals clean
        raise ValueError(f"pairs: {error}") from error
    if np.array_equal(*(data.images for data in pairs)):
        raise ValueError("pairs has protected images that are their originals, but the tool must have changed them.")
    return pairs


def assumed(what: str) -> str:
    """For behind a countermeasure's name: what it assumes, see `Countermeasure.assumes`."""
    return f" (assumes that {what})" if what else ""


@dataclass(frozen=True)
class Context:
    """
    What a countermeasure may use beside the images.

    Args:
        seed (`int`, *optional*, defaults to 0): Of whatever is random before training; hooks draw from the generator
            that training gives them.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where networks run.
        num_classes (`int`, *optional*): Number of classes.
        purifier (`JointConditionalPurificationPipeline`, `str` or `Path`, *optional*): A pipeline, or the folder or
            Hub id of one; `None` where there is none.
        purification (`PurificationConfig` or `str`, *optional*): Settings that replace those of the purifying
            countermeasures.
        pairs ([`Pairs`], *optional*): For countermeasures that learn from them.
        checkpoint_dir (`Path`, *optional*): Folder in which costly work is kept, so that the same call continues an
            interrupted one.
        progress (`bool`, *optional*, defaults to `False`): Show a bar.
        collected (`LabelledImages`, *optional*): Unprotected images, for countermeasures that need them; their labels
            are not read.
    """

    seed: int = 0
    device: str | torch.device = "cpu"
    num_classes: int | None = None
    purifier: Any = None
    purification: Any = None
    pairs: Pairs | None = None
    checkpoint_dir: Path | None = None
    progress: bool = False
    collected: LabelledImages | None = None

    @contextlib.contextmanager
    def place_for_work(self, name: str) -> Iterator[Path]:
        """
        A path in `checkpoint_dir` for costly work, or a temporary one; the folder that it is in exists.

        Trials that need the same work wait for each other here: the first does it, the others find it done. Ranks of a
        launcher that work together outside a trial do so without a lock, as rank 0 holds it for all of them.

        Args:
            name (`str`): Of a file or folder.
        """
        with contextlib.ExitStack() as stack:
            folder = self.checkpoint_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            if ranks()[0] == 0:
                stack.enter_context(folder_lock(folder / f".{name}.lock", "checkpoint_dir"))
            yield folder / name

    def kept_seconds(self, name: str) -> float | None:
        """What the kept work of a countermeasure took, as `summary.json` in its folder says; None without one."""
        if self.checkpoint_dir is None:
            return None
        summary = self.checkpoint_dir / f"{name}-{self.seed}" / SUMMARY_NAME
        return json.loads(summary.read_text())["seconds_of_work"] if summary.exists() else None


@dataclass(frozen=True)
class Prepared:
    """
    A training set and the hooks to train with.

    Args:
        data (`LabelledImages`): The training set after everything that is done before training.
        hooks (`tuple`): For `train_victim`.
        seconds (`float`): What it took; of work that is kept, when it was done, which may have been long ago or in
            several processes.
    """

    data: LabelledImages
    hooks: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Countermeasure:
    """
    One countermeasure, and what it declares.

    Args:
        name (`str`): What commands and records call it.
        kind (`str`): `"dataset"`, `"transform"`, `"hook"`, or `"combination"` of several in the order of `parts`.
        source (`str`): The paper and, where there is one, the released program that it follows.
        cost (`str`): What it costs beside plain training, in words.
        function (`Callable`, *optional*): See the module's description; `None` for a combination.
        settings (`dict`, *optional*): Every number of the method, for records.
        needs_purifier (`bool`, *optional*, defaults to `False`): Whether `prepare` needs a `purifier`.
        needs_pairs (`bool`, *optional*, defaults to `False`): Whether `prepare` needs `pairs`.
        assumes (`str`, *optional*): What an attacker must have beyond the protected images and some unprotected ones.
            Every table, report and verdict says so.
        suits (`tuple[str]`, *optional*, defaults to all of `LEARNING`): Ways of learning that it goes with. A hook
            that changes labels or the loss, or needs labels, suits `"supervised"` alone.
        method (`str`, *optional*): The one method that it goes with, such as `"simclr"`, where not all that `suits`
            says.
        least_collected (`int`, *optional*, defaults to 0): How many images of `collected` `prepare` needs.
        replaces_loss (`bool`, *optional*, defaults to `False`): Whether its hook takes the place of the loss.
        takes (`str`, *optional*, defaults to `"floats"`): Form of the stored images that it needs when it is applied:
            `"bytes"`, or `"floats"` for one that works on floats too.
        gives (`str`, *optional*, defaults to `"bytes"`): `"floats"` where it leaves stored images that have no 8-bit
            form. A hook that acts after crop and flip leaves the stored images as they are.
        check (`Callable`, *optional*): `check(data)` raises a `ValueError` for training images that it cannot take.
        smoke (`Countermeasure`, *optional*): What a smoke run takes in its place, where it would take more than
            seconds or more images than a smoke run has.
        parts (`tuple[Countermeasure]`, *optional*): Of a combination.
    """

    name: str
    kind: str
    source: str
    cost: str
    function: Callable | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_purifier: bool = False
    needs_pairs: bool = False
    assumes: str = ""
    suits: tuple[str, ...] = LEARNING
    method: str | None = None
    least_collected: int = 0
    replaces_loss: bool = False
    takes: str = "floats"
    gives: str = "bytes"
    check: Callable[[LabelledImages], None] | None = None
    smoke: "Countermeasure | None" = None
    parts: tuple["Countermeasure", ...] = ()

    @property
    def needs_collected(self) -> bool:
        """Whether `prepare` needs `collected`."""
        return self.least_collected > 0

    def prepare(
        self,
        data: LabelledImages,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        num_classes: int | None = None,
        purifier: Any = None,
        purification: Any = None,
        pairs: Pairs | None = None,
        checkpoint_dir: str | Path | None = None,
        draws: int = 1,
        progress: bool = False,
        collected: LabelledImages | None = None,
    ) -> Prepared:
        """
        Do what is done before training, and make the hooks for what is done while training.

        Args:
            data (`LabelledImages`): The training set; it is not changed.
            num_classes (`int`, *optional*): By default `data.num_classes`.
            draws (`int`, *optional*, defaults to 1): How often a countermeasure that purifies does it, with seed,
                seed + 1, ...; the victim trains on one draw per epoch in turn.
            seed, device, purifier, purification, pairs, checkpoint_dir, progress, collected: See [`Context`].

        Returns:
            [`Prepared`]

        Raises:
            ValueError: If a purifier or pairs are needed and not given, the countermeasure cannot use these images, or
                several draws are asked of one without a purifier.
        """
        self.require_draws(draws)
        self.require(purifier)
        self.require_pairs(pairs)
        self.require_collected(collected)
        self.require_images(data)
        if num_classes is None and data.labels is not None:
            num_classes = data.num_classes
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        context = Context(seed, device, num_classes, purifier, purification, pairs, folder, progress, collected)
        contexts = [replace(context, seed=seed + draw) for draw in range(draws)]
        sets, hooks, seconds = [data] * draws, [], 0.0
        for part in self._parts:
            start = time.perf_counter()
            if part.kind == "hook":  # fitted to the images as they are at its place in the order
                hooks.append(part.function(sets[0], context))
            else:
                sets = [part.before_training(*given) for given in zip(sets, contexts, strict=True)]
            elapsed = time.perf_counter() - start
            if part.kind == "hook":
                elapsed += getattr(hooks[-1], "seconds_before", 0.0)
            kept = [took for one in contexts if (took := one.kept_seconds(part.name)) is not None]
            seconds += sum(kept) if kept else elapsed
        if draws > 1:
            hooks.insert(0, Draws(sets[1:]))
        return Prepared(sets[0], tuple(hooks), seconds)

    def require(self, purifier: Any) -> None:
        """
        Check that a purifier is there where one is needed.

        Raises:
            ValueError: If it is not.
        """
        if self.needs_purifier and purifier is None:
            raise ValueError(
                f"purifier is None, but countermeasure {self.name!r} needs one: a pipeline, a folder or a Hub id."
            )

    def require_draws(self, draws: int) -> None:
        """
        Check that images are purified as often as that makes sense.

        Raises:
            ValueError: If not even once, or several times where nothing is purified.
        """
        if draws < 1 or (draws > 1 and not self.needs_purifier):
            accepted = "at least 1" if self.needs_purifier else "1, because nothing is purified"
            raise ValueError(f"draws is {draws}, but for countermeasure {self.name!r} it must be {accepted}.")

    def require_pairs(self, pairs: Pairs | None) -> None:
        """
        Check that pairs are there where they are needed.

        Raises:
            ValueError: If they are not.
        """
        if self.needs_pairs and pairs is None:
            raise ValueError(
                f"pairs is None, but countermeasure {self.name!r} needs unprotected images and what the protection "
                "tool makes of them."
            )

    def pairs_of(self, protected: LabelledImages | None, originals: LabelledImages | None) -> Pairs | None:
        """
        Pairs for a countermeasure that needs them, of what a command was given; None for one that does not.

        Args:
            protected (`LabelledImages`, *optional*): Collected images after the protection tool
                (`collected_protected`).
            originals (`LabelledImages`, *optional*): Collected images.

        Raises:
            ValueError: If one of the two is missing, or protected ones are given for nothing.
        """
        if not self.needs_pairs:
            if protected is not None:
                raise ValueError(
                    f"collected_protected has {len(protected)} images, but must be None for countermeasure "
                    f"{self.name!r}, which needs no pairs."
                )
            return None
        for role, data in (("collected", originals), ("collected_protected", protected)):
            if data is None:
                raise ValueError(f"{role} is None, but countermeasure {self.name!r} needs it to make pairs.")
        return make_pairs(protected, originals)

    def require_collected(self, collected: LabelledImages | None) -> None:
        """
        Check that collected images are there where they are needed, and as many as are needed.

        Raises:
            ValueError: If they are not.
        """
        if self.needs_collected and collected is None:
            raise ValueError(
                f"collected is None, but countermeasure {self.name!r} needs unprotected images like the protected "
                "ones."
            )
        if self.needs_collected and len(collected) < self.least_collected:
            raise ValueError(
                f"collected has {len(collected)} images, but countermeasure {self.name!r} needs at least "
                f"{self.least_collected}, a batch of its training."
            )

    def require_images(self, data: LabelledImages) -> None:
        """
        Check, before any costly work, that the training images are such as it takes.

        Raises:
            ValueError: If they are not.
        """
        for part in self._parts:
            if part.check is not None:
                part.check(data)

    def require_learning(self, method: str) -> None:
        """
        Check that it goes with a way of learning, such as `"simclr"`: all but `"supervised"` are contrastive.

        Raises:
            ValueError: If it does not.
        """
        unsuited = [part.name for part in self._parts if not part.goes_with(method)]
        if unsuited:
            others = ", ".join(name for name in NAMES if get(name).goes_with(method))
            raise ValueError(
                f"countermeasure is {self.name!r}, but {unsuited[0]} does not go with method {method!r}; accepted are "
                f"{others}."
            )

    def goes_with(self, method: str) -> bool:
        """Whether it and all its parts go with a way of learning."""
        learning = "supervised" if method == "supervised" else "contrastive"
        return all(learning in part.suits and part.method in (None, method) for part in self._parts)

    def before_training(self, data: LabelledImages, context: Context) -> LabelledImages:
        """What a countermeasure of kind `"dataset"` or `"transform"` makes of a data set."""
        if self.kind == "transform":
            return data.with_images(np.stack([self.function(image) for image in data.images]))
        return self.function(data, context)

    @property
    def _parts(self) -> tuple["Countermeasure", ...]:
        return self.parts if self.kind == "combination" else (self,)


def get(name: str, *, smoke: bool = False) -> Countermeasure:
    """
    The countermeasure called `name`, or the combination of several called `"one+other"`.

    Args:
        name (`str`): One of `NAMES`, or several joined by `+`.
        smoke (`bool`, *optional*, defaults to `False`): What a smoke run takes in its place.

    Raises:
        ValueError: If there is no countermeasure of that name, two of a combination replace the loss, one is there
            twice that makes a data set, or one leaves no image that the next could take.
    """
    if name in _FILES:
        family = importlib.import_module(f"{__name__}.{_FILES[name]}")
        found = next(entry for entry in family.COUNTERMEASURES if entry.name == name)
        return found.smoke if smoke and found.smoke is not None else found
    members = [part for part in _COMBINATIONS.get(name, name).split("+") if part or name != "none"]
    unknown = [part for part in members if part not in NAMES]
    if unknown:
        raise ValueError(
            f"countermeasure is {unknown[0]!r}, but must be one of {', '.join(NAMES)}, or several joined by '+'."
        )
    return join(name, [get(part, smoke=smoke) for part in members])


def join(name: str, members: list[Countermeasure]) -> Countermeasure:
    """
    Several countermeasures as one, called `name`, in the order given.

    Raises:
        ValueError: If two replace the loss, one is there twice that makes a data set, or one leaves no image that the
            next could take.
    """
    parts = tuple(part for member in members for part in (member.parts if member.kind == "combination" else (member,)))
    _check_together(name, parts)
    return Countermeasure(
        name,
        "combination",
        source="; ".join(part.source for part in parts) or "plain training",
        cost="; ".join(part.cost for part in parts) or "nothing",
        settings={part.name: dict(part.settings) for part in parts},
        needs_purifier=any(part.needs_purifier for part in parts),
        needs_pairs=any(part.needs_pairs for part in parts),
        assumes="; ".join(dict.fromkeys(part.assumes for part in parts if part.assumes)),
        suits=tuple(learning for learning in LEARNING if all(learning in part.suits for part in parts)),
        method=next((part.method for part in parts if part.method is not None), None),
        least_collected=max((part.least_collected for part in parts), default=0),
        replaces_loss=any(part.replaces_loss for part in parts),
        takes="bytes" if any(part.takes == "bytes" for part in parts) else "floats",
        gives="floats" if any(part.gives == "floats" for part in parts) else "bytes",
        parts=parts,
    )


def _check_together(name: str, parts: tuple[Countermeasure, ...]) -> None:
    replacing = [part.name for part in parts if part.replaces_loss]
    if len(replacing) > 1:
        raise ValueError(
            f"countermeasure is {name!r}, but must have one part at most that replaces the loss: "
            f"{' and '.join(replacing)} each do."
        )
    kept = [part.name for part in parts if part.kind == "dataset"]
    if twice := [part for part in kept if kept.count(part) > 1]:
        raise ValueError(
            f"countermeasure is {name!r}, but must have {twice[0]} once at most: what it makes is kept under its name."
        )
    # What is done before training is done to bytes, whatever its place among the hooks.
    floats = None
    for part in parts:
        if part.kind != "hook":
            continue
        if part.takes == "bytes" and floats is not None:
            raise ValueError(
                f"countermeasure is {name!r}, but must have {part.name} before {floats}: {part.name} needs 8-bit "
                f"images, and {floats} leaves floats."
            )
        if part.gives == "floats":
            floats = part.name
