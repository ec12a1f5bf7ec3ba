"""
Standard normal noise as a pure function of (seed, image id, round, step, use), and its colour.

An image's noise does not depend on its batch, its shard, the process that draws it or what was drawn before, which is
what makes a purified image reproducible alone and a killed run resumable to the same bits. The generator is
Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011), vectorised over images in torch
on any device; the normal transform is Box and Muller's.

Key and counter of one image: blake2b of its id, keyed by the seed, gives 96 bits, of which 64 are Philox's key and 32
the counter's last word; the other words hold the position within the image, the step, and round and use.

`coloured` turns white noise, from here or from a generator, into the noise that some purifiers are trained to remove.
"""

import hashlib
from numbers import Real

import torch

from .devices import check_seed


USES = ("start", "reference", "variance")  # what the noise is for; a position in this tuple is part of the counter

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
# Every image's block of values is padded to this many, so that vector instructions treat a value alike wherever its
# image lies in the batch: the tail of a vectorised loop may round differently from its body.
_BLOCK = 64


def image_keys(seed: int, ids: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Philox words of each image: the same id and seed always give the same three.

    Args:
        seed (`int`): In [0, 2^64); ValueError otherwise.
        ids (`list[str]`): One id per image; any text.

    Returns:
        `torch.Tensor`: int64 words in [0, 2^32), shape (B, 3): two of the key, one of the counter.
    """
    check_seed(seed, bits=64)
    digests = (
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=12, key=seed.to_bytes(8, "little")).digest()
        for i in ids
    )
    words = [[int.from_bytes(d[k : k + 4], "little") for k in (0, 4, 8)] for d in digests]
    return torch.tensor(words, dtype=torch.int64).reshape(-1, 3).to(device)


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    Ten rounds of Philox4x32, elementwise.

    Args:
        counter (`list[torch.Tensor]`): Four int64 tensors of 32-bit words, shapes that broadcast.
        key (`list[torch.Tensor]`): Two of the same.

    Returns:
        `list[torch.Tensor]`: Four int64 tensors of 32-bit words.
    """
    turns = torch.arange(10, device=key[0].device).view(-1, *[1] * key[0].dim())
    k0, k1 = (word + turns * step for word, step in zip(key, _WEYL))
    c0, c1, c2, c3, _, _ = torch.broadcast_tensors(*counter, *key)
    for turn in range(10):
        # A product of two 32-bit words wraps in int64 only in its sign. What stands above a word's 32 bits is removed
        # where the word is multiplied next, and not before.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0[turn]).bitwise_and_(_MASK)
        c2 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1[turn]).bitwise_and_(_MASK)
        c1, c3 = high, low
    return [c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)]


