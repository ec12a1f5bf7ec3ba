"""Recipes: how a victim is trained, as data. A recipe has a name, and a variant of it is `dataclasses.replace`."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar


LARGE_SET = 40_000  # images, from which airbench94 is trained in its authors' epochs
SHORT_PASSES = 50_000  # images that a short training of a smaller set shows, repetitions counted
SHORT_STEPS = 300  # which a short training has at least: fewer teach a network nothing, however few images there are
SCHEDULES = ("steps", "cosine", "one_cycle", "warmup_cosine", "triangular")


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
            `"cosine"` (from `learning_rate` to 0, changed once an epoch), `"one_cycle"` (rises and falls once,
            changed at every step; Smith and Topin), or `"warmup_cosine"` (rises linearly from 0.01 to a cosine from
            `learning_rate` to a thousandth of it, but never falls to it; changed at every step), or `"triangular"`
            (rises linearly from a fifth of `learning_rate` and falls linearly to 0.07 of it, changed at every step).
        milestones (`tuple` of `int`): Epochs, counted from 0, at whose start `"steps"` multiplies the learning rate.
        gamma (`float`, defaults to 0.1): The factor of `"steps"`.
        warmup (`float`, defaults to 0.3): The fraction of all steps in which `"one_cycle"`, `"warmup_cosine"` and
            `"triangular"` rise.
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
        ValueError: If there is no such schedule, or a number is too small or too large.
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

    drop_last: ClassVar[bool] = False  # whether an epoch leaves out the images that do not fill a batch
    padding: ClassVar[str] = "zeros"  # what is added for a crop: "zeros" or "reflect"
    label_smoothing: ClassVar[float] = 0.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, but must be one of {', '.join(SCHEDULES)}.")
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, but must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0 and finite.")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, but must be at least 2: batch normalisation needs two images."
            )
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie within 0 and 1.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, but must be at least 0 and below 1.")
        if self.schedule == "one_cycle" and self.warmup == 1:
            raise ValueError("warmup is 1, but must be below 1 for schedule 'one_cycle', which falls after it.")
        for name in ("weight_decay", "crop_padding"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0 and finite.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}, but must be above 0.")
        if self.max_steps_per_epoch is not None and self.max_steps_per_epoch < 1:
            raise ValueError(f"max_steps_per_epoch is {self.max_steps_per_epoch}, but must be at least 1.")

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


@dataclass(frozen=True)
class AirbenchRecipe(Recipe):
    """
    How the network of airbench94 is trained (Jordan, 2024; KellerJordan/cifar10-airbench), for sets of any size.

    Images are mirrored in turn: half of them in the first epoch, the others in the second, and so on. Crops are padded
    by reflection. Weights are averaged by look-ahead. Biases of batch normalisation learn faster. The authors sum the
    loss over a batch of 1,024 images with a learning rate of 0.001465 and a weight decay of 1.362; the same steps with
    the mean are 1.5 and 0.00133.

    Args:
        batch_size (`int`, *optional*): None for what suits the training set, see [`~AirbenchRecipe.for_images`].
        learning_rate (`float`, defaults to 1.5): Where `batch_size` is None, that of 1,024 images per step.
        label_smoothing (`float`, defaults to 0.2): The fraction of each label that all classes share.
        bias_factor (`float`, defaults to 64): The learning rate of a batch normalisation's bias is multiplied by it,
            its weight decay divided.
        look_ahead_steps (`int`, defaults to 5): Steps between two averages.
        look_ahead_decay (`float`, defaults to 0.95): How much of itself, per step, the average keeps at the end.
        whitening_epochs (`int`, defaults to 3): Epochs in which the bias of the whitening layer is trained.
    """

    batch_size: int | None = None
    learning_rate: float = 1.5
    schedule: str = "triangular"
    warmup: float = 0.23
    momentum: float = 0.85
    nesterov: bool = True
    weight_decay: float = 1.362 / 1024
    crop_padding: int = 2
    flip: bool = False
    bfloat16: bool = True
    label_smoothing: float = 0.2
    bias_factor: float = 64.0
    look_ahead_steps: int = 5
    look_ahead_decay: float = 0.95
    whitening_epochs: int = 3

    drop_last: ClassVar[bool] = True
    padding: ClassVar[str] = "reflect"

    def epochs_for(self, count: int) -> int:
        """Epochs for a training set of `count` images: twice as many below 40,000 images."""
        return self.epochs if count >= LARGE_SET else 2 * self.epochs

    def for_images(self, count: int) -> "AirbenchRecipe":
        """
        The recipe with the batch size and epochs that it has for a training set of `count` images.

        Where `batch_size` is None, that is 1,024 images, halved down to 32 until an epoch has 39 steps, as it has for
        10,000 images in batches of 256; the learning rate is proportional to the batch, the weight decay stays. The
        epochs are those of [`~AirbenchRecipe.epochs_for`].

        Args:
            count (`int`): Number of training images.

        Returns:
            [`AirbenchRecipe`]: Itself, where it has a batch size.
        """
        if self.batch_size is not None:
            return self
        batch_size = 1024
        while batch_size > 32 and count < 39 * batch_size:
            batch_size //= 2
        learning_rate = self.learning_rate * batch_size / 1024
        return replace(self, batch_size=batch_size, learning_rate=learning_rate, epochs=self.epochs_for(count))


@dataclass(frozen=True)
class ShortAirbenchRecipe(AirbenchRecipe):
    """
    [`AirbenchRecipe`] in the time of an audit, which trains nine victims at least.

    Its schedule rises and falls once within fewer epochs; nothing else is changed.
    """

    def epochs_for(self, count: int) -> int:
        """
        Epochs for a training set of `count` images: below 40,000 images those of 50,000 image passes, at least 5 and
        at most twice the recipe's; but below 500 images those of 300 steps with 32 images, or with all of a smaller
        set.
        """
        if count >= LARGE_SET:
            return self.epochs
        epochs = min(max(SHORT_PASSES // count, 5), 2 * self.epochs)
        return max(epochs, -(-SHORT_STEPS // max(1, count // 32)))


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
        # The network of airbench94. Its authors train 9.9 epochs of 50,000 images.
        AirbenchRecipe("airbench", epochs=10),
        # Ours: the same in the time of an audit on a CPU.
        ShortAirbenchRecipe("airbench-short", epochs=10),
        Recipe("smoke", epochs=2, batch_size=64, schedule="one_cycle", width=8, max_steps_per_epoch=20, smoke=True),
    )
}


@dataclass(frozen=True)
class ContrastiveRecipe(Recipe):
    """
    How a victim learns without labels, and what reads its features afterwards.

    An epoch leaves out the images that do not fill a batch, others each time. Views are cropped by `min_scale` instead
    of `crop_padding`.

    Args:
        method (`str`): One of `CONTRASTIVE`.
        temperature (`float`, *optional*): Of `"simclr"` and `"moco-v2"`.
        loss_factor (`float`, defaults to 1): The loss is multiplied by it.
        key_momentum (`float`, *optional*): Of `"moco-v2"` and `"byol"`: how much of its weights the second network
            keeps at each step.
        queue (`int`, *optional*): Of `"moco-v2"`: the number of keys of earlier batches, a multiple of the batch size.
        min_scale (`float`, defaults to 0.2): Smallest fraction of an image's area that a view shows.
        probe (`str`, defaults to `"fast"`): The linear probe, one of `linear_probe.PROBES`.
        knn_evaluations (`int`, defaults to 10): How often the accuracy of the nearest neighbours enters the history,
            evenly over the epochs.

    Raises:
        ValueError: If there is no such method, a number is missing or does not suit another.
    """

    batch_size: int = 512
    schedule: str = "warmup_cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    crop_padding: int = 0
    method: str = "simclr"
    temperature: float | None = None
    loss_factor: float = 1.0
    key_momentum: float | None = None
    queue: int | None = None
    min_scale: float = 0.2
    probe: str = "fast"
    knn_evaluations: int = 10

    drop_last: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.method not in CONTRASTIVE:
            raise ValueError(f"method is {self.method!r}, but must be one of {', '.join(CONTRASTIVE)}.")
        for name in CONTRASTIVE[self.method]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None, but must be a number for method {self.method!r}.")
        for name in ("temperature", "loss_factor", "knn_evaluations"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0 and finite.")
        if self.key_momentum is not None and not 0 <= self.key_momentum <= 1:
            raise ValueError(f"key_momentum is {self.key_momentum}, but must lie within 0 and 1.")
        if self.queue is not None and (self.queue < 1 or self.queue % self.batch_size):
            raise ValueError(f"queue is {self.queue}, but must be a multiple of batch_size {self.batch_size}.")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale is {self.min_scale}, but must be above 0 and at most 1.")


# Ways of learning without labels, and the numbers that each of them needs.
CONTRASTIVE = {
    "simclr": ("temperature",),
    "moco-v2": ("temperature", "key_momentum", "queue"),
    "byol": ("key_momentum",),
}

# Of contrastive poisoning's repository (ICLR 2023; kaiwenzha/contrastive-poisoning), at its batch of 512. It
# multiplies the first two losses by temperature / 0.07. Its learning rate changes once an epoch after the warm-up,
# ours at every step. Its views are normalised by mean and standard deviation, ours stay in [0, 1]. Its convolutions
# start from Kaiming's normal initialisation, ours from PyTorch's default.
_CP = {
    "simclr": {"learning_rate": 0.5, "temperature": 0.5, "loss_factor": 0.5 / 0.07},
    "moco-v2": {
        "learning_rate": 0.3,
        "temperature": 0.2,
        "loss_factor": 0.2 / 0.07,
        "key_momentum": 0.99,
        "queue": 4096,
    },
    "byol": {"learning_rate": 1.0, "key_momentum": 0.999},
}
# Two things of the program are in recipe `cp` alone. SimCLR's gradient is a quarter: each of four processes
# differentiates its own features alone, and then the mean over processes is taken. BYOL's second network follows twice
# a step, once before each of the two views.
_CP_PROGRAM = {
    "simclr": {"loss_factor": 0.5 / 0.07 / 4},
    "byol": {"key_momentum": 0.999**2},
}


def _contrastive(method: str) -> tuple[ContrastiveRecipe, ...]:
    """The recipes of one method; learning rates are proportional to the batch, a queue holds eight batches."""
    plain = ContrastiveRecipe("cp", 1000, method=method, warmup=0.01, probe="cp", **_CP[method])
    cp = replace(plain, **_CP_PROGRAM.get(method, {}))

    def shorter(name: str, epochs: int, batch_size: int, **changes) -> ContrastiveRecipe:
        changes["learning_rate"] = plain.learning_rate * batch_size / plain.batch_size
        if plain.queue is not None:
            changes["queue"] = 8 * batch_size
        if plain.key_momentum is not None:
            changes["key_momentum"] = 0.99
        return replace(plain, name=name, epochs=epochs, batch_size=batch_size, warmup=0.1, probe="fast", **changes)

    return (
        cp,
        # Ours: a GPU in minutes.
        shorter("fast", 200, 512, bfloat16=True),
        # Ours: 10,000 images of CIFAR-10 on a CPU in an hour.
        shorter("mini", 100, 128, bfloat16=True, width=16),
        # Ours: digits, of which a small part or a mirror image is no digit.
        shorter("digits", 25, 32, width=8, flip=False, min_scale=0.5),
        shorter("smoke", 2, 8, width=8, max_steps_per_epoch=20, smoke=True),
    )


CONTRASTIVE_RECIPES = {method: {recipe.name: recipe for recipe in _contrastive(method)} for method in CONTRASTIVE}


# Of all methods, for the choices of a command.
RECIPE_NAMES = tuple(dict.fromkeys(name for known in (RECIPES, *CONTRASTIVE_RECIPES.values()) for name in known))


def recipes_of(method: str) -> dict[str, Recipe]:
    """
    The recipes of a way of learning, by name.

    Args:
        method (`str`): `"supervised"`, or one of `CONTRASTIVE`.

    Raises:
        ValueError: If there is no such method.
    """
    if method != "supervised" and method not in CONTRASTIVE_RECIPES:
        raise ValueError(f"method is {method!r}, but must be one of supervised, {', '.join(CONTRASTIVE_RECIPES)}.")
    return RECIPES if method == "supervised" else CONTRASTIVE_RECIPES[method]


def get_recipe(recipe: str | Recipe, method: str = "supervised") -> Recipe:
    """
    A recipe by its name, or itself.

    Args:
        recipe (`str` or [`Recipe`]): A name from `recipes_of(method)`, or a recipe of that method.
        method (`str`, defaults to `"supervised"`): The way of learning.

    Raises:
        ValueError: If there is no recipe of that name, or it is another method's.
    """
    known = recipes_of(method)
    if isinstance(recipe, Recipe):
        own = getattr(recipe, "method", "supervised")
        if own != method:
            raise ValueError(f"recipe is {recipe.name!r} of method {own!r}, but must be one of method {method!r}.")
        return recipe
    if recipe not in known:
        raise ValueError(f"recipe is {recipe!r}, but must be one of {', '.join(known)} for method {method!r}.")
    return known[recipe]
