"""
Tables from records: what a grid measured, and the paper's tables with our figures beside the published ones.

    python eval/tables.py grid --records DIR/records.jsonl
    python eval/tables.py poisons --records DIR/records.jsonl
    python eval/tables.py paper --records DIR/records.jsonl [--table "Table 1"]
    python eval/tables.py roles --records DIR/records.jsonl

A figure stands in a table only if it is on record. Records of several scales are refused, and so are those that would
stand in one cell and differ in any setting. Those of the two assignments of roles are never in one table, but for
`roles`, which is about the difference, and those of a smoke run never beside others.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from jcdp_diffusers import trials
from jcdp_diffusers.poisons import NAMES as POISON_NAMES
from jcdp_diffusers.poisons import get as get_poison
from jcdp_diffusers.poisons.control import SUFFIX as CONTROL
from jcdp_diffusers.results import read_records


NOT_MEASURED = "n.m."
OF_THE_FIGURES = "Test accuracy in % after the last epoch, mean ± standard deviation over seeds."
ROLES_SAID = {
    "disjoint": "Roles disjoint: the purifier has seen neither protected nor test images.",
    "paper": "**Roles as in the paper: the purifier has been trained on the test images.**",
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
    # Published, not among ours.
    "gaussian-filter": "Gaussian filter",
    "d-vae": "D-VAE",
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


class Measured:
    """
    Accuracies and costs of one scale: one data set size, test set, recipe, victim and assignment of roles.

    Args:
        records (`Iterable[dict]`): Of one or more grids. Of several records of one cell and seed the last counts.
        roles (`str`): Which records of purified images count; those of other images have no roles.
        victim (`str`): Which victim's.
        smoke (`bool`): Whether records of smoke runs are wanted, and no others.

    Raises:
        ValueError: If the records differ in more than a table tells apart: a mean over them would mean nothing.
    """

    def __init__(self, records: Iterable[Mapping], *, roles: str = "disjoint", victim: str = "resnet18", smoke=False):
        records = [
            record
            for record in records
            if record["what"] in ("accuracy", "victim")
            and "column" in (settings := record.get("settings", {}))
            and settings.get("roles", roles) == roles
            and settings["victim"] == victim
            and settings["recipe"]["smoke"] == smoke
        ]
        self.roles, self.victim = roles, victim
        _refuse_mixtures([record["settings"] for record in records])
        self._cells: dict[Key, dict[str, dict[int, Mapping]]] = {}
        for record in records:
            by_what = self._cells.setdefault(_key(record["settings"]), {"accuracy": {}, "victim": {}})
            by_what[record["what"]][record["seed"]] = record
        self.scales = sorted({_scale_in_words(record["settings"]) for record in records})

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

    def settings(self, dataset, poison, column, **others) -> Mapping:
        """What the first seed's record says about its cell; empty if not measured."""
        found = self.find("accuracy", dataset, poison, column, **others)
        return found[0]["settings"] if found else {}

    def seconds(self, dataset, column, collected) -> dict[tuple, tuple[float, float]]:
        """Mean seconds before and of training over seeds, by poison, preset and what they were measured on."""
        found: dict[tuple, list] = {}
        for poison, preset in self.poisons(dataset):
            for record in self.find("victim", dataset, poison, column, collected=collected, poison_preset=preset):
                value = record["value"]
                setup = (record.get("device"), value.get("threads"), value.get("precision"))
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
        one, two = _flat(facts(settings[0])), _flat(facts(other))
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


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which records a table or a picture is made from; see `chosen_records`."""
    parser.add_argument("--records", required=True, nargs="+", help="JSON Lines files of eval/benchmark.py")
    parser.add_argument("--grid", help="records of this grid alone")
    parser.add_argument("--protocol", help="records of this recipe alone")
    parser.add_argument("--poisons", nargs="+", metavar="NAME", help="of the grid and no others; none: clean images")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="of the grid and no others; in pictures in this order"
    )
    parser.add_argument("--victim", default="resnet18")
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
        "grid": lambda record: record["settings"].get("grid"),
        "protocol": lambda record: record["protocol"],
        "poisons": lambda record: record["settings"].get("poison"),
        "columns": lambda record: record["settings"].get("column"),
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


def identity(settings: Mapping) -> dict:
    """All that decides a figure but the seed."""
    # What was trained on counts although the poison's settings are there: controls were once made in another way.
    aside = PROVENANCE if "purifier" in settings else (*PROVENANCE, *OF_THE_PURIFIER)
    return {name: value for name, value in settings.items() if name not in aside}


def _key(settings: Mapping) -> Key:
    return Key(**{name: identity(settings).get(name) for name in Key._fields})


def _scale(settings: Mapping) -> dict:
    train = {name: value for name, value in settings["train"].items() if name != "content"}
    return {"train": train} | {name: settings.get(name) for name in ("test", "victim", "width", "recipe")}


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


def _flat(settings: Mapping, before: str = "") -> dict:
    """Nested settings by dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return flat


