"""The network and the recipe where nobody names them: what a device trains in minutes, or what papers use."""

import torch

from .. import victims
from .recipes import AirbenchRecipe, Recipe, get_recipe


# Of a network, where the recipe is not named.
_RECIPES = {"convnet94": "airbench"}
# A position of the last maps of convnet94 sees 51 pixels, so that of larger images it would see parts alone.
LARGEST_SIDE = 64


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
        ValueError: If there is no such network or recipe.
    """
    if victim is not None:
        victims.get(victim)
    if recipe is not None:
        recipe = get_recipe(recipe, method)
    on_cpu = torch.device(device).type == "cpu"
    if method != "supervised":
        return victim or "resnet18", recipe or get_recipe("mini" if on_cpu else "fast", method)
    if victim is None and recipe is None:
        if not on_cpu:
            return "resnet18", get_recipe("fast")
        if not victims.get("convnet94").smallest_side <= min(shape[:2]) <= LARGEST_SIDE:
            return "resnet18", get_recipe("mini")
        victim = "convnet94"
    if victim is None:
        return "convnet94" if isinstance(recipe, AirbenchRecipe) else "resnet18", recipe
    if recipe is None:
        name = _RECIPES.get(victim, "fast")
        recipe = get_recipe("airbench-short" if short and name == "airbench" else name)
    return victim, recipe
