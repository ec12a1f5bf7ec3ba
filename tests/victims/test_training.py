"""The loop: any objective, hooks, and trainings that are killed and go on."""

import dataclasses
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from digits import QUICK, digits, weights

from jcdp_diffusers.victims import Recipe, train_victim
from jcdp_diffusers.victims.training import Objective, train


class Mean(Objective):
    """Learns the mean of all images, without labels; a buffer follows it by a moving average."""

    def __init__(self, size):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(size))
        self.register_buffer("follower", torch.zeros(size))
        self.steps = 0

    def loss(self, images, labels, generator):
        assert labels is None
        return (images - self.mean).square().sum(dim=(1, 2, 3)).mean() / 2

    def after_step(self):
        self.steps += 1
        self.follower.lerp_(self.mean.detach(), 0.5)


def test_any_objective_is_learned():
    """Gradient descent on a quadratic: mean_k = (1 - 0.9^k) times the images' mean."""
    images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    recipe = Recipe("mean", 5, batch_size=10, learning_rate=0.1, schedule="steps", momentum=0, weight_decay=0)
    objective = Mean((1, 4, 4))
    history = train(objective, images, None, recipe=recipe)
    expected, follower = [(1 - 0.9**k) * images.mean(0) for k in range(6)], torch.zeros(1, 4, 4)
    for mean in expected[1:]:
        follower = (follower + mean) / 2
    torch.testing.assert_close(objective.mean.detach(), expected[5])
    torch.testing.assert_close(objective.follower, follower)
    losses = [(images - mean).square().sum(dim=(1, 2, 3)).mean().item() / 2 for mean in expected[:5]]
    assert [entry["train_loss"] for entry in history] == pytest.approx(losses)
    assert objective.steps == 5 and not objective.training


def test_the_history_has_what_evaluate_returns():
    seen = []
    history = train(
        Mean((1, 2, 2)),
        torch.rand(8, 1, 2, 2),
        None,
        recipe=dataclasses.replace(QUICK, epochs=2),
        evaluate=lambda epoch: {"knn": epoch / 2},
        progress=seen.append,
    )
    assert seen == history and [entry["knn"] for entry in history] == [0.5, 1.0]
    assert list(history[0]) == ["epoch", "learning_rate", "train_loss", "knn", "seconds"]


# ---------------------------------------------------------------------------------------------------------- checkpoints

CONFIGURATIONS = {
    "one_cycle": (QUICK, "resnet18"),
    "steps": (dataclasses.replace(QUICK, schedule="steps", milestones=(1, 2)), "resnet18"),
    "cosine": (dataclasses.replace(QUICK, schedule="cosine"), "resnet18"),
    "dropout": (QUICK, "mobilenet_v2"),
}


class Noise:
    def before_forward(self, images, labels, generator):
        return images + 0.1 * torch.rand(images.shape, generator=generator), labels


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_training_that_was_cut_off_ends_with_the_same_weights(name, train, test, tmp_path):
    recipe, victim = CONFIGURATIONS[name]
    options = {"victim": victim, "recipe": dataclasses.replace(recipe, epochs=3), "seed": 1, "hooks": [Noise()]}
    whole = train_victim(train, test, **options)

    def cut_off(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_victim(train, test, **options, checkpoint_dir=tmp_path, progress=cut_off)
    seen = []
    rest = train_victim(train, test, **options, checkpoint_dir=tmp_path, progress=seen.append)
    assert [entry["epoch"] for entry in seen] == [3]
    for result in (rest, train_victim(train, test, **options, checkpoint_dir=tmp_path)):
        assert torch.equal(weights(result.model), weights(whole.model))
        assert result.confusion.tolist() == whole.confusion.tolist()
        for name in ("accuracy", "best_accuracy", "train_accuracy"):
            assert getattr(result, name) == getattr(whole, name)
        for ours, theirs in zip(result.history, whole.history, strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert sorted(entry["seconds"] for entry in rest.history) == [entry["seconds"] for entry in rest.history]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from digits import QUICK, digits
from jcdp_diffusers.victims import train_victim

def kill(entry):
    os.kill(os.getpid(), signal.SIGKILL)

train_victim(digits(0, 100), digits(100, 200), recipe=QUICK, seed=3, checkpoint_dir=sys.argv[1], progress=kill)
"""


@pytest.mark.long
def test_a_process_that_was_killed_is_continued_by_another(train, test, result, tmp_path):
    threads = torch.get_num_threads()
    code = f"import torch; torch.set_num_threads({threads})" + KILLED.format(path=sys.path)
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    seen = []
    rest = train_victim(train, test, recipe=QUICK, seed=3, checkpoint_dir=tmp_path, progress=seen.append)
    assert [entry["epoch"] for entry in seen] == [2]
    assert torch.equal(weights(rest.model), weights(result.model))


@pytest.fixture(scope="module")
def checkpoint(train, test, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    train_victim(train, test, recipe=QUICK, checkpoint_dir=folder)
    return folder


@pytest.mark.parametrize(
    "what, changes",
    [
        ("seed", {"seed": 1}),
        ("recipe", {"recipe": dataclasses.replace(QUICK, epochs=3)}),
        ("hooks", {"hooks": [Noise()]}),
        ("images", {"train": digits(1, 101)}),
        ("initial weights", {"width": 2}),
    ],
)
def test_a_folder_with_another_training_is_refused(checkpoint, train, test, what, changes):
    options = {"train": train, "test": test, "recipe": QUICK, "checkpoint_dir": checkpoint} | changes
    with pytest.raises(ValueError, match=f"checkpoint_dir is '{checkpoint}'.*another {what}"):
        train_victim(**options)


@pytest.mark.parametrize("keep", [0, 7, 100, 10_000])
def test_a_damaged_checkpoint_is_refused(checkpoint, train, test, tmp_path, keep):
    (source,) = checkpoint.iterdir()
    (tmp_path / source.name).write_bytes(source.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"checkpoint_dir is '{tmp_path}'.*training.safetensors"):
        train_victim(train, test, recipe=QUICK, checkpoint_dir=tmp_path)


def test_a_pickle_is_not_opened(checkpoint, train, test, tmp_path):
    class Planted:
        def __reduce__(self):
            return (shutil.rmtree, (str(checkpoint),))

    torch.save({"training": Planted()}, tmp_path / "training.safetensors")
    with pytest.raises(ValueError, match="training.safetensors"):
        train_victim(train, test, recipe=QUICK, checkpoint_dir=tmp_path)
    assert checkpoint.exists()
