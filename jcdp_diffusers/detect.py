"""
`jcdp detect`: does a set of images carry a protection? No clean originals are needed.

    jcdp detect --dataset DIR --collected DIR [--output FILE.json]

There are two kinds of evidence. Availability poisons are shortcuts: a model of raw pixels that was fitted to a part of
the set reads them in the rest of it, and not in images that were collected elsewhere (Yu et al., KDD 2022; Zhu et al.,
*Detection and Defense of Unlearnable Examples*, AAAI 2024). And a protection that is added to images adds its power to
their spectrum (`spectrum.describe_difference`), which needs no labels.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .audit.division import likenesses
from .audit.evidence import rise_in_words
from .audit.shortcut import (
    PIXEL_MODELS,
    SHORTCUT_IMAGES,
    SHORTCUT_VALUES,
    PixelModel,
    effective_count,
    gap_of,
    weights_by_class,
)
from .data import USUAL_BUDGET, LabelledImages, find_overlap, join_labels, load_images, present_columns
from .data.checks import unlike_images
from .data.photographs import detailed_side, sizes_in_words, stored_sizes, working_size
from .devices import check_seed, default_device
from .outputs import check_output_file, write_atomically
from .results import package_versions
from .spectrum import describe_difference


ROLES = ("dataset", "collected", "purified")
FOLDS = 5
LEAST_IMAGES = 50  # of each set: with fewer, chance explains any gap
# An image is named when its label is more probable than that of all but this share of the reference images.
FALSE_ALARMS = 0.01
NAMED = 20  # images in the report
# Without a reference, held-out images of an honest set rarely reach this (Zhu et al.'s bound).
BOUND_WITHOUT_REFERENCE = 0.7


def detect(
    dataset: LabelledImages,
    collected: LabelledImages | None = None,
    purified: LabelledImages | None = None,
    *,
    seed: int = 0,
    permutations: int = 999,
) -> dict[str, Any]:
    """
    Whether a set carries a protection, and which of its images and classes do.

    Args:
        dataset (`LabelledImages`): The suspicious set. Labels are needed for the shortcut, not for the spectrum.
        collected (`LabelledImages`, *optional*): Other images of the same kind, unprotected. With labels of the same
            classes, by name, they are the reference of the shortcut; with or without, that of the spectrum. Neither
            set may have been enlarged, which takes fine detail away.
        purified (`LabelledImages`, *optional*): The set's own purified copy, joined by id, whose labels it takes, as
            the shortcut's reference where collected images have no labels.
        seed (`int`): Of divisions and models.
        permutations (`int`): Of the spectrum's test.

    Returns:
        `dict`: `protected` (True, False, or None where nothing can be said), `sentence`, `images` and `shortcut`: for
        each of `PIXEL_MODELS` the accuracies `held_out` (of images of the set that the model has not seen) and
        `reference` (its images count by class as often as the set has the class), their `gap` and whether a shortcut
        is `found`; `classes`, the same gap by class of the linear model; `carriers`, how many images are more probable
        than nearly all of the reference, and the first of their ids; and `spectrum`, what
        `spectrum.describe_difference` says. Parts without their reference are None.

    Raises:
        ValueError: If a set is too small, has one class only, or does not fit the other.
    """
    check_seed(seed)
    _check(dataset, collected, purified)
    if dataset.labels is not None and collected is not None and collected.labels is not None:
        dataset, collected = join_labels({"dataset": dataset, "collected": collected}).values()
    found: dict[str, Any] = {"images": len(dataset), "shortcut": None, "spectrum": None}
    if dataset.labels is not None:
        is_copy = collected is None or collected.labels is None
        found["shortcut"] = _shortcut(dataset, purified if is_copy else collected, seed, is_copy=is_copy)
    if collected is not None:
        spectrum = describe_difference(dataset.images, collected.images, permutations=permutations, seed=seed)
        estimate = spectrum.pop("spectrum")
        found["spectrum"] = spectrum | {
            "axes": estimate.axes.tolist(),
            "frequencies": estimate.frequencies.tolist(),
            "power": estimate.power.round(4).tolist(),
            "error": estimate.error.round(4).tolist(),
            "background": estimate.background.round(4).tolist(),
        }
    return found | _conclusion(found)


def _check(dataset: LabelledImages, collected: LabelledImages | None, purified: LabelledImages | None) -> None:
    if dataset.labels is None and collected is None:
        raise ValueError(
            "dataset has no labels and collected is None, but one of the two is needed: the shortcut is read from "
            "labels, the spectrum is compared with that of collected images."
        )
    for name, data in (("dataset", dataset), ("collected", collected), ("purified", purified)):
        if data is None:
            continue
        if len(data) < LEAST_IMAGES:
            raise ValueError(f"{name} has {len(data)} images, but at least {LEAST_IMAGES} are needed.")
        if data.images.shape[1:] != dataset.images.shape[1:]:
            raise ValueError(
                f"{name} has images of shape {data.images.shape[1:]}, but dataset has {dataset.images.shape[1:]}: "
                "image_size and channels bring them to one shape."
            )
    if dataset.labels is not None and len(np.unique(dataset.labels)) < 2:
        raise ValueError("dataset has images of one class only, but at least two are needed to read a shortcut.")
    if purified is not None and (dataset.labels is None or (collected is not None and collected.labels is not None)):
        reason = "dataset has no labels" if dataset.labels is None else "collected has labels"
        raise ValueError(
            f"purified has {len(purified)} images, but must be None where {reason}: it is a reference for labels that "
            "collected images lack."
        )
    if purified is not None:
        if set(purified.ids) != set(dataset.ids):
            raise ValueError("purified has other ids than dataset, but it must be its purified copy.")
        place = {id_: row for row, id_ in enumerate(purified.ids)}
        if len(unlike := unlike_images(dataset.images, purified.images[[place[id_] for id_ in dataset.ids]])):
            raise ValueError(
                f"purified has {len(unlike)} images that do not resemble those of dataset under their ids, the first "
                f"{dataset.called(unlike[0])}, but it must be its purified copy."
            )
    if collected is not None:
        if len(pairs := find_overlap(dataset, collected)):
            first, second = pairs[0]
            raise ValueError(
                f"collected has {len(np.unique(pairs[:, 1]))} images of dataset, the first {collected.called(second)} "
                f"(in dataset {dataset.called(first)}), but it must hold other images."
            )


def _shortcut(
    dataset: LabelledImages, reference: LabelledImages | None, seed: int, *, is_copy: bool
) -> dict[str, Any]:
    """Models fitted to four fifths of the set, on the last fifth and on the reference; each fifth is the last once."""
    limit = max(LEAST_IMAGES, min(SHORTCUT_IMAGES, SHORTCUT_VALUES // dataset.images[0].size))
    rows = np.random.default_rng(seed).permutation(len(dataset))[:limit]
    data = dataset.subset(rows)
    # The copy of an image that a model was fitted to is right without a shortcut.
    folds = likenesses(data, USUAL_BUDGET) % FOLDS
    if reference is not None and is_copy:
        place = {id_: row for row, id_ in enumerate(reference.ids)}
        reference = replace(reference.subset([place[id_] for id_ in data.ids]), labels=data.labels)
    elif reference is not None:
        reference = reference.subset(np.random.default_rng(seed).permutation(len(reference))[:limit])
    result: dict[str, Any] = {"images": len(data), "reference": None if reference is None else len(reference)}
    for kind in PIXEL_MODELS:
        here, there = [], []
        for fold in range(FOLDS):
            model = PixelModel(kind, seed=seed).fit(data.subset(folds != fold))
            here.append(_read(model, data.subset(folds == fold)))
            if reference is not None:
                there.append(_read(model, reference.subset(folds == fold) if is_copy else reference))
        here = {name: np.concatenate([part[name] for part in here]) for name in here[0]}
        result[kind] = {"held_out": float(here["right"].mean())}
        if reference is None:
            continue
        there = {name: np.concatenate([part[name] for part in there]) for name in there[0]}
        # A class that is frequent in the set is easy to guess there, but not in the reference.
        weights = weights_by_class(there["label"], data.labels)
        figures = {"held_out": result[kind]["held_out"], "test": float(np.average(there["right"], weights=weights))}
        times_read = len(weights) / len(reference)
        gap, is_found = gap_of(figures, len(data), effective_count(weights) / times_read)
        result[kind] |= {"reference": figures["test"], "gap": gap, "found": is_found}
        if kind == "linear":
            result["classes"] = _by_class(dataset, here, there)
            result["carriers"] = _carriers(here, there, weights)
    return result


def _read(model: PixelModel, data: LabelledImages) -> dict[str, np.ndarray]:
    return {
        "right": model.is_right(data),
        "probability": model.probability_of_label(data),
        "label": data.labels,
        "id": np.array(data.ids, dtype=object),
    }


def _by_class(dataset: LabelledImages, here: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> dict[str, float]:
    """Held-out minus reference accuracy of each class that both have."""
    gaps = {}
    for label in np.intersect1d(here["label"], there["label"]):
        name = str(label) if dataset.class_names is None else dataset.class_names[label]
        mine, theirs = (part["right"][part["label"] == label].mean() for part in (here, there))
        gaps[name] = round(float(mine - theirs), 4)
    return gaps


def _carriers(here: dict[str, np.ndarray], there: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    """Images whose label is more probable than that of 99 % of the reference images, the most probable first."""
    ascending = np.argsort(there["probability"], kind="stable")
    below = np.cumsum(weights[ascending]) / weights.sum()
    threshold = float(there["probability"][ascending[np.searchsorted(below, 1 - FALSE_ALARMS)]])
    above = here["probability"] > threshold
    order = np.argsort(-here["probability"], kind="stable")
    return {
        "share": round(float(above.mean()), 4),
        "expected_by_chance": FALSE_ALARMS,
        "threshold": round(threshold, 4),
        "first": here["id"][order[: min(NAMED, int(above.sum()))]].tolist(),
    }


def _conclusion(found: dict[str, Any]) -> dict[str, Any]:
    """Whether the set is protected, and why, in one sentence."""
    reasons = [*_shortcut_reasons(found["shortcut"]), *_spectrum_reasons(found["spectrum"])]
    if reasons:
        return {"protected": True, "sentence": f"The set is protected: {'; '.join(reasons)}."}
    referenced = found["shortcut"] is not None and found["shortcut"]["reference"] is not None
    best = 0.0 if found["shortcut"] is None else max(found["shortcut"][kind]["held_out"] for kind in PIXEL_MODELS)
    if not referenced and found["spectrum"] is None:
        if best > BOUND_WITHOUT_REFERENCE:
            sentence = (
                f"The set is suspicious: pixels alone give {best:.0%} of the labels of images that the model has not "
                "seen. Collected images would show whether honest images do the same."
            )
        else:
            sentence = (
                f"Nothing can be said without collected images: pixels alone give {best:.0%} of the labels, which "
                "both an honest set and a weak protection allow."
            )
        return {"protected": None, "sentence": sentence}
    looked_at = [
        name for name, there in (("labels", referenced), ("spectrum", found["spectrum"] is not None)) if there
    ]
    sentence = f"No protection was found by the {' and the '.join(looked_at)}."
    if found["spectrum"] is not None and (finding := found["spectrum"]["finding"]) != "none":
        cause = {
            "filtered": "the images of the set have less fine detail, as after a JPEG save or a blur",
            "other kind": "the images of the two sets differ in contrast or content",
        }[finding]
        sentence = f"{sentence[:-1]}, but {cause}, which could hide a weak one."
    if not referenced and best > BOUND_WITHOUT_REFERENCE:
        sentence += (
            f" The labels are suspicious: pixels alone give {best:.0%} of those of unseen images. "
            "Labels of the collected images, or a purified copy, would show whether honest images do the same."
        )
        return {"protected": None, "sentence": sentence}
    return {"protected": False, "sentence": sentence}


def _shortcut_reasons(shortcut: dict[str, Any] | None) -> list[str]:
    if shortcut is None or shortcut["reference"] is None:
        return []
    return [
        f"a {kind} model of pixels is right about {shortcut[kind]['held_out']:.0%} of images that it has not seen, "
        f"but about {shortcut[kind]['reference']:.0%} of the reference images"
        for kind in PIXEL_MODELS
        if shortcut[kind]["found"]
    ]


def _spectrum_reasons(spectrum: dict[str, Any] | None) -> list[str]:
    if spectrum is None or spectrum["finding"] != "noise":
        return []
    return [f"its images have {rise_in_words(spectrum)}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jcdp detect`."""
    parser.add_argument("--dataset", required=True, help="suspicious images: Hub id, folder or file")
    parser.add_argument("--split", help="of --dataset, needed where there are several")
    parser.add_argument("--collected", help="other, unprotected images of the same kind; labels make them worth more")
    parser.add_argument("--collected_split")
    parser.add_argument("--purified", help="the purified copy of --dataset, where collected images have no labels")
    parser.add_argument("--image_column", help="of --dataset, and of --collected where it has that column")
    parser.add_argument("--label_column", help="of --dataset, and of --collected where it has that column")
    parser.add_argument("--image_size", type=int, help="side in pixels to which all images are brought")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the result")


