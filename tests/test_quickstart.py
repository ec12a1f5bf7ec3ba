import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from jcdp_diffusers import PurificationConfig
from jcdp_diffusers.data import load_images
from jcdp_diffusers.data.examples import digits
from jcdp_diffusers.quickstart import ROWS, Telling, guides_in_words, random_noise, run_quickstart
from jcdp_diffusers.results import read_records
from jcdp_diffusers.train.loop import TrainingConfig


SHORT = Telling(
    name="short",
    title="Digits, too few and too short to mean anything",
    sizes=(60, 40, 60),
    unet="tiny32",
    training=TrainingConfig(
        max_train_steps=2,
        train_batch_size=4,
        trained_timesteps=(0, 50),
        noise_corner=4.0,
        validation_steps=2,
        checkpointing_steps=1,
    ),
    purification=PurificationConfig(diffusion_steps=10, num_inference_steps=2),
    recipe="smoke",
    seeds=2,
)


def test_random_noise_has_each_images_norm():
    generator = np.random.default_rng(0)
    clean = generator.integers(60, 180, (5, 8, 8, 3), dtype=np.uint8)
    protected = (clean + generator.integers(-9, 9, clean.shape)).astype(np.uint8)
    noise = random_noise(clean, protected, 0)
    expected = np.linalg.norm((protected.astype(float) - clean).reshape(5, -1) / 255, axis=1)
    np.testing.assert_allclose(noise.flatten(1).norm(dim=1), expected, rtol=1e-5)
    assert torch.equal(noise, random_noise(clean, protected, 0))
    assert not torch.equal(noise, random_noise(clean, protected, 1))


def test_guides_are_named_from_the_settings():
    assert guides_in_words(PurificationConfig()) == "no guide"
    assert guides_in_words(PurificationConfig(pixel_guidance_scale=100.0)) == "pixel guide at scale 100"
    both = PurificationConfig(pixel_guidance_scale=3e4, perceptual_guidance_scale=60.0, perceptual_network="lpips-vgg")
    assert guides_in_words(both) == "pixel guide at scale 30000 and perceptual guide (lpips-vgg) at scale 60"


def test_an_interruption_costs_no_seconds_and_one_victim_has_no_spread(tmp_path):
    class Interrupted(Exception):
        pass

    def stop_before_the_victims(line):
        if line.startswith("Training 4 victims"):
            raise Interrupted

    story = dataclasses.replace(SHORT, seeds=1)
    with pytest.raises(Interrupted):
        run_quickstart(tmp_path, telling=story, say=stop_before_the_victims)
    trained = json.loads((tmp_path / "purifier/training_record.json").read_text())["seconds"]
    purified = json.loads((tmp_path / "purified/summary.json").read_text())["seconds_of_work"]
    report = run_quickstart(tmp_path, telling=story, say=lambda line: None)
    counted = {
        record["settings"]["stage"]: record["value"]
        for record in read_records(tmp_path / "records.jsonl")
        if record["what"] == "seconds"
    }
    assert counted["train"] == trained and counted["purify"] == purified
    assert report["seconds"] >= trained + purified
    assert "one victim" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run_quickstart(folder, telling=SHORT, say=lambda line: None)


def test_the_report_holds_what_it_promises(told):
    folder, report = told
    assert json.loads((folder / "report.json").read_text()) == report
    for row in ROWS:
        values = report[f"{row}_accuracy"]
        assert len(values) == 2 and all(0 <= value <= 1 for value in values)
    assert report["seconds"] > 0 and report["guide"] == "no guide"
    text = (folder / "report.md").read_text()
    for row, name in ROWS.items():
        assert f"| {name} | {100 * np.mean(report[f'{row}_accuracy']):.1f} % |" in text
    picture = Image.open(folder / "pictures.png")
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


def test_every_figure_is_on_record(told):
    folder, report = told
    records = read_records(folder / "records.jsonl")
    for row in ROWS:
        values = [r["value"] for r in records if r["what"] == "accuracy" and r["settings"]["row"] == row]
        assert values == report[f"{row}_accuracy"]
    assert report["seconds"] == sum(r["value"] for r in records if r["what"] == "seconds")


