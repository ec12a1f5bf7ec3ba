"""
EMN: noise that makes images so easy for a network that nothing is left to learn from them.

A surrogate and the noise minimise the same cross-entropy in turns: a few training steps on the perturbed images, then
a pass in which projected sign descent lowers the loss of each image. It ends when the surrogate errs on at most 1 % of
the perturbed images.

* `emn`, sample-wise: every image has noise of its own. A pass goes over all images.
* `emn-class`, class-wise: all images of a class share one pattern. A pass goes over a fifth of the images, takes one
  step per image, and sets the pattern of each class to the mean of the noise of its images in the batch.

Every figure published for EMN carries a defect of the released program, which its author has confirmed: noise is
clamped to the valid range of an *image* before it is added, so that its negative half is lost. The presets named
`clamped` do the same.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "Huang et al., Unlearnable Examples: Making Personal Data Unexploitable, ICLR 2021, and its released program"


@dataclass(frozen=True)
class EMNSettings:
    """
    Numbers of EMN, sample-wise.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255.
        step (`float`): Length of a step of the descent, in 1/255.
        steps (`int`): Steps of the descent per pass.
        model_steps (`int`): Training steps of the surrogate between two passes, walking through the images in order.
        batch_size (`int`): Images of a training step, and of a step of the descent.
        learning_rate, momentum, weight_decay, clip_norm (`float`): Of the surrogate's SGD, constant.
        stop_error (`float`): Fraction of the perturbed images that the surrogate may get wrong at the end.
        max_rounds (`int`): Rounds after which the noise is used as it is, with a warning.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the surrogate runs in mixed precision.
        positive_only (`bool`): Whether the negative half of the noise is thrown away in the end, as in the released
            program.
    """

    epsilon: float = 8.0
    step: float = 0.8
    steps: int = 20
    model_steps: int = 10
    batch_size: int = 512
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 5.0
    stop_error: float = 0.01
    max_rounds: int = 100
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False
    positive_only: bool = False


@dataclass(frozen=True)
class EMNClassSettings(EMNSettings):
    """
    Numbers of EMN, class-wise: those of [`EMNSettings`], with these differences.

    Args:
        steps (`int`): Steps of the descent per batch of a pass.
        model_steps (`int`): Training steps of the surrogate between two passes, on all images, shuffled.
        stop_error (`float`): Fraction of the perturbed subset that the surrogate may get wrong at the end.
        subset (`float`): Fraction of the images of every class, drawn once, that a pass goes over.
    """

    steps: int = 1
    max_rounds: int = 500
    subset: float = 0.2


_CPU = EMNSettings(steps=5, step=2.0, model_steps=20, batch_size=128, max_rounds=20, width=16, bfloat16=True)
PRESETS = {
    "published": EMNSettings(),
    "gpu": EMNSettings(bfloat16=True),
    "clamped": EMNSettings(positive_only=True),
    "cpu": _CPU,
    "cpu-clamped": replace(_CPU, positive_only=True),
    "smoke": EMNSettings(steps=2, step=4.0, model_steps=2, batch_size=32, stop_error=1.0, max_rounds=2, width=4),
}
_CLASS_CPU = EMNClassSettings(batch_size=128, max_rounds=60, width=16, bfloat16=True)
CLASS_PRESETS = {
    "published": EMNClassSettings(),
    "gpu": EMNClassSettings(bfloat16=True),
    "clamped": EMNClassSettings(positive_only=True),
    "cpu": _CLASS_CPU,
    "cpu-clamped": replace(_CLASS_CPU, positive_only=True),
    "smoke": EMNClassSettings(step=4.0, model_steps=2, batch_size=32, stop_error=1.0, max_rounds=2, width=4),
}


def budget(settings: EMNSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: EMNSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """Sample-wise noise; see [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "emn", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = make_optimizer(model, settings)
    noise = torch.zeros_like(images)
    batches = surrogate.batches(torch.arange(len(images)), settings.batch_size)
    done, trained, error = 0, 0, float("inf")
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        noise, done, trained, error = state["noise"], state["done"], state["trained"], state["error"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "noise": noise}
        kept.save(state | {"done": done, "trained": trained, "error": error})

    # A round is a few training steps and one pass over all images. The surrogate is fixed in the pass, so a run can
    # be interrupted between any two batches of it.
    total = settings.max_rounds * len(batches)
    with tqdm(total=total, initial=done, unit="batch", desc="emn", disable=not progress) as bar:
        while error > settings.stop_error and done < total:
            if done % len(batches) == 0:
                for _ in range(settings.model_steps):
                    rows = batches[trained % len(batches)]
                    perturbed = images[rows] + noise[rows]
                    train_step(model, optimizer, perturbed, labels[rows], settings, (seed, trained), device)
                    trained += 1
            fixed = surrogate.frozen(model)
            for rows in batches[done % len(batches) :]:
                noise[rows] = minimise(fixed, images[rows], labels[rows], noise[rows], settings, device)
                done += 1
                bar.update()
                if kept.due() and done % len(batches):
                    save()
            error = error_rate(fixed, images + noise, labels, settings, device)
            bar.set_postfix_str(f"round {done // len(batches)}, training error {error:.1%}")
            save()
    return _finished("emn", noise, error, settings)


def perturb_classes(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: EMNClassSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """Class-wise noise; see [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "emn-class", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = make_optimizer(model, settings)
    draw = torch.Generator().manual_seed(seed)
    subset = _stratified(labels, settings.subset, draw)
    pattern = torch.zeros(int(labels.max()) + 1, *images.shape[1:])
    order = torch.empty(0, dtype=torch.int64)
    rounds, error = 0, float("inf")
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        draw.set_state(state["draw"])
        pattern, order, rounds, error = state["pattern"], state["order"], state["rounds"], state["error"]

    with tqdm(total=settings.max_rounds, initial=rounds, unit="round", desc="emn-class", disable=not progress) as bar:
        while error > settings.stop_error and rounds < settings.max_rounds:
            for number in range(settings.model_steps):
                # An epoch's last, incomplete batch is left out.
                if len(order) < settings.batch_size:
                    order = torch.randperm(len(images), generator=draw)
                rows, order = order[: settings.batch_size], order[settings.batch_size :]
                perturbed = images[rows] + pattern[labels[rows]]
                train_step(model, optimizer, perturbed, labels[rows], settings, (seed, rounds, number), device)
            fixed = surrogate.frozen(model)
            for rows in subset[torch.randperm(len(subset), generator=draw)].split(settings.batch_size):
                noise = minimise(fixed, images[rows], labels[rows], pattern[labels[rows]], settings, device)
                pattern = _class_means(noise, labels[rows], pattern)
            error = error_rate(fixed, images[subset] + pattern[labels[subset]], labels[subset], settings, device)
            rounds += 1
            bar.update()
            bar.set_postfix_str(f"training error {error:.1%}")
            if kept.due() or error <= settings.stop_error or rounds == settings.max_rounds:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.get_state()}
                kept.save(state | {"pattern": pattern, "order": order, "rounds": rounds, "error": error})
    return _finished("emn-class", pattern[labels], error, settings)


def make_optimizer(model: nn.Module, settings: EMNSettings) -> torch.optim.Optimizer:
    """The surrogate's SGD; the learning rate stays as it is."""
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    perturbed: torch.Tensor,
    labels: torch.Tensor,
    settings: EMNSettings,
    step: tuple[int, ...],
    device: torch.device,
) -> None:
    """One step of the surrogate on perturbed images, which are not clamped."""
    options = {"step": step, "bfloat16": settings.bfloat16, "clip_norm": settings.clip_norm}
    surrogate.train_step(model, optimizer, perturbed.to(device), labels.to(device), **options)


def minimise(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    noise: torch.Tensor,
    settings: EMNSettings,
    device: torch.device,
) -> torch.Tensor:
    """
    Lower the loss of each perturbed image by projected sign descent, from the noise that is there.

    Every step starts at a valid image: what the valid range cuts off an image is cut off its noise too. The last step
    is not cut.

    Returns:
        `torch.Tensor`: The noise `(B, C, H, W)`, on the CPU.
    """
    images, labels, noise = images.to(device), labels.to(device), noise.to(device)
    for _ in range(settings.steps):
        start = (images + noise).clamp(0, 1)
        gradient, _ = surrogate.image_gradient(model, start, labels, bfloat16=settings.bfloat16)
        noise = surrogate.sign_step(start - images, gradient, settings.step / 255, settings.epsilon / 255)
    return noise.cpu()


@torch.no_grad()
def error_rate(
    model: nn.Module, perturbed: torch.Tensor, labels: torch.Tensor, settings: EMNSettings, device: torch.device
) -> float:
    """Fraction of the perturbed images that a network in eval mode gets wrong."""
    wrong = 0
    for batch, targets in zip(perturbed.split(512), labels.split(512), strict=True):
        with surrogate.precision(settings.bfloat16, device):
            logits = model(batch.to(device).contiguous(memory_format=torch.channels_last))
        wrong += int((logits.argmax(dim=1).cpu() != targets).sum())
    return wrong / len(labels)


def _finished(name: str, noise: torch.Tensor, error: float, settings: EMNSettings) -> torch.Tensor:
    """The noise as the preset returns it, with a warning if the surrogate never came down to `stop_error`."""
    if error > settings.stop_error:
        warnings.warn(
            f"{name} ended after max_rounds = {settings.max_rounds} rounds with a training error of {error:.1%}, "
            f"above stop_error = {settings.stop_error:.1%}; the noise may be weak.",
            stacklevel=2,
        )
    return noise.clamp(min=0) if settings.positive_only else noise


def _stratified(labels: torch.Tensor, fraction: float, draw: torch.Generator) -> torch.Tensor:
    """Row numbers of `fraction` of every class, one at least."""
    chosen = []
    for label in labels.unique():
        rows = torch.nonzero(labels == label)[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=draw)[: max(1, round(fraction * len(rows)))]])
    return torch.cat(chosen)


def _class_means(noise: torch.Tensor, labels: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """The pattern of each class in the batch becomes the mean of its images' noise; the others stay."""
    pattern = pattern.clone()
    for label in labels.unique():
        pattern[label] = noise[labels == label].mean(dim=0)
    return pattern


POISONS = (
    Poison("emn", "EMN", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),
    Poison(
        "emn-class", "EMN(C)", SOURCE, CLASS_PRESETS, budget, perturb_classes, surrogate="supervised", least_classes=2
    ),
)
