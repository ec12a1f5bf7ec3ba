"""
DUNE: a colour shift per class, and adversarial noise against several stages of one training run.

A surrogate is trained on the clean images, and its weights after five epochs, evenly spaced, are kept. For each
class, a particle swarm looks for three offsets of red, green and blue. With them, the five networks are to see the
class three further on, (label + 3) mod classes, while the images look natural by PSNR, SSIM and LPIPS. Then every
image takes sign steps towards that class along the mean gradient of the five networks, within a bound. The offsets
are added in the end.

**The change is larger than the bound of the steps**: the offset, of up to about 0.1, comes on top. So the method
promises no L-infinity bound here; the card of a protected set has the measured one. It was made against purification
by diffusion.

From the released program, whose numbers are the published ones (the paper is said to state label + 1 and 20 steps).
Not taken over: its best position is a view that moves on with the particle, its rows are grouped by class, and its
images are truncated. Ours: how the surrogate is trained, which the program does not say. LPIPS is given images in
[0, 1] as there, although it is made for [-1, 1]. The presets `cpu` and `smoke` leave LPIPS out, because its network is
downloaded. Nothing of ours has been compared with the authors' published images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data.perturbations import psnr
from ..perceptual import load_perceptual
from ..victims import Recipe, train_model
from . import Poison, surrogate
from .checkpoint import Checkpoint


SOURCE = "DUNE, ICML 2026, as in its released program (wxldragon/DUNE)"
SSIM_WINDOW = 7  # pixels, a side


@dataclass(frozen=True)
class DUNESettings:
    """
    Numbers of DUNE.

    Args:
        epsilon (`float`): Bound of the sign steps alone, in 1/255.
        step (`float`): Length of a step, in 1/255.
        steps (`int`): Sign steps.
        networks (`int`): Stages of the surrogate's training that are attacked together.
        offset (`int`): How many classes further on the target is; no multiple of the number of classes.
        particles, rounds (`int`): Of the swarm.
        spread (`float`): Particles start uniformly within it on both sides of 0, images in [0, 1]; their velocities
            within a tenth of it.
        inertia, own_pull, common_pull (`float`): Weights of a particle's velocity, and of the ways to its own best and
            to the common best position.
        swarm_images (`int`): Images of the class, the first ones, on which the swarm is judged.
        least_psnr (`float`), least_ssim (`float`), largest_lpips (`float`): What lies beyond is added to the loss, per
            image; PSNR in dB.
        perceptual (`str`, *optional*): Network of LPIPS, see `load_perceptual`; `None` leaves LPIPS out.
        batch_size (`int`): Images attacked at a time; changes nothing.
        recipe (`Recipe`): How the surrogate is trained on the clean images.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the attack runs in mixed precision.
    """

    epsilon: float = 8.0
    step: float = 0.5
    steps: int = 30
    networks: int = 5
    offset: int = 3
    particles: int = 10
    rounds: int = 10
    spread: float = 0.1
    inertia: float = 0.5
    own_pull: float = 0.3
    common_pull: float = 0.3
    swarm_images: int = 1000
    least_psnr: float = 20.0
    least_ssim: float = 0.8
    largest_lpips: float = 0.03
    perceptual: str | None = "alex"
    batch_size: int = 256
    recipe: Recipe = Recipe("dune", epochs=25)
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False


PRESETS = {
    "published": DUNESettings(),
    "gpu": DUNESettings(bfloat16=True),
    "cpu": DUNESettings(
        step=1.0,
        steps=15,
        networks=3,
        swarm_images=100,
        perceptual=None,
        recipe=Recipe("dune-cpu", epochs=15, schedule="one_cycle", bfloat16=True),
        width=16,
        bfloat16=True,
    ),
    "smoke": DUNESettings(
        step=4.0,
        steps=2,
        networks=2,
        particles=3,
        rounds=2,
        swarm_images=8,
        perceptual=None,
        batch_size=16,
        recipe=Recipe("dune-smoke", epochs=2, batch_size=32, max_steps_per_epoch=2, smoke=True),
        width=4,
    ),
}


def budget(settings: DUNESettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """None: see the file's text."""
    return {}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: DUNESettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """
    See [`Poison`]; an interruption repeats the surrogate's training as a whole, but not swarms and steps.

    Raises:
        ValueError: If images are smaller than a window of SSIM, each class would be its own target, or LPIPS cannot
            be opened.
    """
    classes = int(labels.max()) + 1
    if settings.offset % classes == 0:
        raise ValueError(
            f"offset is {settings.offset}, but must be no multiple of {classes}, the number of classes, for dune: "
            "--set offset=1 takes the next class as the target."
        )
    height, width = images.shape[2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"images has {height} x {width} pixels, but must have at least {SSIM_WINDOW} x {SSIM_WINDOW} for SSIM."
        )
    judge = None if settings.perceptual is None else load_perceptual(settings.perceptual).to(device)
    kept = Checkpoint(checkpoint_dir, "dune", settings, seed, images, labels)
    batches = torch.arange(len(images)).split(settings.batch_size)
    shifts, stepped, done = torch.zeros(classes, images.shape[1]), torch.zeros_like(images), 0
    if (state := kept.load()) is not None:
        stages, shifts, stepped, done = state["stages"], state["shifts"], state["stepped"], state["done"]
    else:
        stages = train_stages(images, labels, settings, seed, device, progress)

    def save() -> None:
        kept.save({"stages": stages, "shifts": shifts, "stepped": stepped, "done": done})

    if state is None:
        save()
    networks = []
    for weights in stages:
        model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
        model.load_state_dict(weights)
        networks.append(surrogate.frozen(model))
    total = classes + len(batches)
    with tqdm(total=total, initial=done, unit="part", desc="dune", disable=not progress) as bar:
        while done < total:
            if done < classes:
                rows = torch.nonzero(labels == done)[: settings.swarm_images, 0]
                target = (done + settings.offset) % classes
                draw = np.random.default_rng([seed, done])
                shifts[done] = best_shift(networks, images[rows].to(device), target, settings, draw, judge)
            else:
                rows = batches[done - classes]
                targets = (labels[rows] + settings.offset) % classes
                stepped[rows] = attack(networks, images[rows].to(device), targets.to(device), settings)
            done += 1
            bar.update()
            if kept.due() or done == total:
                save()
    return (images + stepped + shifts[labels][:, :, None, None]).clamp(0, 1) - images


