"""Victims of seconds: scikit-learn's digits, a recipe for them, and what tests compare."""

import dataclasses

import numpy as np
import torch
from sklearn.datasets import load_digits

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims import Recipe


QUICK = Recipe("quick", epochs=2, batch_size=32, learning_rate=0.05, schedule="one_cycle", width=4)


def digits(start, stop, enlarge=2, **changes) -> LabelledImages:
    """scikit-learn's digits `start` to `stop`, enlarged from 8x8 by repetition."""
    data = load_digits()
    images = (data.images[start:stop] * 15.9375).round().astype(np.uint8)[..., None]
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    ids = tuple(f"digits/{row}" for row in range(start, stop))
    whole = LabelledImages(images, data.target[start:stop], ids, class_names=None)
    return dataclasses.replace(whole, **changes)


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def as_tensors(data):
    return torch.from_numpy(data.images).permute(0, 3, 1, 2), torch.from_numpy(data.labels)
