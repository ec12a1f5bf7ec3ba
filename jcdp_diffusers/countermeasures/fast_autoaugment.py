"""
Fast AutoAugment (Lim et al., NeurIPS 2019; kakaobrain/fast-autoaugment) with its published CIFAR-10 policy.

Each image, before crop and flip, is given one of 493 pairs of operations, each of which is applied with its own
probability at its own level; whatever has a direction takes either with probability 1/2. The policy was searched on
clean CIFAR-10 images; papers use it for other data sets as well.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from ..data import LabelledImages
from . import Context, Countermeasure
from .fast_autoaugment_policy import policy


# Of each operation the value at level 0 and at level 1.
RANGES = {
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateX": (-0.45, 0.45),  # of the width
    "TranslateY": (-0.45, 0.45),  # of the height
    "Rotate": (-30.0, 30.0),  # degrees
    "AutoContrast": (0.0, 1.0),  # has no strength, and so the next two
    "Invert": (0.0, 1.0),
    "Equalize": (0.0, 1.0),
    "Solarize": (0.0, 256.0),
    "Posterize": (4.0, 8.0),  # bits
    "Contrast": (0.1, 1.9),
    "Color": (0.1, 1.9),
    "Brightness": (0.1, 1.9),
    "Sharpness": (0.1, 1.9),
    "Cutout": (0.0, 0.2),  # of the width
}
DIRECTED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
CUTOUT_COLOUR = (125, 123, 114)


def apply_operation(
    picture: Image.Image, name: str, level: float, *, mirrored: bool = False, centre: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """
    One operation of a policy.

    Args:
        picture (`Image.Image`): Mode RGB or L.
        name (`str`): One of `RANGES`.
        level (`float`): In [0, 1], from one end of the operation's range to the other.
        mirrored (`bool`, *optional*, defaults to `False`): Whether an operation with a direction takes the other one.
        centre (`tuple[float, float]`, *optional*, defaults to the middle): Of Cutout, in [0, 1) of width and height.
    """
    low, high = RANGES[name]
    value = low + level * (high - low)
    if mirrored and name in DIRECTED:
        value = -value
    width, height = picture.size
    match name:
        case "ShearX":
            return picture.transform(picture.size, Image.Transform.AFFINE, (1, value, 0, 0, 1, 0))
        case "ShearY":
            return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, 0, value, 1, 0))
        case "TranslateX":
            return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, value * width, 0, 1, 0))
        case "TranslateY":
            return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, value * height))
        case "Rotate":
            return picture.rotate(value)
        case "AutoContrast":
            return ImageOps.autocontrast(picture)
        case "Invert":
            return ImageOps.invert(picture)
        case "Equalize":
            return ImageOps.equalize(picture)
        case "Solarize":
            return ImageOps.solarize(picture, value)
        case "Posterize":
            return ImageOps.posterize(picture, int(value))
        case "Cutout":
            return _cut(picture, value * width, centre)
    return getattr(ImageEnhance, name)(picture).enhance(value)


def _cut(picture: Image.Image, side: float, centre: tuple[float, float]) -> Image.Image:
    if side <= 0:
        return picture
    left, top = (int(max(0, place * size - side / 2)) for place, size in zip(centre, picture.size))
    right, bottom = (min(size, start + side) for start, size in zip((left, top), picture.size))
    colour = CUTOUT_COLOUR if picture.mode == "RGB" else sum(CUTOUT_COLOUR) // 3
    cut = picture.copy()
    ImageDraw.Draw(cut).rectangle((left, top, right, bottom), colour)
    return cut


class FastAutoAugment:
    """Augments stored images by Pillow, one by one, on the CPU."""

    def __init__(self):
        self.policy = policy()

    def before_augmentation(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images holds {images.dtype}, but for fast-autoaugment must hold torch.uint8: name it first."
            )
        count = len(images)
        draw = {"generator": generator, "device": images.device}
        pairs = torch.randint(len(self.policy), (count,), **draw).tolist()
        chances = torch.rand(count, 2, 4, **draw).tolist()
        stored = images.permute(0, 2, 3, 1).cpu().numpy()
        augmented = np.empty_like(stored)
        for row in range(count):
            grey = stored.shape[3] == 1
            picture = Image.fromarray(stored[row, :, :, 0] if grey else stored[row])
            for (name, probability, level), (chance, direction, *centre) in zip(self.policy[pairs[row]], chances[row]):
                if chance < probability:
                    mirrored = direction < 0.5
                    picture = apply_operation(picture, name, level, mirrored=mirrored, centre=tuple(centre))
            augmented[row] = np.asarray(picture).reshape(stored.shape[1:])
        return torch.from_numpy(augmented).permute(0, 3, 1, 2).to(images.device)


def fast_autoaugment(data: LabelledImages, context: Context) -> FastAutoAugment:
    return FastAutoAugment()


COUNTERMEASURES = (
    Countermeasure(
        "fast-autoaugment",
        "hook",
        "Fast AutoAugment (Lim et al., NeurIPS 2019; kakaobrain/fast-autoaugment, policy fa_reduced_cifar10)",
        "one or two operations of Pillow per image and step",
        fast_autoaugment,
        {"policy": "fa_reduced_cifar10", "pairs": 493},
        takes="bytes",
    ),
)
