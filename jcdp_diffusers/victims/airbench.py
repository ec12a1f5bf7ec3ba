"""
The training of airbench94's network (Jordan, 2024; KellerJordan/cifar10-airbench).

Its tricks are an objective with look-ahead, and two hooks that know the epoch. Test images are scored as they are, not
together with their mirror images.
"""

import copy
from typing import Any

import torch
from torch import nn

from .recipes import AirbenchRecipe
from .supervised import Supervised
from .training import Hooks, steps_per_epoch


class Airbench(Supervised):
    """
    Cross-entropy with label smoothing, whose weights are pulled to their own average every few steps.

    Args:
        network (`nn.Module`), recipe ([`AirbenchRecipe`]), hooks ([`Hooks`]): As for [`Supervised`].
        count (`int`): Number of training images.
    """

    def __init__(self, network: nn.Module, recipe: AirbenchRecipe, hooks: Hooks, count: int):
        super().__init__(network, recipe, hooks)
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.total = recipe.epochs * steps_per_epoch(count, recipe)

    def parameter_groups(self, recipe: AirbenchRecipe) -> list[dict[str, Any]]:
        norms = [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]
        biases = [norm.bias for norm in norms]
        own = {id(bias) for bias in biases}
        others = [parameter for parameter in self.network.parameters() if id(parameter) not in own]
        factor = recipe.bias_factor
        faster = {"lr": recipe.learning_rate * factor, "weight_decay": recipe.weight_decay / factor}
        return [{"params": others}, {"params": biases, **faster}]

    @torch.no_grad()
    def after_step(self) -> None:
        """
        Look-ahead: average <- keep * average + (1 - keep) * weights; weights <- average; statistics included.

        `keep` rises with the third power of the progress to `look_ahead_decay ** look_ahead_steps`. After the last
        step the weights become the average as it stands.
        """
        self.steps += 1
        step, recipe = int(self.steps), self.recipe
        if step % recipe.look_ahead_steps and step < self.total:
            return
        keep = recipe.look_ahead_decay**recipe.look_ahead_steps * (step / self.total) ** 3
        for mine, live in zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True):
            if not live.is_floating_point():
                continue
            if step % recipe.look_ahead_steps == 0:
                mine.lerp_(live, 1 - keep)
            live.copy_(mine)


class AlternatingFlip:
    """
    Every image is mirrored in every second epoch, half of them in the first: none is shown the same way twice in turn.

    Where epochs show several draws of an image in turn, that holds for each draw.

    Args:
        count (`int`): Number of training images.
        seed (`int`): Decides which half is the first.
        draws (`int`, defaults to 1): Draws of each image.
    """

    def __init__(self, count: int, seed: int, draws: int = 1):
        self.first = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
        self.draws = draws

    def start_epoch(self, epoch: int, epochs: int) -> None:
        before, draw = divmod(epoch, self.draws)  # whole passes over the draws, and the draw of this epoch
        self.mirrored = self.first if (before + draw) % 2 == 0 else ~self.first

    def mirror(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        mirrored = self.mirrored.to(rows.device)[rows]
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


class WhiteningBias:
    """
    The bias of the whitening layer is trained in the first epochs only.

    Args:
        network (`nn.Module`): Without a layer `whitening`, or where that is frozen, nothing is done.
        epochs (`int`): How many.
    """

    def __init__(self, network: nn.Module, epochs: int):
        bias = network.whitening.bias if hasattr(network, "whitening") else None
        self.bias = bias if bias is not None and bias.requires_grad else None
        self.epochs = epochs

    def start_epoch(self, epoch: int, epochs: int) -> None:
        if self.bias is not None:
            self.bias.requires_grad_(epoch < self.epochs)
