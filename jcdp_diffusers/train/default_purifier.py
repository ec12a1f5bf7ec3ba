"""
The purifier that is trained where none is given: which network, how it is trained and used, by images and device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import LabelledImages
from ..perceptual import LPIPSModel
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PRESETS, PurificationConfig, default_settings
from .config import TrainingConfig
from .loop import train_purifier
from .unets import UNETS, ddpm_scheduler, named_unet


SMOKE_PURIFICATION = PurificationConfig(diffusion_steps=20, num_inference_steps=2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    A purifier to train, and how it is used.

    Args:
        unet (`str`): Of `unets.UNETS`.
        training (`TrainingConfig`): Of the purifier.
        purification (`PurificationConfig`): Of the protected images.
    """

    unet: str
    training: TrainingConfig
    purification: PurificationConfig


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A default purifier for images up to a side, in pixels, with about as much arithmetic as the others beside it."""

    side: int
    unet: str
    steps: int
    batch: int


@dataclasses.dataclass(frozen=True)
class _Case:
    """
    Default purifiers for one kind of device and number of images.

    Args:
        choices (`tuple`): By side of the images, smallest first.
        checkpoints (`int`): How many the training writes.
        training (`dict`): Fields of `TrainingConfig` that all of them have.
        purification (`PurificationConfig`): How they purify images.
        of_larger (`PurificationConfig`, *optional*): How they purify images above `SMALL_SIDE` instead.
    """

    choices: tuple[_Choice, ...]
    checkpoints: int
    training: Mapping[str, Any]
    purification: PurificationConfig
    of_larger: PurificationConfig | None = None


# On a CPU with few images: about 30 to 140 TFLOP of training, minutes on two cores, in float32 on every machine.
_FEW = _Case(
    (
        _Choice(32, "tiny32", 1200, 32),
        _Choice(64, "mini64", 1200, 32),
        _Choice(128, "mini128", 800, 16),
        _Choice(256, "mini256", 600, 8),
    ),
    checkpoints=4,
    training={"learning_rate": 1e-3},
    purification=PurificationConfig(diffusion_steps=60, num_inference_steps=6),
    # At 64x64, one round of six evaluations leaves most of LSP and TAP, and four rounds of two little of LSP. T_p 190
    # does as well, but asks more of a network that has seen few images (eval/grids/tiny_imagenet_20_search.yaml).
    of_larger=PurificationConfig(diffusion_steps=60, num_inference_steps=2, num_rounds=4),
)
# On a CPU with many: 280 TFLOP.
_MANY = _Case(
    (
        _Choice(32, "mini32", 3600, 64),
        _Choice(64, "mini64", 3600, 32),
        _Choice(128, "mini128", 1600, 16),
        _Choice(256, "mini256", 1600, 8),
    ),
    checkpoints=6,
    training={"learning_rate": 1e-3, "lr_scheduler": "cosine", "mixed_precision": "auto"},
    purification=PRESETS["tuned"],
)
# On an accelerator: about 100 PFLOP, five minutes of a GPU that does 280 TFLOP/s.
_ACCELERATOR = _Case(
    (
        _Choice(32, "ddpm-cifar10", 20_000, 128),
        _Choice(64, "small64", 20_000, 128),
        _Choice(128, "small128", 10_000, 64),
        _Choice(256, "small256", 8_000, 64),
    ),
    checkpoints=10,
    training={"mixed_precision": "auto"},
    purification=PurificationConfig(diffusion_steps=100, num_inference_steps=20),
)
SMALL_SIDE = 32
LARGEST_SIDE = 256
MANY_IMAGES = 4000


def plan_for(collected: LabelledImages, device: torch.device, smoke: bool) -> Plan:
    """
    A purifier that suits the images, their number and the device: seconds for a smoke run, minutes on a CPU, networks
    of the paper's cost on an accelerator.

    Raises:
        ValueError: If the images are not square, too large, or of a side that the network cannot halve.
    """
    height, width, _ = collected.images.shape[1:]
    if height != width or height % 8 or height > LARGEST_SIDE:
        raise ValueError(
            f"collected has images of {height}x{width}, but without a purifier they must be squares with a side of 8, "
            f"16, 24, ... or {LARGEST_SIDE} pixels: image_size brings them to one, purifier names one for others."
        )
    common = {"seed": 0, "checkpoints_total_limit": 1}
    if smoke:
        training = TrainingConfig(
            max_train_steps=5,
            train_batch_size=8,
            learning_rate=1e-3,
            trained_timesteps=(0, 100),
            checkpointing_steps=5,
            **common,
        )
        return Plan("tiny32", training, SMOKE_PURIFICATION)
    case = _ACCELERATOR if device.type == "cuda" else _MANY if len(collected) >= MANY_IMAGES else _FEW
    chosen = _choice(case.choices, height)
    training = TrainingConfig(
        max_train_steps=chosen.steps,
        train_batch_size=chosen.batch,
        trained_timesteps=(0, 200),
        checkpointing_steps=chosen.steps // case.checkpoints,
        **case.training,
        **common,
    )
    is_large = height > SMALL_SIDE and case.of_larger is not None
    return Plan(chosen.unet, training, case.of_larger if is_large else case.purification)


def _choice(choices: tuple[_Choice, ...], side: int) -> _Choice:
    """The first that is for images of that side and can halve it as often as its network does."""
    for choice in choices:
        if side <= choice.side and side % (2 ** (len(UNETS[choice.unet]["block_out_channels"]) - 1)) == 0:
            return choice
    return choices[0]  # three halvings at most, which every multiple of 8 bears


def with_steps(plan: Plan, steps: int) -> Plan:
    """The same plan with another number of training steps, and as many checkpoints."""
    kept = max(1, plan.training.max_train_steps // plan.training.checkpointing_steps)
    training = dataclasses.replace(plan.training, max_train_steps=steps, checkpointing_steps=max(1, steps // kept))
    return dataclasses.replace(plan, training=training)


def shortened(plan: Plan) -> Plan:
    """
    The plan for many images on a CPU in the time of an audit: 500 training steps at 32x32 pixels and a like share at
    other sizes, all of them at the timesteps below 50, and half of the rounds of purification.

    At 32x32 pixels and 10,000 images that is about 7 and 5 minutes of one core.

    Args:
        plan ([`Plan`]): From [`plan_for`], with timesteps up to 200 and the preset `tuned`.
    """
    plan = with_steps(plan, plan.training.max_train_steps * 5 // 36)
    training = dataclasses.replace(plan.training, trained_timesteps=(0, 50))
    rounds = plan.purification.num_rounds // 2
    return Plan(plan.unet, training, dataclasses.replace(plan.purification, num_rounds=rounds))


def purifier_to_be(
    plan: Plan, images: LabelledImages, perceptual: LPIPSModel | None
) -> JointConditionalPurificationPipeline:
    """An untrained purifier of a plan, by which to find out before the training what the trained one cannot do."""
    height, _, channels = images.images.shape[1:]
    unet = named_unet(plan.unet, in_channels=channels, sample_size=height)
    pipe = JointConditionalPurificationPipeline(unet, ddpm_scheduler(), perceptual)
    facts = plan.training.facts_of_the_network()
    end = plan.training.timesteps(pipe.scheduler)[1]
    pipe.purification_config = default_settings(end, **facts)
    return pipe


def train_planned(
    plan: Plan,
    images: LabelledImages,
    folder: Path,
    perceptual: LPIPSModel | None,
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> None:
    """
    Train a plan's purifier into a folder, or go on where an interrupted training stopped if the plan says so.

    Args:
        plan (`Plan`): The purifier.
        images (`LabelledImages`): To train it on.
        folder (`Path`): The repository to write.
        perceptual (`LPIPSModel`, *optional*): To put beside it.
        progress (`bool`): Whether to show a bar.
        stop (`Callable`, *optional*): As for `train_purifier`.
    """
    height, _, channels = images.images.shape[1:]
    train_purifier(
        images,
        unet=named_unet(plan.unet, in_channels=channels, sample_size=height, seed=plan.training.seed),
        scheduler=ddpm_scheduler(),
        output_dir=folder,
        config=plan.training,
        progress=progress,
        stop=stop,
    )
    if perceptual is not None:
        perceptual.save_pretrained(folder / "perceptual")
