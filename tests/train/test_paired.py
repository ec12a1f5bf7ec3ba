"""The way back from a protection, learned on pairs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from interrupts import cut_off_at_save
from purifying import some_images

from jcdp_diffusers import saved_state
from jcdp_diffusers.train.paired import PairedSettings, loss_of, read_facts, restore, train_paired


TINY = PairedSettings(unet="tiny32", epochs=3, batch_size=16, learning_rate=1e-3, bfloat16=False)


@pytest.fixture(scope="module")
def originals():
    return some_images(40)


def striped(data):
    """What a tool makes of images: one column of three is darker."""
    images = data.images.astype(int)
    images[:, :, ::3] -= 24
    return data.with_images(images.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def protected(originals):
    return striped(originals)


@pytest.fixture(scope="module")
def whole(originals, protected, tmp_path_factory):
    """What a training leaves that nothing cuts off."""
    folder = tmp_path_factory.mktemp("whole") / "paired"
    train_paired(protected, originals, folder, TINY)
    return folder


class Constant(torch.nn.Module):
    """Predicts the same everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images, timestep):
        return type("Output", (), {"sample": torch.full_like(images, self.value)})


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_loss_is_the_power_that_is_left_in_units_of_the_perturbation(value, originals, protected):
    after, before = (
        torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 127.5 - 1 for data in (protected, originals)
    )
    scale = float((after - before).square().mean().sqrt())
    total = 0.0
    for one, other in zip(after.flatten().tolist(), before.flatten().tolist()):
        total += ((one - other) / scale - value) ** 2
    assert loss_of(Constant(value), after, before, scale).item() == pytest.approx(total / after.numel(), rel=1e-4)
    if value == 0:
        assert total / after.numel() == pytest.approx(1, rel=1e-4)  # nothing is explained, so all is left


def test_learns_the_way_back_on_images_that_it_has_not_seen(originals, protected, tmp_path):
    settings = dataclasses.replace(TINY, epochs=12, learning_rate=5e-3)
    train_paired(protected, originals, tmp_path / "paired", settings)
    facts = read_facts(tmp_path / "paired")
    assert facts["losses"][-1] < 0.5 < facts["losses"][0]
    change = protected.images.astype(float) - originals.images
    assert facts["scale"] == pytest.approx(np.sqrt(np.mean(change**2)) / 127.5)
    others = some_images(20, seed=1)
    after = striped(others)
    restored = restore(after, tmp_path / "paired", bfloat16=False)
    error = lambda data: np.square(data.images.astype(float) - others.images).mean()
    assert error(restored) < 0.6 * error(after) and restored.ids == others.ids


def test_is_a_repository_that_plain_diffusers_opens(protected, whole):
    unet = UNet2DModel.from_pretrained(whole).eval()
    scale = json.loads((whole / "paired.json").read_text())["scale"]
    images = torch.from_numpy(protected.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = (images - scale * unet(images, 0).sample + 1) * 127.5
    restored = restore(protected, whole, bfloat16=False).images
    assert np.abs(expected.clamp(0, 255).permute(0, 2, 3, 1).numpy() - restored).max() <= 0.51
    assert "the protection tool and its seed are public" in (whole / "README.md").read_text()
    assert sorted(path.name for path in whole.parent.iterdir()) == ["paired"]


def weights(folder):
    return UNet2DModel.from_pretrained(folder).state_dict()


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_training_that_was_cut_off_twice_ends_as_if_it_had_not_been(originals, protected, whole, tmp_path):
    for _ in range(2):
        with cut_off_at_save(saved_state.SavedState):
            train_paired(protected, originals, tmp_path / "cut", TINY)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="checkpoint_dir is .*another run"):
        train_paired(protected, striped(protected), tmp_path / "cut", TINY)
    train_paired(protected, originals, tmp_path / "cut", TINY)
    assert same(weights(tmp_path / "cut"), weights(whole))
    assert read_facts(tmp_path / "cut")["losses"] == read_facts(whole)["losses"]
    assert not (tmp_path / "cut.pt").exists()


def test_seeds_and_pairs_decide_the_weights_and_a_finished_training_is_left_alone(
    originals, protected, whole, tmp_path
):
    state = torch.get_rng_state()
    for name, seed in (("one", 0), ("other", 1)):
        train_paired(protected, originals, tmp_path / name, TINY, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(tmp_path / "one"), weights(whole))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))
    before = (tmp_path / "one/paired.json").stat().st_mtime_ns
    train_paired(protected, originals, tmp_path / "one", TINY)
    assert (tmp_path / "one/paired.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="folder is .*same pairs"):
        train_paired(striped(protected), originals, tmp_path / "one", TINY)


def test_what_it_cannot_be_trained_on(originals, protected, tmp_path):
    with pytest.raises(ValueError, match="protected has the images of originals"):
        train_paired(originals, originals, tmp_path / "none", TINY)
    odd = (data.with_images(data.images[:, :6]) for data in (protected, originals))
    with pytest.raises(ValueError, match="pairs has images of 6x8 pixels, .* multiples of 4"):
        train_paired(*odd, tmp_path / "none", TINY)
    with pytest.raises(FloatingPointError, match="learning_rate is 1e[+]30"):
        train_paired(protected, originals, tmp_path / "none", dataclasses.replace(TINY, learning_rate=1e30))
