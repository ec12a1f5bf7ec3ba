"""The audit from the command to the report, on digits of 16x16 and in smoke runs, which take seconds."""

import json
import shutil

import pytest
from audit_runs import ATTACKS, command

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images
from jcdp_diffusers.data.perturbations import visibility
from jcdp_diffusers.perceptual import lpips_at_hand
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.results import read_records
from jcdp_diffusers.trials import results_by_trial


pytestmark = pytest.mark.usefixtures("without_drawing")  # of all but the session's audit


def test_everything_is_there(audited, folders):
    report = json.loads((audited / "report.json").read_text())
    assert [row["row"] for row in report["rows"]] == [
        "clean",
        "protected",
        "early-stopping",
        "purified",
        "gray",
        "eclipse",
        "purified+corruption",
        "impulse-filter+purified+corruption",
    ]
    assert report["smoke"] and report["verdict"]["status"] == "smoke"
    assert "no figure means anything" in report["limits"][0]
    assert report["data"]["noise"]["linf"] > 0 and report["data"]["separation"]["collected_in_test"] == 0
    assert report["planned_seeds"] == 1 and report["roles"] == "disjoint" and report["purifier"]["trained_here"]
    for name in ("report.html", "report.md", "pictures/images.png", "pictures/curves.png"):
        assert (audited / name).stat().st_size > 1000
    purified, protected = load_images(audited / "purified"), load_images(folders["protected"])
    assert set(purified.ids) <= set(protected.ids) and len(purified) == report["data"]["sets"]["protected"]["images"]
    # The way to repeat it is the command that was given, without what is the default anyway.
    assert report["command"].startswith("jcdp audit --protected ") and "--seeds 1" in report["command"]
    assert "--victim" not in report["command"] and f"--countermeasures {ATTACKS}" in report["command"]