def test_the_data_sets_are_aligned_by_id(told):
    folder, _ = told
    clean, *others = digits(SHORT.sizes)
    for role, images in zip(("clean", "collected", "test"), (clean, *others)):
        written = load_images(folder / role)
        assert written.ids == images.ids and np.array_equal(written.images, images.images)
    protected, purified = load_images(folder / "protected"), load_images(folder / "purified")
    assert protected.ids == purified.ids == clean.ids
    assert np.array_equal(protected.labels, clean.labels) and np.array_equal(purified.labels, clean.labels)
    assert not np.array_equal(protected.images, clean.images)
    assert not np.array_equal(purified.images, protected.images)


def test_the_purifier_keeps_how_the_story_purified(told):
    kept = PurificationConfig.from_pretrained(told[0] / "purifier")
    assert kept == dataclasses.replace(SHORT.purification, trained_timesteps=(0, 50), noise_corner=4.0)


def test_the_colour_of_the_noise_is_on_record_and_in_the_report(told):
    folder, _ = told
    purified = [r["settings"] for r in read_records(folder / "records.jsonl") if "purification" in r["settings"]]
    assert len(purified) > 3 and all(settings["purification"]["noise_corner"] == 4.0 for settings in purified)
    assert "noise of corner frequency 4 cycles per image" in (folder / "report.md").read_text()


def test_the_same_command_again_measures_nothing_anew(told):
    folder, report = told
    before = (folder / "records.jsonl").read_bytes()
    again = run_quickstart(folder, telling=SHORT, say=lambda line: None)
    assert again == report and (folder / "records.jsonl").read_bytes() == before


def test_a_lost_record_is_measured_again_to_the_same_figure(told):
    folder, report = told
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if '"what": "accuracy"' in line and '"purified"' in line)
    path.write_text("".join(lines[:lost] + lines[lost + 1 :]))
    again = run_quickstart(folder, telling=SHORT, say=lambda line: None)
    assert {k: v for k, v in again.items() if k.endswith("accuracy")} == {
        k: v for k, v in report.items() if k.endswith("accuracy")
    }


def test_other_settings_do_not_pass_for_finished(told, tmp_path):
    folder, report = told
    other = dataclasses.replace(SHORT, purification=PurificationConfig(diffusion_steps=20, num_inference_steps=1))
    before = (folder / "protected" / "train-00000-of-00001.parquet").read_bytes()
    for arguments, what in ((dict(telling=other), "purification"), (dict(telling=SHORT, seed=1), "seed")):
        with pytest.raises(ValueError, match=f"where a story with another {what} was begun: take an empty folder"):
            run_quickstart(folder, say=lambda line: None, **arguments)
    assert (folder / "protected" / "train-00000-of-00001.parquet").read_bytes() == before


def test_each_victim_gets_the_images_of_its_row(told, tmp_path, monkeypatch):
    """Which images reach which victim, from the mean distance of each training set to the clean images."""
    folder, _ = told
    clean = digits(SHORT.sizes)[0].images.astype(float)
    expected = {
        "clean": 0.0,
        "protected": np.abs(load_images(folder / "protected").images - clean).mean(),
        "purified": np.abs(load_images(folder / "purified").images - clean).mean(),
    }

    def measure(work, device):
        for training_set, test, *_ in work:
            assert test.ids == digits(SHORT.sizes)[2].ids
            distance = np.abs(training_set.images - clean).mean()
            yield dict(accuracy=distance, best_accuracy=0.0, train_accuracy=0.0, seconds=0.0)

    monkeypatch.setattr("jcdp_diffusers.quickstart.train_victims", measure)
    report = run_quickstart(tmp_path / "again", telling=SHORT, say=lambda line: None)
    for row, distance in expected.items():
        assert report[f"{row}_accuracy"] == [distance] * 2
    noise = report["random_noise_accuracy"][0]
    assert noise not in expected.values() and 0.5 < noise / expected["protected"] < 2


def test_wrong_arguments_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="telling is 'mnist', but must be one of"):
        run_quickstart(tmp_path, telling="mnist")
    with pytest.raises(ValueError, match="data is None, but 'cifar10-mini' needs CIFAR-10's folder"):
        run_quickstart(tmp_path, telling="cifar10-mini")
    with pytest.raises(ValueError, match="data is 'x', but .* digits bring their own"):
        run_quickstart(tmp_path, data="x")
