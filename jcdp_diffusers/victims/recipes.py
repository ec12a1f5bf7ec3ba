"""Recipes: how a victim is trained, as data. A recipe has a name, and a variant of it is `dataclasses.replace`."""

from dataclasses import dataclass, replace


SCHEDULES = ("steps", "cosine", "one_cycle")


@dataclass(frozen=True)
class Recipe:
    """
    How a victim is trained by SGD with momentum.

    A variant for another data set is `dataclasses.replace(RECIPES["apbench"], flip=False, crop_padding=0)`.

    Args:
        name (`str`): What records call it.
        epochs (`int`): Passes over the training set.
        batch_size (`int`, *optional*, defaults to 128): Images per step. None for what suits the training set, see
            [`~Recipe.for_images`].
        learning_rate (`float`, defaults to 0.1): The highest learning rate. Where `batch_size` is None, that of 256
            images per step.
        schedule (`str`, defaults to `"cosine"`): `"steps"` (multiplied by `gamma` at each of `milestones`),
            `"cosine"` (from `learning_rate` to 0, changed once an epoch), or `"one_cycle"` (rises and falls once,
            changed at every step; Smith and Topin).
        milestones (`tuple` of `int`): Epochs, counted from 0, at whose start `"steps"` multiplies the learning rate.
        gamma (`float`, defaults to 0.1): The factor of `"steps"`.
        warmup (`float`, defaults to 0.3): The fraction of all steps in which `"one_cycle"` rises.
        momentum (`float`, defaults to 0.9): Of SGD.
        nesterov (`bool`, defaults to `False`): Whether the momentum is Nesterov's.
        weight_decay (`float`, defaults to 5e-4): Of SGD, on every parameter.
        clip_norm (`float`, *optional*): Largest L2 norm of the whole gradient.
        crop_padding (`int`, defaults to 4): Zero pixels added on each side before a random crop of the original size;
            0 for no crop.
        flip (`bool`, defaults to `True`): Whether an image is mirrored left to right with probability 1/2.
        bfloat16 (`bool`, defaults to `False`): Whether convolutions run in bfloat16 by autocast, where the device has
            instructions for it.
        width (`int`, defaults to 64): The network's width unless the caller gives one.
        max_steps_per_epoch (`int`, *optional*): Ends an epoch early. Only a smoke run sets it.
        smoke (`bool`, defaults to `False`): Whether this is a first try in seconds, whose figures mean nothing.

    Raises:
        ValueError: If there is no such schedule, or a number is too small.
    """

    name: str
    epochs: int
    batch_size: int | None = 128
    learning_rate: float = 0.1
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    crop_padding: int = 4
    flip: bool = True
    bfloat16: bool = False
    width: int = 64
    max_steps_per_epoch: int | None = None
    smoke: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, but must be one of {', '.join(SCHEDULES)}.")
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, but must be at least 1.")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, but must be at least 2: batch normalisation needs two images."
            )

    def for_images(self, count: int) -> "Recipe":
        """
        The recipe with the batch size that it has for a training set of `count` images.

        Where `batch_size` is None, that is 256 images, halved down to 32 until an epoch has 150 steps, as it has for
        40,000 images; the learning rate falls with the batch's square root (Krizhevsky, 2014). Without that, a victim
        of a few thousand images ends before it has learned them, purified ones above all (docs/results.md).

        Args:
            count (`int`): Number of training images.

        Returns:
            [`Recipe`]: Itself, where it has a batch size.
        """
        if self.batch_size is not None:
            return self
        batch_size = 256
        while batch_size > 32 and count < 150 * batch_size:
            batch_size //= 2
        learning_rate = round(self.learning_rate * (batch_size / 256) ** 0.5, 4)
        return replace(self, batch_size=batch_size, learning_rate=learning_rate)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # BridgePure (NeurIPS 2025) and AVATAR (SaTML 2024).
        Recipe("bridgepure", epochs=120, schedule="steps", milestones=(80, 100)),
        # Image shortcut squeezing (ICML 2023).
        Recipe("iss", epochs=60),
        # Error-minimising noise (ICLR 2021), CIFAR-10.
        Recipe("emn", epochs=60, clip_norm=5.0),
        # APBench; its second and third steps, at epochs 200 and 300, lie beyond its 200 epochs.
        Recipe("apbench", epochs=200, batch_size=256, schedule="steps", milestones=(100,), gamma=0.5),
        # Ours: the same network in a quarter of the epochs.
        Recipe("fast", epochs=30, batch_size=None, learning_rate=0.2, schedule="one_cycle", bfloat16=True),
        # Ours: CIFAR-10 on a CPU. Batches are small because 15 epochs of 10,000 images are few steps with large ones;
        # chosen on validation images.
        Recipe("mini", epochs=15, batch_size=32, learning_rate=0.05, schedule="one_cycle", bfloat16=True, width=16),
        # Ours: digits, which neither shifts nor mirroring leave what they are; small sets, so small batches.
        Recipe(
            "digits",
            epochs=12,
            batch_size=32,
            learning_rate=0.05,
            schedule="one_cycle",
            crop_padding=0,
            flip=False,
            bfloat16=True,
            width=16,
        ),
        Recipe("smoke", epochs=2, batch_size=64, schedule="one_cycle", width=8, max_steps_per_epoch=20, smoke=True),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """
    A recipe by its name, or itself.

    Args:
        recipe (`str` or [`Recipe`]): A name from `RECIPES`, or a recipe.

    Raises:
        ValueError: If there is no recipe of that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, but must be one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]
