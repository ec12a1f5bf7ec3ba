"""Which images a fraction protects."""

from types import SimpleNamespace

import numpy as np
import pytest

from jcdp_diffusers.audit.fractions import check_fractions, fractions_table, protected_part
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims import Recipe, get_recipe


def test_the_same_part_of_each_class_and_the_smaller_within_the_larger():
    labels = np.repeat([0, 1, 2], [50, 20, 5])
    parts = [protected_part(labels, 75, fraction, seed=3) for fraction in (0.2, 0.4, 0.6, 0.8, 1.0)]
    for fraction, part in zip((0.2, 0.4, 0.6, 0.8, 1.0), parts):
        assert [part[labels == label].sum() for label in range(3)] == [round(fraction * n) for n in (50, 20, 5)]
    for smaller, larger in zip(parts, parts[1:]):
        assert not (smaller & ~larger).any()
    assert not np.array_equal(parts[1], protected_part(labels, 75, 0.4, seed=4))
    assert protected_part(None, 10, 0.3, seed=0).sum() == 3
    assert protected_part(labels, 75, 0.001, seed=0).sum() == 3  # one of each class at least


@pytest.mark.parametrize(
    "fractions, learner, message",
    [
        ((0.2, 0.9), Recipe("short", 1), "fractions has 0.9, but must leave clean images of every class: 6 of 60"),
        ((0.5,), get_recipe("smoke", "moco-v2"), "fractions has 0.5, .* 64 clean images .* 'moco-v2': 30 of 60"),
    ],
)
def test_a_clean_rest_that_nobody_could_learn_from(fractions, learner, message):
    labels = np.repeat([0, 1], [56, 4])
    data = LabelledImages(np.zeros((60, 8, 8, 3), np.uint8), labels, tuple(map(str, range(60))))
    method = getattr(learner, "method", "supervised")
    with pytest.raises(ValueError, match=message):
        asked = SimpleNamespace(fractions=fractions, seed=0)
        check_fractions({"protected": data}, asked, [SimpleNamespace(method=method, recipe=learner)])


def test_the_table():
    def spread(mean, std=None):
        return {"mean": mean, "std": std, "values": [mean]}

    head, *rows = fractions_table(
        [
            {"fraction": 0.2, "all": spread(0.7, 0.01), "clean_rest": spread(0.68)},
            {"fraction": 1, "all": spread(0.2), "clean_rest": None},
        ]
    )
    assert rows == [
        ["20 %", "70.0 %", "1.0", "68.0 %", "-", "+2.0 points"],
        ["100 %", "20.0 %", "-", "-", "-", "-"],
    ]
    assert len(head) == len(rows[0])
