"""
What an audit does where it is not given every role: it divides what there is, and says what cannot be known then.

The originals of the protected images are the best source, because they show what the protection takes away. Other
photographs with labels are the next. From protected images alone no verdict on clean images follows: the test images
are then protected ones that were held out, and purified.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..data import LabelledImages, find_likenesses
from ..data.checks import find_originals
from ..data.labels import join_labels


# Of each class, in an undivided set: 2 that train victims, 1 to collect and 1 to test.
LEAST_OF_A_CLASS = 4
FRACTIONS = {"protected": 0.5, "collected": 0.25, "test": 0.25}
_TASKS = {"collected": "train the purifier", "test": "test"}
# Test images that leave an accuracy uncertain by 10 points (95 %): 1.96^2 * 0.25 / 0.1^2.
ENOUGH_TEST_IMAGES = 100


@dataclass(frozen=True)
class Division:
    """
    How the images of an audit came to be its roles.

    Args:
        of (`str`): The role that was divided, or `""` for none.
        missing (`tuple[str, ...]`): Roles that were not given and have images of `of`.
        stand_in (`bool`): Whether the test images are protected ones, to be purified before they score anything.
        together (`int`): Images that resemble another one, two shots of one thing for example, and have its role.
        refused (`tuple[str, ...]`): Why sets with labels were not divided instead.
    """

    of: str = ""
    missing: tuple[str, ...] = ()
    stand_in: bool = False
    together: int = 0
    refused: tuple[str, ...] = ()

    def sentences(self, sets: Mapping[str, LabelledImages]) -> list[str]:
        """What was done, what cannot be known for that reason, and what would tell."""
        if not self.of:
            return []
        options, labelled = " and ".join(f"--{role}" for role in self.missing), "test" in sets
        tasks = {"protected": "train victims" if labelled else "are audited"}
        tasks |= {role: what for role, what in _TASKS.items() if role in self.missing}
        counts = ", ".join(f"{len(sets[role])} {what}" for role, what in tasks.items())
        how = "by class and at random" if labelled else "at random"
        said = [f"{options} not given: --{self.of} was divided {how}; {counts}."]
        said += self.refused
        if self.together:
            said.append(f"{self.together} images that resemble others stayed together.")
        if self.stand_in:
            said.append(
                "All test images are protected images that were held out and purified. What victims would do on clean "
                "images cannot be known, and so not whether the protection works."
            )
            if "collected" in self.missing:
                said.append(
                    "The purifier, too, was trained on protected images, so it takes a part of the protection for a "
                    "part of photographs."
                )
            said.append(
                "A verdict needs --clean, the originals under the same names, or --test and --collected, other "
                f"photographs of the same classes: {ENOUGH_TEST_IMAGES} test images leave 10 points of uncertainty, "
                f"{9 * ENOUGH_TEST_IMAGES} leave 3."
            )
        return said


def divide(
    sets: Mapping[str, LabelledImages], *, needs_collected: bool, seed: int, budget: float
) -> tuple[dict[str, LabelledImages], Division]:
    """
    The roles of an audit from the sets that were given.

    Args:
        sets (`dict`): By role. `protected` is among them, and one of the sets has labels that tests can have.
        needs_collected (`bool`): Whether a purifier is to be trained.
        seed (`int`): Of the division.
        budget (`float`): Images that are as near as this, in [0, 1], come into one part.

    Returns:
        `dict`: All roles that the audit needs, and the division; the sets themselves where none is missing.

    Raises:
        ValueError: If a class has too few images to be divided, in one sentence that names what to give.
    """
    sets, needed = dict(sets), ("collected", "test") if needs_collected else ("test",)
    missing = tuple(role for role in needed if role not in sets)
    if not missing:
        return sets, Division()
    if "clean" in sets and (sets["protected"].labels is not None or sets["clean"].labels is not None):
        if sets["protected"].labels is not None and sets["clean"].labels is not None:
            sets |= join_labels({role: sets[role] for role in ("protected", "clean")})
        sets["clean"] = find_originals(sets["clean"], sets["protected"])
        if sets["protected"].labels is not None:
            names = {"labels": sets["protected"].labels, "class_names": sets["protected"].class_names}
            sets["clean"] = replace(sets["clean"], **names)
        return _divide(sets, "clean", missing, seed, budget)
    refused = []
    for other in ("collected", "test"):
        if other in sets and sets[other].labels is not None:
            if (reason := _other_classes(other, sets)) is None:
                return _divide(sets, other, missing, seed, budget)
            refused.append(reason)
    if sets["protected"].labels is None:
        raise ValueError(
            "protected has no labels, and no set that can be divided has any, but test images need labels: give "
            "--clean or --collected with them."
        )
    sets, division = _divide(sets, "protected", missing, seed, budget)
    return sets, replace(division, refused=tuple(refused))


def _other_classes(role: str, sets: Mapping[str, LabelledImages]) -> str | None:
    """Why a set cannot stand for test images: those with other classes are no more than images."""
    if sets["protected"].labels is None:
        return None
    try:
        join_labels({name: sets[name] for name in ("protected", role)})
    except ValueError as error:
        return f"--{role} was not divided: {error}"
    return None


def _divide(sets: dict, of: str, missing: tuple[str, ...], seed: int, budget: float):
    source, keeps = sets[of], "protected" if of in ("clean", "protected") else of
    groups = likenesses(source, budget)
    parts = stratified(source, groups, {role: FRACTIONS[role] for role in (keeps, *missing)}, of, missing, seed)
    for role in ("protected", "clean") if keeps == "protected" else (keeps,):
        if role in sets:
            sets[role] = sets[role].subset(parts[keeps])
    for role in missing:
        sets[role] = source.subset(parts[role])
        if role == "collected":
            sets[role] = replace(sets[role], labels=None, class_names=None)
    together = int((np.bincount(groups)[groups] > 1).sum())
    return sets, Division(of, missing, of == "protected" and "test" in missing, together)


def likenesses(source: LabelledImages, budget: float) -> np.ndarray:
    """
    int (N,), one number for images that are one by `data.find_likenesses`, directly or by way of others; numbered from
    0 in the order of their first images.
    """
    pairs = find_likenesses(source, budget=budget)
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(source), len(source)))
    return connected_components(links, directed=False)[1]


def stratified(
    source: LabelledImages,
    groups: np.ndarray,
    fractions: Mapping[str, float],
    of: str,
    missing: tuple[str, ...],
    seed: int,
) -> dict[str, np.ndarray]:
    """
    Rows of each part, ascending. Each class is divided by the fractions and has an image in every part at least.
    Images of one group stay together; it counts for the class of its first.
    """
    draw, rows = np.random.default_rng(seed), {role: [] for role in fractions}
    total, options = sum(fractions.values()), " and ".join(f"--{role}" for role in missing)
    least = LEAST_OF_A_CLASS if len(fractions) == 3 else len(fractions)
    first = np.unique(groups, return_index=True)[1]
    for label in np.unique(source.labels):
        own = draw.permutation(first[source.labels[first] == label])
        if len(own) < least:
            name = source.class_names[label] if source.class_names else label
            raise ValueError(
                f"{of} has {len(own)} different image(s) of class {name!r}, but must have {least} of each class to be "
                f"divided: give more of them, or {options}."
            )
        ends = np.maximum(1, np.rint([len(own) * share / total for share in fractions.values()])).astype(int)
        ends[0] = len(own) - ends[1:].sum()
        for role, part in zip(rows, np.split(own, np.cumsum(ends)[:-1])):
            rows[role].append(part)
    return {role: np.flatnonzero(np.isin(groups, groups[np.concatenate(parts)])) for role, parts in rows.items()}
