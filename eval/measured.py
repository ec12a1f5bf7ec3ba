"""Records of grids, looked up by what was measured; experiments that no table or picture may mix are refused."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from jcdp_diffusers import trials
from jcdp_diffusers.countermeasures import assumed
from jcdp_diffusers.poisons import NAMES as POISON_NAMES
from jcdp_diffusers.poisons import get as get_poison
from jcdp_diffusers.poisons.control import SUFFIX as CONTROL
from jcdp_diffusers.results import read_records
from jcdp_diffusers.victims import METHODS


NOT_MEASURED = "n.m."
METHODS_SAID = {"supervised": "supervised", "simclr": "SimCLR", "moco-v2": "MoCo v2", "byol": "BYOL"}
OF_THE_FIGURES = "Test accuracy in % after the last epoch, mean ± standard deviation over seeds."
ROLES_SAID = {
    "disjoint": "Roles disjoint: what learns from collected images has seen neither protected nor test images.",
    "paper": "**Roles as in the paper: what learns from collected images has been trained on the test images.**",
    "unknown": "**Nobody knows whether the purifier has seen protected or test images: it does not list its own.**",
}
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
POISONS = {name: get_poison(name).title for name in POISON_NAMES}
# In the order of tables: before training, while training, purification by others, ours.
COLUMNS = {
    "none": "vanilla",
    "iss": "ISS (best of three)",
    "gray": "gray",
    "jpeg-10": "JPEG-10",
    "bdr-2": "BDR-2",
    "orthogonal-projection": "orthogonal projection",
    "rsk": "RSK",
    "coin": "COIN",
    "random-noise": "random noise",
    "cutout": "Cutout",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "fast-autoaugment": "Fast AutoAugment",
    "ueraser-lite": "AA / UEraser-Lite",
    "ueraser": "UEraser",
    "ueraser-max": "UEraser-Max",
    "at-8": "adversarial training",
    "at-4": "adversarial training, 4/255",
    "avatar": "AVATAR",
    "avatar, 10 evaluations": "AVATAR, 10 evaluations",
    "gdmp": "GDMP",
    "gdmp, 1 round of 9": "GDMP, 1 round of 9 evaluations",
    "eclipse, 4 evaluations": "ECLIPSE, 4 evaluations, not sparse",
    "eclipse, sparse": "ECLIPSE, 4 evaluations",
    "jcdp": "JCDP",
    "jcdp, 8 rounds of 2": "JCDP, 8 rounds of 2",
    "jcdp+corruption": "JCDP, then corruption",
    "unconditional": "diffusion without guide",
    "unconditional, 4 draws": "diffusion without guide, 4 draws",
    "unconditional+corruption": "diffusion without guide, then corruption",
    "coloured noise": "diffusion of coloured noise",
    "coloured noise, 4 draws": "diffusion of coloured noise, 4 draws",
    "coloured noise, trained longer": "diffusion of coloured noise, purifier trained three times as long",
    "coloured noise, trained longer, 4 draws": "the same, 4 draws",
    "coloured noise, 2 rounds, then corruption": "diffusion of coloured noise, 2 rounds, then corruption",
    "impulse-filter": "impulse filter",
    "impulse-filter+unconditional+corruption": "impulse filter, diffusion without guide, corruption",
    "impulse filter, coloured noise, 2 rounds, corruption": "impulse filter, coloured noise, 2 rounds, corruption",
    "d-vae": "D-VAE",
    "d-vae-small": "D-VAE, small",
    "pretrained": "victim pretrained on collected images (SimCLR)",
    "paired": "paired purifier",
    "paired-small": "paired purifier, small",
    # Published, not among ours.
    "gaussian-filter": "Gaussian filter",
    "bridgepure-0.5k": "BridgePure-0.5K",
    "bridgepure-4k": "BridgePure-4K",
}
PROVENANCE = ("trial", *trials.PROVENANCE)  # where a figure is from, not what it is of
OF_THE_PURIFIER = ("collected", "purifier_origin", "purifier_steps")  # a grid says them of all of its trials
BASELINES = {"at-8": "of adversarial training's", "ueraser": "of UEraser's"}


class Key(NamedTuple):
    """What a cell is called in a table. Without a purifier the last three are None."""

    dataset: str
    poison: str
    poison_preset: str | None
    column: str
    collected: str | None
    purifier_origin: str | None
    purifier_steps: int | None


class Setup(NamedTuple):
    """What seconds were measured on, and in which way."""

    device: str | None
    threads: int | None
    precision: str | None
    machine: str | None

    def words(self) -> dict[str, str]:
        """What the reader of a table needs to know of it; the machine has no name."""
        return {
            "devices": str(self.device),
            "numbers of threads": f"{self.threads} threads",
            "precisions": self.precision or "unknown precision",
        }


class Measured:
    """
    Accuracies and costs of one scale: one data set size, test set, recipe, victim and assignment of roles.

    Args:
        records (`Iterable[dict]`): Of one or more grids. Of several records of one cell and seed the last counts.
        roles (`str`): Which records count of what learns from collected images; others have no roles.
        victim (`str`): Which victim's.
        method (`str`): Of victims that learn in which way. Their figures mean different things and are never mixed.
        smoke (`bool`): Whether records of smoke runs are wanted, and no others.

    Raises:
        ValueError: If the records differ in more than a table tells apart: a mean over them would mean nothing.
    """

    def __init__(
        self,
        records: Iterable[Mapping],
        *,
        roles: str = "disjoint",
        victim: str = "resnet18",
        method: str = "supervised",
        smoke: bool = False,
    ):
        records = [
            record
            for record in records
            if record["what"] in ("accuracy", "victim")
            and "column" in (settings := record.get("settings", {}))
            and settings.get("victim") == victim
            and settings.get("method", "supervised") == method
            and settings["recipe"]["smoke"] == smoke
        ]
        self.other_roles = sorted({roles_of(record["settings"]) for record in records} - {None, roles})
        records = [record for record in records if roles_of(record["settings"]) in (None, roles)]
        self.roles, self.victim, self.method = roles, victim, method
        _refuse_mixtures([record["settings"] for record in records])
        _refuse_devices(records)
        self._cells: dict[Key, dict[str, dict[int, Mapping]]] = {}
        for record in records:
            by_what = self._cells.setdefault(_key(record["settings"]), {"accuracy": {}, "victim": {}})
            by_what[record["what"]][record["seed"]] = record
        self.scales = sorted({scale_in_words(record["settings"]) for record in records})

    def datasets(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(key.dataset for key, by_what in self._cells.items() if by_what["accuracy"]))

    def keys(self, dataset: str) -> list[Key]:
        """Cells with an accuracy, in the order in which they were measured."""
        return [key for key, by_what in self._cells.items() if by_what["accuracy"] and key.dataset == dataset]

    def poisons(self, dataset: str) -> list[tuple[str, str | None]]:
        """
        Those that were measured, each with its preset, without controls: clean images first, then in the order of
        the registry, then poisons that are on record but not in the registry.
        """
        found = dict.fromkeys(
            (key.poison, key.poison_preset) for key in self.keys(dataset) if not key.poison.endswith(CONTROL)
        )
        known = [pair for name in ("none", *POISONS) for pair in found if pair[0] == name]
        return [*known, *(pair for pair in found if pair not in known)]

    def poison_title(self, dataset: str, poison: str, preset: str | None) -> str:
        """With the preset where it is not the only one."""
        presets = {key.poison_preset for key in self.keys(dataset) if key.poison == poison}
        name = POISONS.get(poison, "clean" if poison == "none" else poison)
        return f"{name} ({preset})" if len(presets) > 1 else name

    def column_title(self, key: Key) -> str:
        """With what is said of the purifier where it is not the only one, or was trained on other data."""
        alike = [other for other in self.keys(key.dataset) if other.column == key.column]
        told = [
            f"{name} {getattr(key, name)}"
            for name in OF_THE_PURIFIER
            if len({getattr(other, name) for other in alike}) > 1
            or name == "collected"
            and key.collected not in (None, key.dataset)
        ]
        return ", ".join([COLUMNS.get(key.column, key.column), *told])

    def assumption(self, dataset: str, column: str) -> str:
        """For behind a column's title: what it assumes of an attacker beyond what others do."""
        keys = [key for key in self.keys(dataset) if key.column == column]
        told = {one["settings"].get("assumes", "") for key in keys for one in self._cells[key]["accuracy"].values()}
        return assumed("; ".join(sorted(told - {""})))

    def by_seed(self, what: str, key: Key) -> dict[int, Mapping]:
        """Records of one cell: `accuracy`, or `victim` for its details."""
        return self._cells[key][what]

    def find(self, what: str, dataset, poison, column, *, collected=None, **others) -> list[Mapping]:
        """
        Records of the one cell that fits, one per seed; none if there is no such cell.

        Args:
            collected (`str`, *optional*): What its purifier, if it has one, was trained on; the data set by default.
            others: Further fields of `Key`; None for any.
        """
        wanted = {"dataset": dataset, "poison": poison, "column": column} | others
        keys = [
            key
            for key in self._cells
            if key.collected in (None, collected or dataset)
            and all(value in (None, getattr(key, name)) for name, value in wanted.items())
        ]
        refuse_differences(f"{column!r} against {poison!r} on {dataset}", [key._asdict() for key in keys])
        return list(self._cells[keys[0]][what].values()) if keys else []

    def accuracies(self, dataset, poison, column, **others) -> list[float]:
        """Per cent, one figure per seed; empty if not measured. See `find`."""
        return [100 * record["value"] for record in self.find("accuracy", dataset, poison, column, **others)]

    def training_accuracies(self, dataset, poison, column, **others) -> list[float]:
        """Per cent, on the images that the victim was trained on, one figure per seed."""
        found = self.find("victim", dataset, poison, column, **others)
        return [100 * record["value"]["train_accuracy"] for record in found]

    def settings_of_poison(self, dataset: str, poison: str, preset: str | None) -> Mapping:
        """What a record of any of its cells says, in all of which the poison is the same; empty if not measured."""
        key = next((one for one in self.keys(dataset) if (one.poison, one.poison_preset) == (poison, preset)), None)
        return {} if key is None else next(iter(self.by_seed("accuracy", key).values()))["settings"]

    def seconds(self, dataset, column, collected) -> dict[tuple, tuple[float, float]]:
        """Mean seconds before and of training over seeds, by poison, preset and what they were measured on."""
        found: dict[tuple, list] = {}
        for poison, preset in self.poisons(dataset):
            for record in self.find("victim", dataset, poison, column, collected=collected, poison_preset=preset):
                value = record["value"]
                # Records do not name the processor. Machines had different versions of torch, which stand for it.
                machine = record.get("packages", {}).get("torch")
                setup = Setup(record.get("device"), value.get("threads"), value.get("precision"), machine)
                found.setdefault((poison, preset, setup), []).append(
                    (value["prepare_seconds"], value["train_seconds"])
                )
        return {place: tuple(map(statistics.fmean, zip(*pairs))) for place, pairs in found.items()}


