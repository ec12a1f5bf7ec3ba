"""Training and scoring of victims, on scikit-learn's digits and against torch's own schedulers and plain loops."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims.networks.resnet import resnet18
from jcdp_diffusers.victims.supervised import (
    RECIPES,
    Recipe,
    confusion_matrix,
    predict,
    random_crop_flip,
    train_model,
    train_victim,
)


QUICK = Recipe("quick", epochs=2, batch_size=32, learning_rate=0.05, schedule="one_cycle", width=4)


def digits(start, stop, enlarge=2, **changes) -> LabelledImages:
    """scikit-learn's digits `start` to `stop`, enlarged from 8x8 by repetition."""
    data = load_digits()
    images = (data.images[start:stop] * 15.9375).round().astype(np.uint8)[..., None]
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    ids = tuple(f"digits/{row}" for row in range(start, stop))
    whole = LabelledImages(images, data.target[start:stop], ids, class_names=None)
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def train():
    return digits(0, 100)


@pytest.fixture(scope="module")
def test():
    return digits(100, 200)


@pytest.fixture(scope="module")
def result(train, test):
    return train_victim(train, test, recipe=QUICK, seed=3)


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def as_tensors(data):
    return torch.from_numpy(data.images).permute(0, 3, 1, 2), torch.from_numpy(data.labels)


# ------------------------------------------------------------------------------------------------------------ learning


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


def test_peak_and_last_epoch_are_two_figures(train, test):
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


# --------------------------------------------------------------------------------------------------------- determinism


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


