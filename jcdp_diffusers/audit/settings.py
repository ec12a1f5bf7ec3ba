"""How an audit is done: what is tried, on which victims, with which purification."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import torch

from .. import victims
from ..data import USUAL_BUDGET
from ..data.checks import ROLES
from ..devices import check_seed
from ..purification_config import ADAPTIVE, PRESETS, PurificationConfig
from ..train.default_purifier import Plan
from ..victims import METHODS, Recipe, choose, get_recipe, recipes_of
from ..victims.choice import WHITENING
from .attacks import Attack, attack


# Of an audit by the short form, `jcdp audit --protected DIR`.
DIVIDED_MINUTES = 15.0


@dataclasses.dataclass(frozen=True)
class Learner:
    """
    One way in which the victims of an audit learn.

    Args:
        method (`str`): One of `victims.METHODS`.
        victim (`str`): The network.
        recipe (`Recipe`): Its training.
    """

    method: str
    victim: str
    recipe: Recipe

    @property
    def whitens(self) -> bool:
        """Whether the network's first layer whitens patches."""
        return hasattr(victims.get(self.victim), "whiten")


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """
    How an audit is done.

    Args:
        protocol (`str` or `Recipe`, *optional*): Of the victims, a recipe of every method; by default what suits
            device and method, see [`victims.choice.choose`]. `"smoke"` shows in seconds that everything works, with
            few images and few steps of every purification.
        method (`str` or `Sequence[str]`): How victims learn: one or several of `victims.METHODS`. The verdict is that
            of the first; the others have tables and verdicts beside it.
        roles (`str`): `"disjoint"`, or `"paper"` for a purifier that has been trained on the test images.
        attacks (`Sequence[str]`): Countermeasures to try beside purification; see `countermeasures.NAMES`. With
            `purified` among the names that are joined, this audit's purification takes its place in their order:
            `purified+corruption`, `impulse-filter+purified+corruption`.
        pairs (`int`): How many of the collected images are protected for an attack that learns from pairs; 4,000 are
            the most that BridgePure takes.
        control (`bool`): Whether victims are also trained on a control: the clean images with noise of the same size
            that means nothing (`poisons.control`).
        seeds (`int` or `Sequence[int]`): Victims per row, with seeds 0, 1, ..., or the seeds themselves.
        seed (`int`): Of the purifier, the purification and the control's noise.
        draws (`int`): Purifications of the protected images, each with victims of its own: several show the spread
            between draws beside that between victims; see `draws`.
        victim (`str`, *optional*): One of `victims.NAMES`; by default what suits device, recipe and method.
        whitening (`str`): Whose patches the first layer of `"convnet94"` whitens: those of the `"training"` images of
            each row, or of the `"collected"` ones.
        width (`int`, *optional*): Of the victims; the recipe's by default.
        preset (`str` or `PurificationConfig`, *optional*): How to purify; by default what the purifier's repository
            says, or the plan. `"adaptive"` reads the spectrum of the protection against the collected images.
        plan (`Plan`, *optional*): The purifier to train where none is given; by default it is chosen by the size of
            the images and the device.
        perceptual (`str` or `os.PathLike`, *optional*): The perceptual network that goes with a purifier trained for
            the audit, see `perceptual.load_perceptual`; a given purifier has its own beside it, or none.
        budget (`float`): Largest change of a value by the protection, images in [0, 1]. Images of two roles that are
            as near are refused as one image; see `data.check_roles`.
        fractions (`Sequence[float]`): Fractions of each class, above 0 and at most 1, for which victims of partly
            protected images are compared with victims of the clean rest; see `fractions`.
        budget_minutes (`float`, *optional*): The audit ends by then: its purifier gets fewer steps, its victims are
            narrower or fewer. By default none, or `DIVIDED_MINUTES` where the audit divides the images itself.

    Raises:
        ValueError: If a value is none of those, in one sentence.
    """

    protocol: str | Recipe | None = None
    method: str | Sequence[str] = "supervised"
    roles: str = "disjoint"
    attacks: Sequence[str] = ()
    pairs: int = 4000
    control: bool = False
    seeds: int | Sequence[int] = 3
    seed: int = 0
    draws: int = 1
    victim: str | None = None
    whitening: str = "training"
    width: int | None = None
    preset: str | PurificationConfig | None = None
    plan: Plan | None = None
    perceptual: str | os.PathLike | None = None
    budget: float = USUAL_BUDGET
    fractions: Sequence[float] = ()
    budget_minutes: float | None = None

    def __post_init__(self):
        self._check_methods()
        if self.roles not in ROLES:
            raise ValueError(f"roles is {self.roles!r}, but must be one of {', '.join(ROLES)}.")
        if not self.victim_seeds or len(set(self.victim_seeds)) < len(self.victim_seeds):
            raise ValueError(f"seeds is {self.seeds!r}, but must give at least one victim, each another seed.")
        for seed in (self.seed, *self.victim_seeds):
            check_seed(seed)
        if not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws is {self.draws!r}, but must be a whole number of at least 1.")
        if self.victim is not None:
            victims.get(self.victim)
        if self.whitening not in WHITENING:
            raise ValueError(f"whitening is {self.whitening!r}, but must be one of {', '.join(WHITENING)}.")
        if isinstance(self.preset, str) and self.preset not in (*PRESETS, ADAPTIVE):
            raise ValueError(f"preset is {self.preset!r}, but must be one of {', '.join((*PRESETS, ADAPTIVE))}.")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget is {self.budget}, but must lie within 0 and 1 (--budget: 0 and 255, in 1/255).")
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}, but must be at least 1.")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions is {list(self.fractions)}, but {fraction} must be above 0 and at most 1.")
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            raise ValueError(f"budget_minutes is {self.budget_minutes:g}, but must be above 0.")
        for name in self.attacks:
            one = attack(name)
            for method in self.methods:
                one.countermeasure.require_learning(method)
                if one.finetune is not None and method != "supervised":
                    raise ValueError(f"attacks has {name!r}, but must have no start for method {method!r}.")

    def _check_methods(self) -> None:
        """Refuse ways of learning that there are not, and a recipe that one of them does not have."""
        methods = self.methods
        if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(METHODS):
            raise ValueError(f"method is {self.method!r}, but must be one or several of {', '.join(METHODS)}.")
        for method in methods:
            known = recipes_of(method)
            if isinstance(self.protocol, str) and self.protocol not in known:
                raise ValueError(
                    f"protocol is {self.protocol!r}, but must be one of {', '.join(known)} for method {method!r}."
                )
            if self.protocol is not None:
                get_recipe(self.protocol, method)

    @property
    def methods(self) -> tuple[str, ...]:
        """How victims learn, each way once."""
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)

    @property
    def smoke(self) -> bool:
        """Whether everything takes seconds and no figure means anything."""
        return self.protocol is not None and get_recipe(self.protocol, self.methods[0]).smoke

    def learners(self, device: str | torch.device, shape: Sequence[int]) -> tuple[Learner, ...]:
        """
        Networks and recipes by method.

        Args:
            device (`str` or `torch.device`): Where victims are trained.
            shape (`Sequence[int]`): Height and width of the images, and whatever follows them.
        """
        options = {"device": device, "shape": tuple(shape), "short": True}
        return tuple(
            Learner(method, *choose(self.victim, self.protocol, method, **options)) for method in self.methods
        )

    @property
    def victim_seeds(self) -> tuple[int, ...]:
        """One for each victim of a row."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @functools.cached_property
    def tried(self) -> tuple[Attack, ...]:
        """The attacks beside purification, each once."""
        return tuple(attack(name, smoke=self.smoke) for name in dict.fromkeys(self.attacks) if name != "none")
