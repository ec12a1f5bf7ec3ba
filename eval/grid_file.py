"""
A grid file: which poisons, countermeasures, victims and seeds to measure on which images.

`eval/README.md` shows one; `Grid` describes every entry.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml

from jcdp_diffusers import countermeasures, poisons, victims
from jcdp_diffusers.data import load_images
from jcdp_diffusers.data.checks import ROLES
from jcdp_diffusers.devices import check_seed
from jcdp_diffusers.poisons import control
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.default_purifier import SMOKE_PURIFICATION
from jcdp_diffusers.train.unets import UNETS
from jcdp_diffusers.trials import PROVENANCE, Trial
from jcdp_diffusers.victims import ContrastiveRecipe, Recipe, recipes_of
from jcdp_diffusers.victims.finetuning import COLLECTED, FINETUNE, pretraining_recipe


DATA_ROLES = ("protected", "collected", "test")


# What a record says itself: entries of a trial, and what trials and grids write beside them.
OWN_FACTS = frozenset(
    {field.name for field in dataclasses.fields(Trial)}
    | {"trial", "countermeasure_settings", "noise_corner", "collected_images", "collected_count", *PROVENANCE}
    | {"dataset", "poison", "poison_preset", "poison_seed", "poison_settings", "column", "roles"}
)


@dataclasses.dataclass(frozen=True)
class Column:
    """
    What is done against a poison, as a grid file says it.

    Args:
        countermeasure (`str`): A name of `countermeasures`, or several joined by `+`.
        purification (`PurificationConfig`, *optional*): Replaces the countermeasure's own settings.
        draws (`int`): See `Trial`.
        collected (`int`, *optional*): How many of the collected images train the purifier or the victim's start, or
            are paired; all by default.
        init_from (`str`, *optional*): What the victim starts from: `"collected"`, for SimCLR on these images, or
            whatever `victims.finetuning.read_weights` takes.
        finetune (`str`): One of `victims.finetuning.FINETUNE`.
    """

    countermeasure: str
    purification: PurificationConfig | None = None
    draws: int = 1
    collected: int | None = None
    init_from: str | None = None
    finetune: str = "all"

    @property
    def needs_pairs(self) -> bool:
        return countermeasures.get(self.countermeasure).needs_pairs

    @property
    def needs_purifier(self) -> bool:
        return countermeasures.get(self.countermeasure).needs_purifier

    @property
    def needs_collected(self) -> bool:
        return countermeasures.get(self.countermeasure).needs_collected


@dataclasses.dataclass(frozen=True)
class Grid:
    """
    What a grid file holds.

    Args:
        name (`str`): Of the grid, in its records.
        data (`str` or `dict`): `"digits"`, the digits that ship with scikit-learn; or by role (`protected`,
            `collected`, `test`) a dict of `source`, and where needed `split`, `first` and `count` (rows in order),
            `image_size` and `channels`; and `name`, what records call the data. `collected` may have a `name` of its
            own.
        poisons (`list`): Of `poisons.NAMES`; `none` for clean images; or a poison's name with `-control`, for noise of
            the same size that means nothing (`poisons.control`).
        countermeasures (`list`): Names of `countermeasures`, or dicts of `use` (a name), `as` (what the column is
            called), `draws` (see `Trial`), `collected` (how many of the collected images this column uses, from the
            first), `init_from` and `finetune` (see `Column`) and fields of `PurificationConfig` that replace the
            countermeasure's own. A column that needs pairs has them from the poison itself, on the collected images.
        protocol (`str`): The victims' recipe.
        method (`str`): How victims learn, one of `victims.METHODS`. Features learned without labels are probed with
            the clean originals of the protected images.
        recipe (`dict`): Fields that replace the protocol's.
        victims (`list`), width (`int`), seeds (`list`): Of the victims.
        poison_preset (`str`), poison_seed (`int`): See `poisons.settings`.
        poison_settings (`dict`): Fields that replace the preset's, of the grid's one poison.
        roles (`str`): `disjoint`; or `paper`, where the test images train the purifier.
        purifier (`str`): Folder or Hub id; else one is trained on the collected images. If it does not list what it
            was trained on (`jcdp_diffusers.train.provenance`), its records have roles `unknown` and their own table.
        unet (`str`), training (`dict`): Of the purifier that is trained, instead of what suits images and device;
            `training` holds fields of `TrainingConfig`. A smoke run leaves both and `pretraining` aside.
        pretraining (`dict`): Fields that replace those of SimCLR's recipe for `init_from: collected`; the recipe is
            that of the protocol's name.
        perceptual (`str`): The perceptual network that goes with a purifier trained here; see `load_perceptual`.
        about (`dict`): Further facts for the records, such as `purifier_origin`.
    """

    name: str
    data: Any
    poisons: list
    countermeasures: list
    protocol: str = "fast"
    method: str = "supervised"
    recipe: dict = dataclasses.field(default_factory=dict)
    victims: list = dataclasses.field(default_factory=lambda: ["resnet18"])
    width: int | None = None
    seeds: list = dataclasses.field(default_factory=lambda: [0, 1, 2])
    poison_preset: str = "published"
    poison_seed: int = 0
    poison_settings: dict = dataclasses.field(default_factory=dict)
    roles: str = "disjoint"
    purifier: str | None = None
    unet: str | None = None
    training: dict = dataclasses.field(default_factory=dict)
    pretraining: dict = dataclasses.field(default_factory=dict)
    perceptual: str | None = None
    about: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("poisons", "countermeasures", "victims", "seeds"):
            value = getattr(self, name)
            if not isinstance(value, list) or not value:
                raise ValueError(f"{name} is {value!r}, but must be a list with one entry at least.")
        for seed in self.seeds:
            if type(seed) is not int:
                raise ValueError(f"seeds has {seed!r}, but its entries must be whole numbers.")
            check_seed(seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}, but each must be there once.")
        for entry in self.poisons:
            if entry != "none" and str(entry).removesuffix(control.SUFFIX) not in poisons.NAMES:
                raise ValueError(
                    f"poisons has {entry!r}, but accepted are none, {', '.join(poisons.NAMES)}, and these with "
                    f"{control.SUFFIX} behind them."
                )
        self._check_poison_settings()
        for column in self.countermeasures:
            words = column if isinstance(column, dict) else {"use": column}
            if not all(isinstance(word, str) for word in (*words, words.get("use"), words.get("as", ""))):
                raise ValueError(
                    f"countermeasures has {column!r}, but a column needs use, a countermeasure's name; its entries' "
                    "names and as are strings."
                )
        for victim in self.victims:
            victims.get(victim)
        known = recipes_of(self.method)
        if self.protocol not in known:
            raise ValueError(f"protocol is {self.protocol!r}, but must be one of {', '.join(known)}.")
        if self.roles not in ROLES:
            raise ValueError(f"roles is {self.roles!r}, but must be one of {', '.join(ROLES)}.")
        typed("recipe", self.recipe, type(known[self.protocol]))
        if self.unet is not None and self.unet not in UNETS:
            raise ValueError(f"unet is {self.unet!r}, but must be one of {', '.join(UNETS)}.")
        typed("training", self.training, TrainingConfig)
        typed("pretraining", self.pretraining, ContrastiveRecipe)
        if self.data != "digits":
            if not isinstance(self.data, dict) or not set(DATA_ROLES) <= self.data.keys():
                raise ValueError(f"data is {self.data!r}, but must be 'digits' or have {', '.join(DATA_ROLES)}.")
            if unknown := [entry for entry in self.data if entry not in ("name", *DATA_ROLES)]:
                raise ValueError(f"data has {unknown[0]!r}, but its entries are name, {', '.join(DATA_ROLES)}.")
            for role in DATA_ROLES:
                _check_source(role, self.data[role])
        if self.purifier is not None:
            for name in ("unet", "training", "perceptual"):
                if getattr(self, name):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, but must not be given with a purifier.")
        if known := sorted(self.about.keys() & OWN_FACTS):
            raise ValueError(f"about has {known[0]!r}, but must not have what records say themselves.")
        self.columns()

    def _check_poison_settings(self) -> None:
        names = {entry.removesuffix(control.SUFFIX) for entry in self.poisons} - {"none"}
        for name in sorted(names):
            if self.poison_preset not in poisons.get(name).presets:
                raise ValueError(
                    f"poison_preset is {self.poison_preset!r}, but for {name} must be one of "
                    f"{', '.join(poisons.get(name).presets)}."
                )
        if not self.poison_settings:
            return
        if len(names) != 1:
            raise ValueError(
                f"poison_settings has {', '.join(self.poison_settings)}, but poisons must have one poison then, which "
                "it is of."
            )
        poisons.get(*names).changed(self.poison_preset, self.poison_settings, name="poison_settings")

    @property
    def full_recipe(self) -> Recipe:
        """The protocol with what the grid changes of it."""
        recipe = recipes_of(self.method)[self.protocol]
        return dataclasses.replace(recipe, **typed("recipe", self.recipe, type(recipe)))

    @property
    def pretraining_recipe(self) -> ContrastiveRecipe:
        """SimCLR's recipe with what the grid changes of it; a smoke run has its own."""
        recipe = pretraining_recipe(self.full_recipe)
        if recipe.smoke:
            return recipe
        return dataclasses.replace(recipe, **typed("pretraining", self.pretraining, ContrastiveRecipe))

    def columns(self) -> dict[str, Column]:
        """Columns by their name."""
        columns = {}
        for entry in self.countermeasures:
            entry = {"use": entry} if isinstance(entry, str) else dict(entry)
            name = entry.pop("use")
            title = str(entry.pop("as", name))
            if title in columns:
                raise ValueError(f"countermeasures has two columns {title!r}: as gives a column another name.")
            countermeasures.get(name).require_learning(self.method)
            purifies = countermeasures.get(name).needs_purifier
            start = _start(title, entry, self.method)
            uses_collected = countermeasures.get(name).needs_pairs or start.get("init_from") == COLLECTED
            numbers = {key: entry.pop(key) for key in ("draws", "collected") if key in entry}
            for key, value in numbers.items():
                used = purifies or (key == "collected" and uses_collected)
                if type(value) is not int or value < 1 or not used:
                    raise ValueError(
                        f"countermeasures has {title!r} with {key} {value!r}, but {key} must be a number of at least "
                        "1, and goes with a countermeasure that purifies."
                    )
            if self.purifier is not None and purifies and "collected" in numbers:
                raise ValueError(
                    f"countermeasures has {title!r} with collected {numbers['collected']}, but purifier names a "
                    "trained one: leave one of the two out."
                )
            config = _replaced(name, entry) if entry else None
            if self.full_recipe.smoke and purifies:
                config = SMOKE_PURIFICATION
            columns[title] = Column(name, config, **numbers, **start)
        return columns


