"""Trials: named by content, measured once, by one command at a time, and taken up after a crash."""

import dataclasses
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from purifying import quick_pipe

from jcdp_diffusers import trials
from jcdp_diffusers.countermeasures import Pairs, paired
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.results import read_records
from jcdp_diffusers.trials import (
    Trial,
    measure,
    purifier_digest,
    results_by_trial,
    spread_over_seeds,
    trial_name,
)
from jcdp_diffusers.victims import RECIPES, finetuning, get, get_recipe, train_victim
from jcdp_diffusers.victims.finetuning import InitFrom, Normalisation, Weights, read_weights, start_in_words


QUICK = dataclasses.replace(RECIPES["smoke"], epochs=1, max_steps_per_epoch=2, batch_size=8)
SLOW = dataclasses.replace(QUICK, name="slow", epochs=2000)
SIMCLR = dataclasses.replace(get_recipe("smoke", "simclr"), width=2, max_steps_per_epoch=2)


def images(count: int, seed: int) -> LabelledImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(count) % 2, tuple(f"{seed}-{row}" for row in range(count)))


TRAIN, TEST = images(24, 0), images(10, 1)


def trial(seed: int = 0, **changes) -> Trial:
    return Trial(**{"train": TRAIN, "test": TEST, "recipe": QUICK, "seed": seed, **changes})


def accuracies(records) -> list[dict]:
    return [record for record in read_records(records) if record["what"] == "accuracy"]


def test_a_set_that_was_described_is_not_kept():
    data = images(4, 3)
    known = trials.describe_images(data)
    assert trials.describe_images(data) == known
    watched = weakref.ref(data)
    del data
    gc.collect()
    assert watched() is None


def test_a_trial_is_named_by_the_content_of_all_that_decides_it():
    same = LabelledImages(TRAIN.images.copy(), TRAIN.labels.copy(), tuple(f"x{row}" for row in range(24)))
    assert trial().name == trial(train=same).name  # whatever the images are called
    touched = TRAIN.images.copy()
    touched[5, 3, 3, 0] ^= 1
    others = [
        trial(seed=1),
        trial(train=TRAIN.with_images(touched)),
        trial(train=dataclasses.replace(TRAIN, labels=1 - TRAIN.labels)),
        trial(test=images(10, 2)),
        trial(recipe=dataclasses.replace(QUICK, learning_rate=0.05)),
        trial(width=4),
        trial(victim="vgg16"),
        trial(recipe=SIMCLR, method="simclr", probe=TRAIN),
        trial(recipe=SIMCLR, method="simclr", probe=images(24, 3)),
        trial(recipe=get_recipe("smoke", "byol"), method="byol", probe=TRAIN),
        trial(countermeasure="gray"),
        trial(about={"poison": "lsp"}),
    ]
    assert len({other.name for other in (trial(), *others)}) == 1 + len(others)
    assert trial(width=QUICK.width).name == trial().name  # the recipe's own
    told = {"grid": "other", "poison_seconds": 3.0, "poison_norms": {"linf": 8}, "collected": "elsewhere"}
    assert trial(about=told).name == trial().name  # neither what a comparison is called nor what nobody uses


def test_a_setting_that_came_later_renames_no_trial_at_the_value_that_was_meant():
    purifying = lambda **settings: trial(countermeasure="unconditional", purification=PurificationConfig(**settings))
    assert "noise_corner" not in str(purifying().settings)
    assert purifying(noise_corner=0.0).name == purifying().name != purifying(noise_corner=8.0).name
    assert purifying(noise_corner=8.0).settings["purification"]["noise_corner"] == 8.0
    # A trial of CIFAR-10 as it was named before there was such a setting.
    (record,) = (
        record
        for record in read_records(Path(__file__).parents[1] / "results/leak_cifar10_mini.jsonl")
        if record["what"] == "accuracy" and record["seed"] == 0 and record["settings"]["purification"]
    )
    assert trial_name(record["settings"], 0) == record["settings"]["trial"]


def test_the_colour_of_a_purifiers_noise_is_on_record_and_in_the_name(tmp_path):
    found = []
    for name, corner in (("plain", None), ("white", 0.0), ("red", 3.0), ("redder", 8.0)):
        (tmp_path / name / "unet").mkdir(parents=True)  # the same weights: none
        if corner is not None:
            PurificationConfig(noise_corner=corner).save_pretrained(tmp_path / name)
        found.append(trial(countermeasure="unconditional", purifier=str(tmp_path / name)))
    assert [one.settings.get("noise_corner") for one in found] == [None, None, 3.0, 8.0]
    assert found[0].name == found[1].name and len({one.name for one in found}) == 3
    assert len({purifier_digest(one.purifier) for one in found}) == 3


