"""Scoring: the figures, what is refused, and going on after an interruption."""

import dataclasses
import json
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from purifying import quick_pipe
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from jcdp_diffusers import score as scoring
from jcdp_diffusers import trials, victims
from jcdp_diffusers.cli import main
from jcdp_diffusers.countermeasures import paired
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.score import check_pair, score, sentence
from jcdp_diffusers.victims import Recipe, get_recipe, predict, train_victim


QUICK = Recipe("quick", epochs=2, batch_size=32, learning_rate=0.05, schedule="one_cycle", width=2)
NAMES = tuple("0123456789")


def digits(start, stop, **changes):
    data = load_digits()
    images = (data.images[start:stop, :, :, None] * 15).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    ids = tuple(f"digits/{row}" for row in range(start, stop))
    whole = LabelledImages(images.repeat(3, axis=3), data.target[start:stop], ids, NAMES)
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def train():
    return digits(0, 120)


@pytest.fixture(scope="module")
def test():
    return digits(120, 220)


@pytest.fixture(scope="module")
def result(train, test):
    return score(train, test, protocol=QUICK, seeds=3)


@pytest.fixture
def folders(train, test, tmp_path):
    write_dataset(tmp_path / "train", train)
    write_dataset(tmp_path / "test", test, split="test")
    return tmp_path


def arguments(folders, *more):
    return ["score", "--train", str(folders / "train"), "--test", str(folders / "test"), "--protocol", "smoke",
            "--output", str(folders / "score.json"), "--device", "cpu", "--processes", "1", *more]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ without labels


def test_the_score_of_a_representation(train, test):
    recipe = dataclasses.replace(get_recipe("smoke", "simclr"), width=2, max_steps_per_epoch=2)
    probe = digits(220, 300)
    unlabelled = dataclasses.replace(train, labels=None)
    result = score(unlabelled, test, method="simclr", probe=probe, protocol=recipe, seeds=2)
    alone = [train_victim(unlabelled, test, method="simclr", probe=probe, recipe=recipe, seed=seed) for seed in (0, 1)]
    assert result["accuracy"]["values"] == [victim.accuracy for victim in alone]
    assert result["knn_accuracy"]["values"] == [victim.knn_accuracy for victim in alone]
    assert "best_accuracy" not in result and "train_accuracy" not in result
    assert result["request"]["probe"]["images"] == 80


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"probe": None}, "probe is None, .* 'simclr'"),
        ({"probe": digits(200, 260)}, "probe and test have 20 images in common"),
        ({"probe": digits(220, 300, labels=None)}, "probe has no labels"),
        ({"countermeasure": "mixup"}, "countermeasure is 'mixup', .* 'simclr'"),
        ({"protocol": "iss"}, "protocol is 'iss', .* cp, fast"),
        ({"protocol": "mini"}, "train has 120 images, .* at least 128, the batch_size of recipe 'mini'"),
        (
            {"protocol": "digits", "countermeasure": "advcl", "collected": digits(300, 400)},
            "data has 120 images, .* 500",
        ),
    ],
)
def test_what_a_representation_cannot_be_scored_with(train, test, changes, message):
    options = {"method": "simclr", "probe": digits(220, 300), "protocol": "smoke"} | changes
    with pytest.raises(ValueError, match=message):
        score(train, test, **options)


# ------------------------------------------------------------------------------------------- the network by the device


@pytest.mark.parametrize(
    "options, victim, recipe", [({}, "convnet94", "airbench"), ({"victim": "resnet18"}, "resnet18", "fast")]
)
def test_on_a_cpu_the_fast_network_is_the_default(train, test, monkeypatch, options, victim, recipe):
    asked = []

    def measured(trials, *_, **__):
        asked.extend(trials)
        raise KeyboardInterrupt

    monkeypatch.setattr("jcdp_diffusers.score.measure", measured)
    with pytest.raises(KeyboardInterrupt):
        score(train, test, seeds=1, **options)
    assert (asked[0].settings["victim"], asked[0].settings["recipe"]["name"]) == (victim, recipe)


