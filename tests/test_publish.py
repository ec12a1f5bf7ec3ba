"""What `jcdp publish` would push, and what a Hub on loopback gives back."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import yaml
from digits import digits
from hub_server import HubServer
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from purifying import quick_pipe, some_images
from training_runs import HELD_OUT, train

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images, write_dataset
from jcdp_diffusers.hub import EVAL_RESULTS, files_of_purifier, is_replaced, push_purifier
from jcdp_diffusers.poisons.protect import protect_dataset, protect_with_file
from jcdp_diffusers.publish import dataset_files, purifier_files
from jcdp_diffusers.purify import purify_dataset, worker
from jcdp_diffusers.trials import purifier_digest


PAPER = "https://arxiv.org/abs/2305.09241"


@pytest.fixture(scope="module")
def purifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "purifier"
    train(folder, held_out=HELD_OUT)
    (folder / "notes.txt").write_text("not for the Hub")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Digits under two poisons, and others for the test."""
    folder = tmp_path_factory.mktemp("sets")
    clean = digits(0, 60)
    for method in ("lsp", "ops"):
        protect_dataset(clean, folder / method, method=method, source="digits")
    write_dataset(folder / "test", digits(60, 90), split="test")
    return folder


@pytest.fixture
def report(purifier, tmp_path):
    """As much of an audit's report as the results on the Hub are made from."""

    def write(**changes):
        rows = {"clean": (0.9, 0.8), "protected": (0.2, 0.4), "purified": (0.75, 0.85)}
        facts = {
            "rows": [
                {"row": row, "accuracy": {"mean": np.mean(values), "std": np.std(values, ddof=1), "values": values}}
                for row, values in rows.items()
            ],
            "purifier": {"digest": purifier_digest(purifier)},
            "victims": {"victim": "resnet18", "width": 16, "seeds": [0, 1], "recipe": {"name": "mini"}},
            "smoke": False,
            "data": {"division": {"stand_in": False}},
            "time": "2026-11-29T00:00:00+00:00",
        }
        path = tmp_path / "report.json"
        path.write_text(json.dumps(facts | changes))
        return path

    return write


def front(content: bytes) -> dict:
    return yaml.safe_load(content.decode().split("---\n")[1])


def test_a_purifier_comes_with_record_list_of_images_and_a_card_of_its_new_name(purifier):
    files = purifier_files(purifier, "me/purifier", license="mit")
    assert {"model_index.json", "training_record.json", "trained_on.json", "README.md"} < files.keys()
    assert "notes.txt" not in files and not any(name.startswith("checkpoint") for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("me/purifier")' in card and PAPER in card
    assert "**Intended use**" in card and "**Not to be used**" in card
    assert ModelCard(card).data.license == "mit" and front(files["README.md"])["library_name"] == "diffusers"


def test_results_of_an_audit_are_what_the_hub_defines(purifier, report):
    files = purifier_files(purifier, "me/x", report=report(), benchmark="me/protected", task="lsp")
    (entry,) = yaml.safe_load(files[".eval_results/jcdp.yaml"])
    assert entry["dataset"] == {"id": "me/protected", "task_id": "lsp"} and entry["value"] == 80.0
    assert entry["source"]["url"] == "https://huggingface.co/me/x" and entry["date"].startswith("2026-11-29")
    for fact in ("resnet18 of width 16", "recipe mini", "seeds 0, 1", "deviation 7.1", "clean 85.0, protected 30.0"):
        assert fact in entry["notes"]


@pytest.mark.parametrize(
    "changes,name",
    [
        ({"smoke": True}, "smoke"),
        ({"data": {"division": {"stand_in": True}}}, "purified ones"),
        ({"purifier": {"digest": "other"}}, "another purifier"),
        ({"rows": 3}, "rows"),
    ],
)
def test_a_report_that_says_nothing_of_this_purifier_is_refused(purifier, report, changes, name):
    with pytest.raises(ValueError, match=rf"report.*{name}"):
        purifier_files(purifier, "me/x", report=report(**changes), benchmark="me/protected", task="lsp")


def test_a_report_without_its_benchmark_is_refused(purifier, report):
    with pytest.raises(ValueError, match="benchmark None"):
        purifier_files(purifier, "me/x", report=report())


def test_a_purifier_without_record_and_card_is_refused(tmp_path):
    quick_pipe().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"source is .*training_record\.json"):
        purifier_files(tmp_path, "me/x")
    (tmp_path / "README.md").write_text("a card")
    assert purifier_files(tmp_path, "me/x")["README.md"] == tmp_path / "README.md"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda folder: folder, r"unet/diffusion_pytorch_model\*.safetensors"),
        (lambda folder: [path.rename(folder / path.name) for path in (folder / "unet").iterdir()], "unet/config.json"),
    ],
    ids=["weights as a pickle", "files of the network beside the index"],
)
def test_a_purifier_is_never_pushed_without_its_weights(change, missing, tmp_path):
    quick_pipe().save_pretrained(tmp_path, safe_serialization=False)
    change(tmp_path)
    for push in (partial(push_purifier, repo_id="me/x"), files_of_purifier):
        with pytest.raises(ValueError, match=f"which has no {missing}, but must be"):
            push(tmp_path)


