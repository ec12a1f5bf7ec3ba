"""
The guides as pure functions, per image: the two of JCDP, in float32 whatever the UNet runs in, and one by a spectrum.

A guide is a distance D between x_t and the reference r_t, the protected image diffused to the same timestep. Its
contribution to the reverse step is -scale * strength(t) * grad D(x_t, r_t) (equations 18 and 20 of *Unlearnable
Examples Give a False Sense of Security*, ACM MM 2023); the scheduler multiplies it by sigma_t^2. Distances are per
image (the mean over an image's values for the pixel guide, LPIPS for the perceptual one) and never averaged over the
batch, so a scale means the same at batch 1 and at batch 500, and an image's result does not depend on its neighbours.

JCDP's pixel guide trusts the protected image equally at all frequencies, and so brings the protection back. Where the
protection's spectrum is known, `towards_protected` trusts it where the protection is not. `posterior_start` begins
there, too.
"""

import functools

import torch

from .spectrum import ProtectionTable, radial_bins


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


def towards_protected(
    estimate: torch.Tensor,
    protected: torch.Tensor,
    table: ProtectionTable,
    noise_power: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """
    E[x_0 | x_t, x_p]: the network's estimate of x_0, corrected by the protected image where it can be trusted.

    The protected image is x_p = x_0 + delta with delta ~ N(0, S), and x_0 given x_t is N(estimate, R), where
    R = (1/P + alpha_bar / (1 - alpha_bar))^-1 if images have the power P. So the likelihood's gradient with respect to
    x_t is d1 = J^T (S + R)^-1 (x_p - estimate), as in pseudoinverse guidance (Song et al., ICLR 2023, which takes
    P = 1), and J = sqrt(alpha_bar) / (1 - alpha_bar) R. The score plus d1 is that of the estimate

        estimate + R (S + R)^-1 (x_p - estimate),

    which this function returns. It needs no gradient through the network. All is diagonal by colour axis and
    frequency. Where S is 0 the result is the protected image, where S is large it is the estimate. It is exact where
    images are Gaussian.

    Args:
        estimate (`torch.Tensor`): The network's x_0 at x_t, shape (B, C, H, W), in [-1, 1].
        protected (`torch.Tensor`): x_p, same shape.
        table (`ProtectionTable`): S and P.
        noise_power (`torch.Tensor`): (1 - alpha_bar) / alpha_bar times the power of the noise (`noise.noise_power`),
            shape (H, W // 2 + 1) or scalar.
        scale (`float`): Of the guide. The likelihood is raised to this power, which is to divide S by it.

    Returns:
        `torch.Tensor`: Same shape and type as `estimate`.
    """
    power, precision = _spectra(table, estimate)
    left = 1 / (precision + 1 / noise_power)
    gain = left / (power / scale + left)
    return estimate + _filtered(protected - estimate, table, gain)


def posterior_start(
    protected: torch.Tensor,
    table: ProtectionTable,
    alpha_bar: float,
    noise: torch.Tensor,
    noise_power: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """
    A draw of x_t given the protected image, where images and protection are Gaussian.

    The image given x_p is N(W x_p, V) with Wiener's filter W = P / (P + S) and V = W S. So the start has the mean
    sqrt(alpha_bar) W x_p, and its noise is larger by alpha_bar V where the protection hides the image.

    Args:
        protected (`torch.Tensor`): x_p, shape (B, C, H, W), in [-1, 1].
        table (`ProtectionTable`): S and P.
        alpha_bar (`float`): Of the timestep t.
        noise (`torch.Tensor`): Of the forward process, with its variance 1 - alpha_bar, same shape.
        noise_power, scale: As for `towards_protected`.

    Returns:
        `torch.Tensor`: x_t, same shape.
    """
    power, precision = _spectra(table, protected)
    wiener = 1 / (1 + power / scale * precision)
    larger = (1 + wiener * power / scale / noise_power).sqrt()
    return alpha_bar**0.5 * _filtered(protected, table, wiener) + _filtered(noise, table, larger)


def _spectra(table: ProtectionTable, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S and 1/P at each coefficient of `torch.fft.rfft2` by colour axis, for images in [-1, 1]; (C, H, W // 2 + 1)."""
    power, precision = _at_coefficients(table, *images.shape[-2:])
    return power.to(images), precision.to(images)


@functools.lru_cache(maxsize=8)
def _at_coefficients(table: ProtectionTable, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    bins = torch.from_numpy(radial_bins(height, width)[0][:, : width // 2 + 1])
    power, background = (
        torch.tensor(values, dtype=torch.float64)[:, bins] / 127.5**2 for values in (table.power, table.background)
    )
    # Nothing is known of an image's mean colour before it is seen.
    return power, torch.where(bins == 0, 0.0, 1 / background)


def _filtered(images: torch.Tensor, table: ProtectionTable, response: torch.Tensor) -> torch.Tensor:
    axes = torch.tensor(table.axes, dtype=images.dtype, device=images.device)
    changed = torch.fft.rfft2(_mixed(images, axes)) * response
    return _mixed(torch.fft.irfft2(changed, s=images.shape[-2:]), axes.T).contiguous()


def _mixed(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sums of channels. A matrix product would round differently with an image's place in the batch."""
    return (matrix[:, :, None, None] * images[:, None]).sum(dim=2)
