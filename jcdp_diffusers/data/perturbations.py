"""A perturbation is `poisoned - clean`: applied to 8-bit images with one rounding, and measured on them."""

import numpy as np
import torch


def apply_perturbation(images: np.ndarray, perturbation: torch.Tensor | np.ndarray) -> np.ndarray:
    """Adds a perturbation to 8-bit images: in floating point, clipped to the valid range, rounded once.

    Args:
        images: uint8 `(N, H, W, C)`.
        perturbation: float `(N, C, H, W)`, for images in [0, 1].

    Returns:
        uint8 `(N, H, W, C)`.

    Raises:
        ValueError: if the two do not belong together.
    """
    perturbation = np.asarray(perturbation)
    n, height, width, channels = images.shape
    if images.dtype != np.uint8:
        raise ValueError(f"images has dtype {images.dtype}, but uint8 is needed.")
    if perturbation.shape != (n, channels, height, width):
        raise ValueError(
            f"perturbation has shape {perturbation.shape}, but the images need {(n, channels, height, width)}."
        )
    poisoned = np.empty_like(images)
    for start in range(0, n, 1024):
        rows = slice(start, start + 1024)
        moved = images[rows] + 255.0 * perturbation[rows].transpose(0, 2, 3, 1).astype(np.float64)
        poisoned[rows] = np.rint(moved.clip(0, 255))
    return poisoned


def measured_norms(clean: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """Sizes of a perturbation as published: of the 8-bit images, after clipping and rounding.

    Args:
        clean, poisoned: uint8 `(N, H, W, C)`, in the same order.

    Returns:
        `linf`: largest change of any value, in 1/255; `l2_mean`, `l2_max`: Euclidean norm per image, images in [0, 1];
        `l0_mean`, `l0_max`: pixels changed per image.

    Raises:
        ValueError: if the two arrays differ in shape.
    """
    if clean.shape != poisoned.shape:
        raise ValueError(f"poisoned has shape {poisoned.shape}, but the clean images have {clean.shape}.")
    largest, l2, l0 = 0, [], []
    for start in range(0, len(clean), 1024):
        rows = slice(start, start + 1024)
        change = poisoned[rows].astype(np.int32) - clean[rows]
        largest = max(largest, int(np.abs(change).max()))
        l2.append(np.sqrt(np.square(change).sum(axis=(1, 2, 3))) / 255)
        l0.append((change != 0).any(axis=3).sum(axis=(1, 2)))
    l2, l0 = np.concatenate(l2), np.concatenate(l0)
    return {
        "linf": largest,
        "l2_mean": float(l2.mean()),
        "l2_max": float(l2.max()),
        "l0_mean": float(l0.mean()),
        "l0_max": int(l0.max()),
    }
