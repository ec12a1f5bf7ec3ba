"""
Adversarial training (Madry et al., ICLR 2018): every step trains on images that attack the victim itself.

At 8/255 the numbers are those of the attack in HanxunH/Unlearnable-Examples, liuzrcc/ImageShortcutSqueezing and
APBench; at 4/255 those of fshp971/robust-unlearnable-examples. The bound decides more than anything else how a robust
poison (REMN) fares. Ours: the start is brought within the bound at once, which these programs do after the first step.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..data import LabelledImages
from . import Context, Countermeasure


STEPS = 10


class AdversarialTraining:
    """
    Takes the place of the cross-entropy; the attack sees the victim in eval mode.

    Args:
        epsilon (`float`): Largest change of a value, images in [0, 1].
        step_size (`float`): Length of a step along the gradient's sign.
        steps (`int`, *optional*, defaults to 10): Of the attack.
        start (`str`, *optional*, defaults to `"normal"`): `"normal"`, noise of standard deviation `step_size`, or
            `"uniform"`, noise up to `epsilon`.
    """

    def __init__(self, epsilon: float, step_size: float, steps: int = STEPS, start: str = "normal"):
        self.epsilon = epsilon
        self.step_size = step_size
        self.steps = steps
        self.start = start

    def attack(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Images within `epsilon` of the given ones, and within [0, 1], on which the victim's loss is higher."""
        was_training = model.training
        model.eval()
        low, high = (images - self.epsilon).clamp(min=0), (images + self.epsilon).clamp(max=1)
        draw = {"generator": generator, "device": images.device}
        if self.start == "normal":
            noise = self.step_size * torch.randn(images.shape, **draw)
        else:
            noise = self.epsilon * torch.rand(images.shape, **draw).mul(2).sub(1)
        moved = torch.clamp(images + noise, low, high)
        for _ in range(self.steps):
            moved.requires_grad_()
            loss = F.cross_entropy(model(moved), labels)
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = torch.clamp(moved.detach() + self.step_size * gradient.sign(), low, high)
        model.train(was_training)
        return moved

    def loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        return F.cross_entropy(model(self.attack(model, images, labels, generator)), labels)


def _adversarial(name: str, source: str, **settings) -> Countermeasure:
    def function(data: LabelledImages, context: Context) -> AdversarialTraining:
        return AdversarialTraining(**settings)

    cost = f"{STEPS} further passes forward and backward per step: about {STEPS + 1} times plain training"
    declared = {"suits": ("supervised",), "replaces_loss": True}
    return Countermeasure(name, "hook", source, cost, function, {**settings, "steps": STEPS}, **declared)


_SOURCE = "Adversarial training (Madry et al., ICLR 2018)"

COUNTERMEASURES = (
    _adversarial(
        "at-4",
        f"{_SOURCE}, as in fshp971/robust-unlearnable-examples",
        epsilon=4 / 255,
        step_size=0.8 / 255,
        start="uniform",
    ),
    _adversarial(
        "at-8",
        f"{_SOURCE}, as in HanxunH/Unlearnable-Examples",
        epsilon=8 / 255,
        step_size=2 / 255,
        start="normal",
    ),
)
