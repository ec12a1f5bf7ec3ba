"""The picture of all poisons, on a few real images."""

import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from eval import figures
from jcdp_diffusers.data import LabelledImages, write_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty digits for training and twenty for the test."""
    digits = load_digits(n_class=4)
    images = np.repeat((digits.images * 255 / 16).round().astype(np.uint8)[:80, :, :, None], 3, axis=3)
    data = LabelledImages(images, digits.target[:80], tuple(f"digit-{row}" for row in range(80)), tuple("0123"))
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(folder, data.subset(range(60)))
    write_dataset(folder, data.subset(range(60, 80)), split="test")
    return folder


def run(module, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options)])
    module.main()


def test_picture_shows_every_poison(source, tmp_path, monkeypatch):
    output = tmp_path / "figures" / "poisons.png"
    options = (
        "--dataset",
        source,
        "--cache",
        tmp_path / "cache",
        "--preset",
        "smoke",
        "--train_images",
        60,
        "--shown",
        4,
    )
    run(figures, monkeypatch, "poisons", *options, "--output", output)
    width, height = Image.open(output).size
    assert width > 400 and height > 600


def test_magnified_noise_fills_the_scale():
    clean = np.full((2, 2, 2, 3), 100, dtype=np.uint8)
    poisoned = clean.copy()
    poisoned[0, 0, 0, 0] += 8
    poisoned[0, 1, 1, 1] -= 4
    noise = figures.magnified(clean, poisoned)
    assert noise[0, 0, 0, 0] == 255 and noise[0, 1, 1, 1] == 64 and (noise[1] == 128).all()
