"""A grid from its file to tables and figures, on digits and in smoke runs."""

import copy
import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from purifying import quick_pipe
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from eval import benchmark, figures, tables
from eval.grid_file import OWN_FACTS
from jcdp_diffusers import trials
from jcdp_diffusers.countermeasures import Pairs
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.results import read_records
from jcdp_diffusers.train.provenance import image_digests, write_trained_on


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """270 digits as they ship, 8x8, in colour."""
    digits = load_digits()
    images = np.repeat((digits.images * 15).astype(np.uint8)[:270, :, :, None], 3, axis=3)
    names = tuple("0123456789")
    data = LabelledImages(images, digits.target[:270], tuple(f"digit-{row}" for row in range(270)), names)
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(folder, data.subset(range(180)))
    write_dataset(folder, data.subset(range(180, 270)), split="test")
    return str(folder)


def grid_file(folder, source, **changes):
    grid = {
        "name": "tiny",
        "data": {
            "name": "digits8",
            "protected": {"source": source, "split": "train", "count": 120},
            "collected": {"source": source, "split": "train", "first": 120, "count": 60},
            "test": {"source": source, "split": "test"},
        },
        "poisons": ["none", "lsp"],
        "countermeasures": ["none", "gray", {"use": "unconditional", "as": "weak", "num_inference_steps": 2}],
        "protocol": "smoke",
        "recipe": {"epochs": 1, "max_steps_per_epoch": 2, "width": 4},
        "seeds": [0, 1],
    } | changes
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.fixture(scope="module")
def measured(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    grid = benchmark.read_grid(grid_file(folder, source))
    benchmark.run_grid(grid, folder / "out", say=lambda line: None)
    return folder


def run(module, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options)])
    module.main()


def test_each_cell_of_the_grid_is_a_record(measured):
    records = [r for r in read_records(measured / "out/records.jsonl") if r["what"] == "accuracy"]
    found = {(r["settings"]["poison"], r["settings"]["column"], r["seed"]) for r in records}
    assert found == {(p, c, s) for p in ("none", "lsp") for c in ("none", "gray", "weak") for s in (0, 1)}
    assert len(records) == 12 and [r["seed"] for r in records] == [0] * 6 + [1] * 6
    for record in records:
        settings = record["settings"]
        assert ("roles" in settings) == ("purifier" in settings) == (settings["column"] == "weak")
        assert ("poison_norms" in settings) == (settings["poison"] == "lsp")


def test_a_control_has_the_poisons_size_and_another_look(source, tmp_path, monkeypatch, capsys):
    path = grid_file(tmp_path, source, poisons=["lsp", "lsp-control"], countermeasures=["none"], seeds=[0])
    cells = benchmark.run_grid(benchmark.read_grid(path), tmp_path / "out", say=lambda line: None)
    poisoned, control = (cell.train.images.astype(int) for cell in cells)
    clean = load_images(source, split="train").subset(range(120)).images
    assert (poisoned != control).any()
    for images in (poisoned, control):
        assert (np.abs(images - clean).max(axis=(1, 2, 3)) > 0).all()
    norms = [cell.about["poison_norms"]["l2_mean"] for cell in cells]
    assert norms[1] == pytest.approx(norms[0], rel=0.3)  # clipping at black takes its part of each
    run(tables, monkeypatch, "poisons", "--records", tmp_path / "out/records.jsonl", "--smoke")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LSP |"))
    values = {
        r["settings"]["poison"]: r["value"]
        for r in read_records(tmp_path / "out/records.jsonl")
        if r["what"] == "accuracy"
    }
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{100 * values['lsp']:.1f}" and cells[3] == f"{100 * values['lsp-control']:.1f}"
    with pytest.raises(ValueError, match="poisons has 'rain-control'.*none, emn"):
        benchmark.read_grid(path, poisons=["rain-control"])


