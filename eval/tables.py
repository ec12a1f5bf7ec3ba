"""
Tables from records: what a grid measured, and the paper's tables with our figures beside the published ones.

    python eval/tables.py grid --records DIR/records.jsonl
    python eval/tables.py poisons --records DIR/records.jsonl
    python eval/tables.py paper --records DIR/records.jsonl [--table 1]

A figure stands in a table only if it is on record. Records of the two assignments of roles are never in one table, and
neither are those of a smoke run.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from jcdp_diffusers.results import read_records


NOT_MEASURED = "n.m."
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
POISONS = {
    "emn": "EMN",
    "emn-class": "EMN(C)",
    "remn": "REMN",
    "lsp": "LSP",
    "tap": "TAP",
    "ops": "OPS",
    "ar": "AR",
    "cuda": "CUDA",
}
CONTROL = "-control"  # eval/benchmark.py
COLUMNS = {
    "none": "vanilla",
    "avatar": "AVATAR",
    "iss": "ISS (best of three)",
    "bdr-2": "BDR-2",
    "gray": "gray",
    "jpeg-10": "JPEG-10",
    "impulse-filter": "impulse filter",
    "at-8": "adversarial training",
    "at-4": "adversarial training, 4/255",
    "ueraser": "UEraser",
    "gdmp": "GDMP",
    "eclipse": "ECLIPSE",
    "ueraser-lite": "AA / UEraser-Lite",
    "ueraser-max": "UEraser-Max",
    "cutout": "Cutout",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "fast-autoaugment": "Fast AutoAugment",
    "random-noise": "random noise",
    "jcdp": "JCDP",
    "unconditional": "diffusion without guide",
    "unconditional, 4 draws": "diffusion without guide, 4 draws",
    "unconditional+corruption": "diffusion without guide, then corruption",
    "impulse-filter+unconditional+corruption": "impulse filter, diffusion without guide, corruption",
    "orthogonal-projection": "orthogonal projection",
}


class Measured:
    """
    Accuracies and costs of one scale: one data set size, recipe, victim and assignment of roles.

    Args:
        records (`Iterable[dict]`): Of one or more grids.
        roles (`str`): Which records of purified images count; those of other images have no roles.
        victim (`str`): Which victim's.
        smoke (`bool`): Whether records of smoke runs are wanted, and no others.
    """

    def __init__(self, records: Iterable[Mapping], *, roles: str = "disjoint", victim: str = "resnet18", smoke=False):
        records = [
            record
            for record in records
            if "column" in record["settings"]
            and record["settings"].get("roles", roles) == roles
            and record["settings"]["victim"] == victim
            and record["settings"]["recipe"]["smoke"] == smoke
        ]
        self.roles, self.victim = roles, victim
        self._accuracies: dict[tuple, dict[int, Mapping]] = {}
        self._details: dict[tuple, dict[int, Mapping]] = {}
        for record in records:
            group = {"accuracy": self._accuracies, "victim": self._details}.get(record["what"])
            if group is None:
                continue
            group.setdefault(self._key(record["settings"]), {})[record["seed"]] = record
        self.scales = sorted({_scale(record["settings"]) for record in records if record["what"] == "accuracy"})
        self._refuse_mixtures()

    @staticmethod
    def _key(settings: Mapping) -> tuple:
        names = ("dataset", "collected", "poison", "column", "purifier_origin", "purifier_steps")
        return tuple(settings.get(name) for name in names)

    def _refuse_mixtures(self) -> None:
        """One table, one scale: a mean over different settings would mean nothing."""
        for dataset in {key[0] for key in self._accuracies}:
            kinds = {
                _scale(record["settings"])
                for key, by_seed in self._accuracies.items()
                if key[0] == dataset
                for record in by_seed.values()
            }
            if len(kinds) > 1:
                raise ValueError(
                    f"records hold {dataset} at several scales ({'; '.join(sorted(kinds))}), but a table has one: "
                    "give the files of one grid."
                )

    def names(self, field: str) -> list:
        """Different values of `dataset`, `poison` or `column`, in the order in which they were measured."""
        place = ("dataset", "collected", "poison", "column").index(field)
        return list(dict.fromkeys(key[place] for key in self._accuracies))

    def accuracies(self, dataset, poison, column, **others) -> list[float]:
        """Per cent, one figure per seed; empty if not measured. `collected` is the data set's own if not given."""
        return [100 * record["value"] for record in self._find(self._accuracies, dataset, poison, column, **others)]

    def training_accuracies(self, dataset, poison, column) -> list[float]:
        """Per cent, on the images that the victim was trained on, one figure per seed."""
        found = self._find(self._details, dataset, poison, column)
        return [100 * record["value"]["train_accuracy"] for record in found]

    def settings(self, dataset, poison, column) -> Mapping:
        """What the first seed's record says about its cell; empty if not measured."""
        found = self._find(self._accuracies, dataset, poison, column)
        return found[0]["settings"] if found else {}

    def seconds(self, dataset, poison, column, name: str) -> float | None:
        """Mean over seeds of `train_seconds`, or `prepare_seconds`."""
        values = [record["value"][name] for record in self._find(self._details, dataset, poison, column)]
        return statistics.fmean(values) if values else None

    def _find(self, groups, dataset, poison, column, collected=None, purifier_origin=None, purifier_steps=None):
        for key, by_seed in groups.items():
            same = key[:1] + key[2:4] == (dataset, poison, column) and key[1] == (collected or dataset)
            if same and purifier_origin in (None, key[4]) and purifier_steps in (None, key[5]):
                return list(by_seed.values())
        return []


