"""Logits, confusion of classes and accuracy of a trained network. Images are never altered here."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .training import autocast, network_input


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, *, batch_size: int = 500, bfloat16: bool = False) -> torch.Tensor:
    """
    Apply a network, in eval mode, to images of any number.

    Args:
        model (`nn.Module`): Maps images (B, C, H, W) in [0, 1] to logits. Its mode is restored afterwards.
        images (`torch.Tensor`): uint8 (N, C, H, W), or floating point in [0, 1], on any device; they are moved batch
            by batch.
        batch_size (`int`, defaults to 500): Images at a time.
        bfloat16 (`bool`, defaults to `False`): Whether convolutions run in bfloat16, where the device has instructions
            for it.

    Returns:
        `torch.Tensor`: float32 logits (N, num_classes), on the model's device.
    """
    return _apply(model, model, images, batch_size, bfloat16)


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor, *, batch_size: int = 500, bfloat16: bool = False) -> torch.Tensor:
    """
    The features of images of any number, in eval mode.

    Args:
        model (`nn.Module`): Has `features(images)`.
        images (`torch.Tensor`), batch_size (`int`), bfloat16 (`bool`): As for [`predict`].

    Returns:
        `torch.Tensor`: float32 (N, num_features), on the model's device.
    """
    return _apply(model, model.features, images, batch_size, bfloat16)


def _apply(
    model: nn.Module,
    function: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    batch_size: int,
    bfloat16: bool,
) -> torch.Tensor:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with autocast(bfloat16, device):
        values = [function(network_input(batch.to(device))).float() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(values)


def confusion_matrix(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int, *, bfloat16: bool = False
) -> np.ndarray:
    """
    Count the images of each class that the network calls each class.

    Args:
        model (`nn.Module`), images (`torch.Tensor`), bfloat16 (`bool`): As for [`predict`].
        labels (`torch.Tensor`): int64 (N,), on any device.
        num_classes (`int`): Rows and columns.

    Returns:
        `np.ndarray`: int64 (num_classes, num_classes): images of class row that the network calls class column.
    """
    return count_confusion(predict(model, images, bfloat16=bfloat16).argmax(dim=1), labels, num_classes)


def count_confusion(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> np.ndarray:
    """The matrix of [`confusion_matrix`] from predicted classes int64 (N,) and labels int64 (N,)."""
    pair = labels.to(predicted.device) * num_classes + predicted
    return torch.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes).cpu().numpy()


def accuracy(confusion: np.ndarray) -> float:
    """The fraction of all images that are called what they are, in [0, 1]."""
    return float(np.trace(confusion) / confusion.sum())


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """float64 (num_classes,): the fraction of each class that is called so, NaN for a class without images."""
    count = confusion.sum(axis=1)
    return np.divide(np.diag(confusion), count, out=np.full(len(count), np.nan), where=count > 0)
