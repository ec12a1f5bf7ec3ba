"""Shows each poison to work: what a victim learns from the poison, from noise of the same size, and from clean images.

    python eval/poisons.py --dataset DIR --output results/poisons_cifar10_mini.jsonl --cache runs/poisons

Every cell (poison or its control, seed) is a training run; it appends its test accuracy and its accuracy on the images
that it was trained on, and is skipped when it is on record already. So the command can be stopped at any time and
given again, and several can write into one file.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from jcdp_diffusers import poisons
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.poisons.control import shuffled
from jcdp_diffusers.poisons.protect import protect_dataset, read_card
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.victims.supervised import RECIPES, Recipe, train_victim


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, help="data set with a train and a test split")
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--cache", required=True, help="folder in which protected data sets are kept")
    parser.add_argument("--poisons", nargs="*", default=poisons.NAMES, choices=poisons.NAMES)
    parser.add_argument("--kinds", nargs="+", default=("clean", "poison", "control"))
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--image_size", type=int, help="side to which images are brought first; their own by default")
    parser.add_argument("--train_images", type=int, default=5000)
    parser.add_argument("--test_images", type=int, default=5000)
    parser.add_argument("--protocol", default="mini", choices=sorted(RECIPES), help="the victim's recipe")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--batch_size", type=int, help="instead of the recipe's: small sets need small batches")
    parser.add_argument("--learning_rate", type=float, help="instead of the recipe's")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of the victim; the poison's is 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def first_images(source: str, split: str, count: int, image_size: int | None) -> LabelledImages:
    data = load_images(source, split=split, image_size=image_size)
    return data.subset(range(count))


def protected(clean: LabelledImages, name: str, args: argparse.Namespace) -> tuple[LabelledImages, dict]:
    """The poisoned images, made once and kept, and what their card says."""
    folder = Path(args.cache) / f"{name}-{args.preset}-{len(clean)}-{clean.images.shape[1]}"
    data = protect_dataset(
        clean, folder, method=name, preset=args.preset, device=args.device, source=args.dataset, progress=True
    )
    return data, read_card(folder)


def controlled(clean: LabelledImages, poisoned: LabelledImages) -> LabelledImages:
    """Noise of the size of a poison, image by image."""
    noise = shuffled(poisoned.tensor() - clean.tensor(), seed=0)
    return clean.with_images(poisons.apply_perturbation(clean.images, noise))


def main() -> None:
    args = parse_args()
    clean = first_images(args.dataset, "train", args.train_images, args.image_size)
    test = first_images(args.dataset, "test", args.test_images, args.image_size)
    changes = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate")}
    recipe = replace(RECIPES[args.protocol], **{name: value for name, value in changes.items() if value is not None})
    cells = [("clean", None)] * ("clean" in args.kinds)
    cells += [(kind, name) for name in args.poisons for kind in ("poison", "control") if kind in args.kinds]
    for kind, name in cells:
        settings = {
            "dataset": Path(args.dataset).name,
            "image_size": clean.images.shape[1],
            "train_images": args.train_images,
            "test_images": args.test_images,
            "victim": "resnet18",
            "width": args.width,
            "recipe": asdict(recipe) | {"milestones": list(recipe.milestones)},
            "data": kind,
        }
        data = clean
        if name is not None:
            data, card = protected(clean, name, args)
            settings |= {"poison": name, "preset": args.preset, "poison_seed": card["seed"]}
            settings |= {"poison_settings": card["settings"], "poison_norms": card["measured"]}
            settings |= {"poison_seconds": card["seconds"]}
        if kind == "control":
            data = controlled(clean, data)
            settings |= {"control_norms": poisons.measured_norms(clean.images, data.images)}
        for seed in args.seeds:
            score(data, test, recipe, seed, settings, args)


def score(
    data: LabelledImages, test: LabelledImages, recipe: Recipe, seed: int, settings: dict, args: argparse.Namespace
) -> None:
    """Trains one victim and records it, unless it is on record."""
    fields = ("dataset", "image_size", "train_images", "test_images", "width", "recipe", "data", "poison", "preset")
    cell = {name: settings.get(name) for name in fields} | {"seed": seed, "protocol": args.protocol}
    for record in read_records(args.output) if Path(args.output).exists() else []:
        known = {name: record["settings"].get(name) for name in fields}
        known |= {"seed": record["seed"], "protocol": record["protocol"]}
        if record["what"] == "accuracy" and known == cell:
            return
    title = f"{settings['data']} {settings.get('poison', '')} seed {seed}"
    with tqdm(total=recipe.epochs, unit="epoch", desc=title) as bar:
        result = train_victim(
            data,
            test,
            width=args.width,
            recipe=recipe,
            seed=seed,
            device=args.device,
            progress=lambda entry: (bar.set_postfix_str(f"test {entry['test_accuracy']:.1%}"), bar.update()),
        )
    common = {"seed": seed, "protocol": args.protocol, "device": args.device, "seconds": round(result.seconds, 1)}
    # Test accuracy last: it is what says that the cell is done.
    for what, value in (
        ("train_accuracy", result.train_accuracy),
        ("peak_accuracy", result.peak_accuracy),
        ("accuracy", result.accuracy),
    ):
        append_record(args.output, what=what, value=round(value, 4), settings=settings, **common)


if __name__ == "__main__":
    main()