def test_whitening_by_collected_images(train, test):
    recipe = dataclasses.replace(QUICK, epochs=1)
    options = {"victim": "convnet94", "protocol": recipe, "seeds": 1}
    collected = digits(220, 300, labels=None)
    plain = score(train, test, **options)
    whitened = score(train, test, whitening="collected", collected=collected, **options)
    alone = train_victim(train, test, victim="convnet94", recipe=recipe, whitening=collected)
    assert whitened["accuracy"]["values"] == [alone.accuracy]
    assert whitened["runs"][0]["trial"] != plain["runs"][0]["trial"]
    assert whitened["request"]["whitening"]["images"] == 80 and plain["request"]["whitening"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"whitening": "test"}, "whitening is 'test'"),
        ({"whitening": "collected"}, "collected is None"),
        ({"collected": digits(220, 300)}, "collected is 80 images, .* 'training'"),
        ({"whitening": "collected", "collected": digits(200, 300)}, "collected and test have 20 images in common"),
        ({"whitening": "collected", "collected": digits(220, 300), "victim": "vgg16"}, "whitening is 'collected', .* 'vgg16'"),
        ({"whitening": "collected", "collected": digits(220, 300).with_images(digits(220, 300).images[:, :8])}, "8x16x3"),
    ],
)  # fmt: skip
def test_whitening_that_cannot_be(train, test, changes, message):
    with pytest.raises(ValueError, match=message):
        score(train, test, **{"victim": "convnet94", "protocol": QUICK} | changes)


