"""A few real images for the poisons: crops of the two photographs that come with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.data.perturbations import apply_perturbation


CLASSES = 4


def crops(count: int, size: int, channels: int) -> LabelledImages:
    """`count` crops of the two photographs, labelled 0, 1, 2, 3, 0, ..."""
    draw = np.random.default_rng(0)
    photographs = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    images = []
    for row in range(count):
        top, left = draw.integers(0, 300, size=2)
        images.append(photographs[row % 2][top : top + 4 * size : 4, left : left + 4 * size : 4])
    images = np.stack(images)
    if channels == 1:
        images = images.mean(axis=3, keepdims=True).round().astype(np.uint8)
    names = tuple(f"class {label}" for label in range(CLASSES))
    return LabelledImages(images, np.arange(count) % CLASSES, tuple(f"image-{row}" for row in range(count)), names)


@pytest.fixture(scope="session")
def data() -> LabelledImages:
    return crops(count=40, size=16, channels=3)


@pytest.fixture(scope="session")
def grey() -> LabelledImages:
    return crops(count=40, size=8, channels=1)


@pytest.fixture
def images(data) -> torch.Tensor:
    return data.tensor()


@pytest.fixture
def labels(data) -> torch.Tensor:
    return torch.from_numpy(data.labels)


@pytest.fixture(scope="session")
def delta(data):
    """A perturbation in whole levels, at most 8/255, of images that were clipped."""
    noise = np.random.default_rng(0).integers(-8, 9, data.tensor().shape)
    clean = data.images.transpose(0, 3, 1, 2).astype(int)
    return ((clean + noise).clip(0, 255) - clean).astype(np.int8)


@pytest.fixture(scope="session")
def poisoned(data, delta):
    return apply_perturbation(data.images, delta / 255.0)
