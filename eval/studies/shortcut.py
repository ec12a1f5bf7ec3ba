"""What the audit's shortcut test sees: a linear model on each poison, on part of a data set.

    python eval/studies/shortcut.py --dataset DIR --cache DIR --output results/shortcut_cifar10.jsonl

Every poison is a record, and is skipped when it is on record already. Seconds each, once the poisons are in the cache.
"""

import argparse
import time
from pathlib import Path

from jcdp_diffusers import poisons
from jcdp_diffusers.audit.shortcut import shortcut_test
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import load_images
from jcdp_diffusers.poisons.protect import protect_dataset, read_card
from jcdp_diffusers.results import append_record, read_records


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, help="data set with a train and a test split")
    parser.add_argument("--cache", required=True, help="folder in which protected data sets are kept")
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--poisons", nargs="+", default=("clean", *poisons.NAMES), choices=("clean", *poisons.NAMES))
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--train_images", type=int, default=5000)
    parser.add_argument("--test_images", type=int, default=2000)
    args = parser.parse_args()
    with ends_in_one_sentence("shortcut"):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """A record per poison."""
    clean = load_images(args.dataset, split="train").subset(range(args.train_images))
    test = load_images(args.dataset, split="test").subset(range(args.test_images))
    for name in args.poisons:
        settings = {
            "dataset": Path(args.dataset).name,
            "train_images": args.train_images,
            "test_images": args.test_images,
            "poison": name,
            "poison_preset": None if name == "clean" else args.preset,
        }
        known = read_records(args.output) if Path(args.output).exists() else []
        if any(settings.items() <= record["settings"].items() for record in known):
            continue
        data = clean
        if name != "clean":
            folder = Path(args.cache) / f"{name}-{args.preset}-{len(clean)}"
            data = protect_dataset(clean, folder, method=name, preset=args.preset, source=args.dataset, progress=True)
            settings["poison_norms"] = read_card(folder)["measured"]
        start = time.perf_counter()
        result = shortcut_test(data, test)
        append_record(
            args.output,
            what="shortcut_test",
            value=result,
            seed=0,
            protocol="linear",
            settings=settings,
            device="cpu",
            seconds=round(time.perf_counter() - start, 2),
        )
        figures = ", ".join(f"{part} {share:.1%}" for part, share in result["protected"].items())
        print(f"{name}: {figures}; {'a shortcut' if result['found'] else 'none seen'}")


if __name__ == "__main__":
    main()
