"""
Pairs for attacks that assume more: collected images, and what the protection tool makes of them.

Whoever audits may give the pairs (`collected_protected`), made with any tool. Otherwise the card of the protected set
must name a poison of this package with its settings and seed, and the collected images are protected in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import poisons
from ..countermeasures import Pairs, make_pairs
from ..data import LabelledImages
from ..data.checks import few_of_each_class
from ..data.labels import join_labels
from ..poisons.protect import protect_dataset, read_card
from .settings import AuditSettings


SMOKE_PAIRS = 100


@dataclass(frozen=True)
class Tool:
    """
    A protection tool as the owner has used it.

    Args:
        method (`str`): One of `poisons.NAMES`.
        settings: An object of the method's own dataclass.
        seed (`int`): Of the owner.
    """

    method: str
    settings: Any
    seed: int


def check_pairs_asked(asked: AuditSettings, sources: Mapping[str, Any]) -> Tool | None:
    """
    Refuse attacks whose pairs cannot be had, before anything is read.

    Args:
        asked (`AuditSettings`): Its attacks count.
        sources (`dict`): Images by role.

    Returns:
        [`Tool`]: To make pairs with; None where none are needed or they are given.

    Raises:
        ValueError: If images are missing or not needed, or the card of the protected set names no tool.
    """
    needing = [one.name for one in asked.tried if one.countermeasure.needs_pairs]
    given = sources.get("collected_protected")
    if not needing:
        if given is not None:
            raise ValueError(
                f"collected_protected is {str(given)!r}, but must be None without an attack that needs it."
            )
        return None
    if sources["collected"] is None:
        raise ValueError(f"collected is None, but must be a set of images for attack {needing[0]!r}.")
    return None if given is not None else _tool_of(sources["protected"], needing[0])


def _tool_of(source: Any, attack: str) -> Tool:
    """What the card of a protected set says."""
    missing = ValueError(
        f"attacks has {attack!r}, but the protected set has no card that names its tool: "
        "collected_protected must be the collected images as that tool protects them."
    )
    if not isinstance(source, (str, Path)) or not Path(source).is_dir():
        raise missing
    try:
        card = read_card(source)
    except ValueError as error:
        raise missing from error
    if card.get("method") not in poisons.NAMES:
        raise missing
    return Tool(card["method"], poisons.settings_of_card(card["method"], card["settings"]), card["seed"])


def assumptions_of(asked: AuditSettings) -> dict[str, str]:
    """By attack, what it assumes beyond protected and collected images."""
    return {one.name: one.countermeasure.assumes for one in asked.tried if one.countermeasure.assumes}


def check_labels(tool: Tool | None, sets: Mapping[str, LabelledImages]) -> None:
    """
    Refuse collected images without the labels that a tool needs.

    Raises:
        ValueError: If there are none, or their classes are not those of the protected images.
    """
    if tool is not None and poisons.get(tool.method).uses_labels:
        _labelled_as_protected(tool, sets)


def pairs_of(
    tool: Tool | None,
    asked: AuditSettings,
    sets: Mapping[str, LabelledImages],
    folder: Path,
    device: torch.device,
) -> Pairs | None:
    """
    The pairs, made where they do not lie in the folder yet.

    Args:
        tool ([`Tool`], *optional*): From [`check_pairs_asked`].
        asked (`AuditSettings`): `pairs` says how many collected images are protected, the same number of each class.
        sets (`dict`): Images by role.
        folder (`Path`): For the protected collected images.
        device (`torch.device`): Where the tool's networks run.

    Returns:
        [`Pairs`]: None where no attack needs them.
    """
    if "collected_protected" in sets:
        return make_pairs(sets["collected_protected"], sets["collected"])
    if tool is None:
        return None
    smoke, originals = asked.smoke, sets["collected"]
    count = SMOKE_PAIRS if smoke else asked.pairs
    if poisons.get(tool.method).uses_labels:
        originals = few_of_each_class(_labelled_as_protected(tool, sets), count)
    else:
        originals = originals.subset(range(min(count, len(originals))))
    preset = "smoke" if smoke else tool.settings
    options = {"method": tool.method, "preset": preset, "seed": tool.seed, "device": device, "progress": not smoke}
    return make_pairs(protect_dataset(originals, folder, **options), originals)


def _labelled_as_protected(tool: Tool, sets: Mapping[str, LabelledImages]) -> LabelledImages:
    if sets["collected"].labels is None:
        raise ValueError(f"collected has no labels, but {tool.method}, which makes the pairs, needs one per image.")
    return join_labels({"protected": sets["protected"], "collected": sets["collected"]})["collected"]
