"""A checkpoint that somebody else made: none of its code runs, and what does not fit is named."""

import json
import pickle
import re
import runpy
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from training_runs import IMAGES, train, weights

from jcdp_diffusers.train import checkpoints
from training import train_purifier as command


OURS = ("unet.safetensors", "optimizer.safetensors", "ema.safetensors", "states.json", "progress.json")
# What Accelerate reads where it resumes, under the names of its constants.
OF_ACCELERATE = (
    "optimizer.bin", "optimizer_1.bin", "scheduler.bin", "scaler.pt", "sampler.bin", "random_states_0.pkl",
    "random_states_1.pkl", "pytorch_model.bin", "pytorch_model_1.bin", "model.safetensors", "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl", "dl_state_dict.bin",
)  # fmt: skip
FIRST = dict(checkpointing_steps=2, max_train_steps=2)
AGAIN = FIRST | dict(max_train_steps=3, resume_from_checkpoint="latest")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, evidence):
        self.evidence = evidence

    def __reduce__(self):
        return (open, (str(self.evidence), "w"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "run", **FIRST)


@pytest.fixture
def checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-2"


@pytest.fixture
def evidence(tmp_path):
    """The file that an executed payload would leave."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()  # the payload works


def payloads(evidence, tmp_path):
    """A bare pickle, and one as torch.save packs it."""
    bare = pickle.dumps(Payload(evidence))
    torch.save(Payload(evidence), tmp_path / "packed")
    assert zipfile.is_zipfile(tmp_path / "packed")
    return bare, (tmp_path / "packed").read_bytes()


@pytest.mark.parametrize("name", OURS)
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(tmp_path, checkpoint, evidence, name):
    for planted in payloads(evidence, tmp_path):
        (checkpoint / name).write_bytes(planted)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged") as raised:
            train(tmp_path / "run", **AGAIN)
        assert "\n" not in str(raised.value)


def test_pickles_beside_the_files_are_not_read(tmp_path, checkpoint, evidence):
    for name in OF_ACCELERATE:
        for place in (checkpoint, checkpoint.parent):
            (place / name).write_bytes(payloads(evidence, tmp_path)[1])
    resumed = train(tmp_path / "run", **AGAIN)
    whole = train(tmp_path / "whole", max_train_steps=3)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_a_checkpoint_holds_no_pickles(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == set(OURS)
    for path in checkpoint.iterdir():
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_a_checkpoint_of_the_old_form_is_refused_before_any_work(tmp_path, checkpoint, evidence, monkeypatch):
    """Weights and progress lay as today; all other states were Accelerate's pickles."""
    for name in ("optimizer.safetensors", "ema.safetensors", "states.json"):
        (checkpoint / name).unlink()
    for name in OF_ACCELERATE:
        (checkpoint / name).write_bytes(payloads(evidence, tmp_path)[1])
    before = weights(tmp_path / "run")
    unet = tiny_unet(size=8)
    monkeypatch.setattr(unet, "forward", None)  # nothing has been trained
    with pytest.raises(ValueError, match="resume_from_checkpoint is 'checkpoint-2', .*begin anew") as raised:
        train(tmp_path / "run", unet, **AGAIN)
    assert str(raised.value).count(". ") == 0 and "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.parametrize("name", OURS)
def test_a_file_cut_short_is_named(tmp_path, checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (checkpoint / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged"):
            train(tmp_path / "run", **AGAIN)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("states.json", lambda content: content.pop("optimizer")),
        ("states.json", lambda content: content["optimizer"].append({})),
        ("states.json", lambda content: content["optimizer"][0].pop("params")),
        ("states.json", lambda content: content["ema"].update(decay="much")),
        ("states.json", lambda content: content["lr_scheduler"].update(step="now")),
        ("states.json", lambda content: content["lr_scheduler"].update(last_epoch="now")),
        ("states.json", lambda content: content["optimizer"][0].update(lr="fast")),
        ("states.json", lambda content: content["optimizer"][0]["params"].pop()),
        ("states.json", lambda content: content.update(lr_scheduler=[])),
        ("states.json", lambda content: content.update(more={})),
        ("states.json", lambda content: content["ema"].update(decay=7.0)),
        ("progress.json", lambda content: content.pop("identity")),
        ("progress.json", lambda content: content["identity"].pop("noise_corner")),
        ("progress.json", lambda content: content.update(step="2")),
        ("progress.json", lambda content: content.update(step=True)),
        ("progress.json", lambda content: content.update(history=[7])),
    ],
)
def test_entries_that_do_not_fit_are_named(tmp_path, checkpoint, name, change):
    content = json.loads((checkpoint / name).read_text())
    change(content)
    (checkpoint / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged"):
        train(tmp_path / "run", **AGAIN)


@pytest.mark.parametrize("name", OURS[:3])
def test_tensors_of_another_network_are_named(tmp_path, checkpoint, name):
    tensors = load_file(checkpoint / name)
    key = sorted(tensors)[0]
    for change in ({key: tensors[key].unsqueeze(0)}, {"more": torch.zeros(1)}):
        save_file(tensors | change, checkpoint / name)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged.*shape"):
            train(tmp_path / "run", **AGAIN)
    save_file({other: tensor for other, tensor in tensors.items() if other != key}, checkpoint / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged.*{re.escape(key)} is None"):
        train(tmp_path / "run", **AGAIN)


def test_states_come_back_in_the_memory_format_of_the_weights(tmp_path):
    """A resumed run would otherwise be slower: the optimiser's fast path needs like strides."""
    unet = tiny_unet(size=8).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.rand(1, 3, 8, 8), 1).sample.mean().backward()
    optimizer.step()
    ema = averaged(unet)
    checkpoints.save_states(tmp_path, unet, optimizer, {}, ema)
    fresh = tiny_unet(size=8, seed=1).to(memory_format=torch.channels_last)
    loaded, average = torch.optim.AdamW(fresh.parameters()), averaged(fresh)
    checkpoints.load_states(tmp_path, fresh, loaded, {}, average)
    for parameter, shadow, original in zip(fresh.parameters(), average.shadow_params, ema.shadow_params):
        state = loaded.state[parameter]
        assert parameter.stride() == state["exp_avg"].stride() == shadow.stride()
        assert torch.equal(shadow, original)
    assert any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in fresh.parameters())


def averaged(unet):
    return EMAModel(unet.parameters(), decay=0.9)


def test_the_command_says_so_in_one_sentence(tmp_path, evidence, monkeypatch):
    np.savez(tmp_path / "images.npz", images=IMAGES.images)
    arguments = ["--unet", "tiny32", "--resolution", "8", "--dataset", str(tmp_path / "images.npz"), "--cpu"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--train_batch_size", "2", "--num_validation_images", "0"]
    command.main(command.parse_args([*arguments, "--max_train_steps", "1"]))
    (tmp_path / "out" / "checkpoint-1" / "ema.safetensors").write_bytes(payloads(evidence, tmp_path)[0])
    again = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    monkeypatch.setattr(sys, "argv", ["train_purifier.py", *arguments, *again])
    with pytest.raises(SystemExit, match=r"^train_purifier: .*ema\.safetensors is damaged"):
        runpy.run_path(command.__file__, run_name="__main__")
