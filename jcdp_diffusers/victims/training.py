"""
The one training loop, which victims and the surrogates of poisons share.

What is learned is an [`Objective`]: a network and a loss. The loop has everything else: the optimizer and its
schedule, batches, equal bits for equal seeds, countermeasures, and checkpoints.

**Countermeasures while training** are hooks: plain objects with one or more of these methods, called in the order
given.

    start_epoch(epoch, epochs)                               # epoch counts from 0
    epoch_images(epoch, images) -> images                    # the whole set of this epoch: uint8 (N, C, H, W)
    before_augmentation(images, generator) -> images         # (B, C, H, W) as stored: uint8, or float if so given
    mirror(images, rows) -> images                           # what all hooks before augmentation left, and its rows
    before_forward(images, labels, generator) -> images, labels    # after augmentation: float in [0, 1]
    loss(model, images, labels, generator) -> scalar loss    # instead of the cross-entropy; one hook at most has it
    contrastive_loss(objective, images, targets, generator) -> scalar loss   # instead of a contrastive objective's
    own_modules(objective) -> nn.Module                      # what the latter trains, later `objective.of_hook`

A contrastive objective calls `before_forward` for each view, with labels None, and gives `contrastive_loss` the images
(B, C, H, W) before any view is made, float in [0, 1], and its own generator of views; see [`contrastive`]. `targets`
are the rows of these images in the hook's attribute of that name, (N, ...) for all training images, or None. Labels
are class indices (B,) int64, or, once a hook has mixed them, probabilities (B, num_classes); a `loss` receives what
the hooks before it left, and probabilities where the recipe smooths labels. A hook with `epoch_images` may have
`draws`, the number of epochs after which it shows the same images again. Randomness comes from `generator`, which
lives on the images' device and belongs to the hooks alone, so that a victim with hooks sees the same batches, crops
and flips as one without. A hook keeps nothing from one epoch to the next, so that a training may go on from a
checkpoint. What is done to each image once, before training (grey, JPEG, bit depth), is no hook: do it to the data
set. For example, Mixup (Zhang et al., ICLR 2018) within the batch:

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

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..devices import has_bfloat16, seeded
from .checkpoints import Checkpoint, digest
from .recipes import Recipe


HOOK_METHODS = (
    "start_epoch",
    "epoch_images",
    "before_augmentation",
    "mirror",
    "before_forward",
    "loss",
    "contrastive_loss",
)


class Objective(nn.Module):
    """
    What is learned: networks, and the loss that an optimizer makes smaller.

    The loop optimizes `parameters()`, calls `train()` and `eval()`, and keeps `state_dict()` in checkpoints. So a
    network that follows another one, a queue or a counter belongs there, as a submodule or a buffer.
    """

    def loss(self, images: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """
        The loss of one step.

        Args:
            images (`torch.Tensor`): (B, C, H, W) as stored: uint8, or float in [0, 1]. Augmentation is the
                objective's.
            labels (`torch.Tensor`, *optional*): int64 (B,).
            generator (`torch.Generator`): Of the augmentation, on the images' device.

        Returns:
            `torch.Tensor`: A scalar with a gradient.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """What the optimizer changes, with its own `lr` and `weight_decay` where they are not the recipe's."""
        return [{"params": list(self.parameters())}]


