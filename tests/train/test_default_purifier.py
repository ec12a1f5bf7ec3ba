"""Which purifier is trained where none is given."""

import numpy as np
import pytest
import torch

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.perceptual import LPIPSModel
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.default_purifier import plan_for, purifier_to_be, shortened, train_planned, with_steps


def grey(count: int, side: int = 16) -> LabelledImages:
    images = np.full((count, side, side, 3), 128, np.uint8)
    return LabelledImages(images, None, tuple(f"grey-{row}" for row in range(count)))


def test_a_purifier_is_planned_by_size_number_and_device():
    cpu, few = torch.device("cpu"), grey(5)
    assert plan_for(few, cpu, smoke=True).training.max_train_steps < 10
    assert plan_for(few, cpu, smoke=False).unet == "tiny32"
    assert plan_for(few, torch.device("cuda"), smoke=False).unet == "ddpm-cifar10"
    assert plan_for(grey(4000), cpu, smoke=False).unet == "mini32"
    odd = few.with_images(few.images[:, :12])
    with pytest.raises(ValueError, match="collected .*12x16"):
        plan_for(odd, cpu, smoke=False)


@pytest.mark.parametrize(
    ("side", "names"),
    [
        (32, ("tiny32", "ddpm-cifar10")),
        (40, ("mini64", "small64")),
        (64, ("mini64", "small64")),
        (72, ("tiny32", "ddpm-cifar10")),  # which the deeper networks cannot halve often enough
        (128, ("mini128", "small128")),
        (256, ("mini256", "small256")),
    ],
)
def test_larger_images_get_a_network_of_their_own(side, names):
    for device, name in zip(("cpu", "cuda"), names):
        plan = plan_for(grey(2, side), torch.device(device), smoke=False)
        assert plan.unet == name
        with torch.device("meta"):
            purifier_to_be(plan, grey(2, side), None).unet(torch.zeros(1, 3, side, side), torch.tensor(3))
    with pytest.raises(ValueError, match="collected .*264x264"):
        plan_for(grey(1, 264), torch.device("cpu"), smoke=False)


def test_larger_images_are_purified_in_rounds_that_the_network_knows():
    small, large = (plan_for(grey(5, side), torch.device("cpu"), smoke=False) for side in (32, 64))
    assert small.purification.num_rounds == 1 < large.purification.num_rounds
    assert large.purification.diffusion_steps <= large.training.trained_timesteps[1]


def test_a_plan_with_fewer_steps_keeps_its_checkpoints():
    plan = with_steps(plan_for(grey(5), torch.device("cpu"), smoke=False), 100)
    assert (plan.training.max_train_steps, plan.training.checkpointing_steps) == (100, 25)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [5, 4000])
def test_no_plan_asks_a_device_for_a_type_that_it_would_imitate(monkeypatch, device, count):
    monkeypatch.setattr("jcdp_diffusers.train.config.has_bfloat16", lambda device: False)
    plan = plan_for(grey(count), torch.device(device), smoke=False)
    assert plan.training.precision_on(torch.device("cpu")) == "no"


@pytest.mark.parametrize(("side", "steps"), [(32, 500), (64, 500), (128, 222)])
def test_the_purifier_of_an_audit_is_trained_in_minutes(side, steps):
    """It sees the timesteps alone that its purification uses."""
    long = plan_for(grey(4000, 8).with_images(np.zeros((4000, side, side, 3), np.uint8)), torch.device("cpu"), False)
    short = shortened(long)
    assert short.training.max_train_steps == steps and short.unet == long.unet
    assert short.purification.evaluations_per_image * 2 == long.purification.evaluations_per_image
    assert short.purification.diffusion_steps <= short.training.trained_timesteps[1] == 50


def test_a_planned_purifier_is_trained_with_its_network_beside_it(tmp_path):
    images, network = grey(5), LPIPSModel("squeeze")
    plan = plan_for(images, torch.device("cpu"), smoke=True)
    train_planned(plan, images, tmp_path / "purifier", network)
    trained = JointConditionalPurificationPipeline.from_pretrained(tmp_path / "purifier")
    to_be = purifier_to_be(plan, images, network)
    assert trained.unet.config.sample_size == images.images.shape[1] == to_be.unet.config.sample_size
    assert trained.unet.num_parameters() == to_be.unet.num_parameters()
    assert trained.perceptual.name == to_be.perceptual.name == "lpips-squeeze"


def test_what_the_trained_purifier_cannot_do_is_known_before():
    images = grey(5)
    pipe = purifier_to_be(plan_for(images, torch.device("cpu"), smoke=True), images, None)
    with pytest.raises(ValueError, match="diffusion_steps"):
        pipe.resolve_config(PurificationConfig(diffusion_steps=500, num_inference_steps=5))
