"""Victims, trained on scikit-learn's digits and scored."""

import dataclasses

import numpy as np
import pytest
import torch
from digits import QUICK, as_tensors, digits, weights

from jcdp_diffusers.victims import RECIPES, train_victim


def test_learns_a_small_set_by_heart_and_more():
    recipe = dataclasses.replace(RECIPES["digits"], epochs=10, bfloat16=False)
    result = train_victim(digits(0, 300), digits(1000, 1300), recipe=recipe, width=8)
    assert result.train_accuracy > 0.99
    assert result.accuracy > 0.85  # other writers than those of the training set


def test_result_describes_itself(result, train, test):
    accuracies = [entry["test_accuracy"] for entry in result.history]
    assert [entry["epoch"] for entry in result.history] == [1, 2]
    assert result.accuracy == accuracies[-1]
    assert result.best_accuracy == max(accuracies)
    assert result.confusion.sum() == len(test)
    assert result.confusion.sum(axis=1).tolist() == np.bincount(test.labels).tolist()
    assert result.accuracy == pytest.approx(np.trace(result.confusion) / len(test))
    assert result.per_class_accuracy == pytest.approx(np.diag(result.confusion) / np.bincount(test.labels))
    assert 0 < result.history[0]["seconds"] < result.history[1]["seconds"] < result.seconds
    assert not result.model.training
    assert result.settings["recipe"] == dataclasses.asdict(QUICK)
    assert (result.settings["width"], result.settings["train_images"], result.settings["smoke"]) == (4, 100, False)


def test_train_accuracy_is_without_augmentation(result, train):
    images, labels = as_tensors(train)
    with torch.no_grad():
        right = (result.model(images / 255).argmax(1) == labels).float().mean()
    assert result.train_accuracy == pytest.approx(right.item())


def test_best_and_last_epoch_are_two_figures(train, test):
    """With a learning rate that destroys what was learned, the last epoch is not the best."""

    class Spoiler:
        def start_epoch(self, epoch, epochs):
            self.last = epoch == epochs - 1

        def before_forward(self, images, labels, generator):
            return images, (labels + 1) % 10 if self.last else labels

    recipe = dataclasses.replace(RECIPES["digits"], epochs=5, schedule="cosine", bfloat16=False, width=8)
    result = train_victim(train, test, recipe=dataclasses.replace(recipe, batch_size=10), hooks=[Spoiler()])
    assert result.best_accuracy == max(entry["test_accuracy"] for entry in result.history)
    assert result.accuracy == result.history[-1]["test_accuracy"] < result.best_accuracy


def test_smoke_is_short_and_says_so(test):
    train = digits(0, 1500, enlarge=1)
    result = train_victim(train, digits(1500, 1797, enlarge=1), recipe="smoke")
    assert result.settings["smoke"] and result.settings["recipe"]["smoke"]
    assert result.settings["width"] == 8 and len(result.history) == 2


def test_sets_are_never_altered(train, test):
    before = train.images.copy(), test.images.copy()
    train_victim(train, test, recipe=QUICK)
    assert np.array_equal(before[0], train.images) and np.array_equal(before[1], test.images)


def test_a_named_class_without_images_has_no_accuracy(train, test):
    names = tuple("0123456789") + ("ten",)
    train, test = dataclasses.replace(train, class_names=names), dataclasses.replace(test, class_names=names)
    result = train_victim(train, test, recipe=QUICK)
    assert result.confusion.shape == (11, 11)
    assert np.isnan(result.per_class_accuracy).tolist() == [False] * 10 + [True]


def test_progress_sees_every_entry(train, test):
    seen = []
    result = train_victim(train, test, recipe=QUICK, progress=seen.append)
    assert tuple(seen) == result.history


def test_same_seed_same_bits_and_the_global_state_is_left_alone(train, test, result):
    torch.manual_seed(123)
    np.random.seed(123)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = train_victim(train, test, recipe=QUICK, seed=3)
    assert torch.equal(weights(again.model), weights(result.model))
    assert np.array_equal(again.confusion, result.confusion)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    other = train_victim(train, test, recipe=QUICK, seed=4)
    assert not torch.equal(weights(other.model), weights(result.model))


def test_dropout_is_seeded_too(train, test):
    def run():
        torch.rand(1)  # moves the global state, which must not matter
        return weights(train_victim(train, test, victim="mobilenet_v2", recipe=QUICK, seed=1).model)

    assert torch.equal(run(), run())


def without(data, label):
    return data.subset(data.labels != label)


@pytest.mark.parametrize(
    "change_train, change_test, keywords, message",
    [
        (lambda d: dataclasses.replace(d, labels=None), lambda d: d, {}, "train has no labels"),
        (lambda d: d, lambda d: dataclasses.replace(d, labels=None), {}, "test has no labels"),
        (lambda d: d, lambda d: d, {"num_classes": 9}, "train has label 9, .* num_classes 9"),
        (lambda d: without(d, 3), lambda d: d, {}, "test has images of class 3, .* train"),
        (lambda d: d, lambda d: without(d, 9), {}, "train has images of class 9, .* test"),
        (
            lambda d: d.subset(d.labels < 3),
            lambda d: d,
            {},
            "test has images of class 3, 4, 5, 6, 7 and 2 more, .* train",
        ),
        (lambda d: d, lambda d: digits(100, 200, enlarge=1), {}, "train has images of shape 16x16x1, .* test, 8x8x1"),
        (
            lambda d: dataclasses.replace(d, class_names=tuple("0123456789")),
            lambda d: dataclasses.replace(d, class_names=tuple("9876543210")),
            {},
            "train names its classes 0, 1, 2, 3, 4 and 5 more, .* test .* 9, 8, 7, 6, 5 and 5 more",
        ),
        (lambda d: d, lambda d: d, {"recipe": "slow"}, "recipe is 'slow', .* bridgepure, iss, emn"),
        (lambda d: d, lambda d: d, {"victim": "lenet"}, "victim is 'lenet', .* resnet18"),
        (lambda d: d, lambda d: d, {"method": "magic"}, "method is 'magic', .* supervised"),
        (lambda d: d, lambda d: d, {"hooks": [object()]}, "hooks holds a object, .* start_epoch, epoch_images"),
    ],
)
def test_errors_in_one_sentence(train, test, change_train, change_test, keywords, message):
    with pytest.raises(ValueError, match=message):
        train_victim(change_train(train), change_test(test), **{"recipe": QUICK} | keywords)


def test_a_loss_that_is_no_number(train, test):
    recipe = dataclasses.replace(QUICK, name="wild", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="became nan in epoch 1: recipe 'wild' with learning_rate 1e.30"):
        train_victim(train, test, recipe=recipe)
