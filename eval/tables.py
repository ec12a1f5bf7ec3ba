"""
Tables from records: what a grid measured, and the paper's tables with our figures beside the published ones.

    python eval/tables.py grid --records DIR/records.jsonl
    python eval/tables.py poisons --records DIR/records.jsonl
    python eval/tables.py paper --records DIR/records.jsonl [--table "Table 1"]
    python eval/tables.py roles --records DIR/records.jsonl
    python eval/tables.py methods --records DIR/records.jsonl

A figure stands in a table only if it is on record. Records of several scales are refused, and so are those that would
stand in one cell and differ in any setting. Those of the two assignments of roles are never in one table, but for
`roles`, which is about the difference, and those of a smoke run never beside others. Victims that learn in different
ways are never in one table, but for `methods`, which has a row for each way.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
from eval.measured import (
    BASELINES,
    COLUMNS,
    METHODS_SAID,
    NOT_MEASURED,
    OF_THE_FIGURES,
    POISONS,
    PUBLISHED,
    ROLES_SAID,
    Measured,
    add_record_arguments,
    chosen_records,
    flattened,
    identity,
    refuse_differences,
    roles_of,
    spread,
)
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.poisons import get as get_poison
from jcdp_diffusers.poisons.control import SUFFIX as CONTROL


# What the other assignment of roles changes: other images, and the networks that learned from them.
OF_THE_ROLES = ("roles.", "purifier.", "init_from.pretraining.collected.", "pairs.", "collected_images.")
# Which published row stands beside one of ours that has another name: the paper purifies with both guides.
PRINTED_AS = {"unconditional": "jcdp"}


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
    for column, seconds in zip(columns, seconds_of_rows(list(costs.values()))):
        row = [COLUMNS.get(column, column) + measured.assumption(dataset, column)]
        row += [
            spread(measured.accuracies(dataset, poison, column, collected=collected, poison_preset=preset))
            for poison, preset in poisons
        ]
        row += seconds
        row += [_share(costs[column], costs.get(name, {})) for name in baselines]
        rows.append(row)
    return markdown_table(head, rows)


def seconds_of_rows(rows: Sequence[Mapping[tuple, tuple[float, float]]], form: str = ".1f") -> list[list[str]]:
    """
    Mean seconds before and of training, over poisons. Seconds of several devices, numbers of threads or precisions
    have no mean in a row. Where rows differ in one of these, each names its own: their seconds do not compare.

    Args:
        rows (`list[dict]`): For each row of one table, what [`Measured.seconds`] returns.
        form (`str`): Of the numbers.
    """
    setups = [[setup.words() for _, _, setup in costs] for costs in rows]
    alike = [found[0] for found in setups if found and not _differing(found)]
    told, cells = _differing(alike), []
    for costs, found in zip(rows, setups):
        if not costs:
            cells.append([NOT_MEASURED] * 2)
        elif several := _differing(found):
            cells.append([f"several {' and '.join(several)}"] * 2)
        else:
            in_brackets = f" ({', '.join(found[0][name] for name in told)})" if told else ""
            cells.append([f"{statistics.fmean(one):{form}}{in_brackets}" for one in zip(*costs.values())])
    return cells


def _differing(setups: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of what is not the same in all."""
    return [name for name in setups[0] if len({setup[name] for setup in setups}) > 1] if setups else []


def _share(costs: Mapping[tuple, tuple[float, float]], baseline: Mapping[tuple, tuple[float, float]]) -> str:
    """Of a baseline's seconds, over the poisons that both were measured with on one machine in the same way."""
    both = costs.keys() & baseline.keys()
    if not both:
        return NOT_MEASURED
    return f"{100 * sum(sum(costs[place]) for place in both) / sum(sum(baseline[place]) for place in both):.0f} %"