def grid_table(measured: Measured, dataset: str) -> str:
    """Everything that was measured on one data set: a row per countermeasure, a column per poison, and the costs."""
    poisons = _poisons(measured)
    columns = measured.names("column")
    costs = {
        column: [
            (measured.seconds(dataset, poison, column, "prepare_seconds"), seconds)
            for poison in poisons
            if (seconds := measured.seconds(dataset, poison, column, "train_seconds")) is not None
        ]
        for column in columns
    }
    means = {
        column: (statistics.fmean(p for p, _ in pairs), statistics.fmean(t for _, t in pairs))
        for column, pairs in costs.items()
        if pairs
    }
    at = sum(means["at-8"]) if "at-8" in means else None
    head = ["countermeasure", *(POISONS.get(name, "clean" if name == "none" else name) for name in poisons)]
    head += ["seconds before training", "seconds of training", "of adversarial training's"]
    rows = []
    for column in columns:
        row = [COLUMNS.get(column, column)]
        row += [spread(measured.accuracies(dataset, poison, column)) for poison in poisons]
        before, training = means.get(column, (None, None))
        row += [NOT_MEASURED if value is None else f"{value:.1f}" for value in (before, training)]
        row.append(NOT_MEASURED if at is None or before is None else f"{100 * (before + training) / at:.0f} %")
        rows.append(row)
    return markdown_table(head, rows)


def poison_table(measured: Measured, dataset: str) -> str:
    """What each poison does to a victim without a countermeasure, beside clean images and noise of the same size."""
    head = ["trained on", "test accuracy", "training accuracy", "noise of the same size: test accuracy"]
    head += ["mean L2 norm", "largest change in 1/255", "seconds to make"]
    rows = []
    for poison in _poisons(measured):
        norms = measured.settings(dataset, poison, "none").get("poison_norms", {})
        seconds = measured.settings(dataset, poison, "none").get("poison_seconds")
        control = measured.accuracies(dataset, poison + CONTROL, "none")
        rows.append(
            [
                "clean images" if poison == "none" else POISONS[poison],
                spread(measured.accuracies(dataset, poison, "none")),
                spread(measured.training_accuracies(dataset, poison, "none")),
                "" if poison == "none" else spread(control),
                f"{norms['l2_mean']:.2f}" if norms else "",
                f"{norms['linf']:.0f}" if norms else "",
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return markdown_table(head, rows)


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
        ours = {poison: measured.accuracies(dataset, poison, "jcdp", collected=collected) for poison in figures}
        rows.append([dataset, collected, *(f"{spread(ours[poison])} / {figures[poison]}" for poison in ours)])
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
    for name, title in (("apbench", "APBench"), ("bridgepure", "BridgePure's re-runs")):
        for dataset, figures in PUBLISHED[name].items():
            tables[f"{title}, {dataset}"] = beside_table(measured, dataset, figures)
    return tables


def _poisons(measured: Measured) -> list[str]:
    """Those that were measured, without controls, clean images first."""
    return [name for name in ("none", *POISONS) if name in measured.names("poison")]


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


def _scale(settings: Mapping) -> str:
    return (
        f"{settings['dataset']}: {settings['train']['images']} training images, {settings['victim']} of width "
        f"{settings['width']}, protocol {settings['recipe']['name']}, {settings['recipe']['epochs']} epochs"
    )


def caption(measured: Measured) -> str:
    """What the figures are, in front of every table."""
    scales = "; ".join(measured.scales) or "nothing measured"
    roles = (
        "Roles disjoint: the purifier has seen neither protected nor test images."
        if measured.roles == "disjoint"
        else "**Roles as in the paper: the purifier has been trained on the test images.**"
    )
    return f"Ours: {scales}. {roles} Test accuracy in % after the last epoch, mean ± standard deviation over seeds."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("kind", choices=("grid", "poisons", "paper"))
    parser.add_argument("--records", required=True, nargs="+", help="JSON Lines files of eval/benchmark.py")
    parser.add_argument("--roles", choices=("disjoint", "paper"), default="disjoint")
    parser.add_argument("--victim", default="resnet18")
    parser.add_argument("--table", help="print only the tables whose title holds this, such as 'Table 1'")
    parser.add_argument("--smoke", action="store_true", help="records of smoke runs, which mean nothing")
    parser.add_argument("--output", help="Markdown file; else printed")
    args = parser.parse_args()
    records = [record for path in args.records for record in read_records(path)]
    try:
        measured = Measured(records, roles=args.roles, victim=args.victim, smoke=args.smoke)
    except ValueError as error:
        raise SystemExit(f"tables: {error}") from error
    parts = [caption(measured)] + (["**Smoke run: no figure means anything.**"] if args.smoke else [])
    if args.kind in ("grid", "poisons"):
        table = grid_table if args.kind == "grid" else poison_table
        tables = {dataset: table(measured, dataset) for dataset in measured.names("dataset")}
    else:
        parts.append(f"Each cell is ours / published; {NOT_MEASURED}: not measured by us; -: not printed there.")
        tables = paper_tables(measured)
    parts += [f"### {title}\n\n{table}" for title, table in tables.items() if (args.table or "") in title]
    text = "\n\n".join(parts) + "\n"
    if args.output is None:
        print(text)
    else:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