class Hooks:
    """
    Countermeasures while training, called in the order given, with a generator that is theirs alone.

    Args:
        hooks (`Sequence`): See the module's description.
        seed (`int`, defaults to 0): Of the training.
        device (`torch.device` or `str`, defaults to `"cpu"`): Of the images.

    Raises:
        ValueError: If an object is no hook, or two of them replace the loss.
    """

    def __init__(self, hooks: Sequence[Any] = (), *, seed: int = 0, device: str | torch.device = "cpu"):
        for hook in hooks:
            if not any(hasattr(hook, method) for method in HOOK_METHODS):
                raise ValueError(
                    f"hooks holds a {type(hook).__name__}, but must hold objects with one or more of the methods "
                    f"{', '.join(HOOK_METHODS)}."
                )
        with_loss = [hook for hook in hooks if hasattr(hook, "loss") or hasattr(hook, "contrastive_loss")]
        if len(with_loss) > 1:
            names = " and ".join(type(hook).__name__ for hook in with_loss)
            raise ValueError(f"hooks holds {names}, but must hold at most one that replaces the loss.")
        self.hooks = tuple(hooks)
        self.replacing_loss = with_loss[0] if with_loss else None
        self.generator = torch.Generator(device).manual_seed(_seeds(seed)[1])

    @property
    def names(self) -> list[str]:
        """The hooks' types, for records."""
        return [type(hook).__name__ for hook in self.hooks]

    def start_epoch(self, epoch: int, epochs: int, images: torch.Tensor) -> torch.Tensor:
        """The images (N, C, H, W) that this epoch shows."""
        for hook in self.hooks:
            if hasattr(hook, "start_epoch"):
                hook.start_epoch(epoch, epochs)
            if hasattr(hook, "epoch_images"):
                images = hook.epoch_images(epoch, images)
        return images

    def before_augmentation(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """
        A batch of stored images (B, C, H, W), changed by the hooks; `rows` (B,) are their numbers in the set.

        Mirroring comes last: what a countermeasure has fitted to the stored images fits them as they are stored.
        """
        for hook in self.hooks:
            if hasattr(hook, "before_augmentation"):
                images = hook.before_augmentation(images, self.generator)
        for hook in self.hooks:
            if hasattr(hook, "mirror"):
                images = hook.mirror(images, rows)
        return images

    def before_forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An augmented batch (B, C, H, W), float in [0, 1], and its labels, changed by the hooks."""
        for hook in self.hooks:
            if hasattr(hook, "before_forward"):
                images, labels = hook.before_forward(images, labels, self.generator)
        return images, labels


def train(
    objective: Objective,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    recipe: Recipe,
    seed: int = 0,
    device: str | torch.device = "cpu",
    hooks: Hooks | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    evaluated: Sequence[torch.Tensor] = (),
    progress: Callable[[dict[str, float]], None] | None = None,
    checkpoint_dir: str | Path | None = None,
) -> list[dict[str, float]]:
    """
    Train an objective in place; it is in eval mode afterwards.

    Equal arguments give equal weights on one machine with one number of threads, whether or not the training was cut
    off in between; the global random state is left as it was.

    Args:
        objective ([`Objective`]): What is learned. It is moved to the device and to channels-last layout.
        images (`torch.Tensor`): uint8 (N, C, H, W), or float in [0, 1]; all of them are kept on the device.
        labels (`torch.Tensor`, *optional*): int64 (N,).
        recipe ([`Recipe`]): Of the training.
        seed (`int`, defaults to 0): Of the order of the images, the augmentation and dropout.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs.
        hooks ([`Hooks`], *optional*): Countermeasures while training, with the same seed and device.
        evaluate (`Callable`, *optional*): Called with the number of each epoch (from 1) after it, in eval mode; what
            it returns enters the history.
        evaluated (`Sequence[torch.Tensor]`): What `evaluate` reads, such as test images and their labels. A checkpoint
            has the figures of these alone.
        progress (`Callable`, *optional*): Called with each entry of the history as soon as it is there.
        checkpoint_dir (`str` or `Path`, *optional*): Folder for `training.safetensors`, which is replaced after each
            epoch. The same call goes on from it. It has the hooks' names, not their settings: give each training a
            folder of its own.

    Returns:
        `list` of `dict`: One entry per epoch: `epoch` (from 1), `learning_rate` (at its start), `train_loss` (mean
        over its steps), what `evaluate` returned, and `seconds` (since the start, without interruptions).

    Raises:
        ValueError: If there are fewer than two images, their number is not that of the labels, or the folder holds
            another training.
        FloatingPointError: If the loss is no longer finite.
    """
    recipe = recipe.for_images(len(images))
    device = torch.device(device)
    hooks = Hooks(seed=seed, device=device) if hooks is None else hooks
    if len(images) < 2:
        raise ValueError(f"images holds {len(images)} images, but must hold at least 2.")
    if labels is not None and len(images) != len(labels):
        raise ValueError(f"labels has {len(labels)} entries, but must have one for each of {len(images)} images.")
    images = images.to(device)
    labels = None if labels is None else labels.to(device)
    objective.to(device=device, memory_format=torch.channels_last)
    optimizer, scheduler = _optimizer(objective, recipe, steps_per_epoch(len(images), recipe))
    generator = torch.Generator(device).manual_seed(_seeds(seed)[0])

    with reproducible(seed, device):  # dropout draws from the global state
        checkpoint, history = None, []
        if checkpoint_dir is not None:
            request = _request(objective, images, labels, recipe, seed, hooks)
            request |= {"evaluation": digest(*evaluated)} if evaluated else {}
            generators = {"data": generator, "hooks": hooks.generator}
            checkpoint = Checkpoint(checkpoint_dir, request, objective, optimizer, scheduler, generators)
            history = checkpoint.load()
        start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
        for epoch in range(len(history), recipe.epochs):
            learning_rate = optimizer.param_groups[0]["lr"]
            shown = hooks.start_epoch(epoch, recipe.epochs, images)
            train_loss = _epoch(objective, shown, labels, recipe, optimizer, scheduler, hooks, generator)
            _check_finite(train_loss, epoch, recipe)
            entry = {"epoch": epoch + 1, "learning_rate": learning_rate, "train_loss": train_loss}
            entry |= {} if evaluate is None else evaluate(epoch + 1)
            history.append(entry | {"seconds": time.perf_counter() - start})
            if checkpoint is not None:
                checkpoint.save(history)
            if progress is not None:
                progress(history[-1])
    objective.eval()
    return history


def _check_finite(train_loss: float, epoch: int, recipe: Recipe) -> None:
    if not math.isfinite(train_loss):
        raise FloatingPointError(
            f"the training loss became {train_loss} in epoch {epoch + 1}: recipe {recipe.name!r} with "
            f"learning_rate {recipe.learning_rate} does not converge on these images; try a lower one."
        )


def _epoch(
    objective: Objective,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    hooks: Hooks,
    generator: torch.Generator,
) -> float:
    """Each image once, in a new order; the mean loss of the steps. The objective is in eval mode afterwards."""
    objective.train()
    total_loss = torch.zeros((), device=images.device)
    batches = _batches(torch.randperm(len(images), generator=generator, device=images.device), recipe)
    for batch in batches:
        stored = hooks.before_augmentation(images[batch], batch)
        loss = objective.loss(stored, None if labels is None else labels[batch], generator)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip_norm)
        optimizer.step()
        scheduler.step()
        objective.after_step()
        total_loss += loss.detach()
    objective.eval()
    return total_loss.item() / len(batches)


def network_input(images: torch.Tensor) -> torch.Tensor:
    """Stored images, uint8 or floating point in [0, 1], as float32 in [0, 1], channels last."""
    scale = 1 / 255 if images.dtype == torch.uint8 else 1
    return images.to(torch.float32, memory_format=torch.channels_last) * scale


def autocast(bfloat16: bool, device: torch.device) -> torch.autocast:
    """Convolutions in bfloat16, where that is wanted and the device has instructions for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and has_bfloat16(device))


@contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Equal seeds, equal bits: seeds torch's global state, for libraries that take no generator, and restores it."""
    deterministic = torch.backends.cudnn.deterministic
    with seeded(seed, device):
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic


def _seeds(seed: int) -> tuple[int, int]:
    """Seeds of the batches and their augmentation, and of the hooks."""
    data_seed, hook_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    return data_seed, hook_seed


def steps_per_epoch(count: int, recipe: Recipe) -> int:
    """Steps of the optimizer in an epoch of `count` images."""
    return len(_batches(torch.arange(count), recipe))


def _batches(order: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    batches = list(order.split(recipe.batch_size))
    # Batch normalisation has nothing to normalise in a last batch of one image.
    if len(batches[-1]) < (recipe.batch_size if recipe.drop_last else 2) and len(batches) > 1:
        batches.pop()
    return batches[: recipe.max_steps_per_epoch]


def _optimizer(
    objective: Objective, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD, and the learning rate of a recipe with so many steps per epoch, to be stepped after each of them."""
    optimizer = torch.optim.SGD(
        objective.parameter_groups(recipe),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    if recipe.schedule == "steps":
        milestones = [milestone * steps for milestone in recipe.milestones]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.gamma)
    if recipe.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * (step // steps) / recipe.epochs)) / 2
        )
    if recipe.schedule == "warmup_cosine":
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(recipe, recipe.epochs * steps))
    if recipe.schedule == "triangular":
        total = recipe.epochs * steps
        corners = (0, recipe.warmup * total, total), (0.2, 1.0, 0.07)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(np.interp(step, *corners)))
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * steps,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )


def _warmup_cosine(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each of all steps."""
    rising = recipe.warmup * steps
    last = 1e-3

    def cosine(step: float) -> float:
        return last + (1 - last) * (1 + math.cos(math.pi * step / steps)) / 2

    first = min(0.01 / recipe.learning_rate, cosine(rising))

    def factor(step: int) -> float:
        return cosine(step) if step >= rising else first + (cosine(rising) - first) * step / rising

    return factor


def _request(
    objective: Objective,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    recipe: Recipe,
    seed: int,
    hooks: Hooks,
) -> dict[str, Any]:
    """What decides the weights, which tells one training from another."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "hooks": hooks.names,
        "images": digest(images, *([] if labels is None else [labels])),
        "initial weights": digest(*objective.state_dict().values()),
        "device": images.device.type,
        "number of threads": torch.get_num_threads() if images.device.type == "cpu" else None,
    }
