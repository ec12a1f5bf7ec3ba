"""
Orthogonal projection (Sandoval-Segura et al., NeurIPS 2023; psandovalsegura/learn-from-unlearnable).

A linear classifier without bias is fitted to the protected pixels; its weights are the directions in which the poison
tells the classes apart. The images are then projected onto what is orthogonal to all of them. That takes away a poison
that is the same for a whole class and linearly separable, and little else.

A projected image leaves [0, 1] and has no 8-bit form, so this is a hook that projects the batch, although it is fitted
before training. The authors add strong augmentation, and CutMix in half of the batches.
`"orthogonal-projection+cutmix"` adds ours, which mixes every batch.

The fit goes through the rows in the order given, as published, where that order is random. Ours: rows that are sorted
by class, as folders of classes are, are shuffled first, or a batch would hold few classes.

Test images are not projected, here and there. That is harmless for photographs, of whose variance the ten directions
hold 1 to 2 % (CIFAR-10 under LSP and OPS). Where a linear model can tell the very classes apart, as with digits, they
hold half of it, and the victim fails on whole images.
"""

import itertools

import torch
from torch.nn import functional as F

from ..data import LabelledImages
from . import Context, Countermeasure


EPOCHS = 20
STEPS = (
    980  # those epochs on CIFAR-10; a smaller set is gone through more often, or the classifier would not be fitted
)
BATCH_SIZE = 1024
LEARNING_RATE = 0.1


def fit_linear(images: torch.Tensor, labels: torch.Tensor, num_classes: int, *, seed: int = 0) -> torch.Tensor:
    """
    Weights of a linear classifier without bias, by plain SGD in the order given, as published.

    The first weights matter: their sum over the classes never changes, and starting from zero would leave it to
    rounding, whose direction is that of the mean image.

    Args:
        images (`torch.Tensor`): Float (N, C, H, W) in [0, 1].
        labels (`torch.Tensor`): int64 (N,).
        num_classes (`int`): Rows of the weights.
        seed (`int`, *optional*, defaults to 0): Of the first weights, which are uniform up to the inverse root of the
            number of values.

    Returns:
        `torch.Tensor`: float32 (num_classes, C H W).
    """
    pixels = images.flatten(1)
    batches = list(zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE)))
    steps = max(STEPS, EPOCHS * len(batches))
    draw = torch.Generator().manual_seed(seed)
    first = torch.rand(num_classes, pixels.shape[1], generator=draw).mul(2).sub(1) / pixels.shape[1] ** 0.5
    weights = first.to(pixels.device).requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    for batch, targets in itertools.islice(itertools.cycle(batches), steps):
        optimizer.zero_grad()
        F.cross_entropy(F.linear(batch, weights), targets).backward()
        optimizer.step()
        scheduler.step()
    return weights.detach()


def orthonormal_basis(weights: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span the rows of `weights`: (rows, dimensions)."""
    return torch.linalg.qr(weights.T)[0].T


class OrthogonalProjection:
    """
    Takes the given directions out of each image.

    Args:
        basis (`torch.Tensor`): Float (rank, C H W), orthonormal rows.
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
    images, labels = data.tensor(), torch.from_numpy(data.labels.copy())
    if bool((labels.diff() >= 0).all()):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(context.seed))
        images, labels = images[order], labels[order]
    images, labels = images.to(context.device), labels.to(context.device)
    weights = fit_linear(images, labels, context.num_classes, seed=context.seed)
    return OrthogonalProjection(orthonormal_basis(weights))


COUNTERMEASURES = (
    Countermeasure(
        "orthogonal-projection",
        "hook",
        "Orthogonal projection (Sandoval-Segura et al., NeurIPS 2023; psandovalsegura/learn-from-unlearnable)",
        f"{EPOCHS} epochs of a linear model, then two matrix products per step",
        orthogonal_projection,
        {"epochs": EPOCHS, "least_steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE},
        suits=("supervised",),
        gives="floats",
    ),
)
