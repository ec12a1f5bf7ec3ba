"""How an audit is done: what is tried, on which victims, with which purification."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from .. import victims
from ..data.checks import ROLES
from ..purification_config import PRESETS, PurificationConfig
from ..train.default_purifier import Plan
from ..victims import RECIPES, Recipe
from .attacks import Attack, attack


# Of an audit by the short form, `jcdp audit --protected DIR`.
DIVIDED_MINUTES = 30.0


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """
    How an audit is done.

    Args:
        protocol (`str` or `Recipe`): Of the victims, one of `RECIPES`; `"smoke"` shows in seconds that everything
            works, with few images and few steps of every purification.
        roles (`str`): `"disjoint"`, or `"paper"` for a purifier that has been trained on the test images.
        attacks (`Sequence[str]`): Countermeasures to try beside purification; see `countermeasures.NAMES`. With
            `purified` among the names that are joined, this audit's purification takes its place in their order:
            `purified+corruption`, `impulse-filter+purified+corruption`.
        control (`bool`): Whether victims are also trained on a control: the clean images with noise of the same size
            that means nothing (`poisons.control`).
        seeds (`int` or `Sequence[int]`): Victims per row, with seeds 0, 1, ..., or the seeds themselves.
        seed (`int`): Of the purifier, the purification and the control's noise.
        draws (`int`): Purifications of the protected images, each with victims of its own: several show the spread
            between draws beside that between victims; see `draws`.
        victim (`str`): One of `victims.NAMES`.
        width (`int`, *optional*): Of the victims; the recipe's by default.
        preset (`str` or `PurificationConfig`, *optional*): How to purify; by default what the purifier's repository
            says, or the plan.
        plan (`Plan`, *optional*): The purifier to train where none is given; by default it is chosen by the size of
            the images and the device.
        perceptual (`str` or `os.PathLike`, *optional*): The perceptual network that goes with a purifier trained for
            the audit, see `perceptual.load_perceptual`; a given purifier has its own beside it, or none.
        budget (`float`): Largest change of a value by the protection, images in [0, 1]. Images of two roles that are
            as near are refused as one image; see `data.check_roles`.
        budget_minutes (`float`, *optional*): The audit ends by then: its purifier gets fewer steps, its victims are
            narrower or fewer. By default none, or `DIVIDED_MINUTES` where the audit divides the images itself.

    Raises:
        ValueError: If a value is none of those, in one sentence.
    """

    protocol: str | Recipe = "fast"
    roles: str = "disjoint"
    attacks: Sequence[str] = ()
    control: bool = False
    seeds: int | Sequence[int] = 3
    seed: int = 0
    draws: int = 1
    victim: str = "resnet18"
    width: int | None = None
    preset: str | PurificationConfig | None = None
    plan: Plan | None = None
    perceptual: str | os.PathLike | None = None
    budget: float = 16 / 255
    budget_minutes: float | None = None

    def __post_init__(self):
        if not isinstance(self.protocol, Recipe) and self.protocol not in RECIPES:
            raise ValueError(f"protocol is {self.protocol!r}, but must be one of {', '.join(RECIPES)}.")
        if self.roles not in ROLES:
            raise ValueError(f"roles is {self.roles!r}, but must be one of {', '.join(ROLES)}.")
        if not self.victim_seeds or len(set(self.victim_seeds)) < len(self.victim_seeds):
            raise ValueError(f"seeds is {self.seeds!r}, but must give at least one victim, each another seed.")
        if not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws is {self.draws!r}, but must be a whole number of at least 1.")
        victims.get(self.victim)
        if isinstance(self.preset, str) and self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but must be one of {', '.join(PRESETS)}.")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget is {self.budget}, but must lie within 0 and 1 (--budget: 0 and 255, in 1/255).")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes is {self.budget_minutes:g}, but must be above 0.")
        for name in self.attacks:
            attack(name)

    @property
    def recipe(self) -> Recipe:
        """The victims' recipe."""
        return self.protocol if isinstance(self.protocol, Recipe) else RECIPES[self.protocol]

    @property
    def victim_seeds(self) -> tuple[int, ...]:
        """One for each victim of a row."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @functools.cached_property
    def tried(self) -> tuple[Attack, ...]:
        """The attacks beside purification, each once."""
        return tuple(attack(name) for name in dict.fromkeys(self.attacks) if name != "none")
