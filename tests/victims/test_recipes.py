"""Recipes against torch's own schedulers and the numbers of the papers."""

import dataclasses
import math

import pytest
import torch
from digits import QUICK

from jcdp_diffusers.victims import RECIPES, Recipe, train_model


def rates(recipe, steps=3):
    """Learning rate at the start of each epoch, as reported by a training of `steps` steps an epoch."""
    seen = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    recipe = recipe.for_images(3)
    images = torch.rand(steps * recipe.batch_size, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(images)) % 2
    recipe = dataclasses.replace(recipe, crop_padding=0)
    train_model(model, images, labels, recipe=recipe, after_epoch=lambda entry: seen.append(entry["learning_rate"]))
    return seen


def test_bridgepure_schedule():
    assert rates(RECIPES["bridgepure"]) == pytest.approx([0.1] * 80 + [0.01] * 20 + [0.001] * 20)


def test_apbench_schedule():
    assert rates(RECIPES["apbench"]) == pytest.approx([0.1] * 100 + [0.05] * 100)


@pytest.mark.parametrize("name", ["iss", "emn"])
def test_cosine_schedule(name):
    closed_form = [0.05 * (1 + math.cos(math.pi * epoch / 60)) for epoch in range(60)]
    assert rates(RECIPES[name]) == pytest.approx(closed_form)


def test_a_warmup_never_falls():
    """Where the highest learning rate is below 0.01, as in smoke runs without labels."""
    found = rates(Recipe("low", 20, batch_size=4, learning_rate=0.005, schedule="warmup_cosine", warmup=0.25))
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(found[5]) == pytest.approx(
        0.0043, rel=0.01
    )


def test_warmup_cosine_schedule():
    recipe = Recipe("rising", 20, batch_size=4, learning_rate=0.5, schedule="warmup_cosine", warmup=0.1)
    steps = 3 * 20

    def cosine(step):
        return 0.0005 + (0.5 - 0.0005) * (1 + math.cos(math.pi * step / steps)) / 2

    expected = [0.01, 0.01 + (cosine(6) - 0.01) / 2, *(cosine(step) for step in range(6, steps, 3))]
    assert rates(recipe) == pytest.approx(expected)


def test_triangular_schedule():
    recipe = Recipe("triangular", 10, batch_size=4, learning_rate=0.5, schedule="triangular", warmup=0.2)
    rise = [0.1 + 0.4 * step / 6 for step in (0, 3)]
    fall = [0.5 + (0.035 - 0.5) * (step - 6) / 24 for step in range(6, 30, 3)]
    assert rates(recipe) == pytest.approx(rise + fall)


@pytest.mark.parametrize("name", ["fast", "mini", "digits"])
def test_one_cycle_schedule(name):
    recipe = RECIPES[name].for_images(3)
    total = 3 * recipe.epochs
    peak = 0.3 * total - 1  # the step at which the rise ends
    expected = []
    for step in range(0, total, 3):
        if step <= peak:
            low, high, share = recipe.learning_rate / 25, recipe.learning_rate, step / peak
        else:
            low, high = recipe.learning_rate, recipe.learning_rate / 25 / 1e4
            share = (step - peak) / (total - 1 - peak)
        expected.append(high + (low - high) * (1 + math.cos(math.pi * share)) / 2)
    assert rates(recipe) == pytest.approx(expected)


@pytest.mark.parametrize(
    "count, batch_size, learning_rate",
    [
        (60_000, 256, 0.2),
        (38_400, 256, 0.2),
        (38_399, 128, 0.1414),
        (10_000, 64, 0.1),
        (5_000, 32, 0.0707),
        (12, 32, 0.0707),
    ],
)
def test_fast_takes_smaller_batches_of_smaller_sets(count, batch_size, learning_rate):
    recipe = RECIPES["fast"].for_images(count)
    assert (recipe.batch_size, recipe.learning_rate, recipe.name) == (batch_size, learning_rate, "fast")
    assert recipe.epochs == RECIPES["fast"].epochs and recipe.for_images(60_000) == recipe


def test_a_batch_size_that_is_given_suits_every_set():
    for name in set(RECIPES) - {"fast", "airbench", "airbench-short"}:
        assert RECIPES[name].for_images(12) == RECIPES[name]
    assert dataclasses.replace(RECIPES["fast"], batch_size=256).for_images(12).learning_rate == 0.2


@pytest.mark.parametrize(
    "name, epochs, batch_size, weight_decay, clip_norm",
    [
        ("bridgepure", 120, 128, 5e-4, None),
        ("iss", 60, 128, 5e-4, None),
        ("emn", 60, 128, 5e-4, 5.0),
        ("apbench", 200, 256, 5e-4, None),
    ],
)
def test_published_recipes(name, epochs, batch_size, weight_decay, clip_norm):
    recipe = RECIPES[name]
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (epochs, batch_size, 0.1)
    assert (recipe.weight_decay, recipe.clip_norm) == (weight_decay, clip_norm)
    assert (recipe.momentum, recipe.nesterov, recipe.bfloat16, recipe.width) == (0.9, False, False, 64)
    assert (recipe.crop_padding, recipe.flip, recipe.smoke) == (4, True, False)


def test_digits_are_neither_shifted_nor_mirrored():
    assert (RECIPES["digits"].crop_padding, RECIPES["digits"].flip) == (0, False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": "linear"}, "schedule is 'linear', but .* steps, cosine, one_cycle"),
        ({"epochs": 0}, "epochs is 0, but .* 1"),
        ({"batch_size": 1}, "batch_size is 1, but .* 2"),
        ({"warmup": 2.0}, "warmup is 2.0, but must lie within 0 and 1"),
        ({"warmup": 1.0, "schedule": "one_cycle"}, "warmup is 1, but must be below 1 for schedule 'one_cycle'"),
        ({"momentum": -1.0}, "momentum is -1.0, but must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, but must be at least 0"),
        ({"crop_padding": -1}, "crop_padding is -1, but must be at least 0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0, but must be above 0"),
        ({"max_steps_per_epoch": 0}, "max_steps_per_epoch is 0, but must be at least 1"),
    ],
)
def test_recipes_that_cannot_be_followed(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **change)


def test_a_smoothing_that_cannot_be():
    with pytest.raises(ValueError, match="label_smoothing is 1.5, but must lie within 0 and 1"):
        dataclasses.replace(RECIPES["airbench"], label_smoothing=1.5)