def test_train_model_equals_a_plain_loop(train):
    """Without augmentation and with the whole set as one batch, nothing is random; float images stay as they are."""
    images, labels = as_tensors(train)
    recipe = Recipe("plain", epochs=3, batch_size=100, crop_padding=0, flip=False, weight_decay=0.01, clip_norm=0.5)
    model = resnet18(10, in_channels=1, width=4)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * (0.5 + 0.5 * math.cos(math.pi * epoch / 3))
        loss = F.cross_entropy(reference(images / 255), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
        for parameter in reference.parameters():
            parameter.grad *= min(1, 0.5 / norm)
        optimizer.step()
    for stored in (images, images / 255):
        trained = train_model(copy.deepcopy(model), stored, labels, recipe=recipe)
        torch.testing.assert_close(weights(trained), weights(reference), rtol=1e-3, atol=1e-4)


def test_every_image_once_an_epoch(train):
    class Collector:
        def __init__(self):
            self.epochs = []

        def start_epoch(self, epoch, epochs):
            self.epochs.append([])

        def before_augmentation(self, images, generator):
            self.epochs[-1].append(images)
            return images

    images, labels = as_tensors(train)
    images = torch.arange(97, dtype=torch.uint8).view(97, 1, 1, 1).expand(97, 1, 8, 8).contiguous()
    collector = Collector()
    train_model(resnet18(10, in_channels=1, width=2), images, labels[:97], recipe=QUICK, hooks=[collector])
    first, second = ([batch[:, 0, 0, 0].tolist() for batch in epoch] for epoch in collector.epochs)
    assert [len(batch) for batch in first] == [32, 32, 32]  # a last batch of one cannot be normalised
    assert len(set(sum(first, []))) == len(set(sum(second, []))) == 96
    assert first != second


# ------------------------------------------------------------------------------------------------------------- recipes


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
    for name in set(RECIPES) - {"fast"}:
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


# -------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_windows_of_the_padded_image(dtype):
    images = torch.arange(1, 1 + 8 * 3 * 6 * 5).view(8, 3, 6, 5).to(dtype)
    cropped = random_crop_flip(images, torch.Generator().manual_seed(0), crop_padding=2, flip=False)
    padded = F.pad(images, (2, 2, 2, 2))
    assert cropped.shape == images.shape and cropped.dtype == dtype
    for image, canvas in zip(cropped, padded):
        windows = [canvas[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
        assert sum(torch.equal(image, window) for window in windows) == 1


def test_every_crop_position_is_equally_likely():
    images = torch.zeros(20_000, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 1] = 1
    cropped = random_crop_flip(images, torch.Generator().manual_seed(0), crop_padding=1, flip=False)
    share = cropped.float().mean(dim=(0, 1))  # the bright pixel is moved to each of the nine places
    assert share == pytest.approx(torch.full((3, 3), 1 / 9), abs=0.01)


def test_half_of_the_images_are_mirrored_each_on_its_own():
    images = torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2).expand(20_000, 1, 1, 2)
    flipped = random_crop_flip(images, torch.Generator().manual_seed(0), crop_padding=0)
    mirrored = flipped[:, 0, 0, 0] == 1
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.float().mean() - 0.5) < 0.015
    assert abs((mirrored[1:] == mirrored[:-1]).float().mean() - 0.5) < 0.015


def test_no_augmentation_is_the_identity():
    images = torch.rand(4, 3, 5, 5)
    assert random_crop_flip(images, torch.Generator(), crop_padding=0, flip=False) is images


def test_augmentation_passes_gradients():
    images = torch.rand(64, 1, 4, 4, requires_grad=True)
    random_crop_flip(images, torch.Generator().manual_seed(0), crop_padding=1).sum().backward()
    assert set(images.grad.unique().tolist()) == {0.0, 1.0}  # kept once, or cropped away


# --------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_are_called_in_order_with_what_they_were_promised(train):
    calls = []

    class Watcher:
        def __init__(self, name):
            self.name = name

        def start_epoch(self, epoch, epochs):
            calls.append((self.name, "epoch", epoch, epochs))

        def before_augmentation(self, images, generator):
            assert images.dtype == torch.uint8
            calls.append((self.name, "augmentation"))
            return images

        def before_forward(self, images, labels, generator):
            assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
            assert len(images) == len(labels) and isinstance(generator, torch.Generator)
            calls.append((self.name, "forward"))
            return images, labels

    class Loss:
        def loss(self, model, images, labels, generator):
            assert model.training
            calls.append(("loss",))
            return F.cross_entropy(model(images), labels)

    images, labels = as_tensors(train)
    recipe = dataclasses.replace(QUICK, epochs=1, max_steps_per_epoch=1)
    model = resnet18(10, in_channels=1, width=2)
    train_model(model, images, labels, recipe=recipe, hooks=[Watcher("a"), Loss(), Watcher("b")])
    assert calls == [
        ("a", "epoch", 0, 1),
        ("b", "epoch", 0, 1),
        ("a", "augmentation"),
        ("b", "augmentation"),
        ("a", "forward"),
        ("b", "forward"),
        ("loss",),
    ]


def test_a_hook_may_show_other_images_in_an_epoch(train):
    images, labels = as_tensors(train)
    other = 255 - images
    seen = []

    class Turns:
        def epoch_images(self, epoch, images):
            seen.append([])
            return other if epoch == 1 else images

        def before_augmentation(self, images, generator):
            seen[-1].append(images)
            return images

    recipe = dataclasses.replace(QUICK, epochs=3, max_steps_per_epoch=None)
    train_model(resnet18(10, in_channels=1, width=2), images, labels, recipe=recipe, hooks=[Turns()])
    assert len(seen) == 3
    for batches, shown in zip(seen, (images, other, images)):
        known = {image.numpy().tobytes() for image in shown}
        assert {image.numpy().tobytes() for image in torch.cat(batches)} <= known
    assert not {image.numpy().tobytes() for image in torch.cat(seen[1])} & {i.numpy().tobytes() for i in images}


def test_hooks_draw_from_their_own_generator(train, test, result):
    """A hook that draws but changes nothing gives the victim without hooks, and so does the loss written out."""

    class Idle:
        def before_forward(self, images, labels, generator):
            torch.rand(7, generator=generator)
            return images, F.one_hot(labels, 10).float()

        def loss(self, model, images, labels, generator):
            return -(labels * model(images).log_softmax(1)).sum(1).mean()

    idle = train_victim(train, test, recipe=QUICK, seed=3, hooks=[Idle()])
    torch.testing.assert_close(weights(idle.model), weights(result.model), rtol=1e-3, atol=1e-4)
    assert idle.settings["hooks"] == ["Idle"]


def test_mixup_of_the_documentation(train, test):
    class Mixup:
        def __init__(self, num_classes):
            self.num_classes = num_classes

        def before_forward(self, images, labels, generator):
            partner = torch.randperm(len(images), generator=generator, device=images.device)
            weight = torch.rand(1, generator=generator, device=images.device)
            labels = F.one_hot(labels, self.num_classes).float()
            return weight * images + (1 - weight) * images[partner], weight * labels + (1 - weight) * labels[partner]

    runs = [train_victim(train, test, recipe=QUICK, hooks=[Mixup(10)]) for _ in range(2)]
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    plain = train_victim(train, test, recipe=QUICK)
    assert runs[0].history[-1]["train_loss"] > plain.history[-1]["train_loss"]


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_equals_a_plain_loop(result, test, training):
    model = copy.deepcopy(result.model).train(training)
    images, labels = as_tensors(test)
    reference, confusion = [], np.zeros((10, 10), dtype=np.int64)
    for image, label in zip(images, labels.tolist()):
        logits = result.model(image[None] / 255)[0].detach()
        reference.append(logits)
        confusion[label, logits.argmax()] += 1
    before = weights(model)
    torch.testing.assert_close(predict(model, images, batch_size=33), torch.stack(reference), rtol=1e-4, atol=1e-5)
    assert np.array_equal(confusion_matrix(model, images, labels, 10), confusion)
    assert model.training == training and torch.equal(weights(model), before)


def test_bfloat16_scores_as_float32(result, test):
    images, labels = as_tensors(test)
    exact, rounded = predict(result.model, images), predict(result.model, images, bfloat16=True)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.1
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.95


# -------------------------------------------------------------------------------------------------------------- errors


def without(data, label):
    return data.subset(data.labels != label)


@pytest.mark.parametrize(
    "change_train, change_test, keywords, message",
    [
        (lambda d: dataclasses.replace(d, labels=None), lambda d: d, {}, "train has no labels"),
        (lambda d: d, lambda d: dataclasses.replace(d, labels=None), {}, "test has no labels"),
        (lambda d: d, lambda d: d, {"num_classes": 9}, "train has label 9, but num_classes 9 ends at 8"),
        (lambda d: without(d, 3), lambda d: d, {}, "test has images of class 3, but train has none"),
        (lambda d: d, lambda d: without(d, 9), {}, "train has images of class 9, but test has none"),
        (
            lambda d: d.subset(d.labels < 3),
            lambda d: d,
            {},
            "test has images of class 3, 4, 5, 6, 7 and 2 more, but train has none",
        ),
        (lambda d: d, lambda d: digits(100, 200, enlarge=1), {}, "shape 16x16x1 and test of 8x8x1, but both must"),
        (
            lambda d: dataclasses.replace(d, class_names=tuple("0123456789")),
            lambda d: dataclasses.replace(d, class_names=tuple("9876543210")),
            {},
            "names its classes 0, 1, 2, 3, 4 and 5 more and test 9, 8, 7, 6, 5 and 5 more",
        ),
        (lambda d: d, lambda d: d, {"recipe": "slow"}, "recipe 'slow' is unknown; accepted are bridgepure, iss, emn"),
        (lambda d: d, lambda d: d, {"victim": "lenet"}, "victim 'lenet' is unknown"),
        (lambda d: d, lambda d: d, {"hooks": [object()]}, "a hook has one or more of the methods start_epoch"),
    ],
)
def test_errors_in_one_sentence(train, test, change_train, change_test, keywords, message):
    with pytest.raises(ValueError, match=message):
        train_victim(change_train(train), change_test(test), **{"recipe": QUICK} | keywords)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": "linear"}, "schedule is 'linear', but accepted are steps, cosine, one_cycle"),
        ({"epochs": 0}, "epochs is 0, but a recipe needs at least 1"),
        ({"batch_size": 1}, "batch_size is 1, but batch normalisation needs at least 2 images"),
    ],
)
def test_recipes_that_cannot_be_followed(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **change)


def test_two_losses_are_one_too_many(train, test):
    class Adversarial:
        def loss(self, model, images, labels, generator):
            return model(images).sum()

    with pytest.raises(ValueError, match="Adversarial and Adversarial, but only one hook may replace the loss"):
        train_victim(train, test, recipe=QUICK, hooks=[Adversarial(), Adversarial()])


def test_a_loss_that_is_no_number(train, test):
    recipe = dataclasses.replace(QUICK, name="wild", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="became nan in epoch 1: recipe 'wild' with learning_rate 1e.30"):
        train_victim(train, test, recipe=recipe)


@pytest.mark.parametrize(
    "images, labels, message",
    [(1, 1, "images holds 1 images, but training needs at least 2"), (4, 3, "labels has 3 entries for 4 images")],
)
def test_train_model_counts(images, labels, message):
    model = resnet18(2, width=1)
    with pytest.raises(ValueError, match=message):
        train_model(model, torch.rand(images, 3, 8, 8), torch.zeros(labels, dtype=torch.int64), recipe=QUICK)
