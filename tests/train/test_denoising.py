import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_unet

from jcdp_diffusers.train.denoising import (
    denoising_grid,
    denoising_target,
    held_out_losses,
    min_snr_weights,
    random_generator,
    sample_grid,
    sample_timesteps,
)


IMAGES = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("sampling", ["uniform", "antithetic", "stratified"])
def test_each_timestep_is_equally_likely(sampling):
    draws = [sample_timesteps(sampling, 9, 20, 30, random_generator(seed)) for seed in range(2000)]
    counts = torch.cat(draws).bincount(minlength=30)
    assert counts[:20].sum() == 0 and len(counts) == 30
    # A count is binomial (18,000 draws, 1/10) for independent draws and spreads less or little more for the others.
    assert (counts[20:] - 1800).abs().max() < 5 * 1800**0.5


def test_antithetic_timesteps_mirror_each_other():
    timesteps = sample_timesteps("antithetic", 8, 20, 30, random_generator(0))
    assert torch.equal(timesteps[:4] + timesteps[4:], torch.full((4,), 49))
    assert len(sample_timesteps("antithetic", 7, 0, 10, random_generator(0))) == 7


def test_stratified_timesteps_cover_the_range():
    timesteps = sample_timesteps("stratified", 10, 0, 1000, random_generator(0))
    assert torch.equal(timesteps // 100, torch.arange(10))


def test_generator_is_a_function_of_the_key():
    draw = [
        torch.rand(3, generator=random_generator(*key)).tolist() for key in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    ]
    assert draw[0] == draw[1]
    assert len({tuple(values) for values in draw}) == 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_and_min_snr_weights(prediction_type):
    """Against the definitions: v = a eps - s x, and Min-SNR-gamma's weight of x_0 brought to each target."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    t = torch.tensor([3, 400, 999])
    bar = scheduler.alphas_cumprod[t].double()
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=random_generator(0)).double()
    a, s = bar.sqrt().view(3, 1, 1, 1), (1 - bar).sqrt().view(3, 1, 1, 1)
    expected = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction_type]
    assert torch.allclose(denoising_target(scheduler, clean, noise, t), expected, atol=1e-6)
    snr = bar / (1 - bar)
    weight = snr.clamp(max=5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    assert torch.allclose(min_snr_weights(scheduler, t, 5.0).double(), weight, rtol=1e-4)


@pytest.mark.parametrize(("prediction_type", "weight"), [("epsilon", 1), ("v_prediction", 0), ("sample", 0)])
def test_weights_where_nothing_of_the_image_is_left(prediction_type, weight):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    assert min_snr_weights(scheduler, torch.tensor([999]), 5.0).tolist() == [weight]


def test_a_short_schedule_has_a_grid_of_samples_too():
    shape = (2, 3, 32, 32)
    assert sample_grid(tiny_unet(), DDPMScheduler(num_train_timesteps=4), shape).shape == (32, 64, 3)


def test_held_out_losses_of_a_network_that_says_zero_are_the_noise():
    unet = tiny_unet(size=8)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    losses = held_out_losses(unet, DDPMScheduler(), IMAGES, timesteps=(0, 100))
    expected = torch.cat(
        [
            torch.randn(count, 3, 8, 8, generator=random_generator(0, "validation", start)).square().mean((1, 2, 3))
            for start, count in ((0, 64), (64, 64), (128, 22))
        ]
    )
    assert torch.allclose(losses, expected, atol=1e-6)


def test_held_out_losses_are_those_of_coloured_noise_if_that_is_trained():
    """A network that says zero is as wrong as its target is large: white noise 1, coloured as much as its spectrum."""
    unet = tiny_unet(size=8)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    loss = held_out_losses(unet, DDPMScheduler(), IMAGES, timesteps=(0, 50), noise_corner=3.0).mean().item()
    down, across = np.fft.fftfreq(8) * 8, np.fft.fftfreq(8) * 8
    power = 1 + 9 / np.maximum(1, down[:, None] ** 2 + across**2)
    assert loss == pytest.approx(power.mean(), rel=0.05)
    grids = [denoising_grid(unet, DDPMScheduler(), IMAGES[:4], timesteps=(0, 50), noise_corner=c) for c in (0.0, 3.0)]
    assert not np.array_equal(*grids)
    samples = [sample_grid(unet, DDPMScheduler(), (2, 3, 8, 8), noise_corner=corner) for corner in (0.0, 3.0)]
    assert not np.array_equal(*samples)


def test_held_out_losses_are_the_same_however_the_work_is_shared():
    unet = tiny_unet(size=8)
    whole = held_out_losses(unet, DDPMScheduler(), IMAGES, timesteps=(0, 100))
    parts = [
        held_out_losses(unet, DDPMScheduler(), IMAGES, timesteps=(0, 100), chunks=slice(r, None, 2)) for r in (0, 1)
    ]
    assert torch.equal(torch.cat([parts[0][:64], parts[1], parts[0][64:]]), whole)
    assert len(held_out_losses(unet, DDPMScheduler(), IMAGES[:3], timesteps=(0, 100), chunks=slice(1, None, 2))) == 0


def test_grids():
    unet, scheduler = tiny_unet(size=8), DDPMScheduler(prediction_type="sample")
    grid = denoising_grid(unet, scheduler, IMAGES[:4], timesteps=(0, 2))
    assert grid.shape == (7 * 8, 4 * 8, 3) and grid.dtype == np.uint8
    assert np.array_equal(grid[:8], np.concatenate(list(IMAGES[:4]), axis=1))
    samples = sample_grid(tiny_unet(channels=1, size=8), scheduler, (3, 1, 8, 8))
    assert samples.shape == (8, 24, 3) and samples.dtype == np.uint8
