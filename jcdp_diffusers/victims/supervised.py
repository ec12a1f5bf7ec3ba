"""Supervised victims: train a classifier on a data set by a named recipe and score it on clean test images.

Images enter the network in [0, 1] without subtracting a mean or dividing by a deviation: that is what the repositories
of EMN, ISS, LSP, AVATAR and APBench do, and a perturbation of 8/255 means the same everywhere only if nobody rescales
it. Test images are never altered.

Two figures describe a victim and are never mixed: `accuracy` is the test accuracy after the last epoch, which is what
we report; `best_accuracy` is the highest test accuracy after any epoch, which several papers report, and which nobody
can reach without choosing the epoch by the test labels.

**Countermeasures while training** are hooks: plain objects with one or more of these methods, called in the order
given.

    start_epoch(epoch, epochs)                               # epoch counts from 0
    epoch_images(epoch, images) -> images                    # the whole set of this epoch: uint8 (N, C, H, W)
    before_augmentation(images, generator) -> images         # (B, C, H, W) as stored: uint8, or float if so given
    before_forward(images, labels, generator) -> images, labels    # after crop and flip: float in [0, 1]
    loss(model, images, labels, generator) -> scalar loss    # instead of the cross-entropy; one hook at most has it

Labels are class indices (B,) int64, or, once a hook has mixed them, probabilities (B, num_classes); a `loss` receives
what the hooks before it left. Randomness comes from `generator`, which lives on the images' device and belongs to the
hooks alone, so that a victim with hooks sees the same batches, crops and flips as one without. What is done to each
image once, before training (grey, JPEG, bit depth), is no hook: do it to the data set. For example, Mixup (Zhang et
al., ICLR 2018) within the batch:

    class Mixup:
        def __init__(self, num_classes):
            self.num_classes = num_classes

        def before_forward(self, images, labels, generator):
            partner = torch.randperm(len(images), generator=generator, device=images.device)
            weight = torch.rand(1, generator=generator, device=images.device)      # Beta(1, 1) is uniform
            labels = torch.nn.functional.one_hot(labels, self.num_classes).float()
            return weight * images + (1 - weight) * images[partner], weight * labels + (1 - weight) * labels[partner]

    train_victim(train, test, hooks=[Mixup(num_classes=10)])
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .. import victims
from ..data import LabelledImages
from ..devices import has_bfloat16, seeded


SCHEDULES = ("steps", "cosine", "one_cycle")
HOOK_METHODS = ("start_epoch", "epoch_images", "before_augmentation", "before_forward", "loss")


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained: SGD with momentum and cross-entropy, and what is below.

    A variant for another data set is `dataclasses.replace(RECIPES["apbench"], flip=False, crop_padding=0)`.

    Args:
        name: what records call it.
        epochs: passes over the training set.
        batch_size: images per step; None for what suits the training set, see `for_images`.
        learning_rate: the highest learning rate; where `batch_size` is None, that of 256 images per step.
        schedule: `"steps"` (multiplied by `gamma` at each of `milestones`), `"cosine"` (from `learning_rate` to 0,
            changed once an epoch), or `"one_cycle"` (rises and falls once, changed at every step; Smith and Topin).
        milestones: epochs, counted from 0, at whose start the learning rate is multiplied by `gamma`.
        gamma: the factor of `"steps"`.
        warmup: the share of all steps in which `"one_cycle"` rises.
        momentum: of SGD.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: of SGD, on every parameter.
        clip_norm: largest L2 norm of the whole gradient, or None.
        crop_padding: zero pixels added on each side before a random crop of the original size; 0 for no crop.
        flip: whether an image is mirrored left to right with probability 1/2.
        bfloat16: whether convolutions run in bfloat16 by autocast, where the device has instructions for it.
        width: the victim's width unless the caller gives one.
        max_steps_per_epoch: ends an epoch early. Only a smoke run sets it.
        smoke: whether this is a first try in seconds, whose figures mean nothing.
    """

    name: str
    epochs: int
    batch_size: int | None = 128
    learning_rate: float = 0.1
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    crop_padding: int = 4
    flip: bool = True
    bfloat16: bool = False
    width: int = 64
    max_steps_per_epoch: int | None = None
    smoke: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, but accepted are {', '.join(SCHEDULES)}.")
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, but a recipe needs at least 1.")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}, but batch normalisation needs at least 2 images.")

    def for_images(self, count: int) -> "Recipe":
        """The recipe with the batch size that it has for a training set of `count` images.

        Where `batch_size` is None, that is 256 images, halved down to 32 until an epoch has 150 steps, as it has for
        40,000 images; the learning rate falls with the batch's square root (Krizhevsky, 2014). Without that, a victim
        of a few thousand images ends before it has learned them, purified ones above all (docs/results.md).
        """
        if self.batch_size is not None:
            return self
        batch_size = 256
        while batch_size > 32 and count < 150 * batch_size:
            batch_size //= 2
        learning_rate = round(self.learning_rate * (batch_size / 256) ** 0.5, 4)
        return replace(self, batch_size=batch_size, learning_rate=learning_rate)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # BridgePure (NeurIPS 2025) and AVATAR (SaTML 2024).
        Recipe("bridgepure", epochs=120, schedule="steps", milestones=(80, 100)),
        # Image shortcut squeezing (ICML 2023).
        Recipe("iss", epochs=60),
        # Error-minimising noise (ICLR 2021), CIFAR-10.
        Recipe("emn", epochs=60, clip_norm=5.0),
        # APBench; its second and third steps, at epochs 200 and 300, lie beyond its 200 epochs.
        Recipe("apbench", epochs=200, batch_size=256, schedule="steps", milestones=(100,), gamma=0.5),
        # Ours: the same network in a quarter of the epochs.
        Recipe("fast", epochs=30, batch_size=None, learning_rate=0.2, schedule="one_cycle", bfloat16=True),
        # Ours: CIFAR-10 on a CPU. Batches are small because 15 epochs of 10,000 images are few steps with large ones;
        # chosen on validation images.
        Recipe("mini", epochs=15, batch_size=32, learning_rate=0.05, schedule="one_cycle", bfloat16=True, width=16),
        # Ours: digits, which neither shifts nor mirroring leave what they are; small sets, so small batches.
        Recipe(
            "digits",
            epochs=12,
            batch_size=32,
            learning_rate=0.05,
            schedule="one_cycle",
            crop_padding=0,
            flip=False,
            bfloat16=True,
            width=16,
        ),
        Recipe("smoke", epochs=2, batch_size=64, schedule="one_cycle", width=8, max_steps_per_epoch=20, smoke=True),
    )
}


