"""The verdict of an audit: one sentence that its figures bear out, and what it leaves open."""

import math
import statistics
from collections.abc import Mapping, Sequence


# Two training sets are told apart when their mean accuracies differ by this much and by two standard errors.
LEAST_DIFFERENCE = 0.02
# Of what the protection took away; from here on it counts as broken.
BROKEN_SHARE = 0.5
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def verdict(accuracies: Mapping[str, Sequence[float]], titles: Mapping[str, str], *, smoke: bool = False) -> dict:
    """
    Judge a protection by what victims learn from protected images, and from the same after an attack.

    Args:
        accuracies (`dict`): Test accuracies of the victims in [0, 1], one per seed, by row: `"protected"`; `"clean"`
            where the originals are known; every other row is an attack on the protection.
        titles (`dict`): What the attacks are called.
        smoke (`bool`): Whether the victims were trained for seconds only, so that nothing can be said.

    Returns:
        `dict`: `status`; `sentence`; `attack`, the row of the strongest attack; `regained_share`, of the accuracy that
        the protection took away (None where that is unknown or nothing). The status is one of

        - `"broken"`: at least half of what the protection took away is regained;
        - `"weakened"`: a part of it is regained;
        - `"undone"`: accuracy rises clearly, and without clean images nobody knows by what share;
        - `"withstands"`: nothing that was tried helps;
        - `"ineffective"`: there is no protection to begin with;
        - `"exchanged"`: victims learn clearly more from the protected images than from the clean ones, which no
          protection brings about; the sets were most likely given for each other;
        - `"open"`: nothing helps, and without clean images that may mean anything;
        - `"smoke"`.
    """
    attacks = {row: values for row, values in accuracies.items() if row not in ("protected", "clean")}
    if "protected" not in accuracies or not attacks:
        raise ValueError(f"accuracies has the rows {tuple(accuracies)}, but 'protected' and an attack are needed.")
    attack = max(attacks, key=lambda row: statistics.fmean(attacks[row]))
    protected, attacked, clean = accuracies["protected"], attacks[attack], accuracies.get("clean")
    gained = statistics.fmean(attacked) - statistics.fmean(protected)
    helps = gained > least_difference(protected, attacked)
    lost = None if clean is None else statistics.fmean(clean) - statistics.fmean(protected)
    share = gained / lost if lost is not None and lost > least_difference(protected, clean) else None

    name = titles.get(attack, attack)
    figures = f"{_percent(protected)} -> {_percent(attacked)} by {name}"
    if clean is not None:
        figures += f", clean {_percent(clean)}"
    figures += f", {_seeds(protected)}"
    if smoke:
        status, sentence = "smoke", f"A first try in seconds, from which nothing follows ({figures})."
    elif lost is not None and lost < -least_difference(protected, clean):
        status = "exchanged"
        sentence = (
            f"No verdict: the protected and the clean images seem to be exchanged, for victims get "
            f"{_percent(protected)} from those given as protected and {_percent(clean)} from those given as clean, "
            f"{_seeds(protected)}."
        )
    elif lost is not None and share is None:
        status = "ineffective"
        sentence = (
            f"There is no protection to remove: victims get {_percent(protected)} from the protected images and "
            f"{_percent(clean)} from the clean ones, {_seeds(protected)}."
        )
    elif helps and lost is None:
        status = "undone"
        sentence = (
            f"The protection does not hold: {figures}; how much of it is left cannot be known without clean images."
        )
    elif helps and share >= BROKEN_SHARE:
        status, sentence = "broken", f"The protection does not survive: {figures}."
    elif helps:
        status = "weakened"
        sentence = f"The protection survives in part: {figures}, which wins back {100 * share:.0f} % of what it took."
    elif lost is not None:
        status = "withstands"
        sentence = f"The protection survives what was tried: {figures}; a stronger attack may still break it."
    else:
        status = "open"
        sentence = (
            f"No verdict: {figures}; without clean images, a protection that survives cannot be told from images that "
            "teach little."
        )
    return {
        "status": status,
        "sentence": sentence,
        "attack": attack,
        "regained_share": None if share is None else round(share, 4),
    }


def least_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """
    How far two means must lie apart to be told apart: twice the standard error of their difference, at least
    `LEAST_DIFFERENCE`; where a set has a single figure, and so no spread, more than twice that much.
    """
    if len(one) < 2 or len(other) < 2:
        return 0.05
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    return max(LEAST_DIFFERENCE, 2 * error)


def limits(
    status: str,
    *,
    victim: str,
    seeds: int,
    test_images: int,
    clean_known: bool,
    roles: str,
    listed: int | None,
    training: Mapping | None,
    attacks: Sequence[str],
) -> list[str]:
    """
    What the figures of an audit do not say, in sentences.

    Args:
        status (`str`): Of the verdict.
        victim (`str`): The network that was trained.
        seeds (`int`): Victims per row.
        test_images (`int`): How many scored them.
        clean_known (`bool`): Whether the originals of the protected images were given.
        roles (`str`): `"disjoint"` or `"paper"`.
        listed (`int`, *optional*): How many images trained the purifier, where that is known.
        training (`dict`, *optional*): The record of the purifier's training, if it was trained for the audit.
        attacks (`Sequence[str]`): What was tried beside purification.
    """
    error = 100 * 1.96 * math.sqrt(0.25 / test_images)
    found = [
        f"Victims were of one kind ({victim}), trained by one recipe. Another network or a longer training may learn "
        "more, from the protected images as well.",
        "An attack that fails proves nothing about a stronger one; an attack that succeeds settles the matter.",
        f"{test_images} test images: a figure is uncertain by up to {error:.1f} points (95 %) for that reason alone, "
        "beside the spread over seeds.",
    ]
    if seeds < 3:
        found.append(f"{seeds} victim(s) per row: too few to know the spread; three or more are usual.")
    if not clean_known:
        found.append(
            "No clean originals were given: what the protection took away, and so what share of it came back, is not "
            "known; neither is the size of the noise, nor whether originals of images whose protection changes much "
            "more than the budget are among the collected or test images."
        )
    if roles == "paper":
        found.append(
            "Roles as in the paper: the purifier has been trained on the very test images that score the victims. "
            "Such figures are for comparison with the paper and not with those of disjoint roles."
        )
    if listed is None:
        found.append(
            "The purifier's repository does not list the images that trained it (trained_on.json): whether it has "
            "seen originals of protected images or test images is not known."
        )
    elif training is None and not clean_known:
        found.append(
            f"The purifier was trained on none of the test images, by the list of {listed} images in its repository; "
            "whether originals of protected images are among them is not known without these originals."
        )
    if training is not None:
        found.append(
            f"The purifier was trained here, on {listed} images in {training['steps']} steps and "
            f"{training['seconds']:.0f} s; a larger one, trained longer on more images, purifies better."
        )
    if "eclipse" in attacks:
        found.append(
            "The row eclipse purifies with the purifier of this audit, where its authors train one of few images."
        )
    if attacks and status != "exchanged":
        found.append(
            f"The verdict speaks of the strongest of {len(attacks) + 1} attacks, chosen by the same test images; with "
            "close figures that flatters it by a little."
        )
    if status == "smoke":
        found.insert(0, "This is a smoke run: purifier and victims were hardly trained, and no figure means anything.")
    return found


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.0f} %"


def _seeds(values: Sequence[float]) -> str:
    count = len(values)
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} seed{'s' * (count != 1)}"
