"""The record of what poisons do, and their picture, on a few real images."""

import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from eval import figures
from eval import poisons as script
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.results import read_records


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


def test_every_cell_is_recorded_once(source, tmp_path, monkeypatch):
    output = tmp_path / "records.jsonl"
    options = ("--dataset", source, "--output", output, "--cache", tmp_path / "cache", "--poisons", "lsp", "emn-class")
    options += ("--preset", "smoke", "--protocol", "smoke", "--width", 4, "--train_images", 60, "--test_images", 20)
    run(script, monkeypatch, *options, "--seeds", 0, "--kinds", "poison")
    assert len(read_records(output)) == 2 * 3
    run(script, monkeypatch, *options, "--seeds", 0, 1)
    records = read_records(output)
    run(script, monkeypatch, *options, "--seeds", 0, 1)
    assert read_records(output) == records

    cells = [(record["settings"]["data"], record["settings"].get("poison"), record["seed"]) for record in records]
    cells = [cell for cell, record in zip(cells, records, strict=True) if record["what"] == "accuracy"]
    assert sorted(cells, key=str) == sorted(
        [("clean", None, seed) for seed in (0, 1)]
        + [(kind, name, seed) for kind in ("poison", "control") for name in ("lsp", "emn-class") for seed in (0, 1)],
        key=str,
    )
    assert {record["what"] for record in records} == {"accuracy", "peak_accuracy", "train_accuracy"}
    poison = next(record for record in records if record["settings"].get("poison") == "emn-class")
    assert poison["protocol"] == "smoke" and poison["settings"]["preset"] == "smoke"
    assert poison["settings"]["poison_settings"]["epsilon"] == 8.0 and poison["settings"]["poison_norms"]["linf"] <= 8


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
