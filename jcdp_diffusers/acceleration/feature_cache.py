"""
Feature caching between neighbouring steps: the deep levels of the UNet run at every n-th evaluation only.

What a UNet makes of x_t at low resolution changes less from step to step than x_t does (DeepCache, Ma et al., CVPR
2024). So an evaluation may run the full resolution alone and take the rest from an earlier one. What that saves and
does to pixels, beside what fewer evaluations do, is on record in `results/feature_reuse.jsonl`.
"""

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D

from .compiling import is_compiled


class FeatureCache:
    """
    A UNet for one micro-batch in one round; it is whole at the first, the (n + 1)-th, ... of its evaluations.

    The others run `conv_in`, the resnets of the first down block, the last up block, `conv_norm_out` and `conv_out`
    with the present x_t and t. What the deeper levels sent up to the last up block is that of the last whole
    evaluation.

    This is kept from step to step: `block_out_channels[1]` numbers per pixel in the UNet's type, which for the
    DDPM paper's CIFAR-10 network in bfloat16 are 0.5 MiB per image of the pipeline's call. `jcdp purify` gives one
    micro-batch to a call.

    Args:
        unet (`UNet2DModel`): One that `check_cacheable` accepts. It runs as it is, and nothing stays attached to it.
        interval (`int`): n. At 1 every evaluation is whole.
    """

    def __init__(self, unet: UNet2DModel, interval: int):
        self.unet, self.interval = unet, interval
        self.evaluations = 0
        self.features: torch.Tensor | None = None

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """
        The next evaluation, called as the UNet is.

        Args:
            sample (`torch.Tensor`): x_t in the UNet's type, (B, C, H, W).
            timestep (`torch.Tensor`): t, counted from 0, shape (B,).
            return_dict (`bool`): False is all there is.
        """
        whole = self.evaluations % self.interval == 0
        self.evaluations += 1
        return (self.whole(sample, timestep) if whole else self.full_resolution(sample, timestep),)

    def whole(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The UNet's own forward; the features that enter its last up block are kept."""

        def keep(up_block, inputs):
            self.features = inputs[0]

        with self.unet.up_blocks[-1].register_forward_pre_hook(keep):
            return self.unet(sample, timestep, return_dict=False)[0]

    def full_resolution(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The UNet's forward without its deeper levels."""
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
        skips = [unet.conv_in(sample)]
        for resnet in unet.down_blocks[0].resnets:
            skips.append(resnet(skips[-1], embedding))
        hidden = unet.up_blocks[-1](self.features, tuple(skips), embedding)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def check_cacheable(unet: UNet2DModel, interval: int) -> None:
    """Refuse networks whose full resolution is more than the two blocks that `FeatureCache` runs."""
    if is_compiled(unet):  # it would not see that its features are asked for
        raise ValueError(f"feature_reuse is {interval}, but this UNet is compiled, for which only 1 is accepted.")
    blocks = (*unet.down_blocks, *unet.up_blocks)
    plain = isinstance(blocks[0], DownBlock2D) and isinstance(blocks[-1], UpBlock2D)
    skipping = any(hasattr(block, "skip_conv") for block in blocks)
    if not plain or skipping or unet.config.time_embedding_type != "positional" or unet.config.center_input_sample:
        raise ValueError(
            f"feature_reuse is {interval}, but only 1 is accepted for this UNet: more takes one that goes from "
            f"DownBlock2D to UpBlock2D (not from {type(blocks[0]).__name__} to {type(blocks[-1]).__name__}), without "
            "skip blocks, with positional time embeddings and input that is not centred."
        )
