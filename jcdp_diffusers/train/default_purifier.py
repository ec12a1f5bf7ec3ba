"""
The purifier that is trained where none is given: which network, how it is trained and used, by images and device.
"""

import dataclasses
from pathlib import Path

import torch

from ..data import LabelledImages
from ..perceptual import LPIPSModel
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PRESETS, PurificationConfig, default_settings
from .config import TrainingConfig
from .loop import train_purifier
from .unets import ddpm_scheduler, named_unet


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


def plan_for(collected: LabelledImages, device: torch.device, smoke: bool) -> Plan:
    """
    A purifier that suits the images and the device: seconds for a smoke run, minutes on a CPU, the paper's network on
    an accelerator.

    Raises:
        ValueError: If the images are not square, too large, or of a side that the network cannot halve.
    """
    height, width, _ = collected.images.shape[1:]
    if height != width or height % 8 or height > 64:
        raise ValueError(
            f"collected has images of {height}x{width}, but without a purifier they must be squares with a side of 8, "
            "16, 24, ... or 64 pixels: image_size brings them to one, purifier names one for larger images."
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
    if device.type == "cuda":
        training = TrainingConfig(
            max_train_steps=20_000,
            train_batch_size=128,
            trained_timesteps=(0, 200),
            checkpointing_steps=2000,
            mixed_precision="bf16",
            **common,
        )
        return Plan("ddpm-cifar10", training, PurificationConfig(diffusion_steps=100, num_inference_steps=20))
    if len(collected) < 4000:
        training = TrainingConfig(
            max_train_steps=1200,
            train_batch_size=32,
            learning_rate=1e-3,
            trained_timesteps=(0, 200),
            checkpointing_steps=300,
            **common,
        )
        return Plan("tiny32", training, PurificationConfig(diffusion_steps=60, num_inference_steps=6))
    training = TrainingConfig(
        max_train_steps=3600,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        trained_timesteps=(0, 200),
        checkpointing_steps=600,
        mixed_precision="bf16",
        **common,
    )
    return Plan("mini32", training, PRESETS["tuned"])


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


def train_planned(plan: Plan, images: LabelledImages, folder: Path, perceptual: LPIPSModel | None) -> None:
    """Train a plan's purifier into a folder, or go on where an interrupted training stopped if the plan says so."""
    height, _, channels = images.images.shape[1:]
    train_purifier(
        images,
        unet=named_unet(plan.unet, in_channels=channels, sample_size=height, seed=plan.training.seed),
        scheduler=ddpm_scheduler(),
        output_dir=folder,
        config=plan.training,
    )
    if perceptual is not None:
        perceptual.save_pretrained(folder / "perceptual")
