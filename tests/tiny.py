"""A purifier small enough to run in milliseconds, with the real one's conventions."""

import torch
from diffusers import UNet2DModel


def tiny_unet(channels: int = 3, size: int = 32, seed: int = 0) -> UNet2DModel:
    """A random UNet with the real one's conventions: attention, one head, asymmetric padding, sine before cosine."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            norm_eps=1e-6,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            freq_shift=1,
            flip_sin_to_cos=False,
            attention_head_dim=None,
        )
    return unet.eval()
