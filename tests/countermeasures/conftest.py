"""Real images for the tests of countermeasures: scikit-learn's digits and its two photographs."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from jcdp_diffusers.countermeasures import Pairs, advcl, d_vae, paired
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims import ContrastiveRecipe


_all_digits = functools.cache(load_digits)  # from a file, for many tests


def digits(start: int, stop: int, channels: int = 3) -> LabelledImages:
    """Digits `start` to `stop`, 16x16, at grey levels between 0.2 and 0.8; in colour, the channels differ."""
    data = _all_digits()
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


@pytest.fixture(scope="session")
def others() -> LabelledImages:
    return digits(300, 420)


@pytest.fixture(scope="session")
def pairs_like():
    """`pairs_like(data)`: pairs of the shape of a data set."""
    return _pairs_like


def _pairs_like(data: LabelledImages) -> Pairs:
    """Digits of the shape of a data set, and the same after a tool that darkens every fourth column."""
    height, _, channels = data.images.shape[1:]
    originals = digits(300, 340, channels)
    originals = originals.with_images(np.resize(originals.images, (40, height, *data.images.shape[2:])))
    images = originals.images.astype(int)
    images[:, :, ::4] -= 20
    return Pairs(originals.with_images(images.clip(0, 255).astype(np.uint8)), originals)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def collected() -> LabelledImages:
    """Unprotected images, without labels."""
    return dataclasses.replace(digits(500, 640), labels=None, class_names=None)


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
def quick_networks(monkeypatch):
    """D-VAE and pairs in seconds, so that whatever is tested of every countermeasure is tested of them."""
    short = paired.PairedSettings(unet="tiny32", epochs=2, batch_size=20, learning_rate=1e-3)
    for name in paired.SETTINGS:
        monkeypatch.setitem(paired.SETTINGS, name, short)
    tiny = d_vae.DVAESettings(width=4, latent=4, epochs=2, batch_size=32, free_epochs=1)
    for name in d_vae.SETTINGS:
        monkeypatch.setitem(d_vae.SETTINGS, name, tiny)
