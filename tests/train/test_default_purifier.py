"""Which purifier is trained where none is given."""

import numpy as np
import pytest
import torch

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.perceptual import LPIPSModel
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.default_purifier import plan_for, purifier_to_be, train_planned


def grey(count: int) -> LabelledImages:
    images = np.full((count, 16, 16, 3), 128, np.uint8)
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
