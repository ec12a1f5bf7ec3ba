"""Facts about devices that victims, poisons and purifiers share: instructions, names, cores, threads, random state."""

import contextlib
import os
from collections.abc import Iterator
from numbers import Integral

import torch


def default_device() -> str:
    """`"cuda"` where a GPU can be used, else `"cpu"`: the default of every command's `--device`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(device: torch.device | str) -> torch.device:
    """
    Refuse a device that this machine does not have, before any costly work that would end at it.

    Args:
        device (`torch.device` or `str`): `"cpu"`, or an accelerator with or without its number: `"cuda"`, `"cuda:1"`.

    Returns:
        `torch.device`: The device.

    Raises:
        ValueError: If torch does not find it.
    """
    found, accelerator = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        numbers = range(torch.accelerator.device_count())
        found += [accelerator.type, *(f"{accelerator.type}:{number}" for number in numbers)]
    if str(device) not in found:
        raise ValueError(
            f"device is {str(device)!r}, but must be one that torch finds on this machine: {', '.join(found)}."
        )
    return torch.device(device)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device computes in bfloat16 rather than imitates it, which would be slower than float32."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def device_in_words(device: torch.device | str) -> str:
    """What records say of a device, for example `"cpu"` or `"cuda (NVIDIA H100)"`."""
    device = torch.device(device)
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def available_cores() -> int:
    """Processors that this process may use; all of the machine's where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Compute with this many threads of the CPU inside the block; None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """
    Torch's global random state is seeded from a generator inside the block and as it was before after it.

    This is for libraries that draw from the global state, as kornia does.

    Args:
        generator (`torch.Generator`): One number is drawn from it. Its device's state is seeded too.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with seeded(seed, generator.device):
        yield


def check_seed(seed: int, bits: int = 32) -> None:
    """
    Refuse a seed that torch, NumPy or scikit-learn would not take, before any costly work.

    Args:
        seed (`int`): In [0, 2^bits).
        bits (`int`, defaults to 32): 32 is what scikit-learn takes, 63 and 64 what torch and our noise take.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**bits:
        raise ValueError(f"seed is {seed!r}, but must be a whole number in [0, 2**{bits}).")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """
    Torch's global random state is seeded inside the block and as it was before after it.

    Args:
        seed (`int`): Of the CPU's generator, and of the device's.
        device (`torch.device` or `str`): Whose generator is seeded too; other devices' are not touched.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
