"""The quickstart: it protects, and the rest is an audit."""

import dataclasses
import json

import numpy as np
import pytest

from jcdp_diffusers import PurificationConfig
from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images
from jcdp_diffusers.data.examples import digits
from jcdp_diffusers.data.perturbations import measured_norms
from jcdp_diffusers.poisons.protect import read_card
from jcdp_diffusers.quickstart import PRESETS, run_quickstart
from jcdp_diffusers.results import read_records
from jcdp_diffusers.trials import describe_images, results_by_trial


_SMOKE = PRESETS["smoke"]
_TRAINING = dataclasses.replace(_SMOKE.plan.training, noise_corner=4.0, validation_steps=2, checkpointing_steps=1)
SHORT = dataclasses.replace(_SMOKE, plan=dataclasses.replace(_SMOKE.plan, training=_TRAINING), seeds=2)
ONE_SEED = dataclasses.replace(SHORT, seeds=1)
ROWS = ("clean", "control", "protected", "early-stopping", "purified")


def run(folder, preset=SHORT, **options):
    return run_quickstart(folder, preset=preset, processes=1, say=lambda line: None, **options)


pytestmark = pytest.mark.usefixtures("without_drawing")  # of all but the first, which is looked at


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    return folder, run(folder)


def test_the_report_is_an_audit_with_a_control(finished):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text()) == report
    assert [row["row"] for row in report["rows"]] == list(ROWS)
    assert report["victims"]["seeds"] == [0, 1] and report["purifier"]["trained_here"]
    for name in ("report.html", "report.md", "pictures/images.png", "pictures/curves.png"):
        assert (folder / name).stat().st_size > 1000
    assert "trained on clean images with noise of the same size" in (folder / "report.md").read_text()
    assert "noise of corner frequency 4 cycles per image" in (folder / "report.md").read_text()


def test_every_figure_is_on_record_once(finished):
    folder, report = finished
    records = [record for record in read_records(folder / "records.jsonl") if record["what"] == "accuracy"]
    assert len(records) == 8
    for row in report["rows"]:
        values = [record["value"] for record in records if record["settings"]["row"] == row["row"]]
        assert values == ([] if row["row"] == "early-stopping" else row["accuracy"]["values"])


def test_the_data_sets_are_aligned_by_id(finished):
    folder, _ = finished
    clean, collected, test = digits(SHORT.sizes)
    for role, images in {"clean": clean, "collected": collected, "test": test}.items():
        written = load_images(folder / role)
        assert written.ids == images.ids and np.array_equal(written.images, images.images)
    protected, purified = load_images(folder / "protected"), load_images(folder / "purified")
    assert protected.ids == purified.ids == clean.ids
    assert np.array_equal(protected.labels, clean.labels) and np.array_equal(purified.labels, clean.labels)
    assert not np.array_equal(protected.images, clean.images)
    assert not np.array_equal(purified.images, protected.images)
    card = read_card(folder / "protected")
    assert (card["method"], card["preset"], card["source"]) == ("lsp", "published", "clean")


def test_each_victim_gets_the_images_of_its_row(finished):
    folder, _ = finished
    records = results_by_trial(folder / "records.jsonl", what="accuracy").values()
    trained_on = {record["settings"]["row"]: record["settings"]["train"]["content"] for record in records}
    for row in ("clean", "protected", "purified"):
        assert trained_on[row] == describe_images(load_images(folder / row))["content"]
    assert len(set(trained_on.values())) == 4
    test = describe_images(load_images(folder / "test"))
    assert all(record["settings"]["test"] == test for record in records)


def test_the_control_is_the_protections_own_noise_on_other_images(finished):
    from jcdp_diffusers.audit.rows import control_images

    folder, _ = finished
    clean, protected = load_images(folder / "clean"), load_images(folder / "protected")
    control = control_images(clean, protected, 0)
    records = results_by_trial(folder / "records.jsonl", what="accuracy").values()
    trained_on = {record["settings"]["row"]: record["settings"]["train"]["content"] for record in records}
    assert trained_on["control"] == describe_images(control)["content"]
    ours, theirs = (measured_norms(clean.images, other.images) for other in (protected, control))
    assert ours["linf"] == theirs["linf"] and ours["l2_mean"] == pytest.approx(theirs["l2_mean"], rel=1e-3)
    assert not np.array_equal(control_images(clean, protected, 1).images, control.images)


