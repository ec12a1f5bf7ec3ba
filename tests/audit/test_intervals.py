"""The intervals against scipy and statsmodels' formulas, written out, and against what they promise, by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from jcdp_diffusers.audit.intervals import Sample, interval


def test_seeds_alone_give_welchs_interval():
    one, other = [0.71, 0.75, 0.69, 0.73], [0.52, 0.61, 0.44]
    found = interval([(1, Sample.of(one, 10**12)), (-1, Sample.of(other, 10**12))])
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert found.estimate == pytest.approx(np.mean(one) - np.mean(other))


def test_test_images_alone_give_agresti_and_caffos_width():
    found = interval([(1, Sample(0.75, 0.0, 3, 16)), (-1, Sample(0.5, 0.0, 3, 16))])
    shares = ((12 + 1) / 18, (8 + 1) / 18)
    half = 1.959964 * math.sqrt(sum(share * (1 - share) / 18 for share in shares))
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-6)


def test_rows_that_are_added_count_as_agreeing():
    """The mean of two rows scored on the same images is as uncertain as one of them."""
    row = Sample(0.5, 0.0, 3, 98)
    half = 1.959964 * math.sqrt(0.25 / 100)
    found = interval([(0.5, row), (0.5, row)])
    assert found.high - found.estimate == pytest.approx(half, abs=1e-6)


def test_limits_are_accuracies_and_a_single_victim_has_none():
    wide = interval([(1, Sample(0.5, 0.4, 2, 16)), (-1, Sample(0.5, 0.4, 2, 16))])
    assert (wide.low, wide.high) == (-1, 1)
    unknown = interval([(1, Sample.of([0.9], 100)), (-1, Sample.of([0.1, 0.2], 100))])
    assert unknown.estimate == pytest.approx(0.75) and (unknown.low, unknown.high) == (-math.inf, math.inf)


def test_a_smaller_error_makes_it_wider():
    terms = [(1, Sample(0.6, 0.02, 3, 500)), (-1, Sample(0.3, 0.05, 3, 500))]
    assert interval(terms, error=0.01).low < interval(terms, error=0.05).low
