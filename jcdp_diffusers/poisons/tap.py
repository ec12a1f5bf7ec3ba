"""
TAP: adversarial examples as training data.

A surrogate is trained on the clean images; then every image is moved, within its budget, until that surrogate takes
it for the next class (targeted, (label + 1) mod classes, the stronger variant) or for anything but its own
(untargeted). What a victim then learns of a class are the features of another. Each step of the attack sees the
image under a fresh crop and mirroring; of several restarts, the one with the lowest mean loss over all images is
kept.

The authors' augmentation shifts by fractions of a pixel; ours is the crop and mirroring of the victims.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..victims import Recipe, train_model
from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "Fowl et al., Adversarial Examples Make Strong Poisons, NeurIPS 2021, and its released program"


@dataclass(frozen=True)
class TAPSettings:
    """
    Numbers of TAP.

    Args:
        targeted (`bool`): Whether the attack aims at the next class, or away from the image's own.
        epsilon (`float`): Bound of every value of the perturbation, in 1/255.
        step (`float`): Length of a step of the attack, in 1/255.
        steps (`int`): Steps of the attack.
        restarts (`int`): Random starts.
        crop_padding (`int`): Of the augmentation inside the attack, in pixels.
        batch_size (`int`): Images attacked at a time; changes nothing but the random draws.
        recipe (`Recipe`): How the surrogate is trained on the clean images.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the attack runs in mixed precision.
    """

    targeted: bool = True
    epsilon: float = 8.0
    step: float = 0.4
    steps: int = 250
    restarts: int = 8
    crop_padding: int = 4
    batch_size: int = 512
    recipe: Recipe = Recipe("tap", epochs=40, schedule="steps", milestones=(14, 24, 35), nesterov=True)
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False


_CPU = TAPSettings(
    step=1.0,
    steps=30,
    restarts=1,
    batch_size=128,
    recipe=Recipe("tap-cpu", epochs=15, schedule="one_cycle", bfloat16=True),
    width=16,
    bfloat16=True,
)
PRESETS = {
    "published": TAPSettings(),
    "gpu": TAPSettings(bfloat16=True),
    "untargeted": TAPSettings(targeted=False),
    "cpu": _CPU,
    "cpu-untargeted": replace(_CPU, targeted=False),
    "smoke": TAPSettings(
        step=4.0,
        steps=3,
        restarts=2,
        batch_size=32,
        crop_padding=1,
        recipe=Recipe("tap-smoke", epochs=1, batch_size=32, max_steps_per_epoch=2, smoke=True),
        width=4,
    ),
}


def budget(settings: TAPSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: TAPSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]; an interruption repeats the surrogate's training as a whole, but not the attack."""
    kept = Checkpoint(checkpoint_dir, "tap", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    batches = torch.arange(len(images)).split(settings.batch_size)
    current, best = torch.zeros_like(images), torch.zeros_like(images)
    done, loss, best_loss = 0, 0.0, float("inf")
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        current, best = state["current"], state["best"]
        done, loss, best_loss = state["done"], state["loss"], state["best_loss"]
    else:
        with tqdm(total=settings.recipe.epochs, unit="epoch", desc="tap: surrogate", disable=not progress) as bar:
            train_model(
                model,
                images,
                labels,
                recipe=settings.recipe,
                seed=seed,
                device=device,
                after_epoch=lambda entry: bar.update(),
            )

    def save() -> None:
        state = {"model": model.state_dict(), "current": current, "best": best}
        kept.save(state | {"done": done, "loss": loss, "best_loss": best_loss})

    if done == 0:
        save()
    fixed = surrogate.frozen(model)
    total = settings.restarts * len(batches)
    with tqdm(total=total, initial=done, unit="batch", desc="tap: attack", disable=not progress) as bar:
        while done < total:
            restart, batch = divmod(done, len(batches))
            rows = batches[batch]
            # Every batch has draws of its own, so nothing random has to be kept between two calls.
            draw = torch.Generator().manual_seed(surrogate.seed_of(seed, restart, batch))
            current[rows], losses = attack(fixed, images[rows].to(device), labels[rows].to(device), settings, draw)
            loss += float(losses.sum()) / len(images)
            done += 1
            bar.update()
            if batch == len(batches) - 1:
                if loss < best_loss:
                    best, best_loss = current.clone(), loss
                bar.set_postfix_str(f"mean loss {loss:.3f}")
                loss = 0.0
            if kept.due() or done == total:
                save()
    return best


def attack(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: TAPSettings, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Projected sign descent on the attack's loss from a random start.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The perturbation `(B, C, H, W)`, on the CPU, and the loss of each image in
        the last step.
    """
    epsilon = settings.epsilon / 255
    num_classes = model(images[:1].contiguous(memory_format=torch.channels_last)).shape[1]
    targets = (labels + 1) % num_classes if settings.targeted else labels
    augment = surrogate.CropFlip(images.shape[2:], settings.crop_padding, draw)
    delta = (epsilon * torch.randn(images.shape, generator=draw)).clamp(-epsilon, epsilon).to(images.device)
    for _ in range(settings.steps):
        gradient, losses = surrogate.image_gradient(
            model, images + delta, targets, bfloat16=settings.bfloat16, augment=augment
        )
        if not settings.targeted:
            gradient, losses = -gradient, -losses
        delta = surrogate.sign_step(delta, gradient, settings.step / 255, epsilon)
        delta = (images + delta).clamp(0, 1) - images
    return delta.cpu(), losses.cpu()


POISONS = (Poison("tap", "TAP", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),)
