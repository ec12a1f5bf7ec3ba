"""
A grid of poisons, countermeasures, victims and seeds from one small file.

    python eval/benchmark.py GRID.yaml --output DIR

Every trial is a victim and a record, named by the content of all that decides it. So the command can be stopped at any
time and given again, measures only what is missing when the grid grows, and can be given in several shells, under
`accelerate launch` or `torchrun`: the processes share the trials. `eval/README.md` shows a grid file.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import torch
import yaml

from jcdp_diffusers import countermeasures, poisons, victims
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.cli import ends_in_one_sentence
from jcdp_diffusers.countermeasures.purifiers import check_purifier_suits
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.data.checks import ROLES, check_separation, check_sets, few_of_each_class
from jcdp_diffusers.data.examples import digits
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms
from jcdp_diffusers.devices import available_cores
from jcdp_diffusers.perceptual import load_perceptual
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.poisons.control import shuffled
from jcdp_diffusers.poisons.protect import protect_dataset, read_card
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.purify.shards import Claims
from jcdp_diffusers.results import as_settings
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.default_purifier import SMOKE_PURIFICATION, Plan, plan_for, purifier_to_be, train_planned
from jcdp_diffusers.train.provenance import check_trained_on
from jcdp_diffusers.train.unets import UNETS
from jcdp_diffusers.trials import Trial, claims_folder, describe_images, measure
from jcdp_diffusers.victims import RECIPES, Recipe


DIGITS = (900, 500, 397)
SMOKE_IMAGES = 200
DATA_ROLES = ("protected", "collected", "test")
UNKNOWN = "unknown"  # the roles of records whose purifier may have seen any image
CONTROL = "-control"


@dataclasses.dataclass(frozen=True)
class Column:
    """
    What is done against a poison, as a grid file says it.

    Args:
        countermeasure (`str`): A name of `countermeasures`, or several joined by `+`.
        purification (`PurificationConfig`, *optional*): Replaces the countermeasure's own settings.
        draws (`int`): See `Trial`.
        collected (`int`, *optional*): How many of the collected images train the purifier; all by default.
    """

    countermeasure: str
    purification: PurificationConfig | None = None
    draws: int = 1
    collected: int | None = None

    @property
    def needs_purifier(self) -> bool:
        return countermeasures.get(self.countermeasure).needs_purifier


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
            called), `draws` (see `Trial`), `collected` (how many of the collected images train this column's purifier,
            from the first) and fields of `PurificationConfig` that replace the countermeasure's own.
        protocol (`str`): The victims' recipe.
        recipe (`dict`): Fields that replace the protocol's.
        victims (`list`), width (`int`), seeds (`list`): Of the victims.
        poison_preset (`str`), poison_seed (`int`): See `poisons.settings`.
        roles (`str`): `disjoint`; or `paper`, where the test images train the purifier.
        purifier (`str`): Folder or Hub id; else one is trained on the collected images. If it does not list what it
            was trained on (`jcdp_diffusers.train.provenance`), its records have roles `unknown` and their own table.
        unet (`str`), training (`dict`): Of the purifier that is trained, instead of what suits images and device;
            `training` holds fields of `TrainingConfig`.
        perceptual (`str`): The perceptual network that goes with a purifier trained here; see `load_perceptual`.
        about (`dict`): Further facts for the records, such as `purifier_origin`.
    """

    name: str
    data: Any
    poisons: list
    countermeasures: list
    protocol: str = "fast"
    recipe: dict = dataclasses.field(default_factory=dict)
    victims: list = dataclasses.field(default_factory=lambda: ["resnet18"])
    width: int | None = None
    seeds: list = dataclasses.field(default_factory=lambda: [0, 1, 2])
    poison_preset: str = "published"
    poison_seed: int = 0
    roles: str = "disjoint"
    purifier: str | None = None
    unet: str | None = None
    training: dict = dataclasses.field(default_factory=dict)
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
        for entry in self.poisons:
            if entry != "none" and str(entry).removesuffix(CONTROL) not in poisons.NAMES:
                raise ValueError(
                    f"poisons has {entry!r}, but accepted are none, {', '.join(poisons.NAMES)}, and these with "
                    f"{CONTROL} behind them."
                )
        for column in self.countermeasures:
            words = column if isinstance(column, dict) else {"use": column}
            if not all(isinstance(word, str) for word in (*words, words.get("use"), words.get("as", ""))):
                raise ValueError(
                    f"countermeasures has {column!r}, but a column needs use, a countermeasure's name; its entries' "
                    "names and as are strings."
                )
        for victim in self.victims:
            victims.get(victim)
        if self.protocol not in RECIPES:
            raise ValueError(f"protocol is {self.protocol!r}, but must be one of {', '.join(RECIPES)}.")
        if self.roles not in ROLES:
            raise ValueError(f"roles is {self.roles!r}, but must be one of {', '.join(ROLES)}.")
        _typed("recipe", self.recipe, Recipe)
        if self.unet is not None and self.unet not in UNETS:
            raise ValueError(f"unet is {self.unet!r}, but must be one of {', '.join(UNETS)}.")
        _typed("training", self.training, TrainingConfig)
        if self.data != "digits":
            if not isinstance(self.data, dict) or not set(DATA_ROLES) <= self.data.keys():
                raise ValueError(f"data is {self.data!r}, but must be 'digits' or have {', '.join(DATA_ROLES)}.")
            for role in DATA_ROLES:
                _check_source(role, self.data[role])
        self.columns()

    @property
    def full_recipe(self) -> Recipe:
        """The protocol with what the grid changes of it."""
        return dataclasses.replace(RECIPES[self.protocol], **_typed("recipe", self.recipe, Recipe))

    def columns(self) -> dict[str, Column]:
        """Columns by their name."""
        columns = {}
        for entry in self.countermeasures:
            entry = {"use": entry} if isinstance(entry, str) else dict(entry)
            name = entry.pop("use")
            title = str(entry.pop("as", name))
            if title in columns:
                raise ValueError(f"countermeasures has two columns {title!r}: as gives a column another name.")
            purifies = countermeasures.get(name).needs_purifier
            numbers = {key: entry.pop(key) for key in ("draws", "collected") if key in entry}
            for key, value in numbers.items():
                if type(value) is not int or value < 1 or not purifies:
                    raise ValueError(
                        f"countermeasures has {title!r} with {key} {value!r}, but {key} must be a number of at least "
                        "1, and goes with a countermeasure that purifies."
                    )
            if self.purifier is not None and "collected" in numbers:
                raise ValueError(
                    f"countermeasures has {title!r} with collected {numbers['collected']}, but purifier names a "
                    "trained one: leave one of the two out."
                )
            config = _replaced(name, entry) if entry else None
            if self.full_recipe.smoke and purifies:
                config = SMOKE_PURIFICATION
            columns[title] = Column(name, config, **numbers)
        return columns


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
    return PurificationConfig(**dict(purifying[0].settings) | dict(fields))


