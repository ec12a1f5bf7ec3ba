"""
Several purifications of the same images: how much an accuracy depends on the draw, and how much on the victim.

A randomised purifier is a distribution over data sets, and one purification is one draw from it. Victims trained on
one draw show the spread between victims alone. With several draws, each with victims of its own, both spreads can be
told apart by the random-effects model of one factor (Searle, Casella and McCulloch, *Variance Components*, 1992, 3.6):

    accuracy of victim v on draw d = mean + a_d + e_dv,   Var(a) = between draws,   Var(e) = between victims

    between victims = mean over draws of the sample variance of their victims
    between draws   = sample variance of the draws' means - (between victims) / (victims per draw), at least 0

The mean over all victims has the standard error sqrt(sample variance of the draws' means / draws), with draws - 1
degrees of freedom: victims of one draw are no independent measurements of the purifier.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy import special

from ..data import LabelledImages
from ..trials import Trial, results_by_trial
from .purifier import AuditPurifier, purify


FOLDER = "draws"


def separate_spreads(draws: Sequence[Sequence[float]]) -> dict:
    """
    The spread between draws and that between victims; see the module's description.

    Args:
        draws (`Sequence[Sequence[float]]`): Accuracies of the victims of each draw, as many of each: two draws at
            least.

    Returns:
        `dict`: `means` of the draws; `mean` over all; `standard_error` of it; `between_draws` and `between_victims`,
        standard deviations, None where each draw has one victim, which cannot tell them apart; `together`, the
        standard deviation of the draws' means, which has a part of both; `p_value`, of the F test that draws do not
        matter, None with one victim per draw.

    Raises:
        ValueError: If there are fewer than two draws, or they have different numbers of victims.
    """
    counts = {len(victims) for victims in draws}
    if len(draws) < 2 or len(counts) != 1:
        raise ValueError(
            f"draws has {[len(victims) for victims in draws]} victims, but must have two draws at least with as many "
            "victims each."
        )
    victims = counts.pop()
    means = [statistics.fmean(values) for values in draws]
    of_means = statistics.variance(means)
    found = {
        "means": means,
        "mean": statistics.fmean(means),
        "standard_error": math.sqrt(of_means / len(draws)),
        "together": math.sqrt(of_means),
        "between_draws": None,
        "between_victims": None,
        "p_value": None,
    }
    if victims == 1:
        return found
    within = statistics.fmean(statistics.variance(values) for values in draws)
    freedom = len(draws) - 1, len(draws) * (victims - 1)
    if within > 0:
        p_value = float(special.fdtrc(*freedom, victims * of_means / within))
    else:  # victims of a draw agree to the last image
        p_value = 1.0 if of_means == 0 else 0.0
    return found | {
        "between_draws": math.sqrt(max(0.0, of_means - within / victims)),
        "between_victims": math.sqrt(within),
        "p_value": p_value,
    }


def draw_again(
    protected: LabelledImages, used: AuditPurifier, output_dir: Path, *, draws: int, seed: int
) -> list[LabelledImages]:
    """
    Purify the protected images again, with the seeds that follow the audit's.

    Args:
        protected (`LabelledImages`): The images.
        used (`AuditPurifier`): The purifier.
        output_dir (`Path`): The audit's folder; the images lie in `draws/2`, `draws/3`, ... of it.
        draws (`int`): In all, with the first, which the audit has made.
        seed (`int`): Of the first draw.

    Returns:
        `list[LabelledImages]`: The draws after the first.
    """
    return [purify(protected, used, output_dir / FOLDER / str(draw + 1), seed + draw) for draw in range(1, draws)]


def trials_of_draws(first: Sequence[Trial], more: Sequence[LabelledImages]) -> list[list[Trial]]:
    """
    The trials of the draws after the first: as many victims each, with seeds that no other draw has.

    Args:
        first (`Sequence[Trial]`): Those of the first draw.
        more (`Sequence[LabelledImages]`): The other draws.
    """
    seeds = [trial.seed for trial in first]
    apart = max(seeds) - min(seeds) + 1
    return [
        [
            dataclasses.replace(
                trial,
                train=images,
                seed=trial.seed + draw * apart,
                about={**trial.about, "row": f"{trial.about['row']}, draw {draw + 1}"},
            )
            for trial in first
        ]
        for draw, images in enumerate(more, start=1)
    ]


def figures_of_draws(first: Sequence[Trial], more: Sequence[Sequence[Trial]], records: Path) -> dict:
    """
    What a report says of the draws, from the records.

    Args:
        first (`Sequence[Trial]`): Trials of the first draw.
        more (`Sequence[Sequence[Trial]]`): Those of the others; empty where there was one draw.
        records (`Path`): The file that has their results.

    Returns:
        `dict`: `count`, of draws; `values`, the accuracies of each draw's victims; and what `separate_spreads` says,
        where there are several.
    """
    accuracy = results_by_trial(records, what="accuracy")
    values = [[accuracy[trial.name]["value"] for trial in trials] for trials in (first, *more)]
    found = {"count": len(values), "values": values}
    return found | separate_spreads(values) if more else found


def over_draws(entry: Mapping, found: Mapping) -> dict:
    """
    A row of the report whose images were drawn several times: its accuracy is that over all draws.

    Args:
        entry (`dict`): The row, with the figures of the first draw.
        found (`dict`): From `figures_of_draws`.

    Returns:
        `dict`: The row with `accuracy` over all victims of all draws. Its `std` stays one between victims of the same
        images, as in all other rows.
    """
    values = [value for victims in found["values"] for value in victims]
    accuracy = {"mean": found["mean"], "std": found["between_victims"], "values": values}
    return dict(entry) | {"accuracy": accuracy}
