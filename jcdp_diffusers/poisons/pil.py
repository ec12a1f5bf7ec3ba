"""
PIL: noise that a linear model reads, found for every image by descent on that model.

Two linear layers without bias are trained on the clean pixels. Then each image x gets a noise d that the model
assigns to the image's class, while it finds nothing in x - d: d minimises

    weight * cross-entropy(f(d), label) + (1 - weight) * KL(uniform || softmax(f(x - d)))

by sign descent from a uniformly random start within its bound. The protected image is x - d. A network that can read
a linear shortcut learns it first, and then has nothing left to learn.

The numbers are those of the released program. Ours are the batches' own random starts, so that a run can continue
between two of them. Nothing of ours has been compared with the authors' published file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..devices import seeded
from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "PIL, perturbation-induced linearization, ICLR 2026, as in its released program (jinlinll/pil)"


@dataclass(frozen=True)
class PILSettings:
    """
    Numbers of PIL.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255.
        step (`float`): Length of a step of the descent, in 1/255.
        steps (`int`): Steps of the descent.
        weight (`float`): Of the cross-entropy, in [0, 1]; the divergence from the uniform distribution has the rest.
        epochs (`int`): Of the linear model.
        batch_size (`int`): Images of a training step, in the order given, and of a step of the descent.
        learning_rate, momentum (`float`): Of the linear model's SGD; the learning rate falls by half a cosine to 0,
            once per epoch.
    """

    epsilon: float = 8.0
    step: float = 0.8
    steps: int = 30
    weight: float = 0.9
    epochs: int = 30
    batch_size: int = 512
    learning_rate: float = 0.003
    momentum: float = 0.9


PRESETS = {
    "published": PILSettings(),
    "cpu": PILSettings(),
    "smoke": PILSettings(step=4.0, steps=3, epochs=2, batch_size=16),
}


def budget(settings: PILSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: PILSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "pil", settings, seed, images, labels)
    with seeded(seed):
        model = linear_model(images[0].numel(), int(labels.max()) + 1)
    model.to(device)
    noise = torch.zeros_like(images)
    batches = torch.arange(len(images)).split(settings.batch_size)
    done = 0
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        noise, done = state["noise"], state["done"]
    else:
        train(model, images, labels, settings, device)
        kept.save({"model": model.state_dict(), "noise": noise, "done": done})
    model.requires_grad_(False)

    with tqdm(total=len(batches), initial=done, unit="batch", desc="pil", disable=not progress) as bar:
        for rows in batches[done:]:
            draw = torch.Generator().manual_seed(surrogate.seed_of(seed, done))
            noise[rows] = attack(model, images[rows].to(device), labels[rows].to(device), settings, draw)
            done += 1
            bar.update()
            if kept.due() or done == len(batches):
                kept.save({"model": model.state_dict(), "noise": noise, "done": done})
    return -noise


def linear_model(values: int, num_classes: int) -> nn.Module:
    """Two linear layers without bias: from images with so many values to one logit per class, by way of as many."""
    first, second = nn.Linear(values, num_classes, bias=False), nn.Linear(num_classes, num_classes, bias=False)
    return nn.Sequential(nn.Flatten(), first, second)


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: PILSettings, device: torch.device
) -> None:
    """Fit the linear model to the clean images, without augmentation and without weight decay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for _ in range(settings.epochs):
        for rows in torch.arange(len(images)).split(settings.batch_size):
            loss = F.cross_entropy(model(images[rows].to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def attack(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: PILSettings, draw: torch.Generator
) -> torch.Tensor:
    """
    The noise d of each image; see the file's text.

    Returns:
        `torch.Tensor`: `(B, C, H, W)`, on the CPU, to be *subtracted* from the images.
    """
    epsilon = settings.epsilon / 255
    noise = (epsilon * (2 * torch.rand(images.shape, generator=draw) - 1)).to(images.device)
    for _ in range(settings.steps):
        noise.requires_grad_()
        read = F.cross_entropy(model(noise), labels, reduction="sum")
        # KL(uniform || p) up to a constant, which has no gradient.
        left = -F.log_softmax(model(images - noise), dim=1).mean(dim=1).sum()
        (gradient,) = torch.autograd.grad(settings.weight * read + (1 - settings.weight) * left, noise)
        noise = surrogate.sign_step(noise.detach(), gradient, settings.step / 255, epsilon)
    return noise.cpu()


POISONS = (Poison("pil", "PIL", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),)
