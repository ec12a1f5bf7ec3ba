"""A victim: a network, a way of learning, and what it has learned, as accuracies on clean test images."""

import itertools
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
from . import evaluation, finetuning
from .checkpoints import kept_seconds
from .finetuning import Weights
from .networks import last_layer
from .recipes import ContrastiveRecipe, Recipe, get_recipe
from .supervised import supervised_objective
from .training import Hooks, Objective, reproducible, train


PROBE_FOLDER = "probe"  # within a victim's checkpoints


@dataclass(frozen=True)
class VictimResult:
    """
    What a victim learned. Accuracies are fractions in [0, 1], on test images unless said otherwise.

    Two figures are never mixed: `accuracy` is that after the last epoch, which is what we report; `best_accuracy` is
    the highest after any epoch, which several papers report, and which nobody can reach without choosing the epoch by
    the test labels. A method without labels learns features; its accuracies are those of a linear probe on them.

    Args:
        accuracy (`float`): Test accuracy after the last epoch.
        best_accuracy (`float`, *optional*): Highest test accuracy after any epoch, of a method without labels after
            any epoch of the probe; None for a probe without epochs.
        train_accuracy (`float`, *optional*): Accuracy on the training images as given, without augmentation, after the
            last epoch; None for a method that does not learn their labels.
        knn_accuracy (`float`, *optional*): Test accuracy by the 200 nearest probe images, after the last epoch; None
            for `"supervised"`.
        per_class_accuracy (`np.ndarray`): float64 (num_classes,), after the last epoch, NaN for a class without
            images.
        confusion (`np.ndarray`): int64 (num_classes, num_classes), test images of class row that were called class
            column.
        history (`tuple` of `dict`): One entry per epoch: `epoch` (from 1), `learning_rate` (at its start),
            `train_loss` (mean over its steps), `test_accuracy` (or, after some epochs, `knn_accuracy`), and `seconds`
            (since the start).
        seconds (`float`): For training and all evaluations, of a training that was cut off those before included.
        settings (`dict`): What was asked for and what it ran as, ready for a record.
        model (`nn.Module`): The trained network, in eval mode, on the device. Its last layer is the probe's where
            labels were not learned.
    """

    accuracy: float
    best_accuracy: float | None
    train_accuracy: float | None
    knn_accuracy: float | None
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
    probe: LabelledImages | None = None,
    width: int | None = None,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_classes: int | None = None,
    hooks: Sequence[Any] = (),
    whitening: LabelledImages | None = None,
    init_from: Weights | None = None,
    finetune: str = "all",
    progress: Callable[[dict[str, float]], None] | None = None,
    checkpoint_dir: str | Path | None = None,
) -> VictimResult:
    """
    Train a victim from scratch, or from pretrained weights, and score it.

    Equal arguments give equal weights on one machine with one number of threads.

    Args:
        train ([`LabelledImages`]): The training set, clean, protected or purified.
        test ([`LabelledImages`]): Clean images of the same classes and size.
        victim (`str`, defaults to `"resnet18"`): Name of the network, one of `jcdp_diffusers.victims.NAMES`.
        method (`str`, defaults to `"supervised"`): How it learns, one of `jcdp_diffusers.victims.METHODS`.
        probe ([`LabelledImages`], *optional*): For a method without labels, the labelled images that its features are
            probed with: clean ones as a rule, of the classes and size of `test`. `train` needs no labels then.
        width (`int`, *optional*): The network's width; by default the recipe's.
        recipe (`str` or [`Recipe`], defaults to `"fast"`): A name from `recipes_of(method)`, or a recipe.
        seed (`int`, defaults to 0): Of the initial weights, the order of the images, the augmentation and the hooks.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs, with the whole training set as uint8.
        num_classes (`int`, *optional*): By default the number of class names, or the highest label plus one where
            there are none.
        hooks (`Sequence`, *optional*): Countermeasures while training; see [`training`].
        whitening ([`LabelledImages`], *optional*): For `"convnet94"`, the images whose patches its first layer
            whitens, such as clean collected ones; the training images by default.
        init_from ([`Weights`], *optional*): Of a pretrained network, to start from; the last layer is new, and the
            learning rate a tenth of the recipe's. See [`finetuning`].
        finetune (`str`, defaults to `"all"`): Of a pretrained network, what is trained: `"all"`, or `"upper"` stages.
        progress (`Callable`, *optional*): Called with each entry of the history as soon as it is there.
        checkpoint_dir (`str` or `Path`, *optional*): Folder in which the training is kept after each epoch, so that
            the same call goes on where it was cut off. Each training needs a folder of its own.

    Returns:
        [`VictimResult`]: The accuracies that the method knows; the others are None.

    Raises:
        ValueError: If a set has no labels or one beyond `num_classes`, sets differ in classes or in the shape of their
            images, a name is unknown, a set is too small for the recipe, weights do not fit the network, or
            `checkpoint_dir` holds another training.
        FloatingPointError: If the loss is no longer finite.
    """
    if method not in victims.METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(victims.METHODS)}.")
    recipe = get_recipe(recipe, method).for_images(len(train))
    options = {"victim": victim, "method": method, "probe": probe, "recipe": recipe, "num_classes": num_classes}
    num_classes = check_victim(train, test, **options)
    _check_whitening(victim, train, whitening)
    _check_start(init_from, finetune, method, whitening)
    device = torch.device(device)
    width = recipe.width if width is None else width
    start = time.perf_counter() - _seconds_before(checkpoint_dir)
    with reproducible(seed, device):
        height, side, channels = train.images.shape[1:]
        model = victims.build(victim, num_classes, in_channels=channels, width=width, image_size=min(height, side))
    if init_from is not None:
        recipe = finetuning.finetuning_recipe(recipe)
        finetuning.start_from(model, init_from, victim, train.images.shape[1:], finetune)
    elif hasattr(model, "whiten"):
        model.to(device).whiten(_on_device(train if whitening is None else whitening, device)[0])
    training = Training(train, probe, test, num_classes, recipe, seed, device, hooks, progress, checkpoint_dir)
    figures = training.supervised(model) if method == "supervised" else training.contrastive(model)
    settings = training.settings() | {"victim": victim, "method": method, "width": width}
    settings |= _counts(whitening=whitening) | _start_settings(init_from, finetune)
    return VictimResult(**figures, seconds=time.perf_counter() - start, settings=settings, model=model)


