"""From what an audit is given to the images of its roles, and what was done to them on the way."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data import LabelledImages
from ..data.checks import match_originals
from ..data.photographs import detailed_side, sizes_in_words, squares_of_photographs
from ..purification_config import ADAPTIVE
from .division import Division, divide
from .purifier import AuditPurifier
from .sets import describe, read_sets, shortcut_in_words, size_to_read, where_to_read
from .settings import AuditSettings
from .unlabelled import divide_unlabelled


LISTED = 10  # images that could not be used, in the report's sentence; its figures have all of them


@dataclass(frozen=True)
class Found:
    """
    The images of an audit.

    Args:
        sets (`dict`): By role, as read and divided.
        division (`Division`): Which roles were made of which.
        unusable (`dict`): Images that were left out, by role: id, file and reason.
        side (`int`, *optional*): To which images were brought because nobody said one.
        sizes (`dict`): Width and height of the images as stored, by the roles that were given.
    """

    sets: Mapping[str, LabelledImages]
    division: Division
    unusable: Mapping[str, list[dict]] = field(default_factory=dict)
    side: int | None = None
    sizes: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def without_labels(self) -> bool:
        """Whether no victim can be trained, because the protected images have no labels and no test images belong to
        them that would say that they should."""
        return self.sets["protected"].labels is None and "test" not in self.sets

    @property
    def collected_of(self) -> str:
        """The role, as given, whose images are the collected ones."""
        return self.division.of if "collected" in self.division.missing else "collected"

    @property
    def enlarged(self) -> str | None:
        """
        A sentence where protected or collected images were enlarged and so have no fine detail to compare; None where
        they were not, or both were alike, because they are of one source.
        """
        if "collected" not in self.sets or self.collected_of in ("protected", "clean"):
            return None
        side, roles = min(self.sets["protected"].images.shape[1:3]), ("protected", self.collected_of)
        most = detailed_side({role: self.sizes.get(role, []) for role in roles})
        if most is None or side <= most:
            return None
        return (
            f"Spectra were not compared: {' or '.join(roles)} images were enlarged to {side}x{side} pixels, and so "
            f"have no fine detail. They can be compared at {most}x{most} (--image_size) or less."
        )

    def squares(self, sources: Mapping[str, Any], reading: Mapping, seed: int) -> Callable[[], LabelledImages] | None:
        """
        What cuts squares from the collected photographs; None where there are none, or where none of them shows more
        at its own size.
        """
        if "collected" not in self.sets:
            return None
        role, collected = self.collected_of, self.sets["collected"]
        if all(max(size) <= collected.images.shape[1] for size in self.sizes.get(role, [])):
            return None
        return functools.partial(
            squares_of_photographs,
            sources[role],
            collected.images.shape[1],
            ids=frozenset(collected.ids),
            channels=reading["channels"],
            seed=seed,
            **where_to_read(reading["options"].get(role, {})),
        )

    def described(
        self,
        sets: Mapping[str, LabelledImages],
        separation: Mapping,
        used: AuditPurifier,
        seed: int,
        say: Callable[[str], None],
    ) -> dict:
        """What a report says of the images; see `sets.describe`. Says what the shortcut test found."""
        given = {role: images for role, images in sets.items() if role != "purified"}
        data = describe(given, separation, used.pipe.perceptual, seed=seed) | self.facts(sets)
        if self.division.of == "protected" and "collected" in self.division.missing:
            data["spectrum"] = None  # protected images against protected ones
        if self.enlarged is not None:
            data["spectrum"] = None
        if data["shortcut"] is not None:
            say(shortcut_in_words(data["shortcut"]))
        return data

    def facts(self, sets: Mapping[str, LabelledImages]) -> dict:
        """For the report, in JSON's types."""
        said = []
        for role, images in self.unusable.items():
            named = ", ".join(f"{one['file'] or one['id']} ({one['reason']})" for one in images[:LISTED])
            more = f" and {len(images) - LISTED} more" if len(images) > LISTED else ""
            said.append(f"{len(images)} {role} image(s) could not be used and were left out: {named}{more}.")
        if self.side is not None:
            said.append(
                f"Images were compared at {self.side}x{self.side} pixels, the centre of each. What holds at this size "
                "need not hold at full size."
            )
        return {
            "division": {
                "of": self.division.of,
                "missing": list(self.division.missing),
                "stand_in": self.division.stand_in,
                "together": self.division.together,
                "said": self.division.sentences(sets),
            },
            "unusable": dict(self.unusable),
            "unusable_said": said,
            "working_size": self.side,
            "enlarged": self.enlarged,
        }


def read(
    sources: Mapping[str, Any],
    purifier: str | os.PathLike | None,
    asked: AuditSettings,
    reading: Mapping[str, Any],
    device: torch.device,
    say: Callable[[str], None],
) -> Found:
    """
    Read the images, bring photographs to one size, and divide what is there into the roles that are missing.

    Args:
        sources, purifier, asked, reading, device, say: As for `run.carry_out`.

    Raises:
        ValueError: If a set cannot be read or divided, or has no labels, in one sentence.
    """
    side, sizes = size_to_read(sources, purifier, reading["options"], device)
    if reading["image_size"] is not None:
        side = None
    if side is not None:
        found = [size for of_role in sizes.values() for size in of_role]
        say(
            f"{sizes_in_words(found)}: compared at {side}x{side} pixels, the centre of each (--image_size chooses "
            "another side)."
        )
    sets, unusable = read_sets(sources, **(dict(reading) | ({} if side is None else {"image_size": side})))
    for role, images in unusable.items():
        first = images[0]
        say(
            f"{role}: {len(images)} image(s) left out, the first {first['file'] or first['id']!r} ({first['reason']})."
        )
    if sets["protected"].labels is None and "clean" in sets and sets["clean"].labels is not None:
        originals = match_originals(sets["clean"], sets["protected"])
        known = {name: getattr(originals, name) for name in ("labels", "class_names", "ranked_by_text")}
        sets["protected"] = replace(sets["protected"], **known)
        say("protected: no labels, so each image has the label of its original in clean.")
    if sets["protected"].labels is None and sources["test"] is None:
        if asked.methods != ("supervised",):
            raise ValueError(
                f"test is None, but must be clean labelled images for method {asked.methods[0]!r} where protected has "
                "no labels."
            )
        _refuse_victims(asked)
        sets, division = divide_unlabelled(
            sets, needs_collected=purifier is None, seed=asked.seed, budget=asked.budget
        )
    else:
        sets, division = divide(sets, needs_collected=purifier is None, seed=asked.seed, budget=asked.budget)
    for sentence in division.sentences(sets):
        say(sentence)
    found = Found(sets, division, unusable, side, sizes)
    if found.enlarged is not None and asked.preset == ADAPTIVE:
        raise ValueError(f"preset is {ADAPTIVE!r}, which reads spectra. {found.enlarged}")
    return found


def _refuse_victims(asked: AuditSettings) -> None:
    """Refuse what needs victims, where there are no labels to train them with."""
    for name, none in {"attacks": [], "fractions": [], "control": False, "draws": 1}.items():
        given = list(getattr(asked, name)) if none == [] else getattr(asked, name)
        if given != none:
            raise ValueError(f"{name} is {given!r}, but must be {none!r} where protected has no labels to train with.")
