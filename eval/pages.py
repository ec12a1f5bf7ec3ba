"""
The tables and figures of README.md and docs/, written again from the records in results/.

    python eval/pages.py            # replaces what stands between the marks
    python eval/pages.py --check    # changes nothing; fails if a page does not say what the records say

A table stands between `<!-- name -->` and `<!-- /name -->` (`PAGES`). A figure in a sentence stands between
`<!-- n:KEY -->` and `<!-- /n -->` (`eval/page_figures.py`).
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
from eval import purify_scaling
from eval.measured import METHODS_SAID, NOT_MEASURED, POISONS, Measured, spread
from eval.page_figures import figure
from eval.speed_tables import speed_table
from eval.studies import detection, finetune_versus_scratch, spectrum_guidance
from eval.tables import grid_table, markdown_table, poison_table, probe_table, seconds_of_rows, transfer_table
from jcdp_diffusers import countermeasures
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.results import read_records, summarise


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
# Rows of results/cifar10_mini, whose control was Gaussian noise.
MINI_ROWS = {
    "clean": "clean",
    "protected": "protected by LSP",
    "random_noise": "random noise of the same norm",
    "purified": "protected, then purified",
}
# What a reader of README.md compares: the best known of each family, and ours. All rows are in docs/results.md.
HEADLINE = {
    "none": "nothing",
    "jpeg-10": "JPEG-10 (ISS)",
    "ueraser-lite": "UEraser-Lite",
    "at-8": "adversarial training, 8/255",
    "orthogonal-projection": "orthogonal projection",
    "avatar, 10 evaluations": "AVATAR, 10 evaluations",
    "eclipse, 4 evaluations": "ECLIPSE, 4 evaluations, not sparse",
    "d-vae-small": "D-VAE, small",
    "pretrained": "victim pretrained on collected images",
    "paired-small": "paired purifier" + countermeasures.assumed(countermeasures.get("paired-small").assumes),
    "unconditional+corruption": "**purification**, then corruption",
    "impulse-filter+unconditional+corruption": "**impulse filter, purification**, then corruption",
    "coloured noise": "**purification with coloured noise**",
    "impulse-filter": "**impulse filter** alone",
}
HEADLINE_POISONS = ("none", "emn", "lsp", "tap", "ops", "pil", "aue", "dune")
# What networks are trained on without labels, by poison and countermeasure.
UNLABELLED = {
    ("none", "none"): "clean images",
    ("none", "unconditional"): "clean images, purified",
    ("cp-s", "none"): "CP-S",
    ("cp-s", "unconditional"): "CP-S, purified",
    ("lsp", "none"): "LSP",
    ("lsp", "unconditional"): "LSP, purified",
    ("uc", "none"): "UC",
}
BOTH_WAYS = UNLABELLED | {("aue", "none"): "AUE", ("emn", "none"): "EMN", ("tap", "none"): "TAP"}


def measured(name: str) -> Measured:
    """Records of a grid on CIFAR-10 mini."""
    return Measured(read_records(RESULTS / f"{name}_cifar10_mini.jsonl"))


def mini_table() -> str:
    """What `make cifar10-mini` shows."""
    records = read_records(RESULTS / "cifar10_mini/records.jsonl")
    records = [r for r in records if r["what"] in ("accuracy", "train_accuracy")]
    found = {(row["what"], row["settings.row"]): row for row in summarise(records, by=("what", "settings.row"))}
    rows = []
    for row, title in MINI_ROWS.items():
        test, training = (found[what, row]["values"] for what in ("accuracy", "train_accuracy"))
        rows.append([title, *(spread([100 * value for value in values]) for values in (test, training))])
    return markdown_table(["victim trained on", "test accuracy in %", "training accuracy in %"], rows)


def headline_table() -> str:
    """
    What README.md compares: a row per countermeasure, a column per poison; those without a record are left out. A star
    marks figures of a poison that was made again, whose noise differs from that of the rest of its column.
    """
    found, anew = measured("countermeasures"), measured("made_anew")

    def cell(poison: str, column: str) -> str:
        figures = found.accuracies("cifar10", poison, column)
        others = anew.accuracies("cifar10", poison, column)
        return f"{spread(others)}*" if others and not figures else spread(figures)

    cells = {column: {name: cell(name, column) for name in HEADLINE_POISONS} for column in HEADLINE}
    poisons = [name for name in HEADLINE_POISONS if any(row[name] != NOT_MEASURED for row in cells.values())]
    rows = [
        [HEADLINE[column], *(row[name] for name in poisons)]
        for column, row in cells.items()
        if set(row.values()) != {NOT_MEASURED}
    ]
    return markdown_table(["what is done about it", *(POISONS.get(name, "clean images") for name in poisons)], rows)


def cpu_victim_table() -> str:
    """The victim and the purifier of an audit on a CPU, beside the victim of the other tables."""
    resnet = measured("poisons")
    convnet = Measured(read_records(RESULTS / "convnet94_cifar10_mini.jsonl"), victim="convnet94")
    rows = []
    for poison in ("none", *(name for name in POISONS if convnet.accuracies("cifar10", name, "none"))):
        figures = (
            resnet.accuracies("cifar10", poison, "none"),
            convnet.accuracies("cifar10", poison, "none"),
            convnet.accuracies("cifar10", poison, "unconditional"),
        )
        rows.append([POISONS.get(poison, "clean images"), *map(spread, figures)])
    return markdown_table(["trained on", "ResNet-18 of width 16", "convnet94", "convnet94, purified"], rows)


def full_size_table() -> str:
    """What the victim of an audit on a CPU learns at the sizes of published tables."""
    return grid_table(Measured(read_records(RESULTS / "cifar10_40k.jsonl"), victim="convnet94"), "cifar10")


def unlabelled_table() -> str:
    """What SimCLR learns from protected images."""
    return probe_table(Measured(read_records(RESULTS / "contrastive.jsonl"), method="simclr"), "cifar10", UNLABELLED)


def both_ways_table() -> str:
    """What poisons made against one way of learning do to the other, on the same images."""
    records = read_records(RESULTS / "contrastive.jsonl") + read_records(RESULTS / "attacks_cifar10_5k.jsonl")
    by_method = {method: Measured(records, method=method) for method in METHODS_SAID}
    return transfer_table(by_method, "cifar10", BOTH_WAYS)


def grid_of(name: str) -> Callable[[], str]:
    """All that one file of records holds."""
    return lambda: grid_table(measured(name), "cifar10")


def tiny_table(name: str) -> Callable[[], str]:
    """Images of 64x64: all that one file of records holds."""
    return lambda: grid_table(Measured(read_records(RESULTS / f"{name}.jsonl")), "tiny-imagenet-20")


def table_by(setting: Callable[[dict], str], name: str, title: str) -> Callable[[], str]:
    """Clean images, LSP and LSP purified, a row for each value of a setting that no table mixes."""

    def table() -> str:
        records = read_records(RESULTS / f"{name}_cifar10_mini.jsonl")
        cells = [("none", "none"), ("lsp", "none"), ("lsp", "coloured noise")]
        rows, costs = [], []
        for value in dict.fromkeys(map(setting, records)):
            some = [record for record in records if setting(record) == value]
            found = Measured(some, victim=some[0]["settings"]["victim"])
            rows.append([value, *(spread(found.accuracies("cifar10", *cell)) for cell in cells)])
            costs.append(found.seconds("cifar10", "coloured noise", None))
        rows = [[*row, training] for row, (_, training) in zip(rows, seconds_of_rows(costs, ".0f"))]
        return markdown_table([title, "clean images", "LSP", "LSP, purified", "seconds of training"], rows)

    return table


def recipe_in_words(record: dict) -> str:
    """A recipe's name with the batch size that it had."""
    return f"{record['protocol']}, batches of {record['settings']['recipe']['batch_size']}"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"cifar10-mini": mini_table, "headline": headline_table},
    "docs/results.md": {
        "poisons": lambda: poison_table(measured("poisons"), "cifar10"),
        "countermeasures": grid_of("countermeasures"),
        "protocols": table_by(recipe_in_words, "protocols", "recipe"),
        "victims": table_by(lambda record: record["settings"]["victim"], "victims", "victim"),
        "cpu victim": cpu_victim_table,
        "full size": full_size_table,
        "tiny": tiny_table("tiny_imagenet_20"),
        "tiny search": tiny_table("tiny_imagenet_20_search"),
        "guides": grid_of("guides"),
        "coloured": grid_of("coloured"),
        "without labels": unlabelled_table,
        "both ways": both_ways_table,
        "attacks": lambda: grid_table(Measured(read_records(RESULTS / "attacks_cifar10_5k.jsonl")), "cifar10"),
    },
    "docs/audit.md": {},
    "docs/detection.md": {
        "false alarms": lambda: detection.false_alarm_table(read_records(RESULTS / "detection.jsonl")),
        "detection": lambda: detection.table(read_records(RESULTS / "detection.jsonl")),
    },
    "docs/spectrum.md": {
        "validation": lambda: spectrum_guidance.table(read_records(RESULTS / "spectrum_guidance.jsonl"), "validation"),
        "residues": lambda: spectrum_guidance.residue_table(read_records(RESULTS / "spectrum_guidance.jsonl")),
    },
    "docs/speed.md": {
        "speed": lambda: speed_table(read_records(RESULTS / "throughput.jsonl"), "ddpm-cifar10"),
        "evaluations": lambda: grid_table(Measured(read_records(RESULTS / "evaluations_cifar10_3k.jsonl")), "cifar10"),
    },
    "docs/scaling.md": {"measured": lambda: purify_scaling.table(read_records(RESULTS / "purify_scaling.jsonl"))},
    "training/README.md": {
        "finetune": lambda: finetune_versus_scratch.table(read_records(RESULTS / "finetune_versus_scratch.jsonl"))
    },
}


FIGURE = re.compile(r"(<!-- n:([\w.-]+) -->).*?(<!-- /n -->)", re.DOTALL)


def written(page: str) -> str:
    """
    A page's text with its tables and figures as the records have them.

    Raises:
        ValueError: If the page lacks the place of a table, or asks for a figure that nobody knows.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{page} has no <!-- {name} --> ... <!-- /{name} -->, where a table belongs.")
        text = place.sub(lambda found, table=table: found[1] + table() + "\n" + found[2], text)

    try:
        return FIGURE.sub(lambda found: found[1] + figure(found[2]) + found[3], text)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not as records are")
    args = parser.parse_args()
    with ends_in_one_sentence("pages"):
        for page in PAGES:
            text = written(page)
            if args.check and text != (ROOT / page).read_text(encoding="utf-8"):
                raise ValueError(f"{page} does not say what the records say: python eval/pages.py writes its tables.")
            if not args.check:
                (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
