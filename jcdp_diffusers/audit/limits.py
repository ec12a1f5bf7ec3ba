"""What the figures of an audit do not say."""

import math
from collections.abc import Mapping, Sequence


def limits(
    status: str,
    *,
    victim: str,
    seeds: int,
    planned_seeds: int,
    test_images: int,
    clean_known: bool,
    roles: str,
    listed: int | None,
    training: Mapping | None,
    attacks: Sequence[str],
    assumptions: Mapping[str, str],
) -> list[str]:
    """
    What the figures of an audit do not say, in sentences.

    Args:
        status (`str`): Of the verdict.
        victim (`str`): The network that was trained.
        seeds (`int`): Victims per row that were trained.
        planned_seeds (`int`): Victims per row that the audit would have trained with more time.
        test_images (`int`): How many scored them.
        clean_known (`bool`): Whether the originals of the protected images were given.
        roles (`str`): `"disjoint"` or `"paper"`.
        listed (`int`, *optional*): How many images trained the purifier, where that is known.
        training (`dict`, *optional*): The record of the purifier's training, if it was trained for the audit.
        attacks (`Sequence[str]`): What was tried beside purification.
        assumptions (`dict`): By attack, what it assumes beyond protected and collected images.
    """
    error = 100 * 1.96 * math.sqrt(0.25 / test_images)
    found = []
    if seeds < planned_seeds:
        found.append(
            f"The time was up after {seeds} of {planned_seeds} victims per row. The same command, given again, trains "
            "the others."
        )
    found += [
        f"Victims were of one kind ({victim}), trained by one recipe. Another network or a longer training may learn "
        "more, from the protected images as well.",
        "An attack that fails proves nothing about a stronger one; an attack that succeeds settles the matter.",
        f"{test_images} test images: a figure is uncertain by up to {error:.1f} points (95 %) for that reason alone, "
        "beside the spread over seeds.",
    ]
    if seeds < 3:
        victims = "One victim" if seeds == 1 else f"{seeds} victims"
        found.append(f"{victims} per row: too few to know the spread; three or more are usual.")
    if not clean_known:
        found.append(
            "No clean originals were given: what the protection took away, and so how much of it came back, is not "
            "known; neither is the size of the noise, nor whether originals of images whose protection changes much "
            "more than the budget are among the collected or test images."
        )
    if roles == "paper":
        found.append(
            "Roles as in the paper: the purifier has been trained on the very test images that score the victims. "
            "Such figures are for comparison with the paper and not with those of disjoint roles."
        )
    found += _of_the_purifier(listed, training, clean_known)
    if "eclipse" in attacks:
        found.append(
            "The row eclipse purifies with the purifier of this audit, where its authors train one of few images."
        )
    found += [
        f"The row {name} assumes more than the others: that {assumes}. It says nothing of anybody without that access."
        for name, assumes in assumptions.items()
    ]
    if attacks and status in ("broken", "weakened", "undone"):
        found.append(
            f"The verdict speaks of one of {len(attacks) + 1} attacks: the strongest that bears it out, and one that "
            "assumes more than the others only where no other does. The same test images choose it, and that flatters "
            "its figure by a little; the verdict allows for that (Bonferroni)."
        )
    if attacks and status == "withstands":
        found.append(f"The verdict holds for all {len(attacks) + 1} attacks that were tried.")
    if status == "withstands":
        most = 100 * (1 - 0.05 ** (1 / seeds))
        found.append(
            f"None of {seeds} victims per row won back half of what the protection took. So few victims only exclude "
            f"(95 %) that more than {most:.0f} % of all would."
        )
    if status == "smoke":
        found.insert(0, "This is a smoke run: purifier and victims were hardly trained, and no figure means anything.")
    return found


def _of_the_purifier(listed: int | None, training: Mapping | None, clean_known: bool) -> list[str]:
    said = []
    if listed is None:
        said.append(
            "The purifier's repository does not list the images that trained it (trained_on.json): whether it has "
            "seen originals of protected images or test images is not known."
        )
    elif training is None and not clean_known:
        said.append(
            f"The purifier was trained on none of the test images, by the list of {listed} images in its repository; "
            "whether originals of protected images are among them is not known without these originals."
        )
    if training is not None:
        said.append(
            f"The purifier was trained here, on {listed} images in {training['steps']} steps and "
            f"{training['seconds']:.0f} s; a larger one, trained longer on more images, purifies better."
        )
    return said
