"""
TUE, transferable unlearnable examples: contrastive noise that a straight line can tell the classes of.

As in CP, an encoder and the noise minimise the same contrastive loss in turns; each image has noise of its own. The
noise also minimises the class-wise separability discriminant (CSD) of the noise itself: how far the noise of a class
spreads, over how far the classes are apart. So the noise misleads supervised learning as well.

Presets named `moco-v2` are for MoCo v2, the others for SimCLR. The paper's third framework, SimSiam, is not among the
victims here. What the released program does beyond the paper is in the presets `code`:

* For SimCLR its command gives the contrastive loss the weight 0. The noise then minimises CSD alone, and the encoder
  has no influence on it. So this preset trains none.
* The spread of a class has no gradient there, so CSD only drives the classes apart.
* For MoCo v2 a pass of the noise leaves out the images that do not fill a batch.

Not taken over: one common augmentation for a whole batch of noise, keys of noise steps in MoCo's queue, and batch
normalisation in the heads and over parts of a batch. MoCo's head is one linear layer there, and two layers here. In an
epoch the program takes 20 training steps of SimCLR before each pass of the noise. So 40 epochs of 50,000 images are
200 rounds here. Ours: training sees perturbed images that are clamped to [0, 1]; kornia resamples a crop in one step.
Nothing of ours has been compared with published noise.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import Poison
from .checkpoint import Checkpoint
from .encoder import Encoder, EncoderSettings, in_turns
from .surrogate import sign_step


SOURCE = "Ren et al., Transferable Unlearnable Examples, ICLR 2023, and its released program (renjie3/TUE)"
SMALLEST = 1e-5  # added above and below the fraction bar, as in the released program


@dataclass(frozen=True)
class TUESettings(EncoderSettings):
    """
    Numbers of TUE: those of [`EncoderSettings`], and these.

    Args:
        contrastive_weight, csd_weight (`float`): Of the two losses of the noise.
        spread_gradient (`bool`): Whether CSD has a gradient through the spread of the classes.
        random_start (`bool`): Whether the noise starts uniformly random within its bound, or at 0.
    """

    steps: int = 20
    rounds: int = 200
    model_steps: int | None = 20
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    min_scale: float = 0.08
    contrastive_weight: float = 1.0
    csd_weight: float = 0.1
    spread_gradient: bool = True
    random_start: bool = True


_PUBLISHED = TUESettings()
_MOCO = TUESettings(
    steps=5,
    model_steps=None,
    framework="moco-v2",
    optimizer="sgd",
    learning_rate=0.3,
    weight_decay=1e-4,
    temperature=0.2,
    key_momentum=0.99,
    queue=4096,
    through_targets=True,
    csd_weight=1.0,
    random_start=False,
)
_CPU = {"steps": 3, "step": 1.6, "rounds": 15, "batch_size": 128, "width": 16, "bfloat16": True}
_SMOKE = {"steps": 1, "step": 4.0, "rounds": 1, "model_steps": 1, "batch_size": 20, "width": 4}
PRESETS = {
    "published": _PUBLISHED,
    "code": replace(_PUBLISHED, model_steps=0, contrastive_weight=0.0, spread_gradient=False),
    "gpu": replace(_PUBLISHED, bfloat16=True),
    "cpu": replace(_PUBLISHED, **_CPU, model_steps=None),
    "smoke": replace(_PUBLISHED, **_SMOKE),
    "moco-v2": _MOCO,
    "code-moco-v2": replace(_MOCO, spread_gradient=False, drop_last=True),
    "gpu-moco-v2": replace(_MOCO, bfloat16=True),
    "cpu-moco-v2": replace(_MOCO, **_CPU, learning_rate=0.3 / 4, queue=1024),
    "smoke-moco-v2": replace(_MOCO, **_SMOKE, learning_rate=0.3 / 25, queue=40),
}


def budget(settings: TUESettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: TUESettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "tue", settings, seed, images, labels)
    start = torch.zeros_like(images)
    if settings.random_start:
        draw = torch.Generator().manual_seed(seed)
        start = settings.epsilon / 255 * (2 * torch.rand(images.shape, generator=draw) - 1)
    options = {"kept": kept, "seed": seed, "device": device, "name": "tue", "progress": progress}
    return in_turns(images, start, torch.arange(len(images)), settings, partial(lower, labels), **options)


def lower(
    labels: torch.Tensor,
    encoder: Encoder,
    clean: torch.Tensor,
    noise: torch.Tensor,
    which: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """
    Lower both losses of a batch by projected sign descent, from the noise that is there; see `in_turns`.

    Every step starts at a valid image: what the valid range cuts off an image is cut off its noise too.

    Args:
        labels (`torch.Tensor`): int64 `(N,)`, of all images.
    """
    settings = encoder.settings
    noise, classes = noise[which], labels[rows].to(noise.device)
    for _ in range(settings.steps):
        noise = noise.detach().requires_grad_()
        loss = settings.csd_weight * separability(noise, classes, spread_gradient=settings.spread_gradient)
        perturbed = (clean + noise).clamp(0, 1)
        if settings.contrastive_weight:
            loss = loss + settings.contrastive_weight * encoder.loss(perturbed)
        (gradient,) = torch.autograd.grad(loss, noise)
        noise = sign_step(perturbed.detach() - clean, gradient, settings.step / 255, settings.epsilon / 255)
        encoder.after_noise_step()
    return noise[which.argsort()]


def separability(noise: torch.Tensor, labels: torch.Tensor, *, spread_gradient: bool = True) -> torch.Tensor:
    """
    Class-wise separability discriminant, CSD: the smaller, the better a linear classifier tells classes apart.

    For two classes it is the sum of their spreads over the distance of their centres. A spread is the mean distance
    of a class from its centre. CSD is the mean over all pairs of classes.

    Args:
        noise (`torch.Tensor`): float (B, ...), of the images of a batch.
        labels (`torch.Tensor`): int64 (B,).
        spread_gradient (`bool`, *optional*, defaults to `True`): Whether spreads have a gradient.

    Returns:
        `torch.Tensor`: A scalar; 0 for a batch of one class.
    """
    noise = noise.flatten(1)
    groups = [noise[labels == label] for label in labels.unique()]
    centres = torch.stack([group.mean(dim=0) for group in groups])
    spreads = torch.stack([(group - centre).norm(dim=1).mean() for group, centre in zip(groups, centres)])
    if not spread_gradient:
        spreads = spreads.detach()
    first, second = torch.triu_indices(len(groups), len(groups), offset=1, device=noise.device)
    if not len(first):
        return 0 * noise.sum()
    distances = (centres[first] - centres[second]).norm(dim=1)
    return ((spreads[first] + spreads[second] + SMALLEST) / (distances + SMALLEST)).mean()


POISONS = (Poison("tue", "TUE", SOURCE, PRESETS, budget, perturb, surrogate="contrastive", least_classes=2),)
