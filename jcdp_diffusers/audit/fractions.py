"""
What a protection does where only a part of the images is protected.

Of each class a fraction of the images is protected, and the originals stand for the rest. Victims of all these images
are compared with victims of the clean rest alone. That is the honest baseline: whoever leaves the protected images
out gets as much.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data import LabelledImages
from ..data.perturbations import changed_images
from ..trials import Trial, spread_over_seeds
from .settings import AuditSettings, Learner


# A protection may leave an image as it was by chance, as a pixel that has the colour already. More than this share of
# the images that are to be protected is no chance: the set is protected in part.
UNCHANGED = 0.05


def protected_part(
    labels: np.ndarray | None, count: int, fraction: float, seed: int, changed: np.ndarray | None = None
) -> np.ndarray:
    """
    The rows that are protected; those of a smaller fraction are among them.

    Args:
        labels (`np.ndarray`, *optional*): int64 (N,); without them all images count as one class.
        count (`int`): Number N of images.
        fraction (`float`): Of each class, above 0 and at most 1; rounded to whole images, one at least.
        seed (`int`): Of the draw.
        changed (`np.ndarray`, *optional*): bool (N,), the images that the protection changes, which are drawn before
            others; all by default.

    Returns:
        `np.ndarray`: bool (N,).
    """
    changed = np.ones(count, bool) if changed is None else changed
    labels = np.zeros(count, np.int64) if labels is None else labels
    chosen = np.zeros(count, bool)
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        rows = rows[np.argsort(~changed[rows], kind="stable")]
        chosen[rows[: max(1, round(fraction * len(rows)))]] = True
    return chosen


def check_fractions(sets: Mapping[str, LabelledImages], asked: AuditSettings, learners: Sequence[Learner]) -> None:
    """
    Refuse fractions that are not protected, or whose clean rest no victim could learn from.

    Raises:
        ValueError: If the protection changes fewer images, or the rest lacks a class, or is smaller than a batch of a
            method without labels.
    """
    if not asked.fractions:
        return
    protected = sets["protected"]
    changed = changed_images(sets["clean"].images, protected.images)
    for fraction in asked.fractions:
        part = protected_part(protected.labels, len(protected), fraction, asked.seed, changed)
        rest = ~part
        if (part & ~changed).sum() > UNCHANGED * part.sum():
            raise ValueError(
                f"fractions has {fraction}, which is {part.sum()} of {len(protected)} images by class, but must be at "
                f"most what is protected: the protection changes {(part & changed).sum()} of these."
            )
        if fraction == 1:
            continue
        if protected.labels is not None and len(np.unique(protected.labels[rest])) < len(np.unique(protected.labels)):
            raise ValueError(
                f"fractions has {fraction}, but must leave clean images of every class: {rest.sum()} of "
                f"{len(protected)} are left."
            )
        for learner in learners:
            least = 2 if learner.method == "supervised" else max(learner.recipe.batch_size, learner.recipe.queue or 0)
            if rest.sum() < least:
                raise ValueError(
                    f"fractions has {fraction}, but must leave {least} clean images at least for method "
                    f"{learner.method!r}: {rest.sum()} of {len(protected)} are left."
                )


def trials_of_fractions(
    sets: Mapping[str, LabelledImages], asked: AuditSettings, protected: Sequence[Trial]
) -> dict[float, tuple[list[Trial], list[Trial]]]:
    """
    By fraction, the trials of all images and those of the clean rest alone, which fraction 1 has none of.

    Args:
        sets (`dict`): `protected` and `clean` images, row by row the same.
        asked (`AuditSettings`): Fractions, and the seed of the draw.
        protected (`Sequence[Trial]`): The row of protected images, which is that of fraction 1.
    """
    clean, whole = sets["clean"], sets["protected"]
    changed = changed_images(clean.images, whole.images)
    found = {}
    for fraction in asked.fractions:
        if fraction == 1:
            found[fraction] = list(protected), []
            continue
        part = protected_part(whole.labels, len(whole), fraction, asked.seed, changed)
        mixed = whole.with_images(np.where(part[:, None, None, None], whole.images, clean.images))
        names = f"{100 * fraction:g} % protected", f"without the protected {100 * fraction:g} %"
        found[fraction] = tuple(
            [dataclasses.replace(one, train=images, about={**one.about, "row": name}) for one in protected]
            for images, name in zip((mixed, whole.with_images(clean.images).subset(~part)), names)
        )
    return found


def figures_of_fractions(trials: Mapping[float, tuple[Sequence[Trial], Sequence[Trial]]], records: Path) -> list[dict]:
    """
    What a report says of the fractions, from the records.

    Args:
        trials (`dict`): From [`trials_of_fractions`].
        records (`Path`): The file that has their results.

    Returns:
        `list[dict]`: By fraction, ascending: `fraction`; `images` and `protected_images`, how many there are in all,
        and how many of them are protected, a whole number of each class; `all`, the accuracy of victims of all images,
        and `clean_rest`, that of victims of the clean ones alone, each with `mean`, `std` and `values` (None where
        there are none).
    """
    found = []
    for fraction, (everything, rest) in sorted(trials.items()):
        accuracies = [spread_over_seeds(own, records)["accuracy"] if own else None for own in (everything, rest)]
        count, clean = len(everything[0].train), len(rest[0].train) if rest else 0
        sizes = {"images": count, "protected_images": count - clean}
        found.append({"fraction": fraction} | sizes | {"all": accuracies[0], "clean_rest": accuracies[1]})
    return found


def fractions_table(fractions: Sequence[Mapping]) -> list[list[str]]:
    """The table in words: head, then a row for each fraction."""
    head = ["protected", "all images", "std", "clean images alone", "std", "what the protected ones add"]
    rows = []
    for one in fractions:
        cells = [f"{100 * one['fraction']:g} % ({one['protected_images']} of {one['images']})"]
        for accuracy in (one["all"], one["clean_rest"]):
            cells += ["-", "-"] if accuracy is None else [f"{100 * accuracy['mean']:.1f} %", _std(accuracy)]
        rest = one["clean_rest"]
        cells.append("-" if rest is None else f"{100 * (one['all']['mean'] - rest['mean']):+.1f} points")
        rows.append(cells)
    return [head, *rows]


FRACTIONS_CAPTION = (
    "Test accuracy of victims where a part of each class is protected and the originals stand for the rest, beside "
    "victims of that clean rest alone. Where both agree, the protected images teach nothing."
)


def fractions_title(one: Mapping) -> str:
    """The heading of the part of a way of learning."""
    method = one["victims"]["method"]
    return "Where a part is protected" + ("" if method == "supervised" else f" ({method})")


def fractions_name(number: int) -> str:
    """File name of the curve of a report's first way of learning, or of another."""
    return f"fractions-{number + 1}.png" if number else "fractions.png"


def _std(accuracy: Mapping) -> str:
    return "-" if accuracy["std"] is None else f"{100 * accuracy['std']:.1f}"
