"""The picture of all poisons, on a few real images."""

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from eval import figures, pictures
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.poisons.protect import protect_dataset


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
    clean = load_images(source, split="train")
    folders = []
    for name in ("lsp", "ops", "emn-class"):
        folders.append(tmp_path / name)
        protect_dataset(clean, folders[-1], method=name, preset="smoke")
    options = ("poisons", "--clean", source, "--shown", 4, "--output", output, "--protected")
    run(figures, monkeypatch, *options, folders[0])
    one = Image.open(output).size
    run(figures, monkeypatch, *options, *folders)
    width, height = Image.open(output).size
    assert width > 400 and height > 1.5 * one[1]  # a row of clean images and one per poison

    other = tmp_path / "other"
    protect_dataset(dataclasses.replace(clean, ids=tuple(f"x{i}" for i in range(60))), other, method="lsp")
    with pytest.raises(SystemExit, match="has the id 'x0'"):
        run(figures, monkeypatch, *options, other)


def test_all_rows_show_the_same_images(source, tmp_path, monkeypatch):
    clean = load_images(source, split="train")
    later = clean.subset(clean.labels > 0)  # no image of the first class
    folders = [tmp_path / name for name in ("lsp", "ops", "other")]
    for folder, name, data in zip(folders, ("lsp", "ops", "lsp"), (later, clean, later.subset(range(20, len(later))))):
        protect_dataset(data, folder, method=name, preset="smoke")
    drawn = []
    monkeypatch.setattr(pictures, "save_rows", lambda shown, output: drawn.append(shown))
    options = ("poisons", "--clean", source, "--shown", 3, "--protected")
    run(figures, monkeypatch, *options, *folders[:2])
    expected = [clean.images[np.argmax(clean.labels == label)] for label in (1, 2, 3)]
    first, *poisoned = (images for images, _ in drawn[0].values())
    assert np.array_equal(first, expected) and len(poisoned) == 2
    data = load_images(folders[1])
    ids = [clean.ids[np.argmax(clean.labels == label)] for label in (1, 2, 3)]
    assert np.array_equal(poisoned[1], [data.images[data.ids.index(id_)] for id_ in ids])
    with pytest.raises(SystemExit, match="protected '.*other' lacks the image 'digit-1', but all sets"):
        run(figures, monkeypatch, *options, folders[0], folders[2])


def test_magnified_noise_fills_the_scale():
    clean = np.full((2, 2, 2, 3), 100, dtype=np.uint8)
    poisoned = clean.copy()
    poisoned[0, 0, 0, 0] += 8
    poisoned[0, 1, 1, 1] -= 4
    noise = pictures.magnified(clean, poisoned)
    assert noise[0, 0, 0, 0] == 255 and noise[0, 1, 1, 1] == 64 and (noise[1] == 128).all()
