"""DDPM's reverse step with a shifted mean: the one idea that JCDP adds to diffusers' scheduler."""

import torch

# `SchedulerMixin` is unused here, but diffusers looks the base class up in the module of a saved scheduler and
# refuses to load a folder whose scheduler module does not have that name.
from diffusers import DDPMScheduler, SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput


class GuidedDDPMScheduler(DDPMScheduler):
    """
    [`~diffusers.DDPMScheduler`] whose reverse step takes a gradient to follow and the noise to add.

    The step draws from N(mu + sigma_t^2 * gradient, sigma_t^2), which is Algorithm 1 of *Unlearnable Examples Give a
    False Sense of Security* (ACM MM 2023) with gradient = d1 + d2, and classifier guidance (Dhariwal and Nichol,
    2021) in general. There is no new configuration key, so the two classes read each other's `scheduler_config.json`.
    """

    draws_noise = True  # whether a step before the last needs `variance_noise`

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
        Go from x_t to x_{t-1}; bit-equal to `DDPMScheduler.step` when neither `gradient` nor `variance_noise` is
        given.

        Args:
            model_output (`torch.Tensor`): The network's prediction at x_t, shape (B, C, H, W).
            timestep (`int`): t, counted from 0.
            sample (`torch.Tensor`): x_t, shape (B, C, H, W), in [-1, 1] plus noise.
            generator (`torch.Generator`, *optional*): Where the parent draws the noise from if none is given.
            return_dict (`bool`, defaults to `True`): A `DDPMSchedulerOutput`, or the tuple of its two fields.
            gradient (`torch.Tensor`, *optional*): Ascent direction of a log-likelihood at x_t, same shape as `sample`,
                times the noise's covariance where that is not the identity (`noise.times_covariance`). The mean moves
                by sigma_t^2 times it, after x_0 was clipped, so x_{t-1} may leave [-1, 1].
            variance_noise (`torch.Tensor`, *optional*): Noise to add instead of drawing it, as the network was trained
                on it: standard normal, or `noise.coloured`; same shape as `sample`. The last step (t = 0) adds none.

        Raises:
            ValueError: If the scheduler's `variance_type` is not a variance that a mean can be shifted by.
        """
        if gradient is None and variance_noise is None:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        if self.config.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(
                f"variance_type is {self.config.variance_type!r}, but guided steps accept only 'fixed_small' and "
                "'fixed_large', because the others are logarithms, standard deviations or network outputs."
            )
        variance = self._get_variance(timestep)
        if variance_noise is None:
            output = super().step(model_output, timestep, sample, generator=generator)
        else:
            output = self._posterior_mean(model_output, timestep, sample)
            if timestep > 0:  # as in the parent
                output.prev_sample.add_(variance.sqrt() * variance_noise)
        if gradient is not None:
            output.prev_sample.add_(variance * gradient)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def _posterior_mean(self, model_output, timestep, sample) -> DDPMSchedulerOutput:
        """Mean of q(x_{t-1} | x_t, x_0) at the predicted x_0: equations (7) and (15) of Ho et al., 2020."""
        bar, bar_previous = self._bars(timestep)
        alpha = bar / bar_previous
        original = self._predicted_original(model_output, timestep, sample)
        mean = bar_previous.sqrt() * (1 - alpha) / (1 - bar) * original
        mean.add_(alpha.sqrt() * (1 - bar_previous) / (1 - bar) * sample)
        return DDPMSchedulerOutput(prev_sample=mean, pred_original_sample=original)

    def _bars(self, timestep) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_bar at t and at the timestep that this run goes to next, 1 at its end."""
        previous = self.previous_timestep(timestep)
        return self.alphas_cumprod[timestep], self.alphas_cumprod[previous] if previous >= 0 else self.one

    def _predicted_original(self, model_output, timestep, sample) -> torch.Tensor:
        """x_0 by the network's prediction, clipped as the configuration says."""
        bar = self.alphas_cumprod[timestep]
        if self.config.prediction_type == "epsilon":
            original = (sample - (1 - bar).sqrt() * model_output).div_(bar.sqrt())
        elif self.config.prediction_type == "v_prediction":
            original = bar.sqrt() * sample - (1 - bar).sqrt() * model_output
        elif self.config.prediction_type == "sample":
            original = model_output
        else:
            raise ValueError(
                f"prediction_type is {self.config.prediction_type!r}, but must be 'epsilon', 'v_prediction' or "
                "'sample'."
            )
        if self.config.thresholding:
            original = self._threshold_sample(original)
        elif self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return original