def test_protected_sets_become_one_data_set_with_a_config_per_poison(sets):
    files = dataset_files([sets / "lsp", sets / "ops"], "me/protected", test=sets / "test", license="cc0-1.0")
    assert sorted(files) == [
        "README.md",
        "eval.yaml",
        "lsp/train-00000-of-00001.parquet",
        "ops/train-00000-of-00001.parquet",
        "test/test-00000-of-00001.parquet",
    ]
    benchmark = yaml.safe_load(files["eval.yaml"])
    assert benchmark["tasks"] == [{"id": name, "config": name, "split": "test"} for name in ("lsp", "ops")]
    assert benchmark["name"] and benchmark["description"] and benchmark["evaluation_framework"] == "jcdp-diffusers"
    card = files["README.md"].decode()
    for said in (PAPER, "## Intended use", "## Not to be used", "60 of 60", 'load_dataset("me/protected", "lsp"'):
        assert said in card
    data = DatasetCard(card).data
    assert data.license == "cc0-1.0" and [one["config_name"] for one in data.configs] == ["lsp", "ops"]


def test_without_test_images_there_is_no_benchmark(sets, capsys):
    words = ["publish", "dataset", "--source", str(sets / "lsp"), "--repo_id", "me/protected", "--dry_run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "--test names some" in said and "Nothing was pushed" in said
    size = (sets / "lsp/train-00000-of-00001.parquet").stat().st_size
    assert f"{size:,}  lsp/train-00000-of-00001.parquet" in said and "eval.yaml\n" not in said


def test_sets_that_do_not_go_together_are_refused(sets, tmp_path):
    with pytest.raises(ValueError, match="second one of 'lsp'"):
        dataset_files([sets / "lsp", sets / "lsp"], "me/x")
    with pytest.raises(ValueError, match="test has the image 'digits/0'"):
        dataset_files([sets / "lsp"], "me/x", test=sets / "ops")
    with pytest.raises(ValueError, match="source is .*, but must hold Parquet"):
        dataset_files([_only_card(sets / "lsp", tmp_path / "bare")], "me/x")
    with pytest.raises(ValueError, match="source is .*card of a protected data set"):
        dataset_files([tmp_path], "me/x")


def _only_card(folder, copy):
    copy.mkdir()
    shutil.copy(folder / "README.md", copy)
    return copy


def published_test(files, folder):
    """The split `test` of what would be published."""
    path = folder / "test-00000-of-00001.parquet"
    path.write_bytes(files["test/test-00000-of-00001.parquet"])
    return load_images(path, channels=1)


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def with_names(tmp_path_factory):
    """Protected digits whose classes have names."""
    folder = tmp_path_factory.mktemp("names") / "lsp"
    protect_dataset(digits(0, 60, class_names=WORDS), folder, method="lsp")
    return folder


def test_test_images_get_the_numbers_that_the_protected_images_give_to_their_classes(with_names, tmp_path):
    clean = digits(60, 90, class_names=WORDS)
    order = np.argsort(np.arange(10)[::-1])
    turned = dataclasses.replace(clean, labels=order[clean.labels], class_names=clean.class_names[::-1])
    write_dataset(tmp_path / "turned", turned, split="train")
    found = published_test(dataset_files([with_names], "me/x", test=tmp_path / "turned"), tmp_path)
    assert found.class_names == clean.class_names and np.array_equal(found.labels, clean.labels)
    assert found.ids == clean.ids and np.array_equal(found.images, clean.images)


def test_one_split_of_the_test_images_folder_is_taken_and_no_other(sets, tmp_path):
    write_dataset(tmp_path / "both", digits(90, 120), split="train")
    write_dataset(tmp_path / "both", digits(60, 90), split="test")
    with pytest.raises(ValueError, match="several splits"):
        dataset_files([sets / "lsp"], "me/x", test=tmp_path / "both")
    files = dataset_files([sets / "lsp"], "me/x", test=tmp_path / "both", test_split="test")
    assert [name for name in files if name.startswith("test/")] == ["test/test-00000-of-00001.parquet"]
    assert published_test(files, tmp_path).ids == digits(60, 90).ids


def test_test_images_from_elsewhere_need_no_ids(with_names, tmp_path):
    clean = digits(60, 90, class_names=WORDS)
    pictures = [Image.fromarray(image[..., 0]) for image in clean.images]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(WORDS))})
    (tmp_path / "hub").mkdir()
    rows = datasets.Dataset.from_dict({"img": pictures, "label": clean.labels.tolist()}, features=features)
    rows.to_parquet(tmp_path / "hub/test.parquet")
    found = published_test(dataset_files([with_names], "me/x", test=tmp_path / "hub"), tmp_path)
    assert np.array_equal(found.images, clean.images) and np.array_equal(found.labels, clean.labels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: dataclasses.replace(data, labels=None, class_names=None), "test has no labels"),
        (lambda data: data.with_images(data.images[:, ::2, ::2]), "must have one shape"),
        (lambda data: dataclasses.replace(digits(0, 30), ids=data.ids), "test has the image .*which is the protected"),
    ],
)
def test_test_images_that_do_not_suit_the_protected_ones_are_refused(change, said, sets, tmp_path):
    write_dataset(tmp_path / "test", change(digits(60, 90)))
    with pytest.raises(ValueError, match=said):
        dataset_files([sets / "lsp"], "me/x", test=tmp_path / "test")


