"""Draws the pictures of the repository: `python eval/figures.py poisons --help` and the like.

A picture is a line in `FIGURES`: a function that adds its options to a parser, and one that draws from what it parsed.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from jcdp_diffusers.data import load_images
from jcdp_diffusers.poisons.protect import read_card
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.results import read_records


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
    shown = {}
    for folder in args.protected:
        card, data = read_card(folder), load_images(folder)
        if unknown := [id_ for id_ in data.ids if id_ not in row_of]:
            raise SystemExit(f"figures: protected {folder!r} has the id {unknown[0]!r}, but clean has no such image.")
        clean = source.subset([row_of[id_] for id_ in data.ids])
        chosen = [int(np.argmax(clean.labels == label)) for label in range(args.shown)]
        shown.setdefault("clean", (clean.images[chosen], None))
        norms = card["measured"]
        title = (
            f"{card['method']} ({card['preset']})\nL∞ {norms['linf']}/255\n"
            f"L2 {norms['l2_mean']:.2f}\nL0 {norms['l0_mean']:.0f}"
        )
        shown[title] = (data.images[chosen], magnified(clean.images[chosen], data.images[chosen]))
    save_rows(shown, args.output)


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
    figure.subplots_adjust(left=0.085, right=0.995, top=0.96, bottom=0.005, wspace=0.04, hspace=0.06)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def add_purified_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sets", required=True, nargs="+", metavar="TITLE=DIR", help="data sets with the same ids, clean images first"
    )
    parser.add_argument("--shown", type=int, default=8, help="images, one of each of the first classes")
    parser.add_argument("--output", default="results/figures/purified.png")


def draw_purified(args: argparse.Namespace) -> None:
    """After the paper's Figure 2: the same images clean, protected, purified, and how they differ from the first."""
    sets = {title: load_images(source) for title, _, source in (entry.partition("=") for entry in args.sets)}
    first = next(iter(sets.values()))
    classes = np.unique(first.labels)[: args.shown]
    ids = [first.ids[int(np.argmax(first.labels == label))] for label in classes]
    shown = {}
    for title, data in sets.items():
        rows = {id_: row for row, id_ in enumerate(data.ids)}
        if missing := [id_ for id_ in ids if id_ not in rows]:
            raise SystemExit(f"figures: {title} lacks the image {missing[0]!r}, but all sets must have the same ids.")
        images = data.images[[rows[id_] for id_ in ids]]
        shown[title] = (images, magnified(next(iter(shown.values()))[0], images) if shown else None)
    save_rows(shown, args.output)


def add_curves_arguments(parser: argparse.ArgumentParser) -> None:
    add_record_arguments(parser)
    parser.add_argument("--output", default="results/figures/curves.png")


def draw_curves(args: argparse.Namespace) -> None:
    """After the paper's Figure 3: test accuracy by epoch, a panel per poison, a line per countermeasure."""
    records = grid_records(args, "victim")
    poisons_found = list(dict.fromkeys(record["settings"]["poison"] for record in records))
    columns = list(dict.fromkeys(record["settings"]["column"] for record in records))
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(poisons_found), figsize=(3.6 * len(poisons_found) + 1.6, 3), sharey=True, squeeze=False
    )
    for axis, poison in zip(axes[0], poisons_found):
        for number, column in enumerate(columns):
            chosen = [r for r in records if (r["settings"]["poison"], r["settings"]["column"]) == (poison, column)]
            curves = [[100 * epoch["test_accuracy"] for epoch in r["value"]["history"]] for r in chosen]
            if curves:
                epochs = range(1, len(curves[0]) + 1)
                colour = plt.get_cmap("tab10" if len(columns) <= 10 else "tab20")(number)
                axis.plot(epochs, np.mean(curves, axis=0), color=colour, label=column)
                axis.fill_between(epochs, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.15)
        axis.set(title="clean images" if poison == "none" else poison, xlabel="epoch", ylim=(0, 100))
    axes[0, 0].set_ylabel("test accuracy (%)")
    finish(figure, axes[0], args)


def add_strength_arguments(parser: argparse.ArgumentParser) -> None:
    add_record_arguments(parser)
    parser.add_argument("--output", default="results/figures/strength.png")


