"""ECLIPSE: corruption in its stated amounts, and purification to the authors' noise level."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torchvision.transforms.functional import rgb_to_grayscale

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures.eclipse import Corruption


def test_share_of_grey_images(photos, generator):
    images = photos.tensor().repeat(250, 1, 1, 1)
    corrupted, _ = Corruption(noise_deviation=0.0).before_forward(images, None, generator)
    grey = (corrupted - corrupted[:, :1]).abs().amax((1, 2, 3)) == 0
    assert grey.float().mean() == pytest.approx(0.4, abs=0.04)
    assert (corrupted[~grey] - images[~grey]).abs().max() < 1e-6
    assert (corrupted[grey] - rgb_to_grayscale(images[grey], 3)).abs().max() <= 0.5 / 255 + 1e-6


def test_noise_has_its_deviation_and_is_new_each_time(generator):
    images = torch.full((20, 3, 32, 32), 0.5)
    hook = Corruption(gray_probability=0.0)
    one, other = (hook.before_forward(images, None, generator)[0] for _ in range(2))
    assert (one - images).std() == pytest.approx(0.05, rel=0.01) and (one - images).mean().abs() < 1e-3
    assert not torch.equal(one, other)


def test_result_has_eight_bits_in_range(photos, generator):
    levels = 255 * Corruption(noise_deviation=0.5).before_forward(photos.tensor(), None, generator)[0]
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert levels.min() == 0 and levels.max() == 255


def test_noise_of_the_purifier_is_the_authors():
    """Step 100 of improved diffusion's cosine schedule of 4000, against T_p steps of the linear one of 1000."""

    def cosine(t):
        return math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    def ratio(bar):
        return math.sqrt((1 - bar) / bar)

    steps = countermeasures.get("eclipse-purifier").settings["diffusion_steps"]
    ours = DDPMScheduler().alphas_cumprod[steps - 2 : steps + 1].tolist()
    gaps = [abs(ratio(bar) - ratio(cosine(100))) for bar in ours]
    assert np.argmin(gaps) == 1 and gaps[1] < 0.001  # no other number of steps is nearer
