"""Victims that learn in several ways: what each of them gets, side by side."""

from collections.abc import Mapping, Sequence

from .settings import Learner


# What learns, in sentences.
SAID = {
    "supervised": "a classifier",
    "simclr": "a representation (SimCLR)",
    "moco-v2": "a representation (MoCo v2)",
    "byol": "a representation (BYOL)",
}
_IMAGES = {"clean": "clean images", "protected": "protected images", "purified": "purified images"}


def in_words(learners: Sequence[Learner], count: int) -> str:
    """Networks and recipes for so many training images, in a clause."""
    said = []
    for learner in learners:
        recipe = learner.recipe.for_images(count)
        way = "" if learner.method == "supervised" else f" by {learner.method}"
        said.append(f"{learner.victim}{way}, {recipe.epochs} epochs ({recipe.name})")
    return "; ".join(said)


def side_by_side(learned: Sequence[Mapping]) -> list[str]:
    """
    What victims of each way learn from the same images, a sentence for each kind of images; empty for a single way.

    Args:
        learned (`Sequence[dict]`): By way, `victims` and `rows` as in a report.
    """
    if len(learned) < 2:
        return []
    ways = [(one["victims"]["method"], one["rows"]) for one in learned]
    said = []
    for row, images in _IMAGES.items():
        learned = [
            f"{SAID[method]} learns {100 * entry['accuracy']['mean']:.0f} %"
            for method, rows in ways
            for entry in rows
            if entry["row"] == row
        ]
        if learned:
            said.append(f"From the {images}, {', '.join(learned)}.")
    return said


def report_of(report: Mapping, other: Mapping) -> dict:
    """The report as it would be with another way of learning alone, for its tables."""
    return dict(report) | {name: other[name] for name in ("victims", "rows", "verdict")} | {"draws": {"count": 1}}


def title_of(other: Mapping) -> str:
    """The heading of the part of a way of learning."""
    victims = other["victims"]
    return f"What {SAID[victims['method']]} learned: {victims['victim']}, width {victims['width']}"
