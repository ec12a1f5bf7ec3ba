"""
How often `jcdp detect` is right: false alarms on clean sets, and what it finds by poison and by protected fraction.

    python eval/studies/detection.py clean --dataset DIR --name cifar10 --output results/detection.jsonl
    python eval/studies/detection.py poisons --dataset DIR --name cifar10 --cache DIR --output results/detection.jsonl
    python eval/studies/detection.py digits --output results/detection.jsonl
    python eval/studies/detection.py table --output results/detection.jsonl

`clean` divides a labelled data set at random into a suspicious and a collected half, again and again. `poisons`
protects a fraction of one half. Each repetition is a record, and is skipped when it is on record already. About 15
seconds per repetition of 5,000 images on one core.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np


sys.path.append(str(Path(__file__).parents[2]))
from eval.measured import NOT_MEASURED
from eval.tables import markdown_table  # noqa: E402
from jcdp_diffusers import poisons  # noqa: E402
from jcdp_diffusers.cli import Parser, ends_in_one_sentence  # noqa: E402
from jcdp_diffusers.data import LabelledImages, load_images  # noqa: E402
from jcdp_diffusers.data.examples import digits  # noqa: E402
from jcdp_diffusers.detect import detect  # noqa: E402
from jcdp_diffusers.poisons.protect import protect_dataset  # noqa: E402
from jcdp_diffusers.results import append_record, read_records  # noqa: E402


FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def halves(data: LabelledImages, count: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Two disjoint random parts of `count` images each."""
    rows = np.random.default_rng(seed).permutation(len(data))[: 2 * count]
    if len(rows) < 2 * count:
        raise ValueError(f"images is {count}, but the data set has {len(data)} images, and two such parts are needed.")
    return data.subset(rows[:count]), data.subset(rows[count:])


def measure(output: str, settings: dict, seed: int, suspicious: LabelledImages, collected: LabelledImages) -> None:
    """One record, unless it is there."""
    known = read_records(output) if Path(output).exists() else []
    if any(record["settings"] == settings and record["seed"] == seed for record in known):
        return
    start = time.perf_counter()
    found = detect(suspicious, collected, seed=seed)
    value = {
        "protected": found["protected"],
        "linear": found["shortcut"]["linear"],
        "two-layer": found["shortcut"]["two-layer"],
        "carriers": found["shortcut"]["carriers"]["share"],
        "spectrum": {
            name: found["spectrum"][name] for name in ("finding", "p_value", "largest_z", "excess", "deficit")
        },
    }
    append_record(
        output,
        what="detection",
        value=value,
        seed=seed,
        protocol="detect",
        settings=settings,
        device="cpu",
        seconds=round(time.perf_counter() - start, 2),
    )
    print(f"{settings} {seed}: {value['protected']}, {value['spectrum']['finding']}", flush=True)


def clean(args: argparse.Namespace, data: LabelledImages) -> None:
    """False alarms: nothing is protected."""
    for seed in range(args.repetitions):
        settings = {"dataset": args.name, "images": args.images, "poison": "none", "fraction": 0.0}
        measure(args.output, settings, seed, *halves(data, args.images, seed))


def poisoned(args: argparse.Namespace, data: LabelledImages) -> None:
    """Each poison on each fraction of the suspicious half; which images are protected depends on the seed."""
    suspicious, collected = halves(data, args.images, 0)
    for name in args.poisons:
        folder = Path(args.cache) / f"{args.name}-{name}-{args.preset}-{args.images}"
        protected = protect_dataset(suspicious, folder, method=name, preset=args.preset, seed=0, progress=True)
        for fraction in FRACTIONS:
            settings = {
                "dataset": args.name,
                "images": args.images,
                "poison": name,
                "poison_preset": args.preset,
                "fraction": fraction,
            }
            for seed in range(args.repetitions):
                rows = np.random.default_rng(seed).permutation(args.images)[: round(fraction * args.images)]
                images = suspicious.images.copy()
                images[rows] = protected.images[rows]
                measure(args.output, settings, seed, suspicious.with_images(images), collected)


def false_alarm_table(records: list[dict]) -> str:
    """How many clean sets were called protected, by data set and size."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        if record["settings"]["poison"] == "none":
            key = (record["settings"]["dataset"], record["settings"]["images"])
            groups.setdefault(key, []).append(record["value"])
    rows = [
        [name, str(images), str(len(values)), str(sum(value["protected"] for value in values)), _largest(values)]
        for (name, images), values in groups.items()
    ]
    return markdown_table(
        ["clean data set", "images", "sets", "called protected", "largest gap of a linear model"], rows
    )


def _largest(values: list[dict]) -> str:
    return f"{100 * max(value['linear']['gap'] for value in values):.1f} points"


def table(records: list[dict]) -> str:
    """What gave a protection away, by poison and protected fraction."""
    groups: dict[str, dict[float, list[dict]]] = {}
    for record in records:
        settings = record["settings"]
        if settings["poison"] != "none":
            groups.setdefault(settings["poison"], {}).setdefault(settings["fraction"], []).append(record["value"])
    rows = [
        [
            poison.upper(),
            *(_evidence(found[fraction]) if fraction in found else NOT_MEASURED for fraction in FRACTIONS),
        ]
        for poison, found in groups.items()
    ]
    return markdown_table(["poison", *(f"{100 * fraction:g} %" for fraction in FRACTIONS)], rows)


def _evidence(values: list[dict]) -> str:
    """The evidence that was found in all repetitions, or in how many of them anything was."""
    labels = [value["linear"]["found"] or value["two-layer"]["found"] for value in values]
    spectrum = [value["spectrum"]["finding"] == "noise" for value in values]
    if all(labels) or all(spectrum):
        return "both" if all(labels) and all(spectrum) else "labels" if all(labels) else "spectrum"
    found = sum(a or b for a, b in zip(labels, spectrum))
    return f"{found} of {len(values)}" if found else "no"


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("question", choices=("clean", "poisons", "digits", "table"))
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--dataset", help="labelled data set; its split train is divided")
    parser.add_argument("--name", help="what records call the data set")
    parser.add_argument("--images", type=int, default=5000, help="of each of the two parts")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--poisons", nargs="+", choices=poisons.NAMES, default=poisons.NAMES)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--cache", help="folder in which protected sets are kept")
    args = parser.parse_args()
    with ends_in_one_sentence("detection"):
        if args.question == "table":
            records = read_records(args.output)
            print(false_alarm_table(records), table(records), sep="\n\n")
        elif args.question == "digits":
            args.name, everything = "digits", digits((1795, 1, 1))[0]
            args.images = min(args.images, len(everything) // 2)
            clean(args, everything)
        else:
            if args.dataset is None or args.name is None:
                raise ValueError(f"--dataset is {args.dataset} and --name is {args.name}, but both are needed.")
            data = load_images(args.dataset, split="train")
            (clean if args.question == "clean" else poisoned)(args, data)


if __name__ == "__main__":
    main()