def _start(title: str, entry: dict, method: str) -> dict[str, str]:
    """What a column says of the victim's start, taken out of its entry."""
    start = {key: entry.pop(key) for key in ("init_from", "finetune") if key in entry}
    if start and (not isinstance(start.get("init_from"), str) or start.get("finetune", "all") not in FINETUNE):
        raise ValueError(
            f"countermeasures has {title!r} with {start}, but init_from must be {COLLECTED!r}, a file, a folder or a "
            f"Hub id, and finetune one of {', '.join(FINETUNE)}."
        )
    if start and method != "supervised":
        raise ValueError(f"countermeasures has {title!r} with init_from, but method must be 'supervised' for that.")
    return start


def _replaced(name: str, fields: Mapping[str, Any]) -> PurificationConfig:
    """A purifying countermeasure's settings with some of them replaced."""
    measure = countermeasures.get(name)
    purifying = [part for part in measure.parts or (measure,) if part.needs_purifier]
    known = {field.name for field in dataclasses.fields(PurificationConfig)}
    unknown = sorted(set(fields) - known)
    if len(purifying) != 1 or unknown:
        raise ValueError(
            f"countermeasures has {name!r} with {', '.join(unknown or fields)}, but only a countermeasure that "
            "purifies takes settings, those of PurificationConfig."
        )
    return PurificationConfig(**purifying[0].settings).changed(**fields)