def test_test_photographs_are_brought_to_the_size_of_the_protected_images(with_names, tmp_path, capfd):
    for row, (image, label) in enumerate(zip(digits(60, 90).images, digits(60, 90).labels)):
        path = tmp_path / "test" / WORDS[label] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).resize((32, 32 + row % 2), Image.Resampling.NEAREST).save(path)
    found = published_test(dataset_files([with_names], "me/x", test=tmp_path / "test"), tmp_path)
    assert found.images.shape == (30, 16, 16, 1)
    assert "--test: Images of assorted sizes, from 32x32 to 32x33: their centres at 16x16" in capfd.readouterr().err


def test_the_name_of_the_test_images_is_theirs_alone(sets, tmp_path):
    protect_dataset(digits(0, 60), tmp_path / "other", method="lsp", split="test")
    with pytest.raises(ValueError, match="source is .*other', whose split is called 'test'"):
        dataset_files([tmp_path / "other"], "me/x", test=sets / "test")
    noise = np.zeros((60, *digits(0, 1).tensor().shape[1:]), np.float32)
    noise[:, :, 4, 4] = np.where(digits(0, 60).tensor()[:, :, 4, 4] > 0.5, -8 / 255, 8 / 255)
    np.save(tmp_path / "test.npy", noise)
    protect_with_file(digits(0, 60), tmp_path / "file", perturbation=tmp_path / "test.npy", budget={"linf": 8})
    with pytest.raises(ValueError, match="source is .*file', whose poison is called 'test'"):
        dataset_files([tmp_path / "file"], "me/x", test=sets / "test")


def test_a_purified_set_is_published_as_it_is(tmp_path):
    purify_dataset(some_images(4), quick_pipe(), output_dir=tmp_path / "out", diffusion_steps=2, progress=False)
    files = dataset_files([tmp_path / "out"], "me/learnable")
    assert {"README.md", "run.json", "summary.json"} < files.keys() and not any(".lock" in name for name in files)
    card = (tmp_path / "out/README.md").read_text()
    assert PAPER in card and "## Intended use" in card
    with pytest.raises(ValueError, match="published alone"):
        dataset_files([tmp_path / "out"], "me/learnable", test=tmp_path)


