"""
Where a pipeline runs and in which arithmetic: one choice for every command, sensible by default for the device.

The network runs in bfloat16 where the device has instructions for it, which is about twice as fast, and in float32
elsewhere; its weights lie channels last, and on a CPU its upsampling is folded into the convolutions behind it and
float32 convolutions take Winograd's algorithm. Images, noise, guides and the perceptual network are float32 always.
What that does to pixels is on record in `results/throughput.jsonl`. A pipeline that is called from Python runs as its
owner loaded it, unless it is placed.
"""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from ..devices import has_bfloat16, usable_device
from ..noise import normal_noise
from .folded_upsampling import fold_upsampling
from .winograd import use_winograd


PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def compiled_normal_noise() -> Callable[..., torch.Tensor]:
    """The noise function, one compilation for all rounds, steps and uses; on a CPU with the bits of the plain one."""
    return torch.compile(normal_noise, dynamic=True)


def place(
    pipe: DiffusionPipeline,
    device: torch.device | str,
    *,
    precision: str = "auto",
    compiled: bool = False,
) -> DiffusionPipeline:
    """
    Put a pipeline on a device in the way that is fast there, for inference: its network can no longer be trained.

    Args:
        pipe (`DiffusionPipeline`): Any with a `unet` of class `UNet2DModel`; changed in place. Where it has a
            `normal_noise`, as a purifier has, that is compiled or not along with the network.
        device (`torch.device` or `str`): Where it is to run.
        precision (`str`): Of the UNet: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16 where the device
            has instructions for it, else float32.
        compiled (`bool`): Compile at the first call the UNet, for the one shape that micro-batches have, and the noise
            function, which is a hundred small operations otherwise. On a CPU that takes a minute or two and gains a
            sixth at best.

    Returns:
        `DiffusionPipeline`: The same.

    Raises:
        ValueError: If `precision` is unknown, the pipeline has no `unet`, or this machine has no such device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, but must be one of {PRECISIONS}.")
    if not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        raise ValueError(f"pipe is a {type(pipe).__name__} without a network, but must have one as unet.")
    device = usable_device(device)
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    pipe.to(device)
    if device.type == "cpu":  # where the gain is measured
        fold_upsampling(pipe.unet)  # in the type the weights came in, before they are rounded
    # Not by diffusers' own `to`, which warns of layers that should stay float32 although this network has none.
    torch.nn.Module.to(pipe.unet, dtype=getattr(torch, precision), memory_format=torch.channels_last)
    if device.type == "cpu" and precision == "float32":
        use_winograd(pipe.unet)
    if compiled:
        pipe.unet.compile(dynamic=False)  # in place, so that weights keep their names
    if hasattr(pipe, "normal_noise"):
        pipe.normal_noise = compiled_normal_noise() if compiled else normal_noise
    return pipe
