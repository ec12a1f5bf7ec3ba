"""
What the numbers of a published file mean: every reading is compared with the clean images.

A file of poisoned images may hold them from 0 to 255, in [0, 1], shifted, or as a network sees them (minus means, over
standard deviations), with the colours in any order, as they are, mirrored or turned. Which of these it is shows when
each is compared with the clean images: after the best scale and shift per channel for the arrangement, without any for
the scale. The best reading is taken; what is nearly as good as another is refused, and so is a single row that is not
like its clean image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F


# Poisoned images are taken for what they are when they resemble the clean ones at least this much: the correlation
# over the whole set. Images in another order come near 0; even CUDA, the strongest change, leaves more.
RESEMBLANCE = 0.4
# Arrays that resemble the clean images this much are images, whatever their scale.
_SURELY_IMAGES = 0.9
_ROWS = 2048  # of a file, to find its arrangement by
_FEW_ROWS = 64  # of these, to find out by whether they were bytes
_LEVEL = 1 / 255
# Single images are compared at this side, and are unlike below half of `RESEMBLANCE`: CUDA blurs what is finer, and
# leaves 0.27 of the worst of scikit-learn's digits, 0.7 of CIFAR-10's.
_SIDE_OF_ROWS, _ROW_RESEMBLANCE = 8, RESEMBLANCE / 2
_FLAT = 0.1  # standard deviation of an image whose noise may hide what it shows
# Mean distance to whole levels: on CIFAR-10 float16 leaves 0.01 and bfloat16 0.07; where any value may come out, 0.25.
_OFF_LEVELS = 0.15

_ARRANGEMENTS = {
    "as they are": lambda images: images,
    "mirrored": lambda images: images.flip(3),
    "mirrored and in BGR order": lambda images: images.flip(1, 3),
    "upside down": lambda images: images.flip(2),
    "turned by 180 degrees": lambda images: images.flip(2, 3),
    "turned to the left": lambda images: images.rot90(1, (2, 3)),
    "turned to the right": lambda images: images.rot90(-1, (2, 3)),
    "with height and width exchanged": lambda images: images.transpose(2, 3),
}
_COLOURS = {
    f"in {order} order": [order.index(colour) for colour in "RGB"] for order in ("BGR", "RBG", "GRB", "GBR", "BRG")
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
    "Tiny-ImageNet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "MNIST": ((0.1307,), (0.3081,)),
}


@dataclass
class Reading:
    """
    Args:
        words (`str`): What the numbers are.
        mean, deviation (`torch.Tensor`): (C, 1, 1); images in [0, 1] are numbers * deviation + mean.
        slope, shift (`torch.Tensor`): (C,), of the line through the images over the clean ones: 1 and 0, but for what
            a perturbation does to contrast and brightness.
        noise (`float`): Root mean square distance of the images to that line.
        misfit (`float`): Root mean square distance of that line to the clean images.
    """

    words: str
    mean: torch.Tensor
    deviation: torch.Tensor
    slope: torch.Tensor
    shift: torch.Tensor
    noise: float
    misfit: float

    def images(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers, float32 (N, C, H, W), as images."""
        return values * self.deviation + self.mean


def as_poisoned_images(values: torch.Tensor, clean: torch.Tensor, name: str) -> tuple[torch.Tensor, str] | None:
    """
    The numbers as poisoned images, or None if they are none of these clean images.

    A shift by a few pixels is not seen: it changes images no more than strong perturbations do.

    Args:
        values, clean (`torch.Tensor`): float32 (N, C, H, W), the clean ones in [0, 1].
        name (`str`): Of the file, for sentences.

    Returns:
        `tuple`: The images, float32 (N, C, H, W) in [0, 1], and in words what the numbers are.

    Raises:
        ValueError: If they are the clean images in an arrangement or a scale that has to be undone first, if two
            readings fit equally well, or if a row is not like its clean image.
    """
    rows = torch.linspace(0, len(values) - 1, min(_ROWS, len(values))).long()
    part, clean_part = values[rows], clean[rows]
    likenesses = _likenesses(part, clean_part)
    best = max(likenesses, key=likenesses.get)
    if likenesses[best] <= RESEMBLANCE:
        return None
    readings = _readings(part, clean_part, values)
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
            f"perturbation is {name!r}, which holds images like the clean ones, but in no known scale; images "
            f"{', '.join(_PLAIN)} or normalised for {', '.join(_NORMALISED)} are accepted."
        )
    reading = _best(readings, part, name)
    images = reading.images(values)
    if (row := _row_unlike_its_image(images, clean)) is not None:
        raise ValueError(
            f"perturbation is {name!r}, which holds images like the clean ones, but whose image for row {row} is not "
            "like the clean one; rows in the clean images' order are accepted."
        )
    return images, reading.words


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


