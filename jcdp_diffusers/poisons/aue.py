"""
AUE: error-minimising noise under the augmentation of contrastive learning.

As EMN, a surrogate and the noise minimise the same cross-entropy in turns, but both see the perturbed images under
random resized crops, mirroring, colour jitter and grey. Such noise is meant to protect from supervised and from
contrastive learning alike. An epoch is a pass of the surrogate over all images and a pass of the noise.

Ours: kornia resamples a crop in one step, where the authors' version cuts it out and resizes it. Nothing of ours has
been compared with the authors' published noise.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "AUE, Wang et al., NeurIPS 2024, and its released program (EhanW/AUE-AAP)"
LEAST_LEARNING_RATE = 1e-6  # where the cosine ends


@dataclass(frozen=True)
class AUESettings:
    """
    Numbers of AUE.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255.
        step (`float`): Length of a step of the descent, in 1/255.
        steps (`int`): Steps of the descent on each image per epoch, each under an augmentation of its own.
        strength (`float`): Of the augmentation, in [0, 1]: 0.6 is published for CIFAR-10, 1.0 for CIFAR-100.
        epochs (`int`): See the file's text. At 50,000 images an epoch has the published 391 steps of the surrogate.
        batch_size (`int`): Images of a step.
        learning_rate, momentum, weight_decay (`float`): Of the surrogate's SGD; the learning rate falls by half a
            cosine to 1e-6, once per epoch.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the surrogate runs in mixed precision.
    """

    epsilon: float = 8.0
    step: float = 0.8
    steps: int = 5
    strength: float = 0.6
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False


PRESETS = {
    "published": AUESettings(),
    "cifar100": AUESettings(strength=1.0),
    "gpu": AUESettings(bfloat16=True),
    "cpu": AUESettings(step=1.6, steps=3, epochs=20, width=16, bfloat16=True),
    "smoke": AUESettings(step=4.0, steps=2, epochs=2, batch_size=32, width=4),
}


def budget(settings: AUESettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: AUESettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "aue", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    draw = torch.Generator().manual_seed(seed)
    augment = surrogate.Contrastive(images.shape[2:], settings.strength, draw)
    noise, order, done = torch.zeros_like(images), torch.empty(0, dtype=torch.int64), 0
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        draw.set_state(state["draw"])
        noise, order, done = state["noise"], state["order"], state["done"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.get_state()}
        kept.save(state | {"noise": noise, "order": order, "done": done})

    # Even passes are of the surrogate, odd ones of the noise; each goes over all images in an order of its own.
    batches = len(surrogate.batches(torch.arange(len(images)), settings.batch_size))
    total = 2 * settings.epochs * batches
    with tqdm(total=total, initial=done, unit="batch", desc="aue", disable=not progress) as bar:
        while done < total:
            passes, batch = divmod(done, batches)
            if batch == 0:
                order = torch.randperm(len(images), generator=draw)
            training = passes % 2 == 0
            fixed = None if training else surrogate.frozen(model)
            for rows in surrogate.batches(order, settings.batch_size)[batch:]:
                clean, targets = images[rows].to(device), labels[rows].to(device)
                if training:
                    optimizer.param_groups[0]["lr"] = cosine(settings.learning_rate, passes // 2, settings.epochs)
                    seen = augment(clean + noise[rows].to(device))
                    options = {"step": (seed, done), "bfloat16": settings.bfloat16}
                    surrogate.train_step(model, optimizer, seen, targets, **options)
                else:
                    noise[rows] = minimise(fixed, clean, targets, noise[rows].to(device), settings, augment)
                done += 1
                bar.update()
                if kept.due() or done == total:
                    save()
    return noise


def cosine(highest: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, counted from 0: half a cosine from the highest one to `LEAST_LEARNING_RATE`."""
    return LEAST_LEARNING_RATE + (highest - LEAST_LEARNING_RATE) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def minimise(model, images, labels, noise, settings: AUESettings, augment) -> torch.Tensor:
    """
    Lower the loss of each perturbed image under augmentation, from the noise that is there, within [0, 1].

    Returns:
        `torch.Tensor`: The noise `(B, C, H, W)`, on the CPU.
    """
    for _ in range(settings.steps):
        gradient, _ = surrogate.image_gradient(
            model, images + noise, labels, bfloat16=settings.bfloat16, augment=augment
        )
        noise = surrogate.sign_step(noise, gradient, settings.step / 255, settings.epsilon / 255)
        noise = (images + noise).clamp(0, 1) - images
    return noise.cpu()


POISONS = (Poison("aue", "AUE", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),)