def _seconds_before(checkpoint_dir: str | Path | None) -> float:
    """Seconds of training and probe before they were cut off."""
    if checkpoint_dir is None:
        return 0.0
    return kept_seconds(checkpoint_dir) + kept_seconds(Path(checkpoint_dir) / PROBE_FOLDER)


def _start_settings(init_from: Weights | None, finetune: str) -> dict[str, Any]:
    """What a record says of the first weights."""
    if init_from is None:
        return {"init_from": None, "finetune": None}
    return {"init_from": init_from.digest, "finetune": finetune} | finetuning.normalisation_facts(init_from)


def _counts(**sets: LabelledImages | None) -> dict[str, int]:
    return {f"{role}_images": len(data) for role, data in sets.items() if data is not None}


def check_victim(
    train: LabelledImages,
    test: LabelledImages,
    *,
    victim: str,
    method: str,
    probe: LabelledImages | None,
    recipe: Recipe,
    num_classes: int | None = None,
) -> int:
    """
    Refuse sets that do not suit each other, the network or the way of learning, before any costly work.

    Args:
        As for [`train_victim`].

    Returns:
        `int`: The number of classes.

    Raises:
        ValueError: In one sentence that begins with the set.
    """
    sets = {"train": train, "probe": probe, "test": test}
    if method == "supervised":
        if probe is not None:
            raise ValueError(f"probe has {len(probe)} images, but must be None for method 'supervised'.")
        del sets["probe"]
    elif probe is None:
        raise ValueError(f"probe is None, but must be labelled images for method {method!r}.")
    _check_shapes(sets)
    victims.check_sides(victim, *train.images.shape[1:3])
    if method != "supervised":
        from .contrastive import check_size

        check_size(train.images.shape[1:3])
        _check_sizes(train, recipe)
        del sets["train"]  # its labels are not used
    num_classes = _check_labels(sets, num_classes)
    if probe is not None and len(np.unique(probe.labels)) < 2:
        raise ValueError(
            f"probe has labels of class {probe.labels[0]} alone, but must have those of at least 2 classes."
        )
    return num_classes


