"""Diffusion of coloured noise as a whole, where everything is Gaussian and the answer is known."""

import pytest
import torch

from jcdp_diffusers import GuidedDDIMScheduler, GuidedDDPMScheduler
from jcdp_diffusers.noise import times_covariance


CORNER = 3.0
SHAPE = (1, 1, 6, 10)


def power_of_noise():
    """1 + (corner / f)^2 at every frequency of a whole Fourier transform, f = 0 taken as 1; float64."""
    down, across = (torch.fft.fftfreq(size, 1 / size, dtype=torch.float64) for size in SHAPE[2:])
    return 1 + CORNER**2 / (down[:, None] ** 2 + across**2).clamp(min=1)


def filtered(images, response):
    return torch.fft.ifft2(torch.fft.fft2(images) * response).real


@pytest.mark.parametrize(
    ("kind", "variance_type"),
    [
        (GuidedDDPMScheduler, "fixed_small"),
        (GuidedDDPMScheduler, "fixed_large"),
        (GuidedDDIMScheduler, "fixed_small"),
    ],
)
def test_a_guide_tilts_the_images_and_not_the_noise(kind, variance_type):
    """
    Images N(0, S), noise of covariance C, the likelihood exp(g . x_0): the reverse process must end in N(S g, S).

    With the exact network, E[noise | x_t], and the exact gradient of the likelihood at x_t, every step is linear. So
    the mean of all samples is followed by leaving the noise of the steps out.
    """
    noise_power = power_of_noise()
    image_power = 0.3 / (1 + 0.2 * (noise_power - 1))  # of another shape than the noise's
    tilt = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = filtered(tilt, image_power)

    def mean_after_all_steps(corner):
        scheduler = kind(variance_type=variance_type, clip_sample=False)
        scheduler.set_timesteps(timesteps=list(range(999, -1, -1)))
        bars = scheduler.alphas_cumprod.double()
        sample = filtered(tilt, bars[999].sqrt() * image_power)
        for t in range(999, -1, -1):
            power = bars[t] * image_power + (1 - bars[t]) * noise_power
            prediction = filtered(sample, (1 - bars[t]).sqrt() * noise_power / power)
            gradient = times_covariance(filtered(tilt, bars[t].sqrt() * image_power / power), corner)
            still = torch.zeros_like(sample)
            sample = scheduler.step(prediction, t, sample, gradient=gradient, variance_noise=still).prev_sample
        return sample

    def error(corner):
        return ((mean_after_all_steps(corner) - wanted).norm() / wanted.norm()).item()

    assert error(CORNER) < 0.04  # steps are finite
    assert error(0.0) > 0.3  # the gradient as it is would pull too little where the noise is strong
