"""The training script from outside: killed, on two processes, published; and in this process for the rest."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_unet

from jcdp_diffusers import PurificationConfig
from training import train_purifier


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train_purifier.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of photographs of several sizes, in class folders."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((16 + i % 3, 16 + i % 5), Image.Resampling.BICUBIC)
        picture.save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small DDPM repository with a schedule of its own."""
    folder = tmp_path_factory.mktemp("base")
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", variance_type="fixed_large", num_train_timesteps=100)
    DDPMPipeline(tiny_unet(size=16), scheduler).save_pretrained(folder)
    return folder


def options(photos, base, output_dir, **changes):
    values = {
        "pretrained": base,
        "dataset": photos,
        "output_dir": output_dir,
        "resolution": 16,
        "max_train_steps": 12,
        "train_batch_size": 4,
        "lr_warmup_steps": 2,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "validation_steps": 12,
        "num_validation_images": 4,
        "num_grid_images": 2,
        "logging_steps": 1,
        "resume_from_checkpoint": "latest",
    } | changes
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name}"] + ([] if value is True else [str(part) for part in np.atleast_1d(value)])
    return arguments


def run_here(*arguments):
    """The script in this process, which has imported everything already."""
    train_purifier.main(train_purifier.parse_args(list(arguments) + ["--cpu"]))


def start(*command, **environment):
    """The script in a process group of its own, so that it can be killed with all its processes."""
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    )
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_at_a_random_step(process, output_dir, rng, timeout=200):
    """SIGKILL, once a checkpoint is there, at a moment that may fall into a step or into the writing of the next one."""
    deadline = time.monotonic() + timeout
    while not list(output_dir.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.4))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def record(folder):
    return json.loads((folder / "training_record.json").read_text())