def test_the_help_says_what_the_network_of_papers_costs(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "resnet18 of width 64" in said and "1 to 3 hours of a core for each 10,000 images" in said


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_victims_trained_alone(result, train, test):
    alone = [train_victim(train, test, recipe=QUICK, seed=seed) for seed in range(3)]
    for name in ("accuracy", "best_accuracy", "train_accuracy"):
        values = [getattr(victim, name) for victim in alone]
        assert result[name]["values"] == values
        assert result[name]["mean"] == pytest.approx(np.mean(values))
        assert result[name]["std"] == pytest.approx(statistics.stdev(values))
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    for run, victim in zip(result["runs"], alone):
        assert run["confusion"] == victim.confusion.tolist()
        assert run["per_class_accuracy"] == victim.per_class_accuracy.tolist()
        assert [epoch["test_accuracy"] for epoch in run["history"]] == pytest.approx(
            [epoch["test_accuracy"] for epoch in victim.history], abs=5e-6
        )
    assert result["confusion"] == sum(victim.confusion for victim in alone).tolist()
    per_class = np.mean([victim.per_class_accuracy for victim in alone], axis=0)
    assert result["per_class_accuracy"] == pytest.approx(dict(zip(NAMES, per_class)))


def test_result_says_how_it_came_about(result, train):
    request = result["request"]
    assert (request["victim"], request["width"], request["seeds"]) == ("resnet18", 2, [0, 1, 2])
    assert request["recipe"]["name"] == "quick" and not result["smoke"]
    assert request["train"]["images_per_class"] == np.bincount(train.labels).tolist()
    assert result["packages"]["torch"] == torch.__version__.split("+")[0] and result["device"] == "cpu"
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_victim_has_no_spread(train, test):
    result = score(train, test, protocol=QUICK, seeds=[7])
    assert result["accuracy"]["std"] is None and len(result["accuracy"]["values"]) == 1
    assert result["runs"][0]["seed"] == 7


def test_countermeasure_by_name(result, train, test):
    treated = score(train, test, protocol=QUICK, seeds=1, countermeasure="bdr-2+cutout")
    assert treated["request"]["countermeasure"] == "bdr-2+cutout"
    assert treated["request"]["countermeasure_settings"] == {"bdr-2": {"bits": 2}, "cutout": {"side": 0.5}}
    assert treated["runs"][0]["history"] != result["runs"][0]["history"]
    assert treated["request"]["test"] == result["request"]["test"]


def test_models_are_kept_if_asked(train, test, tmp_path):
    result = score(train, test, protocol=QUICK, seeds=2, model_dir=tmp_path)
    for run in result["runs"]:
        model = victims.get("resnet18")(10, width=2).eval()
        model.load_state_dict(load_file(tmp_path / f"resnet18-{run['seed']}.safetensors"))
        right = predict(model, test.tensor()).argmax(1).numpy() == test.labels
        assert right.mean() == pytest.approx(run["accuracy"])


def test_models_that_were_not_kept_are_not_promised(train, test, tmp_path):
    output = {"protocol": QUICK, "seeds": 1, "output": tmp_path / "score.json"}
    score(train, test, **output)
    with pytest.raises(ValueError, match="has the figures of the victim with seed 0, whose model was not kept"):
        score(train, test, model_dir=tmp_path / "models", **output)
    (tmp_path / "score.json").unlink()
    score(train, test, model_dir=tmp_path / "models", **output)
    assert score(train, test, model_dir=tmp_path / "models", **output)["accuracy"]  # finished, and the model is there


# --------------------------------------------------------------------------------------------- pretrained, and pairs


@pytest.fixture(scope="module")
def collected():
    return digits(220, 300)


def test_victims_that_start_from_collected_images(result, train, test, collected, tmp_path):
    options = {"protocol": QUICK, "seeds": 2, "init_from": "collected", "collected": collected}
    recipe = dataclasses.replace(get_recipe("smoke", "simclr"), max_steps_per_epoch=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jcdp_diffusers.victims.finetuning.pretraining_recipe", lambda _: recipe)
        started = score(train, test, finetune="upper", checkpoint_dir=tmp_path, **options)
        said = sentence(started)
    assert started["request"]["init_from"]["pretraining"]["collected"]["images"] == 80
    assert "pretrained without labels on 80 collected images, the upper stages fine-tuned," in said
    assert started["runs"][0]["history"] != result["runs"][0]["history"] and result["request"]["init_from"] is None
    assert len(list((tmp_path / "pretrained").iterdir())) == 1


def test_victims_that_start_from_what_an_earlier_score_kept(train, test, collected, tmp_path):
    score(collected, test, protocol=QUICK, seeds=1, model_dir=tmp_path)
    started = score(train, test, protocol=QUICK, seeds=1, init_from=tmp_path / "resnet18-0.safetensors")
    assert started["request"]["init_from"]["replaced_classes"] == 10
    assert "a new last layer in place of that for 10 classes, all weights fine-tuned," in sentence(started)
    with pytest.raises(ValueError, match="init_from is .*images of 3x16x16.*3x8x8"):
        small = [data.with_images(data.images[:, ::2, ::2]) for data in (train, test)]
        score(*small, protocol=QUICK, seeds=1, init_from=tmp_path)


def test_a_score_with_pairs_says_what_it_assumes(train, test, collected, monkeypatch):
    short = paired.PairedSettings(unet="tiny32", epochs=1, batch_size=40)
    monkeypatch.setitem(paired.SETTINGS, "paired-small", short)
    after = collected.with_images(collected.images // 2)
    options = {"protocol": QUICK, "seeds": 1, "countermeasure": "paired-small"}
    scored = score(train, test, collected=collected, collected_protected=after, **options)
    assert "with paired-small (assumes that the protection tool and its seed are public) got" in sentence(scored)
    assert scored["request"]["pairs"]["originals"]["images"] == 80
    with pytest.raises(ValueError, match="collected_protected is None.*'paired-small'"):
        score(train, test, collected=collected, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "collected"}, "collected is None, .* init_from is 'collected'"),
        ({"collected": digits(220, 300)}, "collected is 80 images, but must be None"),
        ({"finetune": "upper"}, "finetune is 'upper', .* 'all' where init_from is None"),
        ({"init_from": "collected", "collected": digits(100, 300)}, "collected and test have 100 images in common"),
        ({"init_from": "collected", "collected": digits(110, 120)}, "collected and train have 10 images in common"),
        ({"init_from": "no/such"}, "init_from is 'no/such'"),
        ({"collected_protected": digits(220, 300)}, "collected_protected has 80 images, .* 'none'"),
    ],
)
def test_starts_and_pairs_that_cannot_be(changes, message, train, test):
    with pytest.raises(ValueError, match=message):
        score(train, test, protocol="smoke", **changes)


