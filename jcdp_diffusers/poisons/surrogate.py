"""What the poisons that need a network share: the surrogate, gradients for images, augmentation inside an attack."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from .. import victims
from ..devices import seeded


def build(
    name: str, width: int, images: torch.Tensor, labels: torch.Tensor, seed: int, device: torch.device
) -> nn.Module:
    """A surrogate with weights drawn from `seed`: one of our own victims, for the classes of `labels`, on `device`."""
    victims.check_sides(name, *images.shape[2:], argument="surrogate")
    side = min(images.shape[2:])
    with seeded(seed):
        model = victims.build(name, int(labels.max()) + 1, in_channels=images.shape[1], width=width, image_size=side)
    if hasattr(model, "whiten"):
        model.whiten(images)
    return model.to(device=device, memory_format=torch.channels_last)


def frozen(model: nn.Module) -> nn.Module:
    """
    The same function as `model` in eval mode, for gradients with respect to images alone.

    Batch normalisation is folded into the convolutions before it, which makes a pass about 1.6 times faster on a CPU
    and changes it by rounding only. A network whose steps depend on its input, as transformers' do, is copied as it
    is. The copy does not follow when `model` is trained on.
    """
    training = model.training
    model.eval()
    try:
        fixed = fuse(model)
    except TraceError:
        fixed = copy.deepcopy(model)
    model.train(training)
    return fixed.requires_grad_(False).to(memory_format=torch.channels_last)


def batches(order: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """
    Row numbers of each training step of a pass.

    A last image alone joins the batch before it: batch normalisation of 1x1 maps needs two images.

    Args:
        order (`torch.Tensor`): All row numbers, int64 `(N,)`.
        size (`int`): Images of a step.
    """
    parts = order.split(size)
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts = (*parts[:-2], torch.cat(parts[-2:]))
    return parts


def precision(bfloat16: bool, device: torch.device) -> torch.autocast:
    """Mixed precision with bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def finite(loss: torch.Tensor) -> torch.Tensor:
    """
    The loss of a surrogate, a scalar.

    Raises:
        FloatingPointError: If it is not finite.
    """
    if not loss.isfinite():
        raise FloatingPointError(
            f"the surrogate's loss became {loss.item()}: it does not converge on these images; try a lower "
            "learning_rate."
        )
    return loss


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    step: tuple[int, ...],
    bfloat16: bool,
    clip_norm: float | None = None,
) -> float:
    """
    One step of a surrogate by cross-entropy.

    Args:
        model (`nn.Module`): From images (B, C, H, W) to logits; in training mode afterwards.
        optimizer (`torch.optim.Optimizer`): Of its parameters.
        images, labels (`torch.Tensor`): The batch, on the model's device.
        step (`tuple[int, ...]`): The poison's seed and the number of this step, of which dropout is a function.
        bfloat16 (`bool`): Whether the network runs in bfloat16.
        clip_norm (`float`, *optional*): Largest L2 norm of the whole gradient.

    Returns:
        `float`: The mean loss before the step.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    model.train()
    with seeded(seed_of(*step), images.device), precision(bfloat16, images.device):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = finite(F.cross_entropy(logits.float(), labels))
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def seed_of(*numbers: int) -> int:
    """A seed for what is numbered: equal numbers give equal seeds, so nothing random has to be kept between calls."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def image_gradient(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    bfloat16: bool,
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradient of the summed cross-entropy with respect to images.

    Args:
        model (`nn.Module`): From images `(B, C, H, W)` in [0, 1] to logits.
        images (`torch.Tensor`): Where the gradient is taken.
        labels (`torch.Tensor`): int64 `(B,)`.
        bfloat16 (`bool`): Whether the network runs in bfloat16.
        augment (`Callable`, *optional*): Differentiable, applied before the network.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The gradient `(B, C, H, W)` and the losses `(B,)`.
    """
    images = images.detach().requires_grad_()
    seen = images if augment is None else augment(images)
    with precision(bfloat16, images.device):
        logits = model(seen.contiguous(memory_format=torch.channels_last))
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return gradient, losses.detach()


def sign_step(delta: torch.Tensor, gradient: torch.Tensor, step: float, epsilon: float) -> torch.Tensor:
    """One step of projected sign descent: `step` against the gradient's sign, then back into [-epsilon, epsilon]."""
    return (delta - step * gradient.sign()).clamp(-epsilon, epsilon)


class _Augmentation:
    """
    An augmentation by kornia, which differentiates it and draws from torch's global generator.

    The global generator is seeded for each call from `generator` and put back afterwards.

    Args:
        transform (`nn.Module`): From float images (B, C, H, W) to the same.
        generator (`torch.Generator`): Source of all draws, on any device.
    """

    def __init__(self, transform: nn.Module, generator: torch.Generator):
        self.transform = transform
        self.generator = generator

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        with seeded(seed, images.device):
            return self.transform(images)


class CropFlip(_Augmentation):
    """
    Random crop after zero padding, and random mirroring, by kornia.

    Args:
        size (`tuple[int, int]`): `(H, W)`.
        padding (`int`): Zeros on each side.
        generator (`torch.Generator`): Source of all draws, on any device.
    """

    def __init__(self, size: tuple[int, int], padding: int, generator: torch.Generator):
        from kornia.augmentation import ImageSequential, RandomCrop, RandomHorizontalFlip

        # Cutting by resampling treats the batch as a whole; by slices, kornia would take image after image.
        crop = RandomCrop(tuple(size), padding=padding, cropping_mode="resample")
        super().__init__(ImageSequential(crop, RandomHorizontalFlip()), generator)


class Contrastive(_Augmentation):
    """
    The augmentation of contrastive learning at an adjustable strength s, by kornia, in this order.

    A resized crop of at least max(1 - 0.9 s, 0.05) of the area; mirroring with probability 1/2; with probability
    min(0.99, 0.8 s) brightness, contrast and saturation changed by up to 0.4 s and hue by up to 0.1 s; grey with
    probability 0.2 s. An image of one channel is treated as a grey image of three.

    Args:
        size (`tuple[int, int]`): `(H, W)`.
        strength (`float`): s, in [0, 1].
        generator (`torch.Generator`): Source of all draws, on any device.
    """

    def __init__(self, size: tuple[int, int], strength: float, generator: torch.Generator):
        from kornia.augmentation import (
            ColorJitter,
            ImageSequential,
            RandomGrayscale,
            RandomHorizontalFlip,
            RandomResizedCrop,
        )

        least = max(1 - 0.9 * strength, 0.05)
        jitter = (0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
        super().__init__(
            ImageSequential(
                RandomResizedCrop(tuple(size), scale=(least, 1.0), cropping_mode="resample"),
                RandomHorizontalFlip(),
                ColorJitter(*jitter, p=min(0.99, 0.8 * strength)),
                RandomGrayscale(p=0.2 * strength),
            ),
            generator,
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        channels = images.shape[1]
        return super().__call__(images.expand(-1, 3, -1, -1))[:, :channels]