def assert_same_run(one, two):
    """Bit for bit: the averaged weights, the weights in training, and both curves."""
    for file in ("unet/diffusion_pytorch_model.safetensors", "checkpoint-40/unet.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert record(one)["history"] == record(two)["history"]
    assert record(one)["validation"] == record(two)["validation"]


# ------------------------------------------------------------------------------------------------------- killed


@pytest.fixture(autouse=True)
def one_thread():
    """As many as the processes started here have, because sums depend on their number to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, photos, base):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quick = {"max_train_steps": 40, "num_grid_images": 0}  # the long test below has grids
    run_here(*options(photos, base, whole, **quick))
    process = start(sys.executable, str(SCRIPT), "--cpu", *options(photos, base, cut, **quick))
    kill_at_a_random_step(process, cut, np.random.default_rng(0))
    assert not (cut / "model_index.json").exists()
    run_here(*options(photos, base, cut, **quick))
    assert_same_run(whole, cut)
    assert {path.name for path in cut.glob("*checkpoint-*")} == {"checkpoint-36", "checkpoint-38", "checkpoint-40"}


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_goes_on_to_the_same_weights(tmp_path, photos, base, processes):
    command = [*(TORCHRUN if processes == 2 else [sys.executable]), str(SCRIPT), "--cpu"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(*command, *options(photos, base, whole, max_train_steps=40)))
    rng = np.random.default_rng(processes)
    for _ in range(3):
        process = start(*command, *options(photos, base, cut, max_train_steps=40))
        if (cut / "checkpoint-2").exists():
            time.sleep(4)  # past the imports
        kill_at_a_random_step(process, cut, rng)
        for path in cut.glob("checkpoint-*"):
            assert (path / "progress.json").is_file()
    finish(start(*command, *options(photos, base, cut, max_train_steps=40)))
    assert_same_run(whole, cut)


# ------------------------------------------------------------------------------------------------- two processes


@pytest.mark.long
def test_two_processes_train_the_same_total_batch_to_the_same_loss(tmp_path, photos, base):
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_here(*options(photos, base, alone, train_batch_size=8))
    finish(start(*TORCHRUN, str(SCRIPT), "--cpu", *options(photos, base, both, train_batch_size=4)))
    assert record(both)["processes"] == 2 and record(both)["total_batch_size"] == 8
    for one, two in zip(record(alone)["history"], record(both)["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["learning_rate"] == one["learning_rate"]
    for one, two in zip(record(alone)["validation"], record(both)["validation"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    first, second = weights(alone), weights(both)
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)
    # A checkpoint of two processes is one of one process, too.
    (both / "checkpoint-12").rename(tmp_path / "last")
    run_here(*options(photos, base, both, train_batch_size=8))
    resumed = weights(both)
    assert all(torch.allclose(resumed[name], second[name], atol=2e-4) for name in resumed)


# ------------------------------------------------------------------------------------------------------ published


PUBLISH = """
import sys
import datasets, numpy as np, torch
from diffusers import DDPMPipeline, DiffusionPipeline
from jcdp_diffusers import JointConditionalPurificationPipeline
from training import train_purifier

folder, again, photos, *arguments = sys.argv[1:]
datasets.load_dataset("imagefolder", data_dir=photos, split="train").push_to_hub("my-photos")

train_purifier.main(train_purifier.parse_args([*arguments, "--output_dir", folder, "--dataset", photos]))
loaded = [cls.from_pretrained("tester/my-purifier") for cls in (DDPMPipeline, DiffusionPipeline)]
purifier = JointConditionalPurificationPipeline.from_pretrained("tester/my-purifier")
assert purifier.purification_config.trained_timesteps == (0, 20), purifier.purification_config
grey = np.full((2, 16, 16, 3), 0.5, np.float32)
assert purifier(grey, seed=0, output_type="np").images.shape == grey.shape
local = DDPMPipeline.from_pretrained(folder).unet.state_dict()
for pipe in [*loaded, purifier]:
    assert all(torch.equal(local[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
print("loaded by", *(type(pipe).__name__ for pipe in [*loaded, purifier]))

from_hub = ["--dataset", "tester/my-photos", "--pretrained", "tester/my-purifier", "--max_train_steps", "1"]
train_purifier.main(train_purifier.parse_args([*arguments, "--output_dir", again, *from_hub]))
"""


@pytest.mark.long
def test_from_a_folder_of_photographs_to_a_pushed_purifier_and_on_from_there(tmp_path, photos, base):
    first, second = tmp_path / "my-purifier", tmp_path / "my-second"
    changes = {"trained_timesteps": (0, 20), "push_to_hub": True, "license": "mit", "max_train_steps": 4}
    arguments = options(photos, base, first, **changes)
    for name in ("--output_dir", "--dataset"):
        place = arguments.index(name)
        del arguments[place : place + 2]
    with HubServer() as hub:
        places = [str(first), str(second), str(photos)]
        process = start(sys.executable, "-c", PUBLISH, *places, *arguments, **hub.environment(tmp_path / "cache"))
        output = finish(process)
    assert "loaded by DDPMPipeline DDPMPipeline JointConditionalPurificationPipeline" in output
    commit, other = (commit for commit in hub.commits if commit.repo.startswith("models/"))
    assert (commit.repo, other.repo) == ("models/tester/my-purifier", "models/tester/my-second")
    assert set(commit.files) == {
        "README.md",
        "model_index.json",
        "purification_config.json",
        "scheduler/scheduler_config.json",
        "training_record.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert (first / "checkpoint-4" / "optimizer.safetensors").is_file()
    card = commit.files["README.md"].decode()
    assert 'from_pretrained("tester/my-purifier")' in card and "license: mit" in card
    assert "does not generate images" in card
    published = b"".join(commit.files.values())
    assert str(tmp_path).encode() not in published and str(photos).encode() not in published
    card = other.files["README.md"].decode()
    assert "base_model: tester/my-purifier" in card and "datasets:\n- tester/my-photos" in card


# ------------------------------------------------------------------------------------------------ in this process


def test_fine_tuning_keeps_the_schedule(tmp_path, photos, base):
    run_here(*options(photos, base, tmp_path / "out", max_train_steps=1))
    kept, original = (
        json.loads((f / "scheduler/scheduler_config.json").read_text()) for f in (tmp_path / "out", base)
    )
    assert kept == original
    entry = record(tmp_path / "out")
    assert entry["base_model"] == base.name and not entry["base_model_on_hub"]
    assert entry["data"] == {
        "num_images": 36, "num_validation_images": 4, "source": "photos", "split": None, "hub_id": None,
        "resolution": 16, "crop": "random",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", lambda whole: whole[:-1]),
        ("unet/diffusion_pytorch_model.safetensors", lambda whole: whole[: len(whole) // 2]),
        ("unet/config.json", lambda whole: whole[:40]),
        ("scheduler/scheduler_config.json", lambda whole: b"\xff"),
        ("model_index.json", lambda whole: b"[]"),
        ("trained_on.json", lambda whole: b"[]"),
    ],
)
def test_a_damaged_base_is_named(tmp_path, photos, base, name, content):
    damaged = tmp_path / "base"
    shutil.copytree(base, damaged)
    whole = (damaged / name).read_bytes() if (damaged / name).exists() else b""
    (damaged / name).write_bytes(content(whole))
    with pytest.raises(ValueError, match=r"(pretrained is '.*base'|trained_on\.json is damaged)"):
        run_here(*options(photos, damaged, tmp_path / "out", max_train_steps=1))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_keeps_the_colour_of_the_noise(tmp_path, photos, base, capsys):
    coloured = tmp_path / "coloured"
    shutil.copytree(base, coloured)
    PurificationConfig(noise_corner=3.0).save_pretrained(coloured)
    few = {"max_train_steps": 1, "num_grid_images": 0}
    run_here(*options(photos, coloured, tmp_path / "kept", **few))
    run_here(*options(photos, coloured, tmp_path / "said", noise_corner=3, **few))
    run_here(*options(photos, base, tmp_path / "turned", noise_corner=8, **few))
    for name, corner in (("kept", 3.0), ("said", 3.0), ("turned", 8.0)):
        assert PurificationConfig.from_pretrained(tmp_path / name).noise_corner == corner
    with pytest.raises(ValueError, match="noise_corner is 8,.*coloured.* 3"):
        run_here(*options(photos, coloured, tmp_path / "other", noise_corner=8, **few))


def test_from_scratch_in_grey_with_held_out_images_of_their_own(tmp_path, photos):
    for seed, name in enumerate(("digits", "held-out")):
        images = np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.zeros(12, np.int64))
    arguments = ["--unet", "tiny32", "--channels", "1", "--dataset", str(tmp_path / "digits.npz"), "--resolution", "8"]
    arguments += ["--validation_dataset", str(tmp_path / "held-out.npz"), "--num_validation_images", "5"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--max_train_samples", "9"]
    arguments += ["--num_grid_images", "0"]
    run_here(*arguments)
    data = record(tmp_path / "out")["data"]
    assert (data["num_images"], data["num_validation_images"]) == (9, 5)
    assert DDPMPipeline.from_pretrained(tmp_path / "out").unet.config.in_channels == 1


@pytest.mark.parametrize("role", ["dataset", "validation_dataset"])
def test_a_purifier_is_not_trained_within_its_images(photos, base, tmp_path, role):
    folder = photos if role == "dataset" else tmp_path
    with pytest.raises(ValueError, match=f"--output_dir is .*, which lies inside that of --{role}"):
        run_here(*options(photos, base, folder / "purifier", **{role: folder}))
    assert not (folder / "purifier").exists()


def test_held_out_images_that_are_trained_on_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=images[:10])
    np.savez(tmp_path / "other.npz", images=images[7:])
    arguments = [
        "--unet",
        "tiny32",
        "--resolution",
        "8",
        "--output_dir",
        str(tmp_path / "out"),
        "--num_grid_images",
        "0",
    ]
    arguments += ["--dataset", str(tmp_path / "one.npz"), "--validation_dataset", str(tmp_path / "other.npz")]
    sentence = r"validation_dataset is .*other.npz.* 3 of 9 .*'train/0'.*'train/7'"
    with pytest.raises(ValueError, match=sentence):
        run_here(*arguments)
    # Of images that are left out of the training, none is trained on.
    run_here(*arguments, "--max_train_samples", "7", "--max_train_steps", "1", "--checkpointing_steps", "1")
    assert record(tmp_path / "out")["data"]["num_validation_images"] == 9


def test_held_out_photographs_that_are_trained_on_are_refused(tmp_path, photos, base):
    """They are not square, so that no two visits see the same pixels: the files are compared."""
    others = tmp_path / "others"
    others.mkdir()
    for number, file in enumerate(sorted(photos.rglob("*.png"))[:3]):
        shutil.copy(file, others / f"other-{number}.png")
    Image.new("RGB", (20, 16), (number, 200, 30)).save(others / "unseen.png")
    changes = {"validation_dataset": others, "max_train_steps": 1, "num_grid_images": 0}
    with pytest.raises(ValueError, match="validation_dataset is .*others', which shares 3 of 4 images with dataset"):
        run_here(*options(photos, base, tmp_path / "out", **changes))
    for copy in others.glob("other-*.png"):
        copy.unlink()
    run_here(*options(photos, base, tmp_path / "out", **changes))
    assert record(tmp_path / "out")["data"]["num_validation_images"] == 1


@pytest.mark.parametrize(("name", "size"), [("mini128", 128), ("small64", 64), ("tiny32", 32), ("ddpm-cifar10", 32)])
def test_a_named_network_is_made_for_images_of_its_own_size(name, size, monkeypatch):
    asked = []
    monkeypatch.setattr(train_purifier, "named_unet", lambda name, **options: asked.append(options["sample_size"]))
    arguments = ["--unet", name, "--dataset", "x", "--output_dir", "y"]
    train_purifier.load_model(train_purifier.parse_args(arguments))
    train_purifier.load_model(train_purifier.parse_args([*arguments, "--resolution", "96"]))
    assert asked == [size, 96]


def test_pipelines_of_another_kind_are_refused(tmp_path, photos, base):
    conditioned = shutil.copytree(base, tmp_path / "conditioned")
    index = json.loads((conditioned / "model_index.json").read_text())
    index["unet"][1] = "UNet2DConditionModel"
    (conditioned / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pretrained is .*conditioned', .* UNet2DConditionModel"):
        run_here(*options(photos, conditioned, tmp_path / "out"))
    ScoreSdeVePipeline(tiny_unet(size=16), ScoreSdeVeScheduler()).save_pretrained(tmp_path / "scores")
    with pytest.raises(ValueError, match="pretrained is .*scores', .*scheduler is a ScoreSdeVeScheduler"):
        run_here(*options(photos, tmp_path / "scores", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_base_whose_weights_come_in_a_variant_alone(tmp_path, photos):
    DDPMPipeline(tiny_unet(size=16), DDPMScheduler()).save_pretrained(tmp_path / "half", variant="fp16")
    run_here(*options(photos, tmp_path / "half", tmp_path / "out", max_train_steps=1, num_grid_images=0))
    assert record(tmp_path / "out")["base_model"] == "half"


def test_results_are_quoted_in_the_card(tmp_path, photos, base):
    line = {"what": "accuracy", "value": 0.5, "protocol": "smoke", "seed": 0, "settings": {}, "device": "cpu"}
    (tmp_path / "records.jsonl").write_text(json.dumps(line) + "\n")
    extra = {
        "max_train_steps": 1,
        "num_grid_images": 0,
        "card_results": tmp_path / "records.jsonl",
        "hub_model_id": "me/x",
    }
    run_here(*options(photos, base, tmp_path / "out", **extra))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 0.5 | smoke | 0 |" in card and 'from_pretrained("me/x")' in card


def test_unusable_images_are_left_out_when_asked(tmp_path, photos, base, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 16)).save(folder / f"{i}.png")
    cut_short = (folder / "1.png").read_bytes()[:-20]
    (folder / "1.png").write_bytes(cut_short)
    changes = {"max_train_steps": 1, "num_validation_images": 0}
    with pytest.raises(ValueError, match="image .*damaged"):
        run_here(*options(folder, base, tmp_path / "a", **changes))
    run_here(*options(folder, base, tmp_path / "b", **changes, skip_unusable_images=True))
    assert "1 of 4 images" in capsys.readouterr().err
    assert record(tmp_path / "b")["data"]["num_images"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--unet", "tiny32", "--resolution", "30"], "train_purifier: sample_size is 30,"),
        (
            ["--unet", "tiny32", "--num_validation_images", "-1"],
            "train_purifier: num_validation_images is -1,",
        ),
        (["--unet", "tiny32", "--max_train_samples", "0"], "train_purifier: max_train_samples is 0,"),
        (["--unet", "tiny32", "--lr_warmup_steps", "-1"], "train_purifier: lr_warmup_steps is -1,"),
        (["--unet", "tiny32", "--trained_timesteps", "5", "9"], r"train_purifier: trained_timesteps is \(5, 9\),"),
        (["--pretrained", "x", "--channels", "1"], "train_purifier: channels is 1, .* left out without unet"),
        (["--unet", "tiny32", "--revision", "main"], "train_purifier: revision is 'main', .* without pretrained"),
        (["--unet", "tiny32", "--validation_split", "x"], "train_purifier: validation_split is .* validation_dataset"),
        (["--unet", "tiny32", "--hub_private_repo"], "train_purifier: hub_private_repo is True, .* push_to_hub"),
        (["--pretrained", "nowhere/at/all"], "train_purifier: pretrained is 'nowhere/at/all',"),
        (["--pretrained", "nowhere"], "train_purifier: pretrained is 'nowhere',"),
        (["--pretrained", str(ROOT / "docs")], "train_purifier: pretrained is '.*docs',"),
        (["--unet", "tiny32", "--seed", "-1"], r"train_purifier: seed is -1,"),
        (
            ["--unet", "tiny32", "--dataset", "nowhere/at/all"],
            "train_purifier: source .*nowhere/at/all",
        ),
    ],
)
def test_failures_are_one_sentence(tmp_path, photos, monkeypatch, arguments, sentence):
    command = [str(SCRIPT), "--cpu", "--dataset", str(photos), "--output_dir", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert re.match(sentence, stopped.value.code) and "\n" not in stopped.value.code


def test_an_interruption_says_how_to_go_on(tmp_path, photos, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jcdp_diffusers.train.loop.train_purifier", interrupted)
    command = [str(SCRIPT), "--cpu", "--unet", "tiny32", "--dataset", str(photos), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "train_purifier: interrupted; --resume_from_checkpoint latest goes on" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--unet", "huge"], "invalid choice: 'huge'"),
        (["--unet", "tiny32", "--lr_scheduler", "sine"], "cosine_with_restarts"),
        ([], "one of the arguments --unet --pretrained is required"),
        (["--unet", "tiny32", "--pretrained", "x"], "not allowed with argument"),
    ],
)
def test_usage(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        train_purifier.parse_args(["--dataset", "x", "--output_dir", "y", *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