def _typed(entry: str, fields: Mapping[str, Any], kind: Callable) -> dict[str, Any]:
    """
    Fields of a dataclass, or arguments of a function, as YAML has them, lists as tuples.

    Raises:
        ValueError: If one is unknown or has a value of another type than the field.
    """
    types = typing.get_type_hints(kind)
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
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"grid {str(path)!r} is no YAML: {' '.join(str(error).split())}.") from error
    known = {field.name for field in dataclasses.fields(Grid)}
    unknown = sorted(set(values) - known) if isinstance(values, dict) else ["no entries"]
    missing = sorted({"name", "data", "poisons", "countermeasures"} - set(values or ()))
    if unknown or missing:
        problem = f"holds {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ValueError(f"grid {str(path)!r} {problem}, but its entries are {', '.join(sorted(known))}.")
    # YAML 1.1 reads a bare none as the string; null and an empty entry mean the same here.
    for name in ("poisons", "countermeasures"):
        if isinstance(values[name], list):
            values[name] = ["none" if entry is None else entry for entry in values[name]]
    values = _typed(f"grid {str(path)!r}", values, Grid)
    return Grid(**values | {name: value for name, value in changes.items() if value is not None})


def run_grid(
    grid: Grid,
    output_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    processes: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """
    Measure what is missing of a grid.

    Args:
        grid (`Grid`): What to measure.
        output_dir (`str` or `Path`): Gets `records.jsonl`; protected and purified images and the purifier are kept
            beside it.
        device, processes, progress: See `trials.measure`.
        say (`Callable`): Where a line about each stage goes.

    Returns:
        `list[Trial]`: All trials of the grid, each of them on record.
    """
    output_dir, device = Path(output_dir), torch.device(device)
    perceptual = None if grid.perceptual is None else load_perceptual(grid.perceptual)
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    claims_folder(records).mkdir(parents=True, exist_ok=True)
    data_name, clean, collected, test = load_roles(grid)
    check_sets({"protected": clean, "test": test}, {"collected": collected})
    check_separation(clean, collected, test, None, roles=grid.roles)
    columns = grid.columns()
    for column in columns.values():
        if column.needs_purifier:
            if grid.purifier is None:
                images = _collected_for(column.collected, collected)
                pipe = purifier_to_be(_planned(images, grid, device), images, perceptual)
            else:
                pipe = JointConditionalPurificationPipeline.from_pretrained(grid.purifier)
            check_purifier_suits(countermeasures.get(column.countermeasure), pipe, column.purification, clean)
    roles = grid.roles
    if grid.purifier is not None:
        own = {"protected": clean, "test": test}
        if check_trained_on(grid.purifier, own, roles=roles) is None:
            roles = UNKNOWN
            say(f"{grid.purifier} does not list the images that trained it: its trials get the roles {roles!r}.")
    say(f"{grid.name}: {len(clean)} images to protect, {len(collected)} collected, {len(test)} for the test")

    with Claims(claims_folder(records)) as claims:
        protected = {}
        for name in grid.poisons:
            protected[name] = (
                (clean, {}) if name == "none" else _protect(clean, name, grid, output_dir, claims, device)
            )
            if name != "none":
                check_separation(protected[name][0], collected, test, clean, roles=grid.roles)
        purifiers = _purifiers(columns, collected, grid, perceptual, output_dir, claims, device, say)

    facts = {"grid": grid.name, "dataset": data_name, "collected": _collected_name(grid, data_name), **grid.about}
    trials = []
    for seed in grid.seeds:  # a whole table of one seed comes before the second seed
        for victim in grid.victims:
            for poison, (images, poison_facts) in protected.items():
                for title, column in columns.items():
                    about = facts | {"poison": poison, "column": title, **poison_facts}
                    if column.needs_purifier:
                        about |= {"roles": roles}
                    if column.collected is not None:
                        about |= {"collected_count": column.collected}
                    trials.append(
                        Trial(
                            images,
                            test,
                            grid.full_recipe,
                            seed,
                            victim=victim,
                            width=grid.width,
                            countermeasure=column.countermeasure,
                            purifier=purifiers.get(title),
                            purification=column.purification,
                            draws=column.draws,
                            work_dir=output_dir / "prepared",
                            about=about,
                        )
                    )
    measure(trials, records, device=device, processes=processes, progress=progress)
    return trials


def load_roles(grid: Grid) -> tuple[str, LabelledImages, LabelledImages, LabelledImages]:
    """Name of the data, and its three roles: clean images to protect, collected, test."""
    if grid.data == "digits":
        name, (clean, collected, test) = "digits", digits(DIGITS)
    else:
        clean, collected, test = (_load(role, grid.data[role]) for role in DATA_ROLES)
        name = str(grid.data.get("name", grid.name))
    if grid.roles == "paper":
        collected = test
    if grid.full_recipe.smoke:
        clean, test = few_of_each_class(clean, SMOKE_IMAGES), few_of_each_class(test, SMOKE_IMAGES)
        collected = test if grid.roles == "paper" else collected.subset(range(min(SMOKE_IMAGES, len(collected))))
    return name, clean, collected, test


def _check_source(role: str, entry: Any) -> None:
    """Refuse what a role's entry cannot be, before anything is loaded."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ValueError(f"data has for {role} {entry!r}, but must have a dict with source, a path or Hub id.")
    first, count = entry.get("first", 0), entry.get("count")
    if not all(type(number) is int for number in (first, 0 if count is None else count)):
        raise ValueError(f"data has for {role} first {first!r} and count {count!r}, but both must be whole numbers.")
    options = {name: value for name, value in entry.items() if name not in ("name", "first", "count")}
    _typed(f"data for {role}", options, load_images)


def _load(role: str, entry: Mapping[str, Any]) -> LabelledImages:
    entry = dict(entry)
    entry.pop("name", None)  # what records call it
    first, count = entry.pop("first", 0), entry.pop("count", None)
    try:
        data = load_images(entry.pop("source"), **entry)
    except (ValueError, OSError) as error:
        raise ValueError(f"data has for {role}: {error}") from error
    end = len(data) if count is None else first + count
    if not 0 <= first < end <= len(data):
        raise ValueError(f"data has for {role} the rows {first} to {end}, but the source has {len(data)}.")
    return data.subset(range(first, end))


def _collected_name(grid: Grid, data_name: str) -> str:
    return str(grid.data["collected"].get("name", data_name)) if isinstance(grid.data, dict) else data_name


def _once(claims: Claims, name: str, is_done: Callable[[], bool], do: Callable[[], Any]) -> None:
    """Do something in one of several processes, while the others wait for it."""
    while not is_done():
        if claims.take(name):
            try:
                if not is_done():
                    do()
            finally:
                claims.release(name)
        else:
            time.sleep(1)


def _protect(clean, entry: str, grid: Grid, output_dir: Path, claims: Claims, device) -> tuple[LabelledImages, dict]:
    """The protected images, made once and kept, and what their card says; or the control made from them."""
    name = entry.removesuffix(CONTROL)
    preset = "smoke" if grid.full_recipe.smoke else grid.poison_preset
    folder = output_dir / "poisons" / f"{name}-{preset}-{grid.poison_seed}-{describe_images(clean)['content'][:8]}"
    options = {"method": name, "preset": preset, "seed": grid.poison_seed, "device": device, "source": None}
    _once(claims, folder.name, (folder / "README.md").exists, lambda: protect_dataset(clean, folder, **options))
    data = protect_dataset(clean, folder, **options)
    card = read_card(folder)
    facts = {"poison_preset": preset, "poison_seed": grid.poison_seed, "poison_settings": card["settings"]}
    protected = clean.with_images(data.images)
    if entry.endswith(CONTROL):
        noise = shuffled(protected.tensor() - clean.tensor(), seed=grid.poison_seed)
        protected = clean.with_images(apply_perturbation(clean.images, noise))
        return protected, facts | {"poison_norms": measured_norms(clean.images, protected.images)}
    return protected, facts | {"poison_norms": card["measured"], "poison_seconds": card["seconds"]}


def _purifiers(
    columns: Mapping[str, Column], collected, grid: Grid, perceptual, output_dir: Path, claims: Claims, device, say
) -> dict[str, str]:
    """The purifier of each column that needs one, trained where the grid names none."""
    counts = {title: column.collected for title, column in columns.items() if column.needs_purifier}
    if grid.purifier is not None:
        return dict.fromkeys(counts, grid.purifier)
    folders = {}
    for count in dict.fromkeys(counts.values()):
        images = _collected_for(count, collected)
        folders[count] = str(_train(images, grid, perceptual, output_dir, claims, device, say))
    return {title: folders[count] for title, count in counts.items()}


def _collected_for(count: int | None, collected: LabelledImages) -> LabelledImages:
    """The collected images that train a column's purifier."""
    if count is not None and count > len(collected):
        raise ValueError(f"countermeasures has collected {count}, but {len(collected)} images are collected.")
    return collected if count is None else collected.subset(range(count))


def _planned(collected: LabelledImages, grid: Grid, device: torch.device) -> Plan:
    """What suits images and device, with what the grid changes of it."""
    plan = plan_for(collected, device, grid.full_recipe.smoke)
    training = dataclasses.replace(
        plan.training,
        cpu=device.type == "cpu",
        resume_from_checkpoint="latest",
        **_typed("training", grid.training, TrainingConfig),
    )
    return dataclasses.replace(plan, unet=grid.unet or plan.unet, training=training)


def _train(collected, grid: Grid, perceptual, output_dir: Path, claims: Claims, device, say) -> Path:
    """The purifier, trained once and kept."""
    plan = _planned(collected, grid, device)
    told = [plan.unet, as_settings(plan.training), describe_images(collected), grid.perceptual]
    digest = hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=4)
    folder = output_dir / f"purifier-{digest.hexdigest()}"
    done = folder / "finished"

    def train():
        say(f"Training a purifier on {len(collected)} images: {plan.unet}, {plan.training.max_train_steps} steps")
        train_planned(plan, collected, folder, perceptual)
        done.touch()

    _once(claims, folder.name, done.exists, train)
    return folder