def run(args: argparse.Namespace) -> None:
    """`jcdp detect`, from parsed options to a sentence."""
    if args.output is not None:
        sources = {f"--{name}": getattr(args, name) for name in ("dataset", "collected", "purified")}
        check_output_file(args.output, sources=sources, name="--output")
        _check_own(Path(args.output))
    sets = {}
    where = {role: _where(args, role) for role in ROLES if getattr(args, role) is not None}
    image_size = _size_to_read(args, where)
    for role, options in where.items():
        sizes = {"image_size": image_size, "channels": args.channels}
        sets[role] = load_images(getattr(args, role), **options, **sizes)
    found = detect(sets["dataset"], sets.get("collected"), sets.get("purified"), seed=args.seed)
    if args.output is not None:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found | {"packages": package_versions()}, indent=2) + "\n")
    print(found["sentence"])
    if found["protected"] and found["shortcut"] is not None and "carriers" in found["shortcut"]:
        carriers, classes = found["shortcut"]["carriers"], found["shortcut"]["classes"]
        print(
            f"Images that a linear model gives away: {carriers['share']:.0%}, by chance {FALSE_ALARMS:.0%}; first: "
            f"{', '.join(map(repr, carriers['first'][:3]))}."
        )
        print("Gap by class, in points: " + ", ".join(f"{name} {100 * gap:.0f}" for name, gap in classes.items()))


