"""
REMN (also REM): error-minimising noise that holds against adversarial training.

The noise lowers the loss that is left after an adversary of a smaller radius has raised it, under random crops and
mirroring; the surrogate is trained on adversarial versions of the perturbed images meanwhile. At every step the
noise of the batch is found anew from a random start; in the end, that of every image is found once more with the
final surrogate.

* `remn`: the noise is made against the adversary's steepest shift.
* `sem` (stable error-minimising noise): the noise is made against a uniformly random shift within the adversary's
  radius, which costs a tenth. The surrogate is trained on adversarial versions all the same, as in the released
  program. Nothing of ours has been compared with its published noise.

The released program of REMN leaves out the last incomplete batch in the end, so that a few images keep noise of an
older surrogate. Ours does not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = (
    "Fu et al., Robust Unlearnable Examples: Protecting Data Against Adversarial Learning, ICLR 2022, and its program"
)
SEM_SOURCE = (
    "Liu et al., Stable Unlearnable Example, AAAI 2024, and its program liuyixin-louis/Stable-Unlearnable-Example"
)


@dataclass(frozen=True)
class REMNSettings:
    """
    Numbers of REMN.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255. Noise has whole levels, as in the released
            program: of 7.6 it reaches 7.
        step (`float`): Length of a step of the descent, in 1/255.
        steps (`int`): Steps of the descent, from a uniformly random start.
        samples (`int`): Augmentations over which the gradient of a step is summed.
        adversary_epsilon, adversary_step (`float`), adversary_steps (`int`): Bound, length of a step and number of
            steps of the adversary, which starts at random within its bound; the former two in 1/255.
        crop_padding (`int`): Of the augmentation, in pixels.
        model_steps (`int`): Training steps of the surrogate.
        batch_size (`int`): Images of a step.
        learning_rate, momentum, weight_decay (`float`): Of the surrogate's SGD.
        decay_every (`int`): Training steps after which the learning rate falls to a tenth, again and again.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the surrogate runs in mixed precision.
    """

    epsilon: float = 8.0
    step: float = 1.6
    steps: int = 10
    samples: int = 5
    adversary_epsilon: float = 4.0
    adversary_step: float = 0.8
    adversary_steps: int = 10
    crop_padding: int = 4
    model_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_every: int = 2000
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False

    @property
    def noise_adversary_steps(self) -> int:
        """Steps of the adversary that the noise has to withstand while it is made."""
        return self.adversary_steps


@dataclass(frozen=True)
class SEMSettings(REMNSettings):
    """
    Numbers of SEM: those of [`REMNSettings`], and one more.

    Args:
        noise_adversary_steps (`int`): Steps of the adversary while the noise is made. 0, published: the adversary's
            random start alone.
    """

    noise_adversary_steps: int = 0


_CPU = REMNSettings(
    step=4.0,
    steps=4,
    samples=1,
    adversary_step=3.0,
    adversary_steps=2,
    model_steps=300,
    decay_every=120,
    width=16,
    bfloat16=True,
)
PRESETS = {
    "published": REMNSettings(),
    "gpu": REMNSettings(bfloat16=True),
    "cpu": _CPU,
    # Three times as long: what the cut from 5,000 steps to 300 costs.
    "cpu-long": replace(_CPU, model_steps=900, decay_every=360),
    # Twice the steps and twice the augmentations of the descent: what those cuts cost.
    "cpu-steps": replace(_CPU, step=2.0, steps=8, samples=2),
    # A surrogate of twice the width: what the cut from 64 to 16 costs.
    "cpu-wide": replace(_CPU, width=32),
    # Without an adversary, so error-minimising noise under random crops: what the adversary costs at this size.
    "cpu-no-adversary": replace(_CPU, adversary_epsilon=0.0, adversary_steps=0),
    "smoke": REMNSettings(
        step=4.0,
        steps=2,
        samples=2,
        adversary_step=2.0,
        adversary_steps=2,
        crop_padding=1,
        model_steps=3,
        batch_size=32,
        decay_every=2,
        width=4,
    ),
}


# The same numbers as REMN's, published and ours.
SEM_PRESETS = {name: SEMSettings(**asdict(PRESETS[name])) for name in ("published", "gpu", "cpu", "smoke")}


def budget(settings: REMNSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: REMNSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    name = "sem" if isinstance(settings, SEMSettings) else "remn"
    kept = Checkpoint(checkpoint_dir, name, settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings.decay_every, gamma=0.1)
    draw = torch.Generator(device).manual_seed(seed)
    augment = surrogate.CropFlip(images.shape[2:], settings.crop_padding, draw)
    noise = torch.zeros(images.shape, dtype=torch.int16)
    order = torch.empty(0, dtype=torch.int64)
    done = 0
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        draw.set_state(state["draw"])
        noise, order, done = state["noise"].to(torch.int16), state["order"], state["done"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        kept.save(state | {"draw": draw.get_state(), "noise": noise, "order": order, "done": done})

    batches = torch.arange(len(images)).split(settings.batch_size)
    total = settings.model_steps + len(batches)
    with tqdm(total=total, initial=done, unit="batch", desc=name, disable=not progress) as bar:
        while done < settings.model_steps:
            # An epoch's last, incomplete batch is left out.
            if len(order) < settings.batch_size:
                order = torch.randperm(len(images), generator=draw, device=device).cpu()
            rows, order = order[: settings.batch_size], order[settings.batch_size :]
            batch, targets = images[rows].to(device), labels[rows].to(device)
            fixed = surrogate.frozen(model)
            noise[rows] = robust_noise(fixed, batch, targets, settings, augment, draw)
            seen = augment(batch + noise[rows].to(device) / 255).clamp(0, 1)
            attacked = adversarial(fixed, seen, targets, settings, draw, steps=settings.adversary_steps)
            options = {"step": (seed, done), "bfloat16": settings.bfloat16}
            loss = surrogate.train_step(model, optimizer, attacked, targets, **options)
            schedule.step()
            done += 1
            bar.update()
            bar.set_postfix_str(f"surrogate's loss {loss:.3f}")
            if kept.due():
                save()
        fixed = surrogate.frozen(model)
        for rows in batches[done - settings.model_steps :]:
            noise[rows] = robust_noise(
                fixed, images[rows].to(device), labels[rows].to(device), settings, augment, draw
            )
            done += 1
            bar.update()
            if kept.due() or done == total:
                save()
    return noise.float() / 255


def robust_noise(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: REMNSettings,
    augment: Callable[[torch.Tensor], torch.Tensor],
    draw: torch.Generator,
) -> torch.Tensor:
    """Noise that lowers the loss left by the adversary, int16 `(B, C, H, W)` in 1/255, on the CPU."""
    epsilon = settings.epsilon / 255
    delta = _uniform(images, epsilon, draw)
    for _ in range(settings.steps):
        total = torch.zeros_like(images)
        for _ in range(settings.samples):
            moved = (images + delta).requires_grad_()
            seen = augment(moved.clamp(0, 1))
            attacked = adversarial(model, seen.detach(), labels, settings, draw, steps=settings.noise_adversary_steps)
            gradient, _ = surrogate.image_gradient(model, attacked, labels, bfloat16=settings.bfloat16)
            # The adversary is taken as a constant shift of the augmented image.
            total += torch.autograd.grad(seen, moved, gradient)[0]
        delta = surrogate.sign_step(delta, total, settings.step / 255, epsilon)
    levels = math.floor(settings.epsilon)  # rounding alone would go beyond a bound between two levels
    return (255 * delta).round().clamp(-levels, levels).to(torch.int16).cpu()


def adversarial(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: REMNSettings,
    draw: torch.Generator,
    *,
    steps: int,
) -> torch.Tensor:
    """Adversarial versions of images: `steps` of projected sign ascent from a random start, kept in [0, 1]."""
    epsilon = settings.adversary_epsilon / 255
    attacked = (images + _uniform(images, epsilon, draw)).clamp(0, 1)
    for _ in range(steps):
        gradient, _ = surrogate.image_gradient(model, attacked, labels, bfloat16=settings.bfloat16)
        shift = surrogate.sign_step(attacked - images, -gradient, settings.adversary_step / 255, epsilon)
        attacked = (images + shift).clamp(0, 1)
    return attacked


def _uniform(images: torch.Tensor, epsilon: float, draw: torch.Generator) -> torch.Tensor:
    return epsilon * (2 * torch.rand(images.shape, generator=draw, device=images.device) - 1)


POISONS = (
    Poison("remn", "REMN", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),
    Poison("sem", "SEM", SEM_SOURCE, SEM_PRESETS, budget, perturb, surrogate="supervised", least_classes=2),
)
