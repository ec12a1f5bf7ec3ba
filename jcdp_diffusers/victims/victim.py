"""A victim: a network, a way of learning, and what it has learned, as accuracies on clean test images."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import victims
from ..data import LabelledImages
from ..devices import has_bfloat16
from . import evaluation
from .recipes import Recipe, get_recipe
from .supervised import Supervised
from .training import Hooks, reproducible, train


@dataclass(frozen=True)
class VictimResult:
    """
    What a victim learned. Accuracies are fractions in [0, 1], on test images unless said otherwise.

    Two figures are never mixed: `accuracy` is that after the last epoch, which is what we report; `best_accuracy` is
    the highest after any epoch, which several papers report, and which nobody can reach without choosing the epoch by
    the test labels.

    Args:
        accuracy (`float`): Test accuracy after the last epoch.
        best_accuracy (`float`): Highest test accuracy after any epoch.
        train_accuracy (`float`, *optional*): Accuracy on the training images as given, without augmentation, after the
            last epoch; None for a method that does not learn their labels.
        per_class_accuracy (`np.ndarray`): float64 (num_classes,), after the last epoch, NaN for a class without
            images.
        confusion (`np.ndarray`): int64 (num_classes, num_classes), test images of class row that were called class
            column.
        history (`tuple` of `dict`): One entry per epoch: `epoch` (from 1), `learning_rate` (at its start),
            `train_loss` (mean over its steps), `test_accuracy`, `seconds` (since the start).
        seconds (`float`): For training and all evaluations.
        settings (`dict`): What was asked for and what it ran as, ready for a record.
        model (`nn.Module`): The trained network, in eval mode, on the device.
    """

    accuracy: float
    best_accuracy: float
    train_accuracy: float | None
    per_class_accuracy: np.ndarray
    confusion: np.ndarray
    history: tuple[dict[str, float], ...]
    seconds: float
    settings: dict[str, Any]
    model: nn.Module = field(repr=False)


def train_victim(
    train: LabelledImages,
    test: LabelledImages,
    *,
    victim: str = "resnet18",
    method: str = "supervised",
    width: int | None = None,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_classes: int | None = None,
    hooks: Sequence[Any] = (),
    progress: Callable[[dict[str, float]], None] | None = None,
    checkpoint_dir: str | Path | None = None,
) -> VictimResult:
    """
    Train a victim from scratch and score it.

    Equal arguments give equal weights on one machine with one number of threads; the global random state is left as it
    was.

    Args:
        train ([`LabelledImages`]): The training set, clean, protected or purified.
        test ([`LabelledImages`]): Clean images of the same classes and size.
        victim (`str`, defaults to `"resnet18"`): Name of the network, one of `jcdp_diffusers.victims.NAMES`.
        method (`str`, defaults to `"supervised"`): How it learns, one of `jcdp_diffusers.victims.METHODS`.
        width (`int`, *optional*): The network's width; by default the recipe's.
        recipe (`str` or [`Recipe`], defaults to `"fast"`): A name from `RECIPES`, or a recipe.
        seed (`int`, defaults to 0): Of the initial weights, the order of the images, the augmentation and the hooks.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs; the whole training set is kept there as
            uint8.
        num_classes (`int`, *optional*): By default the number of class names, or the highest label plus one where
            there are none.
        hooks (`Sequence`, *optional*): Countermeasures while training; see [`training`].
        progress (`Callable`, *optional*): Called with each entry of the history as soon as it is there.
        checkpoint_dir (`str` or `Path`, *optional*): Folder in which the training is kept after each epoch, so that
            the same call goes on where it was cut off. Each training needs a folder of its own.

    Returns:
        [`VictimResult`]: The accuracies that the method knows; the others are None.

    Raises:
        ValueError: If a set has no labels or one beyond `num_classes`, the two sets differ in classes or in the shape
            of their images, a name is unknown, or `checkpoint_dir` holds another training.
        FloatingPointError: If the loss is no longer finite.
    """
    if method not in victims.METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(victims.METHODS)}.")
    recipe = get_recipe(recipe).for_images(len(train))
    _check_pair(train, test)
    num_classes = _check_labels(train, test, num_classes)
    device = torch.device(device)
    width = recipe.width if width is None else width
    start = time.perf_counter()
    with reproducible(seed, device):
        model = victims.get(victim)(num_classes, in_channels=train.images.shape[-1], width=width)
    figures = _supervised(model, train, test, num_classes, recipe, seed, device, hooks, progress, checkpoint_dir)
    return VictimResult(
        **figures,
        seconds=time.perf_counter() - start,
        settings={
            "victim": victim,
            "method": method,
            "width": width,
            "num_classes": num_classes,
            "train_images": len(train),
            "test_images": len(test),
            "recipe": asdict(recipe),
            "hooks": [type(hook).__name__ for hook in hooks],
            "precision": "bfloat16" if recipe.bfloat16 and has_bfloat16(device) else "float32",
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "smoke": recipe.smoke,
        },
        model=model,
    )


def _supervised(
    model: nn.Module,
    train_set: LabelledImages,
    test_set: LabelledImages,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    hooks: Sequence[Any],
    progress: Callable[[dict[str, float]], None] | None,
    checkpoint_dir: str | Path | None,
) -> dict[str, Any]:
    """Train by cross-entropy; the fields of [`VictimResult`] that follow."""
    hooks = Hooks(hooks, seed=seed, device=device)
    images, labels = _on_device(train_set, device)
    test_images, test_labels = _on_device(test_set, device)
    confusions = []

    def confusion_of_test() -> np.ndarray:
        return evaluation.confusion_matrix(model, test_images, test_labels, num_classes, bfloat16=recipe.bfloat16)

    def evaluate() -> dict[str, float]:
        confusions.append(confusion_of_test())
        return {"test_accuracy": evaluation.accuracy(confusions[-1])}

    history = train(
        Supervised(model, recipe, hooks),
        images,
        labels,
        recipe=recipe,
        seed=seed,
        device=device,
        hooks=hooks,
        evaluate=evaluate,
        progress=progress,
        checkpoint_dir=checkpoint_dir,
    )
    # A training that a checkpoint shows to be complete evaluates nothing.
    confusion = confusions[-1] if confusions else confusion_of_test()
    on_train = evaluation.confusion_matrix(model, images, labels, num_classes, bfloat16=recipe.bfloat16)
    return {
        "accuracy": history[-1]["test_accuracy"],
        "best_accuracy": max(entry["test_accuracy"] for entry in history),
        "train_accuracy": evaluation.accuracy(on_train),
        "per_class_accuracy": evaluation.per_class_accuracy(confusion),
        "confusion": confusion,
        "history": tuple(history),
    }


def _on_device(data: LabelledImages, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,)."""
    # Copied, because arrays may be read-only, which torch does not know.
    images = torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(data.labels.copy()).to(device)