def test_the_purifier_keeps_how_it_was_used(finished):
    kept = PurificationConfig.from_pretrained(finished[0] / "purifier")
    assert kept == dataclasses.replace(SHORT.plan.purification, trained_timesteps=(0, 50), noise_corner=4.0)


def test_the_same_command_again_measures_nothing_anew(finished):
    folder, report = finished
    before = (folder / "records.jsonl").read_bytes()
    again = run(folder)
    assert again | {"time": None} == report | {"time": None}
    assert (folder / "records.jsonl").read_bytes() == before


def values(report) -> dict[str, list[float]]:
    """Accuracies of each row, by seed."""
    return {row["row"]: row["accuracy"]["values"] for row in report["rows"]}


@pytest.mark.long
def test_an_interruption_costs_what_was_begun_and_no_more(tmp_path, finished):
    """Cut off before the victims; the second call trains no purifier and comes to the same figures."""

    class Interrupted(Exception):
        pass

    def stop_before_the_victims(line):
        if line.startswith("Victims"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run_quickstart(tmp_path / "out", preset=ONE_SEED, processes=1, say=stop_before_the_victims)
    weights = next((tmp_path / "out/purifier/unet").glob("*.safetensors"))
    before, lines = weights.stat().st_mtime_ns, []
    report = run_quickstart(tmp_path / "out", preset=ONE_SEED, processes=1, say=lines.append)
    assert "Purifier: trained before" in lines and weights.stat().st_mtime_ns == before
    assert values(report) == {row: both[:1] for row, both in values(finished[1]).items()}


def test_an_audit_of_what_it_leaves_gives_the_same_figures(finished, tmp_path):
    """The same trials by name and bits, with the purifier given instead of trained."""
    folder, report = finished
    again = audit(
        **{role: folder / role for role in ("clean", "protected", "test")},
        purifier=folder / "purifier",
        preset=SHORT.plan.purification,
        output_dir=tmp_path / "audit",
        protocol="smoke",
        seeds=1,
        processes=1,
        device="cpu",
        say=lambda line: None,
    )
    figures = values(report)
    assert values(again) == {row: figures[row][:1] for row in ("clean", "protected", "early-stopping", "purified")}


def test_other_settings_do_not_pass_for_finished(finished):
    folder, _ = finished
    plan = dataclasses.replace(SHORT.plan, purification=PurificationConfig(diffusion_steps=20, num_inference_steps=1))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options, what in (({"preset": dataclasses.replace(SHORT, plan=plan)}, "plan"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"where a quickstart with another {what} was begun"):
            run(folder, **options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_with_files_of_others_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "photo.png").write_text("precious")
    assert main(["quickstart", "--output", str(tmp_path)]) == 1
    assert "'photo.png'" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_wrong_arguments_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="preset is 'mnist'.*digits, cifar10-mini"):
        run_quickstart(tmp_path, preset="mnist")
    with pytest.raises(ValueError, match="data is None"):
        run_quickstart(tmp_path, preset="cifar10-mini")
    with pytest.raises(ValueError, match="data is 'x'"):
        run_quickstart(tmp_path, data="x")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_an_audit_takes(name):
    preset = PRESETS[name]
    assert preset.seeds == 3
    start, end = preset.plan.training.trained_timesteps
    assert start == 0 and preset.plan.purification.diffusion_steps <= end
    assert preset.plan.training.mixed_precision in ("no", "auto")  # it runs on any machine


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 1.5])
def test_a_seed_that_no_victim_could_take_is_refused_before_the_folder_is_begun(seed, tmp_path):
    with pytest.raises(ValueError, match="seed is .*whole number"):
        run_quickstart(tmp_path / "out", preset=SHORT, seed=seed)
    assert not (tmp_path / "out").exists()
