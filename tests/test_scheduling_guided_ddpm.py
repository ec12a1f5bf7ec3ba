import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from jcdp_diffusers import GuidedDDPMScheduler


RESPACED = list(range(0, 1000, 50))[::-1]
SCHEDULES = {
    "stride 1": (range(1000), [999, 500, 1, 0]),
    "respaced": (RESPACED, [RESPACED[0], RESPACED[5], RESPACED[-1]]),
}


def pair(schedule, **config):
    """The parent and ours with the same timesteps."""
    schedulers = DDPMScheduler(**config), GuidedDDPMScheduler(**config)
    if schedule == "respaced":
        for scheduler in schedulers:
            scheduler.set_timesteps(timesteps=RESPACED)
    return schedulers


def tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_small_log"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_keywords_the_step_is_bit_equal_to_the_parents(schedule, prediction_type, variance_type):
    parent, ours = pair(schedule, variance_type=variance_type, prediction_type=prediction_type)
    output, sample = tensors(2)
    for t in SCHEDULES[schedule][1]:
        expected = parent.step(output, t, sample, generator=torch.Generator().manual_seed(7))
        actual = ours.step(output, t, sample, generator=torch.Generator().manual_seed(7))
        assert torch.equal(actual.prev_sample, expected.prev_sample)
        assert torch.equal(actual.pred_original_sample, expected.pred_original_sample)


@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_given_noise_equals_the_parents_own_draw(schedule, prediction_type, variance_type, thresholding):
    """Against diffusers' own step, with its tables in float64: in float32 they have four digits where beta is small."""
    config = dict(variance_type=variance_type, prediction_type=prediction_type, thresholding=thresholding)
    parent, ours = pair(schedule, **config)
    parent.alphas = 1 - parent.betas.double()
    parent.alphas_cumprod = parent.alphas.cumprod(0)
    output, sample = tensors(2)
    for t in SCHEDULES[schedule][1]:
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
        expected = parent.step(output, t, sample, generator=torch.Generator().manual_seed(7))
        actual = ours.step(output, t, sample, variance_noise=noise)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=2e-6)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=0, atol=2e-6)


def closed_form(t, previous, model_output, sample, gradient, noise, large):
    """Equations (7) and (15) of Ho et al. in float64 from the betas alone, with the mean moved by sigma^2 gradient."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = [math.prod(1 - b for b in betas[: i + 1]) for i in range(1000)]
    bar_t, bar_p = bar[t], bar[previous] if previous >= 0 else 1.0
    alpha = bar_t / bar_p
    original = (sample.double() - math.sqrt(1 - bar_t) * model_output.double()) / math.sqrt(bar_t)
    original = original.clamp(-1, 1)
    mean = math.sqrt(bar_p) * (1 - alpha) / (1 - bar_t) * original
    mean += math.sqrt(alpha) * (1 - bar_p) / (1 - bar_t) * sample.double()
    variance = 1 - alpha if large else max((1 - bar_p) / (1 - bar_t) * (1 - alpha), 1e-20)
    return mean + variance * gradient.double() + (math.sqrt(variance) * noise.double() if t > 0 else 0)


@pytest.mark.parametrize("given_noise", [True, False])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gradient_moves_the_mean_by_the_variance(schedule, large, given_noise):
    _, ours = pair(schedule, variance_type="fixed_large" if large else "fixed_small")
    output, sample, gradient = tensors(3)
    steps = list(SCHEDULES[schedule][0])
    for t in SCHEDULES[schedule][1]:
        previous = max((s for s in steps if s < t), default=-1)
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
        how = {"variance_noise": noise} if given_noise else {"generator": torch.Generator().manual_seed(7)}
        actual = ours.step(output, t, sample, gradient=gradient, **how).prev_sample
        expected = closed_form(t, previous, output, sample, gradient, noise, large)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_levels_are_those_of_the_parent_and_more_exact(beta_schedule, rescaled):
    scheduler = GuidedDDPMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=rescaled)
    torch.testing.assert_close(torch.tensor(scheduler.alpha_bars), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    exact = 1.0
    for beta, bar in zip(scheduler.betas[:20].tolist(), scheduler.alpha_bars):
        exact *= 1 - beta
        assert 1 - bar == pytest.approx(1 - exact, rel=1e-9)


def test_tuple_output_is_the_same_as_the_dataclass():
    output, sample, gradient, noise = tensors(4)
    scheduler = GuidedDDPMScheduler()
    given = dict(gradient=gradient, variance_noise=noise)
    step = scheduler.step(output, 10, sample, **given)
    pair = scheduler.step(output, 10, sample, return_dict=False, **given)
    assert torch.equal(pair[0], step.prev_sample) and torch.equal(pair[1], step.pred_original_sample)


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large_log", "learned", "learned_range"])
def test_variance_types_that_are_no_variances_are_refused(variance_type):
    output, sample, gradient = tensors(3)
    message = f"variance_type is '{variance_type}', but must be 'fixed_small' or 'fixed_large'"
    for given in ({"gradient": gradient}, {"variance_noise": gradient}):
        with pytest.raises(ValueError, match=message):
            GuidedDDPMScheduler(variance_type=variance_type).step(output, 10, sample, **given)


def test_a_third_of_a_chain_of_arguments_cannot_be_mistaken_for_a_gradient():
    output, sample = tensors(2)
    with pytest.raises(TypeError):
        GuidedDDPMScheduler().step(output, 10, sample, None, True, sample)


def test_configuration_round_trips_with_other_schedulers(tmp_path):
    config = dict(variance_type="fixed_large", beta_end=0.015, clip_sample=False)
    GuidedDDPMScheduler(**config).save_pretrained(tmp_path)
    for cls in (GuidedDDPMScheduler, DDPMScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert {name: loaded.config[name] for name in config} == config
    assert GuidedDDPMScheduler.from_config(DDIMScheduler(beta_end=0.015).config).config.beta_end == 0.015


def test_an_unknown_prediction_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="prediction_type is 'foo'.*'epsilon'.*'v_prediction'.*'sample'"):
        GuidedDDPMScheduler(prediction_type="foo", variance_type="fixed_small").step(x, 5, x, variance_noise=x)
