"""
LSP: linearly separable patches, added to the images of their class.

Points of as many Gaussian clusters as there are classes, far apart, are drawn with scikit-learn's
`make_classification`; each coordinate becomes one square patch of one colour channel, and each point, scaled to a
fixed Euclidean norm, is added to one image of its class, in order. No network takes part.

The paper and most who quote it state a norm of 1.0. The released program, which the published accuracies come from,
uses sqrt((6/255)^2 * 3072) = 1.304 for 32 x 32 colour images. Both are here, as the presets `stated` and
`published`.
"""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from . import Poison


SOURCE = "Yu et al., Availability Attacks Create Shortcuts, KDD 2022; norm as in its released program"


@dataclass(frozen=True)
class LSPSettings:
    """
    Numbers of LSP.

    Args:
        level (`float`): Root mean square of the perturbation over all values of an image, images in [0, 1]; the norm
            is then `level * sqrt(C * H * W)`.
        norm (`float`, *optional*): Euclidean norm, whatever the size of the images; takes the place of `level`.
        patch (`int`, *optional*): Side of a patch in pixels; by default a quarter of the height and 32 at most (8 at
            32, 32 at 224).
        class_sep (`float`): Half the distance between neighbouring clusters, in standard deviations.
    """

    level: float = 6 / 255
    norm: float | None = None
    patch: int | None = None
    class_sep: float = 10.0


PRESETS = {
    "published": LSPSettings(),
    "stated": LSPSettings(norm=1.0),
    "cpu": LSPSettings(),
    "smoke": LSPSettings(),
}


def budget(settings: LSPSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    if settings.norm is not None:
        return {"l2": settings.norm}
    return {"l2": settings.level * sqrt(np.prod(shape))}


def perturb(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: LSPSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """
    See [`Poison`]. It takes seconds on one core, so neither `device` nor `checkpoint_dir` is used.

    Raises:
        ValueError: If the patches do not tile the images, or are too few for the classes.
    """
    from sklearn.datasets import make_classification

    channels, height, width = images.shape[1:]
    patch = settings.patch or max(1, min(height // 4, 32))
    if height % patch or width % patch:
        raise ValueError(
            f"images has {height} x {width} pixels, but must have multiples of the patches' {patch} x {patch} pixels."
        )

    # As many points per class as the largest class has images; for classes of equal size this is the published draw.
    num_classes = int(labels.max()) + 1
    num_features = channels * (height // patch) * (width // patch)
    if num_features < np.log2(num_classes):
        raise ValueError(
            f"labels has {num_classes} classes, but must have at most 2^{num_features} for {num_features} patches."
        )
    points, classes = make_classification(
        n_samples=num_classes * int(labels.bincount().max()),
        n_features=num_features,
        n_informative=num_features,
        n_redundant=0,
        n_repeated=0,
        n_classes=num_classes,
        n_clusters_per_class=1,
        class_sep=settings.class_sep,
        flip_y=0.0,
        random_state=seed,
    )

    norm = budget(settings, (channels, height, width))["l2"]
    perturbation = np.empty(images.shape, dtype=np.float32)
    for label in labels.unique().tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        grids = points[classes == label][: len(rows)].reshape(-1, height // patch, width // patch, channels)
        patterns = grids.repeat(patch, axis=1).repeat(patch, axis=2).transpose(0, 3, 1, 2)
        patterns *= norm / np.sqrt(np.square(patterns).sum(axis=(1, 2, 3), keepdims=True))
        perturbation[rows] = patterns
    return torch.from_numpy(perturbation)


POISONS = (Poison("lsp", "LSP", SOURCE, PRESETS, budget, perturb, suits_single_images=True, needs_whole_patches=True),)
