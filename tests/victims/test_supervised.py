"""Cross-entropy with hooks, against plain loops; crops and mirrored images."""

import copy
import dataclasses
import math

import pytest
import torch
from digits import QUICK, as_tensors, weights
from torch.nn import functional as F

from jcdp_diffusers.devices import seeded
from jcdp_diffusers.victims import Recipe, random_crop_flip, train_model, train_victim
from jcdp_diffusers.victims.networks import resnet18


def test_train_model_equals_a_plain_loop(train):
    """Without augmentation and with the whole set as one batch, nothing is random; float images stay as they are."""
    images, labels = as_tensors(train)
    recipe = Recipe("plain", epochs=3, batch_size=100, crop_padding=0, flip=False, weight_decay=0.01, clip_norm=0.5)
    with seeded(0):  # a smooth network, in which rounding stays small
        convolution, linear = torch.nn.Conv2d(1, 4, 5, stride=2), torch.nn.Linear(144, 10)
        model = torch.nn.Sequential(convolution, torch.nn.Tanh(), torch.nn.Flatten(), linear)
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
        torch.testing.assert_close(weights(trained), weights(reference), rtol=1e-4, atol=1e-5)


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


def test_two_losses_are_one_too_many(train, test):
    class Adversarial:
        def loss(self, model, images, labels, generator):
            return model(images).sum()

    with pytest.raises(ValueError, match="hooks holds Adversarial and Adversarial"):
        train_victim(train, test, recipe=QUICK, hooks=[Adversarial(), Adversarial()])


@pytest.mark.parametrize(
    "images, labels, message",
    [(1, 1, "images holds 1 images, but .* 2"), (4, 3, "labels has 3 entries, but .* 4 images")],
)
def test_train_model_counts(images, labels, message):
    model = resnet18(2, width=1)
    with pytest.raises(ValueError, match=message):
        train_model(model, torch.rand(images, 3, 8, 8), torch.zeros(labels, dtype=torch.int64), recipe=QUICK)
