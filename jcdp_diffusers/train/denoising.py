"""
What one denoising task is: which timestep, which noise, which target, which weight; and how well a network does on it.

Everything random comes from `random_generator(*key)`, so the same key gives the same noise on any number of processes.
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr

from ..noise import coloured
from .images import channels_first, normalize


TIMESTEP_SAMPLINGS = ("uniform", "antithetic", "stratified")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_VALIDATION_CHUNK = 64  # fixed, so that the noise of an image does not depend on batch size or processes


def random_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_timesteps(sampling: str, count: int, first: int, end: int, generator: torch.Generator) -> torch.Tensor:
    """
    Timesteps of a total batch, each uniform in [first, end) by itself.

    Args:
        sampling (`str`): One of `TIMESTEP_SAMPLINGS`: independent; in pairs that mirror each other in the range (as in
            the training code of DDIM); or one from each of `count` equal parts of the range.
        first, end (`int`): The range, `end` exclusive.

    Returns:
        `torch.Tensor`: int64, shape (count,).
    """
    draw = torch.rand(count, generator=generator, device=generator.device)
    if sampling == "stratified":
        draw = (torch.arange(count, device=draw.device) + draw) / count
    timesteps = first + (draw * (end - first)).long().clamp_(max=end - first - 1)
    if sampling == "antithetic":
        half = -(-count // 2)
        timesteps[half:] = first + end - 1 - timesteps[: count - half]
    return timesteps


def denoising_target(scheduler: DDPMScheduler, clean, noise, timesteps) -> torch.Tensor:
    """What the network is to predict, by the scheduler's `prediction_type`."""
    return {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, timesteps),
        "sample": lambda: clean,
    }[scheduler.config.prediction_type]()


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma weights of the loss in the network's own target (Hang et al., 2023, section 3.4); shape (B,)."""
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    of_noise = torch.where(snr > gamma, gamma / snr, 1.0)  # clipped / snr, which has no value at an SNR of 0
    return {"epsilon": of_noise, "v_prediction": clipped / (snr + 1), "sample": clipped}[
        scheduler.config.prediction_type
    ]


@torch.no_grad()
def held_out_losses(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: np.ndarray,
    *,
    timesteps: tuple[int, int],
    seed: int = 0,
    noise_corner: float = 0.0,
    chunks: slice = slice(None),
) -> torch.Tensor:
    """
    Denoising losses on images that were not trained on, with noise and timesteps that stay the same from call to call.

    Args:
        images (`np.ndarray`): uint8, shape (N, H, W, C). Each gets its own timestep, spread evenly over the range.
        timesteps (`tuple[int, int]`): First timestep and end (exclusive).
        seed (`int`, defaults to 0): Of noise and timesteps.
        noise_corner (`float`): Corner frequency of the noise, as in training (`noise.coloured`).
        chunks (`slice`): Which blocks of 64 images to compute: how several processes share the work.

    Returns:
        `torch.Tensor`: One per image: the mean squared error of the network's prediction over the image's values.
    """
    device = unet.device
    first, end = timesteps
    order = torch.randperm(len(images), generator=random_generator(seed, "validation timesteps"))
    steps = first + ((order + 0.5) / len(images) * (end - first)).long()
    losses = []
    was_training = unet.training
    unet.eval()
    for start in range(0, len(images), _VALIDATION_CHUNK)[chunks]:
        clean = normalize(channels_first(images[start : start + _VALIDATION_CHUNK]))
        noise = torch.randn(clean.shape, generator=random_generator(seed, "validation", start))
        noise = coloured(noise, noise_corner)
        t = steps[start : start + _VALIDATION_CHUNK].to(device)
        clean, noise = clean.to(device), noise.to(device)
        prediction = unet(scheduler.add_noise(clean, noise, t), t).sample.float()
        target = denoising_target(scheduler, clean, noise, t)
        losses.append(F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3)))
    unet.train(was_training)
    return torch.cat(losses) if losses else torch.zeros(0, device=device)


@torch.no_grad()
def denoising_grid(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: np.ndarray,
    *,
    timesteps: tuple[int, int],
    seed: int = 0,
    noise_corner: float = 0.0,
) -> np.ndarray:
    """
    A picture of what the network removes: images, then for three noise levels the noised ones and the predicted x_0.

    Args:
        images (`np.ndarray`): uint8, shape (N, H, W, C).
        timesteps (`tuple[int, int]`): The levels are at one, two and three thirds of this range.

    Returns:
        `np.ndarray`: uint8, shape (7 H, N W, 3).
    """
    clean = normalize(channels_first(images)).to(unet.device)
    noise = torch.randn(clean.shape, generator=random_generator(seed, "grid"))
    noise = coloured(noise, noise_corner).to(unet.device)
    rows = [clean]
    was_training = unet.training
    unet.eval()
    first, end = timesteps
    for third in (1, 2, 3):
        level = max(first, first + (end - first) * third // 3 - 1)
        t = torch.full((len(clean),), level, device=unet.device)
        noised = scheduler.add_noise(clean, noise, t)
        prediction = unet(noised, t).sample.float()
        signal = scheduler.alphas_cumprod.to(unet.device)[t].view(-1, 1, 1, 1)
        original = {
            "epsilon": lambda: (noised - (1 - signal).sqrt() * prediction) / signal.sqrt(),
            "v_prediction": lambda: signal.sqrt() * noised - (1 - signal).sqrt() * prediction,
            "sample": lambda: prediction,
        }[scheduler.config.prediction_type]()
        rows += [noised, original]
    unet.train(was_training)
    return _grid(rows)


@torch.no_grad()
def sample_grid(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    shape: tuple[int, int, int, int],
    *,
    seed: int = 0,
    noise_corner: float = 0.0,
) -> np.ndarray:
    """Images of shape (N, C, H, W), drawn from noise in 50 DDIM steps at most: uint8, shape (H, N W, 3)."""
    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(min(50, scheduler.config.num_train_timesteps))
    sample = coloured(torch.randn(shape, generator=random_generator(seed, "samples")), noise_corner)
    sample = sample.to(unet.device)
    was_training = unet.training
    unet.eval()
    for t in sampler.timesteps:
        sample = sampler.step(unet(sample, t).sample.float(), t, sample).prev_sample
    unet.train(was_training)
    return _grid([sample])


def _grid(rows: list[torch.Tensor]) -> np.ndarray:
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy().transpose(1, 2, 0)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
