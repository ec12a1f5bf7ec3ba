"""
UNets by name: the paper's CIFAR-10 network, small ones that a CPU trains in minutes, and those of larger images.

A name ends with the side of the images that it is for, see `usual_size`. There, maps with attention have 8x8 or 16x16
pixels, so that its cost stays that of small images. Arithmetic is counted for one evaluation of one image.
"""

import re

from diffusers import DDPMScheduler, UNet2DModel

from ..devices import seeded


# What the original DDPM (Ho et al., 2020) and the authors' network share and diffusers' defaults do not: sine before
# cosine, frequencies 10000^(-k / (half - 1)), a group-norm epsilon of 1e-6, one attention head, and downsampling that
# pads on the right and at the bottom only.
_DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
}


def _levels(channels: tuple[int, ...], attention: tuple[int, ...]) -> dict:
    """Block types of a UNet with self-attention at the given levels (0 is full resolution)."""
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(f"{'Attn' if i in attention else ''}DownBlock2D" for i in range(len(channels))),
        "up_block_types": tuple(
            f"{'Attn' if i in attention else ''}UpBlock2D" for i in reversed(range(len(channels)))
        ),
    }


UNETS = {
    # 35,746,307 parameters with 3 channels: the DDPM paper's for CIFAR-10, and JCDP's. Attention at 16x16.
    "ddpm-cifar10": _DDPM | _levels((128, 256, 256, 256), (1,)) | {"layers_per_block": 2, "dropout": 0.1},
    # 2.74 million: attention at 8x8.
    "small32": _DDPM | _levels((32, 64, 128), (2,)) | {"layers_per_block": 1},
    # 0.95 million: CIFAR-10 on a CPU.
    "mini32": _DDPM | _levels((32, 48, 64), (2,)) | {"layers_per_block": 1, "norm_num_groups": 16},
    # 0.69 million: greyscale digits on a CPU.
    "tiny32": _DDPM | _levels((16, 32, 64), (2,)) | {"layers_per_block": 1, "norm_num_groups": 8},
    # 0.98 million, 0.86 GFLOP: photographs on a CPU. One level more than mini32, whose cost at 64 is twice that.
    "mini64": _DDPM | _levels((24, 32, 48, 64), (3,)) | {"layers_per_block": 1, "norm_num_groups": 8},
    # 2.08 million, 3.5 GFLOP.
    "mini128": _DDPM | _levels((24, 32, 48, 64, 96), (4,)) | {"layers_per_block": 1, "norm_num_groups": 8},
    # 2.07 million, 7.0 GFLOP.
    "mini256": _DDPM | _levels((16, 24, 32, 48, 64, 96), (5,)) | {"layers_per_block": 1, "norm_num_groups": 8},
    # 18.2 million, 12.9 GFLOP: what ddpm-cifar10 costs at 32. For a GPU, as are the next two.
    "small64": _DDPM | _levels((64, 128, 128, 256), (3,)) | {"layers_per_block": 2},
    # 27.8 million, 51 GFLOP.
    "small128": _DDPM | _levels((64, 128, 128, 256, 256), (4,)) | {"layers_per_block": 2},
    # 27.3 million, 74 GFLOP, a seventh of google/ddpm-church-256's. Attention at 16x16.
    "small256": _DDPM | _levels((32, 64, 128, 128, 256, 256), (4,)) | {"layers_per_block": 2},
}


def usual_size(name: str) -> int:
    """Side of the images that a network of `UNETS` is for."""
    return 32 if name == "ddpm-cifar10" else int(re.search(r"\d+$", name)[0])


def named_unet(name: str, *, in_channels: int = 3, sample_size: int = 32, seed: int = 0) -> UNet2DModel:
    """
    A UNet with random weights, which predicts noise of its input's shape.

    Args:
        name (`str`): A key of `UNETS`.
        in_channels (`int`, defaults to 3): 3 for colour, 1 for greyscale images.
        sample_size (`int`, defaults to 32): Side of the images; halved between levels, so a multiple of 4 to 32.
        seed (`int`): Of the initial weights; torch's global generator is left as it was.

    Raises:
        ValueError: If there is no such network, or images of that size cannot pass it.
    """
    if name not in UNETS:
        raise ValueError(f"unet is {name!r}, but must be one of {tuple(UNETS)}.")
    divisor = 2 ** (len(UNETS[name]["block_out_channels"]) - 1)
    if sample_size % divisor:
        raise ValueError(f"sample_size is {sample_size}, but must be a multiple of {divisor} for the UNet {name!r}.")
    with seeded(seed):
        return UNet2DModel(in_channels=in_channels, out_channels=in_channels, sample_size=sample_size, **UNETS[name])


def ddpm_scheduler() -> DDPMScheduler:
    """DDPM's schedule on CIFAR-10: T = 1000, beta linear from 1e-4 to 0.02, the larger fixed variance, x_0 clipped."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="fixed_large",
        clip_sample=True,
    )