def grid_table(measured: Measured, dataset: str) -> str:
    """
    Everything that was measured on one data set: a row per countermeasure, a column per poison, and the costs. Where
    purifiers were trained on several sets there is a table for each, with the cells that have no purifier in all.
    """
    collected = sorted(
        {key.collected for key in measured.keys(dataset)} - {None}, key=lambda name: (name != dataset, name)
    )
    if collected in ([], [dataset]):
        return _grid_rows(measured, dataset, dataset)
    return "\n\n".join(f"Purifier trained on {name}:\n\n{_grid_rows(measured, dataset, name)}" for name in collected)


def _grid_rows(measured: Measured, dataset: str, collected: str) -> str:
    poisons = measured.poisons(dataset)
    found = dict.fromkeys(key.column for key in measured.keys(dataset) if key.collected in (None, collected))
    columns = [*(name for name in COLUMNS if name in found), *(name for name in found if name not in COLUMNS)]
    costs = {column: measured.seconds(dataset, column, collected) for column in columns}
    baselines = [name for name in BASELINES if name == "at-8" or name in columns]
    head = ["countermeasure", *(measured.poison_title(dataset, *poison) for poison in poisons)]
    head += ["seconds before training", "seconds of training", *(BASELINES[name] for name in baselines)]
    rows = []
    for column in columns:
        row = [COLUMNS.get(column, column)]
        row += [
            spread(measured.accuracies(dataset, poison, column, collected=collected, poison_preset=preset))
            for poison, preset in poisons
        ]
        row += _mean_seconds(costs[column])
        row += [_share(costs[column], costs.get(name, {})) for name in baselines]
        rows.append(row)
    return markdown_table(head, rows)


def _mean_seconds(costs: Mapping[tuple, tuple[float, float]]) -> list[str]:
    """Before and of training, over poisons."""
    if not costs:
        return [NOT_MEASURED, NOT_MEASURED]
    if len({setup for _, _, setup in costs}) > 1:
        return ["several devices", "several devices"]
    return [f"{statistics.fmean(seconds):.1f}" for seconds in zip(*costs.values())]


def _share(costs: Mapping[tuple, tuple[float, float]], baseline: Mapping[tuple, tuple[float, float]]) -> str:
    """Of a baseline's seconds, over the poisons that both were measured with on the same device in the same way."""
    both = costs.keys() & baseline.keys()
    if not both:
        return NOT_MEASURED
    return f"{100 * sum(sum(costs[place]) for place in both) / sum(sum(baseline[place]) for place in both):.0f} %"


