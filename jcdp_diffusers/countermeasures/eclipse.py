"""
ECLIPSE (Wang et al., ESORICS 2024; CGCL-codes/ECLIPSE): weak purification, then training with corrupted images.

The authors diffuse to step 100 of a cosine schedule of 4000, where the noise has 0.0499 times the signal's scale, with
a diffusion model trained on 2,000 images only (which is what is sparse). In the linear schedule of 1000 steps that our
purifiers use the same noise is reached after T_p = 12 steps (0.0502). What the weak purification leaves of the poison,
the corruption is to cover: images turn grey with probability 0.4 and get Gaussian noise of deviation 0.05.
"""

import torch
from torchvision.transforms.functional import rgb_to_grayscale

from ..data import LabelledImages
from ..purification_config import PurificationConfig
from . import Context, Countermeasure
from .purifiers import purifying


SOURCE = "ECLIPSE (Wang et al., ESORICS 2024; CGCL-codes/ECLIPSE)"


class Corruption:
    """
    Corruption compensation, after crop and flip, anew at every step.

    Args:
        gray_probability (`float`, *optional*, defaults to 0.4): Of an image losing its colour.
        noise_deviation (`float`, *optional*, defaults to 0.05): Standard deviation of Gaussian noise on every value,
            images in [0, 1]; the sum is clipped and rounded to 8 bits, which the program truncates.
    """

    def __init__(self, gray_probability: float = 0.4, noise_deviation: float = 0.05):
        self.gray_probability = gray_probability
        self.noise_deviation = noise_deviation

    def before_forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        draw = {"generator": generator, "device": images.device}
        if images.shape[1] == 3:
            turned = torch.rand(len(images), 1, 1, 1, **draw) < self.gray_probability
            images = torch.where(turned, rgb_to_grayscale(images, num_output_channels=3), images)
        noise = torch.randn(images.shape, **draw)
        return (images + self.noise_deviation * noise).clamp(0, 1).mul(255).round().div(255), labels


def corruption(data: LabelledImages, context: Context) -> Corruption:
    """The hook with the published numbers."""
    return Corruption()


COUNTERMEASURES = (
    purifying("eclipse-purifier", f"{SOURCE}: sparse diffusion", PurificationConfig(diffusion_steps=12)),
    Countermeasure(
        "corruption",
        "hook",
        f"{SOURCE}: corruption compensation",
        "one pass over the batch per step",
        corruption,
        {"gray_probability": 0.4, "noise_deviation": 0.05},
    ),
)
