"""
Against poisons that blur every class with a kernel of its own (CUDA): random sharpening, and a random warp.

* `rsk`, random sharpening kernels with a frequency filter (aseriesof-tubes/RSK): whenever an image is loaded, before
  crop and flip, it is convolved with a random kernel that sharpens, and only the lowest frequencies of its cosine
  transform are kept. The centre of the 3x3 kernel is drawn around 2.5, each of its four neighbours around
  (1 - centre) / 4, all with a standard deviation of 0.1. Ours: the border is repeated before the convolution, so that
  an image keeps its size; the authors' loses a pixel on each side.
* `coin` (Li et al., AAAI 2025; wxldragon/COIN): after crop and flip, every pixel takes the colour at a random place
  within two pixels of it in both directions, by bilinear interpolation, and the image is rounded down to 8 bits. Each
  pixel has a place of its own. Beyond its edge an image goes on at the opposite one, which is SciPy's mode `wrap`.

Neither was compared with figures of its authors.
"""

import numpy as np
import torch
from scipy.fft import dct
from torch.nn import functional as F

from ..data import LabelledImages
from . import Context, Countermeasure


CENTRE, KERNEL_STD, KEPT = 2.5, 0.1, 0.3
REACH = 2.0


class RandomSharpening:
    """
    Sharpens each stored image with a kernel of its own and keeps its low frequencies.

    Args:
        centre (`float`, *optional*, defaults to 2.5): Mean of the kernel's centre.
        std (`float`, *optional*, defaults to 0.1): Standard deviation of each of its five entries.
        kept (`float`, *optional*, defaults to 0.3): Fraction of the rows and of the columns of the cosine transform
            that is kept, rounded down.
    """

    def __init__(self, centre: float = CENTRE, std: float = KERNEL_STD, kept: float = KEPT):
        self.centre = centre
        self.std = std
        self.kept = kept

    def before_augmentation(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        images = images / 255 if images.dtype == torch.uint8 else images
        return keep_low_frequencies(sharpen(images, self.kernels(len(images), images.device, generator)), self.kept)

    def kernels(self, count: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """Random kernels, float32 (count, 3, 3); the corners are 0."""
        draws = self.std * torch.randn(count, 5, generator=generator, device=device)
        centre = self.centre + draws[:, 0]
        kernels = torch.zeros(count, 3, 3, device=device)
        kernels[:, 1, 1] = centre
        for number, (row, column) in enumerate(((0, 1), (1, 0), (1, 2), (2, 1)), start=1):
            kernels[:, row, column] = (1 - centre) / 4 + draws[:, number]
        return kernels


def sharpen(images: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """
    Convolve each image with its kernel, its border repeated, and clip to [0, 1].

    Args:
        images (`torch.Tensor`): Float (B, C, H, W) in [0, 1].
        kernels (`torch.Tensor`): (B, 3, 3), the same for all channels of an image.

    Returns:
        `torch.Tensor`: (B, C, H, W).
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").reshape(1, count * channels, height + 2, width + 2)
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=count * channels).reshape(images.shape).clamp(0, 1)


def keep_low_frequencies(images: torch.Tensor, kept: float) -> torch.Tensor:
    """Float images (B, C, H, W) with the lowest `kept` rows and columns of their cosine transform, in [0, 1]."""
    rows, columns = (_low_pass(size, kept).to(images) for size in images.shape[2:])
    return (rows @ images @ columns.T).clamp(0, 1)


def _low_pass(size: int, kept: float) -> torch.Tensor:
    """The matrix that keeps the lowest frequencies of a line of so many pixels; at least the mean is kept."""
    transform = dct(np.eye(size), norm="ortho", axis=0)[: max(1, int(kept * size))]
    return torch.from_numpy(transform.T @ transform)


class RandomWarp:
    """
    Moves every pixel of a batch to a random place nearby, by bilinear interpolation.

    Args:
        reach (`float`, *optional*, defaults to 2.0): Largest distance in pixels, along each axis.
    """

    def __init__(self, reach: float = REACH):
        self.reach = reach

    def before_forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, _, height, width = images.shape
        draw = torch.rand(2, count, height, width, generator=generator, device=images.device)
        offsets = self.reach * (2 * draw - 1)
        return (255 * warp(images, offsets[0], offsets[1])).clamp(0, 255).floor() / 255, labels


def warp(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    The colour of each image at shifted places; see the file's text for what lies beyond its edges.

    Args:
        images (`torch.Tensor`): Float (B, C, H, W).
        down, right (`torch.Tensor`): (B, H, W), in pixels.

    Returns:
        `torch.Tensor`: (B, C, H, W).
    """
    count, channels, height, width = images.shape
    result = torch.zeros_like(images)
    flat = images.flatten(2)
    rows = torch.arange(height, device=images.device)[:, None] + down
    columns = torch.arange(width, device=images.device) + right
    # The last and the first pixel lie on each other, so the period is one less than the number of pixels.
    (top, row_part), (left, column_part) = _whole_and_part(rows, height), _whole_and_part(columns, width)
    for row, row_weight in ((top, 1 - row_part), (top + 1, row_part)):
        for column, column_weight in ((left, 1 - column_part), (left + 1, column_part)):
            place = (row.clamp(max=height - 1) * width + column.clamp(max=width - 1)).flatten(1)
            colours = flat.gather(2, place[:, None].expand(-1, channels, -1)).reshape(images.shape)
            result += (row_weight * column_weight)[:, None] * colours
    return result


def _whole_and_part(places: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the pixel before each place, and the fraction of the way to the next one."""
    inside = torch.where((places < 0) | (places > size - 1), places.remainder(size - 1), places)
    whole = inside.floor()
    return whole.long(), inside - whole


def random_sharpening(data: LabelledImages, context: Context) -> RandomSharpening:
    """The hook with the published numbers."""
    return RandomSharpening()


def random_warp(data: LabelledImages, context: Context) -> RandomWarp:
    """The hook with the published numbers."""
    return RandomWarp()


def check_sides(data: LabelledImages) -> None:
    """Refuse images of one row or column, in which no pixel has a neighbour on both axes."""
    height, width = data.images.shape[1:3]
    if min(height, width) < 2:
        raise ValueError(f"data has images of {height}x{width}, but must have sides of at least 2 pixels for coin.")


COUNTERMEASURES = (
    Countermeasure(
        "rsk",
        "hook",
        "Random sharpening kernels and a frequency filter, against CUDA (aseriesof-tubes/RSK)",
        "one convolution and two matrix products per step",
        random_sharpening,
        {"centre": CENTRE, "std": KERNEL_STD, "kept": KEPT},
        gives="floats",
    ),
    Countermeasure(
        "coin",
        "hook",
        "COIN, random interpolation, against CUDA (Li et al., AAAI 2025; wxldragon/COIN)",
        "four look-ups per pixel and step",
        random_warp,
        {"reach": REACH},
        check=check_sides,
    ),
)