def test_the_collected_images_decide_where_a_purifier_is_used(tmp_path):
    (tmp_path / "unet").mkdir()
    names = {
        trial(countermeasure="unconditional", purifier=tmp_path, about={"collected": name}).name
        for name in ("here", "elsewhere")
    }
    assert len(names) == 2


def test_a_purifier_in_a_folder_is_known_by_its_weights(tmp_path):
    for name, weights in (("one", b"weights"), ("copy", b"weights"), ("other", b"Weights")):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet/model.safetensors").write_bytes(weights)
    one, copy, other = (purifier_digest(str(tmp_path / name)) for name in ("one", "copy", "other"))
    assert one == copy != other


def test_trials_that_differ_while_training_share_what_is_purified(tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    how = dict(
        purifier=str(tmp_path / "purifier"),
        purification=PurificationConfig(diffusion_steps=2, num_inference_steps=2),
        work_dir=tmp_path / "prepared",
    )
    shared = [trial(countermeasure=name, **how) for name in ("unconditional", "unconditional+corruption")]
    other = trial(countermeasure="unconditional", **how | {"train": TEST})
    drawn = trial(countermeasure="unconditional", draws=2, **how)
    assert drawn.name != shared[0].name
    measure([*shared, other, drawn], tmp_path / "records.jsonl", progress=False)
    assert len(list((tmp_path / "prepared").iterdir())) == 2
    done = [record["value"] for record in read_records(tmp_path / "records.jsonl") if record["what"] == "victim"]
    assert done[1]["prepare_seconds"] == pytest.approx(done[0]["prepare_seconds"], abs=0.02)
    assert done[0]["prepare_seconds"] > 0
    assert done[3]["prepare_seconds"] > done[0]["prepare_seconds"]  # two draws, one of them the others'
    again = tmp_path / "again.jsonl"
    measure(shared[:1], again, progress=False)
    assert (
        list(results_by_trial(again, what="victim").values())[0]["value"]["prepare_seconds"]
        == done[0]["prepare_seconds"]
    )


def test_only_what_is_missing_is_measured(tmp_path):
    records = tmp_path / "records.jsonl"
    wanted = [trial(0, about={"row": "a"}), trial(1, about={"row": "a"})]
    measure(wanted, records, progress=False)
    found = accuracies(records)
    assert [record["seed"] for record in found] == [0, 1]
    details = results_by_trial(records, what="victim")[wanted[0].name]["value"]
    assert np.sum(details["confusion"]) == 10 and len(details["history"]) == 1 and details["threads"] == 1
    before = records.read_text()
    wanted.append(trial(0, countermeasure="gray"))
    measure(wanted, records, progress=False)
    assert records.read_text().startswith(before) and len(accuracies(records)) == 3
    # A line cut off between a trial's two records: the trial is measured again, the same.
    lines = records.read_text().splitlines()
    records.write_text("\n".join(lines[:3]) + "\n")
    measure(wanted[:2], records, progress=False)
    assert [record["value"] for record in accuracies(records)] == [record["value"] for record in found]


@pytest.mark.long
def test_what_is_measured_does_not_depend_on_the_number_of_processes(tmp_path):
    wanted = [trial(seed) for seed in range(3)]
    values = []
    for processes in (1, 2):
        records = tmp_path / f"{processes}.jsonl"
        measure(wanted, records, processes=processes, progress=False)
        values.append({record["seed"]: record["value"] for record in accuracies(records)})
    assert values[0] == values[1] and len(values[0]) == 3


HOLDER = """
import sys, time
from pathlib import Path
from jcdp_diffusers.engines import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_command_on_the_same_records_is_refused_and_told_who_is_there(tmp_path, monkeypatch):
    """The other is killed: its records are free at once."""
    records, lock = tmp_path / "records.jsonl", tmp_path / ".records.jsonl.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"pid {other.pid}"):
            measure([trial(0)], records, progress=False)
        other.kill()
    assert not records.exists()
    held = []

    def look(*args, **options):
        with open(lock) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(json.loads(lock.read_text())["pid"])
        return train_victim(*args, **options)

    monkeypatch.setattr(trials, "train_victim", look)
    measure([trial(0)], records, progress=False)
    assert len(accuracies(records)) == 1 and held == [os.getpid()] and lock.read_text() == ""


@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_a_long_victim_goes_on_where_it_was_cut_off(method, tmp_path, monkeypatch):
    supervised = method == "supervised"
    options = {"recipe": dataclasses.replace(QUICK, epochs=2) if supervised else SIMCLR, "method": method}
    options |= {} if supervised else {"probe": images(24, 3)}
    shown = TRAIN if supervised else dataclasses.replace(TRAIN, labels=None)
    one = trial(train=shown, work_dir=tmp_path / "work", **options)
    seen = []

    def cut_off(*args, **keywords):
        def progress(entry):
            seen.append(entry["epoch"])
            if len(seen) == 1:
                raise KeyboardInterrupt

        return train_victim(*args, **keywords, progress=progress)

    monkeypatch.setattr(trials, "train_victim", cut_off)
    monkeypatch.setattr(trials, "MANY_IMAGES", 2 * len(TRAIN))
    with pytest.raises(KeyboardInterrupt):
        measure([one], tmp_path / "records.jsonl", progress=False)
    assert len(list((tmp_path / "work").glob("victims/*/training.safetensors"))) == 1
    measure([one], tmp_path / "records.jsonl", progress=False)
    assert seen == [1, 2]
    assert not list((tmp_path / "work").glob("victims/*"))
    details = results_by_trial(tmp_path / "records.jsonl", what="victim")[one.name]["value"]
    alone = train_victim(TRAIN, TEST, width=one.width, **options)
    assert details["confusion"] == alone.confusion.tolist() and details["knn_accuracy"] == alone.knn_accuracy
    if not supervised:
        assert details["best_accuracy"] is None and details["train_accuracy"] is None
        assert set(spread_over_seeds([one], tmp_path / "records.jsonl")) == {"accuracy", "knn_accuracy"}


def test_a_short_victim_begins_again(tmp_path, monkeypatch):
    given = []

    def look(*args, checkpoint_dir, **options):
        given.append(checkpoint_dir)
        return train_victim(*args, **options)

    monkeypatch.setattr(trials, "train_victim", look)
    measure([trial(0, work_dir=tmp_path / "work")], tmp_path / "records.jsonl", progress=False)
    assert given == [None]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"probe": TRAIN}, "probe is a set of images, .* None .* 'supervised'"),
        ({"recipe": SIMCLR, "method": "simclr"}, "probe is None, .* 'simclr'"),
        ({"method": "simclr", "probe": TRAIN}, "recipe is 'smoke' of method 'supervised', .* 'simclr'"),
        ({"method": "swav"}, "method is 'swav'"),
        (
            {"recipe": SIMCLR, "method": "simclr", "probe": TRAIN, "countermeasure": "mixup"},
            "countermeasure is 'mixup', .* 'simclr'",
        ),
    ],
)
def test_a_way_of_learning_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        trial(**changes)


def test_an_error_names_the_trial(tmp_path):
    about = {"poison": "lsp", "column": "plain"}
    bad = trial(0, test=LabelledImages(TEST.images, TEST.labels * 0, TEST.ids), about=about)
    with pytest.raises(RuntimeError, match="^lsp plain seed 0: .*class 1"):
        measure([bad], tmp_path / "records.jsonl", progress=False)
    with pytest.raises(ValueError, match="processes is 0"):
        measure([bad], tmp_path / "records.jsonl", processes=0)


@pytest.mark.long
def test_an_error_in_a_process_of_its_own_does_not_keep_the_others_from_being_measured(tmp_path):
    bad = LabelledImages(TEST.images, TEST.labels * 0, TEST.ids)
    wanted = [trial(0, test=bad), trial(1), trial(2)]
    with pytest.raises(RuntimeError, match="^none seed 0: .*class 1"):
        measure(wanted, tmp_path / "r.jsonl", processes=2, progress=False)
    assert sorted(record["seed"] for record in accuracies(tmp_path / "r.jsonl")) == [1, 2]


class Deadly(LabelledImages):
    """A training set that ends the process that trains on it, as a fault in a kernel would."""

    @property
    def num_classes(self) -> int:
        os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.long  # tests/test_engines.py has the same of plain tasks
def test_a_process_that_dies_of_a_signal_is_one_sentence_that_names_the_trial(tmp_path):
    deadly = Deadly(TRAIN.images, TRAIN.labels, TRAIN.ids)
    ended = r"^trial none seed 7: its process was ended by signal 11 \(SIGSEGV\)"
    with pytest.raises(RuntimeError, match=ended) as told:
        measure([trial(7, train=deadly), trial(8, recipe=SLOW)], tmp_path / "r.jsonl", processes=2, progress=False)
    assert "\n" not in str(told.value) and "process pool" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------ pretrained


def test_victims_of_all_seeds_start_from_one_network_that_is_pretrained_once(tmp_path, monkeypatch):
    counted, pretrain = [], finetuning.pretrain

    def count(collected, **options):
        counted.append(collected)
        return pretrain(collected, **options)

    monkeypatch.setattr(finetuning, "pretrain", count)
    how = {"work_dir": tmp_path / "work"}
    start = InitFrom(images(30, 5), recipe=SIMCLR)
    wanted = [trial(seed, init_from=start, **how) for seed in (0, 1)]
    wanted.append(trial(0, init_from=dataclasses.replace(start, finetune="upper"), **how))
    measure(wanted, tmp_path / "records.jsonl", progress=False)
    assert len(counted) == 1 and len({one.pretrained_path for one in wanted}) == 1
    assert [path.name for path in (tmp_path / "work/pretrained").iterdir()] == [wanted[0].pretrained_path.name]
    alone = train_victim(TRAIN, TEST, recipe=QUICK, init_from=read_weights(wanted[0].pretrained_path))
    details = results_by_trial(tmp_path / "records.jsonl", what="victim")
    assert details[wanted[0].name]["value"]["confusion"] == alone.confusion.tolist()
    found = details[wanted[2].name]["settings"]["init_from"]
    assert found["finetune"] == "upper" and found["pretraining"]["collected"]["images"] == 30

    # Nothing is pretrained for what is on record, and everything anew for other images or another recipe.
    wanted[0].pretrained_path.unlink()
    measure(wanted, tmp_path / "records.jsonl", progress=False)
    assert len(counted) == 1
    others = [
        trial(0, init_from=InitFrom(images(30, 6), recipe=SIMCLR), **how),
        trial(0, init_from=InitFrom(images(30, 5), recipe=dataclasses.replace(SIMCLR, epochs=1)), **how),
    ]
    measure(others, tmp_path / "records.jsonl", progress=False)
    assert len(counted) == 3 and len({one.pretrained_path for one in (*wanted, *others)}) == 3


def test_a_start_is_part_of_the_name_only_where_there_is_one(tmp_path):
    tensors = get("resnet18")(3, width=QUICK.width).state_dict()
    given, named = Weights("here", tensors), Weights("elsewhere", tensors)
    other = Weights("here", tensors | {"conv1.weight": torch.ones(8, 3, 3, 3)})
    one, same, another, upper = (
        trial(init_from=InitFrom(weights, how))
        for weights, how in ((given, "all"), (named, "all"), (other, "all"), (given, "upper"))
    )
    assert one.name == same.name and len({trial().name, one.name, another.name, upper.name}) == 4
    normalised = trial(init_from=InitFrom(dataclasses.replace(given, normalisation=Normalisation((0.5,), (0.2,)))))
    unknown = trial(init_from=InitFrom(dataclasses.replace(given, normalisation=None)))
    assert normalised.name != one.name == unknown.name
    assert normalised.settings["init_from"]["normalisation"] == {"mean": [0.5], "std": [0.2]}
    assert "images normalised by mean [0.5] and std [0.2]" in start_in_words(normalised.settings["init_from"])
    assert "init_from" not in trial().settings and "pairs" not in trial().settings
    collected = InitFrom(images(30, 5), recipe=SIMCLR)
    labelled = InitFrom(dataclasses.replace(images(30, 5), labels=None), recipe=SIMCLR)
    assert trial(init_from=collected, work_dir=tmp_path).name == trial(init_from=labelled, work_dir=tmp_path).name


def test_a_start_that_cannot_be(tmp_path):
    collected = InitFrom(images(30, 5), recipe=SIMCLR)
    with pytest.raises(ValueError, match="init_from is 'w', which has no bn1.bias"):
        trial(init_from=InitFrom(Weights("w", {"conv1.weight": torch.zeros(1)})))
    with pytest.raises(ValueError, match="collected has images of 8x8x3.*8x4x3"):
        narrow = TRAIN.with_images(TRAIN.images[:, :, :4])
        trial(init_from=collected, work_dir=tmp_path, train=narrow)
    with pytest.raises(ValueError, match="work_dir is None"):
        trial(init_from=collected)
    with pytest.raises(ValueError, match="init_from is given, .* None for method 'simclr'"):
        trial(init_from=collected, work_dir=tmp_path, method="simclr", recipe=SIMCLR, probe=TRAIN)


def test_pairs_name_a_trial_and_its_preparation_and_say_what_they_assume(tmp_path, monkeypatch):
    short = paired.PairedSettings(unet="tiny32", epochs=1, batch_size=8)
    monkeypatch.setitem(paired.SETTINGS, "paired-small", short)
    originals = images(16, 8)
    pairs = [Pairs(originals.with_images(originals.images // by), originals) for by in (2, 3)]
    how = {"countermeasure": "paired-small", "work_dir": tmp_path / "work"}
    wanted = [trial(pairs=one, **how) for one in pairs]
    assert len({one.name for one in wanted}) == 2
    assert wanted[0].settings["assumes"] == "the protection tool and its seed are public"
    measure([*wanted, trial(1, pairs=pairs[0], **how)], tmp_path / "records.jsonl", progress=False)
    assert len(list((tmp_path / "work").glob("*/paired-small-0/paired.json"))) == 2
    details = results_by_trial(tmp_path / "records.jsonl", what="victim")
    trained = json.loads(next((tmp_path / "work").glob("*/paired-small-0/summary.json")).read_text())
    # Of sixteen images, seconds may be zero once they are rounded.
    assert all(one["value"]["prepare_seconds"] >= 0 for one in details.values()) and trained["seconds_of_work"] >= 0


# ------------------------------------------------------------------------------------------------------------- purifiers


def test_a_purifier_trained_again_in_place_is_another_purifier(tmp_path):
    pipe = quick_pipe()
    pipe.save_pretrained(tmp_path / "purifier")
    known = purifier_digest(tmp_path / "purifier"), purifier_digest(pipe)
    assert known == (purifier_digest(str(tmp_path / "purifier")), purifier_digest(pipe))
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "purifier")
    again = purifier_digest(tmp_path / "purifier"), purifier_digest(pipe)
    assert not set(known) & set(again)
    loaded = JointConditionalPurificationPipeline.from_pretrained(tmp_path / "purifier")
    assert purifier_digest(loaded) == purifier_digest(pipe)
    pipe.scheduler.register_to_config(beta_end=0.03)
    assert purifier_digest(pipe) != purifier_digest(loaded)


def test_a_network_that_lies_beside_model_index_is_part_of_the_content(tmp_path):
    for name, weights in (("one", b"weights"), ("other", b"Weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    assert purifier_digest(tmp_path / "one") != purifier_digest(tmp_path / "other")


PRINT_DIGESTS = """
import sys
from jcdp_diffusers.trials import purifier_digest
for name in sys.stdin:
    print(purifier_digest(name.strip()), flush=True)
"""


@pytest.mark.long
def test_a_hub_id_is_known_by_its_commit(tmp_path):
    asked = [sys.executable, "-c", PRINT_DIGESTS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with HubServer() as hub:
        hub.repos["models/tester/purifier"] = files = {"model_index.json": b"{}"}
        with subprocess.Popen(asked, env=os.environ | hub.environment(tmp_path), **pipes) as process:
            commits = set()
            for content in (b"{}", b"{ }"):
                files["unet/config.json"] = content
                commits.add(hub.revision("models/tester/purifier"))
                process.stdin.write("tester/purifier\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"tester/purifier@{hub.revision('models/tester/purifier')}\n"
            process.stdin.close()
    assert len(commits) == 2


# ------------------------------------------------------------------------------------------------------ committed records


def test_every_trial_on_record_has_the_name_that_its_settings_give():
    results = Path(__file__).parents[1] / "results"
    found = [
        (path.name, record)
        for path in (*results.glob("*.jsonl"), *results.glob("*/records.jsonl"))
        for record in read_records(path)
        if "trial" in record["settings"]
    ]
    assert len(found) > 700
    for name, record in found:
        assert trial_name(record["settings"], record["seed"]) == record["settings"]["trial"], name