def typed(entry: str, fields: Mapping[str, Any], kind: Callable) -> dict[str, Any]:
    """
    Fields of a dataclass, or arguments of a function, as YAML has them, lists as tuples.

    Raises:
        ValueError: If one is unknown or has a value of another type than the field.
    """
    hints = typing.get_type_hints(kind)
    types = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}
    values = {}
    for name, value in fields.items():
        if name not in types:
            raise ValueError(f"{entry} has {name!r}, which is no field of {kind.__name__}.")
        union = typing.get_origin(types[name]) in (typing.Union, UnionType)
        accepted = [
            typing.get_origin(one) or one for one in (typing.get_args(types[name]) if union else [types[name]])
        ]
        values[name] = value = tuple(value) if isinstance(value, list) and tuple in accepted else value
        numbers = (int, float) if float in accepted else ()
        if typing.Any not in accepted and type(value) not in (*accepted, *numbers):
            known = " or ".join("nothing" if one is NoneType else one.__name__ for one in accepted)
            raise ValueError(f"{entry} has {name} {value!r}, but its type must be {known}.")
        if isinstance(value, tuple) and not all(type(number) is int for number in value):  # as all tuples are
            raise ValueError(f"{entry} has {name} {value!r}, but its entries must be whole numbers.")
    return values


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line} has {key.value!r} again, but a key must be there once")
            seen.add(key.value)
        return node