# --------------------------------------------------------------------------------------------------------- interruption


def test_goes_on_where_it_was_cut_off(result, train, test, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "score.json"
    trained = []

    def interrupted(*args, seed, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(seed)
        return train_victim(*args, seed=seed, **options)

    monkeypatch.setattr(trials, "train_victim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(train, test, protocol=QUICK, output=output)
    assert not output.exists()
    monkeypatch.undo()
    resumed = score(train, test, protocol=QUICK, output=output)
    assert resumed["accuracy"] == result["accuracy"] and resumed["confusion"] == result["confusion"]
    assert json.loads(output.read_text()) == resumed
    assert [path.name for path in output.parent.glob("[!.]*")] == ["score.json"]


def test_what_is_finished_is_not_done_again(train, test, tmp_path, monkeypatch):
    output = tmp_path / "score.json"
    first = score(train, test, protocol=QUICK, seeds=1, output=output)
    monkeypatch.setattr(trials, "train_victim", None)
    assert score(train, test, protocol=QUICK, seeds=1, output=output) == first


@pytest.mark.parametrize(
    "change, name",
    [
        ({"seeds": 2}, "seeds"),
        ({"width": 3}, "width"),
        ({"countermeasure": "gray"}, "countermeasure"),
        ({"train": digits(0, 119)}, "train"),
    ],
)
def test_another_scores_file_is_not_overwritten(train, test, tmp_path, change, name):
    output = tmp_path / "score.json"
    options = {"train": train, "test": test, "protocol": QUICK, "seeds": 1, "output": output}
    score(**options)
    before = output.read_text()
    with pytest.raises(ValueError, match=f"score.json.* holds a score with another {name}; give"):
        score(**options | change)
    assert output.read_text() == before


def test_a_score_with_other_collected_images_is_another(test, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "measure", lambda trials, records, **_: records.touch())
    monkeypatch.setattr(scoring, "_result", lambda request, *_: {"request": request})
    options = {"method": "simclr", "protocol": "smoke", "countermeasure": "advcl", "probe": digits(280, 340)}
    options |= {"output": tmp_path / "score.json"}
    first = score(digits(220, 280), test, collected=digits(340, 400), **options)
    assert score(digits(220, 280), test, collected=digits(340, 400), **options) == first
    with pytest.raises(ValueError, match="score.json.* holds a score with another collected_images; give"):
        score(digits(220, 280), test, collected=digits(400, 460), **options)


@pytest.mark.parametrize("content", ["my thesis", "[]", "{}"])
def test_a_file_of_somebody_else_is_not_replaced(content, train, test, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="mine.txt', which holds something else"):
        score(train, test, protocol="smoke", output=path)
    assert path.read_text() == content


@pytest.mark.parametrize("as_object", [False, True])
def test_a_purifier_trained_again_in_place_is_measured_again_or_refused(as_object, tmp_path, monkeypatch):
    """Never its old figure: neither that of a finished score nor that of a victim whose score was cut off."""
    small = [data.with_images(data.images[:, ::2, ::2].copy()) for data in (digits(0, 60), digits(60, 120))]
    pipe = quick_pipe()
    options = {
        "protocol": dataclasses.replace(QUICK, epochs=1),
        "seeds": 2,
        "countermeasure": "unconditional",
        "purifier": pipe if as_object else tmp_path / "purifier",
        "purification": PurificationConfig(diffusion_steps=100, num_inference_steps=2),
        "checkpoint_dir": tmp_path / "purified",
    }

    def cut_off(*args, seed, **others):
        if seed == 1:
            raise KeyboardInterrupt
        return train_victim(*args, seed=seed, **others)

    pipe.save_pretrained(tmp_path / "purifier")
    score(*small, output=tmp_path / "finished.json", **options)
    monkeypatch.setattr(trials, "train_victim", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score(*small, output=tmp_path / "cut-off.json", **options)
    monkeypatch.undo()

    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.5)
    pipe.save_pretrained(tmp_path / "purifier")
    with pytest.raises(ValueError, match="finished.json.* another purifier"):
        score(*small, output=tmp_path / "finished.json", **options)
    resumed = score(*small, output=tmp_path / "cut-off.json", **options)
    fresh = score(*small, **options | {"checkpoint_dir": None})
    assert [run["confusion"] for run in resumed["runs"]] == [run["confusion"] for run in fresh["runs"]]
    assert [run["trial"] for run in resumed["runs"]] == [run["trial"] for run in fresh["runs"]]
    old = json.loads((tmp_path / "finished.json").read_text())
    assert resumed["request"]["purifier"] != old["request"]["purifier"]
    assert resumed["runs"][0]["history"][0]["train_loss"] != old["runs"][0]["history"][0]["train_loss"]


def test_the_model_of_another_score_is_not_taken_for_ones_own(train, test, tmp_path):
    options = {"protocol": QUICK, "seeds": 1, "model_dir": tmp_path / "models", "output": tmp_path / "score.json"}
    score(train, test, **options)
    score(train, test, **options | {"protocol": dataclasses.replace(QUICK, epochs=1), "output": tmp_path / "o.json"})
    with pytest.raises(ValueError, match="model_dir is .*score.json.*seed 0"):
        score(train, test, **options)


def test_a_method_without_labels_is_scored_by_a_probe(folders, capsys):
    write_dataset(folders / "probe", digits(220, 340))
    asked = arguments(folders, "--seeds", "1", "--method", "simclr", "--width", "2")
    assert main(asked) == 1 and "probe is None" in capsys.readouterr().err
    assert main([*asked, "--probe", str(folders / "test")]) == 1 and "in common" in capsys.readouterr().err
    assert main([*asked, "--probe", str(folders / "probe")]) == 0
    assert "(resnet18 by simclr, width 2, recipe smoke)" in capsys.readouterr().out
    result = json.loads((folders / "score.json").read_text())
    assert result["request"]["method"] == "simclr" and result["request"]["probe"]["images"] == 120
    assert result["knn_accuracy"]["values"] == [result["runs"][0]["knn_accuracy"]]
    assert result["request"]["victim"] == "resnet18"
    assert "best_accuracy" not in result and np.sum(result["confusion"]) == 100


def test_columns_are_asked_of_images_whose_labels_are_used(folders, monkeypatch, capsys):
    """Training images of a method without labels, and collected ones, may lack them."""
    for role, start in (("test", 120), ("probe", 220), ("collected", 260)):
        data = digits(start, start + 20)
        columns = {"kind": data.labels.tolist()} if role != "collected" else {}
        write_dataset(folders / f"own_{role}", dataclasses.replace(data, labels=None), columns=columns)
    asked = []
    monkeypatch.setattr(scoring, "score", lambda train, test, **options: asked.append((train, test, options)) or {})
    monkeypatch.setattr(scoring, "sentence", lambda result: "")
    given = arguments(folders, "--label_column", "kind")
    for role in ("test", "probe", "collected"):
        given += [f"--{role}", str(folders / f"own_{role}")]
    assert main([*given, "--method", "simclr"]) == 0
    ((train, test, options),) = asked
    assert test.labels.tolist() == digits(120, 140).labels.tolist() and options["probe"].labels is not None
    assert train.labels is not None and options["collected"].labels is None  # those of its usual column, or none
    assert main(given) == 1
    assert "--train" in (said := capsys.readouterr().err) and "label_column is 'kind'" in said


# --------------------------------------------------------------------------------------------------------------- errors


def without(data, *labels):
    return data.subset(~np.isin(data.labels, labels))


def slightly_changed(data):
    return dataclasses.replace(data.with_images(data.images ^ 1), ids=tuple(f"other/{id_}" for id_ in data.ids))


@pytest.mark.parametrize(
    "change_train, change_test, message",
    [
        (lambda d: dataclasses.replace(d, labels=None), lambda d: d, "train has no labels, but every image of it"),
        (lambda d: d, lambda d: dataclasses.replace(d, labels=None), "test has no labels, but every image of it"),
        (lambda d: d, lambda d: without(d, 3), "test has no image of class '3', but every one of the 10 classes"),
        (
            lambda d: without(d, 3, 4),
            lambda d: d,
            "train has no image of class '3', '4', but every one of the 10 classes",
        ),
        (
            lambda d: dataclasses.replace(d, class_names=("00", *NAMES[1:], "0")),
            lambda d: d,
            "train has the class '0' twice",
        ),
        (
            lambda d: dataclasses.replace(d, class_names=(*NAMES, "ten", "x")),
            lambda d: dataclasses.replace(d, class_names=(*NAMES[:9], "nine")),
            "train has no image of class 'nine', but every one of the 11 classes",
        ),
        (
            lambda d: without(d, 0, 1, 2, 3, 4, 5, 6, 7, 8),
            lambda d: without(d, 0, 1, 2, 3, 4, 5, 6, 7, 8),
            "train has images of one class only",
        ),
        (
            lambda d: without(dataclasses.replace(d, class_names=None), 8, 9),
            lambda d: dataclasses.replace(d, class_names=None),
            "train has no image of class '8', '9', but every one",
        ),
        (
            lambda d: dataclasses.replace(d, labels=d.labels + 1, class_names=None),
            lambda d: d,
            "train has no image of class '0', but every one of the 11 classes",
        ),
        (lambda d: d, lambda d: d.with_images(d.images[:, ::2, ::2]), "train has images of 16x16x3 and test of 8x8x3"),
        (lambda d: digits(0, 121), lambda d: d, "train and test have 1 images in common .* the first 'digits/120'"),
        (
            lambda d: slightly_changed(digits(100, 150)),
            lambda d: d,
            r"have 30 images in common \(same id, same pixels or within 16/255\), the first 'other/digits/120' and 'digits/120'",
        ),
    ],
)
def test_sets_that_do_not_suit_each_other(train, test, change_train, change_test, message):
    with pytest.raises(ValueError, match=message):
        score(change_train(train), change_test(test), protocol=QUICK)


def test_comparison_can_be_left_out(test):
    assert check_pair(slightly_changed(test), test, overlap_budget=None)[2] == list(NAMES)
    assert check_pair(dataclasses.replace(test, class_names=None), test, overlap_budget=None)[2] == list(NAMES)


def test_a_purifier_that_does_not_suit_is_refused_before_any_work(train, test, tmp_path):
    quick_pipe().save_pretrained(tmp_path)
    PurificationConfig(diffusion_steps=50, trained_timesteps=(0, 50)).save_pretrained(tmp_path)
    options = {"protocol": QUICK, "purifier": tmp_path}
    with pytest.raises(ValueError, match="purifier was trained on 8x8 pixels.*16x16"):
        score(train, test, countermeasure="eclipse", **options)
    small = [data.with_images(np.ascontiguousarray(data.images[:, ::2, ::2])) for data in (train, test)]
    with pytest.raises(ValueError, match="diffusion_steps is 100"):
        score(*small, countermeasure="avatar", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protocol": "slow"}, "protocol is 'slow', but must be one of bridgepure, iss, emn"),
        ({"victim": "lenet"}, "victim is 'lenet'"),
        ({"countermeasure": "prayer"}, "countermeasure is 'prayer', but must be one of none"),
        ({"countermeasure": "gdmp"}, "purifier is None, but countermeasure 'gdmp' needs one"),
        ({"seeds": 0}, "seeds is 0, but at least one victim"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], but at least one victim, each with a seed of its own"),
        ({"seeds": [0, -1]}, r"seed is -1, but must be a whole number in \[0, 2\*\*32\)"),
        ({"processes": 0}, "processes is 0, but must be at least 1"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but must be one that torch finds"),
        ({"width": 0}, "width is 0, but must be a positive integer for resnet18"),
        ({"draws": 0}, "draws is 0, but for countermeasure 'none' it must be 1"),
        ({"purifier": "somewhere"}, "purifier is given, but must be None for countermeasure 'none'"),
        ({"countermeasure": "gray", "purification": "tuned"}, "purification is given, but must be None for .* 'gray'"),
    ],
)
def test_options_that_are_refused(train, test, options, message):
    with pytest.raises(ValueError, match=message):
        score(train, test, **{"protocol": QUICK} | options)


# -------------------------------------------------------------------------------------------------------- command line


def test_command(folders, capsys):
    assert main(arguments(folders, "--seeds", "2", "--countermeasure", "gray")) == 0
    result = json.loads((folders / "score.json").read_text())
    said = capsys.readouterr().out
    assert f"got {100 * result['accuracy']['mean']:.1f} % (standard deviation" in said
    assert "2 victims (resnet18, width 8, recipe smoke) with gray" in said
    assert "This was a smoke run: the figures mean nothing." in said
    assert result["smoke"] and len(result["runs"]) == 2 and result["request"]["class_names"] == list(NAMES)


def test_command_with_several_splits(folders, test, capsys):
    write_dataset(folders / "test", test, split="validation")
    assert main(arguments(folders, "--seeds", "1")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--test (with --test_split): source" in error and "has several splits" in error
    assert main(arguments(folders, "--seeds", "1", "--test_split", "validation")) == 0


def test_command_with_overlapping_roles(folders, capsys):
    assert main([*arguments(folders), "--test", str(folders / "train")]) == 1
    assert "train and test have 120 images in common" in capsys.readouterr().err


def test_command_with_what_is_not_there(folders, capsys):
    assert main([*arguments(folders), "--train", str(folders / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(arguments(folders, "--protocol", "slow"))
    assert stopped.value.code == 2


def test_script_for_a_data_set_with_both_splits(train, test, tmp_path, monkeypatch, capsys):
    for split, data in (("train", train), ("test", test)):
        write_dataset(tmp_path / "both", data, split=split)
    options = ["--dataset", tmp_path / "both", "--output", tmp_path / "s.json", "--protocol", "smoke", "--seeds", 1]
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, options), "--device", "cpu"])
    runpy.run_path(str(Path(__file__).parents[1] / "eval" / "score.py"), run_name="__main__")
    assert "1 victim (resnet18, width 8, recipe smoke) got" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["request"]["train"]["images"] == len(train)


def test_a_score_is_never_written_through_a_link_nor_over_its_source(tmp_path, capsys):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "score.json").symlink_to(target)
    options = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--protocol", "smoke"]
    assert main(["score", *options, "--output", str(tmp_path / "score.json")]) == 1
    assert "score.json" in capsys.readouterr().err and target.read_text() == "mine"
    (tmp_path / "train").mkdir()
    assert main(["score", *options, "--output", str(tmp_path / "train" / "score.json")]) == 1
    assert "train" in capsys.readouterr().err and not list((tmp_path / "train").iterdir())
