"""Orthogonal projection (Sandoval-Segura et al., NeurIPS 2023; psandovalsegura/learn-from-unlearnable).

A linear classifier without bias is fitted to the protected pixels; its weights are the directions in which the poison
tells the classes apart. The images are then projected onto what is orthogonal to all of them. That takes away a poison
that is the same for a whole class and linearly separable, and little else.

A projected image leaves [0, 1] and has no 8-bit form, so this is a hook that projects the batch, although it is fitted
before training. The authors add strong augmentation and CutMix; `"orthogonal-projection+cutmix"` is the latter.
"""

import torch
from torch.nn import functional as F

from jcdp_diffusers.countermeasures import Context, Countermeasure
from jcdp_diffusers.data import LabelledImages


EPOCHS = 20
BATCH_SIZE = 1024
LEARNING_RATE = 0.1
MILESTONES = (10, 15)


def fit_linear(images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights of a linear classifier without bias, by plain SGD in the order given, as published.

    Args:
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        num_classes: rows of the weights.

    Returns:
        float32 (num_classes, C H W). They start at zero, so there is no chance in them.
    """
    pixels = images.flatten(1)
    weights = torch.zeros(num_classes, pixels.shape[1], device=pixels.device, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES)
    for _ in range(EPOCHS):
        for batch, targets in zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE)):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(batch, weights), targets).backward()
            optimizer.step()
        scheduler.step()
    return weights.detach()


def orthonormal_basis(weights: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span the rows of `weights`, (rank, dimensions); rows of zeros add nothing."""
    _, sizes, directions = torch.linalg.svd(weights.double(), full_matrices=False)
    # Weights that started at zero sum to zero over the classes: one of their directions is only rounding.
    return directions[sizes > 1e-6 * sizes.max()].to(weights.dtype)


class OrthogonalProjection:
    """Takes the given directions out of each image.

    Args:
        basis: float (rank, C H W), orthonormal rows.
    """

    def __init__(self, basis: torch.Tensor):
        self.basis = basis

    def before_augmentation(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pixels = (images / 255 if images.dtype == torch.uint8 else images).flatten(1)
        return (pixels - (pixels @ self.basis.T) @ self.basis).reshape(images.shape)


def orthogonal_projection(data: LabelledImages, context: Context) -> OrthogonalProjection:
    """Fits the classifier to the training set, whose labels it needs."""
    if data.labels is None:
        raise ValueError("data has no labels, but orthogonal-projection needs one for every image.")
    labels = torch.from_numpy(data.labels.copy()).to(context.device)
    weights = fit_linear(data.tensor().to(context.device), labels, context.num_classes)
    return OrthogonalProjection(orthonormal_basis(weights))


COUNTERMEASURES = (
    Countermeasure(
        "orthogonal-projection",
        "hook",
        "Orthogonal projection (Sandoval-Segura et al., NeurIPS 2023; psandovalsegura/learn-from-unlearnable)",
        f"{EPOCHS} epochs of a linear model, then two matrix products per step",
        orthogonal_projection,
        {
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "milestones": MILESTONES,
            "initial_weights": 0,
        },
    ),
)
