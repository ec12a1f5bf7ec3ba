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


def partly_protected(changed: np.ndarray) -> dict[str, LabelledImages]:
    clean = np.zeros((len(changed), 8, 8, 3), np.uint8)
    labels, ids = np.arange(len(changed)) % 2, tuple(map(str, range(len(changed))))
    images = clean + changed[:, None, None, None].astype(np.uint8)
    return {"protected": LabelledImages(images, labels, ids), "clean": LabelledImages(clean, labels, ids)}


def test_images_that_the_protection_changes_come_first():
    changed = np.isin(np.arange(40), (4, 5, 16, 17, 30, 31))  # three of each class
    labels = np.arange(40) % 2
    assert np.array_equal(protected_part(labels, 40, 0.15, 0, changed), changed)
    assert (protected_part(labels, 40, 0.1, 0, changed) & ~changed).sum() == 0
    everything = np.ones(40, bool)
    assert np.array_equal(protected_part(labels, 40, 0.4, 1, everything), protected_part(labels, 40, 0.4, 1))


def test_more_than_what_is_protected_is_refused():
    asked = SimpleNamespace(fractions=(0.15, 0.5), seed=0)
    learners = [SimpleNamespace(method="supervised", recipe=Recipe("short", 1))]
    changed = np.isin(np.arange(40), (4, 5, 16, 17, 30, 31))
    with pytest.raises(
        ValueError, match="fractions has 0.5, which is 20 of 40 images by class, .* changes 6 of these"
    ):
        check_fractions(partly_protected(changed), asked, learners)
    check_fractions(partly_protected(np.arange(40) != 7), asked, learners)  # one as it was by chance


@pytest.mark.parametrize(
    "fractions, learner, message",
    [
        ((0.2, 0.9), Recipe("short", 1), "fractions has 0.9, but must leave clean images of every class: 6 of 60"),
        ((0.5,), get_recipe("smoke", "moco-v2"), "fractions has 0.5, .* 64 clean images .* 'moco-v2': 30 of 60"),
    ],
)
def test_a_clean_rest_that_nobody_could_learn_from(fractions, learner, message):
    labels = np.repeat([0, 1], [56, 4])
    clean = LabelledImages(np.zeros((60, 8, 8, 3), np.uint8), labels, tuple(map(str, range(60))))
    sets = {"protected": clean.with_images(clean.images + 1), "clean": clean}
    method = getattr(learner, "method", "supervised")
    with pytest.raises(ValueError, match=message):
        asked = SimpleNamespace(fractions=fractions, seed=0)
        check_fractions(sets, asked, [SimpleNamespace(method=method, recipe=learner)])


def test_the_table():
    def spread(mean, std=None):
        return {"mean": mean, "std": std, "values": [mean]}

    head, *rows = fractions_table(
        [
            {
                "fraction": 0.2,
                "images": 12,
                "protected_images": 3,  # of three classes of four, one each
                "all": spread(0.7, 0.01),
                "clean_rest": spread(0.68),
            },
            {"fraction": 1, "images": 12, "protected_images": 12, "all": spread(0.2), "clean_rest": None},
        ]
    )
    assert rows == [
        ["20 % (3 of 12)", "70.0 %", "1.0", "68.0 %", "-", "+2.0 points"],
        ["100 % (12 of 12)", "20.0 %", "-", "-", "-", "-"],
    ]
    assert len(head) == len(rows[0])