def read_grid(path: str | Path, **changes) -> Grid:
    """
    Read a grid file.

    Args:
        path (`str` or `Path`): YAML.
        changes: Fields that replace the file's, where not None.

    Raises:
        ValueError: If it holds what no grid has, in one sentence.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"grid {str(path)!r} is no YAML: {' '.join(str(error).split())}.") from error
    known = {field.name for field in dataclasses.fields(Grid)}
    entries = list(values) if isinstance(values, dict) else []
    unknown = [entry for entry in entries if entry not in known]
    missing = sorted({"name", "data", "poisons", "countermeasures"} - set(entries))
    if unknown or missing:
        problem = f"holds {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ValueError(f"grid {str(path)!r} {problem}, but its entries are {', '.join(sorted(known))}.")
    # YAML 1.1 reads a bare none as the string; null and an empty entry mean the same here.
    for name in ("poisons", "countermeasures"):
        if isinstance(values[name], list):
            values[name] = ["none" if entry is None else entry for entry in values[name]]
    values = typed(f"grid {str(path)!r}", values, Grid)
    return Grid(**values | {name: value for name, value in changes.items() if value is not None})


def _check_source(role: str, entry: Any) -> None:
    """Refuse what a role's entry cannot be, before anything is loaded."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ValueError(f"data has for {role} {entry!r}, but must have a dict with source, a path or Hub id.")
    first, count = entry.get("first", 0), entry.get("count")
    if not all(type(number) is int for number in (first, 0 if count is None else count)):
        raise ValueError(f"data has for {role} first {first!r} and count {count!r}, but both must be whole numbers.")
    own = ("first", "count", "name") if role == "collected" else ("first", "count")
    options = {name: value for name, value in entry.items() if name not in own}
    typed(f"data for {role}", options, load_images)
