"""Trainings of a tiny purifier that take a second, and what they leave in their folders."""

import json

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny import tiny_unet

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.train.loop import TrainingConfig, train_purifier


def make_images(count=24, channels=3, size=8, seed=0):
    """Smooth pictures, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 2, 2, channels))
    pixels = np.repeat(np.repeat(coarse, size // 2, axis=1), size // 2, axis=2).astype(np.uint8)
    return LabelledImages(pixels, None, tuple(map(str, range(count))))


IMAGES, HELD_OUT = make_images(), make_images(10, seed=1)


def train(folder, unet=None, images=IMAGES, scheduler=None, held_out=None, base_model=None, **settings):
    """Train a little; returns the folder."""
    defaults = dict(
        max_train_steps=4, train_batch_size=4, lr_warmup_steps=0, logging_steps=1, checkpointing_steps=None,
        num_grid_images=0, cpu=True,
    )  # fmt: skip
    return train_purifier(
        images,
        unet=unet or tiny_unet(size=8),
        scheduler=scheduler or DDPMScheduler(),
        output_dir=folder,
        config=TrainingConfig(**(defaults | settings)),
        validation_images=held_out,
        base_model=base_model,
        progress=False,
    )


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def record(folder):
    return json.loads((folder / "training_record.json").read_text())


def same(first, second, **tolerance):
    assert first.keys() == second.keys()
    if not tolerance:
        return all(torch.equal(first[name], second[name]) for name in first)
    return all(torch.allclose(first[name], second[name], **tolerance) for name in first)
