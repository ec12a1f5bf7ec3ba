"""
Victims: the networks that are trained on a data set to see what can be learned from it.

`train_victim(train, test, victim=..., method=..., recipe=...)` trains one and scores it: `victim` names the network,
`method` the way of learning, `recipe` the numbers. `get(name)` returns a network's builder,
`builder(num_classes, *, in_channels=3, width=64) -> nn.Module`. A new network is one such function in `networks.py`
and its name in `NAMES`.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any


NAMES = ("resnet18", "convnet94", "vgg16", "densenet121", "mobilenet_v2", "vit")
METHODS = ("supervised", "simclr", "moco-v2", "byol")
# What the sides of images must be in pixels, for networks that do not take all. A smaller image leaves no maps at the
# end. Of an image with other sides, a vision transformer would not see the last rows.
_SMALLEST_SIDES = {"convnet94": 9, "densenet121": 8}
_MULTIPLES = {"vit": 4}

# Name -> module. Each is imported when the name is first used, so that the names above cost no import of torch.
_MODULES = {
    "HOOK_METHODS": "training",
    "RECIPES": "recipes",
    "RECIPE_NAMES": "recipes",
    "Recipe": "recipes",
    "ContrastiveRecipe": "recipes",
    "get_recipe": "recipes",
    "recipes_of": "recipes",
    "VictimResult": "victim",
    "check_victim": "victim",
    "choose": "choice",
    "confusion_matrix": "evaluation",
    "predict": "evaluation",
    "random_crop_flip": "supervised",
    "train_model": "supervised",
    "train_victim": "victim",
}

__all__ = ["METHODS", "NAMES", "build", "check_sides", "get", "takes_sides", *_MODULES]


def get(name: str) -> Callable[..., Any]:
    """
    The builder of a network.

    Args:
        name (`str`): One of `NAMES`.

    Returns:
        `Callable`: `builder(num_classes, *, in_channels=3, width=64) -> nn.Module`. The module maps images (B, C, H,
        W) in [0, 1] to logits (B, num_classes), and has `features(images)`, (B, num_features), and `num_features`.

    Raises:
        ValueError: If there is no network of that name.
    """
    if name not in NAMES:
        raise ValueError(f"victim is {name!r}, but must be one of {', '.join(NAMES)}.")
    return getattr(import_module(".networks", __name__), name)


def build(name: str, num_classes: int, *, in_channels: int, width: int, image_size: int) -> Any:
    """
    A network for images of one size, with the stem that suits them where it has several.

    Args:
        name (`str`), num_classes (`int`), in_channels (`int`), width (`int`): As for `get`.
        image_size (`int`): Shorter side of the images, in pixels.
    """
    builder = get(name)
    sized = {"image_size": image_size} if "image_size" in inspect.signature(builder).parameters else {}
    return builder(num_classes, in_channels=in_channels, width=width, **sized)


def check_width(name: str, width: int) -> None:
    """ValueError where a network cannot have that width, before any costly work; its weights are not made."""
    import torch

    with torch.device("meta"):
        get(name)(2, width=width)


def takes_sides(name: str, height: int, width: int) -> bool:
    """Whether a network takes images of that size and sees all of them; arguments as for `check_sides`."""
    multiple = _MULTIPLES.get(name, 1)
    return min(height, width) >= _SMALLEST_SIDES.get(name, 1) and height % multiple == width % multiple == 0


def check_sides(name: str, height: int, width: int, *, argument: str = "victim") -> None:
    """
    Refuse images that a network does not take, or of which it would not see all.

    Args:
        name (`str`): One of `NAMES`.
        height, width (`int`): Of the images, in pixels.
        argument (`str`): What the sentence calls the network.

    Raises:
        ValueError: If a side is too small or no multiple of what it must be.
    """
    if not takes_sides(name, height, width):
        multiple = _MULTIPLES.get(name)
        accepted = f"a multiple of {multiple}" if multiple else f"at least {_SMALLEST_SIDES[name]}"
        raise ValueError(
            f"{argument} is {name!r}, but must be another for images of {height}x{width} pixels: {name} needs sides "
            f"of {accepted} pixels."
        )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
