"""The record of what the shortcut test sees."""

import sys

import numpy as np
from sklearn.datasets import load_digits

from eval.studies import shortcut
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.results import read_records


def test_a_record_per_poison_and_none_twice(tmp_path, monkeypatch):
    digits = load_digits()
    images = np.repeat((digits.images * 15).astype(np.uint8)[:300, :, :, None], 3, axis=3)
    data = LabelledImages(images, digits.target[:300], tuple(map(str, range(300))), tuple("0123456789"))
    write_dataset(tmp_path / "digits", data.subset(range(200)))
    write_dataset(tmp_path / "digits", data.subset(range(200, 300)), split="test")
    words = ["--dataset", tmp_path / "digits", "--cache", tmp_path / "cache", "--output", tmp_path / "records.jsonl"]
    words += ["--train_images", 200, "--test_images", 100, "--poisons"]
    for chosen in (["clean"], ["clean", "ops"]):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words), *chosen])
        shortcut.main()
    records = read_records(tmp_path / "records.jsonl")
    assert [record["settings"]["poison"] for record in records] == ["clean", "ops"]
    assert records[1]["settings"]["poison_norms"]["l0_max"] == 1 and not records[0]["value"]["found"]
