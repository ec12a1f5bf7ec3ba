"""Draws the pictures of the repository: `python eval/figures.py poisons --help` and the like.

A picture is a line in `FIGURES`: a function that adds its options to a parser, and one that draws from what it parsed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from jcdp_diffusers import poisons
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.poisons.protect import protect_dataset


def add_poisons_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="clean images with labels")
    parser.add_argument("--split", default="train")
    parser.add_argument("--cache", required=True, help="folder in which protected data sets are kept")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--train_images", type=int, default=5000)
    parser.add_argument("--shown", type=int, default=8, help="images, one of each of the first classes")
    parser.add_argument("--output", default="results/figures/poisons.png")


def draw_poisons(args: argparse.Namespace) -> None:
    """One row per poison: the same images with its noise, and beside them the noise, magnified to fill the scale."""
    clean = load_images(args.dataset, split=args.split)
    clean = clean.subset(range(args.train_images))
    chosen = [int(np.argmax(clean.labels == label)) for label in range(args.shown)]
    shown = {"clean": (clean.images[chosen], None)}
    for name in poisons.NAMES:
        data = protected(clean, name, args)
        norms = poisons.measured_norms(clean.images, data.images)
        shown[f"{name}\nL∞ {norms['linf']}/255\nL2 {norms['l2_mean']:.2f}\nL0 {norms['l0_mean']:.0f}"] = (
            data.images[chosen],
            magnified(clean.images[chosen], data.images[chosen]),
        )
    save_rows(shown, args.output)


def protected(clean: LabelledImages, name: str, args: argparse.Namespace) -> LabelledImages:
    folder = Path(args.cache) / f"{name}-{args.preset}-{len(clean)}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return protect_dataset(
        clean, folder, method=name, preset=args.preset, device=device, source=args.dataset, progress=True
    )


def magnified(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    """The change on middle grey, stretched until its largest value is black or white; uint8 (N, H, W, C)."""
    change = poisoned.astype(np.float32) - clean
    largest = np.abs(change).max(axis=(1, 2, 3), keepdims=True).clip(min=1)
    return np.rint(127.5 + 127.5 * change / largest).astype(np.uint8)


def save_rows(shown: dict[str, tuple[np.ndarray, np.ndarray | None]], output: str) -> None:
    """Rows of images, uint8 (N, H, W, C), with their noise, if any, at the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(next(iter(shown.values()))[0])
    figure, axes = plt.subplots(
        len(shown),
        2 * count + 1,
        figsize=(2 * count * 0.72, len(shown) * 0.78),
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
    axes[1, count + 1].set_title("noise, magnified to the full grey scale", fontsize=8, loc="left")
    figure.subplots_adjust(left=0.07, right=0.995, top=0.96, bottom=0.005, wspace=0.04, hspace=0.06)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)


# Name on the command line -> what it shows, its options, how it is drawn.
FIGURES = {
    "poisons": ("all poisons on the same images", add_poisons_arguments, draw_poisons),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, (help_text, add_arguments, draw) in FIGURES.items():
        figure = figures.add_parser(name, help=help_text)
        add_arguments(figure)
        figure.set_defaults(draw=draw)
    args = parser.parse_args()
    args.draw(args)


if __name__ == "__main__":
    main()