def draw_strength(args: argparse.Namespace) -> None:
    """Accuracy against T_p, a line per poison and way of purifying; dotted, without purification."""
    records = grid_records(args, "accuracy")
    purified = [record for record in records if record["settings"].get("purification")]
    if not purified:
        raise SystemExit("figures: records hold no cell with purification settings of its own, but the axis is T_p.")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    poisons_found = list(dict.fromkeys(record["settings"]["poison"] for record in records))
    drawn = 0
    for poison in poisons_found:
        first = plt.get_cmap("tab10")(drawn % 10)
        lines: dict[str, dict[int, list[float]]] = {}
        for record in purified:
            if record["settings"]["poison"] == poison:
                steps = record["settings"]["purification"]["diffusion_steps"]
                by_steps = lines.setdefault(way_of_purifying(record["settings"]), {})
                by_steps.setdefault(steps, []).append(100 * record["value"])
        for way, by_steps in lines.items():
            steps = sorted(by_steps)
            means = [np.mean(by_steps[step]) for step in steps]
            deviations = [np.std(by_steps[step], ddof=1) if len(by_steps[step]) > 1 else 0 for step in steps]
            label = ("clean images" if poison == "none" else poison) + (f", {way}" if way else "")
            colour, marker = plt.get_cmap("tab10")(drawn % 10), "osD^v<>PX*"[drawn % 10]
            axis.errorbar(steps, means, deviations, color=colour, marker=marker, markersize=4, capsize=2, label=label)
            drawn += 1
        plain = [
            100 * r["value"]
            for r in records
            if r["settings"]["poison"] == poison and r["settings"]["column"] == "none"
        ]
        if plain:
            axis.axhline(np.mean(plain), color=first, linestyle=":", linewidth=1)
    axis.set(xlabel="forward steps T_p", ylabel="test accuracy (%)", ylim=(0, 100))
    finish(figure, [axis], args)


def way_of_purifying(settings: dict) -> str:
    """What, beside T_p and the number of evaluations, tells this purification from the package's default."""
    usual = {field.name: field.default for field in dataclasses.fields(PurificationConfig)}
    aside = ("diffusion_steps", "num_inference_steps", "variance_type", "trained_timesteps", "perceptual_network")
    others = [
        f"{name} {value}"
        for name, value in settings["purification"].items()
        if name not in aside and value != usual[name]
    ]
    return ", ".join(([settings["countermeasure"]] if settings["countermeasure"] != "unconditional" else []) + others)


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", required=True, nargs="+", help="JSON Lines files of eval/benchmark.py")
    parser.add_argument("--dataset", help="as records call it; the only one if not given")
    parser.add_argument("--roles", choices=("disjoint", "paper"), default="disjoint")
    parser.add_argument("--smoke", action="store_true", help="records of smoke runs, which mean nothing")


def grid_records(args: argparse.Namespace, what: str) -> list[dict]:
    """The last record of each cell of one data set and one assignment of roles."""
    cells = {}
    for path in args.records:
        for record in read_records(path):
            settings = record["settings"]
            wanted = (
                record["what"] == what and "column" in settings and settings.get("roles", args.roles) == args.roles
            )
            if wanted and settings["recipe"]["smoke"] == args.smoke:
                cells[settings["cell"]] = record
    found = sorted({record["settings"]["dataset"] for record in cells.values()})
    if args.dataset is None and len(found) != 1 or args.dataset is not None and args.dataset not in found:
        raise SystemExit(f"figures: dataset is {args.dataset!r}, but the records hold {found}.")
    return [record for record in cells.values() if record["settings"]["dataset"] == (args.dataset or found[0])]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(figure, axes, args: argparse.Namespace) -> None:
    """Legend, note and file."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    if args.smoke:
        figure.suptitle("smoke run: no figure means anything", fontsize=8)
    if args.roles == "paper":
        figure.suptitle("roles as in the paper: the purifier has seen the test images", fontsize=8)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


# Name on the command line -> what it shows, its options, how it is drawn.
FIGURES = {
    "poisons": ("all poisons on the same images", add_poisons_arguments, draw_poisons),
    "purified": ("the same images of several data sets", add_purified_arguments, draw_purified),
    "curves": ("test accuracy by epoch, from records", add_curves_arguments, draw_curves),
    "strength": ("accuracy against purification strength, from records", add_strength_arguments, draw_strength),
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