def accuracies(folder: Path) -> dict[str, float]:
    """By trial."""
    return {
        r["settings"]["trial"]: r["value"] for r in read_records(folder / "records.jsonl") if r["what"] == "accuracy"
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"method": "moco-v2", "countermeasures": ["none"], "recipe": {"batch_size": 128, "queue": 256}},
            "train has 120 images, .* 128, the batch_size",
        ),
        (
            {"method": "simclr", "protocol": "digits", "countermeasures": ["advcl"]},
            "data has 120 images, .* pseudo-labels of advcl",
        ),
    ],
)
def test_images_that_victims_cannot_take_are_refused_before_anything_is_made(source, tmp_path, changes, sentence):
    grid = benchmark.read_grid(grid_file(tmp_path, source, **changes))
    with pytest.raises(ValueError, match=sentence):
        benchmark.run_grid(grid, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out/poisons").exists()


def test_a_grid_whose_victims_learn_without_labels(source, tmp_path, monkeypatch, capsys):
    changes = {"method": "simclr", "countermeasures": ["none", "gray"], "seeds": [0]}
    path = grid_file(tmp_path, source, **changes)
    cells = benchmark.run_grid(benchmark.read_grid(path), tmp_path / "out", say=lambda line: None)
    assert [(cell.about["poison"], cell.countermeasure) for cell in cells] == [
        (poison, column) for poison in ("none", "lsp") for column in ("none", "gray")
    ]
    clean = load_images(source, split="train").subset(range(120))
    for record in read_records(tmp_path / "out/records.jsonl"):
        settings = record["settings"]
        assert settings["method"] == settings["recipe"]["method"] == "simclr"
        assert settings["probe"] == trials.describe_images(clean)
    # Their figures stand in no table of victims that learn otherwise.
    with pytest.raises(SystemExit, match="the method 'supervised'"):
        run(tables, monkeypatch, "grid", "--records", tmp_path / "out/records.jsonl", "--smoke")
    run(tables, monkeypatch, "methods", "--records", tmp_path / "out/records.jsonl", "--smoke")
    values = accuracies(tmp_path / "out")
    shown = [f"{100 * values[cell.name]:.1f}" for cell in (cells[0], cells[2], cells[3])]
    assert f"| LSP | SimCLR | {' | '.join(shown)} |" in capsys.readouterr().out
    assert benchmark.tables_command(benchmark.read_grid(path), cells, "out").endswith("--smoke --method simclr")
    with pytest.raises(ValueError, match="countermeasure is 'mixup', .* 'simclr'; .* gray"):
        benchmark.read_grid(grid_file(tmp_path, source, **changes | {"countermeasures": ["mixup"]}))
    with pytest.raises(ValueError, match="protocol is 'iss', .* cp, fast"):
        benchmark.read_grid(grid_file(tmp_path, source, **changes | {"protocol": "iss"}))


@pytest.mark.long
def test_on_ray_the_figures_are_those_of_one_process(measured, source, tmp_path):
    path = grid_file(tmp_path, source, countermeasures=["none", "gray"], seeds=[0])
    command = [sys.executable, "eval/benchmark.py", str(path), "--output", str(tmp_path / "out"), "--engine", "ray"]
    root = Path(benchmark.__file__).parents[1]
    ended = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=500, cwd=root)
    assert ended.returncode == 0, ended.stderr
    found, before = accuracies(tmp_path / "out"), accuracies(measured / "out")
    assert len(found) == 4 and found == {name: before[name] for name in found}
    assert "4 trials on record" in ended.stdout


def test_a_grid_replaces_numbers_of_its_one_poison(source, tmp_path):
    path = grid_file(
        tmp_path, source, poisons=["lsp"], poison_settings={"norm": 2}, countermeasures=["none"], seeds=[0]
    )
    (trial,) = benchmark.run_grid(benchmark.read_grid(path), tmp_path / "out", say=lambda line: None)
    assert trial.about["poison_settings"]["norm"] == 2
    with pytest.raises(ValueError, match="poison_settings has norm.*one"):
        benchmark.read_grid(path, poisons=["lsp", "ops"])
    with pytest.raises(ValueError, match="poison_settings has 'norm'.*emn"):
        benchmark.read_grid(path, poisons=["emn"])


def test_a_rerun_does_only_what_is_missing(measured, source, monkeypatch):
    path = measured / "out/records.jsonl"
    before = path.read_text()
    benchmark.run_grid(benchmark.read_grid(measured / "grid.yaml"), measured / "out", say=lambda line: None)
    assert path.read_text() == before
    # Stopped after the first five cells, as far as the records go.
    path.write_text("\n".join(before.splitlines()[:10]) + "\n")
    run(
        benchmark,
        monkeypatch,
        measured / "grid.yaml",
        "--output",
        measured / "out",
        "--processes",
        1,
        "--device",
        "cpu",
    )
    again, once = ([json.loads(line) for line in text.splitlines()] for text in (path.read_text(), before))
    assert again[:10] == once[:10] and len(again) == len(once)
    assert [(r["what"], r["seed"], r["settings"]) for r in again] == [
        (r["what"], r["seed"], r["settings"]) for r in once
    ]
    assert [r["value"] for r in again if r["what"] == "accuracy"] == [
        r["value"] for r in once if r["what"] == "accuracy"
    ]


