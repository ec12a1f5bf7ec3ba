"""Real images for the tests of countermeasures: scikit-learn's digits and its two photographs."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from jcdp_diffusers.countermeasures import advcl, d_vae
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims import ContrastiveRecipe


def digits(start: int, stop: int, channels: int = 3) -> LabelledImages:
    """Digits `start` to `stop`, 16x16, at grey levels between 0.2 and 0.8; in colour, the channels differ."""
    data = load_digits()
    images = (51 + data.images[start:stop, :, :, None] * 9.5).round().repeat(2, axis=1).repeat(2, axis=2)
    tint = np.array([1.0, 0.8, 0.6][:channels])
    names = tuple("0123456789")
    ids = tuple(f"digits/{row}" for row in range(start, stop))
    return LabelledImages((images * tint).round().astype(np.uint8), data.target[start:stop], ids, names)


@pytest.fixture(scope="session")
def train() -> LabelledImages:
    return digits(0, 160)


@pytest.fixture(scope="session")
def test() -> LabelledImages:
    return digits(160, 260)


@pytest.fixture(scope="session")
def photos() -> LabelledImages:
    """Eight 32x32 pieces of the photographs, with colour and detail."""
    pictures = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    pieces = [picture[top : top + 32, 200:232] for picture in pictures for top in (60, 120, 180, 240)]
    return LabelledImages(np.stack(pieces), np.arange(8) % 4, tuple(f"photo/{row}" for row in range(8)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def collected() -> LabelledImages:
    """Unprotected images, without labels."""
    return dataclasses.replace(digits(260, 300), labels=None, class_names=None)


@pytest.fixture(scope="session")
def quick_views() -> ContrastiveRecipe:
    """SimCLR in a second."""
    return ContrastiveRecipe(
        "quick", 2, batch_size=16, learning_rate=0.05, temperature=0.5, width=4, max_steps_per_epoch=2, flip=False
    )


@pytest.fixture(autouse=True)
def quick_adversaries(monkeypatch, quick_views):
    """AdvCL in seconds, likewise."""
    for name, settings in advcl.SETTINGS.items():
        tiny = dataclasses.replace(settings, steps=2, clusters=settings.clusters and (2, 3), recipe=quick_views)
        monkeypatch.setitem(advcl.SETTINGS, name, tiny)


@pytest.fixture(autouse=True)
def quick_auto_encoders(monkeypatch):
    """D-VAE in seconds, so that whatever is tested of every countermeasure is tested of it."""
    tiny = d_vae.DVAESettings(width=4, latent=4, epochs=2, batch_size=32, free_epochs=1)
    for name in d_vae.SETTINGS:
        monkeypatch.setitem(d_vae.SETTINGS, name, tiny)
