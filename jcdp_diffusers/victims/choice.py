"""The network and the recipe where nobody names them: what a device trains in minutes, or what papers use."""

import argparse

import torch

from .. import victims
from ..data import LabelledImages
from .recipes import AirbenchRecipe, Recipe, get_recipe


# Of a network, where the recipe is not named.
_RECIPES = {"convnet94": "airbench"}
# A position of the last maps of convnet94 sees 51 pixels, so that of larger images it would see parts alone.
LARGEST_SIDE = 64
WHITENING = ("training", "collected")
# What `jcdp score` and `jcdp audit` say of their options. The hours: one image of 32x32 pixels is 3.3 GFLOP for a
# training step of a ResNet-18 of width 64, `fast` shows each 30 times, and a core does 100 to 300 GFLOP/s.
_ON_A_CPU = (
    f"on a CPU resnet18 with mini for images below 9 or above {LARGEST_SIDE} pixels, and for methods without labels"
)
VICTIM_HELP = (
    "network of the victims; if neither it nor the recipe is given, convnet94 on a CPU and resnet18 on a GPU "
    f"({_ON_A_CPU}). On a CPU, one resnet18 of width 64 with recipe fast takes 1 to 3 hours of a core for each 10,000 "
    "images of 32x32 pixels: three victims of 50,000 images take 15 to 45 hours. With --width 16 it is about a seventh"
)
RECIPE_HELP = (
    f"how victims are trained; airbench with convnet94 and fast with other networks if not given ({_ON_A_CPU})"
)


def add_arguments(group: argparse._ArgumentGroup, *, short: bool = False, **method) -> None:
    """
    The options of a command that say what its victims are.

    Args:
        group (`argparse._ArgumentGroup`): Of the command's parser.
        short (`bool`, defaults to `False`): As for [`choose`].
        method: Of `--method`, beside its choices.
    """
    group.add_argument("--victim", choices=victims.NAMES, help=VICTIM_HELP)
    group.add_argument("--method", choices=victims.METHODS, **method)
    group.add_argument("--width", type=int, help="of the victims' network; the recipe's if not given")
    recipe_help = RECIPE_HELP.replace("airbench", "airbench-short") if short else RECIPE_HELP
    group.add_argument("--recipe", "--protocol", dest="protocol", choices=victims.RECIPE_NAMES, help=recipe_help)
    whitening_help = "images whose patches convnet94 whitens first: training images, or --collected"
    group.add_argument("--whitening", default="training", choices=WHITENING, help=whitening_help)


def choose(
    victim: str | None,
    recipe: str | Recipe | None,
    method: str = "supervised",
    *,
    device: str | torch.device,
    shape: tuple[int, ...],
    short: bool = False,
) -> tuple[str, Recipe]:
    """
    The network and the recipe of a victim; what is given is taken.

    Where neither is given, a GPU trains the ResNet-18 of most papers, by `fast`. A CPU trains `convnet94` by
    `airbench`, which needs a fraction of the time for a higher accuracy. It takes images whose shorter side has 9 to
    64 pixels; the features are the maxima of the last maps, whatever their size. For other images, a CPU trains the
    ResNet-18 by `mini`, of width 16.

    Where one of the two is given, the other is what goes with it: `airbench` with `convnet94`, `fast` with every other
    network, and the ResNet-18 with every other recipe.

    Methods without labels train the ResNet-18, by `fast` on a GPU and by `mini`, of width 16, on a CPU.

    Args:
        victim (`str`, *optional*): One of `victims.NAMES`.
        recipe (`str` or [`Recipe`], *optional*): A name of `recipes_of(method)`, or a recipe.
        method (`str`, defaults to `"supervised"`): One of `victims.METHODS`.
        device (`str` or `torch.device`): Where the victim is trained.
        shape (`tuple[int, ...]`): Height and width of the images; what follows them is not looked at.
        short (`bool`, defaults to `False`): Whether `airbench-short` takes the place of `airbench`.

    Raises:
        ValueError: If there is no such network or recipe, or the network does not take images of that size.
    """
    if victim is not None:
        victims.get(victim)
        victims.check_sides(victim, *shape[:2])
    if recipe is not None:
        recipe = get_recipe(recipe, method)
    on_cpu = torch.device(device).type == "cpu"
    if method != "supervised":
        return victim or "resnet18", recipe or get_recipe("mini" if on_cpu else "fast", method)
    if victim is None and recipe is None:
        if not on_cpu:
            return "resnet18", get_recipe("fast")
        if not victims.takes_sides("convnet94", *shape[:2]) or min(shape[:2]) > LARGEST_SIDE:
            return "resnet18", get_recipe("mini")
        victim = "convnet94"
    if victim is None:
        victim = "convnet94" if isinstance(recipe, AirbenchRecipe) else "resnet18"
        victims.check_sides(victim, *shape[:2])
        return victim, recipe
    if recipe is None:
        name = _RECIPES.get(victim, "fast")
        recipe = get_recipe("airbench-short" if short and name == "airbench" else name)
    return victim, recipe


def check_whitening(
    whitening: str, collected: LabelledImages | None, *networks: str, otherwise_used: bool = False
) -> None:
    """
    Refuse images to whiten that nothing whitens, or a lack of them.

    Args:
        whitening (`str`): One of `WHITENING`.
        collected (`LabelledImages`, *optional*): The images for `"collected"`.
        networks (`str`): Of the victims, one of which must be able to whiten.
        otherwise_used (`bool`): Whether the collected images serve something else as well.
    """
    if whitening not in WHITENING:
        raise ValueError(f"whitening is {whitening!r}, but must be one of {', '.join(WHITENING)}.")
    whitened = [name for name in victims.NAMES if hasattr(victims.get(name), "whiten")]
    if whitening == "collected" and not set(whitened) & set(networks):
        raise ValueError(
            f"whitening is 'collected', but must be 'training' for victim {networks[0]!r}: the first layer of "
            f"{' and '.join(whitened)} alone whitens."
        )
    if (collected is None) != (whitening == "training") and not (otherwise_used and whitening == "training"):
        given, needed = ("None", "a set of images") if collected is None else (f"{len(collected)} images", "None")
        raise ValueError(f"collected is {given}, but must be {needed} where whitening is {whitening!r}.")
