"""
What an audit looks at before it computes anything: do the sets fit together, and what gives the protection away?

Whatever would make a figure meaningless is refused in one sentence; whatever a reader should know is counted.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from . import USUAL_BUDGET, LabelledImages, check_roles, find_overlap
from .labels import join_labels
from .perturbations import changed_images, measured_norms


ROLES = ("disjoint", "paper")
RESEMBLANCE = 0.3  # of an original and what was made from it; images of other rows have nearly none
UNLIKE = 0.05  # share of a set; LSP, OPS and AR leave none on CIFAR-10, digits and Tiny ImageNet, CUDA 0.005 at most


def check_sets(
    sets: Mapping[str, LabelledImages], unlabelled: Mapping[str, LabelledImages]
) -> dict[str, LabelledImages]:
    """
    Bring sets to one space of labels, and refuse those that no victim could be trained and tested on together.

    Args:
        sets (`dict`): By role, the first of them leading; they need labels, and images of the same classes.
        unlabelled (`dict`): Further sets by role, whose images must have the same shape.

    Returns:
        `dict`: All sets by role; those of `sets` as [`labels.join_labels`] joins them.

    Raises:
        ValueError: In one sentence that names the role and what is wrong with it.
    """
    first, leading = next(iter(sets.items()))
    for role, data in (*sets.items(), *unlabelled.items()):
        if data.images.shape[1:] != leading.images.shape[1:]:
            raise ValueError(
                f"{first} has images of {_shape(leading)} and {role} of {_shape(data)} (height, width, channels), but "
                "all must have one shape: image_size and channels bring them to it."
            )
    for role, data in sets.items():
        if data.labels is None:
            raise ValueError(f"{role} has no labels, but every image of it needs one.")
    joined = join_labels(sets)
    for role, data in joined.items():
        if len(np.unique(data.labels)) == 1:
            raise ValueError(f"{role} has images of one class only, but two at least are needed to tell them apart.")
    return joined | dict(unlabelled)


def check_separation(
    protected: LabelledImages,
    collected: LabelledImages | None,
    test: LabelledImages | None,
    clean: LabelledImages | None,
    *,
    roles: str = "disjoint",
    budget: float = USUAL_BUDGET,
) -> dict[str, int]:
    """
    Refuse roles that are not what they are said to be.

    A purifier that has seen clean originals of protected images proves nothing, and neither does a victim that has
    seen test images.

    Args:
        protected, collected, test, clean (`LabelledImages`): By role; `collected` is None where a purifier was given
            without the images that trained it, `test` where no victim is tested; `clean` holds the originals of the
            protected images.
        roles (`str`): `"disjoint"`, or `"paper"` for a purifier that has been trained on the test images.
        budget (`float`): See `data.check_roles`.

    Returns:
        `dict`: `collected_in_test`, how many collected images are test images; 0 unless `roles` is `"paper"`.

    Raises:
        ValueError: In one sentence that names the two roles and the first pair of images.
    """
    if roles not in ROLES:
        raise ValueError(f"roles is {roles!r}, but must be one of {ROLES}.")
    others = {role: data for role, data in {"collected": collected, "test": test}.items() if data is not None}
    if clean is not None:
        for role, other in others.items():
            # The protection may change more than the budget says, or so many values that nearness sees nothing (CUDA);
            # its clean original is found all the same.
            pairs = find_overlap(clean, other, budget=budget)
            _refuse(pairs, clean, other, f"{role} has {{}} images that are clean originals of protected ones")
    if roles == "disjoint" and len(others) == 2:
        check_roles(protected, collected, test, budget=budget)
        return {"collected_in_test": 0}
    for role, other in others.items():
        _refuse(find_overlap(protected, other, budget=budget), protected, other, _within(role, budget))
    if len(others) < 2:
        return {"collected_in_test": 0}
    shared = len(np.unique(find_overlap(collected, test)[:, 0]))
    if shared == 0:
        raise ValueError(
            "roles is 'paper', but collected and test have no image in common: 'disjoint' is what these sets are."
        )
    return {"collected_in_test": shared}


def budget_of_levels(levels: int) -> float:
    """
    A noise budget in [0, 1] from one in levels of 255, as commands take it.

    Raises:
        ValueError: If it lies outside of 0 to 255.
    """
    if not 0 <= levels <= 255:
        raise ValueError(f"budget is {levels}, but must lie within 0 and 255, in 1/255.")
    return levels / 255


def match_originals(clean: LabelledImages, protected: LabelledImages) -> LabelledImages:
    """
    The clean original of each protected image, under its id, in the order of the protected ones.

    Raises:
        ValueError: As `find_originals`.
    """
    return replace(find_originals(clean, protected), ids=protected.ids, id_space=protected.id_space)


def find_originals(clean: LabelledImages, protected: LabelledImages) -> LabelledImages:
    """
    The clean original of each protected image, in the order of the protected ones, under the id of its own source.

    They are matched by id, or where ids are row numbers on one side by the names of files without suffixes.

    Raises:
        ValueError: If one is missing, or has another label or shape, or if the images do not resemble each other: ids
            that are row numbers agree by chance where two sources have another order.
    """
    names, wanted = _names_in_common(clean, protected)
    rows = {name: row for row, name in enumerate(names)}
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(
            f"clean lacks the originals of {len(missing)} of {len(protected)} protected images, the first "
            f"{missing[0]!r}, but each must be there under the protected image's id or file name."
        )
    clean = clean.subset([rows[name] for name in wanted])
    if clean.images.shape != protected.images.shape:
        raise ValueError(
            f"clean has images of {_shape(clean)} and protected of {_shape(protected)} (height, width, channels), but "
            "originals have the shape of what was made from them."
        )
    if clean.labels is not None and protected.labels is not None:
        differing = np.flatnonzero(clean.labels != protected.labels)
        if len(differing):
            row = differing[0]
            raise ValueError(
                f"clean and protected label {len(differing)} images differently, the first {protected.called(row)} as "
                f"{clean.labels[row]} and {protected.labels[row]}, but an original has its image's label."
            )
    if len(unlike := unlike_images(clean.images, protected.images)):
        raise ValueError(
            f"clean has {len(unlike)} images under the ids or file names of protected ones that they do not resemble, "
            f"the first {clean.called(unlike[0])} for {protected.called(unlike[0])}; originals under the ids of what "
            "was made from them are accepted."
        )
    return clean


def unlike_images(originals: np.ndarray, made: np.ndarray) -> np.ndarray:
    """
    Rows whose images do not resemble what was made from them, where these are more than chance explains.

    Two images are alike if what sets each apart from the mean image of its set correlates by `RESEMBLANCE`. Of images
    that are nearly flat, noise hides what they show, so up to `UNLIKE` of a set may be unlike.

    Args:
        originals, made (`np.ndarray`): uint8 (N, H, W, C).

    Returns:
        `np.ndarray`: Row numbers, ascending; none for a single image, which has nothing to be set apart from.
    """
    means, alike = [images.mean(axis=0) for images in (originals, made)], np.ones(len(made))
    for start in range(0, len(made), 1024):
        part = slice(start, start + 1024)
        first, second = (
            (images[part] - mean).reshape(-1, mean.size) for images, mean in zip((originals, made), means)
        )
        spread = np.sqrt(np.square(first).sum(axis=1) * np.square(second).sum(axis=1))
        alike[part] = np.divide((first * second).sum(axis=1), spread, out=np.ones(len(spread)), where=spread > 0)
    unlike = np.flatnonzero(alike < RESEMBLANCE)
    return unlike if len(unlike) > UNLIKE * len(made) else unlike[:0]


def with_originals(protected: LabelledImages, clean: LabelledImages) -> LabelledImages:
    """The protected images whose originals are there: one that cannot be read takes its protected image with it."""
    names, wanted = _names_in_common(clean, protected)
    there = set(names)
    return protected.subset([name in there for name in wanted])


def _names_in_common(clean: LabelledImages, protected: LabelledImages) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an original and its protected image are called alike: ids that were given, or names of files."""
    if clean.id_space == protected.id_space == "":
        return clean.ids, protected.ids
    # Whoever has put one of the sets into class folders has kept the last part of the names.
    for last_part in (False, True):
        stems = _stems(clean, last_part), _stems(protected, last_part)
        if None not in stems and set(stems[0]) & set(stems[1]):
            return stems
    return clean.ids, protected.ids


