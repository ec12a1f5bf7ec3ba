"""What the numbers of all methods must be, whichever method it is."""

import math
from dataclasses import fields, is_dataclass
from typing import Any


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
ABOVE_ZERO = ("step", "learning_rate", "level", "norm", "feature_std")


def check_numbers(settings: Any, prefix: str = "") -> None:
    """
    Refuse numbers that no method could use: infinite ones, negative ones, and most that are 0.

    Args:
        settings (dataclass): Of a method, settings within settings included.
        prefix (`str`): What stands before the names of its fields in an error.

    Raises:
        ValueError: For the first such number.
    """
    for field in fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        above = field.name in ABOVE_ZERO
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif field.name == "epsilon" and math.isfinite(value) and not 0 < value <= 255:
            raise ValueError(f"{name} is {value}, but must be above 0 and at most 255, in 1/255.")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be finite{' and above 0' if above else ''}.")
        elif type(value) is int and value < (least := int(field.name not in MAY_BE_ZERO)):
            raise ValueError(f"{name} is {value}, but must be at least {least}.")
        elif type(value) is float and (value < 0 or (value == 0 and above)):
            raise ValueError(f"{name} is {value}, but must be {'above' if above else 'at least'} 0.")