@dataclass(frozen=True)
class Training:
    """
    One victim's training and its figures: the fields of [`VictimResult`] that depend on the method.

    Args:
        As for [`train_victim`], complete and checked.
    """

    train: LabelledImages
    probe: LabelledImages | None
    test: LabelledImages
    num_classes: int
    recipe: Recipe
    seed: int
    device: torch.device
    hooks: Sequence[Any]
    progress: Callable[[dict[str, float]], None] | None
    checkpoint_dir: str | Path | None

    def settings(self) -> dict[str, Any]:
        """What was asked for and what it runs as, for a record."""
        return {
            "num_classes": self.num_classes,
            **_counts(train=self.train, test=self.test, probe=self.probe),
            "recipe": asdict(self.recipe),
            "hooks": [type(hook).__name__ for hook in self.hooks],
            "precision": "bfloat16" if self.recipe.bfloat16 and has_bfloat16(self.device) else "float32",
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "smoke": self.recipe.smoke,
        }

    def supervised(self, model: nn.Module) -> dict[str, Any]:
        """Cross-entropy, scored after each epoch."""
        images, labels = _on_device(self.train, self.device)
        objective = supervised_objective(model, self.recipe, self.hooks, len(images), self.seed, self.device)
        test = _on_device(self.test, self.device)
        confusions = []

        def evaluate(epoch: int) -> dict[str, float]:
            confusions.append(self._confusion(model, *test))
            return {"test_accuracy": evaluation.accuracy(confusions[-1])}

        history = self._run(objective, images, labels, evaluate, test)
        # A training that a checkpoint shows to be complete evaluates nothing.
        confusion = confusions[-1] if confusions else self._confusion(model, *test)
        return {
            "accuracy": history[-1]["test_accuracy"],
            "best_accuracy": max(entry["test_accuracy"] for entry in history),
            "train_accuracy": evaluation.accuracy(self._confusion(model, images, labels)),
            "knn_accuracy": None,
            "per_class_accuracy": evaluation.per_class_accuracy(confusion),
            "confusion": confusion,
            "history": tuple(history),
        }

    def contrastive(self, model: nn.Module) -> dict[str, Any]:
        """Learn without labels, then probe the features."""
        from .contrastive import METHODS
        from .linear_probe import fit_probe, knn_accuracy

        recipe = self.recipe
        hooks = Hooks(self.hooks, seed=self.seed, device=self.device)
        with reproducible(self.seed, self.device):
            objective = METHODS[recipe.method](model, recipe, self.train.images.shape[1:3], hooks)
        images, _ = _on_device(self.train, self.device)
        probe, test = _on_device(self.probe, self.device), _on_device(self.test, self.device)
        interval = max(1, recipe.epochs // recipe.knn_evaluations)

        def evaluate(epoch: int) -> dict[str, float]:
            if epoch % interval and epoch < recipe.epochs:
                return {}
            features = [evaluation.features(model, part[0], bfloat16=recipe.bfloat16) for part in (probe, test)]
            return {"knn_accuracy": knn_accuracy(features[0], probe[1], features[1], test[1])}

        targets = getattr(hooks.replacing_loss, "targets", None)
        history = self._run(objective, images, targets, evaluate, (*probe, *test))
        best = fit_probe(
            model,
            *probe,
            *test,
            probe=recipe.probe,
            bfloat16=recipe.bfloat16,
            seed=self.seed,
            checkpoint_dir=None if self.checkpoint_dir is None else Path(self.checkpoint_dir) / PROBE_FOLDER,
        )
        confusion = self._confusion_of_probe(model, *test)
        return {
            "accuracy": evaluation.accuracy(confusion),
            "best_accuracy": best,
            "train_accuracy": None,
            "knn_accuracy": history[-1]["knn_accuracy"],
            "per_class_accuracy": evaluation.per_class_accuracy(confusion),
            "confusion": confusion,
            "history": tuple(history),
        }

    def _confusion(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        return evaluation.confusion_matrix(model, images, labels, self.num_classes, bfloat16=self.recipe.bfloat16)

    @torch.no_grad()
    def _confusion_of_probe(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """With the last layer in float32, in which it was fitted and its best epoch was found."""
        features = evaluation.features(model, images, bfloat16=self.recipe.bfloat16)
        return evaluation.count_confusion(last_layer(model)(features).argmax(dim=1), labels, self.num_classes)

    def _run(
        self,
        objective: Objective,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        evaluate: Callable[[int], dict[str, float]],
        evaluated: Sequence[torch.Tensor],
    ) -> list[dict[str, float]]:
        return train(
            objective,
            images,
            labels,
            recipe=self.recipe,
            seed=self.seed,
            device=self.device,
            hooks=objective.hooks,
            evaluate=evaluate,
            evaluated=evaluated,
            progress=self.progress,
            checkpoint_dir=self.checkpoint_dir,
        )


def _on_device(data: LabelledImages, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images uint8 (N, C, H, W) and labels int64 (N,), where there are labels."""
    # Copied, because arrays may be read-only, which torch does not know.
    images = torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2).to(device)
    return images, None if data.labels is None else torch.from_numpy(data.labels.copy()).to(device)


def _check_shapes(sets: dict[str, LabelledImages]) -> None:
    for name, data in sets.items():
        if data.images.shape[1:] != sets["test"].images.shape[1:]:
            raise ValueError(
                f"{name} has images of shape {_shape(data)}, but must have those of test, {_shape(sets['test'])}."
            )


def _check_whitening(victim: str, train_set: LabelledImages, whitening: LabelledImages | None) -> None:
    if whitening is None:
        return
    if not hasattr(victims.get(victim), "whiten"):
        raise ValueError(f"whitening has {len(whitening)} images, but must be None for victim {victim!r}.")
    if whitening.images.shape[3] != train_set.images.shape[3]:
        raise ValueError(
            f"whitening has images of {whitening.images.shape[3]} channels, but must have those of train, "
            f"{train_set.images.shape[3]}."
        )


def _check_start(init_from: Weights | None, finetune: str, method: str, whitening: LabelledImages | None) -> None:
    """Refuse what does not go with pretrained weights, or what goes with them alone."""
    if init_from is None:
        if finetune != "all":
            raise ValueError(f"finetune is {finetune!r}, but must be 'all' where init_from is None.")
        return
    if finetune not in finetuning.FINETUNE:
        raise ValueError(f"finetune is {finetune!r}, but must be one of {', '.join(finetuning.FINETUNE)}.")
    if method != "supervised":
        raise ValueError(f"init_from is {init_from.name!r}, but must be None for method {method!r}.")
    if whitening is not None:
        raise ValueError(
            f"whitening has {len(whitening)} images, but must be None with init_from: the pretrained network has its "
            "own first layer."
        )


def _shape(data: LabelledImages) -> str:
    return "x".join(str(size) for size in data.images.shape[1:])


def _check_sizes(train_set: LabelledImages, recipe: ContrastiveRecipe) -> None:
    """A batch must be full, and a queue must not hold keys of the images in the batch."""
    for name in ("batch_size", "queue"):
        needed = getattr(recipe, name) or 0
        if len(train_set) < needed:
            raise ValueError(
                f"train has {len(train_set)} images, but must have at least {needed}, the {name} of recipe "
                f"{recipe.name!r}."
            )


def _check_labels(sets: dict[str, LabelledImages], num_classes: int | None) -> int:
    """The number of classes, once the labels of two sets are known to suit it and each other."""
    for name, data in sets.items():
        if data.labels is None:
            raise ValueError(f"{name} has no labels, but must have one per image.")
    (name, data), (other_name, other) = sets.items()
    if data.class_names and other.class_names and data.class_names != other.class_names:
        raise ValueError(
            f"{name} names its classes {_few(data.class_names)}, but must name those of {other_name} in the same "
            f"order, {_few(other.class_names)}."
        )
    names = data.class_names or other.class_names
    if num_classes is None:
        num_classes = len(names) if names else int(max(data.labels.max(), other.labels.max())) + 1
    for name, data in sets.items():
        if data.labels.max() >= num_classes:
            raise ValueError(
                f"{name} has label {data.labels.max()}, but must have labels below num_classes {num_classes}."
            )
    for (name, data), (other_name, other) in itertools.permutations(sets.items()):
        missing = sorted(set(data.labels.tolist()) - set(other.labels.tolist()))
        if missing:
            raise ValueError(
                f"{name} has images of class {_few(missing)}, but must hold the classes of {other_name}, which has "
                "none of them."
            )
    return num_classes


def _few(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return shown + (f" and {len(items) - 5} more" if len(items) > 5 else "")