def _stems(data: LabelledImages, last_part: bool) -> tuple[str, ...] | None:
    """File names without suffixes, or the last parts of these, where they tell all images apart."""
    if data.files is None or None in data.files:
        return None
    paths = [PurePosixPath(file).with_suffix("") for file in data.files]
    stems = tuple(path.name if last_part else path.as_posix() for path in paths)
    return stems if len(set(stems)) == len(stems) else None


def few_of_each_class(data: LabelledImages, count: int) -> LabelledImages:
    """About `count` images, the first of each class and the same number of each, in their order; for smoke runs."""
    each = -(-count // len(np.unique(data.labels)))
    rows = np.concatenate([np.flatnonzero(data.labels == label)[:each] for label in np.unique(data.labels)])
    return data.subset(np.sort(rows))


def describe_set(data: LabelledImages) -> dict:
    """
    Number, shape, balance and duplicates of a set.

    Returns:
        `dict`: `images`; `shape`, (height, width, channels); `images_per_class`, by name (None without labels);
        `duplicates`, images whose pixels another image before them has; `contradictions`, those of them that have
        another label.
    """
    per_class = None
    if data.labels is not None:
        counts = np.bincount(data.labels, minlength=len(data.class_names or ()))
        names = data.class_names or tuple(str(label) for label in range(len(counts)))
        per_class = dict(zip(names, counts.tolist()))
    labels = [None] * len(data) if data.labels is None else data.labels.tolist()
    seen: dict[bytes, int | None] = {}
    found = Counter()
    for image, label in zip(data.images, labels):
        pixels = image.tobytes()
        if pixels in seen:
            found["duplicates"] += 1
            found["contradictions"] += seen[pixels] != label
        seen.setdefault(pixels, label)
    return {
        "images": len(data),
        "shape": list(data.images.shape[1:]),
        "images_per_class": per_class,
        "duplicates": found["duplicates"],
        "contradictions": found["contradictions"],
    }


def describe_noise(clean: LabelledImages, protected: LabelledImages) -> dict:
    """Sizes of the protection after rounding: `measured_norms` of the images that it changes, and `share_changed`."""
    changed = changed_images(clean.images, protected.images)
    rows = changed if changed.any() else slice(None)
    return measured_norms(clean.images[rows], protected.images[rows]) | {"share_changed": float(changed.mean())}


def _within(role: str, budget: float) -> str:
    return f"protected has {{}} images that are {role} ones (same id, same pixels or within {255 * budget:.0f}/255)"


def _refuse(pairs: np.ndarray, one: LabelledImages, other: LabelledImages, sentence: str) -> None:
    if len(pairs):
        first, second = pairs[0]
        raise ValueError(
            f"{sentence.format(len(np.unique(pairs[:, 0])))}, the first {one.called(first)} and "
            f"{other.called(second)}, but the roles must not overlap (data.find_overlap lists the rows)."
        )


def _shape(data: LabelledImages) -> str:
    return "x".join(map(str, data.images.shape[1:]))