def poison_table(measured: Measured, dataset: str) -> str:
    """What each poison does to a victim without a countermeasure, beside clean images and noise of the same size."""
    head = ["trained on", "test accuracy", "training accuracy", "noise of the same size: test accuracy"]
    head += ["mean L2 norm", "largest change in 1/255", "seconds to make"]
    rows = []
    for poison, preset in measured.poisons(dataset):
        settings = measured.settings(dataset, poison, "none", poison_preset=preset)
        norms, seconds = settings.get("poison_norms", {}), settings.get("poison_seconds")
        control = measured.accuracies(dataset, poison + CONTROL, "none", poison_preset=preset)
        rows.append(
            [
                "clean images" if poison == "none" else measured.poison_title(dataset, poison, preset),
                spread(measured.accuracies(dataset, poison, "none", poison_preset=preset)),
                spread(measured.training_accuracies(dataset, poison, "none", poison_preset=preset)),
                "" if poison == "none" else spread(control),
                f"{norms['l2_mean']:.2f}" if norms else "",
                f"{norms['linf']:.0f}" if norms else "",
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return markdown_table(head, rows)


def roles_table(disjoint: Measured, paper: Measured, dataset: str) -> str:
    """
    What it is worth to a purifier to have seen the test images: the same cells under both assignments of roles, over
    the seeds that both have, and the difference seed by seed.
    """
    rows = []
    for key in disjoint.keys(dataset):
        if key.collected is None or key not in paper.keys(dataset):
            continue
        honest, leaked = disjoint.by_seed("accuracy", key), paper.by_seed("accuracy", key)
        refuse_differences(
            f"{key.column!r} against {key.poison!r} on {dataset} under both roles",
            [record["settings"] for record in (*honest.values(), *leaked.values())],
            _identity_but_roles,
        )
        seeds = sorted(honest.keys() & leaked.keys())
        values = [[100 * records[seed]["value"] for seed in seeds] for records in (honest, leaked)]
        rows.append(
            [
                disjoint.poison_title(dataset, key.poison, key.poison_preset),
                disjoint.column_title(key),
                *map(spread, values),
                spread([after - before for before, after in zip(*values)]),
            ]
        )
    return markdown_table(["trained on", "countermeasure", "disjoint", "paper", "difference"], rows) if rows else ""


def _identity_but_roles(settings: Mapping) -> dict:
    # Other images train another purifier.
    return {name: value for name, value in identity(settings).items() if name not in ("roles", "purifier")}


def beside_table(
    measured: Measured, dataset: str, figures: Mapping[str, Mapping[str, float]], clean: float | None = None
) -> str:
    """Ours / published, a row per countermeasure and a column per poison."""
    poisons = list(dict.fromkeys(poison for row in figures.values() for poison in row))
    head = ["", *(POISONS.get(name, "clean" if name == "none" else name) for name in poisons)]
    rows = []
    if clean is not None:
        ours = measured.accuracies(dataset, "none", "none")
        rows.append(["clean images", f"{spread(ours)} / {clean}", *[""] * (len(poisons) - 1)])
    for column, printed in figures.items():
        cells = []
        for poison in poisons:
            theirs = printed.get(poison)
            cells.append(f"{spread(_ours(measured, dataset, poison, column))} / {'-' if theirs is None else theirs}")
        rows.append([COLUMNS.get(column, column), *cells])
    return markdown_table(head, rows)


def paper_tables(measured: Measured) -> dict[str, str]:
    """The paper's Tables 1, 2, 3, 5 and 6, APBench's leaderboard and BridgePure's re-runs: ours / theirs, by title."""
    tables = {}
    for dataset, printed in PUBLISHED["jcdp_table_1"].items():
        tables[f"Table 1, {dataset}"] = beside_table(measured, dataset, printed["figures"], printed["clean"])
    for number in (2, 3):
        for dataset, figures in PUBLISHED[f"jcdp_table_{number}"].items():
            tables[f"Table {number}, {dataset}"] = beside_table(measured, dataset, figures)
    rows = []
    for printed in PUBLISHED["jcdp_table_5"]:
        dataset, collected, figures = printed["dataset"], printed["collected"], printed["figures"]
        column = "none" if collected is None else "jcdp"
        ours = {poison: measured.accuracies(dataset, poison, column, collected=collected) for poison in figures}
        cells = [f"{spread(ours[poison])} / {figures[poison]}" for poison in ours]
        rows.append([dataset, collected or "no purifier", *cells])
    tables["Table 5, purifier trained on other data"] = markdown_table(
        ["protected", "purifier trained on", "EMN", "LSP"], rows
    )
    rows = []
    for printed in PUBLISHED["jcdp_table_6"]:
        which = {name: printed[name] for name in ("purifier_origin", "purifier_steps")}
        cells = []
        for dataset, theirs in printed["figures"].items():
            cells.append(f"{spread(measured.accuracies(dataset, 'emn', printed['column'], **which))} / {theirs}")
        guides = "both guides" if printed["column"] == "jcdp" else "no guide"
        rows.append([printed["purifier_origin"], guides, f"{printed['purifier_steps']:,}", *cells])
    tables["Table 6, EMN"] = markdown_table(["purifier", "guides", "steps", "cifar10", "cifar100"], rows)
    for dataset, figures in PUBLISHED["apbench"].items():
        tables[f"APBench, {dataset}"] = beside_table(measured, dataset, figures)
    for dataset, printed in PUBLISHED["bridgepure"].items():
        tables[f"BridgePure's re-runs, {dataset}"] = beside_table(
            measured, dataset, printed["figures"], printed["clean"]
        )
    return tables


def _ours(measured: Measured, dataset: str, poison: str, column: str) -> list[float]:
    if column != "iss":
        return measured.accuracies(dataset, poison, column)
    found = [measured.accuracies(dataset, poison, name) for name in ("gray", "jpeg-10", "bdr-2")]
    # Of a part of the three, "best" would be another thing than what the paper prints.
    return max(found, key=statistics.fmean) if all(found) else []


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, or that there is none."""
    if not values:
        return NOT_MEASURED
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scale_in_words(settings: Mapping) -> str:
    return (
        f"{settings['dataset']}: {settings['train']['images']} training images, {settings['victim']} of width "
        f"{settings['width']}, protocol {settings['recipe']['name']}, {settings['recipe']['epochs']} epochs"
    )


def caption(measured: Measured) -> str:
    """What the figures are, in front of every table."""
    return f"Ours: {'; '.join(measured.scales)}. {ROLES_SAID[measured.roles]} {OF_THE_FIGURES}"


def caption_of_roles(measured: Measured) -> str:
    return (
        f"Ours: {'; '.join(measured.scales)}. Disjoint: the purifier has seen neither protected nor test images; "
        f"paper: it has been trained on the test images; difference: what that is worth. {OF_THE_FIGURES}"
    )


def chosen_tables(tables: Mapping[str, str], name: str | None) -> dict[str, str]:
    """All, or those with this title or with this before its comma."""
    chosen = {title: table for title, table in tables.items() if name in (None, title, title.partition(", ")[0])}
    if not chosen:
        known = dict.fromkeys(part for title in tables for part in (title.partition(", ")[0], title))
        raise ValueError(f"table is {name!r}, but accepted are {'; '.join(known)}.")
    return chosen


def text_of(args: argparse.Namespace) -> str:
    """The tables of one command, as Markdown."""
    records = chosen_records(args)
    choice = {"victim": args.victim, "smoke": args.smoke}
    measured = Measured(records, roles=args.roles or "disjoint", **choice)
    if not measured.datasets():
        raise ValueError(
            f"records is {' '.join(args.records)}, but no accuracy of a grid there has the victim {args.victim!r}, "
            f"the roles {measured.roles!r} and {'a' if args.smoke else 'no'} smoke run's recipe: "
            "--victim, --roles and --smoke choose others."
        )
    parts = [caption_of_roles(measured) if args.kind == "roles" else caption(measured)]
    if args.smoke:
        parts.append("**Smoke run: no figure means anything.**")
    if args.kind == "roles":
        paper = Measured(records, roles="paper", **choice)
        tables = {dataset: roles_table(measured, paper, dataset) for dataset in measured.datasets()}
        tables = {dataset: table for dataset, table in tables.items() if table}
        if not tables:
            raise ValueError(
                f"records is {' '.join(args.records)}, but no cell there is measured under both roles: a grid that "
                "ran a second time with --roles paper and the same --output is accepted."
            )
    elif args.kind == "paper":
        parts.append(f"Each cell is ours / published; {NOT_MEASURED}: not measured by us; -: not printed there.")
        tables = paper_tables(measured)
    else:
        table = grid_table if args.kind == "grid" else poison_table
        tables = {dataset: table(measured, dataset) for dataset in measured.datasets()}
    parts += [f"### {title}\n\n{table}" for title, table in chosen_tables(tables, args.table).items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("kind", choices=("grid", "poisons", "paper", "roles"))
    add_record_arguments(parser)
    parser.add_argument("--roles", choices=tuple(ROLES_SAID), help="disjoint by default; the table roles has both")
    parser.add_argument(
        "--table", help="print only the tables with this title, or with this before its comma: 'Table 1'"
    )
    parser.add_argument("--output", help="Markdown file; else printed")
    args = parser.parse_args()
    if args.kind == "roles" and args.roles is not None:
        parser.error(f"--roles is {args.roles}, but the table roles shows both: leave it out.")
    try:
        text = text_of(args)
    except ValueError as error:
        raise SystemExit(f"tables: {error}") from error
    if args.output is None:
        print(text)
    else:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