def test_tables_and_figures_from_records_alone(measured, monkeypatch, capsys, tmp_path):
    records = measured / "out/records.jsonl"
    run(tables, monkeypatch, "grid", "--records", records, "--smoke")
    said = capsys.readouterr().out
    assert "| countermeasure | clean | LSP | seconds before training |" in said and "Smoke run" in said
    assert "| weak | " in said and "digits8: 120 training images, resnet18 of width 4" in said
    with pytest.raises(SystemExit, match="no smoke run's recipe"):  # a smoke run is no measurement
        run(tables, monkeypatch, "grid", "--records", records)
    for name in ("curves", "strength"):
        output = tmp_path / f"{name}.png"
        run(figures, monkeypatch, name, "--records", records, "--smoke", "--output", output)
        assert np.asarray(Image.open(output).convert("L")).std() > 5
    with pytest.raises(SystemExit, match="dataset is 'cifar10'"):
        run(figures, monkeypatch, "curves", "--records", records, "--smoke", "--dataset", "cifar10")
    with pytest.raises(SystemExit, match="figures: "):
        run(figures, monkeypatch, "curves", "--records", records)


def test_a_line_of_the_strength_figure_is_one_way_of_purifying():
    base = PurificationConfig(diffusion_steps=30, num_inference_steps=2, variance_type="fixed_small")

    def way(measure="unconditional", **changes):
        changed = dataclasses.asdict(dataclasses.replace(base, **changes))
        facts = {"dataset": "digits", "collected": "digits"}
        settings = {"countermeasure": measure, "purification": changed} | facts
        return figures.way_of_purifying(settings, ("diffusion_steps", "num_inference_steps"))

    assert way() == way(diffusion_steps=60, num_inference_steps=6) == "1 round"
    assert way("unconditional+corruption") == "purified+corruption, 1 round"
    assert way(num_rounds=8, pixel_guidance_scale=30.0) == "8 rounds, pixel_guidance_scale 30.0"


def test_pictures_of_several_sets(measured, source, monkeypatch, tmp_path):
    protected = next((measured / "out/poisons").glob("lsp-*"))
    sets = ["--sets", f"protected={protected}", f"again={protected}"]
    run(figures, monkeypatch, "purified", *sets, "--output", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="test lacks the image 'digit-0'"):
        write_dataset(tmp_path / "test", benchmark.load_images(source, split="test"))
        run(figures, monkeypatch, "purified", "--sets", f"p={protected}", f"test={tmp_path / 'test'}")


def test_a_column_may_have_a_purifier_of_fewer_images(source, tmp_path):
    columns = [
        {"use": "eclipse", "as": "eclipse, all", "num_inference_steps": 1},
        {"use": "eclipse", "as": "eclipse, sparse", "num_inference_steps": 1, "collected": 20},
    ]
    grid = benchmark.read_grid(grid_file(tmp_path, source, poisons=["none"], countermeasures=columns, seeds=[0]))
    lines = []
    everything, sparse = benchmark.run_grid(grid, tmp_path / "out", say=lines.append)
    assert [line.split()[4] for line in lines if line.startswith("Training")] == ["60", "20"]
    assert everything.purifier != sparse.purifier
    assert sparse.settings["collected_count"] == 20 and "collected_count" not in everything.settings
    assert everything.settings["purifier"] != sparse.settings["purifier"]


def test_whatever_learns_from_test_images_says_so(measured):
    def roles_of(roles, entry):
        changes = {"roles": roles, "countermeasures": [entry], "seeds": [0], "poisons": ["none"]}
        content = yaml.safe_load((measured / "grid.yaml").read_text()) | changes
        (measured / "roles.yaml").write_text(yaml.safe_dump(content))
        grid = benchmark.read_grid(measured / "roles.yaml")
        (column,) = grid.columns().values()
        assert benchmark._learns_from_collected(column) == (entry != "gray")
        images = LabelledImages(np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 10, tuple(map(str, range(20))))
        told = grid.data["name"], {"none": (images, {})}, images, {}, "unknown", measured / "work"
        pairs = {("none", column.collected): Pairs(images, images)}
        (trial,) = benchmark.grid_trials(grid, *told, None, images, pairs=pairs)
        return trial.about.get("roles")

    pretrained = {"use": "none", "as": "pretrained", "init_from": "collected"}
    assert roles_of("paper", pretrained) == roles_of("paper", "paired-small") == "paper"
    assert roles_of("paper", "gray") is None
    assert roles_of("disjoint", pretrained) is None  # as their names always were


