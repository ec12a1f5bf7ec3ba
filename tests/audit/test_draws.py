"""The spread between draws and that between victims, told apart."""

import numpy as np
import pytest
from scipy import stats

from jcdp_diffusers.audit.draws import separate_spreads, trials_of_draws
from jcdp_diffusers.audit.intervals import Sample, interval
from jcdp_diffusers.audit.verdict import verdict
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.trials import Trial
from jcdp_diffusers.victims import RECIPES


def test_numbers_by_hand():
    """Means 0.6, 0.7, 0.8 with variance 0.01; each draw's variance 0.0002; so 0.01 - 0.0002 / 2 between draws."""
    found = separate_spreads([[0.59, 0.61], [0.69, 0.71], [0.79, 0.81]])
    assert found["means"] == pytest.approx([0.6, 0.7, 0.8]) and found["mean"] == pytest.approx(0.7)
    assert found["between_victims"] ** 2 == pytest.approx(0.0002)
    assert found["between_draws"] ** 2 == pytest.approx(0.0099)
    assert found["together"] == pytest.approx(0.1) and found["standard_error"] == pytest.approx(0.1 / np.sqrt(3))


def test_the_test_is_scipys_analysis_of_variance():
    draws = np.random.default_rng(0).normal(0.7, 0.02, (4, 3)).tolist()
    assert separate_spreads(draws)["p_value"] == pytest.approx(stats.f_oneway(*draws).pvalue)


def test_the_two_spreads_are_found_on_average():
    draw = np.random.default_rng(1)
    between_draws, between_victims, found = 0.03, 0.01, []
    for _ in range(2000):
        values = 0.7 + draw.normal(0, between_draws, (5, 1)) + draw.normal(0, between_victims, (5, 3))
        found.append(separate_spreads(values.tolist()))
    assert np.mean([one["between_draws"] ** 2 for one in found]) == pytest.approx(between_draws**2, rel=0.05)
    assert np.mean([one["between_victims"] ** 2 for one in found]) == pytest.approx(between_victims**2, rel=0.05)
    # The interval of the mean over draws holds what it promises, where that of all victims as independent does not.
    samples = {
        "draws": [Sample(one["mean"], one["together"], 5, 10**9) for one in found],
        "victims": [Sample(one["mean"], float(np.hypot(0.03, 0.01)), 15, 10**9) for one in found],
    }
    missed = {}
    for name, rows in samples.items():
        ends = [interval([(1, row)]) for row in rows]
        missed[name] = np.mean([not one.low <= 0.7 <= one.high for one in ends])
    assert 0.035 < missed["draws"] < 0.065 and missed["victims"] > 0.15


def test_draws_that_do_not_differ():
    same = separate_spreads([[0.6, 0.7], [0.6, 0.7]])
    assert same["between_draws"] == 0 and same["between_victims"] ** 2 == pytest.approx(0.005)
    assert same["p_value"] == 1
    assert separate_spreads([[0.6, 0.6], [0.6, 0.6]])["p_value"] == 1
    assert separate_spreads([[0.6, 0.6], [0.7, 0.7]])["p_value"] == 0


def test_one_victim_per_draw_tells_nothing_apart():
    found = separate_spreads([[0.6], [0.7], [0.8]])
    assert found["together"] == pytest.approx(0.1)
    assert found["between_draws"] is found["between_victims"] is found["p_value"] is None


@pytest.mark.parametrize("draws", [[[0.6, 0.7]], [[0.6, 0.7], [0.5]]])
def test_what_cannot_be_told_apart_is_refused(draws):
    with pytest.raises(ValueError, match="draws has .* victims.* two"):
        separate_spreads(draws)


def test_a_verdict_counts_draws_and_not_victims():
    """Nine victims look certain; three draws that scatter are not."""
    draws = [[0.35, 0.36, 0.34], [0.62, 0.61, 0.63], [0.85, 0.84, 0.86]]
    rows = {"clean": [0.9, 0.9, 0.91], "protected": [0.2, 0.21, 0.2], "purified": sum(draws, [])}
    options = {"titles": {"purified": "purification"}, "test_images": 10_000}
    certain, honest = (verdict(rows, draws=several, **options) for several in (None, {"purified": draws}))
    ends = [one["differences"]["gained"] for one in (certain, honest)]
    assert ends[0]["estimate"] == ends[1]["estimate"]
    wanted = interval([(1, Sample.of([0.35, 0.62, 0.85], 10_000)), (-1, Sample.of(rows["protected"], 10_000))])
    assert (ends[1]["low"], ends[1]["high"]) == pytest.approx((wanted.low, wanted.high), abs=1e-4)
    assert ends[0]["low"] > ends[1]["low"]
    assert certain["status"] == "weakened"
    assert honest["status"] == "undecided" and "as many draws" in honest["sentence"]


def test_every_victim_of_every_draw_has_a_seed_of_its_own():
    images = LabelledImages(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, tuple("abcd"))
    others = [images.with_images(images.images + 1), images.with_images(images.images + 2)]
    recipe = RECIPES["smoke"]
    first = [Trial(images, images, recipe, seed, about={"row": "purified"}) for seed in (3, 4, 7)]
    more = trials_of_draws(first, others)
    assert [[trial.seed for trial in trials] for trials in more] == [[1003, 1004, 1007], [2003, 2004, 2007]]
    assert [trials[0].about["row"] for trials in more] == ["purified, draw 2", "purified, draw 3"]
    assert all(trial.train is other for trials, other in zip(more, others) for trial in trials)
    far = [Trial(images, images, recipe, seed, about={"row": "purified"}) for seed in (0, 1000)]
    assert [[trial.seed for trial in trials] for trials in trials_of_draws(far, others)] == [
        [2000, 3000],
        [4000, 5000],
    ]
    assert len({trial.name for trials in (first, *more) for trial in trials}) == 9
