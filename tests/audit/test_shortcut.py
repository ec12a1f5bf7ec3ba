"""The linear model that looks for shortcuts, on sets made for it."""

import numpy as np
import pytest
from scipy.stats import binom

from jcdp_diffusers.audit.shortcut import PixelModel, effective_count, gap_of, shortcut_test, weights_by_class
from jcdp_diffusers.data import LabelledImages


def test_the_shortcut_test_tells_a_shortcut_from_a_lesson():
    draw = np.random.default_rng(0)
    labels = np.arange(300) % 3
    lesson = draw.normal(0, 30, (3, 8, 8, 3))  # what tells the classes apart, on test images as well
    marks = draw.choice([-12, 12], (3, 8, 8, 3))  # what a class-wise poison adds

    def draw_set(seed, *parts):
        noise = np.random.default_rng(seed).normal(0, 40, (300, 8, 8, 3))
        pixels = 128 + noise + sum(part[labels] for part in parts)
        return LabelledImages(pixels.clip(0, 255).astype(np.uint8), labels, tuple(f"{seed}-{i}" for i in range(300)))

    honest = shortcut_test(draw_set(1, lesson), draw_set(2, lesson))
    assert not honest["found"] and honest["protected"]["test"] > 0.9
    clean, poisoned, test = draw_set(3), draw_set(3, marks), draw_set(4)
    result = shortcut_test(poisoned, test, clean)
    assert result["found"] and result["protected"]["held_out"] > 0.9
    assert result["protected"]["test"] < 0.5 and result["clean"]["held_out"] < 0.5
    assert result == shortcut_test(poisoned, test, clean)
    assert not result["exchanged"] and shortcut_test(clean, test, poisoned)["exchanged"]


def test_copies_of_images_are_no_shortcut():
    images, labels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8), np.arange(400) % 3
    ids = tuple(map(str, range(800)))
    doubled = LabelledImages(np.concatenate([images[:200]] * 2), np.tile(labels[:200], 2), ids[:400])
    result = shortcut_test(doubled, LabelledImages(images[200:], labels[200:], ids[600:]))
    assert result["protected"]["fitted"] > 0.9 and not result["found"] and abs(result["gap"]) < 0.2


def test_a_set_in_which_one_class_prevails_has_no_shortcut():
    labels = np.where(np.arange(300) % 10 < 8, 0, 1 + np.arange(300) % 2)
    images = np.random.default_rng(0).integers(0, 256, (2, 300, 8, 8, 3), dtype=np.uint8)
    mostly_one = LabelledImages(images[0], labels, tuple(map(str, range(300))))
    balanced = LabelledImages(images[1], np.arange(300) % 3, tuple(map(str, range(300, 600))))
    result = shortcut_test(mostly_one, balanced, mostly_one)
    assert result["protected"]["held_out"] > 0.7
    assert not result["found"] and not result["exchanged"]
    assert shortcut_test(balanced, mostly_one)["found"] is False


def test_classes_count_as_often_as_elsewhere():
    weights = weights_by_class(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]))
    assert np.allclose(weights, [1 / 3, 1 / 3, 1 / 3, 3])
    assert effective_count(weights) == pytest.approx(16 / (9 + 3 / 9))
    assert (weights_by_class(np.array([2, 0, 2, 0]), np.array([0, 2])) == 1).all()


def test_many_classes_of_few_images_have_a_gap_that_is_a_number():
    """The last fifth may have no class in common with the test images."""
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 8, 8, 3), dtype=np.uint8)
    sets = [
        LabelledImages(one, np.arange(50) // 2, tuple(f"{name}-{row}" for row in range(50)))
        for name, one in zip("ab", images)
    ]
    for result in (shortcut_test(sets[0], sets[1].subset(range(start, start + 6))) for start in range(0, 44, 2)):
        assert np.isfinite(result["gap"]) and not result["found"]


@pytest.mark.parametrize(("held_out", "test"), [(3, 7), (6, 15), (10, 25), (50, 100)])
@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.9])
def test_honest_sets_of_any_size_are_rarely_called_shortcuts(accuracy, held_out, test):
    """Exactly, by the binomial distribution of both figures."""
    here, there = (binom.pmf(np.arange(count + 1), count, accuracy) for count in (held_out, test))
    found = [
        [gap_of({"held_out": right / held_out, "test": other / test}, held_out, test)[1] for other in range(test + 1)]
        for right in range(held_out + 1)
    ]
    assert here @ np.array(found) @ there < 0.016


def test_a_class_of_which_all_images_are_held_out():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    data = LabelledImages(pixels, (np.arange(20) == 19).astype(int), tuple(map(str, range(20))))
    model = PixelModel("linear").fit(data.subset(range(19)))
    assert model.is_right(data).tolist() == [True] * 19 + [False]
    assert model.probability_of_label(data).tolist() == [1.0] * 19 + [0.0]
