"""Every countermeasure against every poison on a part of CIFAR-10: what a victim learns of the protected images.

    python eval/countermeasures.py --dataset DIR --output results/countermeasures_cifar10_mini.jsonl --cache DIR

Every cell (poison, countermeasure, seed) appends its accuracies and is skipped when it is on record already, so the
command can be stopped at any time and given again, and several can write into one file. Protected rows are the first
of the training split, test rows the first of the test split.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from jcdp_diffusers import countermeasures, poisons
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.poisons.protect import protect_dataset, read_card
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.score import FIGURES, score
from jcdp_diffusers.victims.supervised import RECIPES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, help="data set with a train and a test split")
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--cache", required=True, help="folder in which protected and purified data sets are kept")
    parser.add_argument("--poisons", nargs="+", default=("lsp",), choices=("clean", *poisons.NAMES))
    parser.add_argument("--countermeasures", nargs="+", default=("none", "gray", "jpeg-10", "bdr-2"))
    parser.add_argument("--preset", default="cpu", help="of the poisons")
    parser.add_argument("--purifier", help="folder or Hub id of a DDPM, for countermeasures that purify")
    parser.add_argument("--purification", help="preset in place of the countermeasure's own settings")
    parser.add_argument("--train_images", type=int, default=10_000)
    parser.add_argument("--test_images", type=int, default=5_000)
    parser.add_argument("--protocol", default="mini", choices=tuple(RECIPES), help="the victim's recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="of the victim; the poison's is 0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no new cell is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    end = time.monotonic() + 60 * args.minutes
    clean = load_images(args.dataset, split="train").subset(range(args.train_images))
    test = load_images(args.dataset, split="test").subset(range(args.test_images))
    for seed in args.seeds:
        for poison in args.poisons:
            train, facts = protected(clean, poison, args)
            for name in args.countermeasures:
                settings = {
                    "dataset": Path(args.dataset).name,
                    "train_images": len(train),
                    "test_images": len(test),
                    "victim": "resnet18",
                    "width": RECIPES[args.protocol].width,
                    "recipe": asdict(RECIPES[args.protocol]),
                    "countermeasure": name,
                    "purification": args.purification,
                    **facts,
                }
                if time.monotonic() < end and not on_record(args, settings, seed):
                    measure(train, test, settings, seed, args)


def protected(clean: LabelledImages, poison: str, args: argparse.Namespace) -> tuple[LabelledImages, dict]:
    """The poisoned images, made once and kept, and what is said of them."""
    if poison == "clean":
        return clean, {"poison": None}
    folder = Path(args.cache) / f"{poison}-{args.preset}-{len(clean)}"
    data = protect_dataset(
        clean, folder, method=poison, preset=args.preset, device=args.device, source=args.dataset, progress=True
    )
    card = read_card(folder)
    return data, {
        "poison": poison,
        "poison_preset": args.preset,
        "poison_seed": card["seed"],
        "poison_settings": card["settings"],
        "poison_norms": card["measured"],
    }


def on_record(args: argparse.Namespace, settings: dict, seed: int) -> bool:
    """Whether this cell has been measured."""
    fields = ("dataset", "train_images", "test_images", "width", "poison", "poison_preset", "countermeasure")
    fields += ("purification",)
    return Path(args.output).exists() and any(
        record["what"] == "accuracy"
        and (record["seed"], record["protocol"]) == (seed, args.protocol)
        and all(record["settings"].get(name) == settings.get(name) for name in fields)
        for record in read_records(args.output)
    )


def measure(train: LabelledImages, test: LabelledImages, settings: dict, seed: int, args: argparse.Namespace) -> None:
    """Trains one victim and records it."""
    result = score(
        train,
        test,
        protocol=args.protocol,
        seeds=[seed],
        countermeasure=settings["countermeasure"],
        purifier=args.purifier,
        purification=args.purification,
        device=args.device,
        checkpoint_dir=Path(args.cache) / "purified" / f"{settings['poison']}-{len(train)}-{args.purification}",
        progress=True,
    )
    run = result["runs"][0]
    settings |= {
        "countermeasure_kind": countermeasures.get(settings["countermeasure"]).kind,
        "countermeasure_settings": result["request"]["countermeasure_settings"],
        "prepare_seconds": run["prepare_seconds"],
        "threads": run["threads"],
        "precision": run["precision"],
    }
    for what in reversed(FIGURES):  # test accuracy last: it is what says that the cell is done
        append_record(
            args.output,
            what=what,
            value=round(run[what], 4),
            seed=seed,
            protocol=args.protocol,
            settings=settings,
            device=result["device"],
            seconds=run["seconds"],
        )


if __name__ == "__main__":
    main()
