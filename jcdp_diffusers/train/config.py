"""Settings of a training run, as a dataclass and as the options of a command."""

import argparse
import dataclasses
import math
import re

import torch
from accelerate.tracking import GeneralTracker
from diffusers import DDPMScheduler

from ..devices import check_seed, device_in_words, has_bfloat16
from ..noise import checked_corner
from .denoising import TIMESTEP_SAMPLINGS


MIXED_PRECISIONS = ("no", "auto", "bf16", "fp16")
# Those of diffusers.optimization.get_scheduler that need no further settings.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """
    Settings of one training run, under the names of diffusers' training scripts.

    The batch that one optimiser step sees has train_batch_size * processes * gradient_accumulation_steps images. The
    defaults of optimiser, gradient clipping and averaging are those of the DDPM paper's CIFAR-10 recipe, but for the
    warm-ups. Timesteps are sampled as in the training code of DDIM.

    Args:
        max_train_steps (`int`): Optimiser steps.
        train_batch_size (`int`): Images per process and micro-batch.
        gradient_accumulation_steps (`int`): Micro-batches per optimiser step.
        learning_rate (`float`): Its peak; no scaling by batch or processes.
        lr_scheduler (`str`): `"constant"`, `"constant_with_warmup"`, `"linear"`, `"cosine"`,
            `"cosine_with_restarts"` or `"polynomial"` of diffusers, stepped once per optimiser step.
        lr_warmup_steps (`int`): Optimiser steps of linear warm-up.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon (`float`): Of AdamW.
        max_grad_norm (`float`): Gradients are clipped to this norm.
        ema_max_decay, ema_inv_gamma, ema_power (`float`): The averaged weights decay by
            min(ema_max_decay, 1 - (1 + step / ema_inv_gamma)^-ema_power), so a short run forgets its starting point.
        mixed_precision (`str`): `"no"`, `"bf16"`, `"fp16"`, or `"auto"`: `"bf16"` where the device has instructions
            for it, else `"no"`. Weights, average and optimiser stay in float32.
        gradient_checkpointing (`bool`): Recompute activations in the backward pass, for memory.
        snr_gamma (`float`, *optional*): Min-SNR loss weight (Hang et al., 2023; 5 is theirs); None weighs all alike.
        random_flip (`bool`): Mirror half of the images. Off, because digits and text must not flip.
        trained_timesteps (`tuple[int, int]`, *optional*): First timestep, which is 0, and end (exclusive) to train
            on. A purifier never visits t >= T_p, but always goes down to t = 0; None is the whole schedule, which a
            generator of images needs.
        noise_corner (`float`): Corner frequency of the noise to remove, in cycles per image (`noise.coloured`): above
            0 it is stronger at low frequencies, so that fewer steps hide a poison that is smooth. 0 is white noise, a
            DDPM's own, which a generator of images needs.
        timestep_sampling (`str`): `"uniform"`, `"antithetic"` (t together with its mirror in the range) or
            `"stratified"` (one t from each of as many equal parts of the range as the total batch has images).
        checkpointing_steps (`int`, *optional*): Steps between checkpoints, one more at the end; None writes none.
        checkpoints_total_limit (`int`, *optional*): How many to keep.
        resume_from_checkpoint (`str`, *optional*): `"latest"` (a fresh start if there is none) or a checkpoint's name.
        validation_steps (`int`): Steps between held-out losses and grids; one of each at the start and at the end.
        validation_timesteps (`tuple[int, int]`, *optional*): Range of the held-out loss; None is `trained_timesteps`.
        num_grid_images (`int`): Images in the denoising and sample grids; 0 writes none.
        logging_steps (`int`): Steps between entries of the loss history.
        report_to (`str` or `GeneralTracker`, *optional*): A tracker of Accelerate, such as `"tensorboard"`.
        dataloader_num_workers (`int`): Processes that decode images which do not fit in memory.
        seed (`int`): Everything random follows from it.
        cpu (`bool`): Stay on the CPU even if there is an accelerator.
    """

    max_train_steps: int = 10_000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_max_decay: float = 0.9999
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    snr_gamma: float | None = None
    random_flip: bool = False
    trained_timesteps: tuple[int, int] | None = None
    noise_corner: float = 0.0
    timestep_sampling: str = "antithetic"
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    validation_timesteps: tuple[int, int] | None = None
    num_grid_images: int = 8
    logging_steps: int = 10
    report_to: str | GeneralTracker | None = None
    dataloader_num_workers: int = 0
    seed: int = 0
    cpu: bool = False

    def __post_init__(self):
        positive = (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "validation_steps",
            "logging_steps",
        )
        self._check_types()
        for name in positive + ("checkpointing_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        for name in ("learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but must be a finite number above 0.")
        object.__setattr__(self, "noise_corner", checked_corner(self.noise_corner))
        for name in ("ema_max_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie in [0, 1).")
        for name in ("adam_weight_decay", "adam_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a finite number of at least 0.")
        check_seed(self.seed, bits=63)
        for name in ("lr_warmup_steps", "num_grid_images", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0.")
        if self.trained_timesteps is not None and self.trained_timesteps[0] > 0:
            raise ValueError(
                f"trained_timesteps is {tuple(self.trained_timesteps)}, but must start at 0: every purification ends "
                "at t = 0."
            )
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {accepted}.")

    def _check_types(self) -> None:
        """Refuse values of another type, which would end a training in its midst, or at its record."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = str(field.type)
            if value is None and "None" in kinds:
                continue
            if "tuple" in kinds:
                good = isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is int for end in value)
                wanted = "two whole numbers"
            elif "int" in kinds:
                good, wanted = type(value) is int, "a whole number"
            elif "float" in kinds:
                good, wanted = isinstance(value, int | float) and type(value) is not bool, "a number"
            elif "bool" in kinds:
                good, wanted = type(value) is bool, "True or False"
            else:
                continue
            if not good:
                raise ValueError(f"{field.name} is {value!r}, but must be {wanted}.")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Offer every setting as `--name`, with the help that this class's docstring gives."""
        for field in dataclasses.fields(cls):
            options = {"default": field.default, "help": _setting_help(field.name)}
            if field.type is bool:
                options |= {"action": "store_true"}
            elif field.name in _CHOICES:
                options |= {"choices": _CHOICES[field.name]}
            elif "tuple" in str(field.type):
                options |= {"type": int, "nargs": 2, "metavar": ("FIRST", "END")}
            else:
                options |= {"type": next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))}
            parser.add_argument(f"--{field.name}", **options)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "TrainingConfig":
        """The settings among parsed arguments."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def facts_of_the_network(self) -> dict:
        """What `PurificationConfig` has to know of a network that was trained so."""
        return {"trained_timesteps": self.trained_timesteps, "noise_corner": self.noise_corner}

    def precision_on(self, device: torch.device) -> str:
        """
        `mixed_precision` as it is on a device: never `"auto"`.

        Raises:
            ValueError: If it is `"bf16"` and the device would only imitate that, about ten times as slowly as float32.
        """
        if self.mixed_precision == "bf16" and not has_bfloat16(device):
            raise ValueError(
                f"mixed_precision is 'bf16', but {device_in_words(device)} would only imitate it, and slowly: "
                "'auto' and 'no' are accepted."
            )
        if self.mixed_precision == "auto":
            return "bf16" if has_bfloat16(device) else "no"
        return self.mixed_precision

    def timesteps(self, scheduler: DDPMScheduler, name: str = "trained_timesteps") -> tuple[int, int]:
        """A range of timesteps, checked against the scheduler's; the whole schedule by default."""
        end = scheduler.config.num_train_timesteps
        first, last = getattr(self, name) or (0, end)
        if not 0 <= first < last <= end:
            raise ValueError(
                f"{name} is {(first, last)}, but must be first < end within 0 and {end} of the scheduler."
            )
        return first, last


_CHOICES = {
    "lr_scheduler": LR_SCHEDULERS,
    "mixed_precision": MIXED_PRECISIONS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
}


def _setting_help(name: str) -> str:
    """A setting's entry in the docstring of TrainingConfig, on one line and without its type."""
    entries = re.findall(r"^ {8}(\w+(?:, \w+)*) \([^)]*\): ((?:.|\n {12})+)", TrainingConfig.__doc__, re.MULTILINE)
    text = next(text for names, text in entries if name in names.split(", "))
    return " ".join(text.split()).replace("%", "%%")


# What may differ between a run and its continuation without changing the weights. The learning rate's schedule adds
# `max_train_steps` unless it is constant; the batch is compared as a total. A network with dropout is the exception:
# what it drops depends on how the total is divided.
FREE_SETTINGS = {
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "validation_timesteps",
    "num_grid_images",
    "logging_steps",
    "report_to",
    "dataloader_num_workers",
}
