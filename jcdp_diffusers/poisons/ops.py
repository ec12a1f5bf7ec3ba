"""
OPS: one pixel of every image takes one colour, the same pixel and colour for all images of a class.

For every class, every position and every corner of the colour cube are tried, and the pair is kept whose distance to
the images of the class is large and steady: the mean of |colour - pixel| over its standard deviation, both over
images and channels. No pair serves two classes. The budget is one pixel; the change of that pixel is not bounded.
With several pixels (ours), each position is tried in its best colour.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from . import Poison


SOURCE = "Wu et al., One-Pixel Shortcut: On the Learning Preference of Deep Neural Networks, ICLR 2023"


@dataclass(frozen=True)
class OPSSettings:
    """
    Numbers of OPS.

    Args:
        pixels (`int`): How many pixels of an image are changed.
    """

    pixels: int = 1


PRESETS = {"published": OPSSettings(), "cpu": OPSSettings(), "smoke": OPSSettings()}


def budget(settings: OPSSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"l0": settings.pixels}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: OPSSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """
    See [`Poison`]. Nothing is random, so `seed` changes nothing, and no network takes part.

    Raises:
        ValueError: If an image has too few pixels, or there may be too few pairs of a position and a colour.
    """
    channels, height, width = images.shape[1:]
    colours = np.array(list(product([0.0, 1.0], repeat=channels)))
    num_classes = int(labels.max()) + 1
    if settings.pixels > height * width:
        raise ValueError(
            f"pixels is {settings.pixels}, but must be at most {height * width} for images of {height} x {width}."
        )
    # The classes before may have used up positions in all colours; as many must be left as the last class changes.
    most = -(-len(colours) * (height * width - settings.pixels + 1) // settings.pixels)
    if num_classes > most:
        raise ValueError(
            f"labels has {num_classes} classes, but must have at most {most} for images of {height} x {width} pixels."
        )

    perturbation = torch.zeros_like(images)
    free = np.ones((len(colours), height * width), dtype=bool)
    for label in range(num_classes):
        rows = torch.nonzero(labels == label)[:, 0]
        scores = np.where(free, _scores(images[rows].numpy(), colours), -1.0)
        best_first = np.argsort(-scores, axis=None, kind="stable")
        _, first = np.unique(best_first % scores.shape[1], return_index=True)  # best colour of each position
        for shortcut in best_first[np.sort(first)[: settings.pixels]]:
            colour, position = np.unravel_index(shortcut, scores.shape)
            free[colour, position] = False
            row, column = divmod(int(position), width)
            perturbation[rows, :, row, column] = torch.tensor(colours[colour]).float() - images[rows, :, row, column]
    return perturbation


def _scores(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Mean over standard deviation of |colour - pixel| for every colour and position, shape (colours, H * W)."""
    pixels = images.reshape(*images.shape[:2], -1)
    scores = np.empty((len(colours), pixels.shape[2]))
    for i, colour in enumerate(colours):
        distance = np.abs(colour[:, None] - pixels)
        mean, spread = distance.mean(axis=(0, 1)), distance.std(axis=(0, 1))
        # A pixel that never changes (the black margin of a scan) is the perfect shortcut in any colour but its own.
        scores[i] = np.divide(mean, spread, out=np.where(mean > 0, np.inf, 0.0), where=spread > 0)
    return scores


POISONS = (Poison("ops", "OPS", SOURCE, PRESETS, budget, perturb, uses_seed=False),)