def leave_group() -> tuple[int, int, int]:
    """
    Make a process that `accelerate launch` or `torchrun` started work by itself.

    They share trials by their names in the file of records, and a purifier is trained by one of them, the same however
    many there are. Were they a group, that one would wait for the others to train with it.

    Returns:
        `tuple[int, int, int]`: Its number, how many there are, and its number on this machine.
    """
    told = [int(os.environ.pop(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    if torch.cuda.is_available():
        torch.cuda.set_device(told[2])
    return tuple(told)


def tables_command(grid: Grid, output_dir: str) -> str:
    """The command that shows what the grid measured, its first victim's if it has several."""
    options = ["--smoke"] if grid.full_recipe.smoke else []
    options += ["--roles", grid.roles] if grid.roles != "disjoint" else []
    options += ["--victim", grid.victims[0]] if grid.victims[0] != "resnet18" else []
    return shlex.join(["python", "eval/tables.py", "grid", "--records", f"{Path(output_dir)}/records.jsonl", *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("grid", metavar="GRID.yaml")
    parser.add_argument("--output", required=True, help="folder for records and whatever costs to make again")
    parser.add_argument("--protocol", choices=tuple(RECIPES), help="instead of the grid's")
    parser.add_argument("--roles", choices=("disjoint", "paper"), help="instead of the grid's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--processes", type=int, help="victims at a time on a CPU; one per processor if not given")
    parser.add_argument("--device", help="a GPU of its own for each process, or the CPU, if not given")
    args = parser.parse_args()
    keep_freed_memory()
    rank, world, place = leave_group()
    device = args.device or (f"cuda:{place}" if torch.cuda.is_available() else "cpu")
    processes = args.processes or max(1, available_cores() // world)
    with ends_in_one_sentence("benchmark"):
        grid = read_grid(args.grid, protocol=args.protocol, roles=args.roles, seeds=args.seeds)
        trials = run_grid(
            grid,
            args.output,
            device=device,
            processes=processes,
            progress=rank == 0,
            say=print if rank == 0 else lambda line: None,
        )
    if rank == 0:
        print(f"{len(trials)} trials on record: {tables_command(grid, args.output)}")


if __name__ == "__main__":
    main()
