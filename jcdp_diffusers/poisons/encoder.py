"""
What the poisons share that attack learning without labels: an encoder, and a loop in which it and noise take turns.

Encoder and noise minimise the same contrastive loss. The encoder is one of the contrastive victims; its views are
differentiable, so the loss has a gradient for the noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .. import victims
from ..devices import drawn_from, seeded
from ..victims.contrastive import METHODS
from ..victims.recipes import CONTRASTIVE, ContrastiveRecipe
from .checkpoint import Checkpoint
from .numbers import check_numbers
from .surrogate import finite


OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class EncoderSettings:
    """
    Numbers of a noise that is made with an encoder in turns.

    A round is a few training steps of the encoder on perturbed images, which walk through them in shuffled passes, and
    then a few batches of noise in a new order.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255.
        step (`float`): Length of a step of the descent, in 1/255.
        steps (`int`): Steps of the descent on each batch of noise, each with views of its own.
        rounds (`int`): See above.
        model_steps (`int`, *optional*): Training steps of a round, at most one pass; None for a whole pass.
        noise_batches (`int`, *optional*): Batches of noise of a round, at most one pass; None for a whole pass.
        drop_last (`bool`): Whether a pass of the noise leaves out the images that do not fill a batch. Training always
            does, others each time.
        framework (`str`): How the encoder learns, one of `victims.METHODS` but `"supervised"`.
        batch_size (`int`): Images of a training step, and of a batch of noise.
        optimizer (`str`): `"sgd"` or `"adam"`.
        learning_rate, momentum, weight_decay (`float`): Of the optimizer; Adam has no such momentum.
        temperature, loss_factor, key_momentum, queue, min_scale (`float` or `int`): See `victims.ContrastiveRecipe`.
        flip (`bool`): Whether views are mirrored.
        through_targets (`bool`): Whether the noise sees the gradient through the second network too, where the
            framework has one.
        follow_noise_steps (`bool`): Whether the second network follows, and keys enter the queue, after each step of
            the descent as well.
        surrogate (`str`): A victim's name.
        width (`int`): Its width.
        bfloat16 (`bool`): Whether the encoder runs in mixed precision.

    Raises:
        ValueError: If a number is too small or does not suit the framework.
    """

    epsilon: float = 8.0
    step: float = 0.8
    steps: int = 1
    rounds: int = 1000
    model_steps: int | None = None
    noise_batches: int | None = None
    drop_last: bool = False
    framework: str = "simclr"
    batch_size: int = 512
    optimizer: str = "sgd"
    learning_rate: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float | None = 0.5
    loss_factor: float = 1.0
    key_momentum: float | None = None
    queue: int | None = None
    min_scale: float = 0.2
    flip: bool = True
    through_targets: bool = False
    follow_noise_steps: bool = False
    surrogate: str = "resnet18"
    width: int = 64
    bfloat16: bool = False

    def __post_init__(self):
        if self.framework not in CONTRASTIVE:
            raise ValueError(f"framework is {self.framework!r}, but must be one of {', '.join(CONTRASTIVE)}.")
        if self.surrogate not in victims.NAMES:
            raise ValueError(f"surrogate is {self.surrogate!r}, but must be one of {', '.join(victims.NAMES)}.")
        check_numbers(self)
        self.recipe()  # refuses what does not suit the framework
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, but must be one of {', '.join(OPTIMIZERS)}.")
        for name in ("through_targets", "follow_noise_steps"):
            if getattr(self, name) and self.key_momentum is None:
                raise ValueError(f"{name} is True, but must be False for {self.framework!r}, which has one network.")

    def recipe(self) -> ContrastiveRecipe:
        """What the encoder's loss needs to know."""
        names = ("batch_size", "temperature", "loss_factor", "key_momentum", "queue", "min_scale", "flip", "bfloat16")
        numbers = {name: getattr(self, name) for name in names}
        return ContrastiveRecipe("poison", self.rounds, method=self.framework, **numbers)

    def learning_rate_in(self, number: int) -> float:
        """The learning rate of a round; rounds count from 0."""
        return self.learning_rate