def train_stages(images, labels, settings: DUNESettings, seed: int, device, progress: bool) -> list[dict]:
    """Weights of the surrogate after `networks` epochs of one run, evenly spaced, the last among them, on the CPU."""
    model = surrogate.build(settings.surrogate, settings.width, images, labels, seed, device)
    epochs = settings.recipe.epochs
    if settings.networks > epochs:
        raise ValueError(f"networks is {settings.networks}, but must be at most the recipe's {epochs} epochs.")
    wanted = {round(epochs * (1 + number) / settings.networks) for number in range(settings.networks)}
    stages = []
    with tqdm(total=epochs, unit="epoch", desc="dune: surrogate", disable=not progress) as bar:

        def after_epoch(entry: dict) -> None:
            if entry["epoch"] in wanted:
                stages.append({name: value.detach().cpu().clone() for name, value in model.state_dict().items()})
            bar.update()

        train_model(model, images, labels, recipe=settings.recipe, seed=seed, device=device, after_epoch=after_epoch)
    return stages


def best_shift(
    networks: list[nn.Module],
    images: torch.Tensor,
    target: int,
    settings: DUNESettings,
    draw: np.random.Generator,
    judge: nn.Module | None,
) -> torch.Tensor:
    """
    The offset of each channel that a particle swarm finds for images of one class.

    Args:
        networks (`list[nn.Module]`): In eval mode, from images in [0, 1] to logits.
        images (`torch.Tensor`): `(N, C, H, W)` in [0, 1].
        target (`int`): The class that the networks are to see.
        settings (`DUNESettings`): Of the swarm.
        draw (`np.random.Generator`): Of the first positions and velocities.
        judge (`nn.Module`, *optional*): LPIPS.

    Returns:
        `torch.Tensor`: `(C,)`.
    """
    size = (settings.particles, images.shape[1])
    position = draw.uniform(-settings.spread, settings.spread, size)
    velocity = draw.uniform(-settings.spread / 10, settings.spread / 10, size)
    own_best, own_loss = position.copy(), np.full(settings.particles, np.inf)
    for _ in range(settings.rounds):
        losses = np.array([_loss_of_shift(networks, images, one, target, settings, judge) for one in position])
        better = losses < own_loss
        own_best[better], own_loss[better] = position[better], losses[better]
        common_best = own_best[own_loss.argmin()]
        velocity = (
            settings.inertia * velocity
            + settings.own_pull * (own_best - position)
            + settings.common_pull * (common_best - position)
        )
        position = position + velocity
    return torch.from_numpy(own_best[own_loss.argmin()]).float()


