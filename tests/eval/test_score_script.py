"""The script that scores one data set's training split against its test split."""

import json
import sys

import numpy as np
import pytest

from eval import figures, purify_scaling, score, throughput
from eval.studies import feature_caching, shortcut
from jcdp_diffusers.data import LabelledImages, write_dataset


def images(count, seed, classes=2):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(count) % classes, tuple(f"{seed}-{row}" for row in range(count)))


def test_both_splits_of_one_data_set(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", images(40, 0), split="train")
    write_dataset(tmp_path / "data", images(20, 1), split="test")
    options = ["--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "s.json"), "--protocol", "smoke"]
    monkeypatch.setattr(sys, "argv", ["score", *options, "--seeds", "1"])
    score.main()
    told = json.loads((tmp_path / "s.json").read_text())
    assert told["request"]["recipe"]["name"] == "smoke" and len(told["request"]["seeds"]) == 1


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        (score, ["--dataset", "nowhere", "--output", "s.json"], "score: .*'nowhere'"),
        (shortcut, ["--dataset", "nowhere", "--cache", "cache", "--output", "s.jsonl"], "shortcut: .*'nowhere'"),
        (figures, ["purified", "--sets", "a=nowhere", "b=nowhere", "--output", "p.png"], "figures: .*'nowhere'"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(tmp_path, monkeypatch, script, options, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *options])
    with pytest.raises(SystemExit, match=sentence) as stop:
        script.main()
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("script", "inner", "options"),
    [
        (throughput, "keep_freed_memory", ["peak", "--output", "r.jsonl"]),
        (purify_scaling, "measure_codec", ["--output", "r.jsonl", "codec"]),
        (shortcut, "load_images", ["--dataset", "here", "--cache", "cache", "--output", "s.jsonl"]),
        (feature_caching, "named_unet", ["speed", "--output", "r.jsonl"]),
    ],
)
def test_an_interruption_ends_in_one_sentence(monkeypatch, capsys, script, inner, options):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, inner, interrupted)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", ["script", *options])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 130 and capsys.readouterr().err.count("\n") == 1
