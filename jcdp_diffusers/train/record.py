"""What a training leaves on record: `training_record.json`, and the facts that are computed for it."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.training_utils import EMAModel

from ..data import LabelledImages
from .images import ImageFiles
from .reading import damaged, read_json


RECORD_NAME = "training_record.json"
_NUMBER = (int, float)
# What the model card reads.
_EXPECTED = {
    "base_model": (str, type(None)),
    "base_model_on_hub": bool,
    "data": dict,
    "data.num_images": int,
    "steps": int,
    "total_batch_size": int,
    "processes": int,
    "trained_timesteps": list,
    "num_train_timesteps": int,
    "parameters": int,
    "settings": dict,
    **{
        f"settings.{name}": kind
        for name, kind in {
            "timestep_sampling": str,
            "learning_rate": _NUMBER,
            "lr_scheduler": str,
            "lr_warmup_steps": int,
            "max_grad_norm": _NUMBER,
            "ema_max_decay": _NUMBER,
            "mixed_precision": str,
            "random_flip": bool,
            "seed": int,
        }.items()
    },
    "ema.weight_of_start": _NUMBER,
    "ema.mean_age": _NUMBER,
    "seconds": _NUMBER,
    "images_per_second": _NUMBER,
    "device": str,
    "packages": dict,
    "validation": list,
}


def read_record(folder: str | os.PathLike) -> dict:
    """
    The `training_record.json` of a purifier's folder.

    Raises:
        ValueError: If it is damaged; the sentence names the file.
    """
    path = Path(folder) / RECORD_NAME
    record = read_json(path, _EXPECTED)
    if not _is_range(record["trained_timesteps"]):
        raise damaged(path, "trained_timesteps is no range")
    for entry in record["validation"]:
        if not isinstance(entry, dict) or not all(type(entry.get(name)) in _NUMBER for name in ("step", "loss")):
            raise damaged(path, "an entry of validation has no step or no loss")
        if not _is_range(entry.get("timesteps")):
            raise damaged(path, "an entry of validation has no range of timesteps")
    if record["validation"] and type(record["data"].get("num_validation_images")) is not int:
        raise damaged(path, "data.num_validation_images is missing")
    return record


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)


def ema_horizon(ema: EMAModel, steps: int) -> dict:
    """
    How far back the averaged weights reach after a number of steps.

    Returns:
        `dict`: `weight_of_start`, the fraction of the weights as they were after the first step; `mean_age`, in steps.
    """
    fraction, age = 1.0, 0.0
    for step in range(2, steps + 1):
        decay = ema.get_decay(step)
        fraction, age = fraction * decay, decay * (age + 1)
    return {"weight_of_start": fraction, "mean_age": age}


def fingerprint(images: LabelledImages | ImageFiles) -> str:
    """What tells one collection from another: every pixel if they are in memory, else the files and their form."""
    if isinstance(images, ImageFiles):
        form = f"{images.channels}x{images.resolution}x{images.resolution}, {images.center_crop=}"
        if not images.center_crop:
            form += f", squares by seed {images.seed}"
        return f"{len(images)} images, {form}, {images.fingerprint()}"
    return hashlib.blake2b(np.ascontiguousarray(images.images), digest_size=16).hexdigest()
