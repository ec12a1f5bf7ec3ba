"""Victims: the networks that are trained on a data set to see what can be learned from it.

`get(name)` returns a builder, `builder(num_classes, *, in_channels=3, width=64) -> nn.Module`, whose network maps
images (B, C, H, W) in [0, 1] to logits (B, num_classes). A new victim is one such function and a line in `_BUILDERS`.
"""

from collections.abc import Callable
from importlib import import_module

from torch import nn


# Name -> module and function. Modules are imported on demand, because some of them need heavy libraries.
_BUILDERS = {
    "resnet18": ("jcdp_diffusers.victims.networks.resnet", "resnet18"),
    "vgg16": ("jcdp_diffusers.victims.networks.transfer", "vgg16"),
    "densenet121": ("jcdp_diffusers.victims.networks.transfer", "densenet121"),
    "mobilenet_v2": ("jcdp_diffusers.victims.networks.transfer", "mobilenet_v2"),
    "vit": ("jcdp_diffusers.victims.networks.transfer", "vit"),
}

NAMES = tuple(_BUILDERS)


def get(name: str) -> Callable[..., nn.Module]:
    """Returns the builder of a victim.

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: if there is no victim of that name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"victim {name!r} is unknown; accepted are {', '.join(NAMES)}.")
    module, function = _BUILDERS[name]
    return getattr(import_module(module), function)