def test_an_attack_on_the_purified_images_counts_purification(audited):
    report = json.loads((audited / "report.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert rows["purified+corruption"]["prepare_seconds"] >= rows["purified"]["prepare_seconds"] > 0
    assert report["attacks"]["purified+corruption"]["settings"]["noise_deviation"] == 0.05
    # In a smoke run eclipse, too, purified in seconds, and the report does not say otherwise.
    assert report["attacks"]["eclipse"]["settings"]["eclipse-purifier"]["num_inference_steps"] == 2
    assert "2 UNet evaluations per image" in report["attacks"]["eclipse"]["cost"]
    assert any("where its authors train one of few images" in limit for limit in report["limits"])
    found = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    trained_on = {trial["settings"]["row"]: trial["settings"]["train"]["content"] for trial in found}
    assert trained_on["purified+corruption"] == trained_on["purified"] != trained_on["eclipse"]
    assert "| trained on purified images, with corruption |" in (audited / "report.md").read_text()


def test_an_attack_may_come_before_purification(audited):
    """The audit's own purification then takes its place in the order, on images of its own."""
    row = "impulse-filter+purified+corruption"
    report = json.loads((audited / "report.json").read_text())
    settings = report["attacks"][row]["settings"]
    assert list(settings) == ["impulse-filter", "purified", "corruption"]
    assert PurificationConfig(**settings["purified"]) == PurificationConfig(
        **{name: value for name, value in report["purification"].items() if name != "evaluations_per_image"}
    )
    assert "this audit's purification" in report["attacks"][row]["source"]
    found = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    (trial,) = (trial["settings"] for trial in found if trial["settings"]["row"] == row)
    assert trial["countermeasure"] == "impulse-filter+unconditional+corruption"
    assert PurificationConfig(**trial["purification"]) == PurificationConfig(**settings["purified"])
    page = (audited / "report.md").read_text()
    assert f"| protected images, with {row} |" in page
    (line,) = (line for line in page.splitlines() if line.startswith(f"| protected images, with {row} |"))
    assert "for the purifier)" in line


def test_every_figure_of_the_report_is_on_record(audited):
    report = json.loads((audited / "report.json").read_text())
    records = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    on_record = {(record["settings"]["row"], record["seed"]): record["value"] for record in records}
    shown = {(row["row"], 0): row["accuracy"]["values"][0] for row in report["rows"] if row["row"] != "early-stopping"}
    assert on_record == shown
    (protected,) = (row for row in report["rows"] if row["row"] == "protected")
    (stopped,) = (row for row in report["rows"] if row["row"] == "early-stopping")
    assert stopped["accuracy"] == protected["best_accuracy"]
    assert stopped["accuracy"]["values"] == pytest.approx([max(protected["curves"][0])], abs=1e-5)
    assert "best epoch on record, chosen by the test images" in (audited / "report.md").read_text()
    assert all(record["protocol"] == "smoke" for record in records)


def test_the_same_command_measures_nothing_anew_and_a_longer_one_only_what_is_new(audited, folders, tmp_path):
    output = shutil.copytree(audited, tmp_path / "again")
    roles = ("protected", "collected", "test", "clean")
    before = (output / "records.jsonl").read_text()
    weights = (output / "purifier/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert main(command(folders, output, "--countermeasures", ATTACKS, roles=roles)) == 0
    assert (output / "records.jsonl").read_text() == before
    assert main(command(folders, output, "--countermeasures", "gray,bdr-2", roles=roles)) == 0
    new = read_records(output / "records.jsonl")[len(before.splitlines()) :]
    assert [(record["what"], record["settings"]["row"]) for record in new] == [
        ("victim", "bdr-2"),
        ("accuracy", "bdr-2"),
    ]
    assert (output / "purifier/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


def test_an_interrupted_audit_goes_on(audited, folders, tmp_path):
    """Cut off after the first victim, and with a line that was being written."""
    output = shutil.copytree(audited, tmp_path / "cut")
    kept = (output / "records.jsonl").read_text().splitlines()[:3]
    (output / "records.jsonl").write_text("\n".join(kept) + "\n")
    shutil.rmtree(output / "purified")
    (output / "report.json").unlink()
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, output, "--countermeasures", "gray,purified+corruption", roles=roles)) == 0
    assert (output / "records.jsonl").read_text().splitlines()[:3] == kept
    again, before = (
        {row["row"]: row["accuracy"] for row in json.loads((folder / "report.json").read_text())["rows"]}
        for folder in (output, audited)
    )
    assert len(again) == 6 and again.items() <= before.items()


def test_the_report_says_where_the_protection_is_and_how_visible(audited, folders):
    data = json.loads((audited / "report.json").read_text())["data"]
    protected = load_images(audited / "purified").ids  # the few of a smoke run
    clean, poisoned = (load_images(folders[role]) for role in ("clean", "protected"))
    rows = [clean.ids.index(id_) for id_ in protected]
    assert data["visibility"] == visibility(clean.images[rows], poisoned.images[rows], perceptual=lpips_at_hand())
    assert set(data["jpeg_saves"]) == {"95", "75"} and data["jpeg_saves"]["95"]["mean"] > 0
    spectrum = data["spectrum"]
    assert spectrum["images"] == [len(rows), 100] and len(spectrum["power"]) == 3
    assert (audited / "pictures/spectrum.png").stat().st_size > 1000
    assert (audited / "pictures/native.png").stat().st_size > 500


def test_a_protection_beyond_its_budget_is_marked(audited, folders, tmp_path):
    output = shutil.copytree(audited, tmp_path / "out")
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, output, "--budget", "8", roles=roles)) == 0
    report = (output / "report.md").read_text()
    assert "**!** The protection changes values by up to" in report and "more than its budget of 8/255" in report
    assert "lies within 8/255 (up to 1 % of the values aside) of a collected or test image" in report
    assert "--budget 8" in report


def test_roles_of_the_paper_are_marked_everywhere(folders, tmp_path):
    output = tmp_path / "out"
    paper = {**folders, "collected": folders["test"]}
    assert main(command(paper, output, "--roles", "paper")) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["roles"] == "paper" and report["data"]["separation"]["collected_in_test"] == 150
    for name in ("report.md", "report.html"):
        assert "Roles as in the paper: the purifier has seen the test images." in (output / name).read_text()
    records = results_by_trial(output / "records.jsonl", what="accuracy").values()
    assert {record["settings"]["roles"] for record in records} == {"paper"}
