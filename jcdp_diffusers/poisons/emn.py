"""EMN, sample-wise: noise that makes every image so easy for a network that nothing is left to learn from it.

A surrogate and the noise minimise the same cross-entropy in turns: a few training steps on the perturbed images,
then a pass over all images in which projected sign descent lowers the loss of each; until the surrogate errs on at
most 1 % of the perturbed images.

Every figure published for EMN carries a defect of the released program, which its author has confirmed: noise is
clamped to the valid range of an *image* before it is added, so that its negative half is lost. The presets named
`clamped` do the same.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from . import surrogate
from .progress import Progress


SOURCE = "Huang et al., Unlearnable Examples: Making Personal Data Unexploitable, ICLR 2021, and its released program"


@dataclass(frozen=True)
class EMNSettings:
    """Numbers of EMN, sample-wise.

    Attributes:
        epsilon: bound of every value of the noise, in 1/255.
        step: length of a step of the descent, in 1/255.
        steps: steps of the descent per pass.
        model_steps: training steps of the surrogate between two passes, walking through the images in order.
        batch_size: images of a training step, and of a step of the descent.
        learning_rate, momentum, weight_decay, clip_norm: of the surrogate's SGD, constant.
        stop_error: share of perturbed images that the surrogate may get wrong at the end.
        max_rounds: rounds after which the noise is used as it is, with a warning.
        surrogate: a victim's name.
        width: its width.
        bfloat16: whether the surrogate runs in mixed precision.
        positive_only: whether the negative half of the noise is thrown away in the end, as in the released program.
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


_CPU = EMNSettings(steps=5, step=2.0, model_steps=20, batch_size=128, max_rounds=20, width=16, bfloat16=True)
PRESETS = {
    "published": EMNSettings(),
    "gpu": EMNSettings(bfloat16=True),
    "clamped": EMNSettings(positive_only=True),
    "cpu": _CPU,
    "cpu-clamped": replace(_CPU, positive_only=True),
    "smoke": EMNSettings(steps=2, step=4.0, model_steps=2, batch_size=32, stop_error=1.0, max_rounds=2, width=4),
}


def budget(settings: EMNSettings, shape: tuple[int, int, int]) -> dict[str, float]:
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
    """See `jcdp_diffusers.poisons.get`."""
    kept = Progress(checkpoint_dir, "emn", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = make_optimizer(model, settings)
    noise = torch.zeros_like(images)
    batches = torch.arange(len(images)).split(settings.batch_size)
    done, trained, error = 0, 0, float("inf")
    if (state := kept.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        noise, done, trained, error = state["noise"], state["done"], state["trained"], state["error"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "noise": noise}
        kept.save(state | {"done": done, "trained": trained, "error": error})

    # A round is a few training steps and one pass over all images; in the pass the surrogate is fixed, so that the
    # run can be cut off between any two batches of it.
    total = settings.max_rounds * len(batches)
    with tqdm(total=total, initial=done, unit="batch", desc="emn", disable=not progress) as bar:
        while error > settings.stop_error and done < total:
            if done % len(batches) == 0:
                for _ in range(settings.model_steps):
                    rows = batches[trained % len(batches)]
                    train_step(model, optimizer, images[rows] + noise[rows], labels[rows], settings, device)
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
    if error > settings.stop_error:
        warn_unfinished("emn", error, settings)
    return noise.clamp(min=0) if settings.positive_only else noise


def make_optimizer(model: nn.Module, settings) -> torch.optim.Optimizer:
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
    settings,
    device: torch.device,
) -> None:
    """One step of the surrogate on perturbed images, which are not clamped."""
    model.train()
    with surrogate.precision(settings.bfloat16, device):
        logits = model(perturbed.to(device).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()


def minimise(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor, settings, device: torch.device
) -> torch.Tensor:
    """Lowers the loss of each perturbed image by projected sign descent, from the noise that is there.

    Every step starts at a valid image, so what the valid range cuts off is cut off the noise too; its last step is
    not.
    """
    images, labels, noise = images.to(device), labels.to(device), noise.to(device)
    for _ in range(settings.steps):
        start = (images + noise).clamp(0, 1)
        gradient, _ = surrogate.image_gradient(model, start, labels, bfloat16=settings.bfloat16)
        noise = surrogate.sign_step(start - images, gradient, settings.step / 255, settings.epsilon / 255)
    return noise.cpu()


@torch.no_grad()
def error_rate(
    model: nn.Module, perturbed: torch.Tensor, labels: torch.Tensor, settings, device: torch.device
) -> float:
    """Share of the perturbed images that a network in eval mode gets wrong."""
    wrong = 0
    for batch, targets in zip(perturbed.split(512), labels.split(512), strict=True):
        with surrogate.precision(settings.bfloat16, device):
            logits = model(batch.to(device).contiguous(memory_format=torch.channels_last))
        wrong += int((logits.argmax(dim=1).cpu() != targets).sum())
    return wrong / len(labels)


def warn_unfinished(name: str, error: float, settings) -> None:
    """Tells that the surrogate never came down to the error at which the method stops."""
    warnings.warn(
        f"{name} ended after max_rounds = {settings.max_rounds} rounds with a training error of {error:.1%}, "
        f"above stop_error = {settings.stop_error:.1%}; the noise may be weak.",
        stacklevel=2,
    )
