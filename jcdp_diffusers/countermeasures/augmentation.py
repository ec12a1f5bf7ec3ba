"""Augmentation while training: Cutout, Mixup, CutMix and random noise, after crop and flip, anew at every step."""

import warnings

import torch
from torch.nn import functional as F

from ..data import LabelledImages
from ..devices import drawn_from
from . import Context, Countermeasure


class Cutout:
    """
    Sets one square of each image to zero; its centre is uniform over the pixels, so borders may cut it.

    torchvision's and kornia's random erasing keep the whole rectangle within the image.

    Args:
        side (`float`, *optional*, defaults to 0.5): Of the square, as a fraction of the image's height: 16 of 32
            pixels.
    """

    def __init__(self, side: float = 0.5):
        self.side = side

    def before_forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, _, height, width = images.shape
        half = int(self.side * height) // 2
        inside = []
        for size in (height, width):
            centre = torch.randint(size, (count, 1), generator=generator, device=images.device)
            place = torch.arange(size, device=images.device)
            inside.append((centre - half <= place) & (place < centre + half))
        rows, columns = inside
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0), labels


class Mix:
    """
    Mixup or CutMix within the batch by kornia, with its defaults, as APBench has them.

    Each image has a partner from a permutation of the batch and a weight of its own. For Mixup the weight is uniform
    between 0 and 1; for CutMix it is the fraction of the area that the image keeps.

    Args:
        method (`str`): `"mixup"` or `"cutmix"`.
        num_classes (`int`): Columns of the labels that it returns.
    """

    def __init__(self, method: str, num_classes: int):
        from kornia.augmentation import RandomCutMixV2, RandomMixUpV2

        keys = ["input", "class"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the default that is not used here
            self.mix = (
                RandomMixUpV2(data_keys=keys)
                if method == "mixup"
                else RandomCutMixV2(data_keys=keys, use_correct_lambda=True)
            )
        self.weighs_partner = method == "mixup"
        self.num_classes = num_classes

    def before_forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.num_classes).float()
        # Rows instead of classes, so that labels which are mixed already can be mixed again.
        rows = torch.arange(len(images), device=images.device)
        with drawn_from(generator):
            images, mixed = self.mix(images, rows)
        partner, share = mixed.reshape(-1, 3)[:, 1].long(), mixed.reshape(-1, 3)[:, 2:]
        kept = 1 - share if self.weighs_partner else share
        return images, kept * labels + (1 - kept) * labels[partner]


class RandomNoise:
    """
    Adds uniform noise and clips to [0, 1].

    Args:
        amplitude (`float`, *optional*, defaults to 8 / 255): Largest change of a value, images in [0, 1].
    """

    def __init__(self, amplitude: float = 8 / 255):
        self.amplitude = amplitude

    def before_forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(images.shape, generator=generator, device=images.device).mul(2).sub(1)
        return (images + self.amplitude * noise).clamp(0, 1), labels


def cutout(data: LabelledImages, context: Context) -> Cutout:
    return Cutout()


def mixup(data: LabelledImages, context: Context) -> Mix:
    return Mix("mixup", context.num_classes)


def cutmix(data: LabelledImages, context: Context) -> Mix:
    return Mix("cutmix", context.num_classes)


def random_noise(data: LabelledImages, context: Context) -> RandomNoise:
    return RandomNoise()


_PER_STEP = "one pass over the batch per step"

COUNTERMEASURES = (
    Countermeasure(
        "cutout",
        "hook",
        "Cutout (DeVries and Taylor, 2017), as in HanxunH/Unlearnable-Examples",
        _PER_STEP,
        cutout,
        {"side": 0.5},
    ),
    Countermeasure(
        "mixup",
        "hook",
        "Mixup (Zhang et al., ICLR 2018), kornia's in the batch as in lafeat/apbench",
        _PER_STEP,
        mixup,
        {"probability": 1.0, "share": "uniform"},
        suits=("supervised",),
    ),
    Countermeasure(
        "cutmix",
        "hook",
        "CutMix (Yun et al., ICCV 2019), kornia's in the batch as in lafeat/apbench",
        _PER_STEP,
        cutmix,
        {"probability": 1.0, "share": "uniform"},
        suits=("supervised",),
    ),
    Countermeasure(
        "random-noise",
        "hook",
        "uniform noise of the poisons' size; no paper states its own (ours: 8/255, anew at every step)",
        _PER_STEP,
        random_noise,
        {"amplitude": 8 / 255},
    ),
)
