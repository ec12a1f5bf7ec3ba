"""
What the numbers of a published file mean: every reading is compared with the clean images.

A file of poisoned images may hold them from 0 to 255, in [0, 1], shifted, or as a network sees them (minus means, over
standard deviations), with the colours in RGB or BGR, as they are or mirrored. Which of these it is shows when each is
compared with the clean images: after the best scale and shift per channel for the arrangement, without any for the
scale. The best reading is taken; what is nearly as good as another is refused.
"""

from dataclasses import dataclass

import numpy as np
import torch


# Poisoned images are taken for what they are when they resemble the clean ones at least this much: the correlation
# over the whole set. Images in another order come near 0; even CUDA, the strongest change, leaves more.
RESEMBLANCE = 0.4
# Arrays that resemble the clean images this much are images, whatever their scale.
_SURELY_IMAGES = 0.9
_ROWS = 2048  # of a file, to find its arrangement by
_LEVEL = 1 / 255
_FLAT = 0.1  # standard deviation of an image whose noise may hide what it shows

_ARRANGEMENTS = {
    "as they are": (),
    "in BGR order": (1,),
    "mirrored": (3,),
    "mirrored and in BGR order": (1, 3),
    "upside down": (2,),
    "turned by 180 degrees": (2, 3),
}
# Means and standard deviations as the usual recipes have them; images = values * deviation + mean.
_PLAIN = {
    "in [0, 1]": (0.0, 1.0),
    "0 to 255": (0.0, _LEVEL),
    "in [-0.5, 0.5]": (0.5, 1.0),
    "in [-1, 1]": (0.5, 0.5),
}
_NORMALISED = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10 (means of images' deviations)": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "MNIST": ((0.1307,), (0.3081,)),
}


@dataclass
class Reading:
    """
    Args:
        words (`str`): What the numbers are.
        images (`torch.Tensor`): float32 (N, C, H, W) in [0, 1].
        distance (`float`): Root mean square difference to the clean images.
    """

    words: str
    images: torch.Tensor
    distance: float


def as_poisoned_images(values: torch.Tensor, clean: torch.Tensor, name: str) -> Reading | None:
    """
    The numbers as poisoned images, or None if they are none of these clean images.

    Args:
        values, clean (`torch.Tensor`): float32 (N, C, H, W), the clean ones in [0, 1].
        name (`str`): Of the file, for sentences.

    Raises:
        ValueError: If they are the clean images in an arrangement or a scale that has to be undone first, or if two
            readings fit equally well.
    """
    rows = torch.linspace(0, len(values) - 1, min(_ROWS, len(values))).long()
    part, clean_part = values[rows], clean[rows]
    likenesses = {how: likeness(part.flip(axes) if axes else part, clean_part) for how, axes in _ARRANGEMENTS.items()}
    best = max(likenesses, key=likenesses.get)
    if likenesses[best] <= RESEMBLANCE:
        return None
    readings = _readings(values, clean)
    if not readings and likenesses[best] <= _SURELY_IMAGES:
        return None
    if best != "as they are":
        unlike, unlike_best = 1 - likenesses["as they are"] ** 2, 1 - likenesses[best] ** 2
        if unlike > unlike_best * 1.001:
            raise ValueError(
                f"perturbation is {name!r}, which resembles the clean images most when it is read {best} "
                f"({likenesses[best]:.3f} against {likenesses['as they are']:.3f}), but images as the clean ones are "
                "arranged are accepted."
            )
    if not readings:
        raise ValueError(
            f"perturbation is {name!r}, which holds images like the clean ones, but in no known scale; images in "
            f"{', '.join(_PLAIN)} or normalised for {', '.join(_NORMALISED)} are accepted."
        )
    first, *others = sorted(readings, key=lambda reading: reading.distance)
    for other in others:
        apart = float((first.images - other.images).square().mean().sqrt())
        if other.distance < 1.05 * first.distance and apart > _LEVEL / 2:
            raise ValueError(
                f"perturbation is {name!r}, which may hold images {first.words} or {other.words}, at distances of "
                f"{255 * first.distance:.2f} and {255 * other.distance:.2f} levels; images in [0, 1] leave no doubt."
            )
    fitted = _fitted_distance(part, clean_part)
    if "normalised" in first.words and first.distance > 2 * fitted + _LEVEL:
        raise ValueError(
            f"perturbation is {name!r}, which holds images like the clean ones, but normalised by unknown means and "
            "deviations; images in [0, 1] leave no doubt."
        )
    return first


