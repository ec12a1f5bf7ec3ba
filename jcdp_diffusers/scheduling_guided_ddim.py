"""DDIM's deterministic reverse step with a shifted mean: fewer evaluations from the same diffused image."""

import torch

# As in scheduling_guided_ddpm: diffusers looks the base class up in the module of a saved scheduler.
from diffusers import SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from .scheduling_guided_ddpm import GuidedDDPMScheduler


class GuidedDDIMScheduler(GuidedDDPMScheduler):
    """
    Deterministic DDIM (Song et al., 2021, equation 12 with sigma = 0) at any timesteps, with a gradient to follow.

    There is no sigma_t^2 here by which a mean could be shifted. What a guide means is a tilted density, so its
    gradient (times the noise's covariance, where that is not the identity) adds to the score: the network's noise
    becomes eps - sqrt(1 - alpha_bar_t) * gradient (Dhariwal and Nichol, 2021, algorithm 2). As DDIM's step is linear
    in x_0 and eps, that moves x_s by

        sqrt(1 - alpha_bar_t) * (sqrt(alpha_bar_s / alpha_bar_t) * sqrt(1 - alpha_bar_t) - sqrt(1 - alpha_bar_s))

    times the gradient, which for small strides is half of what the stochastic step with variance beta_t adds, as in
    the probability flow. As there, x_0 is clipped first, so x_s may leave [-1, 1].
    """

    def adds_noise(self, timestep: int) -> bool:
        """Never."""
        return False

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
        Go from x_t to the next timestep of this run, or to x_0 from the last.

        Args:
            model_output (`torch.Tensor`): The network's prediction at x_t, shape (B, C, H, W).
            timestep (`int`): t, counted from 0, one of the timesteps that were set.
            sample (`torch.Tensor`): x_t, shape (B, C, H, W), in [-1, 1] plus noise.
            generator, variance_noise: Not used; here so that the two schedulers can stand for each other.
            return_dict (`bool`, defaults to `True`): A `DDPMSchedulerOutput`, or the tuple of its two fields.
            gradient (`torch.Tensor`, *optional*): Ascent direction of a log-likelihood at x_t, same shape as `sample`;
                times the noise's covariance where that is not the identity (`noise.times_covariance`).
        """
        bar, bar_next = self._bars(timestep)
        original = self._predicted_original(model_output, bar, sample)
        if self.config.prediction_type == "epsilon":
            noise = model_output
        elif self.config.prediction_type == "v_prediction":
            noise = bar**0.5 * model_output + (1 - bar) ** 0.5 * sample
        else:
            noise = (sample - bar**0.5 * model_output) / (1 - bar) ** 0.5
        following = bar_next**0.5 * original + (1 - bar_next) ** 0.5 * noise
        if gradient is not None:
            shift = (1 - bar) ** 0.5 * ((bar_next / bar * (1 - bar)) ** 0.5 - (1 - bar_next) ** 0.5)
            following = following + shift * gradient
        output = DDPMSchedulerOutput(prev_sample=following, pred_original_sample=original)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)
