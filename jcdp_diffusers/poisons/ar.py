"""
AR: noise of an autoregressive process, one process per class, a fresh draw of it for every image.

A process has 3 x 3 coefficients for each channel, the last of which is 0 and which sum to 1: every pixel is the
weighted sum of its eight predecessors in the 3 x 3 window that ends in it. A convolution with the same coefficients
and -1 in the last place answers to such noise with exactly 0, and to noise of another class does not; so the first
layer of a network can tell the classes apart. No network takes part in making it.

Coefficients are found by random search, as by the authors: a candidate is kept when its noise neither explodes nor
quiets the filter of any process kept before it. Their own coefficients are not used; a seed gives others.

Ours: an image above 32 pixels is divided into tiles of 32 x 32 pixels at most, as equal as whole pixels allow. Each
has a draw of its own, at the same strength. Processes are found at 32 pixels, and one draw for a larger image, as
published for 96, mostly grows towards its end. Scaled to the norm, it would leave most of the image as it was. Where
tiles meet, the filter of the class answers in two rows or columns.
"""

from dataclasses import dataclass
from itertools import pairwise, product
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from . import Poison


SOURCE = "Sandoval-Segura et al., Autoregressive Perturbations for Data Poisoning, NeurIPS 2022, and its program"

# Rows and columns at the top and left that are dropped: the random start, and where it still shows.
_MARGIN = 4
_BATCH = 1024
TILE = 32  # pixels, the longest side of one draw of noise


@dataclass(frozen=True)
class ARSettings:
    """
    Numbers of AR.

    Args:
        level (`float`): Root mean square of the perturbation over all values of an image, and of each tile, images in
            [0, 1]. The published norms, 1.0 for 3 x 32 x 32 and 3.0 for 3 x 96 x 96, are both 1 / sqrt(3072) of it.
        required_response (`float`, *optional*): Least answer (sum of the positive part) of the filters kept so far to
            a candidate's noise, for noise of norm 1.0 on 3 x 32 x 32 values; by default the published 10 for up to ten
            classes and 3 for more.
        largest_rms (`float`): Largest root mean square of noise that starts from N(0, 1), before it is scaled: 50 /
            sqrt(3072), published.
        trials (`int`): Draws of a candidate's noise that must all stay below `largest_rms`.
        max_candidates (`int`): How many candidates are tried before giving up.
    """

    level: float = 1 / sqrt(3072)
    required_response: float | None = None
    largest_rms: float = 50 / sqrt(3072)
    trials: int = 3
    max_candidates: int = 2_000_000


PRESETS = {"published": ARSettings(), "cpu": ARSettings(), "smoke": ARSettings(required_response=0.0)}


