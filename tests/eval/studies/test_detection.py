"""The study of detection: records once, and tables that say what the records say."""

import sys

import numpy as np
import pytest

from eval.studies import detection
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.results import read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 noisy images of two classes, with a split train."""
    images = np.random.default_rng(0).integers(90, 160, (160, 16, 16, 3), dtype=np.uint8)
    data = LabelledImages(images, np.arange(160) % 2, tuple(f"i{row}" for row in range(160)))
    folder = tmp_path_factory.mktemp("noise")
    write_dataset(folder, data, split="train")
    return folder


def test_each_repetition_is_measured_once_and_tabulated(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection, "FRACTIONS", (0.05, 1.0))
    records = tmp_path / "records.jsonl"
    common = ["detection", "--output", str(records)]
    common += ["--dataset", str(folder), "--name", "noise", "--images", "60", "--repetitions", "2"]
    for question in ("clean", "clean", "poisons"):
        monkeypatch.setattr(sys, "argv", common + [question, "--cache", str(tmp_path / "cache"), "--poisons", "lsp"])
        detection.main()
    found = read_records(records)
    assert len(found) == 2 + 2 * len(detection.FRACTIONS)
    assert [record["settings"]["fraction"] for record in found[:3]] == [0.0, 0.0, 0.05]
    whole = found[-1]
    assert whole["settings"]["fraction"] == 1.0 and whole["value"]["linear"]["found"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["detection", "table", "--output", str(records)])
    detection.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| noise | 60 | 2 | 0 |")
    assert lines[-1].startswith("| LSP |") and lines[-1].split(" | ")[-1].rstrip(" |") in ("labels", "both")


def test_parts_that_are_larger_than_the_set_are_refused(folder, tmp_path, monkeypatch):
    options = ["--dataset", str(folder), "--name", "noise", "--images", "100"]
    monkeypatch.setattr(sys, "argv", ["detection", "clean", *options, "--output", str(tmp_path / "records.jsonl")])
    with pytest.raises(SystemExit, match="images is 100.*160"):
        detection.main()