def refuse_differences(of: str, settings: Sequence[Mapping], facts: Callable[[Mapping], Mapping] = dict) -> None:
    """
    Refuse to take different settings for the same.

    Args:
        of (`str`): What they are settings of, for the error.
        settings (`Sequence[Mapping]`): Of records.
        facts (`Callable`): What of them must be the same.
    """
    for other in settings[1:]:
        one, two = flattened(facts(settings[0])), flattened(facts(other))
        if names := [name for name in one | two if one.get(name) != two.get(name)]:
            several_grids = settings[0].get("grid") != other.get("grid")
            values = [
                repr(flat.get(names[0])) + (f" (grid {whole.get('grid')})" if several_grids else "")
                for flat, whole in ((one, settings[0]), (two, other))
            ]
            raise ValueError(
                f"records hold {of} with {names[0]} {values[0]} and {values[1]}, which cannot be told apart here: "
                "give the records of one of them alone (--grid, --protocol, --poisons and --columns choose)."
            )


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chosen_records`."""
    parser.add_argument("--records", required=True, nargs="+", help="JSON Lines files of eval/benchmark.py")
    parser.add_argument("--grid", help="records of this grid alone")
    parser.add_argument("--protocol", help="records of this recipe alone")
    parser.add_argument("--poisons", nargs="+", metavar="NAME", help="of the grid and no others; none: clean images")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="of the grid and no others; in pictures in this order"
    )


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which records a table or a picture is made from; see `chosen_records` and `Measured`."""
    add_selection_arguments(parser)
    parser.add_argument("--victim", default="resnet18")
    parser.add_argument("--method", default="supervised", choices=METHODS, help="how the victims learned")
    parser.add_argument("--smoke", action="store_true", help="records of smoke runs, which mean nothing")


def chosen_records(args: argparse.Namespace) -> list[dict]:
    """
    Records of a command's files, in their order: those of one grid, protocol, or set of poisons or columns where it
    names one.

    Raises:
        ValueError: If a file cannot be read, or no record has what is named.
    """
    records = []
    for path in args.records:
        try:
            records += read_records(path)
        except OSError as error:
            raise ValueError(f"records is {path!r}, but that cannot be read: {error.strerror}.") from error
    facts = {
        "grid": lambda record: record.get("settings", {}).get("grid"),
        "protocol": lambda record: record.get("protocol"),
        "poisons": lambda record: record.get("settings", {}).get("poison"),
        "columns": lambda record: record.get("settings", {}).get("column"),
    }
    for name, fact in facts.items():
        wanted = getattr(args, name)
        if wanted is not None:
            wanted = [wanted] if isinstance(wanted, str) else wanted
            known = [one for one in dict.fromkeys(map(fact, records)) if one is not None]
            if missing := [one for one in wanted if one not in known]:
                raise ValueError(f"{name} is {missing[0]!r}, but the records have {', '.join(known) or 'none'}.")
            records = sorted((r for r in records if fact(r) in wanted), key=lambda record: wanted.index(fact(record)))
    return records


def roles_of(settings: Mapping) -> str | None:
    """What a purifier, a victim's start or whatever else learned from collected images; None where nothing did."""
    learns = {"pairs", "collected_images"} & settings.keys() or settings.get("init_from", {}).get("pretraining")
    return settings.get("roles", "disjoint" if learns else None)  # only purifiers say that they are disjoint


def identity(settings: Mapping) -> dict:
    """All that decides a figure but the seed."""
    # What was trained on counts although the poison's settings are there: controls were once made in another way.
    aside = PROVENANCE if "purifier" in settings else (*PROVENANCE, *OF_THE_PURIFIER)
    return {name: value for name, value in settings.items() if name not in aside}


def _key(settings: Mapping) -> Key:
    return Key(**{name: identity(settings).get(name) for name in Key._fields})


_OF_A_SCALE = ("test", "probe", "victim", "whitening", "width", "recipe")


def _scale(settings: Mapping) -> dict:
    train = {name: value for name, value in settings["train"].items() if name != "content"}
    return {"train": train} | {name: settings.get(name) for name in _OF_A_SCALE}


def _poison_facts(settings: Mapping) -> dict:
    return {name: settings.get(name) for name in ("poison_seed", "poison_settings", "train")}


def _refuse_mixtures(settings: Sequence[Mapping]) -> None:
    """One table, one scale; under one name in it, one poison; in one cell, one experiment."""
    checks = (
        (lambda one: one["dataset"], _scale, "{dataset}"),
        (lambda one: _key(one)[:3], _poison_facts, "{poison!r} on {dataset}"),
        (_key, identity, "{column!r} against {poison!r} on {dataset}"),
    )
    for name, facts, title in checks:
        groups: dict = {}
        for one in settings:
            groups.setdefault(name(one), []).append(one)
        for group in groups.values():
            refuse_differences(title.format(**group[0]), group, facts)


def _refuse_devices(records: Iterable[Mapping]) -> None:
    """In one cell, one kind of device and one precision, of victims and, where records have it, of purification."""
    groups: dict = {}
    for record in records:
        if record["what"] == "victim":
            groups.setdefault(_key(record["settings"]), []).append(record)
    for key, group in groups.items():
        of = f"{key.column!r} against {key.poison!r} on {key.dataset}"
        victims = [{"device": one.get("device"), "precision": one["value"].get("precision")} for one in group]
        purified = [one["value"]["purified_in"] for one in group if one["value"].get("purified_in") is not None]
        refuse_differences(of, victims)
        refuse_differences(of, [{"purified_in": precision} for precision in purified])


def flattened(settings: Mapping, before: str = "") -> dict:
    """Nested settings by dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return flat


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, or that there is none."""
    if not values:
        return NOT_MEASURED
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def scale_in_words(settings: Mapping) -> str:
    learner = f"{settings['victim']} of width {settings['width']}"
    if "method" in settings:
        learner += f" by {METHODS_SAID[settings['method']]} with a linear probe"
    return (
        f"{settings['dataset']}: {settings['train']['images']} training images, {learner}, protocol "
        f"{settings['recipe']['name']}, {settings['recipe']['epochs']} epochs"
    )
