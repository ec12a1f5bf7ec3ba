"""What an owner of photographs gives, and what the audit makes of it: sizes, divisions, budgets, no labels."""

import argparse
import json
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from purifying import quick_pipe

from jcdp_diffusers.audit import begun, costs, extent, run, unlabelled
from jcdp_diffusers.audit.command import add_arguments
from jcdp_diffusers.audit.costs import Costs, Extent, within_budget
from jcdp_diffusers.audit.division import Division, divide
from jcdp_diffusers.audit.page import as_html, as_html_with_code
from jcdp_diffusers.audit.purifier import AuditPurifier
from jcdp_diffusers.audit.reading import Found, read
from jcdp_diffusers.audit.report import escaped, with_code
from jcdp_diffusers.audit.settings import AuditSettings, Learner
from jcdp_diffusers.audit.unlabelled import audit_unlabelled, check_unlabelled, divide_unlabelled, evidence, sentences
from jcdp_diffusers.audit.verdict import verdict, without_clean_images
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, decode_image, find_overlap, load_images
from jcdp_diffusers.data.photographs import squares_of_photographs, stored_sizes, working_size
from jcdp_diffusers.outputs import printable
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.default_purifier import Plan
from jcdp_diffusers.victims import get_recipe


SMOKE = ["--protocol", "smoke", "--seeds", "1", "--processes", "1", "--device", "cpu"]
BUDGET = 16 / 255


