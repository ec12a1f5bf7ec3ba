"""
The two guides of JCDP as pure functions, per image and in float32 whatever the UNet runs in.

A guide is a distance D between x_t and the reference r_t, the protected image diffused to the same timestep. Its
contribution to the reverse step is -scale * strength(t) * grad D(x_t, r_t) (equations 18 and 20 of *Unlearnable
Examples Give a False Sense of Security*, ACM MM 2023); the scheduler multiplies it by sigma_t^2. Distances are per
image (the mean over an image's values for the pixel guide, LPIPS for the perceptual one) and never averaged over the
batch, so a scale means the same at batch 1 and at batch 500, and an image's result does not depend on its neighbours.
"""

import torch


STRENGTHS = ("constant", "noise_to_signal")


def strength(schedule: str, alpha_bar: float) -> float:
    """
    Strength of a guide over time, the factor on its scale.

    Args:
        schedule (`str`): `"constant"` (the paper: 1 at every t) or `"noise_to_signal"` (the authors' code, after GDMP:
            sqrt((1 - alpha_bar_t) / alpha_bar_t), the standard deviation of the noise in units of the signal).
        alpha_bar (`float`): Cumulative product of the alphas at t, in (0, 1].
    """
    if schedule == "constant":
        return 1.0
    if schedule == "noise_to_signal":
        return ((1 - alpha_bar) / alpha_bar) ** 0.5
    raise ValueError(f"guidance_strength is {schedule!r}, but must be one of {STRENGTHS}.")


def in_window(timestep: int, window: tuple[int, int] | None) -> bool:
    """Whether a guide with the inclusive window (first, last) of timesteps acts at t; None is always."""
    return window is None or window[0] <= timestep <= window[1]


def pixel_gradient(sample: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    Gradient of the per-image mean squared error with respect to the sample, in closed form: 2 (x - r) / (C H W).

    Args:
        sample (`torch.Tensor`): x_t, shape (B, C, H, W), any float type.
        reference (`torch.Tensor`): r_t, same shape.

    Returns:
        `torch.Tensor`: float32, shape (B, C, H, W).
    """
    return (sample.float() - reference.float()).mul_(2 / sample[0].numel())


def perceptual_gradient(sample: torch.Tensor, reference: torch.Tensor, network) -> torch.Tensor:
    """
    Gradient of a per-image perceptual distance with respect to the sample.

    The distance's own gradient has a closed form; what leads back to the sample through the trunk is automatic
    differentiation. The sum over the batch is differentiated, which gives each image the gradient of its own distance.

    Args:
        sample (`torch.Tensor`): x_t in the network's input range [-1, 1] plus noise, shape (B, C, H, W).
        reference (`torch.Tensor`): r_t, same shape.
        network (`LPIPSModel`): Frozen, in float32.

    Returns:
        `torch.Tensor`: float32, shape (B, C, H, W).

    Raises:
        RuntimeError: Inside `torch.inference_mode()`, which forbids gradients; use `torch.no_grad()`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "perceptual guidance needs gradients, which torch.inference_mode() forbids: use torch.no_grad()."
        )
    with torch.no_grad():
        target = network.features(reference.float(), rearranged=True)
    with torch.enable_grad():
        leaf = sample.detach().float().requires_grad_(True)
        maps = network.maps(leaf, rearranged=True)
    with torch.no_grad():
        slopes = network.slopes(maps, target)
    return torch.autograd.grad(maps, leaf, slopes)[0]


def earlier_chain_noise(
    noise: torch.Tensor, alpha_bar: float, earlier_alpha_bar: float, fresh: torch.Tensor
) -> torch.Tensor:
    """
    Noise of the same forward chain at an earlier step, drawn backwards.

    The chain is x_t = sqrt(alpha_bar_t) x_0 + n_t. Given n_t, the step s < t has the law of the forward posterior
    q(x_s | x_t, x_0) (equation 7 of Ho et al., 2020), of which x_0's part is already accounted for. So a reference can
    follow the chain that made x_Tp (Algorithm 1) without T_p tensors being kept, and steps can be left out exactly.

    Args:
        noise (`torch.Tensor`): n_t, of variance 1 - alpha_bar_t.
        alpha_bar (`float`): alpha_bar_t.
        earlier_alpha_bar (`float`): alpha_bar_s, larger than `alpha_bar`.
        fresh (`torch.Tensor`): Standard normal noise, same shape.

    Returns:
        `torch.Tensor`: n_s, of variance 1 - alpha_bar_s.
    """
    alpha = alpha_bar / earlier_alpha_bar
    share = (1 - earlier_alpha_bar) / (1 - alpha_bar)
    return noise * (alpha**0.5 * share) + fresh * ((1 - alpha) * share) ** 0.5