def _check_own(output: Path) -> None:
    """Refuse to replace a file that is no result of this command."""
    if not output.exists():
        return
    try:
        found = json.loads(output.read_bytes())
    except ValueError:
        found = None
    if not (isinstance(found, dict) and {"protected", "sentence", "shortcut", "spectrum"} <= found.keys()):
        raise ValueError(
            f"--output is {str(output)!r}, which holds something else, but must be an earlier result of jcdp detect "
            "or a path where there is nothing yet."
        )


def _where(args: argparse.Namespace, role: str) -> dict[str, str | None]:
    """
    Split and columns of a role. Collected images may lack the column of labels; a purified copy has our own names.
    """
    if role == "dataset":
        return {"split": args.split, "image_column": args.image_column, "label_column": args.label_column}
    if role == "purified":
        return {}
    named = {"image_column": args.image_column, "label_column": args.label_column}
    there = present_columns(args.collected, named, split=args.collected_split)
    return {"split": args.collected_split} | there


def _size_to_read(args: argparse.Namespace, where: dict[str, dict[str, str | None]]) -> int | None:
    """
    The side to which images are brought, said where it is chosen here; None where they stay as they are.

    Enlarged images have no fine detail, beside which that of other images would look like a protection.
    """
    sizes = {role: stored_sizes(getattr(args, role), **options) for role, options in where.items()}
    most = detailed_side(sizes) if len(sizes) > 1 else None
    if args.image_size is not None:
        if most is not None and args.image_size > most:
            role = next(role for role in sizes if detailed_side({role: sizes[role]}) == most)
            raise ValueError(
                f"--image_size is {args.image_size}, but must be {most} at most: --{role} has smaller images, and "
                "enlarged ones have no fine detail that could be compared."
            )
        return args.image_size
    side = working_size(sizes, default_device())
    if side is not None:
        side = side if most is None else min(side, most)
        words = sizes_in_words([size for of_role in sizes.values() for size in of_role])
        print(f"{words}: looked at with {side}x{side} pixels (--image_size chooses another side).")
    return side
