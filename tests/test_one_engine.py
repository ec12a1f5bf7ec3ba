"""`jcdp score`, `jcdp audit` and `eval/benchmark.py` measure one and the same trial, bit for bit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from purifying import quick_pipe
from sklearn.datasets import load_digits

from eval.benchmark import read_grid, run_grid
from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.results import read_records
from jcdp_diffusers.score import score
from jcdp_diffusers.trials import Trial, results_by_trial
from jcdp_diffusers.victims import RECIPES


CHANGES = {"epochs": 2, "max_steps_per_epoch": 3, "width": 2}
RECIPE = dataclasses.replace(RECIPES["digits"], **CHANGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Digits as protected (of no poison), collected and test images, and a purifier."""
    folder = tmp_path_factory.mktemp("one_engine")
    digits = load_digits()
    images = np.repeat((digits.images * 15).astype(np.uint8)[:200, :, :, None], 3, axis=3)
    data = LabelledImages(images, digits.target[:200], tuple(map(str, range(200))), tuple("0123456789"))
    for name, rows in (("train", range(100)), ("collected", range(100, 120)), ("test", range(120, 200))):
        write_dataset(folder / name, data.subset(rows))
    quick_pipe().save_pretrained(folder / "purifier")
    return folder


def by_countermeasure(records: Path) -> dict[str, tuple[dict, float, dict]]:
    """Settings, accuracy and details of each trial on the images as they are."""
    accuracy, details = (results_by_trial(records, what=what) for what in ("accuracy", "victim"))
    return {
        record["settings"]["countermeasure"]: (record["settings"], record["value"], details[name]["value"])
        for name, record in accuracy.items()
        if record["settings"].get("row") != "purified"
    }


@pytest.fixture(scope="module")
def audited(folder) -> dict:
    audit(
        protected=folder / "train",
        test=folder / "test",
        purifier=folder / "purifier",
        output_dir=folder / "audit",
        protocol=RECIPE,
        attacks=["unconditional"],
        seeds=1,
        processes=1,
        device="cpu",
        say=len,
    )
    return by_countermeasure(folder / "audit/records.jsonl")


@pytest.fixture(scope="module")
def measured(folder) -> dict:
    data = {"protected": "train", "collected": "collected", "test": "test"}
    grid = {
        "name": "tiny",
        "data": {role: {"source": str(folder / name)} for role, name in data.items()},
        "poisons": ["none"],
        "countermeasures": ["none", "unconditional"],
        "protocol": "digits",
        "recipe": CHANGES,
        "seeds": [0],
        "purifier": str(folder / "purifier"),
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    run_grid(read_grid(folder / "grid.yaml"), folder / "benchmark", say=len)
    return by_countermeasure(folder / "benchmark/records.jsonl")


@pytest.mark.parametrize("countermeasure", ["none", "unconditional"])
def test_three_programs_give_one_trial_one_name_and_the_same_bits(countermeasure, folder, audited, measured):
    train, test = (load_images(folder / name) for name in ("train", "test"))
    purifier = None if countermeasure == "none" else folder / "purifier"
    result = score(train, test, protocol=RECIPE, seeds=1, countermeasure=countermeasure, purifier=purifier)
    run = result["runs"][0]
    own = dict(Trial(train, test, RECIPE, 0, countermeasure=countermeasure, purifier=purifier).settings)
    assert own.pop("trial") == run["trial"]

    without_time = lambda history: [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]
    for settings, accuracy, details in (audited[countermeasure], measured[countermeasure]):
        # Beside `about`, what names the trial is the same.
        assert {name: settings[name] for name in own} == own
        assert accuracy == run["accuracy"] and details["train_accuracy"] == run["train_accuracy"]
        assert details["confusion"] == run["confusion"]
        assert without_time(details["history"]) == without_time(run["history"])
    assert len(read_records(folder / "benchmark/records.jsonl")) == 4
