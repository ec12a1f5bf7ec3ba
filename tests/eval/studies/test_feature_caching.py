"""The records of what reuse of features saves and does to pixels."""

import sys

import pytest
import torch
from purifying import source_folder

from eval.studies import feature_caching
from jcdp_diffusers.results import read_records


@pytest.fixture
def records(tmp_path, monkeypatch):
    """From the words of a command line to the records that it leaves behind."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words), "--output", str(tmp_path / "records.jsonl")])
        threads = torch.get_num_threads()
        try:
            feature_caching.main()
        finally:
            torch.set_num_threads(threads)
        return read_records(tmp_path / "records.jsonl")

    return run


def test_a_record_per_network(records):
    (record,) = records("speed", "--unets", "tiny32", "--batch", 4, "--repeats", 3, "--precision", "float32")
    assert 0 < record["value"]["reused"] < record["value"]["whole"]  # it does a third of the work
    assert record["settings"]["unet"] == "tiny32" and record["settings"]["dtype"] == "torch.float32"


def test_a_record_per_interval_and_one_for_another_seed(records, ddpm_folder, tmp_path):
    words = ["--purifier", ddpm_folder, "--dataset", source_folder(tmp_path / "images", 3, size=32)]
    words += ["--images", 3, "--diffusion_steps", 10, "--num_inference_steps", 4, "--precision", "float32"]
    found = records("pixels", *words, "--intervals", 1, 4)
    assert [(record["seed"], record["settings"]["feature_reuse"]) for record in found] == [(1, 1), (0, 1), (0, 4)]
    assert found[1]["value"] == {"mean": 0, "largest": 0}
    assert 0 < found[2]["value"]["mean"] < found[0]["value"]["mean"]
    assert [record["settings"]["whole_evaluations"] for record in found] == [4, 4, 1]
    more = records("pixels", *words, "--intervals", 1, "--num_inference_steps", 4, 10, "--reference", 10)[3:]
    assert [record["settings"]["num_inference_steps"] for record in more] == [10, 4, 10]
    assert more[1]["value"]["mean"] > more[2]["value"]["mean"] == 0
