"""The verdict of an audit: one sentence that its figures bear out, or that they are not enough and what would be."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from .intervals import Interval, Sample, interval


# A difference of accuracies below this is called none. "No protection" and "survives" are said only where the whole
# interval of a difference lies below it, which is a test of equivalence (Schuirmann, J. Pharmacokinet. Biopharm. 15,
# 1987).
MARGIN = 0.05
# Of what the protection took away; from here on it counts as broken.
BROKEN_FRACTION = 0.5
# Probability of a wrong statement; with several attacks it is shared among them (Bonferroni).
ERROR = 0.05
# Two victims show a spread. To say that there is nothing, three are needed.
LEAST_SEEDS, LEAST_SEEDS_FOR_NOTHING = 2, 3
# What is assumed of a single classifier: more than every standard deviation of three in our records (results/), where
# 10,000 images or more trained each. Classifiers of fewer images scatter more (12.7 points on OPS with 5,000), and
# nothing is assumed of them.
ASSUMED_STD, LEAST_IMAGES_FOR_IT = 0.05, 10_000
NO_ATTACKS = ("clean", "protected", "control", "early-stopping")  # the last one is chosen by the test images
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# How much more could be measured: victims per row, and test images in multiples of those at hand.
MORE_SEEDS = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
MORE_IMAGES = (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300)
MOST_IMAGES = 50_000


@dataclass(frozen=True)
class Finding:
    """
    What follows from the figures.

    Args:
        status (`str`): As `verdict` returns it, but for `"smoke"`.
        attack (`str`): Row of the attack that the status speaks of.
        open_question (`str`): What could not be told, if the status is `"undecided"`.
    """

    status: str
    attack: str
    open_question: str = ""


def assumed_std(training_images: int, method: str) -> float | None:
    """
    Standard deviation between victims that a verdict assumes where there is one victim per row.

    Args:
        training_images (`int`): That each victim learns from.
        method (`str`): How it learns. There are not enough records of the ways without labels.
    """
    return ASSUMED_STD if method == "supervised" and training_images >= LEAST_IMAGES_FOR_IT else None


def verdict(
    accuracies: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    *,
    test_images: int,
    single_victim_std: float | None = None,
    smoke: bool = False,
    assuming: Collection[str] = (),
    draws: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> dict:
    """
    Judge a protection by what victims learn from protected images, and from the same after an attack.

    Every statement rests on an interval of the difference of two rows, over seeds and test images: see `intervals`.
    It is wrong in at most one case of twenty (`ERROR`); of single victims, where they scatter no more than is assumed.

    Args:
        accuracies (`dict`): Test accuracies of the victims in [0, 1], one per seed, by row: `"protected"`; `"clean"`
            where the originals are known; `"control"` and `"early-stopping"`, which are not judged; every other row is
            an attack on the protection.
        titles (`dict`): What the attacks are called.
        test_images (`int`): How many images scored each victim.
        single_victim_std (`float`, *optional*): Standard deviation between victims, in [0, 1], that is assumed for a
            row with a single one; see `assumed_std`. By default nothing follows from such a row.
        smoke (`bool`): Whether the victims were trained for seconds only, so that nothing can be said.
        assuming (`Collection[str]`): Attacks that assume more than the others. The sentence speaks of one of them only
            where no other attack bears it out.
        draws (`dict`, *optional*): For rows whose images were purified several times, the accuracies of each draw's
            victims. The row's interval is then that of the mean over draws; see `intervals.Sample.of_draws`.

    Returns:
        `dict`: `status`; `sentence`; `attack`, the row that the sentence speaks of; `regained_share`, of the accuracy
        that the protection took away (None where that is unknown or nothing); `differences`, estimate, low and high of
        what the protection took (`lost`) and of what the attack won back (`gained`), with None for a limit that is not
        known; `assumed_std`, the spread that was assumed for a single victim, None where none was; `enough`, `seeds`
        and `test_images` that would decide, None where nothing is open or no number up to 50 seeds and 50,000 images
        would. The status is one of

        - `"broken"`: at least half of what the protection took away is regained;
        - `"weakened"`: a part of it is regained;
        - `"undone"`: accuracy rises clearly, and without clean images nobody knows by what share;
        - `"withstands"`: no attack wins back 5 points (`MARGIN`) on average, and none half of it in a single victim;
        - `"ineffective"`: the protection takes less than 5 points;
        - `"exchanged"`: victims learn clearly more from the protected images than from the clean ones, which no
          protection brings about; the sets were most likely given for each other;
        - `"open"`: nothing helps, and without clean images that may mean anything;
        - `"undecided"`: seeds and test images are too few to tell;
        - `"smoke"`.
    """
    if "protected" not in accuracies or not set(accuracies) - set(NO_ATTACKS):
        raise ValueError(f"accuracies has the rows {tuple(accuracies)}, but must have 'protected' and an attack.")
    draws = draws or {}
    rows = {
        row: Sample.of_draws(draws[row], test_images)
        if row in draws
        else Sample.of(values, test_images, assumed_std=single_victim_std)
        for row, values in accuracies.items()
    }
    largest = _largest(accuracies)
    found = Finding("smoke", _attacks(rows, assuming)[0]) if smoke else find(rows, largest=largest, assuming=assuming)
    enough = what_would_decide(rows, largest, assuming) if found.status == "undecided" else None
    lost = _lost(rows)
    gained = interval([(1, rows[found.attack]), (-1, rows["protected"])])
    share = None
    if lost is not None and found.status not in ("exchanged", "ineffective") and lost.estimate > 0:
        share = round(gained.estimate / lost.estimate, 4)
    return {
        "status": found.status,
        "sentence": _sentence(found, accuracies, titles, test_images, share, enough, draws, single_victim_std),
        "attack": found.attack,
        "regained_share": share,
        "differences": {"lost": _as_json(lost), "gained": _as_json(gained)},
        "assumed_std": single_victim_std if any(row.seeds == 1 for row in rows.values()) else None,
        "enough": enough,
    }


def without_clean_images(judged: Mapping, accuracies: Mapping[str, Sequence[float]]) -> dict:
    """
    What remains of a verdict where the test images are protected ones that were held out and purified.

    Victims of purified images are at an advantage there, whether or not there is a protection. So nothing follows.

    Args:
        judged (`Mapping`): From `verdict`.
        accuracies (`dict`): As for `verdict`.
    """
    seeds = _counted(len(accuracies["protected"]), "seed")
    sentence = (
        "No verdict, because no clean images were given. Of protected images that were held out and purified, victims "
        f"get {_percent(accuracies['protected'])} right if they learn from protected images and "
        f"{_percent(accuracies['purified'])} from purified ones, {seeds}. --clean or --test would tell more."
    )
    return dict(judged) | {"status": judged["status"] if judged["status"] == "smoke" else "open", "sentence": sentence}


def find(rows: Mapping[str, Sample], *, largest: Mapping[str, float], assuming: Collection[str] = ()) -> Finding:
    """
    What the figures say.

    Args:
        rows (`dict`): By name, as in `verdict`.
        largest (`dict`): The best victim of each attack, for no protection survives that one victim got around.
        assuming (`Collection[str]`): As in `verdict`.
    """
    attacks = _attacks(rows, assuming)
    return _without_clean(rows, attacks) if "clean" not in rows else _with_clean(rows, attacks, largest)


def _with_clean(rows: Mapping[str, Sample], attacks: Sequence[str], largest: Mapping[str, float]) -> Finding:
    strongest, each = attacks[0], ERROR / len(attacks)
    enough_seeds = min(row.seeds for row in rows.values()) >= LEAST_SEEDS_FOR_NOTHING
    lost = _lost(rows)
    if lost.high < -MARGIN:
        return Finding("exchanged", strongest)
    if lost.high < MARGIN and enough_seeds:
        return Finding("ineffective", strongest)
    if lost.low <= 0:
        return Finding("undecided", strongest, "whether there is a protection to remove")
    for attack in attacks:
        if _above_half(rows, attack, each).low > 0:
            return Finding("broken", attack)
    gained = {attack: interval([(1, rows[attack]), (-1, rows["protected"])]) for attack in attacks}
    half = rows["protected"].mean + BROKEN_FRACTION * lost.estimate
    if enough_seeds and all(
        gained[attack].high < MARGIN and _above_half(rows, attack, ERROR).high < 0 and largest[attack] < half
        for attack in attacks
    ):
        return Finding("withstands", strongest)
    for attack in attacks:
        if interval([(1, rows[attack]), (-1, rows["protected"])], error=each).low > 0:
            return Finding("weakened", attack)
    return Finding("undecided", strongest, "whether the protection survives")


def _without_clean(rows: Mapping[str, Sample], attacks: Sequence[str]) -> Finding:
    for attack in attacks:
        if interval([(1, rows[attack]), (-1, rows["protected"])], error=ERROR / len(attacks)).low > MARGIN:
            return Finding("undone", attack)
    gained = [interval([(1, rows[attack]), (-1, rows["protected"])]) for attack in attacks]
    if all(one.high < MARGIN for one in gained):
        return Finding("open", attacks[0])
    return Finding("undecided", attacks[0], "whether the protection holds")


def what_would_decide(
    rows: Mapping[str, Sample], largest: Mapping[str, float], assuming: Collection[str] = ()
) -> dict | None:
    """
    Numbers of seeds and test images that would decide, if means and spreads stayed as they are.

    Args:
        rows, largest, assuming: As for `find`.

    Returns:
        `dict`: `seeds`, victims per row, and `test_images`, the pair with the smallest product; None if a row has a
        single victim, whose spread was not measured, or if no pair is enough.
    """
    if any(row.seeds < LEAST_SEEDS for row in rows.values()):
        return None
    seeds, images = max(row.seeds for row in rows.values()), rows["protected"].test_images
    numbers = [(seeds, *(more for more in MORE_SEEDS if more > seeds))]
    numbers.append([_rounded(images * more) for more in MORE_IMAGES if images * more <= max(images, MOST_IMAGES)])
    for product, more, other in sorted((one * two, one, two) for one in numbers[0] for two in numbers[1]):
        planned = {name: replace(row, seeds=more, test_images=other) for name, row in rows.items()}
        if find(planned, largest=largest, assuming=assuming).status != "undecided":
            return {"seeds": more, "test_images": other}
    return None


def _rounded(count: int) -> int:
    """Numbers above a hundred to two digits, upwards."""
    step = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step if count >= 100 else count


def _attacks(rows: Mapping[str, Sample], assuming: Collection[str]) -> list[str]:
    """Rows that are attacks, the strongest first, those that assume more behind all others."""
    found = (row for row in rows if row not in NO_ATTACKS)
    return sorted(found, key=lambda row: (row in assuming, -rows[row].mean))


def _largest(accuracies: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {row: max(values) for row, values in accuracies.items()}


def _lost(rows: Mapping[str, Sample]) -> Interval | None:
    """What the protection takes away; None where the clean images are not known."""
    return interval([(1, rows["clean"]), (-1, rows["protected"])], error=ERROR) if "clean" in rows else None


def _above_half(rows: Mapping[str, Sample], attack: str, error: float) -> Interval:
    """How far an attack gets beyond half of what the protection took away."""
    protected, clean = rows["protected"], rows["clean"]
    terms = [(1, rows[attack]), (BROKEN_FRACTION - 1, protected), (-BROKEN_FRACTION, clean)]
    return interval(terms, error=error)


def _as_json(one: Interval | None) -> dict | None:
    if one is None:
        return None
    known = math.isfinite(one.low)
    return {
        "estimate": round(one.estimate, 4),
        "low": round(one.low, 4) if known else None,
        "high": round(one.high, 4) if known else None,
    }


# ----------------------------------------------------------------------------------------------------------- sentences


def _sentence(
    found: Finding,
    accuracies: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    test_images: int,
    share: float | None,
    enough: dict | None,
    draws: Mapping[str, Sequence[Sequence[float]]],
    single_victim_std: float | None,
) -> str:
    protected, attacked, clean = (accuracies.get(row) for row in ("protected", found.attack, "clean"))
    seeds, images = _counted(len(protected), "seed"), _counted(test_images, "test image")
    if len(protected) == 1 and single_victim_std is not None:
        seeds += f" (a spread of {100 * single_victim_std:.0f} points between victims is assumed)"
    figures = f"{_percent(protected)} -> {_percent(attacked)} by {titles.get(found.attack, found.attack)}"
    both = ""
    if clean is not None:
        figures += f", clean {_percent(clean)}"
        both = f"{_percent(protected)} from the protected images and {_percent(clean)} from the clean ones, {seeds}"
    figures += f", {seeds}"
    points = f"{100 * MARGIN:.0f} points"
    strongest = "Purification" if found.attack == "purified" else found.attack
    if found.status == "undecided":
        said = both if "there is" in found.open_question else figures
        return (
            f"Not enough to tell {found.open_question}: {said}, {images}. {_needed(accuracies, enough, bool(draws))}"
        )
    return {
        "smoke": f"A first try in seconds, from which nothing follows ({figures}).",
        "exchanged": f"No verdict: the protected and the clean images seem to be exchanged. Victims get {both}.",
        "ineffective": f"There is no protection to remove: victims get {both}; it takes less than {points}.",
        "undone": f"The protection does not hold: {figures}; how much of it is left cannot be known without clean "
        "images.",
        "broken": f"The protection does not survive: {figures}.",
        "weakened": f"The protection is weakened: {figures}. {strongest} wins back {100 * (share or 0):.0f} % of the "
        "lost accuracy.",
        "withstands": f"The protection survives what was tried: {figures}; no attack wins back {points}, but a "
        "stronger one may still break it.",
        "open": f"No verdict: {figures}; without clean images, a protection that survives cannot be told from images "
        "that teach little.",
    }[found.status]


def _needed(accuracies: Mapping[str, Sequence[float]], enough: dict | None, several_draws: bool) -> str:
    """What would be enough to tell."""
    if min(map(len, accuracies.values())) < LEAST_SEEDS:
        return f"A single victim shows no spread: at least {NUMBERS[LEAST_SEEDS_FOR_NOTHING]} seeds are needed."
    if enough is None:
        return "The figures scatter so much that even 50 seeds and 50,000 test images might not tell."
    return (
        f"If means and spreads stay as they are, {_counted(enough['seeds'], 'seed')}"
        f"{', as many draws' if several_draws else ''} and {_counted(enough['test_images'], 'test image')} are enough."
    )


def _counted(count: int, what: str) -> str:
    number = NUMBERS[count] if count < len(NUMBERS) and what == "seed" else f"{count:,}"
    return f"{number} {what}{'s' * (count != 1)}"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.0f} %"