def test_roles_of_the_paper_are_another_column(measured, source, monkeypatch, capsys):
    grid = benchmark.read_grid(measured / "grid.yaml", roles="paper", seeds=[0])
    benchmark.run_grid(grid, measured / "out", say=lambda line: None)
    records = [r for r in read_records(measured / "out/records.jsonl") if r["what"] == "accuracy"]
    roles = [r["settings"].get("roles") for r in records]
    assert roles.count("paper") == 2 and roles.count("disjoint") == 4 and len(records) == 14
    run(tables, monkeypatch, "grid", "--records", measured / "out/records.jsonl", "--smoke", "--roles", "paper")
    said = capsys.readouterr().out
    assert "has been trained on the test images" in said
    weak = next(line for line in said.splitlines() if line.startswith("| weak"))
    assert "±" not in weak  # one seed: those of disjoint roles are not among them


ROLES = dict.fromkeys(("protected", "collected", "test"), {"source": "DIR"})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"poisons": ["lps"]}, "poisons has 'lps', but accepted are none, emn"),
        ({"poisons": ["emn", "lsp"], "poison_preset": "gpu"}, "poison_preset is 'gpu', but for lsp must be one of"),
        ({"colour": 1}, "holds 'colour', but its entries are about, countermeasures, data"),
        ({"countermeasures": ["magic"]}, "'magic'"),
        ({"countermeasures": ["gray", "gray"]}, "countermeasures has two columns 'gray'"),
        ({"countermeasures": [{"use": "gray", "num_rounds": 2}]}, "'gray' with num_rounds, but only a countermeasure"),
        ({"countermeasures": [{"use": "jcdp", "rounds": 2}]}, "'jcdp' with rounds, but only a countermeasure"),
        ({"protocol": "quick"}, "protocol is 'quick', but must be one of"),
        ({"data": "mnist"}, "data is 'mnist', but must be 'digits' or have protected, collected, test"),
        ({"victims": ["resnet19"]}, "'resnet19'"),
        ({"training": {"steps": 5}}, "training has 'steps', which is no field of TrainingConfig"),
        ({"poisons": "lsp"}, "poisons 'lsp', but its type must be list"),
        ({"seeds": 3}, "seeds 3, but its type must be list"),
        ({"recipe": {"epochs": "zero"}}, "recipe has epochs 'zero', but its type must be int"),
        ({"recipe": {"learning_rate": True}}, "recipe has learning_rate True, but its type must be float"),
        ({"recipe": ["epochs"]}, "recipe ['epochs'], but its type must be dict"),
        ({"training": {"max_train_steps": "many"}}, "training has max_train_steps 'many', but its type must be int"),
        ({"width": "wide"}, "width 'wide', but its type must be int or nothing"),
        ({"data": dict.fromkeys(("protected", "collected", "test"), "DIR")}, "data has for protected 'DIR', but must"),
        (
            {"data": dict.fromkeys(("protected", "collected", "test"), {"source": "DIR", "count": "all"})},
            "data has for protected first 0 and count 'all', but both must be whole numbers",
        ),
        (
            {"data": dict.fromkeys(("protected", "collected", "test"), {"source": "DIR", "colour": 1})},
            "data for protected has 'colour', which is no field of load_images",
        ),
        (
            {"data": dict.fromkeys(("protected", "collected", "test"), {"source": "DIR", "image_size": "big"})},
            "data for protected has image_size 'big', but its type must be int or nothing",
        ),
        ({"data": dict.fromkeys(("protected", "collected", "test"), {"source": ["DIR"]})}, "data has for protected {"),
        ({"poisons": [["lsp"]]}, "poisons has ['lsp'], but accepted are none, emn"),
        ({"countermeasures": [5]}, "countermeasures has 5, but a column needs use"),
        ({"countermeasures": [{"use": ["jcdp"]}]}, "countermeasures has {'use': ['jcdp']}, but a column needs use"),
        ({"countermeasures": [{"use": "jcdp", "as": ["x"]}]}, "names and as are strings"),
        ({"countermeasures": [{"use": "jcdp", 3: 4}]}, "names and as are strings"),
        ({"recipe": {"milestones": ["a"]}}, "recipe has milestones ('a',), but its entries must be whole numbers"),
        ({"training": {"trained_timesteps": [0, "b"]}}, "trained_timesteps (0, 'b'), but its entries must be whole"),
        ({"purifier": "/no/such"}, "purifier is '/no/such'"),
        ({"countermeasures": ["jcdp"], "protocol": "fast"}, "perceptual is None"),
        (
            {"countermeasures": ["orthogonal-projection+fast-autoaugment"]},
            "fast-autoaugment before orthogonal-projection",
        ),
        ({"seeds": []}, "seeds is [], but must be a list"),
        ({"seeds": [0, 0]}, "seeds is [0, 0], but each must be there once"),
        ({"seeds": [2**70]}, "seed is 1180591620717411303424, but must be a whole number in [0, 2**32)"),
        ({"seeds": [True]}, "seeds has True, but its entries must be whole numbers"),
        ({"seeds": ["a"]}, "seeds has 'a', but its entries must be whole numbers"),
        ({"recipe": {"epoch": 1}}, "recipe has 'epoch', which is no field of Recipe"),
        ({"recipe": {"label_smoothing": 0.1}}, "recipe has 'label_smoothing', which is no field of Recipe"),
        ({"recipe": {"max_steps_per_epoch": 0}}, "max_steps_per_epoch is 0, but must be at least 1"),
        ({"countermeasures": ["unconditional+unconditional"]}, "must have unconditional once at most"),
        ({"data": ROLES | {"channels": 1}}, "data has 'channels', but its entries are name, protected, collected"),
        ({"data": ROLES | {"test": {"source": "DIR", "name": "x"}}}, "data for test has 'name', which is no field of"),
        ({"about": {"draws": 4}}, "about has 'draws', but must not have what records say themselves"),
        ({"about": {"noise_corner": 0.1}}, "about has 'noise_corner', but must not have"),
        ({"roles": "mine"}, "roles is 'mine', but must be one of disjoint, paper"),
        ({"unet": "huge"}, "unet is 'huge', but must be one of"),
        ({"purifier": "here", "unet": "mini64"}, "unet is 'mini64', but must not be given with a purifier"),
        ({"purifier": "here", "perceptual": "alex"}, "perceptual is 'alex', but must not be given with a purifier"),
        ({"about": {"dataset": "mine"}}, "about has 'dataset', but must not have what records say themselves"),
        ({"perceptual": "nowhere"}, "perceptual is 'nowhere', but must be one of alex, vgg, squeeze, a folder"),
        ({"countermeasures": [{"as": "x"}]}, "a column needs use, a countermeasure's name"),
        ({"countermeasures": [{"use": "gray", "draws": 2}]}, "'gray' with draws 2, but draws must be"),
        ({"countermeasures": [{"use": "jcdp", "collected": 0}]}, "'jcdp' with collected 0, but collected must be"),
        ({"countermeasures": [{"use": "unconditional", "collected": 9999}]}, "collected 9999, but 60 images are"),
        (
            {"countermeasures": [{"use": "jcdp", "collected": 9}], "purifier": "some/where"},
            "with collected 9, but purifier names a trained one",
        ),
        ({"countermeasures": [{"use": "jcdp", "diffusion_steps": "x"}]}, "diffusion_steps is 'x', but must be"),
    ],
)
def test_a_grid_that_cannot_be_measured_ends_in_one_sentence(source, tmp_path, monkeypatch, changes, sentence):
    path = grid_file(tmp_path, source, **changes)
    with pytest.raises(SystemExit) as stop:
        run(benchmark, monkeypatch, path, "--output", tmp_path / "out", "--processes", 1, "--device", "cpu")
    assert str(stop.value).startswith("benchmark: ") and sentence in str(stop.value)


