"""
Learning with labels: cross-entropy, with countermeasures around it.

Images enter the network in [0, 1] without subtracting a mean or dividing by a standard deviation: that is what the
repositories of EMN, ISS, LSP, AVATAR and APBench do, and a perturbation of 8/255 means the same everywhere only if
nobody rescales it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .networks import last_layer
from .recipes import AirbenchRecipe, Recipe, get_recipe
from .training import Hooks, Objective, autocast, network_input, train


class Supervised(Objective):
    """
    Cross-entropy of randomly cropped and mirrored images.

    Args:
        network (`nn.Module`): Maps images (B, C, H, W) in [0, 1] to logits (B, num_classes).
        recipe ([`Recipe`]): Says how images are cropped and mirrored, and the precision.
        hooks ([`Hooks`]): Countermeasures while training.

    Raises:
        ValueError: If a hook replaces a contrastive loss.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, hooks: Hooks):
        super().__init__()
        replacing = hooks.replacing_loss
        if replacing is not None and not hasattr(replacing, "loss"):
            raise ValueError(
                f"hooks holds a {type(replacing).__name__}, but must hold none that replaces a contrastive loss for "
                "method 'supervised'."
            )
        self.network = network
        self.recipe = recipe
        self.hooks = hooks

    def loss(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        recipe, hooks = self.recipe, self.hooks
        images = random_crop_flip(
            images, generator, crop_padding=recipe.crop_padding, flip=recipe.flip, padding=recipe.padding
        )
        images, labels = hooks.before_forward(network_input(images), labels)
        with autocast(recipe.bfloat16, images.device):
            if hooks.replacing_loss is not None:
                return hooks.replacing_loss.loss(self.network, images, self._smoothed(labels), hooks.generator)
            return F.cross_entropy(self.network(images), labels, label_smoothing=recipe.label_smoothing)

    def _smoothed(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels for a hook's own cross-entropy, which knows nothing of the recipe."""
        share = self.recipe.label_smoothing
        if share == 0:
            return labels
        classes = last_layer(self.network).out_features
        labels = F.one_hot(labels, classes).float() if labels.ndim == 1 else labels
        return (1 - share) * labels + share / classes


def supervised_objective(
    network: nn.Module,
    recipe: Recipe,
    hooks: Sequence[Any],
    count: int,
    seed: int,
    device: str | torch.device,
) -> Supervised:
    """
    The objective that a recipe asks for, with all its hooks.

    Args:
        network (`nn.Module`): As for [`Supervised`].
        recipe ([`Recipe`]): For the number of images.
        hooks (`Sequence`): Countermeasures while training.
        count (`int`): Number of training images.
        seed (`int`), device (`str` or `torch.device`): Of the training.
    """
    if isinstance(recipe, AirbenchRecipe):
        from .airbench import Airbench, AlternatingFlip, WhiteningBias

        draws = max((getattr(hook, "draws", 1) for hook in hooks), default=1)
        own = (AlternatingFlip(count, seed, draws), WhiteningBias(network, recipe.whitening_epochs))
        return Airbench(network, recipe, Hooks((*hooks, *own), seed=seed, device=device), count)
    return Supervised(network, recipe, Hooks(hooks, seed=seed, device=device))


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
    """
    Train a network in place by cross-entropy.

    Args:
        model (`nn.Module`): Maps images (B, C, H, W) in [0, 1] to logits; it is moved to the device and to
            channels-last layout.
        images (`torch.Tensor`): uint8 (N, C, H, W), or float in [0, 1].
        labels (`torch.Tensor`): int64 (N,).
        recipe (`str` or [`Recipe`], defaults to `"fast"`): A name from `RECIPES`, or a recipe.
        seed (`int`, defaults to 0): Of the order of the images, the augmentation and the hooks. The weights are the
            caller's business.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs.
        hooks (`Sequence`, *optional*): Countermeasures while training; see [`training`].
        after_epoch (`Callable`, *optional*): Called with `epoch` (from 1), `learning_rate`, `train_loss` and
            `seconds`; it may evaluate the model.

    Returns:
        `nn.Module`: The model itself, in eval mode.

    Raises:
        ValueError: If there are fewer than two images, their number is not that of the labels, or a hook is none.
        FloatingPointError: If the loss is no longer finite.
    """
    recipe = get_recipe(recipe).for_images(len(images))
    objective = supervised_objective(model, recipe, hooks, len(images), seed, device)
    hooks = objective.hooks
    train(objective, images, labels, recipe=recipe, seed=seed, device=device, hooks=hooks, progress=after_epoch)
    return model


def random_crop_flip(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    padding: str = "zeros",
) -> torch.Tensor:
    """
    Crop and mirror each image of a batch on its own, on the batch's device; differentiable for floating point.

    Args:
        images (`torch.Tensor`): (B, C, H, W) of any dtype.
        generator (`torch.Generator`): On the images' device.
        crop_padding (`int`, defaults to 4): Pixels added on each side before cropping (H, W) from a uniform
            position; 0 for no crop.
        flip (`bool`, defaults to `True`): Whether each image is mirrored left to right with probability 1/2.
        padding (`str`, defaults to `"zeros"`): What the added pixels are, `"zeros"` or, mirrored at the edge without
            repeating it, `"reflect"`.

    Returns:
        `torch.Tensor`: (B, C, H, W), the same dtype.
    """
    count, _, height, width = images.shape
    if crop_padding:
        positions = 2 * crop_padding + 1
        top, left = torch.randint(positions, (2, count), generator=generator, device=images.device)
        if padding == "reflect":
            padded = images[:, :, _reflected(height, crop_padding, images.device)]
            padded = padded[:, :, :, _reflected(width, crop_padding, images.device)]
        else:
            padded = F.pad(images, (crop_padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, top, left]
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    return images


def _reflected(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Which rows of an image a reflected image of `size + 2 * padding` rows shows."""
    rows = torch.arange(-padding, size + padding, device=device).abs()
    return size - 1 - (size - 1 - rows).abs()