@torch.no_grad()
def _loss_of_shift(networks, images, shift: np.ndarray, target: int, settings: DUNESettings, judge) -> float:
    """Mean over images: cross-entropy with the target, averaged over networks, plus what looks unnatural."""
    total = 0.0
    for batch in images.split(256):
        offset = torch.from_numpy(shift).to(batch)[None, :, None, None]
        shifted = (batch + offset).clamp(0, 1)
        targets = torch.full((len(batch),), target, device=batch.device)
        for network in networks:
            with surrogate.precision(settings.bfloat16, batch.device):
                logits = network(shifted.contiguous(memory_format=torch.channels_last))
            total += F.cross_entropy(logits.float(), targets, reduction="sum").item() / len(networks)
        total += unnatural(batch, shifted, settings, judge).sum().item()
    return total / len(images)


def unnatural(
    images: torch.Tensor, shifted: torch.Tensor, settings: DUNESettings, judge: nn.Module | None
) -> torch.Tensor:
    """By how much PSNR, SSIM and LPIPS of each image lie beyond what is accepted, summed, `(B,)`."""
    beyond = (settings.least_psnr - psnr(images, shifted, least_error=1e-10)).clamp(min=0)
    beyond = beyond + (settings.least_ssim - structural_similarity(images, shifted)).clamp(min=0)
    if judge is not None:
        colour = [batch.expand(-1, 3, -1, -1) for batch in (shifted, images)]
        beyond = beyond + (judge(*colour).flatten() - settings.largest_lpips).clamp(min=0)
    return beyond


def structural_similarity(images: torch.Tensor, others: torch.Tensor, window: int = SSIM_WINDOW) -> torch.Tensor:
    """
    SSIM (Wang et al., IEEE TIP 2004) of images in [0, 1], in uniform windows, mean over windows and channels.

    Args:
        images, others (`torch.Tensor`): `(B, C, H, W)`, 7 pixels high and wide at least.
        window (`int`, *optional*, defaults to 7): Side of a window; only windows within the image count.

    Returns:
        `torch.Tensor`: `(B,)`.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, window, stride=1)

    images, others = images.double(), others.double()
    unbiased = window**2 / (window**2 - 1)
    one, two = mean(images), mean(others)
    var_one = unbiased * (mean(images.square()) - one.square())
    var_two = unbiased * (mean(others.square()) - two.square())
    covariance = unbiased * (mean(images * others) - one * two)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * one * two + c1) * (2 * covariance + c2)
    similarity = similarity / ((one.square() + two.square() + c1) * (var_one + var_two + c2))
    return similarity.mean(dim=(1, 2, 3))


def attack(
    networks: list[nn.Module], images: torch.Tensor, targets: torch.Tensor, settings: DUNESettings
) -> torch.Tensor:
    """
    Projected sign descent towards the targets along the mean gradient of all networks, from no perturbation.

    Returns:
        `torch.Tensor`: The perturbation `(B, C, H, W)`, on the CPU, without colour shift.
    """
    delta = torch.zeros_like(images)
    for _ in range(settings.steps):
        gradient = torch.zeros_like(images)
        for network in networks:
            gradient += surrogate.image_gradient(network, images + delta, targets, bfloat16=settings.bfloat16)[0]
        delta = surrogate.sign_step(delta, gradient, settings.step / 255, settings.epsilon / 255)
        delta = (images + delta).clamp(0, 1) - images
    return delta.cpu()


POISONS = (Poison("dune", "DUNE", SOURCE, PRESETS, budget, perturb, surrogate="supervised", least_classes=2),)
