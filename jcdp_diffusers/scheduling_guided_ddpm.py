"""DDPM's reverse step with a shifted mean: the one idea that JCDP adds to diffusers' scheduler."""

import functools
import inspect

import torch

# `SchedulerMixin` is unused here, but diffusers looks the base class up in the module of a saved scheduler and
# refuses to load a folder whose scheduler module does not have that name.
from diffusers import DDPMScheduler, SchedulerMixin  # noqa: F401
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class GuidedDDPMScheduler(DDPMScheduler):
    """
    [`~diffusers.DDPMScheduler`] whose reverse step takes a gradient to follow and the noise to add.

    The step draws from N(mu + sigma_t^2 * gradient, sigma_t^2), which is Algorithm 1 of *Unlearnable Examples Give a
    False Sense of Security* (ACM MM 2023) with gradient = d1 + d2, and classifier guidance (Dhariwal and Nichol,
    2021) in general. There is no new configuration key, so the two classes read each other's `scheduler_config.json`.
    """

    @functools.cached_property
    def alpha_bars(self) -> list[float]:
        """alpha_bar by timestep, in float64: in the parent's float32, 1 - alpha_bar_0 has four digits."""
        return (1 - self.betas.double()).cumprod(0).tolist()

    def adds_noise(self, timestep: int) -> bool:
        """Whether the step from t adds noise: not the last one of a run, which gives x_0."""
        return self.previous_timestep(timestep) >= 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        gradient: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Go from x_t to x_{t-1}, or to the next timestep that was set.

        Without `gradient` and `variance_noise` it is `DDPMScheduler.step`, bit for bit. With either, coefficients are
        taken from `alpha_bars`, and the last step of a run adds no noise.

        Args:
            model_output (`torch.Tensor`): The network's prediction at x_t, shape (B, C, H, W).
            timestep (`int`): t, counted from 0.
            sample (`torch.Tensor`): x_t, shape (B, C, H, W), in [-1, 1] plus noise.
            generator (`torch.Generator` or a list, *optional*): Draws the noise if none is given.
            return_dict (`bool`, defaults to `True`): A `DDPMSchedulerOutput`, or the tuple of its two fields.
            gradient (`torch.Tensor`, *optional*): Ascent direction of a log-likelihood at x_t, same shape as `sample`,
                times the noise's covariance where that is not the identity (`noise.times_covariance`). The mean moves
                by sigma_t^2 times it, after x_0 was clipped, so x_{t-1} may leave [-1, 1].
            variance_noise (`torch.Tensor`, *optional*): Noise to add instead of drawing it, as the network was trained
                on it: standard normal, or `noise.coloured`; same shape as `sample`.

        Raises:
            ValueError: If the scheduler's `variance_type` is not a variance that a mean can be shifted by.
        """
        if gradient is None and variance_noise is None:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        # The mean of q(x_{t-1} | x_t, x_0) at the predicted x_0: equations (7) and (15) of Ho et al., 2020.
        bar, bar_next = self._bars(timestep)
        alpha, variance = bar / bar_next, self._variance(bar, bar_next)
        original = self._predicted_original(model_output, bar, sample)
        previous = bar_next**0.5 * (1 - alpha) / (1 - bar) * original
        previous.add_(alpha**0.5 * (1 - bar_next) / (1 - bar) * sample)
        if self.adds_noise(timestep):
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            previous.add_(variance**0.5 * variance_noise)
        if gradient is not None:
            previous.add_(variance * gradient)
        output = DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=original)
        return output if return_dict else (previous, original)

    def predicted_original(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """
        x_0 as the network predicts it, clipped as the configuration says.

        Args:
            model_output, timestep, sample: As for `step`.
        """
        return self._predicted_original(model_output, self.alpha_bars[timestep], sample)

    def output_for(self, original: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """
        What the network would have to predict at x_t for this x_0: the inverse of `predicted_original`, without clips.

        A guide that knows a better x_0 so acts in every sampler, whatever its stride and its variance.

        Args:
            original (`torch.Tensor`): x_0, shape (B, C, H, W).
            timestep, sample: As for `step`.
        """
        bar = self.alpha_bars[timestep]
        if self.config.prediction_type == "epsilon":
            return (sample - bar**0.5 * original).div_((1 - bar) ** 0.5)
        if self.config.prediction_type == "v_prediction":
            return (bar**0.5 * sample - original).div_((1 - bar) ** 0.5)
        return original

    def _bars(self, timestep: int) -> tuple[float, float]:
        """alpha_bar at t and at the timestep that this run goes to next, 1 at its end."""
        following = int(self.previous_timestep(timestep))
        return self.alpha_bars[timestep], self.alpha_bars[following] if following >= 0 else 1.0

    def _variance(self, bar: float, bar_next: float) -> float:
        """sigma_t^2: beta of the stride, or the posterior's variance."""
        beta = 1 - bar / bar_next
        if self.config.variance_type == "fixed_large":
            return beta
        if self.config.variance_type == "fixed_small":
            return beta * (1 - bar_next) / (1 - bar)
        raise ValueError(
            f"variance_type is {self.config.variance_type!r}, but must be 'fixed_small' or 'fixed_large' in guided "
            "steps: the others are logarithms, standard deviations or network outputs."
        )

    def _predicted_original(self, model_output: torch.Tensor, bar: float, sample: torch.Tensor) -> torch.Tensor:
        """x_0 by the network's prediction, clipped as the configuration says."""
        if self.config.prediction_type == "epsilon":
            original = (sample - (1 - bar) ** 0.5 * model_output).div_(bar**0.5)
        elif self.config.prediction_type == "v_prediction":
            original = bar**0.5 * sample - (1 - bar) ** 0.5 * model_output
        elif self.config.prediction_type == "sample":
            original = model_output
        else:
            raise ValueError(
                f"prediction_type is {self.config.prediction_type!r}, but must be 'epsilon', 'v_prediction' or "
                "'sample'."
            )
        if self.config.thresholding:
            return self._threshold_sample(original)
        if self.config.clip_sample:
            return original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return original


def guided(scheduler) -> GuidedDDPMScheduler:
    """
    The scheduler of a DDPM, or another one over the same noise schedule, as one that can be guided.

    diffusers counts as such those that can take each other's place: DDIM's, PNDM's, DPM-Solver's and others.
    """
    names = {kind.name for kind in KarrasDiffusionSchedulers}
    if type(scheduler).__name__ not in names or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}, but must have the noise schedule of a DDPM, as a "
            "DDPMScheduler or a DDIMScheduler has."
        )
    known = inspect.signature(DDPMScheduler.__init__).parameters
    settings = {name: value for name, value in settings_of(scheduler).items() if name in known and value is not None}
    return GuidedDDPMScheduler.from_config(settings)


def settings_of(scheduler: DDPMScheduler) -> dict:
    """
    A scheduler's configuration without diffusers' own entries.

    One of those lists the values that were left at their defaults, positional arguments among them by mistake, and
    `from_config` resets what it lists: `DDPMScheduler(50)` would come back with 1,000 timesteps.
    """
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
