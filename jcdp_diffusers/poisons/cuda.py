"""
CUDA, convolution-based unlearnable data: every class is blurred with a kernel of its own.

A kernel has entries from U(0, `blur`), one of which, drawn at random, is replaced by 1; it is the same for all
channels. The blurred image is divided by its largest value. (The acronym has nothing to do with the GPU toolkit.)
The perturbation has no budget: two images of a class are changed by different amounts, and the largest change is
often above 100/255.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from . import Poison


SOURCE = "Sadasivan et al., CUDA: Convolution-based Unlearnable Datasets, CVPR 2023, and its released program"


@dataclass(frozen=True)
class CUDASettings:
    """
    Numbers of CUDA.

    Args:
        kernel_size (`int`): Side of the kernels, odd.
        blur (`float`): Upper end of the kernels' entries.
        centre (`float`): Value of the entry that is replaced.
    """

    kernel_size: int = 3
    blur: float = 0.3
    centre: float = 1.0


PRESETS = {"published": CUDASettings(), "cpu": CUDASettings(), "smoke": CUDASettings()}


def budget(settings: CUDASettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {}


def kernels(num_classes: int, settings: CUDASettings, seed: int) -> torch.Tensor:
    """
    The kernel of every class, float32 `(num_classes, kernel_size, kernel_size)`.

    The order of the draws, and NumPy's older generator, are those of the released program, so that a seed gives its
    kernels.
    """
    draw = np.random.RandomState(seed)
    size = settings.kernel_size
    chosen = []
    for _ in range(num_classes):
        kernel = draw.uniform(0.0, settings.blur, (3, 1, size, size))[0, 0]
        kernel[draw.randint(size), draw.randint(size)] = settings.centre
        chosen.append(kernel)
    return torch.tensor(np.stack(chosen), dtype=torch.float32)


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: CUDASettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]. It takes seconds on one core, so neither `device` nor `checkpoint_dir` is used."""
    channels = images.shape[1]
    blurred = torch.empty_like(images)
    for label, kernel in enumerate(kernels(int(labels.max()) + 1, settings, seed)):
        rows = labels == label
        weight = kernel.expand(channels, 1, -1, -1)
        blurred[rows] = F.conv2d(images[rows], weight, padding=settings.kernel_size // 2, groups=channels)
    # A black image stays black; any other has a positive largest value.
    largest = blurred.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, blurred / largest, blurred) - images


POISONS = (Poison("cuda", "CUDA", SOURCE, PRESETS, budget, perturb, suits_single_images=True),)