def normal_noise(
    keys: torch.Tensor, shape: tuple[int, ...], *, round_index: int, step_index: int, use: str
) -> torch.Tensor:
    """
    Standard normal noise for a batch of images.

    Args:
        keys (`torch.Tensor`): From `image_keys`, shape (B, 3); the noise is made on its device.
        shape (`tuple[int, ...]`): Of one image, (C, H, W), at most 2^33 values.
        round_index (`int`): Purification round, from 0, below 2^24.
        step_index (`int`): Position in the round's list of timesteps, from 0, below 2^32.
        use (`str`): `"start"`, `"reference"` or `"variance"`.

    Returns:
        `torch.Tensor`: float32, shape (B, *shape); the same bits for the same arguments on one kind of machine.
    """
    values = torch.Size(shape).numel()
    blocks = -(-values // (4 * _BLOCK)) * _BLOCK
    position = torch.arange(blocks, device=keys.device)
    image = keys[:, :, None]
    step, tag = (position.new_full((1,), word) for word in (step_index, USES.index(use) << 24 | round_index))
    words = philox4x32([position, step, tag, image[:, 2]], [image[:, 0], image[:, 1]])
    normals = torch.empty(len(keys), 4, blocks, device=keys.device)
    for index, (radius_bits, angle_bits) in enumerate(((words[0], words[1]), (words[2], words[3]))):
        # (bits + 1) / 2^32 lies in (0, 1], so the logarithm is finite; the largest possible value is 6.66.
        radius = radius_bits.add_(1).to(torch.float32).mul_(2**-32).log_().mul_(-2).sqrt_()
        angle = angle_bits.to(torch.float32).mul_(2 * torch.pi * 2**-32)
        torch.mul(radius, angle.cos(), out=normals[:, 2 * index])
        torch.mul(radius, angle.sin_(), out=normals[:, 2 * index + 1])
    return normals.view(len(keys), -1)[:, :values].reshape(len(keys), *shape)


def coloured(noise: torch.Tensor, corner: float) -> torch.Tensor:
    """
    White noise made stronger at low spatial frequencies: its power spectrum becomes 1 + (corner / f)^2.

    White noise of a small T_p hides what changes from pixel to pixel and hardly what is the same over many: its
    mean over a patch of 8x8 has an eighth of its deviation. A poison made of patches of one colour, as LSP's, passes
    below it. The corner frequency of 1/f noise is where, in electronics, it is as strong as white noise.

    Args:
        noise (`torch.Tensor`): Standard normal, float32, shape (B, C, H, W); each channel is filtered alone.
        corner (`float`): In cycles per image, at which the power is doubled; 0 leaves the noise as it is. The mean of
            an image, f = 0, is taken as f = 1.

    Returns:
        `torch.Tensor`: Gaussian noise of the same shape, the same linear map of each image's noise.
    """
    return noise if corner == 0 else _filtered(noise, noise_power(noise, corner).sqrt())


def times_covariance(gradient: torch.Tensor, corner: float) -> torch.Tensor:
    """
    The covariance of `coloured` noise, over that of white noise, times a vector.

    Args:
        gradient (`torch.Tensor`): The vector, shape (B, C, H, W).
        corner (`float`): As for `coloured`; at 0 the covariance is the identity.

    Returns:
        `torch.Tensor`: Same shape.
    """
    return gradient if corner == 0 else _filtered(gradient, noise_power(gradient, corner))


def checked_corner(corner: float) -> float:
    """The corner frequency as a float. ValueError unless it is a number from 0 to 1000."""
    if not isinstance(corner, Real) or isinstance(corner, bool) or not 0 <= corner <= 1000:
        raise ValueError(f"noise_corner is {corner!r}, but must be a number from 0 to 1000, in cycles per image.")
    return float(corner)


def colour_in_words(corner: float | None) -> str:
    """A clause for reports and cards, to follow others; empty for white noise, which is a DDPM's own."""
    return f", noise of corner frequency {corner:g} cycles per image" if corner else ""


def noise_power(images: torch.Tensor, corner: float) -> torch.Tensor:
    """
    The power of `coloured` noise by frequency, over that of white noise.

    Args:
        images (`torch.Tensor`): Whose size, type and device it is for, shape (..., H, W).
        corner (`float`): As for `coloured`.

    Returns:
        `torch.Tensor`: Shape (H, W // 2 + 1), at the coefficients of `torch.fft.rfft2`.
    """
    height, width = images.shape[-2:]
    down, across = (
        torch.fft.fftfreq(height, 1 / height, device=images.device),
        torch.fft.rfftfreq(width, 1 / width, device=images.device),
    )
    return 1 + corner**2 / (down[:, None].square() + across.square()).clamp(min=1)


def _filtered(images: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(images) * response, s=images.shape[-2:]).contiguous()


def content_id(image: torch.Tensor) -> str:
    """
    Id of an image by its content.

    Args:
        image (`torch.Tensor`): uint8, shape (C, H, W), on the CPU.

    Returns:
        `str`: 32 hexadecimal digits, blake2b of its shape and bytes.
    """
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
