"""EMN, class-wise: error-minimising noise, one pattern for all images of a class.

As `emn`, but a pass goes over a fifth of the images, takes one step per image, and sets the pattern of each class to
the mean of the noise of its images in the batch.

Every figure published for it carries a defect of the released program: noise is clamped to the valid range of an
*image* before it is added, so that its negative half is lost. The presets named `clamped` do the same.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import emn, surrogate
from .progress import Progress


SOURCE = "Huang et al., Unlearnable Examples: Making Personal Data Unexploitable, ICLR 2021, and its released program"


@dataclass(frozen=True)
class EMNClassSettings:
    """Numbers of EMN, class-wise.

    Attributes:
        epsilon: bound of every value of the noise, in 1/255.
        step: length of a step of the descent, in 1/255.
        steps: steps of the descent per batch of a pass.
        model_steps: training steps of the surrogate between two passes, on all images, shuffled.
        subset: share of the images of every class, drawn once, that a pass goes over.
        batch_size: images of a training step, and of a step of the descent.
        learning_rate, momentum, weight_decay, clip_norm: of the surrogate's SGD, constant.
        stop_error: share of the perturbed subset that the surrogate may get wrong at the end.
        max_rounds: rounds after which the noise is used as it is, with a warning.
        surrogate: a victim's name.
        width: its width.
        bfloat16: whether the surrogate runs in mixed precision.
        positive_only: whether the negative half of the noise is thrown away in the end, as in the released program.
    """

    epsilon: float = 8.0
    step: float = 0.8
    steps: int = 1
    model_steps: int = 10
    subset: float = 0.2
    batch_size: int = 512
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 5.0
    stop_error: float = 0.01
    max_rounds: int = 500
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False
    positive_only: bool = False


_CPU = EMNClassSettings(batch_size=128, max_rounds=60, width=16, bfloat16=True)
PRESETS = {
    "published": EMNClassSettings(),
    "gpu": EMNClassSettings(bfloat16=True),
    "clamped": EMNClassSettings(positive_only=True),
    "cpu": _CPU,
    "cpu-clamped": replace(_CPU, positive_only=True),
    "smoke": EMNClassSettings(step=4.0, model_steps=2, batch_size=32, stop_error=1.0, max_rounds=2, width=4),
}


def budget(settings: EMNClassSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: EMNClassSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See `jcdp_diffusers.poisons.get`."""
    kept = Progress(checkpoint_dir, "emn-class", settings, seed, images, labels)
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    optimizer = emn.make_optimizer(model, settings)
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
            for _ in range(settings.model_steps):
                # An epoch's last, incomplete batch is left out.
                if len(order) < settings.batch_size:
                    order = torch.randperm(len(images), generator=draw)
                rows, order = order[: settings.batch_size], order[settings.batch_size :]
                perturbed = images[rows] + pattern[labels[rows]]
                emn.train_step(model, optimizer, perturbed, labels[rows], settings, device)
            fixed = surrogate.frozen(model)
            for rows in subset[torch.randperm(len(subset), generator=draw)].split(settings.batch_size):
                noise = emn.minimise(fixed, images[rows], labels[rows], pattern[labels[rows]], settings, device)
                pattern = _class_means(noise, labels[rows], pattern)
            error = emn.error_rate(fixed, images[subset] + pattern[labels[subset]], labels[subset], settings, device)
            rounds += 1
            bar.update()
            bar.set_postfix_str(f"training error {error:.1%}")
            if kept.due() or error <= settings.stop_error or rounds == settings.max_rounds:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.get_state()}
                kept.save(state | {"pattern": pattern, "order": order, "rounds": rounds, "error": error})
    if error > settings.stop_error:
        emn.warn_unfinished("emn-class", error, settings)
    noise = pattern[labels]
    return noise.clamp(min=0) if settings.positive_only else noise


def _stratified(labels: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """Row numbers of `share` of every class, one at least."""
    chosen = []
    for label in labels.unique():
        rows = torch.nonzero(labels == label)[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=draw)[: max(1, round(share * len(rows)))]])
    return torch.cat(chosen)


def _class_means(noise: torch.Tensor, labels: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """The pattern of each class in the batch becomes the mean of its images' noise; the others stay."""
    pattern = pattern.clone()
    for label in labels.unique():
        pattern[label] = noise[labels == label].mean(dim=0)
    return pattern