@dataclass(frozen=True)
class VictimResult:
    """What a victim learned; accuracies are shares in [0, 1].

    Args:
        accuracy: test accuracy after the last epoch.
        best_accuracy: highest test accuracy after any epoch.
        train_accuracy: accuracy on the training images as given, without augmentation, after the last epoch.
        per_class_accuracy: float64 (num_classes,), test accuracy after the last epoch, NaN for a class without images.
        confusion: int64 (num_classes, num_classes), test images of class row that were called class column.
        history: one entry per epoch: `epoch` (from 1), `learning_rate` (at its start), `train_loss` (mean over its
            steps), `test_accuracy`, `seconds` (since the start).
        seconds: for training and all evaluations.
        settings: what was asked for and what it ran as, ready for a record.
        model: the trained network, in eval mode, on the device.
    """

    accuracy: float
    best_accuracy: float
    train_accuracy: float
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
    width: int | None = None,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_classes: int | None = None,
    hooks: Sequence[Any] = (),
    progress: Callable[[dict[str, float]], None] | None = None,
) -> VictimResult:
    """Trains a victim from scratch and scores it.

    Equal arguments give equal weights on one machine with one number of threads; the global random state is left as it
    was.

    Args:
        train: the training set, clean, protected or purified.
        test: clean images of the same classes and size.
        victim: name of the network, one of `jcdp_diffusers.victims.NAMES`.
        width: the network's width; by default the recipe's.
        recipe: a name from `RECIPES`, or a `Recipe`.
        seed: of the initial weights, the order of the images, the augmentation and the hooks.
        device: where it runs; the whole training set is kept there as uint8.
        num_classes: by default the number of class names, or the highest label plus one where there are none.
        hooks: countermeasures while training; see the module's description.
        progress: called with each entry of the history as soon as it is there.

    Raises:
        ValueError: if a set has no labels or one beyond `num_classes`, the two sets differ in classes or in the shape
            of their images, or a name is unknown.
        FloatingPointError: if the loss is no longer finite.
    """
    recipe = _recipe(recipe).for_images(len(train))
    _check_pair(train, test)
    num_classes = _check_labels(train, test, num_classes)
    device = torch.device(device)
    width = recipe.width if width is None else width
    build = victims.get(victim)
    with _reproducible(seed, device):
        model = build(num_classes, in_channels=train.images.shape[-1], width=width)

    train_images, train_labels = _on_device(train, device)
    test_images, test_labels = _on_device(test, device)
    history = []
    confusion = None
    start = time.perf_counter()

    def after_epoch(entry: dict[str, float]) -> None:
        nonlocal confusion
        confusion = confusion_matrix(model, test_images, test_labels, num_classes, bfloat16=recipe.bfloat16)
        history.append(entry | {"test_accuracy": _accuracy(confusion), "seconds": time.perf_counter() - start})
        if progress is not None:
            progress(history[-1])

    train_model(
        model,
        train_images,
        train_labels,
        recipe=recipe,
        seed=seed,
        device=device,
        hooks=hooks,
        after_epoch=after_epoch,
    )
    train_accuracy = _accuracy(
        confusion_matrix(model, train_images, train_labels, num_classes, bfloat16=recipe.bfloat16)
    )
    return VictimResult(
        accuracy=history[-1]["test_accuracy"],
        best_accuracy=max(entry["test_accuracy"] for entry in history),
        train_accuracy=train_accuracy,
        per_class_accuracy=_per_class(confusion),
        confusion=confusion,
        history=tuple(history),
        seconds=time.perf_counter() - start,
        settings={
            "victim": victim,
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


def train_model(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    device: str | torch.device = "cpu",
    hooks: Sequence[Any] = (),
    after_epoch: Callable[[dict[str, float]], None] | None = None,
) -> nn.Module:
    """Trains a network in place, by the loop that victims and the surrogates of poisons share.

    Args:
        model: maps images (B, C, H, W) in [0, 1] to logits; it is moved to the device and to channels-last layout.
        images: uint8 (N, C, H, W), or floating point in [0, 1].
        labels: int64 (N,).
        recipe: a name from `RECIPES`, or a `Recipe`.
        seed: of the order of the images, the augmentation and the hooks. The weights are the caller's business.
        device: where it runs.
        hooks: countermeasures while training; see the module's description.
        after_epoch: called with `epoch` (from 1), `learning_rate` and `train_loss`; it may evaluate the model.

    Returns:
        The model itself, in eval mode.

    Raises:
        ValueError: if there are fewer than two images, their number is not that of the labels, or a hook is none.
        FloatingPointError: if the loss is no longer finite.
    """
    recipe = _recipe(recipe).for_images(len(images))
    _check_hooks(hooks)
    if len(images) < 2:
        raise ValueError(f"images holds {len(images)} images, but training needs at least 2.")
    if len(images) != len(labels):
        raise ValueError(f"labels has {len(labels)} entries for {len(images)} images, but needs one per image.")
    device = torch.device(device)
    images, labels = images.to(device), labels.to(device)
    model.to(device=device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    steps_per_epoch = len(_batches(torch.arange(len(images)), recipe))
    scheduler = _scheduler(optimizer, recipe, steps_per_epoch)
    data_seed, hook_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    data_generator = torch.Generator(device).manual_seed(data_seed)
    hook_generator = torch.Generator(device).manual_seed(hook_seed)

    with _reproducible(seed, device):  # dropout draws from the global state
        for epoch in range(recipe.epochs):
            model.train()
            shown = images
            for hook in hooks:
                if hasattr(hook, "start_epoch"):
                    hook.start_epoch(epoch, recipe.epochs)
                if hasattr(hook, "epoch_images"):
                    shown = hook.epoch_images(epoch, shown)
            learning_rate = optimizer.param_groups[0]["lr"]
            total_loss = torch.zeros((), device=device)
            order = torch.randperm(len(images), generator=data_generator, device=device)
            for batch in _batches(order, recipe):
                loss = _loss(model, shown[batch], labels[batch], recipe, hooks, data_generator, hook_generator)
                optimizer.zero_grad()
                loss.backward()
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                optimizer.step()
                scheduler.step()
                total_loss += loss.detach()
            train_loss = total_loss.item() / steps_per_epoch
            if not math.isfinite(train_loss):
                raise FloatingPointError(
                    f"the training loss became {train_loss} in epoch {epoch + 1}: recipe {recipe.name!r} with "
                    f"learning_rate {recipe.learning_rate} does not converge on these images; try a lower one."
                )
            model.eval()
            if after_epoch is not None:
                after_epoch({"epoch": epoch + 1, "learning_rate": learning_rate, "train_loss": train_loss})
    return model.eval()


def random_crop_flip(
    images: torch.Tensor, generator: torch.Generator, *, crop_padding: int = 4, flip: bool = True
) -> torch.Tensor:
    """Crops and mirrors each image of a batch on its own, on the batch's device; differentiable for floating point.

    Args:
        images: (B, C, H, W) of any dtype.
        generator: on the images' device.
        crop_padding: zero pixels added on each side before cropping (H, W) from a uniform position; 0 for no crop.
        flip: whether each image is mirrored left to right with probability 1/2.

    Returns:
        (B, C, H, W), the same dtype.
    """
    count, _, height, width = images.shape
    if crop_padding:
        positions = 2 * crop_padding + 1
        top, left = torch.randint(positions, (2, count), generator=generator, device=images.device)
        windows = F.pad(images, (crop_padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, top, left]
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    return images


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, *, batch_size: int = 500, bfloat16: bool = False) -> torch.Tensor:
    """Applies a network, in eval mode, to images of any number.

    Args:
        model: maps images (B, C, H, W) in [0, 1] to logits; its mode is restored afterwards.
        images: uint8 (N, C, H, W), or floating point in [0, 1], anywhere; they are moved batch by batch.
        batch_size: images at a time.
        bfloat16: whether convolutions run in bfloat16, where the device has instructions for it.

    Returns:
        float32 logits (N, num_classes), on the model's device.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with _autocast(bfloat16, device):
        logits = [model(_network_input(batch.to(device))).float() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(logits)


def confusion_matrix(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int, *, bfloat16: bool = False
) -> np.ndarray:
    """Counts int64 (num_classes, num_classes): images of class row that the network calls class column.

    Args:
        model: see `predict`.
        images: see `predict`.
        labels: int64 (N,).
        num_classes: the matrix's size.
        bfloat16: see `predict`.
    """
    predicted = predict(model, images, bfloat16=bfloat16).argmax(dim=1)
    cell = labels.to(predicted.device) * num_classes + predicted
    return torch.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes).cpu().numpy()


def _accuracy(confusion: np.ndarray) -> float:
    return float(np.trace(confusion) / confusion.sum())


def _per_class(confusion: np.ndarray) -> np.ndarray:
    count = confusion.sum(axis=1)
    return np.divide(np.diag(confusion), count, out=np.full(len(count), np.nan), where=count > 0)


def _loss(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    hooks: Sequence[Any],
    data_generator: torch.Generator,
    hook_generator: torch.Generator,
) -> torch.Tensor:
    """The loss of one step, from stored images to a scalar, hooks included."""
    for hook in hooks:
        if hasattr(hook, "before_augmentation"):
            images = hook.before_augmentation(images, hook_generator)
    images = random_crop_flip(images, data_generator, crop_padding=recipe.crop_padding, flip=recipe.flip)
    images = _network_input(images)
    for hook in hooks:
        if hasattr(hook, "before_forward"):
            images, labels = hook.before_forward(images, labels, hook_generator)
    with _autocast(recipe.bfloat16, images.device):
        for hook in hooks:
            if hasattr(hook, "loss"):
                return hook.loss(model, images, labels, hook_generator)
        return F.cross_entropy(model(images), labels)


def _network_input(images: torch.Tensor) -> torch.Tensor:
    """Stored images as float32 in [0, 1], channels last."""
    scale = 1 / 255 if images.dtype == torch.uint8 else 1
    return images.to(torch.float32, memory_format=torch.channels_last) * scale


def _batches(order: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    batches = list(order.split(recipe.batch_size))
    # Batch normalisation has nothing to normalise in a last batch of one image.
    if len(batches[-1]) == 1 and len(batches) > 1:
        batches.pop()
    return batches[: recipe.max_steps_per_epoch]


def _scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of a recipe, to be stepped after every step of the optimizer."""
    if recipe.schedule == "steps":
        milestones = [milestone * steps_per_epoch for milestone in recipe.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.gamma)
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * (step // steps_per_epoch) / recipe.epochs)) / 2
        )
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )


def _autocast(wanted: bool, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))


@contextmanager
def _reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Equal seeds, equal bits: seeds torch's global state, for libraries that take no generator, and restores it."""
    deterministic = torch.backends.cudnn.deterministic
    with seeded(seed, device):
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic


def _on_device(data: LabelledImages, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,)."""
    # Copied, because arrays may be read-only, which torch does not know.
    images = torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(data.labels.copy()).to(device)


def _recipe(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown; accepted are {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def _check_pair(train: LabelledImages, test: LabelledImages) -> None:
    for name, data in (("train", train), ("test", test)):
        if data.labels is None:
            raise ValueError(f"{name} has no labels, but a supervised victim needs one per image.")
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


def _check_hooks(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        if not any(hasattr(hook, method) for method in HOOK_METHODS):
            raise ValueError(
                f"hooks holds a {type(hook).__name__}, but a hook has one or more of the methods "
                f"{', '.join(HOOK_METHODS)}."
            )
    with_loss = [type(hook).__name__ for hook in hooks if hasattr(hook, "loss")]
    if len(with_loss) > 1:
        raise ValueError(f"hooks holds {' and '.join(with_loss)}, but only one hook may replace the loss.")
