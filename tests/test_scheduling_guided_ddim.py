import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from jcdp_diffusers import GuidedDDIMScheduler


def ddim(timesteps, **config):
    scheduler = GuidedDDIMScheduler(**config)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


def bars():
    """alpha_bar of DDPM's schedule in float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_without_a_gradient_it_is_diffusers_ddim(prediction_type, thresholding):
    config = dict(prediction_type=prediction_type, thresholding=thresholding)
    parent = DDIMScheduler(set_alpha_to_one=True, **config)
    parent.set_timesteps(20)
    ours = ddim(parent.timesteps.tolist(), **config)
    generator = torch.Generator().manual_seed(0)
    for t in (parent.timesteps[0], parent.timesteps[7], parent.timesteps[-1]):
        output, sample = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
        expected, actual = parent.step(output, t, sample), ours.step(output, t, sample)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=0, atol=1e-5)


def test_the_shift_is_that_of_a_changed_noise_prediction():
    """Guidance on the score, eps - sqrt(1 - alpha_bar) gradient, must not differ from the shift as long as nothing
    is clipped."""
    ours = ddim([99, 60, 30, 5], clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    output, sample, gradient = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3))
    for t in (99, 60, 5):
        changed = output - (1 - ours.alphas_cumprod[t]).sqrt() * gradient
        expected = ours.step(changed, t, sample).prev_sample
        torch.testing.assert_close(
            ours.step(output, t, sample, gradient=gradient).prev_sample, expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("evaluations", [10, 100])
def test_gaussian_data_under_a_gaussian_guide_end_at_the_tilted_gaussian(evaluations):
    """
    Data N(mean, spread^2), guide of log-likelihood -(x_0 - target)^2 / (2 width^2) seen through the diffusion: scores of
    all densities on the way are linear, and the probability flow maps quantiles to quantiles. The start is put at a
    quantile of the tilted density at t = 99, and DDIM must take it to the same quantile of the tilted density at 0.
    """
    mean, spread, target, width = 0.2, 0.3, -0.4, 0.25
    tilted_spread = 1 / math.sqrt(spread**-2 + width**-2)
    tilted_mean = tilted_spread**2 * (mean / spread**2 + target / width**2)
    bar = bars()
    timesteps = [round(100 * (1 - k / evaluations)) - 1 for k in range(evaluations)]
    ours = ddim(timesteps, clip_sample=False)

    def score(x, t, centre, deviation):
        return -(x - bar[t].sqrt() * centre) / (bar[t] * deviation**2 + 1 - bar[t])

    quantiles = torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 1, 1, 5)
    x = bar[99].sqrt() * tilted_mean + (bar[99] * tilted_spread**2 + 1 - bar[99]).sqrt() * quantiles
    for t in timesteps:
        prior = score(x, t, mean, spread)
        gradient = score(x, t, tilted_mean, tilted_spread) - prior
        x = ours.step(-(1 - bar[t]).sqrt() * prior, t, x, gradient=gradient).prev_sample.double()
    # Euler's error falls with the stride, and is that of plain DDIM, since the shift is exact.
    expected = tilted_mean + tilted_spread * quantiles
    torch.testing.assert_close(x, expected, rtol=0, atol=0.15 * tilted_spread * 10 / evaluations)


def test_small_strides_shift_by_half_of_the_stochastic_step():
    ours = ddim(list(range(999, -1, -1)))
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for t in (900, 500, 200):
        shift = ours.step(zero, t, zero, gradient=one).prev_sample.mean().item()
        assert shift == pytest.approx(ours.betas[t].item() / 2, rel=0.02)


def test_it_reads_and_writes_ddpms_configuration(tmp_path):
    DDPMScheduler(num_train_timesteps=50, clip_sample_range=2.0).save_pretrained(tmp_path)
    scheduler = GuidedDDIMScheduler.from_pretrained(tmp_path)
    assert scheduler.config.clip_sample_range == 2.0 and len(scheduler.alphas_cumprod) == 50
    scheduler.save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path).config.num_train_timesteps == 50
