"""Audits that measure more: several draws, ways of learning, fractions, sets without labels, in several processes."""

import json

import numpy as np
import pytest
from audit_runs import ATTACKS, command

from jcdp_diffusers.audit.draws import separate_spreads
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images
from jcdp_diffusers.devices import cpu_threads
from jcdp_diffusers.trials import results_by_trial


pytestmark = pytest.mark.usefixtures("without_drawing")  # of all but the session's audit


@pytest.mark.long
def test_several_draws_show_their_spread_beside_that_of_the_victims(folders, purifier, tmp_path):
    output = tmp_path / "out"
    asked = ("--purifier", purifier, "--seeds", "2", "--draws", "2", "--countermeasures", "jpeg-95")
    assert main(command(folders, output, *asked)) == 0
    report = json.loads((output / "report.json").read_text())
    first, second = (load_images(folder) for folder in (output / "purified", output / "draws/2"))
    assert first.ids == second.ids and not np.array_equal(first.images, second.images)
    records = results_by_trial(output / "records.jsonl", what="accuracy").values()
    found = {}
    for record in records:
        found.setdefault(record["settings"]["row"], {})[record["seed"]] = record["value"]
    assert {row: list(seeds) for row, seeds in found.items()} == {
        "protected": [0, 1],
        "purified": [0, 1],
        "jpeg-95": [0, 1],
        "purified, draw 2": [1000, 1001],
    }
    values = [list(found[row].values()) for row in ("purified", "purified, draw 2")]
    assert report["draws"] == {"count": 2, "values": values} | separate_spreads(values)
    (row,) = (row for row in report["rows"] if row["row"] == "purified")
    assert row["accuracy"]["values"] == sum(values, [])
    assert row["accuracy"]["std"] == report["draws"]["between_victims"]
    assert len(row["best_accuracy"]["values"]) == len(row["train_accuracy"]["values"]) == len(row["curves"]) == 4
    text = (output / "report.md").read_text()
    assert "trained on purified images, 2 draws" in text and "Purification was drawn 2 times, with 2 victims" in text
    assert "protected images, saved as JPEG of quality 95" in text and "--draws 2" in report["command"]
    # One draw less is what was there before.
    before = (output / "records.jsonl").read_text()
    asked = [*asked[:4], *asked[6:]]
    assert main(command(folders, output, *asked)) == 0
    assert (output / "records.jsonl").read_text() == before
    assert json.loads((output / "report.json").read_text())["draws"] == {"count": 1, "values": values[:1]}


def test_several_ways_of_learning(folders, purifier, tmp_path):
    """One report has a classifier and a representation."""
    roles = ("protected", "collected", "test", "clean")
    more = ["--purifier", purifier, "--method", "supervised", "simclr"]
    assert main(command(folders, tmp_path / "out", *more, roles=roles)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    (other,) = report["others"]
    assert report["victims"]["method"] == "supervised" and other["victims"]["method"] == "simclr"
    assert [row["row"] for row in report["rows"]] == ["clean", "protected", "early-stopping", "purified"]
    assert [row["row"] for row in other["rows"]] == ["clean", "protected", "purified"]
    assert other["rows"][0]["train_accuracy"] is None and other["verdict"]["status"] == "smoke"
    learned = [100 * one["rows"][-1]["accuracy"]["mean"] for one in (report, other)]
    said = f"a classifier learns {learned[0]:.0f} %, a representation (SimCLR) learns {learned[1]:.0f} %"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"From the purified images, {said}." in text and "What a representation (SimCLR) learned" in text
    settings = [one["settings"] for one in results_by_trial(tmp_path / "out/records.jsonl", what="accuracy").values()]
    assert [one.get("method") for one in settings].count("simclr") == 3 == len(settings) - 3
    assert {one["probe"]["images"] for one in settings if "probe" in one} == {
        report["data"]["sets"]["clean"]["images"]
    }


def test_fractions_and_whitening_by_collected_images(folders, purifier, tmp_path):
    roles = ("protected", "collected", "test", "clean")
    more = ["--purifier", purifier, "--fractions", "0.5", "1", "--victim", "convnet94"]
    assert main(command(folders, tmp_path / "out", *more, "--whitening", "collected", roles=roles)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    half, whole = report["fractions"]
    assert (half["fraction"], whole["fraction"]) == (0.5, 1) and whole["clean_rest"] is None
    assert whole["all"]["values"] == report["rows"][1]["accuracy"]["values"]
    assert (tmp_path / "out/pictures/fractions.png").exists()
    for name in ("report.md", "report.html"):
        assert "Where a part is protected" in (tmp_path / "out" / name).read_text()
    assert "patches of 100 collected images whitened" in (tmp_path / "out/report.md").read_text()
    assert "--recipe smoke --whitening collected --fractions 0.5 1.0" in report["command"]
    settings = [one["settings"] for one in results_by_trial(tmp_path / "out/records.jsonl", what="accuracy").values()]
    assert all(one["whitening"]["images"] == 100 for one in settings)
    images = {one["row"]: one["train"]["images"] for one in settings}
    assert images["50 % protected"] == images["protected"]
    assert abs(images["without the protected 50 %"] - images["protected"] / 2) <= 5  # each of ten classes is halved


@pytest.mark.long
def test_the_purifier_is_trained_beside_victims(folders, tmp_path):
    """In two processes, to the same figures; thread for thread the same purifier."""
    roles = ("protected", "collected", "test", "clean")
    asked = command(folders, tmp_path / "out", "--countermeasures", ATTACKS, roles=roles)
    asked[asked.index("--processes") + 1] = "2"
    with cpu_threads(1):
        assert main(asked) == 0
        assert main(command(folders, tmp_path / "one", "--countermeasures", ATTACKS, roles=roles)) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "one")]
    assert [row["accuracy"] for row in reports[0]["rows"]] == [row["accuracy"] for row in reports[1]["rows"]]
    assert reports[0]["purifier"]["digest"] == reports[1]["purifier"]["digest"]


@pytest.mark.long
def test_images_without_labels_are_audited(without_labels, purifier, tmp_path):
    more = ("--purifier", purifier, "--method", "byol", "--probe_images", without_labels["probe"])
    assert main(command(without_labels, tmp_path / "out", *more, roles=("protected", "test"))) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["data"]["shortcut"] is None and report["victims"]["method"] == "byol"
    assert [row["row"] for row in report["rows"]] == ["protected", "purified"]
    assert "resnet18 by byol, a linear probe of 120 clean labelled images" in (tmp_path / "out/report.md").read_text()