def row_in_another_place(values: torch.Tensor, clean: torch.Tensor) -> tuple[int, int] | None:
    """A row that resembles the clean image of another row, and that row; None if most resemble none so much."""
    rows = torch.linspace(0, len(values) - 1, min(32, len(values))).long()
    own, all_clean = _unit(values[rows]), _unit(clean)
    alike = own @ all_clean.T
    best, where = alike.max(dim=1)
    if float(best.median()) < _SURELY_IMAGES:
        return None
    elsewhere = (where != rows).nonzero().flatten()
    return (int(rows[elsewhere[0]]), int(where[elsewhere[0]])) if len(elsewhere) else None


def row_unlike_its_image(values: torch.Tensor, clean: torch.Tensor) -> int | None:
    """The first row of poisoned images that does not resemble its clean image, where that is not nearly flat."""
    alike = (_unit(values) * _unit(clean)).sum(dim=1)
    unlike = (alike <= RESEMBLANCE) & (clean.flatten(1).std(dim=1) > _FLAT)
    return int(unlike.nonzero()[0]) if unlike.any() else None


def points_outwards(noise: torch.Tensor, clean: np.ndarray) -> tuple[int, float]:
    """
    How noise behaves at pixels that are black or white already.

    Noise that was made for an image never makes them darker or lighter, because the poisoned image was clipped; noise
    of another image does at half of them.

    Args:
        noise (`torch.Tensor`): float (N, C, H, W), for images in [0, 1].
        clean (`numpy.ndarray`): uint8 (N, H, W, C).

    Returns:
        `tuple`: How many values of noise lie there, and which share of them points outwards.
    """
    count = outwards = 0
    for start in range(0, len(clean), 1024):
        part = noise[start : start + 1024].numpy().transpose(0, 2, 3, 1)
        images = clean[start : start + 1024]
        dark, light = part[images == 0], part[images == 255]
        count += int((np.abs(dark) > _LEVEL / 2).sum() + (np.abs(light) > _LEVEL / 2).sum())
        outwards += int((dark < -_LEVEL / 2).sum() + (light > _LEVEL / 2).sum())
    return count, outwards / max(count, 1)


def _readings(values: torch.Tensor, clean: torch.Tensor) -> list[Reading]:
    """All known scales in which the numbers are images that use most of their range."""
    channels = values.shape[1]
    scales = {words: ((mean,) * channels, (deviation,) * channels) for words, (mean, deviation) in _PLAIN.items()}
    scales |= {f"normalised for {name}": scale for name, scale in _NORMALISED.items() if len(scale[0]) == channels}
    lowest, highest = values.amin(dim=(0, 2, 3)), values.amax(dim=(0, 2, 3))
    readings = []
    for words, scale in scales.items():
        mean, deviation = (torch.tensor(part) for part in scale)
        low, high = float((lowest * deviation + mean).min()), float((highest * deviation + mean).max())
        # A set of natural images uses most of its range; a perturbation of that size could be seen in any image.
        if low >= -0.01 and high <= 1.01 and high - low > 0.5:
            images = values * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
            readings.append(Reading(words, images, float((images - clean).square().mean().sqrt())))
    return readings


def likeness(values: torch.Tensor, clean: torch.Tensor) -> float:
    """Correlation with the clean images after the best scale and shift of each channel, none of them turned round."""
    values, clean = _centred(values), _centred(clean)
    shared = (values * clean).sum(dim=1).clamp(min=0)
    explained = (shared.square() / values.square().sum(dim=1).clamp(min=1e-12)).sum()
    return float((explained / clean.square().sum().clamp(min=1e-12)).sqrt())


def _fitted_distance(values: torch.Tensor, clean: torch.Tensor) -> float:
    """Root mean square difference that the best scale and shift of each channel leave."""
    values, clean = _centred(values), _centred(clean)
    slope = (values * clean).sum(dim=1, keepdim=True) / values.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    return float((slope * values - clean).square().mean().sqrt())


def _centred(images: torch.Tensor) -> torch.Tensor:
    """Values by channel, (C, N H W), with mean 0."""
    by_channel = images.transpose(0, 1).flatten(1)
    return by_channel - by_channel.mean(dim=1, keepdim=True)


def _unit(images: torch.Tensor) -> torch.Tensor:
    flat = images.flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
