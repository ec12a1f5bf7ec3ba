"""The images of an audit: read, checked against each other, and described for the report."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import victims
from ..countermeasures.iss import SAVES, jpeg
from ..data import LabelledImages, find_overlap, load_images
from ..data.checks import (
    check_separation,
    check_sets,
    describe_noise,
    describe_set,
    few_of_each_class,
    match_originals,
    with_originals,
)
from ..data.perturbations import noise_kept, visibility
from ..data.photographs import stored_sizes, working_size
from ..perceptual import LPIPSModel, lpips_at_hand
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..victims import METHODS, check_victim
from .evidence import spectral_evidence
from .settings import AuditSettings, Learner
from .shortcut import shortcut_test


SMOKE_IMAGES = 200
UNLABELLED = ("collected", "collected_protected")  # roles whose labels no victim uses
ROLE_NAMES = {"probe": "probe_images"}  # what arguments call a role


def read_sets(
    sources: Mapping[str, Any],
    *,
    image_size: int | None,
    channels: int,
    options: Mapping[str, dict],
    skip_unusable_images: bool = False,
) -> tuple[dict[str, LabelledImages], dict[str, list[dict]]]:
    """
    Read the images of each role once.

    Args:
        sources (`dict`): `protected` and, where given, `test`, `collected`, `collected_protected`, `clean` and
            `probe_images`; None for the others.
        image_size, channels: As for `data.load_images`.
        options (`dict`): Further options of `data.load_images` by role.
        skip_unusable_images (`bool`): Leave out images that cannot be used, rather than refuse their set.

    Returns:
        `dict`: The images by role, those of `probe_images` as `probe`; and what was left out, by role: id, file and
        reason of each.

    Raises:
        ValueError: If a set cannot be read, in one sentence that begins with its role.
    """
    sets, unusable = {}, {}
    for role, source in sources.items():
        if source is not None:
            reading = {"image_size": image_size, "channels": channels} | dict(options.get(role, {}))
            sets[role], rejected = _load(role, source, reading, skip_unusable_images)
            if rejected:
                unusable[role] = rejected
    if "clean" in unusable:
        sets["protected"] = with_originals(sets["protected"], sets["clean"])
    if "probe_images" in sets:
        sets["probe"] = sets.pop("probe_images")
    return sets, unusable


def size_to_read(
    sources: Mapping[str, Any],
    purifier: str | os.PathLike | None,
    options: Mapping[str, dict],
    device: torch.device,
) -> tuple[int | None, dict[str, list[tuple[int, int]]]]:
    """
    The side to which images are brought where nobody says one: a given purifier's, or what the device can work on.

    Returns:
        `int`: The side, None where images stay as they are; and width and height of the stored images, by role.
    """
    sizes = {
        role: about(role, stored_sizes, source, **where_to_read(options.get(role, {})))
        for role, source in sources.items()
        if source is not None
    }
    side = working_size(sizes, device.type)
    if side is not None and purifier is not None:
        own = JointConditionalPurificationPipeline.from_pretrained(purifier).unet.config.sample_size
        side = own if isinstance(own, int) else side
    return side, sizes


def where_to_read(options: Mapping) -> dict:
    """Of the options of `data.load_images`, those of `data.open_dataset`."""
    names = ("split", "image_column", "label_column", "id_column")
    return {name: value for name, value in options.items() if name in names}


def about(role: str, function: Callable, source: Any, **options) -> Any:
    """What a function says of a source, or its error with the role in front."""
    try:
        return function(source, **options)
    except (ValueError, OSError) as error:  # says what is wrong, but not with which of the sets
        raise ValueError(f"{role}: {error}") from error


def _unusable(role: str, rejected: list[dict]) -> ValueError:
    first = rejected[0]
    return ValueError(
        f"{role} has {len(rejected)} image(s) that cannot be used, the first {first['file'] or first['id']!r}: "
        f"{first['reason']}; skip_unusable_images leaves such images out."
    )


def check_together(sets: Mapping[str, LabelledImages], methods: Sequence[str]) -> dict[str, LabelledImages]:
    """
    Refuse sets that do not fit together.

    Args:
        sets (`dict`): Images by role.
        methods (`Sequence[str]`): How victims learn. Where none of them needs labels, the protected images may do
            without.

    Returns:
        `dict`: The images by role, with labels of one space; the clean ones in the order of the protected ones.

    Raises:
        ValueError: In one sentence that begins with a role.
    """
    sets = _checked(sets, methods)
    if "clean" in sets:
        sets["clean"] = match_originals(sets["clean"], sets["protected"])
    return sets


def _checked(sets: Mapping[str, LabelledImages], methods: Sequence[str]) -> dict[str, LabelledImages]:
    """The sets in one space of labels; those that need none as they are."""
    needing = {role: data for role, data in sets.items() if role not in UNLABELLED}
    if sets["protected"].labels is None:
        if "supervised" in methods:
            raise ValueError(
                "protected has no labels, but must have one per image for method 'supervised': "
                f"{', '.join(method for method in METHODS if method != 'supervised')} need none (--method)."
            )
        probed = "probe" if "probe" in sets else "clean"
        if sets[probed].labels is None:
            raise ValueError(
                f"{ROLE_NAMES.get(probed, probed)} has no labels, but a linear probe needs one per image."
            )
        needing = {probed: sets[probed], "test": sets["test"]}
    checked = check_sets(needing, {role: data for role, data in sets.items() if role not in needing})
    return {role: checked[role] for role in sets}  # in their order


def check_learners(sets: Mapping[str, LabelledImages], asked: AuditSettings, learners: Sequence[Learner]) -> None:
    """
    Refuse, before a purifier is trained, images that victims or attacks cannot take.

    Args:
        sets (`dict`): Images by role, as victims get them.
        asked (`AuditSettings`): The attacks.
        learners (`Sequence[Learner]`): The victims.

    Raises:
        ValueError: In one sentence that names the method or the attack.
    """
    protected, probed = sets["protected"], sets.get("probe", sets.get("clean"))
    for one in asked.tried:
        with _named(f"countermeasure {one.countermeasure.name!r}"):
            one.countermeasure.require_images(protected)
        one.countermeasure.require_collected(sets.get("collected"))
    for learner in learners:
        victims.check_width(learner.victim, learner.recipe.width if asked.width is None else asked.width)
        with _named(f"method {learner.method!r}"):
            check_victim(
                protected,
                sets["test"],
                victim=learner.victim,
                method=learner.method,
                probe=None if learner.method == "supervised" else probed,
                recipe=learner.recipe.for_images(len(protected)),
            )


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """An error says what cannot take the protected images, which it calls as `train_victim` and attacks do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} cannot take the protected images: {error}") from error


