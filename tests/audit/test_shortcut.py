"""The linear model that looks for shortcuts, on sets made for it."""

import numpy as np

from jcdp_diffusers.audit.shortcut import shortcut_test
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
