"""What the numbers of all methods must be, whichever method it is."""

import math
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args


# Whole numbers that need not be 1 at least, and others that may not be 0.
MAY_BE_ZERO = (
    "model_steps",
    "adversary_steps",
    "noise_adversary_steps",
    "crop_padding",
    "warmup",
    "generator_blocks",
    "offset",  # the methods that have one say why it may not be
)
ABOVE_ZERO = ("epsilon", "step", "learning_rate", "level", "norm", "feature_std", "subset")
# The largest that is accepted: 255 for changes in 1/255, 1 for fractions and root mean squares of images in [0, 1].
AT_MOST = {
    "epsilon": 255,
    "adversary_epsilon": 255,
    "level": 1,
    "stop_error": 1,
    "strength": 1,
    "subset": 1,
    "weight": 1,
}
BELOW = {"momentum": 1}  # at 1 no step is ever forgotten
ODD = ("kernel_size",)
# Numbers that may not be above another one of the same settings.
AT_MOST_ANOTHER = {"warmup": "epochs", "last_learning_rate": "learning_rate"}


def check_numbers(settings: Any, prefix: str = "") -> None:
    """
    Refuse numbers that no method could use: infinite ones, negative ones, most that are 0, and those outside the range
    that the tables above give.

    Args:
        settings (dataclass): Of a method, settings within settings included.
        prefix (`str`): What stands before the names of its fields in an error.

    Raises:
        ValueError: For the first such number.
    """
    for field in fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif type(value) in (int, float):
            conditions = _conditions(settings, field)
            if not all(holds for holds, _ in conditions):
                words = [words for _, words in conditions]
                accepted = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
                raise ValueError(f"{name} is {value}, but must be {accepted}.")


def _conditions(settings: Any, field: Field) -> list[tuple[bool, str]]:
    """What a number must be, each with whether it is."""
    name, value = field.name, getattr(settings, field.name)
    whole = float not in (get_args(field.type) or (field.type,))
    least = int(whole and name not in MAY_BE_ZERO)
    conditions = [] if math.isfinite(value) else [(False, "finite")]
    conditions.append((value > 0, "above 0") if name in ABOVE_ZERO else (value >= least, f"at least {least}"))
    if name in AT_MOST:
        unit = ", in 1/255" if AT_MOST[name] == 255 else ""
        conditions.append((value <= AT_MOST[name], f"at most {AT_MOST[name]}{unit}"))
    if name in BELOW:
        conditions.append((value < BELOW[name], f"below {BELOW[name]}"))
    if name in ODD:
        conditions.append((value % 2 == 1, "odd"))
    if name in AT_MOST_ANOTHER:
        other = getattr(settings, AT_MOST_ANOTHER[name])
        conditions.append((value <= other, f"at most {AT_MOST_ANOTHER[name]}, {other}"))
    return conditions
