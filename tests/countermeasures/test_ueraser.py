"""UEraser: the highest of the losses, when it is taken, and augmentations that stay images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures.ueraser import UEraser, augmentation


class Shift(nn.Module):
    """Adds 0.1 at the first call, 0.2 at the second, ..."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images + 0.1 * self.calls


@pytest.fixture
def model(generator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def batch(generator):
    return torch.rand(6, 3, 4, 4, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def test_loss_is_the_mean_of_each_images_highest(model, batch, generator):
    images, labels = batch
    every = torch.stack([F.cross_entropy(model(images + 0.1 * k), labels, reduction="none") for k in (1, 2, 3, 4, 5)])
    hook = UEraser(max_share=1.0, augment=Shift())
    torch.testing.assert_close(hook.loss(model, images, labels, generator), every.amax(0).mean())
    soft = F.one_hot(labels, 5).float()
    hook = UEraser(max_share=1.0, augment=Shift())
    torch.testing.assert_close(hook.loss(model, images, soft, generator), every.amax(0).mean())


def test_lite_is_one_augmentation(model, batch, generator):
    images, labels = batch
    loss = UEraser(max_share=0.0, augment=Shift()).loss(model, images, labels, generator)
    torch.testing.assert_close(loss, F.cross_entropy(model(images + 0.1), labels))


@pytest.mark.parametrize(
    "name, draws", [("ueraser-lite", [1] * 8), ("ueraser", [5, 5] + [1] * 6), ("ueraser-max", [5] * 8)]
)
def test_when_the_highest_is_taken(name, draws, photos):
    (hook,) = countermeasures.get(name).prepare(photos).hooks
    seen = []
    for epoch in range(8):
        hook.start_epoch(epoch, 8)
        seen.append(hook.draws_now)
    assert seen == draws


def test_augmented_images_are_images(photos):
    images = photos.tensor()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [augmentation()(images) for _ in range(12)]
    for augmented in drawn:
        assert augmented.shape == images.shape and augmented.isfinite().all()
        assert augmented.min() >= -1e-5 and augmented.max() <= 1 + 1e-5
    assert sum((augmented - images).abs().mean() > 0.02 for augmented in drawn) > 8


def test_draws_differ_and_come_from_the_generator(photos):
    seen = []

    def look(images):
        seen.append(images)
        return images.flatten(1)[:, :4]

    for seed in (0, 0, 1):
        UEraser(1.0).loss(look, photos.tensor(), torch.from_numpy(photos.labels), torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    first, second = seen[0][:8], seen[0][8:16]
    assert seen[0].shape == (40, 3, 32, 32) and not torch.equal(first, second)


def test_mixed_precision_does_not_reach_the_augmentation(photos):
    """In bfloat16 a warp's grid would be off by pixels."""
    seen = []

    def look(images):
        seen.append(images)
        return images.flatten(1)[:, :4]

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            UEraser(1.0).loss(look, photos.tensor(), torch.from_numpy(photos.labels), torch.Generator().manual_seed(0))
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])