def test_a_purification_that_is_not_finished_is_neither_loaded_nor_published(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return purify_tiles(*arguments, **options)

    purify_tiles, calls = worker.purify_tiles, []
    monkeypatch.setattr(worker, "purify_tiles", stop)
    options = {"output_dir": tmp_path / "out", "diffusion_steps": 2, "progress": False, "rows_per_shard": 2}
    source, pipe = some_images(6), quick_pipe()
    with pytest.raises(Stopped):
        purify_dataset(source, pipe, **options)
    assert list((tmp_path / "out").glob("train-*.parquet"))
    with pytest.raises(FileNotFoundError, match="this-purification-is-not-finished"):
        datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="purification is not finished"):
        dataset_files([tmp_path / "out"], "me/x")
    purify_dataset(source, pipe, **options)
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))) == 6


def test_what_an_earlier_push_has_left_is_replaced_and_the_rest_stays():
    weights = "unet/diffusion_pytorch_model.safetensors"
    others = ("model.safetensors.index.json", "model.bin", "model-00001-of-00002.safetensors", "model.bin.index.json")
    others = [f"unet/diffusion_pytorch_{name}" for name in others]
    for name in (*others, "purification_config.json", "perceptual/config.json", EVAL_RESULTS):
        assert is_replaced(name, {weights}, "model"), name
    half = [f"unet/diffusion_pytorch_model.{name}" for name in ("fp16.safetensors", "safetensors.index.fp16.json")]
    half.append("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
    for name in (
        weights,
        *half,
        "README.md",
        "training_record.json",
        "trained_on.json",
        "unet/more.txt",
        ".gitattributes",
    ):
        assert not is_replaced(name, {weights}, "model"), name
    assert [is_replaced(name, {half[0]}, "model") for name in (*half, weights)] == [False, True, True, False]
    new = {"train-00000-of-00001.parquet", "lsp/train-00000-of-00001.parquet"}
    for name in ("train-00001-of-00002.parquet", "lsp/train-00001-of-00002.parquet", "eval.yaml", "summary.json"):
        assert is_replaced(name, new, "dataset")
    for name in (
        "lsp/validation-00000-of-00001.parquet",
        "lsp/other.parquet",
    ):  # the card takes all that is in a folder
        assert is_replaced(name, new, "dataset")
    kept = ("README.md", "emn/train-00000-of-00002.parquet", "test-00000-of-00002.parquet", "more/list.json")
    for name in (*new, *kept, ".gitattributes"):
        assert not is_replaced(name, new, "dataset")


@pytest.mark.parametrize("kind,option", [("purifier", "--test"), ("dataset", "--report")])
def test_options_of_the_other_kind_are_refused(kind, option, capsys):
    assert main(["publish", kind, "--source", "x", "--repo_id", "me/x", option, "y"]) == 1
    assert f"{option} is 'y', but must be left out" in capsys.readouterr().err


FROM_THE_HUB = """
import sys
from datasets import load_dataset
from huggingface_hub import HfApi
from jcdp_diffusers import JointConditionalPurificationPipeline
from jcdp_diffusers.cli import main
from jcdp_diffusers.train.provenance import trained_on

purifier, sets, report = sys.argv[1:]
words = ["--source", sets + "/lsp", sets + "/ops", "--repo_id", "tester/protected", "--test", sets + "/test"]
assert main(["publish", "dataset", *words, "--dry_run"]) == 0
assert not HfApi().repo_exists("tester/protected", repo_type="dataset")
assert main(["publish", "dataset", *words]) == 0
results = ["--report", report, "--benchmark", "tester/protected", "--task", "lsp"]
assert main(["publish", "purifier", "--source", purifier, "--repo_id", "tester/purifier", *results]) == 0
for config in ("lsp", "ops"):
    both = load_dataset("tester/protected", config)
    assert {name: len(rows) for name, rows in both.items()} == {"train": 60, "test": 30}, both
different = [load_dataset("tester/protected", config, split="train")[0]["image"].tobytes() for config in ("lsp", "ops")]
assert different[0] != different[1]
JointConditionalPurificationPipeline.from_pretrained("tester/purifier")
assert len(trained_on("tester/purifier")) == 24
print("done")
"""


@pytest.mark.long
def test_push_and_pull(purifier, sets, report, tmp_path):
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(purifier), str(sets), str(report())],
            env=os.environ | hub.environment(tmp_path / "cache") | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert [commit.repo for commit in hub.commits] == ["datasets/tester/protected", "models/tester/purifier"]
    assert ".eval_results/jcdp.yaml" in hub.commits[1].files and "eval.yaml" in hub.commits[0].files