def test_a_grid_is_one_mapping_whose_keys_are_there_once(source, tmp_path):
    path = grid_file(tmp_path, source)
    whole = path.read_text()
    path.write_text(whole + "seeds: [3]\n")
    line = len(whole.splitlines()) + 1
    with pytest.raises(ValueError, match=f"grid '.*' is no YAML: line {line} has 'seeds' again, but .* once"):
        benchmark.read_grid(path)
    path.write_text("- name: tiny\n")
    with pytest.raises(ValueError, match="grid '.*' lacks 'countermeasures', but its entries are about,"):
        benchmark.read_grid(path)
    path.write_text(whole + "1: 2\n")
    with pytest.raises(ValueError, match="grid '.*' holds 1, but its entries are about,"):
        benchmark.read_grid(path)


def test_weights_that_victims_cannot_start_from_are_refused_before_anything_is_made(source, tmp_path):
    def refused(sentence, start):
        columns = ["none", {"use": "none", "as": "started", "init_from": str(start)}]
        grid = benchmark.read_grid(grid_file(tmp_path, source, countermeasures=columns))
        with pytest.raises(ValueError, match=sentence):
            benchmark.run_grid(grid, tmp_path / "out", say=lambda line: None)
        assert not (tmp_path / "out/poisons").exists()

    refused("init_from is '.*weights.safetensors', which is no file", tmp_path / "weights.safetensors")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    refused("init_from is '.*', which has no bn1.bias, but must have", tmp_path / "weights.safetensors")


