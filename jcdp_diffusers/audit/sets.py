"""The images of an audit: read, checked against each other, and described for the report."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..countermeasures.iss import SAVES, jpeg
from ..data import LabelledImages, load_images
from ..data.checks import (
    check_separation,
    check_sets,
    describe_noise,
    describe_set,
    few_of_each_class,
    match_originals,
)
from ..data.perturbations import noise_kept, visibility
from ..perceptual import LPIPSModel, lpips_at_hand
from .evidence import spectral_evidence
from .settings import AuditSettings
from .shortcut import shortcut_test


SMOKE_IMAGES = 200
UNLABELLED = ("collected", "collected_protected")  # roles whose labels no victim uses


def read_sets(
    sources: Mapping[str, Any], *, image_size: int | None, channels: int, options: Mapping[str, dict]
) -> dict[str, LabelledImages]:
    """
    Read the images of each role once, and refuse those that do not fit together.

    Args:
        sources (`dict`): `protected`, `test` and, where given, `collected`, `collected_protected` and `clean`; None
            for the others.
        image_size, channels: As for `data.load_images`.
        options (`dict`): Further options of `data.load_images` by role.

    Returns:
        `dict`: The images by role; the clean ones in the order of the protected ones.

    Raises:
        ValueError: If a set cannot be read or used, in one sentence that begins with its role.
    """
    sets = {
        role: _load(role, source, image_size, channels, options.get(role, {}))
        for role, source in sources.items()
        if source is not None
    }
    sets = check_sets(labelled(sets), {role: data for role, data in sets.items() if role in UNLABELLED})
    if "clean" in sets:
        sets["clean"] = match_originals(sets["clean"], sets["protected"])
    return sets


def labelled(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """The roles that have labels, none of which may have trained a purifier."""
    return {role: data for role, data in sets.items() if role not in UNLABELLED}


def _load(role: str, source: Any, image_size: int | None, channels: int, options: dict) -> LabelledImages:
    rejected: list[dict] = []
    try:
        data = load_images(source, image_size=image_size, channels=channels, rejected=rejected, **options)
    except (ValueError, OSError) as error:  # says what is wrong, but not with which of the sets
        if not rejected:
            raise ValueError(f"{role}: {error}") from error
    if rejected:
        first = rejected[0]
        raise ValueError(
            f"{role} has {len(rejected)} image(s) that cannot be used, the first {first['file'] or first['id']!r}: "
            f"{first['reason']}."
        )
    return data


def separate(sets: Mapping[str, LabelledImages], asked: AuditSettings) -> dict:
    """
    Refuse roles that overlap.

    Returns:
        `dict`: What `data.checks.check_separation` counted, and the `budget` by which it compared.
    """
    roles = (sets.get(role) for role in ("protected", "collected", "test", "clean"))
    return check_separation(*roles, roles=asked.roles, budget=asked.budget) | {"budget": asked.budget}


def few(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """What a smoke run has time for."""
    chosen = {role: few_of_each_class(sets[role], SMOKE_IMAGES) for role in ("protected", "test")}
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
        "shortcut": shortcut_test(protected, test, clean),
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