def noise(count: int, *, classes: int | None = 2, prefix: str = "", seed: int = 0) -> LabelledImages:
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = None if classes is None else np.arange(count) % classes
    names = None if classes is None else tuple(f"class-{label}" for label in range(classes))
    return LabelledImages(images, labels, tuple(f"{prefix}{seed}-{row}" for row in range(count)), names)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of assorted sizes and formats, upright and turned."""
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for row in range(8):
            height, width = (int(side) for side in draw.integers(70, 140, 2))
            small = draw.integers(60 + 60 * place, 130 + 60 * place, (6, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            exif = Image.Exif()
            exif[0x0112] = 6 if row % 3 == 0 else 1
            picture.save(folder / name / f"IMG_{row:04d}.{('jpg', 'png', 'webp')[row % 3]}", exif=exif)
    return folder


# ------------------------------------------------------------------------------------------------------------------ sizes


def test_squares_of_photographs_that_are_smaller_than_the_side_stay_within_them(tmp_path):
    """exp(log(61)) is above 61."""
    for side in range(1, 65):
        Image.fromarray(np.full((side, side + 7, 3), 99, np.uint8)).save(tmp_path / f"{side:02d}.png")
    squares = squares_of_photographs(tmp_path, size=64)
    assert (squares.images == 99).all() and len(squares) >= 2 * 64


def test_labels_that_an_export_has_lost_are_those_of_the_originals(tmp_path):
    clean = noise(40)
    protected = replace(clean, labels=None, class_names=None, images=clean.images // 2 * 2)
    asked = AuditSettings()
    said = []
    sources = {"protected": protected, "clean": clean, "test": None, "collected": None}
    reading = {"image_size": None, "channels": 3, "options": {}}
    found = read(sources, "a/purifier", asked, reading, torch.device("cpu"), said.append)
    by_id = dict(zip(clean.ids, clean.labels))
    sets = found.sets
    assert [by_id[id_] for id_ in sets["protected"].ids] == sets["protected"].labels.tolist()
    assert sets["protected"].class_names == clean.class_names and any("label of its original" in one for one in said)


@pytest.mark.parametrize(
    ("sizes", "device", "side"),
    [
        ({"a": [(32, 32)], "b": [(32, 32)]}, "cpu", None),
        ({"a": [(128, 128)]}, "cpu", None),
        ({"a": [(256, 256)]}, "cpu", 64),
        ({"a": [(256, 256)]}, "cuda", None),
        (
            {"a": [(16, 16)], "b": [(8, 8)]},
            "cpu",
            None,
        ),  # two sizes of two sets, which must say which of them is meant
        ({"a": [(4000, 3000), (200, 300)]}, "cpu", 64),
        ({"a": [(4000, 3000), (200, 300)]}, "cuda", 256),
        ({"a": [(100, 140), (200, 90), (150, 150)]}, "cuda", 64),
        ({"a": [(100, 140)] * 9, "b": [(40, 50)]}, "cpu", 32),  # none is enlarged, though most are large
        ({"a": [(28, 20)]}, "cpu", 32),
        ({"a": []}, "cpu", None),
    ],
)
def test_the_working_size_follows_from_device_and_sizes(sizes, device, side):
    assert working_size(sizes, device) == side


def test_squares_are_cut_at_every_scale_and_begin_with_the_whole(photographs):
    sizes = stored_sizes(photographs)
    assert len(sizes) == 16 and len(set(sizes)) > 5
    ids = frozenset(load_images(photographs, image_size=32).ids[:5])
    squares = squares_of_photographs(photographs, 32, ids=ids, seed=1)
    assert squares.images.shape == (5 * 64, 32, 32, 3)
    wholes = load_images(photographs, image_size=32)
    assert np.array_equal(squares.images[::64], wholes.images[:5])
    assert np.array_equal(squares.images, squares_of_photographs(photographs, 32, ids=ids, seed=1).images)
    # Fine squares are smooth, coarse ones are not.
    steps = np.abs(np.diff(squares.images[:64].astype(int), axis=2)).mean((1, 2, 3))
    assert steps.min() < 0.7 * steps.max()


# --------------------------------------------------------------------------------------------------------------- division


@pytest.mark.parametrize(
    ("given", "needs_collected", "of", "missing", "stand_in"),
    [
        (("clean",), True, "clean", ("collected", "test"), False),
        (("clean",), False, "clean", ("test",), False),
        (("collected",), True, "collected", ("test",), False),
        (("test",), True, "test", ("collected",), False),
        (("unlabelled",), True, "protected", ("test",), True),
        ((), True, "protected", ("collected", "test"), True),
        (("other classes",), True, "protected", ("test",), True),
        (("collected", "test"), True, "", (), False),
        (("test",), False, "", (), False),
    ],
)
def test_roles_that_are_missing_are_divided_off(given, needs_collected, of, missing, stand_in):
    protected = noise(40, classes=3)
    others = {
        "clean": protected.with_images(protected.images ^ 1),
        "collected": noise(40, classes=3, prefix="c", seed=1),
        "test": noise(40, classes=3, prefix="t", seed=2),
        "unlabelled": noise(40, classes=None, prefix="u", seed=3),
        "other classes": noise(40, classes=4, prefix="o", seed=4),
    }
    roles = {"unlabelled": "collected", "other classes": "collected"}
    sets = {"protected": protected} | {roles.get(one, one): others[one] for one in given}
    divided, division = divide(sets, needs_collected=needs_collected, seed=0, budget=BUDGET)
    assert (division.of, division.missing, division.stand_in) == (of, missing, stand_in)
    for role in missing:
        assert set(divided[role].ids) < set(sets[of].ids)
        for other in {"protected", "collected", "test"} & divided.keys() - {role}:
            assert not set(divided[role].ids) & set(divided[other].ids)
            assert len(find_overlap(divided[role], divided[other], budget=BUDGET)) == 0
    assert "test" in divided and len(np.unique(divided["test"].labels)) == len(np.unique(protected.labels)) == 3
    if "clean" in given:
        assert divided["clean"].ids == divided["protected"].ids
    if "collected" in missing:
        assert divided["collected"].labels is None
    said = " ".join(division.sentences(divided))
    assert all(f"--{role}" in said for role in missing) and ("cannot be known" in said) == stand_in
    again, _ = divide(sets, needs_collected=needs_collected, seed=0, budget=BUDGET)
    assert all(again[role].ids == divided[role].ids for role in divided)


def test_classes_are_joined_before_originals_are_compared():
    protected = noise(40)
    order = np.array([1, 0])
    turned = replace(protected, labels=order[protected.labels], class_names=protected.class_names[::-1])
    divided, division = divide({"protected": protected, "clean": turned}, needs_collected=True, seed=0, budget=BUDGET)
    assert division.of == "clean" and np.array_equal(divided["clean"].labels, divided["protected"].labels)
    by_id = dict(zip(protected.ids, protected.labels))
    test = divided["test"]
    assert [test.class_names[label] for label in test.labels] == [f"class-{by_id[id_]}" for id_ in test.ids]


def test_numbers_are_the_same_classes_as_names():
    sets = {"protected": noise(40), "collected": replace(noise(40, prefix="c", seed=1), class_names=None)}
    divided, division = divide(sets, needs_collected=True, seed=0, budget=BUDGET)
    assert division.of == "collected" and not division.stand_in
    sets["collected"] = noise(40, classes=4, prefix="c", seed=1)
    divided, division = divide(sets, needs_collected=True, seed=0, budget=BUDGET)
    assert division.of == "protected"
    said = division.sentences(divided)
    assert any(
        "--collected was not divided: protected has no image of class 'class-2'" in sentence for sentence in said
    )


def test_all_sizes_are_looked_at(tmp_path):
    for row in range(70):
        Image.new("RGB", (32, 32) if row < 69 else (48, 40)).save(tmp_path / f"{row:02d}.png")
    assert set(stored_sizes(tmp_path)) == {(32, 32), (48, 40)}


def test_the_size_of_a_protection_is_that_of_the_images_that_it_changes():
    clean = noise(40, classes=None)
    half = clean.images.astype(int)
    half[::2] += np.where(half[::2] > 127, -8, 8)
    protected = clean.with_images(half.astype(np.uint8))
    sets = {"clean": clean, "protected": protected, "purified": protected}
    found = evidence(sets, Division(), 0)
    assert found["changed"] == 20 and found["added"]["psnr"] == pytest.approx(20 * np.log10(255 / 8), abs=1e-3)
    assert any(
        "changes 20 of 40 images, a value by 8/255" in sentence for sentence in sentences(found, sets, Division())
    )
    # Purification of `sets` changes nothing. No PSNR is given where nothing differs.
    assert found["removed"]["psnr"] is None and "Purification changes nothing." in sentences(found, sets, Division())
    same = sets | {"protected": clean, "purified": clean}
    untouched = evidence(same, Division(), 0)
    assert untouched["changed"] == 0 and untouched["added"] | {"psnr": None} == untouched["added"]
    said = " ".join(sentences(untouched, same, Division()))
    assert "The protected images are equal to their originals: nothing is protected." in said and "dB" not in said
    restored = sets | {"purified": clean}
    assert "after purification they are equal to them." in " ".join(
        sentences(evidence(restored, Division(), 0), restored, Division())
    )


def test_originals_keep_their_labels_where_the_protected_images_have_none():
    protected = noise(40, classes=None)
    clean = noise(40, classes=2)
    divided, division = divide({"protected": protected, "clean": clean}, needs_collected=True, seed=0, budget=BUDGET)
    assert division.of == "clean" and set(divided["test"].labels) == {0, 1}
    assert divided["protected"].labels is None and divided["clean"].ids == divided["protected"].ids


def test_squares_are_those_of_the_collected_photographs_though_the_folders_differ(photographs, tmp_path):
    """The originals are more than what was protected, so row numbers of the two folders are of different images."""
    for path in sorted(photographs.rglob("IMG_*"))[2:]:
        target = tmp_path / path.relative_to(photographs).with_suffix(".png")
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(decode_image(path.read_bytes(), 3)).save(target)
    sources = {"protected": tmp_path, "clean": photographs, "collected": None, "test": None}
    options = {"image_size": 32, "channels": 3, "options": {}, "skip_unusable_images": False}
    found = read(sources, None, AuditSettings(), options, torch.device("cpu"), lambda line: None)
    squares = found.squares(sources, options, seed=0)()
    wholes = {image.tobytes() for image in squares.images}
    of_role = {role: [image.tobytes() in wholes for image in data.images] for role, data in found.sets.items()}
    assert all(of_role["collected"]) and not any(of_role["clean"] + of_role["test"])


def test_photographs_of_one_size_give_squares_at_their_own_size(tmp_path):
    for row in range(12):
        Image.new("RGB", (150, 150), (20 * row, 0, 99)).save(tmp_path / f"{row:02d}.png")
    sources = {"protected": tmp_path, "clean": None, "collected": None, "test": None}
    for image_size, cut in ((None, True), (32, True), (150, False)):
        options = {"image_size": image_size, "channels": 3, "options": {}, "skip_unusable_images": False}
        found = read(sources, None, AuditSettings(), options, torch.device("cpu"), lambda line: None)
        assert (found.squares(sources, options, seed=0) is not None) is cut


@pytest.mark.parametrize("image_size", [None, 64])
def test_enlarged_images_have_no_spectrum_to_compare(image_size, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for role, side in (("protected", 64), ("collected", 40)):
        (tmp_path / role).mkdir()
        for row in range(50):
            pixels = draw.integers(0, 256, (side, side + row % 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / role / f"{row}.png")
    sources = {role: tmp_path / role for role in ("protected", "collected")} | {"clean": None, "test": None}
    options = {"image_size": image_size, "channels": 3, "options": {}, "skip_unusable_images": False}
    how = (sources, None, AuditSettings(), options, torch.device("cpu"), lambda line: None)
    found = read(*how)
    report, texts = audited_without_labels(tmp_path / "out", monkeypatch, found)
    if image_size is None:
        assert found.side == 32 and found.enlarged is None and report["evidence"]["spectrum"] is not None
        return
    assert report["evidence"]["spectrum"] is None and found.enlarged in report["said"]
    assert "40x40 (--image_size) or less" in found.enlarged and not any("there are 50 and 50" in s for s in texts)
    with pytest.raises(ValueError, match="preset is 'adaptive', which reads spectra"):
        read(*how[:2], AuditSettings(preset="adaptive"), *how[3:])
    one_source = replace(found, division=Division("clean", ("collected",)))
    assert one_source.enlarged is None  # both sets have the same images, as far as that goes


def test_shots_of_one_thing_are_not_in_two_parts():
    """Every second image repeats the one before it with one value changed."""
    data = noise(32, classes=2)
    images = data.images.copy()
    images[2::4], images[3::4] = images[0::4], images[1::4]
    images[2:, 0, 0, 0] ^= 1
    images[3::4] = images[3::4, :, ::-1]  # mirrored
    divided, division = divide({"protected": data.with_images(images)}, needs_collected=True, seed=0, budget=BUDGET)
    assert division.together == 32 and sum(map(len, divided.values())) == 32
    for one, other in (("protected", "test"), ("protected", "collected"), ("collected", "test")):
        assert len(find_overlap(divided[one], divided[other], budget=BUDGET)) == 0


def test_a_class_that_cannot_be_divided_is_named():
    data = noise(9, classes=3).subset([0, 1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(
        ValueError, match=r"protected has 3 different image\(s\) of class 'class-0'.*--collected and --test"
    ):
        divide({"protected": data}, needs_collected=True, seed=0, budget=BUDGET)


def test_nothing_follows_from_test_images_that_were_protected():
    accuracies = {"protected": [0.4, 0.41, 0.39], "purified": [0.9, 0.91, 0.9]}
    judged = verdict(accuracies, {"purified": "purification"}, test_images=400)
    assert judged["status"] == "undone"
    said = without_clean_images(judged, accuracies)
    assert said["status"] == "open" and "40 %" in said["sentence"] and "90 %" in said["sentence"]


# ----------------------------------------------------------------------------------------------------------------- budget


COSTS = Costs(training=0.5, purification=30.0, victim={64: 200.0, 32: 60.0, 16: 20.0}, rows=2, at_a_time=2)


@pytest.mark.parametrize(
    ("minutes", "extent"),
    [
        (1000, Extent(1200, 64, 3)),
        (20, Extent(780, 64, 3)),  # 1,020 s, of which 30 and 600 are taken: 390 s of half-second steps
        (12, Extent(800, 32, 3)),  # 612 - 30 - 180 = 402 s
        (6, Extent(432, 16, 3)),  # 306 - 30 - 60 = 216 s
    ],
)
def test_a_budget_is_kept_by_fewer_steps_then_narrower_victims(minutes, extent):
    found = within_budget(COSTS, Extent(1200, 64, 3), minutes)
    assert found.steps == pytest.approx(extent.steps, abs=30) and (found.width, found.seeds) == (extent.width, 3)
    assert COSTS.total(found.steps, found.width, found.seeds) <= 60 * minutes


def test_a_budget_that_is_too_small_says_what_is_enough():
    with pytest.raises(ValueError, match="budget_minutes is 2, but must be at least 5 "):
        within_budget(COSTS, Extent(1200, 64, 3), 2)
    assert within_budget(COSTS, Extent(1200, 64, 3), 5).seeds >= 2
    # A purifier that was given is not trained.
    assert within_budget(COSTS, Extent(0, 64, 3), 100) == Extent(0, 64, 3)


@pytest.mark.parametrize(
    "method, recipe, steps",
    [
        ("supervised", "smoke", 2 * (60 + 30 / 3)),
        ("simclr", "smoke", 2 * 2 * 60 + 2 * (45 + 30) / 3),
        ("moco-v2", "smoke", 2 * (1 + 1 / 3) * 60 + 2 * (45 + 30) / 3),
        ("byol", "smoke", 2 * (2 + 2 / 3) * 60 + 2 * (45 + 30) / 3),
        ("simclr", "cp", 1000 * 2 * 60 + 10 * (45 + 30) / 3 + 100 * 45 / 3),
    ],
)
def test_the_estimate_of_a_victim_counts_its_views_its_second_network_and_its_probe(
    method, recipe, steps, monkeypatch
):
    monkeypatch.setattr(costs, "_step", lambda *_, **__: 1.0)
    sets = {"protected": noise(60, seed=0), "test": noise(30, seed=1), "probe": noise(45, seed=2)}
    learner = Learner(method, "resnet18", get_recipe(recipe, method))
    found = costs._victim(sets, learner, torch.device("cpu"), 2, AuditSettings())
    assert found == pytest.approx(steps)


def test_a_folder_that_was_begun_keeps_its_purifier_and_its_width(tmp_path, monkeypatch):
    """The first time costs are measured; afterwards, another budget changes the number of seeds alone."""
    sets = {role: noise(8, seed=seed) for seed, role in enumerate(("protected", "collected", "test"))}
    config = TrainingConfig(max_train_steps=1200, train_batch_size=8)
    used = AuditPurifier("none", None, PurificationConfig(), 8, Plan("tiny32", config, PurificationConfig()))
    monkeypatch.setattr(extent, "measure_costs", lambda *_, **__: COSTS)
    lines: list[str] = []

    def planned(minutes, width=None):
        asked = AuditSettings(budget_minutes=minutes, width=width, victim="resnet18")
        learners = asked.learners("cpu", (8, 8))
        how = (Division(), torch.device("cpu"), 2, tmp_path, lines.append)
        return extent.plan_time(sets, used, asked, learners, *how)

    first = planned(12)
    assert (first.used.plan.training.max_train_steps, first.asked.width) == (804, 32) and "12 minutes" in first.said[0]
    assert "Without a budget: 1,200 steps, width 64, 3 seeds" in lines[-1]
    plan = {"training": {"max_train_steps": 804}}
    begun.write_begun(tmp_path, {"plan": plan} | dict(first.begun))
    lines.clear()
    again = planned(1000)
    assert (again.used.plan.training.max_train_steps, again.asked.width) == (804, 32) and not lines
    assert again.minutes == 1000
    for same in (again, planned(None)):  # what was lessened then is said, whatever the budget is now
        assert same.said == ["The audit was kept within 12 minutes: 804 training steps of the purifier in place of 1,200, "
                             "victims of width 32 in place of 64."]  # fmt: skip
        assert same.begun == first.begun
    assert planned(12, width=16).asked.width == 16  # another width is asked for
    # A width that was asked for and lessened is lessened again.
    begun.write_begun(tmp_path, {"plan": plan, "lessened": {"minutes": 12, "asked_width": 64, "width": 32}})
    assert planned(12, width=64).asked.width == 32
    # A folder that was begun with a purifier of its own is refused by `check_begun`, not here.
    begun.write_begun(tmp_path, {"plan": None})
    assert planned(1000).used.plan.training.max_train_steps == 1200


@pytest.mark.parametrize("of, learns, minutes", [("protected", True, 15), ("", False, 15), ("", True, None)])
def test_the_usual_budget_is_that_of_divided_audits_and_of_those_without_labels(
    of, learns, minutes, tmp_path, monkeypatch
):
    monkeypatch.setattr(extent, "measure_costs", lambda *_, **__: COSTS)
    sets = {role: noise(8, seed=seed) for seed, role in enumerate(("protected", "test"))}
    given = AuditPurifier("given", None, PurificationConfig(), 8)
    asked = AuditSettings(victim="resnet18")
    learners = asked.learners("cpu", (8, 8)) if learns else ()
    how = (Division(of), torch.device("cpu"), 2, tmp_path, lambda line: None)
    assert extent.plan_time(sets, given, asked, learners, *how).minutes == minutes
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (option,) = (action for action in parser._actions if action.dest == "budget_minutes")
    assert "15 if the audit divides images itself or has no labels, else without limit" in option.help


@pytest.mark.parametrize("minutes, measured", [(None, 3), (60, 3), (1e-9, 1)])
def test_seeds_are_measured_until_the_time_is_up(minutes, measured, tmp_path, monkeypatch):
    rows, calls, lines = [[SimpleNamespace(name=f"{row}{seed}") for seed in range(3)] for row in "ab"], [], []
    monkeypatch.setattr(extent, "measure", lambda trials, *_, **__: calls.append([trial.name for trial in trials]))
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    how = {"device": torch.device("cpu"), "processes": 1, "deadline": deadline, "say": lines.append}
    assert extent.measure_in_time(rows, tmp_path / "records.jsonl", **how) == measured
    order = ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert sum(calls, []) == order[: 2 * measured] and bool(lines) == (measured < 3)


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "words, argument",
    [
        (["--method", "simclr"], "probe_images is None"),
        (["--roles", "paper"], "roles is 'paper'"),
        (["--attacks", "pretrained"], "collected is None"),
        (["--budget_minutes", "0"], "budget_minutes is 0"),
        (["--whitening", "collected"], "collected is None"),
        (["--preset", "adaptive"], "collected is None"),
        (["--image_size", "60"], "collected has images of 60x60"),
    ],
)
def test_what_the_short_form_cannot_do_is_refused(words, argument, photographs, tmp_path, capsys):
    arguments = ["audit", "--protected", str(photographs), "--output", str(tmp_path / "out"), *words]
    assert main(arguments) == 1
    assert argument in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_drawing")
def test_protected_photographs_and_nothing_else(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (photographs / "dog" / "IMG_9999.jpg").write_bytes(b"no picture")
    try:
        assert main(["audit", "--protected", str(photographs), *SMOKE]) == 1
        said = capsys.readouterr().err
        assert "'dog/IMG_9999.jpg': not a readable image" in said and "--skip_unusable_images leaves" in said
        assert main(["audit", "--protected", str(photographs), "--skip_unusable_images", *SMOKE]) == 0
    finally:
        (photographs / "dog" / "IMG_9999.jpg").unlink()
    said = capsys.readouterr().out
    assert "compared at 64x64 pixels" in said and "--collected and --test not given: --protected was divided" in said
    report = json.loads((tmp_path / f"audit-{photographs.name}" / "report.json").read_text())
    data = report["data"]
    assert [one["file"] for one in data["unusable"]["protected"]] == ["dog/IMG_9999.jpg"]
    assert data["working_size"] == 64 and data["division"]["stand_in"]
    assert {role: facts["images"] for role, facts in data["sets"].items()} == {
        "protected": 8,
        "collected": 4,
        "test": 4,
    }
    for name in ("report.html", "report.md"):
        page = (tmp_path / f"audit-{photographs.name}" / name).read_text()
        assert "4 purified test images" in page and "clean test images" not in page and "never altered" not in page
    limits = " ".join(report["limits"])
    assert "IMG_9999.jpg" in limits and "cannot be known" in limits


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize("flat", [False, True])
def test_photographs_and_a_purifier_that_is_given(flat, photographs, tmp_path, monkeypatch):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    if flat:  # as google/ddpm-cifar10-32 is
        for part in ("unet", "scheduler"):
            for path in (tmp_path / "purifier" / part).iterdir():
                path.rename(tmp_path / "purifier" / path.name)
            (tmp_path / "purifier" / part).rmdir()
    given = ["--protected", str(photographs), "--purifier", str(tmp_path / "purifier")]
    # The time is up after the first of three victims.
    in_time = extent.measure_in_time
    monkeypatch.setattr(run, "measure_in_time", lambda *rows, **how: in_time(*rows, **how | {"deadline": 0.0}))
    assert main(["audit", *given, "--output", str(tmp_path / "out"), *SMOKE, "--seeds", "3"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["planned_seeds"] == 3 and report["victims"]["seeds"] == [0]
    assert any("up after 1 of 3 victims per row. The same command, given again" in limit for limit in report["limits"])
    assert report["data"]["division"]["missing"] == ["test"] and report["data"]["working_size"] == 8
    assert not (tmp_path / "out/purifier").exists() and not report["purifier"]["trained_here"]


@pytest.mark.parametrize(
    "words, name",
    [
        (["--attacks", "jpeg-10"], "--countermeasures"),
        (["--control"], "control"),
        (["--fractions", "0.5"], "fractions"),
        (["--draws", "2"], "draws"),
    ],
)
def test_without_labels_nothing_that_needs_victims_is_passed_over(words, name, photographs, tmp_path, capsys):
    folders = ["--protected", str(photographs / "cat"), "--clean", str(photographs / "cat")]
    assert main(["audit", *folders, "--output", str(tmp_path / "out"), *SMOKE, *words]) == 1
    assert f"{name} is " in capsys.readouterr().err


def test_photographs_without_labels(photographs, tmp_path, capsys):
    folder, output = tmp_path / "photographs", tmp_path / "out"
    shutil.copytree(photographs / "cat", folder)
    (folder / "IMG_9*9.png").write_bytes(b"no picture")
    command = ["audit", "--protected", str(folder), "--output", str(output), "--skip_unusable_images"]
    assert main([*command, *SMOKE]) == 0
    said = capsys.readouterr().out
    assert "one folder per class" in said and "(--clean)" in said and "(--collected)" in said
    report = json.loads((output / "report.json").read_text())
    assert report["verdict"]["status"] == "unlabelled" and report["evidence"]["removed"]["linf"] > 0
    assert len(load_images(output / "purified")) == 6 and report["data"]["sets"]["collected"]["images"] == 2
    assert r"IMG_9\*9.png" in (output / "report.md").read_text()  # a file's name stands there as it is
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page and "No victim can be trained" not in page
    with Image.open(output / "pictures/images.png") as picture:
        assert picture.size == (6 * 128, 3 * 128)


def audited_without_labels(folder, monkeypatch, found, asked=AuditSettings(), plan=None):
    """What an audit without labels writes and says, with a purifier that changes nothing."""
    monkeypatch.setattr(unlabelled, "purify", lambda images, *_: images)
    folder.mkdir()
    config, lines = PurificationConfig(diffusion_steps=3, num_inference_steps=3), []
    how = (AuditPurifier("none", None, config, 8, plan), asked, found.division)
    facts = found.facts(found.sets) | {"lessened": []}
    command = f"jcdp audit --protected '{NAMES[1]} {NAMES[2]}'"
    report = audit_unlabelled(dict(found.sets), *how, facts, folder, command, lines.append)
    texts = {name: (folder / name).read_text() for name in ("report.html", "report.md", "report.json")}
    return report, texts | {"console": "\n".join(lines)}


NAMES = ("_0_.jpg", "0`b`.jpg", "0a\u202egnp.jpg", "<b>x</b>.jpg", "~~c~~&lt;__d__.jpg")


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.tags = "", set()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)


def shown(page: str) -> _Text:
    parser = _Text()
    parser.feed(page)
    return parser


def test_names_of_files_are_shown_as_they_are(tmp_path, monkeypatch):
    """In the report without labels, and among the limits of one with a verdict."""
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render
    left_out = [{"id": name, "file": name, "reason": "not a readable image"} for name in NAMES]
    found = Found({"protected": noise(4, classes=None)}, Division(), {"protected": left_out})
    report, texts = audited_without_labels(tmp_path / "out", monkeypatch, found)
    (sentence,) = found.facts({})["unusable_said"]
    assert sentence in report["said"] and sentence in json.loads(texts["report.json"])["said"]
    said = printable(sentence)
    assert all(printable(name) in said for name in NAMES) and said in texts["console"]
    page, text = shown(texts["report.html"]), shown(rendered(texts["report.md"]))
    assert said in page.text and said in text.text and not page.tags & {"s", "em"}
    assert not any("\u202e" in texts[name] for name in ("report.html", "report.md", "console"))
    text = shown(rendered(f"- {escaped(sentence)}"))
    assert text.text.strip() == said and text.tags == {"ul", "li"}
    assert shown(as_html(sentence)).text == said
    # Sentences of ours mark code, and a lone backtick is one.
    assert with_code("`--a_b`: _x_ `") == r"`--a_b`: \_x\_ \`"
    assert as_html_with_code("`--a` < `") == "<code>--a</code> &lt; `"


@pytest.mark.parametrize("plan, said", [(object(), unlabelled.SMOKE), (None, unlabelled.SMOKE_OF_GIVEN)])
def test_a_smoke_run_without_labels_is_marked(plan, said, tmp_path, monkeypatch):
    found = Found({"protected": noise(4, classes=None)}, Division())
    asked = AuditSettings(protocol="smoke")
    report, texts = audited_without_labels(tmp_path / "out", monkeypatch, found, asked, plan)
    assert report["smoke"] and report["said"][0] == said and all(said in text for text in texts.values())
    report, texts = audited_without_labels(tmp_path / "other", monkeypatch, found)
    assert not report["smoke"] and not any("Smoke run" in text for text in texts.values())


def test_images_without_labels_get_labels_in_another_folder(tmp_path, monkeypatch):
    found = Found({"protected": noise(4, classes=None)}, Division())
    report, texts = audited_without_labels(tmp_path / "out", monkeypatch, found)
    assert "with another folder: `--output NAME`." in report["verdict"]["sentence"]
    assert "<code>--output NAME</code>" in texts["report.html"] and "`--output NAME`" in texts["report.md"]


def test_shots_of_one_thing_stay_together_without_labels_too():
    data = noise(24, classes=None)
    images = data.images.copy()
    images[1::2] = images[::2]
    images[1::2, 0, 0, 0] ^= 1
    for seed in range(4):
        pairs = {"protected": data.with_images(images)}
        divided, division = divide_unlabelled(pairs, needs_collected=True, seed=seed, budget=BUDGET)
        assert (len(divided["protected"]), len(divided["collected"]), division.together) == (18, 6, 24)
        check_unlabelled(divided, AuditSettings())
    slipped_in = divided | {"collected": data}
    with pytest.raises(ValueError, match="protected has 18 images that are collected ones"):
        check_unlabelled(slipped_in, AuditSettings())
    with pytest.raises(ValueError, match="protected has 3 different image"):
        divide_unlabelled(
            {"protected": data.with_images(images).subset(range(6))}, needs_collected=True, seed=0, budget=BUDGET
        )


def test_test_images_without_labels_are_refused_before_they_are_divided():
    sets = {"protected": noise(8, classes=None), "test": noise(8, classes=None, seed=1)}
    with pytest.raises(ValueError, match="protected has no labels, and no set that can be divided has any"):
        divide(sets, needs_collected=True, seed=0, budget=BUDGET)


@pytest.mark.parametrize("given", ["collected", "test"])
def test_labelled_images_are_divided_where_the_protected_ones_have_none(given):
    sets = {"protected": noise(8, classes=None), given: noise(16, seed=1)}
    divided, division = divide(sets, needs_collected=True, seed=0, budget=BUDGET)
    assert division.of == given and {"collected", "test"} <= divided.keys() and divided["test"].labels is not None


def test_spectra_are_compared_without_labels_where_there_are_enough_photographs():
    draw = np.random.default_rng(0)
    plain = [draw.integers(40, 200, (60, 2, 2, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2) for _ in range(2)]
    noisy = plain[0] + draw.integers(0, 2, (60, 8, 8, 3), dtype=np.uint8) * 30
    ids = tuple(map(str, range(60)))
    protected, collected = (LabelledImages(images, None, ids) for images in (noisy, plain[1]))
    sets = {"protected": protected, "purified": protected, "collected": collected}
    found = evidence(sets, Division(), 0)
    assert found["spectrum"]["finding"] == "noise"
    assert any("without labels and without originals" in sentence for sentence in sentences(found, sets, Division()))
    assert evidence(sets, Division("protected", ("collected",)), 0)["spectrum"] is None