def test_a_smoke_run_leaves_aside_what_takes_long(source, tmp_path, monkeypatch):
    """The grids that ship name networks, steps and numbers of images, and are tried with --protocol smoke."""
    monkeypatch.setattr(benchmark, "SMOKE_IMAGES", 40)
    changes = {
        "countermeasures": [
            {"use": "unconditional", "as": "few", "collected": 50},
            {"use": "none", "as": "pretrained", "init_from": "collected"},
        ],
        "unet": "mini32",
        "training": {"max_train_steps": 5000},
        "pretraining": {"epochs": 700},
        "seeds": [0],
        "poisons": ["none"],
    }
    grid = benchmark.read_grid(grid_file(tmp_path, source, **changes))
    lines = []
    few, pretrained = benchmark.run_grid(grid, tmp_path / "out", say=lines.append)
    assert any(line == "Training a purifier on 40 images: tiny32, 5 steps" for line in lines)
    assert pretrained.pretraining["recipe"]["epochs"] == 2
    whole = benchmark.read_grid(grid_file(tmp_path, source, **changes), protocol="mini")
    plan = benchmark._planned(few.train, whole, torch.device("cpu"))
    assert (plan.unet, plan.training.max_train_steps) == ("mini32", 5000)
    assert whole.pretraining_recipe.epochs == 700


def test_roles_of_a_grid_are_checked(source, tmp_path):
    data = yaml.safe_load(grid_file(tmp_path, source).read_text())["data"]
    data["collected"]["first"] = 119
    grid = benchmark.read_grid(grid_file(tmp_path, source, data=data))
    with pytest.raises(ValueError, match="protected and collected have 1 ids in common"):
        benchmark.run_grid(grid, tmp_path / "out", say=lambda line: None)
    data["collected"] |= {"first": 120, "count": 1000}
    with pytest.raises(ValueError, match="data has for collected the rows 120 to 1120.*180"):
        benchmark.run_grid(benchmark.read_grid(grid_file(tmp_path, source, data=data)), tmp_path / "out")


def test_a_purifier_of_another_size_is_refused(source, tmp_path):
    pipe = quick_pipe()
    pipe.unet.register_to_config(sample_size=16)
    pipe.save_pretrained(tmp_path / "purifier")
    grid = benchmark.read_grid(grid_file(tmp_path, source, purifier=str(tmp_path / "purifier")))
    with pytest.raises(ValueError, match="purifier was trained on 16x16 pixels.*8x8"):
        benchmark.run_grid(grid, tmp_path / "out", say=lambda line: None)