def budget(settings: ARSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"l2": settings.level * sqrt(np.prod(shape))}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: ARSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """
    See [`Poison`]. It takes minutes at most on one core, so neither `device` nor `checkpoint_dir` is used.

    Raises:
        ValueError: If the search finds too few processes.
    """
    channels, height, width = images.shape[1:]
    search, draw = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    processes = coefficients(int(labels.max()) + 1, channels, settings, search)
    tiles = list(product(cuts(height), cuts(width)))
    largest = (channels, *(max(end - start for start, end in cuts(side)) for side in (height, width)))
    perturbation = np.empty(images.shape, dtype=np.float32)
    batch = max(1, _BATCH // len(tiles))
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        own = processes[labels[rows].numpy()]
        signals = generate(own.repeat(len(tiles), axis=0), largest, draw).reshape(len(own), len(tiles), *largest)
        for number, ((top, bottom), (left, right)) in enumerate(tiles):
            tile = signals[:, number, :, : bottom - top, : right - left]
            norm = budget(settings, tile.shape[1:])["l2"]
            tile = norm * tile / np.sqrt(np.square(tile).sum(axis=(1, 2, 3), keepdims=True))
            perturbation[rows, :, top:bottom, left:right] = tile
    return torch.from_numpy(perturbation)


def cuts(side: int) -> list[tuple[int, int]]:
    """First pixel and end of each tile along a side of an image: as few as there can be, as equal as there can be."""
    count = -(-side // TILE)
    return list(pairwise(number * side // count for number in range(count + 1)))


def generate(processes: np.ndarray, shape: tuple[int, int, int], draw: np.random.Generator) -> np.ndarray:
    """
    One draw of noise of each process.

    Args:
        processes (`np.ndarray`): Coefficients `(B, C, 3, 3)`.
        shape (`tuple[int, int, int]`): `(C, H, W)` of the noise.
        draw (`np.random.Generator`): Source of the random start.

    Returns:
        `np.ndarray`: float64 `(B, C, H, W)`, not scaled; not finite where a process explodes.
    """
    channels, height, width = shape
    signals = draw.standard_normal((len(processes), channels, height + _MARGIN, width + _MARGIN))
    with np.errstate(over="ignore", invalid="ignore"):
        for row in range(2, signals.shape[2]):
            # What the two rows above contribute is the same whatever happens in this row.
            above = sum(
                processes[:, :, i, j, None] * signals[:, :, row - 2 + i, j : j + signals.shape[3] - 2]
                for i in range(2)
                for j in range(3)
            )
            for column in range(2, signals.shape[3]):
                signals[:, :, row, column] = (
                    above[:, :, column - 2]
                    + processes[:, :, 2, 0] * signals[:, :, row, column - 2]
                    + processes[:, :, 2, 1] * signals[:, :, row, column - 1]
                )
    return signals[:, :, _MARGIN:, _MARGIN:]


def coefficients(num_classes: int, channels: int, settings: ARSettings, draw: np.random.Generator) -> np.ndarray:
    """
    Find one process per class, on noise of 32 x 32 pixels whatever the images' size; see the file's text.

    Returns:
        `np.ndarray`: float64 `(num_classes, channels, 3, 3)`.

    Raises:
        ValueError: If `settings.max_candidates` do not hold enough of them.
    """
    shape = (channels, 32, 32)
    required = settings.required_response
    if required is None:
        required = 10.0 if num_classes <= 10 else 3.0
    # The published threshold is for three channels of norm 1.0; independent channels add up like a random walk.
    norm, required = sqrt(channels / 3), required * sqrt(channels / 3)

    found = []
    for _ in range(0, settings.max_candidates, _BATCH):
        kernels = draw.standard_normal((_BATCH, 1, 3, 3))
        kernels[:, :, 2, 2] = 0
        kernels /= kernels.sum(axis=(2, 3), keepdims=True)
        # A candidate is calm only if each of its channels is, so channels are sieved before they are put together.
        kernels = kernels[_rms(generate(kernels, (1, 32, 32), draw)) <= settings.largest_rms * sqrt(channels)]
        candidates = kernels[: len(kernels) // channels * channels].reshape(-1, channels, 3, 3)
        signals = np.empty((0, *shape))
        for _ in range(settings.trials):
            signals = generate(candidates, shape, draw)
            calm = _rms(signals) <= settings.largest_rms
            candidates, signals = candidates[calm], signals[calm]
        for candidate, signal in zip(candidates, signals, strict=True):
            signal = norm * signal / np.sqrt(np.square(signal).sum())
            if all(np.maximum(response(process, signal), 0).sum() >= required for process in found):
                found.append(candidate)
            if len(found) == num_classes:
                return np.stack(found)
    raise ValueError(
        f"required_response is {required:g}, but must be smaller: {len(found)} of {num_classes} processes were found."
    )


def _rms(signals: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.square(signals).mean(axis=(1, 2, 3)))


def response(process: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """
    The matching filter's answer to noise `(C, H, W)`, summed over channels.

    Returns:
        `np.ndarray`: `(H - 2, W - 2)`, 0 everywhere for noise of the same process.
    """
    matching = process.copy()
    matching[:, 2, 2] = -1
    windows = np.lib.stride_tricks.sliding_window_view(signal, (3, 3), axis=(1, 2))
    return np.einsum("chwij,cij->hw", windows, matching)


POISONS = (Poison("ar", "AR", SOURCE, PRESETS, budget, perturb, suits_single_images=True),)