class Encoder:
    """
    A network that learns without labels, and the gradient of its loss for noise.

    Args:
        settings ([`EncoderSettings`]): Its numbers.
        images (`torch.Tensor`): float `(N, C, H, W)` in [0, 1].
        seed (`int`): Of its weights and of all draws.
        device (`torch.device`): Where it runs.

    Raises:
        ValueError: If there are too few images for a batch or the queue, or they are too small for views.
    """

    def __init__(self, settings: EncoderSettings, images: torch.Tensor, seed: int, device: torch.device):
        for name in ("batch_size", "queue"):
            needed = getattr(settings, name) or 0
            if len(images) < needed:
                raise ValueError(
                    f"images holds {len(images)} images, but must hold at least {needed}, the {name} of the settings."
                )
        victims.check_sides(settings.surrogate, *images.shape[2:], argument="surrogate")
        self.settings = settings
        with seeded(seed):
            # Its last layer is never used, so one class will do.
            options = {"in_channels": images.shape[1], "width": settings.width, "image_size": min(images.shape[2:])}
            network = victims.build(settings.surrogate, 1, **options)
            if hasattr(network, "whiten"):
                network.whiten(images)
            self.objective = METHODS[settings.framework](network, settings.recipe(), tuple(images.shape[2:]))
        self.objective.through_targets = settings.through_targets
        self.objective.to(device=device, memory_format=torch.channels_last)
        numbers = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.objective.parameters(), **numbers)
        else:
            self.optimizer = torch.optim.SGD(self.objective.parameters(), momentum=settings.momentum, **numbers)
        self.draw = torch.Generator(device).manual_seed(seed)

    def train_step(self, perturbed: torch.Tensor, learning_rate: float) -> float:
        """
        One step of the optimizer on perturbed images (B, C, H, W) in [0, 1].

        Returns:
            `float`: The loss before the step.

        Raises:
            FloatingPointError: If the loss is no longer finite.
        """
        self.objective.train()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        with drawn_from(self.draw):  # of dropout, in networks that have it
            loss = finite(self.objective.loss(perturbed, None, self.draw))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.objective.after_step()
        return loss.item()

    def loss(self, perturbed: torch.Tensor) -> torch.Tensor:
        """
        The loss of a network in eval mode between two new views of perturbed images, with a gradient for them.

        Raises:
            FloatingPointError: If it is no longer finite: its gradient's sign would leave the noise as it is.
        """
        self.objective.eval()
        return finite(self.objective.loss(perturbed, None, self.draw))

    def after_noise_step(self) -> None:
        """Called after each step of the descent."""
        if self.settings.follow_noise_steps:
            self.objective.after_step()

    def state_dict(self) -> dict[str, Any]:
        parts = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {"draw": self.draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draw.set_state(state["draw"])


def in_turns(
    images: torch.Tensor,
    noise: torch.Tensor,
    of_image: torch.Tensor,
    settings: EncoderSettings,
    lower: Callable[..., torch.Tensor],
    *,
    kept: Checkpoint,
    seed: int,
    device: torch.device,
    name: str,
    progress: bool,
) -> torch.Tensor:
    """
    Train an encoder and lower its loss by noise, in turns.

    Args:
        images (`torch.Tensor`): float `(N, C, H, W)` in [0, 1], on the CPU.
        noise (`torch.Tensor`): Where the noise starts, `(M, C, H, W)`, images in [0, 1]. It is left as it is.
        of_image (`torch.Tensor`): int64 `(N,)`, the row of the noise that each image has.
        settings ([`EncoderSettings`]): The numbers.
        lower (`Callable`): `lower(encoder, clean, noise, which, rows)`, which returns the new noise of a batch.
            `clean` is `(B, C, H, W)`, `noise` the rows of the noise that the batch uses, `which` `(B,)` the row that
            each image has in there, all on the device. `rows` `(B,)` are the images' numbers.
        kept ([`Checkpoint`]): Where the state is kept.
        seed (`int`): Of everything random.
        device (`torch.device`): Where the encoder runs.
        name (`str`): Of the bar.
        progress (`bool`): Whether there is a bar.

    Returns:
        `torch.Tensor`: The noise `(M, C, H, W)`.
    """
    encoder = Encoder(settings, images, seed, device)
    size, noise, done = settings.batch_size, noise.clone(), 0
    training_order = noise_order = torch.empty(0, dtype=torch.int64)
    if (state := kept.load()) is not None:
        encoder.load_state_dict(state["encoder"])
        training_order, noise_order = state["training_order"], state["noise_order"]
        noise, done = state["noise"], state["done"]
    training_steps, noise_batches = batches_per_round(len(images), settings)
    per_round = training_steps + noise_batches
    total = settings.rounds * per_round
    with tqdm(total=total, initial=done, unit="batch", desc=name, disable=not progress) as bar:
        while done < total:
            number, position = divmod(done, per_round)
            if position < training_steps:
                if len(training_order) < size:
                    training_order = shuffled(len(images), encoder.draw)
                rows, training_order = training_order[:size], training_order[size:]
                perturbed = (images[rows] + noise[of_image[rows]]).clamp(0, 1).to(device)
                loss = encoder.train_step(perturbed, settings.learning_rate_in(number))
                bar.set_postfix_str(f"round {number + 1}, loss {loss:.3f}", refresh=False)
            else:
                if position == training_steps:
                    noise_order = shuffled(len(images), encoder.draw)
                rows, noise_order = noise_order[:size], noise_order[size:]
                used, which = of_image[rows].unique(return_inverse=True)
                batch = images[rows].to(device), noise[used].to(device), which.to(device)
                noise[used] = lower(encoder, *batch, rows).cpu()
            done += 1
            bar.update()
            if kept.due() or done == total:
                orders = {"training_order": training_order, "noise_order": noise_order}
                kept.save({"encoder": encoder.state_dict(), "noise": noise, "done": done} | orders)
    return noise


def batches_per_round(count: int, settings: EncoderSettings) -> tuple[int, int]:
    """Training steps and batches of noise of a round, for `count` images."""
    full = count // settings.batch_size
    passes = full, full if settings.drop_last else math.ceil(count / settings.batch_size)
    asked = settings.model_steps, settings.noise_batches
    training_steps, noise_batches = (most if few is None else min(few, most) for few, most in zip(asked, passes))
    return training_steps, noise_batches


def shuffled(count: int, draw: torch.Generator) -> torch.Tensor:
    """Row numbers in a random order, on the CPU."""
    return torch.randperm(count, generator=draw, device=draw.device).cpu()