def kept_from_purifiers(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """The roles none of which may have trained a purifier."""
    return {role: data for role, data in sets.items() if role not in (*UNLABELLED, "probe")}


def _load(role: str, source: Any, reading: dict, skip_unusable_images: bool) -> tuple[LabelledImages, list[dict]]:
    """The images of a role, and those that cannot be used, where they may be left out."""
    rejected: list[dict] = []
    try:
        data = load_images(source, rejected=rejected, **reading)
    except (ValueError, OSError) as error:
        if not rejected or skip_unusable_images:
            raise ValueError(f"{role}: {error}") from error
    if rejected and not skip_unusable_images:
        raise _unusable(role, rejected)
    return data, rejected


def separate(sets: Mapping[str, LabelledImages], asked: AuditSettings) -> dict:
    """
    Refuse roles that overlap.

    Returns:
        `dict`: What `data.checks.check_separation` counted, and the `budget` by which it compared.
    """
    if "probe" in sets and len(pairs := find_overlap(sets["probe"], sets["test"], budget=asked.budget)):
        first, second = pairs[0]
        raise ValueError(
            f"probe_images has {len(np.unique(pairs[:, 0]))} images that are test ones, the first "
            f"{sets['probe'].ids[first]!r} and {sets['test'].ids[second]!r}, but must have none of them."
        )
    roles = (sets.get(role) for role in ("protected", "collected", "test", "clean"))
    return check_separation(*roles, roles=asked.roles, budget=asked.budget) | {"budget": asked.budget}


def few(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """What a smoke run has time for."""
    chosen = {
        role: sets[role].subset(range(min(SMOKE_IMAGES, len(sets[role]))))
        if sets[role].labels is None
        else few_of_each_class(sets[role], SMOKE_IMAGES)
        for role in ("protected", "test", "probe")
        if role in sets
    }
    if "clean" in sets:
        chosen["clean"] = match_originals(sets["clean"], chosen["protected"])
    return dict(sets) | chosen


def describe(
    sets: Mapping[str, LabelledImages], separation: Mapping, perceptual: LPIPSModel | None, *, seed: int
) -> dict:
    """
    What a report says of the images.

    Args:
        sets (`dict`): Images by role.
        separation (`dict`): From `separate`.
        perceptual (`LPIPSModel`, *optional*): The purifier's own network, for LPIPS; see `_network_of_lpips`.
        seed (`int`): Of the spectrum's divisions.
    """
    protected, test, clean, collected = (sets.get(role) for role in ("protected", "test", "clean", "collected"))
    return {
        "sets": {role: describe_set(images) for role, images in sets.items()},
        "noise": None if clean is None else describe_noise(clean, protected),
        "visibility": None
        if clean is None
        else visibility(clean.images, protected.images, perceptual=_network_of_lpips(perceptual)),
        "jpeg_saves": None if clean is None else _noise_after_saves(clean, protected),
        "spectrum": None if collected is None else spectral_evidence(protected, collected, clean, seed=seed),
        "shortcut": None if protected.labels is None else shortcut_test(protected, test, clean),
        "separation": dict(separation),
    }


def _network_of_lpips(own: LPIPSModel | None) -> LPIPSModel | None:
    """The purifier's own network where its heads are calibrated; or one at hand; or the purifier's plain features."""
    return own if own is not None and own.config.calibrated else lpips_at_hand() or own


def _noise_after_saves(clean: LabelledImages, protected: LabelledImages) -> dict[str, dict] | None:
    """What JPEG saves leave of the protection's noise, by quality; None where no image is changed."""
    if np.array_equal(clean.images, protected.images):
        return None
    return {
        str(quality): noise_kept(clean.images, protected.images, functools.partial(jpeg, quality=quality))
        for quality in SAVES
    }


def shortcut_in_words(result: Mapping) -> str:
    """What the shortcut test found, in a sentence."""
    figures = result["protected"]
    said = (
        f"Shortcut test: a linear model gets {100 * figures['held_out']:.0f} % of unseen protected images right and "
        f"{100 * figures['test']:.0f} % of test images"
    )
    if result["exchanged"]:
        return f"{said}; it sees a shortcut in the clean originals instead: are protected and clean exchanged?"
    return f"{said}: {'the protection is a shortcut' if result['found'] else 'no shortcut that it can see'}."
