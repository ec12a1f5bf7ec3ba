"""The record of what countermeasures do, on a few real images."""

import sys

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from sklearn.datasets import load_digits
from tiny import tiny_unet

from eval import countermeasures as script
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.results import read_records


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty digits for training and twenty for the test, 16x16."""
    digits = load_digits(n_class=4)
    images = (digits.images[:80, :, :, None] * 255 / 16).round().astype(np.uint8).repeat(3, axis=3)
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    data = LabelledImages(images, digits.target[:80], tuple(f"digit-{row}" for row in range(80)), tuple("0123"))
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(folder, data.subset(range(60)))
    write_dataset(folder, data.subset(range(60, 80)), split="test")
    return folder


def test_every_cell_is_recorded_once(source, tmp_path, monkeypatch):
    purifier, output = tmp_path / "purifier", tmp_path / "records.jsonl"
    DDPMPipeline(tiny_unet(size=16), DDPMScheduler()).save_pretrained(purifier)

    def run(*options):
        fixed = ("--dataset", source, "--output", output, "--cache", tmp_path / "cache", "--protocol", "smoke")
        fixed += ("--preset", "smoke", "--train_images", 60, "--test_images", 20, "--purifier", purifier)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, fixed + options)])
        script.main()

    run("--poisons", "lsp", "--countermeasures", "none")
    assert len(read_records(output)) == 3
    run("--poisons", "lsp", "clean", "--countermeasures", "none", "gray", "eclipse", "--seeds", 0, 1)
    records = read_records(output)
    run("--poisons", "clean", "lsp", "--countermeasures", "eclipse", "gray", "none", "--seeds", 1, 0)
    assert read_records(output) == records

    cells = [(r["settings"]["poison"], r["settings"]["countermeasure"], r["seed"], r["what"]) for r in records]
    assert len(set(cells)) == len(cells) == 2 * 3 * 2 * 3
    eclipse = next(r for r in records if r["settings"]["countermeasure"] == "eclipse")
    assert eclipse["settings"]["countermeasure_settings"]["eclipse-purifier"]["diffusion_steps"] == 12
    assert eclipse["settings"]["prepare_seconds"] > 0 and eclipse["protocol"] == "smoke"
    assert eclipse["settings"]["poison_settings"] and eclipse["settings"]["poison_norms"]["l2_mean"] > 0


def test_no_cell_is_begun_when_the_time_is_up(source, tmp_path, monkeypatch):
    options = ["--dataset", source, "--output", tmp_path / "records.jsonl", "--cache", tmp_path, "--minutes", 0]
    options += ["--poisons", "clean", "--train_images", 60, "--test_images", 20, "--protocol", "smoke"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options)])
    script.main()
    assert not (tmp_path / "records.jsonl").exists()
