"""Images of several sets side by side, and their change, magnified; `figures.py` has the commands."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.measured import POISONS
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.poisons.protect import read_card


def add_poisons_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clean", required=True, help="the clean images that were protected, with labels")
    parser.add_argument("--split", default="train", help="of the clean images")
    parser.add_argument("--protected", required=True, nargs="+", help="folders that `jcdp poison` or a grid wrote")
    parser.add_argument("--shown", type=int, default=8, help="images, one of each of the first classes")
    parser.add_argument("--output", default="results/figures/poisons.png")


def draw_poisons(args: argparse.Namespace) -> None:
    """One row per poison: the same images with its noise, and beside them the noise, magnified to fill the scale."""
    source = load_images(args.clean, split=args.split)
    row_of = {id_: row for row, id_ in enumerate(source.ids)}
    sets = {folder: load_images(folder) for folder in args.protected}
    for folder, data in sets.items():
        if unknown := [id_ for id_ in data.ids if id_ not in row_of]:
            raise SystemExit(f"figures: protected {folder!r} has the id {unknown[0]!r}, but clean has no such image.")
    first = next(iter(sets.values()))
    ids = one_of_each_class(source.subset([row_of[id_] for id_ in first.ids]), args.shown)
    clean = images_of("clean", source, ids)
    shown = {"clean": (clean, None)}
    for folder, data in sets.items():
        card, images = read_card(folder), images_of(f"protected {folder!r}", data, ids)
        norms, name = card["measured"], POISONS.get(card["method"], card["method"])
        title = (
            f"{name} ({card['preset']})\nlargest change {norms['linf']:.0f}/255\n"
            f"L2 norm {norms['l2_mean']:.2f}\nchanged pixels {norms['l0_mean']:.0f}"
        )
        shown[title] = (images, magnified(clean, images))
    save_rows(shown, args.output)


def one_of_each_class(data: LabelledImages, shown: int) -> list[str]:
    """The id of the first image of each of the first classes that are there."""
    return [data.ids[int(np.argmax(data.labels == label))] for label in np.unique(data.labels)[:shown]]


def images_of(title: str, data: LabelledImages, ids: Sequence[str]) -> np.ndarray:
    """The images with these ids, in this order."""
    rows = {id_: row for row, id_ in enumerate(data.ids)}
    if missing := [id_ for id_ in ids if id_ not in rows]:
        raise SystemExit(f"figures: {title} lacks the image {missing[0]!r}, but all sets must have the same ids.")
    return data.images[[rows[id_] for id_ in ids]]


def magnified(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    """The change on middle grey, stretched until its largest value is black or white; uint8 (N, H, W, C)."""
    change = poisoned.astype(np.float32) - clean
    largest = np.abs(change).max(axis=(1, 2, 3), keepdims=True).clip(min=1)
    return np.rint(127.5 + 127.5 * change / largest).astype(np.uint8)


def save_rows(shown: dict[str, tuple[np.ndarray, np.ndarray | None]], output: str) -> None:
    """Rows of images, uint8 (N, H, W, C), with their change, magnified, if any, at the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(next(iter(shown.values()))[0])
    figure, axes = plt.subplots(
        len(shown),
        2 * count + 1,
        figsize=(2 * count * 0.66, len(shown) * 0.75),
        width_ratios=[*[1] * count, 0.3, *[1] * count],
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (title, (images, noise)) in enumerate(shown.items()):
        axes[row, 0].text(-0.15, 0.5, title, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=7)
        for column, image in enumerate([*images, *([] if noise is None else noise)]):
            axis = axes[row, column + (column >= count)]
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes[0, 0].set_title("images", fontsize=8, loc="left")
    axes[1, count + 1].set_title(
        "difference from the first row, magnified to the full grey scale", fontsize=8, loc="left"
    )
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0, wspace=0.04, hspace=0.06)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    # Titles stand outside the axes: tight makes room for them, whatever the number of rows and images.
    figure.savefig(output, dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def add_purified_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sets", required=True, nargs="+", metavar="TITLE=DIR", help="data sets with the same ids, clean images first"
    )
    parser.add_argument("--split", help="of all sets; the only one if not given")
    parser.add_argument("--shown", type=int, default=8, help="images, one of each of the first classes")
    parser.add_argument("--output", default="results/figures/purified.png")


def draw_purified(args: argparse.Namespace) -> None:
    """After the paper's Figure 2: the same images clean, protected, purified, and how they differ from the first."""
    sources = {title: source for title, _, source in (entry.partition("=") for entry in args.sets)}
    sets = {title: load_images(source, split=args.split) for title, source in sources.items()}
    if len(sets) < 2:
        raise SystemExit(f"figures: sets is {' '.join(args.sets)}, but two at least are accepted, clean images first.")
    ids = one_of_each_class(next(iter(sets.values())), args.shown)
    shown = {}
    for title, data in sets.items():
        images = images_of(title, data, ids)
        shown[title] = (images, magnified(next(iter(shown.values()))[0], images) if shown else None)
    save_rows(shown, args.output)