def _check_pair(train: LabelledImages, test: LabelledImages) -> None:
    for name, data in (("train", train), ("test", test)):
        if data.labels is None:
            raise ValueError(f"{name} has no labels, but must have one per image for a supervised victim.")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"train has images of shape {_shape(train)} and test of {_shape(test)}, but both must be of one shape."
        )


def _shape(data: LabelledImages) -> str:
    return "x".join(str(size) for size in data.images.shape[1:])


def _check_labels(train: LabelledImages, test: LabelledImages, num_classes: int | None) -> int:
    """The number of classes, once the labels are known to suit it and each other."""
    if train.class_names and test.class_names and train.class_names != test.class_names:
        raise ValueError(
            f"train names its classes {_few(train.class_names)} and test {_few(test.class_names)}, "
            "but both must name the same classes in the same order."
        )
    names = train.class_names or test.class_names
    if num_classes is None:
        num_classes = len(names) if names else int(max(train.labels.max(), test.labels.max())) + 1
    for name, data in (("train", train), ("test", test)):
        if data.labels.max() >= num_classes:
            raise ValueError(
                f"{name} has label {data.labels.max()}, but num_classes {num_classes} ends at {num_classes - 1}."
            )
    for name, data, other_name, other in (("test", test, "train", train), ("train", train, "test", test)):
        missing = sorted(set(data.labels.tolist()) - set(other.labels.tolist()))
        if missing:
            raise ValueError(
                f"{name} has images of class {_few(missing)}, but {other_name} has none; "
                "both must hold the same classes."
            )
    return num_classes


def _few(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return shown + (f" and {len(items) - 5} more" if len(items) > 5 else "")
