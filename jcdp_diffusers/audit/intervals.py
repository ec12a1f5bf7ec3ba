"""
How far the figures of a few victims and a few test images can be trusted.

An accuracy is uncertain for two reasons: another seed gives another victim, and other test images give another figure
for the same victim. A difference of accuracies gets one interval for each reason:

- seeds: Welch's interval, with Student's t and Satterthwaite's degrees of freedom (Welch, *Biometrika* 34, 1947). It
  is right for few seeds, whose spread is itself uncertain, and for rows that scatter differently. A single victim
  shows no spread; one may be assumed for it, which counts as known.
- test images: the normal interval with one success and one failure added to each proportion (Agresti and Caffo, *The
  American Statistician* 54, 2000). It is right for few images and for proportions near 0 and 1.

Their half-widths are squared and added ("MOVER", Zou and Donner, *Statistics in Medicine* 27, 2008).

All rows are scored on the same test images, and that helps: an image that is hard for one row is mostly hard for the
other. How much it helps is not on record. So rows that are subtracted count as independent, and rows that are added
count as agreeing about every image: both make the interval wider, never too narrow.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special


@dataclass(frozen=True)
class Sample:
    """
    Accuracies of the victims of one row.

    Args:
        mean (`float`): Over seeds, in [0, 1].
        std (`float`, *optional*): Over seeds; for a single victim the one that is assumed, or None.
        seeds (`int`): Number of victims.
        test_images (`int`): That scored each of them.
    """

    mean: float
    std: float | None
    seeds: int
    test_images: int

    @classmethod
    def of(cls, values: Sequence[float], test_images: int, *, assumed_std: float | None = None) -> "Sample":
        """From one accuracy per seed; `assumed_std` is for a single one."""
        std = statistics.stdev(values) if len(values) > 1 else assumed_std
        return cls(statistics.fmean(values), std, len(values), test_images)

    @classmethod
    def of_draws(cls, draws: Sequence[Sequence[float]], test_images: int) -> "Sample":
        """
        From the accuracies of the victims of each draw of a purifier, as many of each: a draw counts as one seed does
        elsewhere, for its victims are no independent measurements of the purifier (see `draws`).
        """
        return cls.of([statistics.fmean(victims) for victims in draws], test_images)

    @property
    def image_error(self) -> float:
        """Standard error of the mean because of the choice of test images."""
        share = (self.mean * self.test_images + 1) / (self.test_images + 2)
        return math.sqrt(share * (1 - share) / (self.test_images + 2))


@dataclass(frozen=True)
class Interval:
    """
    An estimate and the limits of its interval.

    Args:
        estimate, low, high (`float`): `low` and `high` are infinite where a row's spread is not known.
    """

    estimate: float
    low: float
    high: float


def interval(terms: Sequence[tuple[float, Sample]], *, error: float = 0.05) -> Interval:
    """
    A weighted sum of mean accuracies and its two-sided interval.

    Args:
        terms (`Sequence[tuple[float, Sample]]`): Weights and rows, such as `[(1, clean), (-1, protected)]`.
        error (`float`): Probability that the interval misses the value, half of it on each side.
    """
    estimate = sum(weight * row.mean for weight, row in terms)
    if any(row.std is None for _, row in terms):
        return Interval(estimate, -math.inf, math.inf)
    half = math.hypot(_half_of_seeds(terms, error), _half_of_images(terms, error))
    least, most = sum(min(0, weight) for weight, _ in terms), sum(max(0, weight) for weight, _ in terms)
    return Interval(estimate, max(least, estimate - half), min(most, estimate + half))


def _half_of_seeds(terms: Sequence[tuple[float, Sample]], error: float) -> float:
    variances = [(weight * row.std) ** 2 / row.seeds for weight, row in terms]
    if sum(variances) == 0:
        return 0.0
    uncertain = sum(v**2 / (row.seeds - 1) for v, (_, row) in zip(variances, terms) if row.seeds > 1)
    if uncertain == 0:  # all spreads are assumed
        quantile = special.ndtri(1 - error / 2)
    else:
        quantile = special.stdtrit(sum(variances) ** 2 / uncertain, 1 - error / 2)
    return float(quantile) * math.sqrt(sum(variances))


def _half_of_images(terms: Sequence[tuple[float, Sample]], error: float) -> float:
    added = sum(weight * row.image_error for weight, row in terms if weight > 0)
    subtracted = sum(weight * row.image_error for weight, row in terms if weight < 0)
    return float(special.ndtri(1 - error / 2)) * math.hypot(added, subtracted)