@pytest.mark.long  # tests/test_engines.py has the same of plain tasks
def test_ranks_of_a_launcher_share_the_trials_and_one_trains_the_purifier(source, tmp_path, monkeypatch, capsys):
    """Were they a group, the one that trains would wait for the other for ever."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    grid = grid_file(tmp_path, source, seeds=[0])
    asked = [*launcher, benchmark.__file__, str(grid), "--output", str(tmp_path / "out"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Training a purifier on") <= 1 and done.stdout.count("6 trials on record") == 1
    records = [r for r in read_records(tmp_path / "out/records.jsonl") if r["what"] == "accuracy"]
    assert len(records) == len({record["settings"]["trial"] for record in records}) == 6
    (purifier,) = (tmp_path / "out").glob("purifier-*")
    trained = json.loads((purifier / "training_record.json").read_text())
    assert trained["processes"] == 1
    program, script, *options = shlex.split(done.stdout.partition("6 trials on record: ")[2])
    assert (program, script) == ("python", "eval/tables.py")
    run(tables, monkeypatch, *options)
    assert "Smoke run: no figure means anything" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, "--smoke"),
        ({"protocol": "mini"}, ""),
        ({"protocol": "mini", "roles": "paper", "victims": ["vit", "resnet18"]}, "--roles paper --victim vit"),
    ],
)
def test_the_command_that_shows_a_grid(tmp_path, source, changes, options):
    grid = benchmark.read_grid(grid_file(tmp_path, source, **changes))
    assert benchmark.tables_command(grid, [], "a b") == (
        f"python eval/tables.py grid --records 'a b/records.jsonl' {options}".rstrip()
    )


def test_a_purifier_is_not_believed_to_have_seen_no_test_image(source, tmp_path, monkeypatch, capsys):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    changes = {"purifier": str(tmp_path / "purifier"), "poisons": ["none"], "seeds": [0]}
    grid = benchmark.read_grid(grid_file(tmp_path, source, **changes))
    said = []
    cells = benchmark.run_grid(grid, tmp_path / "out", say=said.append)
    assert [cell.settings.get("roles") for cell in cells] == [None, None, "unknown"]
    assert any("does not list the images that trained it" in line for line in said)
    for roles, there in (("disjoint", False), ("unknown", True)):
        records = ("--records", tmp_path / "out/records.jsonl", "--smoke")
        run(tables, monkeypatch, "grid", *records, "--roles", roles)
        printed = capsys.readouterr().out
        assert ("| weak |" in printed) == there and ("Nobody knows" in printed) == there
        assert ("--roles unknown shows it" in printed) != there
    assert benchmark.tables_command(grid, cells, "out").endswith("--smoke --roles unknown")

    write_trained_on(tmp_path / "purifier", image_digests(load_images(source, split="train").images[120:]))
    cells = benchmark.run_grid(grid, tmp_path / "out", say=said.append)
    assert cells[-1].settings["roles"] == "disjoint"
    write_trained_on(tmp_path / "purifier", image_digests(load_images(source, split="test").images[:4]))
    with pytest.raises(ValueError, match="was trained on 4 of the 90 test images, the first 'digit-180'"):
        benchmark.run_grid(grid, tmp_path / "out", say=said.append)


def test_columns_that_the_purifier_cannot_serve_stop_the_grid_before_its_first_cell(source, tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    PurificationConfig(diffusion_steps=50, trained_timesteps=(0, 50)).save_pretrained(tmp_path / "purifier")
    columns = ["none", {"use": "unconditional", "as": "deep", "diffusion_steps": 60}]
    changes = {"purifier": str(tmp_path / "purifier"), "countermeasures": columns, "protocol": "fast"}
    grid = benchmark.read_grid(grid_file(tmp_path, source, **changes))
    with pytest.raises(ValueError, match="diffusion_steps is 60"):
        benchmark.run_grid(grid, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out/records.jsonl").exists()


def test_collected_images_may_be_called_something_else(source, tmp_path):
    data = yaml.safe_load(grid_file(tmp_path, source).read_text())["data"]
    data["collected"]["name"] = "letters"
    changes = {"data": data, "poisons": ["none"], "countermeasures": ["none", "gray"], "seeds": [0]}
    benchmark.run_grid(benchmark.read_grid(grid_file(tmp_path, source, **changes)), tmp_path / "out", say=len)
    records = read_records(tmp_path / "out/records.jsonl")
    assert {record["settings"]["collected"] for record in records} == {"letters"}
    data["collected"]["name"] = "figures"  # no cell uses them: nothing is measured again
    changes["name"] = "another name"
    benchmark.run_grid(benchmark.read_grid(grid_file(tmp_path, source, **changes)), tmp_path / "out", say=len)
    assert len(read_records(tmp_path / "out/records.jsonl")) == len(records)


def test_the_grids_that_ship_can_be_read():
    folder = benchmark.Path(benchmark.__file__).with_name("grids")
    grids = [benchmark.read_grid(path) for path in sorted(folder.glob("*.yaml"))]
    assert {grid.name for grid in grids} >= {"digits", "strength", "cifar10-mini"}
    assert all(grid.columns() for grid in grids)
    # On machines of any kind: imitated bfloat16 would take days.
    assert {grid.training.get("mixed_precision", "no") for grid in grids} <= {"no", "auto"}


def name_of(column: str | dict) -> str:
    return column if isinstance(column, str) else column.get("as", column["use"])


@functools.cache
def blank_images(count: int) -> LabelledImages:
    pixels = np.zeros((count, 1, 1, 3), np.uint8)
    return LabelledImages(pixels, np.zeros(count, int), tuple(map(str, range(count))))


def test_a_column_with_fewer_evaluations_purifies_as_the_command_does(source, tmp_path):
    column = {"use": "gdmp", "num_inference_steps": 9}
    columns = [column, column | {"as": "large", "variance_type": "fixed_large"}]
    grid = benchmark.read_grid(grid_file(tmp_path, source, protocol="mini", countermeasures=columns))
    small, large = (column.purification for column in grid.columns().values())
    assert PurificationConfig.resolve(small) == PurificationConfig.resolve("gdmp", num_inference_steps=9)
    assert PurificationConfig.resolve(large).variance_type == "fixed_large"


def test_no_grid_that_ships_would_measure_again_what_is_on_record(monkeypatch):
    """With the images and purifiers that the records name, the grids give the very trials that are on record."""
    root = Path(benchmark.__file__).parents[1]
    grids = [(path, benchmark.read_grid(path)) for path in sorted((root / "eval/grids").glob("*.yaml"))]
    # Of a poison's, a victim's or a recipe's variants; eval/README.md says so.
    variants = {"cifar10-mini-remn", "cifar10-mini-remn-long", "cifar10-mini-float32", "cifar10-mini-recipe"}
    found = [
        record
        for path in (root / "results").glob("*.jsonl")
        for record in read_records(path)
        if record["what"] == "accuracy" and record["settings"].get("grid", "") not in variants | {""}
    ]
    assert len(found) > 300
    for record in found:
        settings = record["settings"]
        assert settings.keys() <= OWN_FACTS  # these grids say nothing more about themselves
        given, test = (copy.copy(blank_images(settings[role]["images"])) for role in ("train", "test"))
        probe = None if "probe" not in settings else copy.copy(given)
        described = {id(given): settings["train"], id(test): settings["test"], id(probe): settings.get("probe")}
        collected = copy.copy(blank_images(min(len(given), 1000)))
        start, paired = settings.get("init_from", {}).get("pretraining", {}).get("collected"), settings.get("pairs")
        pairs = {}
        if paired is not None:
            two = Pairs(*(copy.copy(given) for _ in range(2)))
            described |= {id(two.protected): paired["protected"], id(two.originals): paired["originals"]}
            pairs[settings["poison"], settings["collected_count"]] = two
        # What a victim is pretrained on is a copy, without labels.
        monkeypatch.setattr(trials, "describe_images", lambda data: described.get(id(data), start))
        monkeypatch.setattr(trials, "purifier_digest", lambda purifier: settings.get("purifier"))
        monkeypatch.setattr(trials, "noise_corner", lambda purifier: settings.get("noise_corner", 0.0))
        poison = {name: value for name, value in settings.items() if name.startswith("poison_")}
        names = set()
        for path, grid in grids:
            same = (grid.name, grid.method) == (settings["grid"], settings.get("method", "supervised"))
            if same and settings["poison"] in grid.poisons and settings["column"] in grid.columns():
                column = [entry for entry in grid.countermeasures if name_of(entry) == settings["column"]]
                changes = {"protocol": record["protocol"], "seeds": [record["seed"]], "countermeasures": column}
                grid = dataclasses.replace(grid, **changes)
                if (
                    record["protocol"] == "fast"
                ):  # a search of batch size and learning rate, which eval/README.md names
                    searched = {name: settings["recipe"][name] for name in ("batch_size", "learning_rate")}
                    grid = dataclasses.replace(grid, recipe=grid.recipe | searched)
                protected = {settings["poison"]: (given, poison)}
                purifiers = dict.fromkeys(grid.columns(), "purifier")
                told = grid.data["name"], protected, test, purifiers, settings.get("roles"), Path("prepared")
                names |= {one.name for one in benchmark.grid_trials(grid, *told, probe, collected, pairs=pairs)}
        assert settings["trial"] in names, (settings["grid"], settings["poison"], settings["column"])
