"""
Upsampling and the convolution behind it in one operation: the same numbers for four ninths of the arithmetic.

A UNet doubles its features by repeating every pixel and convolves the result 3x3. Each of the four pixels that come of
one then weighs a pixel of the small map twice or more; with those weights added up beforehand it is a transposed
convolution of the small map, 4x4 with stride 2. Of the DDPM paper's CIFAR-10 network that saves 7 % of the arithmetic,
and `results/throughput.jsonl` has what it saves in time. Sums are taken in another order, so results differ by what
rounding does.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn


class FoldedUpsample2D(nn.Module):
    """
    In the place of diffusers' `Upsample2D`, whose convolution it keeps: under its name, so that weights are saved and
    loaded as before.

    Args:
        conv (`nn.Conv2d`): 3x3, padded by one pixel. Its weights are folded now, and again whenever a state is loaded.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.register_buffer("kernel", folded(conv.weight), persistent=False)
        self.register_load_state_dict_post_hook(_fold_again)

    def forward(self, hidden_states: torch.Tensor, output_size: None = None) -> torch.Tensor:
        """
        Features of twice the size.

        Args:
            hidden_states (`torch.Tensor`): (B, C, H, W).
            output_size (`None`): Part of the signature that diffusers' blocks call.

        Returns:
            `torch.Tensor`: (B, C', 2 H, 2 W).
        """
        if output_size is not None:
            raise ValueError(f"output_size is {output_size}, but only None, for twice the size, is accepted.")
        return F.conv_transpose2d(hidden_states, self.kernel, self.conv.bias, stride=2, padding=1)


def _fold_again(layer: FoldedUpsample2D, incompatible_keys) -> None:
    layer.kernel.copy_(folded(layer.conv.weight))


def folded(weight: torch.Tensor) -> torch.Tensor:
    """
    The transposed convolution that equals repeating every pixel twice in each direction and convolving then.

    In one dimension, pixels 2i and 2i + 1 of the large map are w0 x[i-1] + (w1 + w2) x[i] and
    (w0 + w1) x[i] + w2 x[i+1], which is what a kernel of w2, w1 + w2, w0 + w1, w0 gives with stride 2.

    Args:
        weight (`torch.Tensor`): Of the convolution, (C', C, 3, 3).

    Returns:
        `torch.Tensor`: Of the transposed one, (C, C', 4, 4), in the same type; summed in float32 or better.
    """
    sums = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    for dim in (2, 3):
        first, middle, last = sums.unbind(dim)
        sums = torch.stack([last, middle + last, first + middle, first], dim)
    return sums.transpose(0, 1).to(weight.dtype, memory_format=torch.channels_last)


def fold_upsampling(unet: UNet2DModel) -> None:
    """
    Fold every upsampling of a network that repeats pixels and convolves them; upsampling of another kind stays.

    Args:
        unet (`UNet2DModel`): Changed in place; for inference, because the folded weights do not follow an optimizer.
    """
    for block in unet.up_blocks:
        for index, layer in enumerate(getattr(block, "upsamplers", None) or ()):
            if isinstance(layer, Upsample2D):  # which a UNet2DModel has with a 3x3 convolution only
                block.upsamplers[index] = FoldedUpsample2D(layer.conv)


def is_folded(unet: UNet2DModel) -> bool:
    """Whether a network's upsampling is folded."""
    return any(isinstance(module, FoldedUpsample2D) for module in unet.modules())