def poison_table(measured: Measured, dataset: str) -> str:
    """What each poison does to a victim without a countermeasure, beside clean images and noise of the same size."""
    learned = ["training accuracy"] if measured.method == "supervised" else []  # nobody learned labels otherwise
    head = ["trained on", "test accuracy", *learned, "noise of the same size: test accuracy"]
    head += ["mean L2 norm", "largest change in 1/255", "seconds to make"]
    rows = []
    for poison, preset in measured.poisons(dataset):
        settings = measured.settings_of_poison(dataset, poison, preset)
        norms, seconds = settings.get("poison_norms", {}), settings.get("poison_seconds")
        control = measured.accuracies(dataset, poison + CONTROL, "none", poison_preset=preset)
        rows.append(
            [
                "clean images" if poison == "none" else measured.poison_title(dataset, poison, preset),
                spread(measured.accuracies(dataset, poison, "none", poison_preset=preset)),
                *(
                    spread(measured.training_accuracies(dataset, poison, "none", poison_preset=preset))
                    for _ in learned
                ),
                "" if poison == "none" else spread(control),
                f"{norms['l2_mean']:.2f}" if norms else "",
                f"{norms['linf']:.0f}" if norms else "",
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return markdown_table(head, rows)


def roles_table(disjoint: Measured, paper: Measured, dataset: str) -> str:
    """
    What it is worth to have seen the test images to whatever learns from collected ones: the same cells under both
    assignments of roles, over the seeds that both have, and the difference seed by seed.
    """
    rows = []
    for key in disjoint.keys(dataset):
        if key not in paper.keys(dataset):
            continue
        honest, leaked = disjoint.by_seed("accuracy", key), paper.by_seed("accuracy", key)
        if all(roles_of(record["settings"]) is None for record in honest.values()):
            continue
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
    facts = flattened(identity(settings))
    return {name: value for name, value in facts.items() if not f"{name}.".startswith(OF_THE_ROLES)}


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


def methods_table(by_method: Mapping[str, Measured], dataset: str) -> str:
    """
    What victims that learn in each way get from protected images, as in the paper's Table 4: a row per poison and way,
    a column for clean images, none for what was not tried. Without labels, the figure is that of a linear probe. Our
    purification without a guide stands beside the paper's, as in [`probe_table`].

    Args:
        by_method (`dict`): One [`Measured`] for each way of learning.
        dataset (`str`): Of the records.
    """
    printed = PUBLISHED["jcdp_table_4"].get(dataset, {"clean": {}, "figures": {}})
    found = dict.fromkeys(key.column for one in by_method.values() for key in one.keys(dataset))
    columns = [*(name for name in COLUMNS if name in found), *(name for name in found if name not in COLUMNS)]
    poisons = dict.fromkeys(pair for one in by_method.values() for pair in one.poisons(dataset) if pair[0] != "none")
    rows = []
    for poison, preset in poisons:
        for method, measured in by_method.items():
            if (poison, preset) not in measured.poisons(dataset):
                continue
            theirs = _published_of(measured, dataset, poison, preset)
            cells = [_both(measured.accuracies(dataset, "none", "none"), printed["clean"].get(method), theirs)]
            for column in columns:
                ours = measured.accuracies(dataset, poison, column, poison_preset=preset)
                cells.append(_both(ours, theirs.get(PRINTED_AS.get(column, column), {}).get(method), theirs))
            rows.append([measured.poison_title(dataset, poison, preset), METHODS_SAID[method], *cells])
    return markdown_table(["trained on", "learned by", "clean", *(COLUMNS.get(name, name) for name in columns)], rows)


def probe_table(measured: Measured, dataset: str, trained_on: Mapping[tuple[str, str], str]) -> str:
    """
    What a network learns without labels: its linear probe and its nearest neighbours, beside the paper's Table 4.

    Args:
        measured (`Measured`): Of one way of learning without labels.
        dataset (`str`): Of the records.
        trained_on (`dict`): Titles of rows by poison and countermeasure, measured or not.
    """
    printed = PUBLISHED["jcdp_table_4"].get(dataset, {"clean": {}, "figures": {}})
    rows = []
    for (poison, column), title in trained_on.items():
        if poison == "none":
            theirs = printed["clean"] if column == "none" else {}
        else:
            theirs = printed["figures"].get(poison, {}).get(PRINTED_AS.get(column, column), {})
        neighbours = [100 * one["value"]["knn_accuracy"] for one in measured.find("victim", dataset, poison, column)]
        rows.append(
            [
                title,
                spread(measured.accuracies(dataset, poison, column)),
                spread(neighbours),
                str(theirs.get(measured.method, "-")),
            ]
        )
    return markdown_table(["trained on", "linear probe", "nearest neighbours", "the paper's linear probe"], rows)


def transfer_table(by_method: Mapping[str, Measured], dataset: str, trained_on: Mapping[tuple[str, str], str]) -> str:
    """
    What each poison does to each way of learning: a column per way.

    Args:
        by_method (`dict`): One [`Measured`] for each way of learning.
        dataset (`str`): Of the records.
        trained_on (`dict`): Titles of rows by poison and countermeasure, measured or not.
    """
    head = ["trained on", "made against", *(METHODS_SAID[method] for method in by_method)]
    rows = []
    for (poison, column), title in trained_on.items():
        figures = [spread(measured.accuracies(dataset, poison, column)) for measured in by_method.values()]
        rows.append([title, _made_against(by_method, dataset, poison), *figures])
    return markdown_table(head, rows)


def _made_against(by_method: Mapping[str, Measured], dataset: str, poison: str) -> str:
    """What network a poison's noise was optimised for, in words."""
    if poison == "none":
        return ""
    if (surrogate := get_poison(poison).surrogate) != "contrastive":
        return {None: "no network", "supervised": "a classifier", "pretrained": "a pretrained network"}[surrogate]
    found = [
        one.settings_of_poison(dataset, *pair).get("poison_settings")
        for one in by_method.values()
        for pair in one.poisons(dataset)
        if pair[0] == poison
    ]
    frameworks = dict.fromkeys(settings["framework"] for settings in found if settings)
    return ", ".join(METHODS_SAID[name] for name in frameworks) or NOT_MEASURED


def _published_of(measured: Measured, dataset: str, poison: str, preset: str | None) -> Mapping:
    """The paper's figures of a poison by countermeasure and method; none where it was made against another method."""
    settings = measured.settings_of_poison(dataset, poison, preset)
    against = settings.get("poison_settings", {}).get("framework", measured.method)
    printed = PUBLISHED["jcdp_table_4"].get(dataset, {"clean": {}, "figures": {}})
    known = against == measured.method and measured.method in printed["clean"]
    return printed["figures"].get(poison, {}) if known else {}


def _both(ours: Sequence[float], theirs: float | None, printed: Mapping) -> str:
    """Ours / published, where the paper has the row at all."""
    return f"{spread(ours)} / {'-' if theirs is None else theirs}" if printed else spread(ours)


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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(measured: Measured) -> str:
    """What the figures are, in front of every table."""
    others = [f"Left out is what has roles {name}: --roles {name} shows it." for name in measured.other_roles]
    return " ".join([f"Ours: {'; '.join(measured.scales)}.", ROLES_SAID[measured.roles], OF_THE_FIGURES, *others])


def caption_of_roles(measured: Measured) -> str:
    return (
        f"Ours: {'; '.join(measured.scales)}. Disjoint: what learns from collected images has seen neither protected "
        f"nor test images; paper: it has been trained on the test images; difference: what that is worth. "
        f"{OF_THE_FIGURES}"
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
    if args.kind == "methods":
        return _text_of_methods(args, records)
    choice = {"victim": args.victim, "method": args.method, "smoke": args.smoke}
    measured = Measured(records, roles=args.roles or "disjoint", **choice)
    if not measured.datasets():
        raise ValueError(
            f"records is {' '.join(args.records)}, but no accuracy of a grid there has the victim {args.victim!r}, "
            f"the method {args.method!r}, the roles {measured.roles!r} and {'a' if args.smoke else 'no'} smoke run's "
            "recipe: --victim, --method, --roles and --smoke choose others."
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


def _text_of_methods(args: argparse.Namespace, records: list[dict]) -> str:
    """The table of ways of learning, as Markdown."""
    choice = {"roles": args.roles or "disjoint", "victim": args.victim, "smoke": args.smoke}
    by_method = {method: Measured(records, method=method, **choice) for method in METHODS_SAID}
    by_method = {method: measured for method, measured in by_method.items() if measured.datasets()}
    if not set(by_method) - {"supervised"}:
        raise ValueError(
            f"records is {' '.join(args.records)}, but no accuracy of a grid there has a method without labels and "
            f"the victim {args.victim!r}: --victim, --roles and --smoke choose others."
        )
    parts = [*map(caption, by_method.values())]
    parts.append("Ours / published, where the paper's Table 4 has the row. Its purification has both guides.")
    if args.smoke:
        parts.append("**Smoke run: no figure means anything.**")
    datasets = dict.fromkeys(name for measured in by_method.values() for name in measured.datasets())
    tables = {name: methods_table(by_method, name) for name in datasets}
    parts += [f"### {title}\n\n{table}" for title, table in chosen_tables(tables, args.table).items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("kind", choices=("grid", "poisons", "paper", "roles", "methods"))
    add_record_arguments(parser)
    parser.add_argument("--roles", choices=tuple(ROLES_SAID), help="disjoint by default; the table roles has both")
    parser.add_argument(
        "--table", help="print only the tables with this title, or with this before its comma: 'Table 1'"
    )
    parser.add_argument("--output", help="Markdown file; else printed")
    args = parser.parse_args()
    if args.kind == "roles" and args.roles is not None:
        parser.error(f"--roles is {args.roles}, but the table roles shows both: leave it out.")
    with ends_in_one_sentence("tables"):
        text = text_of(args)
        if args.output is None:
            print(text)
        else:
            Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
