"""
AAP: adversarial examples as training data, under the augmentation of contrastive learning.

As TAP, a surrogate is trained on the clean images, and then every image is moved until the surrogate takes it for the
next class, (label + 1) mod classes. Surrogate and attack see images under random resized crops, mirroring, colour
jitter and grey of an adjustable strength. Such noise is meant to protect from supervised and from contrastive
learning alike. The attack starts from no noise and has no restarts.

Ours: kornia augments for the surrogate too, where the authors take torchvision there. Nothing of ours has been
compared with the authors' published noise.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "AAP, Wang et al., NeurIPS 2024, and its released program (EhanW/AUE-AAP)"
LEAST_LEARNING_RATE = 1e-6  # where the cosine ends


@dataclass(frozen=True)
class AAPSettings:
    """
    Numbers of AAP.

    Args:
        targeted (`bool`): Whether the attack aims at the next class, or away from the image's own.
        epsilon (`float`): Bound of every value of the perturbation, in 1/255.
        step (`float`): Length of a step of the attack, in 1/255; 2.5 bounds over all steps, published.
        steps (`int`): Steps of the attack.
        strength (`float`): Of both augmentations, in [0, 1]: 0.4 is published for CIFAR-10, 0.8 for CIFAR-100.
        epochs (`int`): Of the surrogate.
        warmup (`int`): Epochs, among them, in which the learning rate rises in equal steps.
        batch_size (`int`): Images of a training step, and attacked at a time.
        learning_rate, momentum, weight_decay (`float`): Of the surrogate's SGD; after the warm-up the learning rate
            falls by half a cosine to 1e-6, once per epoch.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the surrogate runs in mixed precision.
    """

    targeted: bool = True
    epsilon: float = 8.0
    step: float = 0.08
    steps: int = 250
    strength: float = 0.4
    epochs: int = 40
    warmup: int = 10
    batch_size: int = 128
    learning_rate: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False


_CPU = AAPSettings(step=2 / 3, steps=30, epochs=20, warmup=5, width=16, bfloat16=True)
PRESETS = {
    "published": AAPSettings(),
    "cifar100": AAPSettings(strength=0.8),
    "untargeted": AAPSettings(targeted=False),
    "gpu": AAPSettings(bfloat16=True),
    "cpu": _CPU,
    "cpu-untargeted": replace(_CPU, targeted=False),
    "smoke": AAPSettings(step=4.0, steps=3, epochs=2, warmup=1, learning_rate=0.05, batch_size=32, width=4),
}


def budget(settings: AAPSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: AAPSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "aap", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    delta, epoch, done = torch.zeros_like(images), 0, 0
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        delta, epoch, done = state["delta"], state["epoch"], state["done"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        kept.save(state | {"delta": delta, "epoch": epoch, "done": done})

    with tqdm(total=settings.epochs, initial=epoch, unit="epoch", desc="aap: surrogate", disable=not progress) as bar:
        while epoch < settings.epochs:
            train_epoch(model, optimizer, images, labels, settings, seed, epoch, device)
            epoch += 1
            bar.update()
            if kept.due() or epoch == settings.epochs:
                save()
    fixed = surrogate.frozen(model)
    batches = torch.arange(len(images)).split(settings.batch_size)
    with tqdm(total=len(batches), initial=done, unit="batch", desc="aap: attack", disable=not progress) as bar:
        for rows in batches[done:]:
            draw = _generator(seed, 1, done)
            delta[rows] = attack(fixed, images[rows].to(device), labels[rows].to(device), settings, draw)
            done += 1
            bar.update()
            if kept.due() or done == len(batches):
                save()
    return delta


def _generator(seed: int, stage: int, number: int) -> torch.Generator:
    """Of one epoch or batch of the attack: each has draws of its own, so nothing random has to be kept."""
    return torch.Generator().manual_seed(surrogate.seed_of(seed, stage, number))


def learning_rate(settings: AAPSettings, epoch: int) -> float:
    """Of an epoch, counted from 0."""
    if epoch < settings.warmup:
        return settings.learning_rate * (epoch + 1) / settings.warmup
    position = (epoch - settings.warmup) / (settings.epochs - settings.warmup)
    highest = settings.learning_rate
    return LEAST_LEARNING_RATE + (highest - LEAST_LEARNING_RATE) * (1 + math.cos(math.pi * position)) / 2


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: AAPSettings,
    seed: int,
    epoch: int,
    device: torch.device,
) -> None:
    """One epoch of the surrogate on augmented clean images, shuffled."""
    optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch)
    draw = _generator(seed, 0, epoch)
    augment = surrogate.Contrastive(images.shape[2:], settings.strength, draw)
    batches = surrogate.batches(torch.randperm(len(images), generator=draw), settings.batch_size)
    for number, rows in enumerate(batches):
        seen = augment(images[rows].to(device))
        options = {"step": (seed, epoch, number), "bfloat16": settings.bfloat16}
        surrogate.train_step(model, optimizer, seen, labels[rows].to(device), **options)


def attack(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: AAPSettings, draw: torch.Generator
) -> torch.Tensor:
    """
    Projected sign descent on the attack's loss, from no perturbation, each step under an augmentation of its own.

    Returns:
        `torch.Tensor`: The perturbation `(B, C, H, W)`, on the CPU.
    """
    augment = surrogate.Contrastive(images.shape[2:], settings.strength, draw)
    num_classes = model(images[:1].contiguous(memory_format=torch.channels_last)).shape[1]
    targets = (labels + 1) % num_classes if settings.targeted else labels
    sign = 1 if settings.targeted else -1
    delta = torch.zeros_like(images)
    for _ in range(settings.steps):
        gradient, _ = surrogate.image_gradient(
            model, images + delta, targets, bfloat16=settings.bfloat16, augment=augment
        )
        delta = surrogate.sign_step(delta, sign * gradient, settings.step / 255, settings.epsilon / 255)
        delta = (images + delta).clamp(0, 1) - images
    return delta.cpu()


POISONS = (Poison("aap", "AAP", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),)
