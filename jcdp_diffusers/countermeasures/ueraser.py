"""
UEraser (Qin et al., 2023; lafeat/ueraser): training on the hardest of several strong augmentations of each image.

The augmentations are kornia's: plasma brightness and contrast, channel shuffling, TrivialAugment. *Lite* draws one
augmentation per image, *Max* draws five and keeps the one with the highest loss, and UEraser proper does the latter in
the first quarter of the epochs (50 of its 200) and the former in the rest.

Ours differs from the authors' program in one point. kornia's TrivialAugment draws one operation per call. The authors
repeat the batch five times and augment it in one call, so that the five draws of an image share that operation; ours
augments in five calls, so that each draw has an operation of its own. With one draw there is no difference.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..data import LabelledImages
from ..devices import drawn_from
from . import Context, Countermeasure


SOURCE = "UEraser, adversarial augmentation (Qin et al., 2023; lafeat/ueraser)"
DRAWS = 5
PROBABILITY = 0.5
ROUGHNESS = (0.3, 0.7)
INTENSITY = (0.5, 1.0)


def augmentation() -> nn.Module:
    """The published augmentation, from float images (B, 3, H, W) in [0, 1] to the same."""
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomPlasmaBrightness(roughness=ROUGHNESS, intensity=INTENSITY, p=PROBABILITY),
        K.RandomPlasmaContrast(roughness=ROUGHNESS, p=PROBABILITY),
        K.RandomChannelShuffle(p=PROBABILITY),
        K.auto.TrivialAugment(),
    )


class UEraser:
    """
    Takes the place of the cross-entropy.

    Args:
        max_share (`float`): Fraction of the epochs, from the first on, in which each image counts with the highest
            loss of all its draws; in the rest it is drawn once.
        draws (`int`, *optional*, defaults to 5): Augmentations per image in those epochs.
        augment (`nn.Module`, *optional*): From a batch of float images in [0, 1] to augmented ones; `augmentation()`
            by default.
    """

    def __init__(self, max_share: float, draws: int = DRAWS, augment: nn.Module | None = None):
        self.max_share = max_share
        self.draws = draws
        self.augment = augmentation() if augment is None else augment
        self.draws_now = draws if max_share > 0 else 1

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.draws_now = self.draws if epoch < self.max_share * epochs else 1

    def loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        # A warp's grid is computed in matrix products, which would be off by pixels in bfloat16.
        with drawn_from(generator), torch.autocast(images.device.type, enabled=False):
            augmented = torch.cat([self.augment(images) for _ in range(self.draws_now)])
        augmented = augmented.contiguous(memory_format=torch.channels_last)
        repeated = labels.repeat(self.draws_now, *(1,) * (labels.ndim - 1))
        losses = F.cross_entropy(model(augmented), repeated, reduction="none")
        return losses.view(self.draws_now, -1).amax(dim=0).mean()


def check_images(data: LabelledImages, name: str) -> None:
    """Refuse images without colour."""
    if (count := data.images.shape[3]) != 3:
        raise ValueError(f"data has images of {count} channel, but must have 3 for {name}, which shuffles them.")


def _ueraser(name: str, max_share: float, cost: str) -> Countermeasure:
    def function(data: LabelledImages, context: Context) -> UEraser:
        return UEraser(max_share)

    settings = {
        "max_share": max_share,
        "draws": DRAWS if max_share > 0 else 1,
        "probability": PROBABILITY,
        "roughness": ROUGHNESS,
        "intensity": INTENSITY,
    }
    source = SOURCE if max_share == 0 else f"{SOURCE}; ours: one TrivialAugment operation per draw, not one for all"
    declared = {"suits": ("supervised",), "replaces_loss": True, "check": lambda data: check_images(data, name)}
    return Countermeasure(name, "hook", source, cost, function, settings, **declared)


COUNTERMEASURES = (
    _ueraser("ueraser-lite", 0.0, "one strong augmentation per image and step"),
    _ueraser("ueraser", 0.25, f"{DRAWS} times plain training in a quarter of the epochs"),
    _ueraser("ueraser-max", 1.0, f"{DRAWS} times plain training"),
)
