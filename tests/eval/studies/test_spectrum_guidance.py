"""The study of the spectrum's guide: sets that do not meet, rows as they are called, records once."""

import dataclasses
import sys

import numpy as np
import pytest
from diffusers import DDPMScheduler
from tiny import tiny_unet

from eval.studies import spectrum_guidance
from jcdp_diffusers import JointConditionalPurificationPipeline, PurificationConfig
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.spectrum import ProtectionTable


TABLE = ProtectionTable(((1.0,),), ((5.0, 5.0, 5.0),), ((9e9, 9e9, 9e9),))
BARS = [1 - 0.002 * (t + 1) for t in range(100)]


def test_a_rows_name_is_how_it_purifies():
    settings = lambda row: spectrum_guidance.settings_of(row, TABLE, BARS)
    assert settings("nothing") is None
    assert settings("no guide").evaluations_per_round == (5,) and settings("no guide").protection is None
    many = settings("no guide, T_p 30, rounds 8")
    assert (many.diffusion_steps, many.evaluations_per_round) == (30, (2,) * 8)
    paper = settings("the paper's guides")
    assert paper.is_guided and paper.evaluations_per_image == 20
    weak = settings("adaptive, scale 0.1, T_p 70")
    assert (weak.protection_guidance_scale, weak.diffusion_steps, weak.protection) == (0.1, 70, TABLE)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study on 200 noisy images, 80 of them collected, with victims of one epoch."""
    monkeypatch.setattr(spectrum_guidance, "COLLECTED", range(120, 200))
    for name, value in (("PROTECTED", 80), ("IMAGES", 32), ("VALIDATION", 20), ("TEST", 20), ("RESIDUE_IMAGES", 8)):
        monkeypatch.setattr(spectrum_guidance, name, value)
    recipe = dataclasses.replace(spectrum_guidance.RECIPE, epochs=1, batch_size=16, width=4)
    monkeypatch.setattr(spectrum_guidance, "RECIPE", recipe)
    images = np.random.default_rng(0).integers(90, 160, (200, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 200), ("test", 40)):
        ids = tuple(f"{split}/{row}" for row in range(count))
        data = LabelledImages(images[:count] + (split == "test"), np.arange(count) % 3, ids)
        write_dataset(tmp_path / split, data, split=split)
        for file in (tmp_path / split).glob("*.parquet"):
            file.rename(tmp_path / "data" / file.name)
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler())
    pipe.purification_config = PurificationConfig(trained_timesteps=(0, 40), diffusion_steps=20)
    pipe.save_pretrained(tmp_path / "purifier")
    return tmp_path


@pytest.mark.long
def test_the_study_from_sets_to_table_and_picture(small, monkeypatch, capsys):
    records = small / "records.jsonl"
    options = ["--dataset", small / "data", "--purifier", small / "purifier", "--cache", small / "cache"]

    def run(question, *more):
        words = [question, "--output", records, *options, *more]
        monkeypatch.setattr(sys, "argv", ["spectrum_guidance", *map(str, words)])
        spectrum_guidance.main()

    run("validation", "--poisons", "lsp", "--rows", "nothing", "adaptive, scale 0.3")
    found = read_records(records)
    adaptive = next(r["settings"] for r in found if r["settings"]["row"].startswith("adaptive"))
    assert adaptive["train"]["images"] == 32 and adaptive["test"]["images"] == 20
    assert adaptive["purification"]["protection"] and adaptive["purification"]["diffusion_steps"] <= 40
    run("validation", "--poisons", "lsp", "--rows", "nothing")
    assert len(read_records(records)) == len(found) == 4
    run("spectra", "--poisons", "lsp")
    value = read_records(records)[-1]["value"]
    seen = np.array(value["estimate"]) > 5 * np.array(value["error"])
    assert seen.any() and np.array(value["estimate"])[seen] == pytest.approx(np.array(value["true"])[seen], rel=0.6)
    run("residues", "--poisons", "lsp", "--rows", "adaptive, scale 1", "adaptive, scale 0.1")
    strong, weak = (record["value"] for record in read_records(records)[-2:])
    assert sum(strong["change"]) < sum(weak["change"]) and strong["kept"][-1] > weak["kept"][-1]
    capsys.readouterr()
    run("table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| nothing | ") and lines[-1].startswith("| adaptive, scale 0.1 | ")
    run("picture", "--picture", small / "spectrum.png")
    assert (small / "spectrum.png").stat().st_size > 10_000


@pytest.mark.parametrize(("question", "option"), [("picture", "picture"), ("spectra", "dataset")])
def test_an_option_that_a_question_needs_is_wrong_usage_without_it(monkeypatch, capsys, question, option):
    monkeypatch.setattr(sys, "argv", ["spectrum_guidance", question, "--output", "records.jsonl"])
    with pytest.raises(SystemExit) as usage:
        spectrum_guidance.main()
    assert usage.value.code == 2 and f"--{option} is not given, but {question} needs it" in capsys.readouterr().err


def test_a_table_has_the_mean_of_the_seeds(tmp_path):
    facts = dict(what="accuracy", protocol="short", device="cpu", seconds=1.0)
    for part, poison, values in (("test", "lsp", (0.5, 0.6)), ("test", "ar", (0.7,)), ("validation", "lsp", (0.1,))):
        for seed, value in enumerate(values):
            settings = {"poison": poison, "row": "adaptive", "part": part}
            append_record(tmp_path / "r.jsonl", value=value, seed=seed, settings=settings, **facts)
    lines = spectrum_guidance.table(read_records(tmp_path / "r.jsonl"), "test").splitlines()
    assert lines[0] == "| what is done about it | LSP | AR |"
    assert lines[2] == "| adaptive | 55.0 ± 7.1 | 70.0 |"
