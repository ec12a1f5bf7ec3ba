"""What the poisons that need a network share: the surrogate, gradients for images, augmentation inside an attack."""

from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from .. import victims
from ..devices import seeded


def build(
    name: str, width: int, images: torch.Tensor, labels: torch.Tensor, seed: int, device: torch.device
) -> nn.Module:
    """A surrogate with weights drawn from `seed`: one of our own victims, for the classes of `labels`, on `device`."""
    with seeded(seed):
        model = victims.get(name)(int(labels.max()) + 1, in_channels=images.shape[1], width=width)
    return model.to(device=device, memory_format=torch.channels_last)


def frozen(model: nn.Module) -> nn.Module:
    """
    The same function as `model` in eval mode, for gradients with respect to images alone.

    Batch normalisation is folded into the convolutions before it, which makes a pass about 1.6 times faster on a CPU
    and changes it by rounding only. The copy does not follow when `model` is trained on.
    """
    training = model.training
    folded = fuse(model.eval()).requires_grad_(False)
    model.train(training)
    return folded.to(memory_format=torch.channels_last)


def precision(bfloat16: bool, device: torch.device) -> torch.autocast:
    """Mixed precision with bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


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


class CropFlip:
    """
    Random crop after zero padding, and random mirroring, by kornia, which differentiates both.

    kornia draws from torch's global generator; here it is seeded for the call from `generator` and put back
    afterwards.

    Args:
        size (`tuple[int, int]`): `(H, W)`.
        padding (`int`): Zeros on each side.
        generator (`torch.Generator`): Source of all draws, on any device.
    """

    def __init__(self, size: tuple[int, int], padding: int, generator: torch.Generator):
        from kornia.augmentation import ImageSequential, RandomCrop, RandomHorizontalFlip

        # Cutting by resampling treats the batch as a whole; by slices, kornia would take image after image.
        self.transform = ImageSequential(
            RandomCrop(tuple(size), padding=padding, cropping_mode="resample"), RandomHorizontalFlip()
        )
        self.generator = generator

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        with seeded(seed):
            return self.transform(images)