def _likenesses(values: torch.Tensor, clean: torch.Tensor) -> dict[str, float]:
    """By arrangement, how much the images resemble the clean ones."""
    arranged = ((how, arrange(values)) for how, arrange in _ARRANGEMENTS.items())
    found = {how: likeness(images, clean) for how, images in arranged if images.shape == clean.shape}
    colours = _COLOURS if values.shape[1] == 3 else {}
    return found | {how: likeness(values[:, channels], clean) for how, channels in colours.items()}


def _best(readings: list[Reading], values: torch.Tensor, name: str) -> Reading:
    """The reading that fits the clean images, if there is one and no other does nearly as well."""
    fitting = [reading for reading in readings if "normalised" not in reading.words or _fits(reading, values)]
    if not fitting:
        raise ValueError(
            f"perturbation is {name!r}, which holds images like the clean ones, but normalised by unknown means and "
            "deviations; images in [0, 1] leave no doubt."
        )
    first, *others = sorted(fitting, key=lambda reading: reading.misfit)
    for other in others:
        apart = float((first.images(values) - other.images(values)).square().mean().sqrt())
        if other.misfit < 1.5 * first.misfit + _LEVEL and apart > _LEVEL / 2:
            raise ValueError(
                f"perturbation is {name!r}, which may hold images {first.words} or {other.words}, {255 * apart:.2f} "
                "levels apart; images in [0, 1] leave no doubt."
            )
    return first


def _readings(part: torch.Tensor, clean: torch.Tensor, values: torch.Tensor) -> list[Reading]:
    """All known scales in which all values are images that use most of their range; a part of them is compared."""
    channels = values.shape[1]
    scales = {words: ((mean,) * channels, (deviation,) * channels) for words, (mean, deviation) in _PLAIN.items()}
    scales |= {f"normalised for {name}": scale for name, scale in _NORMALISED.items() if len(scale[0]) == channels}
    lowest, highest = (found(dim=(0, 2, 3), keepdim=True)[0] for found in (values.amin, values.amax))
    readings = []
    for words, scale in scales.items():
        mean, deviation = (torch.tensor(one).view(-1, 1, 1) for one in scale)
        low, high = float((lowest * deviation + mean).min()), float((highest * deviation + mean).max())
        # A set of natural images uses most of its range; a perturbation of that size could be seen in any image.
        if low >= -0.01 and high <= 1.01 and high - low > 0.5:
            readings.append(Reading(words, mean, deviation, *_line(part * deviation + mean, clean)))
    return readings


def _line(images: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Slope and shift per channel of the line through images over clean ones, and two distances; see `Reading`."""
    own, other = _by_channel(images), _by_channel(clean)
    slope = (_centred(images) * _centred(clean)).sum(dim=1) / _centred(clean).square().sum(dim=1).clamp(min=1e-12)
    shift = own.mean(dim=1) - slope * other.mean(dim=1)
    line = slope[:, None] * other + shift[:, None]
    return slope, shift, *(float((one - line).square().mean().sqrt()) for one in (own, other))


def _fits(reading: Reading, values: torch.Tensor) -> bool:
    """
    Whether the means and deviations are those that the numbers were made with.

    What was bytes is whole levels again. Elsewhere noise moves the line through the images by less than its own size.
    """
    levels = 255 * _by_channel(reading.images(values[:_FEW_ROWS]))
    if all(len(channel.unique()) <= 256 < len(channel) for channel in levels):
        return float((levels - levels.round()).abs().mean()) < _OFF_LEVELS
    moved = torch.maximum((reading.slope - 1).abs().max(), reading.shift.abs().max())
    return float(moved) < reading.noise + _LEVEL


def likeness(values: torch.Tensor, clean: torch.Tensor) -> float:
    """Correlation with the clean images after the best scale and shift of each channel, none of them turned round."""
    values, clean = _centred(values), _centred(clean)
    shared = (values * clean).sum(dim=1).clamp(min=0)
    explained = (shared.square() / values.square().sum(dim=1).clamp(min=1e-12)).sum()
    return float((explained / clean.square().sum().clamp(min=1e-12)).sqrt())


def _by_channel(images: torch.Tensor) -> torch.Tensor:
    """Values by channel, (C, N H W)."""
    return images.transpose(0, 1).flatten(1)


def _centred(images: torch.Tensor) -> torch.Tensor:
    """Values by channel, with mean 0."""
    by_channel = _by_channel(images)
    return by_channel - by_channel.mean(dim=1, keepdim=True)


def _row_unlike_its_image(values: torch.Tensor, clean: torch.Tensor) -> int | None:
    """The first row of poisoned images that does not resemble its clean image, where that is not nearly flat."""
    values, clean = (F.adaptive_avg_pool2d(images, _SIDE_OF_ROWS) for images in (values, clean))
    alike = (_unit(values) * _unit(clean)).sum(dim=1)
    unlike = (alike <= _ROW_RESEMBLANCE) & (clean.flatten(1).std(dim=1) > _FLAT)
    return int(unlike.nonzero()[0]) if unlike.any() else None


def _unit(images: torch.Tensor) -> torch.Tensor:
    flat = images.flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
