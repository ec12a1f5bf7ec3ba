"""Draws the pictures of the repository: `python eval/figures.py poisons --help` and the like.

A picture is a line in `FIGURES`: a function that adds its options to a parser, and one that draws from what it parsed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


# A script is started with its own folder alone on the path, and a package has its own name for what is beside it.
sys.path.append(str(Path(__file__).parents[1]))
from eval.measured import (
    ROLES_SAID,
    Key,
    Measured,
    add_record_arguments,
    chosen_records,
    identity,
    refuse_differences,
    spread,
)
from eval.pictures import add_poisons_arguments, add_purified_arguments, draw_poisons, draw_purified
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.purification_config import PurificationConfig


def add_curves_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured_arguments(parser)
    parser.add_argument("--output", default="results/figures/curves.png")


def draw_curves(args: argparse.Namespace) -> None:
    """After the paper's Figure 3: test accuracy by epoch, a panel per poison, a line per countermeasure."""
    measured, dataset = measured_of(args)
    # What is learned without labels has no accuracy of its own before the probe.
    shown = "test_accuracy" if measured.method == "supervised" else "knn_accuracy"
    # Clean images and poisons in the order of the tables, controls behind them.
    found = [(key.poison, key.poison_preset) for key in measured.keys(dataset)]
    panels = dict.fromkeys([*measured.poisons(dataset), *found])
    titles = list(dict.fromkeys(measured.column_title(key) for key in measured.keys(dataset)))
    plt = pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3 * rows), sharey=True, squeeze=False)
    figure.subplots_adjust(hspace=0.4)
    for axis in axes.flat[len(panels) :]:
        axis.remove()  # the legend, right of the last panel, stands there
    for axis, panel in zip(axes.flat, panels):
        title_of_panel = measured.poison_title(dataset, *panel)
        for key in measured.keys(dataset):
            if (key.poison, key.poison_preset) != panel:
                continue
            title = measured.column_title(key)
            histories = [record["value"]["history"] for record in measured.by_seed("victim", key).values()]
            if len(lengths := sorted({len(history) for history in histories})) > 1:
                raise SystemExit(
                    f"figures: records hold histories of {lengths[0]} and {lengths[-1]} epochs for {title} against "
                    f"{title_of_panel}, but a line needs the same number from every seed."
                )
            curves = [[100 * epoch[shown] for epoch in history if shown in epoch] for history in histories]
            if curves:
                epochs = [number for number, epoch in enumerate(histories[0], start=1) if shown in epoch]
                style = line_style(titles.index(title))
                axis.plot(epochs, np.mean(curves, axis=0), label=title, markevery=0.2, markersize=3, **style)
                axis.fill_between(
                    epochs, np.min(curves, axis=0), np.max(curves, axis=0), color=style["color"], alpha=0.15
                )
        axis.set(title=title_of_panel, xlabel="epoch", ylim=(0, 100))
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy (%)" if shown == "test_accuracy" else "accuracy of nearest neighbours (%)")
    finish(figure, axes.flat[: len(panels)], args, caption_of(measured, dataset, "mean and range"), titles)


def line_style(number: int) -> dict:
    """Of a line: no two of the first hundred have the same colour and marker, or of thirty colour and dashes."""
    # Markers and dashes move on by one with each round of the colours: cycles in step would repeat after ten.
    round_, colour = divmod(number, 10)
    return {
        "color": pyplot().get_cmap("tab10")(colour),
        "marker": "osD^v<>PX*"[(colour + round_) % 10],
        "linestyle": ("-", "--", "-.")[round_ % 3],
    }


def add_strength_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured_arguments(parser)
    parser.add_argument("--output", default="results/figures/strength.png")


def draw_strength(args: argparse.Namespace) -> None:
    """Accuracy against T_p, a line per poison and way of purifying; dotted, without purification."""
    draw_lines(
        args,
        ("diffusion_steps", "num_inference_steps"),
        lambda settings: settings["purification"]["diffusion_steps"],
        "T_p",
        xlabel="forward steps T_p",
    )


def add_evaluations_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured_arguments(parser)
    parser.add_argument("--output", default="results/figures/evaluations.png")


def draw_evaluations(args: argparse.Namespace) -> None:
    """Accuracy against the cost of purification, a line per poison, T_p and number of rounds."""
    draw_lines(
        args,
        ("num_inference_steps",),
        evaluations_per_image,
        "evaluations",
        xlabel="UNet evaluations per image",
        xscale="log",
    )


def evaluations_per_image(settings: dict) -> int:
    """Of all rounds and draws."""
    return config_of(settings["purification"]).evaluations_per_image * settings.get("draws", 1)


def config_of(purification: dict) -> PurificationConfig:
    """Settings as records have them, in JSON, which knows lists only."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in purification.items()}
    return PurificationConfig(**fields)


def draw_lines(
    args: argparse.Namespace,
    moving: tuple[str, ...],
    place: Callable[[dict], int],
    name: str,
    **look,
) -> None:
    """
    Accuracy over what `place` makes of a cell's settings, called `name` in errors; along a line only the settings
    `moving` may change. `look` are properties of matplotlib's axis.
    """
    measured, dataset = measured_of(args)
    lines: dict[tuple, dict[str, dict[int, Key]]] = {}
    for key in measured.keys(dataset):
        settings = settings_of(measured, key)
        if settings.get("purification"):
            ways = lines.setdefault((key.poison, key.poison_preset), {})
            points = ways.setdefault(way_of_purifying(settings, aside=moving), {})
            x = place(settings)
            if x in points:
                raise SystemExit(
                    f"figures: records hold {key.column!r} and {points[x].column!r} against {key.poison!r}, "
                    f"both with {name} {x} on one line, but a line has one point there: give one of the two."
                )
            points[x] = key
    if not lines:
        raise SystemExit(
            f"figures: records hold no cell with purification settings of its own, but the axis is {name}."
        )
    figure, axis = pyplot().subplots(figsize=(5.6, 3.4))
    drawn = 0
    for poison in dict.fromkeys((key.poison, key.poison_preset) for key in measured.keys(dataset)):
        title = measured.poison_title(dataset, *poison)
        style = line_style(drawn)
        for number, (way, points) in enumerate(lines.get(poison, {}).items()):
            places = sorted(points)
            refuse(
                f"points of one line, {title}{', ' if way else ''}{way},",
                [settings_of(measured, points[x]) for x in places],
                lambda settings: without(settings, moving),
            )
            values = [accuracies_of(measured, points[x]) for x in places]
            bars = [np.std(value, ddof=1) if len(value) > 1 else np.nan for value in values]
            axis.errorbar(
                places,
                [np.mean(value) for value in values],
                None if np.isnan(bars).all() else bars,
                **line_style(drawn + number) | ({"linestyle": "none"} if len(places) == 1 else {}),
                markersize=5,
                capsize=2,
                label=f"{title}, {way}" if way else title,
            )
        plain = [
            key for key in measured.keys(dataset) if (key.poison, key.poison_preset) == poison and key.column == "none"
        ]
        for key in plain:
            height = np.mean(accuracies_of(measured, key))
            dotted = style | {"linestyle": ":", "linewidth": 1.2, "markersize": 4, "clip_on": False}
            axis.axhline(height, **dotted, label=f"{title}, not purified")
        # A poison that has nothing but its dotted line has a colour of its own, too.
        drawn += max(len(lines.get(poison, {})), len(plain))
    axis.set(ylabel="test accuracy (%)", **look)
    if look.get("xscale") == "log":
        places = [x for ways in lines.values() for points in ways.values() for x in points]
        ticks = [2**power for power in range(min(places).bit_length() - 1, (max(places) - 1).bit_length() + 1)]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    finish(figure, [axis], args, caption_of(measured, dataset, "mean ± standard deviation"))


SCALES = ("pixel_guidance_scale", "perceptual_guidance_scale")


def add_scales_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured_arguments(parser)
    parser.add_argument("--output", default="results/figures/scales.png")


def draw_scales(args: argparse.Namespace) -> None:
    """Accuracy by the scales of both guides, a panel per poison and way of purifying; white where not measured."""
    measured, dataset = measured_of(args)
    panels: dict[tuple, dict[tuple[float, float], Key]] = {}
    for key in measured.keys(dataset):
        settings = settings_of(measured, key)
        if settings.get("purification"):
            way = way_of_purifying(settings, aside=SCALES)
            found = panels.setdefault((key.poison, key.poison_preset, way), {})
            scales = tuple(settings["purification"].get(name, 0.0) for name in SCALES)
            if scales in found:
                raise SystemExit(
                    f"figures: records hold {key.column!r} and {found[scales].column!r} against {key.poison!r}, both "
                    f"with pixel scale {scales[0]:g} and perceptual scale {scales[1]:g} in one panel, but a field has "
                    "one figure: give one of the two."
                )
            found[scales] = key
    panels = {name: found for name, found in panels.items() if len(found) > 1}
    if not panels:
        raise SystemExit("figures: records hold no way of purifying at two scales of a guide, the axes here.")
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3), squeeze=False, layout="constrained"
    )
    means = [np.mean(accuracies_of(measured, key)) for found in panels.values() for key in found.values()]
    for axis, ((poison, preset, way), found) in zip(axes[0], panels.items()):
        title = measured.poison_title(dataset, poison, preset)
        refuse(
            f"fields of one panel, {title}{', ' if way else ''}{way},",
            [settings_of(measured, key) for key in found.values()],
            lambda settings: without(settings, SCALES),
        )
        rows, columns = (sorted({scales[which] for scales in found}) for which in (0, 1))
        field = np.full((len(rows), len(columns)), np.nan)
        for row, column in np.ndindex(field.shape):
            key = found.get((rows[row], columns[column]))
            values = [] if key is None else accuracies_of(measured, key)
            if values:
                field[row, column] = np.mean(values)
            dark = values and field[row, column] < (min(means) + max(means)) / 2
            colour = "white" if dark else "black"
            axis.text(column, row, spread(values), ha="center", va="center", fontsize=8, color=colour)
        # One scale of colours: panels are compared with each other, too.
        axis.imshow(field, cmap="viridis", origin="lower", aspect="auto", vmin=min(means), vmax=max(means))
        axis.set_xticks(range(len(columns)), [f"{scale:g}" for scale in columns])
        axis.set_yticks(range(len(rows)), [f"{scale:g}" for scale in rows])
        axis.set(xlabel="perceptual scale", ylabel="pixel scale")
        axis.set_title("\n".join([f"{title}: test accuracy (%)", *way.split(", ")]), fontsize=8)
    save(figure, args, caption_of(measured, dataset, "mean ± standard deviation"))


def settings_of(measured: Measured, key: Key) -> dict:
    """Of one cell: those of any of its seeds, which are the same; with the variance that the pipeline takes."""
    settings = next(iter(measured.by_seed("accuracy", key).values()))["settings"]
    purification = settings.get("purification")
    if not purification or purification.get("variance_type") is not None:
        return settings
    evaluations = config_of(purification).evaluations_per_round
    if min(evaluations) == purification["diffusion_steps"]:
        return settings
    return settings | {"purification": purification | {"variance_type": "fixed_small"}}


def accuracies_of(measured: Measured, key: Key) -> list[float]:
    """Per cent, of one cell, one per seed."""
    return [100 * record["value"] for record in measured.by_seed("accuracy", key).values()]


def without(settings: dict, moving: tuple[str, ...]) -> dict:
    """What decides a figure beside some of the settings of purification."""
    purification = {name: value for name, value in settings["purification"].items() if name not in moving}
    return {name: value for name, value in identity(settings).items() if name != "column"} | {
        "purification": purification
    }


def way_of_purifying(settings: dict, aside: tuple[str, ...]) -> str:
    """T_p, rounds and what else tells this purification from the package's default, but for the settings `aside`."""
    usual = {field.name: field.default for field in dataclasses.fields(PurificationConfig)}
    aside += ("variance_type", "trained_timesteps", "noise_corner", "perceptual_network")
    always = {
        "diffusion_steps": "T_p {}",
        "num_rounds": "1 round" if settings["purification"]["num_rounds"] == 1 else "{} rounds",
    }
    words = always | {"num_inference_steps": "{} evaluations a round"}
    others = [
        words.get(name, name + " {}").format(value)
        for name, value in settings["purification"].items()
        if name not in aside and (name in always or value != usual[name])
    ]
    if settings.get("draws", 1) > 1:
        others.append(f"{settings['draws']} draws")
    if "noise_corner" in settings:
        others.append(f"coloured noise, corner {settings['noise_corner']:g}")
    if "collected_count" in settings:
        others.append(f"purifier of {settings['collected_count']} images")
    if settings["collected"] != settings["dataset"]:
        others.append(f"purifier trained on {settings['collected']}")
    # The settings say which purification it is; its name would be that of the preset that they were changed from.
    measure = settings["countermeasure"].replace("unconditional", "purified")
    return ", ".join(([measure] if measure != "purified" else []) + others)


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    add_record_arguments(parser)
    parser.add_argument("--dataset", help="as records call it; the only one if not given")
    parser.add_argument("--roles", choices=tuple(ROLES_SAID), default="disjoint")


def measured_of(args: argparse.Namespace) -> tuple[Measured, str]:
    """The records of a command, and the data set that it draws; what no table would hold no picture does."""
    try:
        measured = Measured(
            chosen_records(args), roles=args.roles, victim=args.victim, method=args.method, smoke=args.smoke
        )
    except ValueError as error:
        raise SystemExit(f"figures: {error}") from error
    found = measured.datasets()
    if args.dataset is None and len(found) != 1 or args.dataset is not None and args.dataset not in found:
        raise SystemExit(
            f"figures: dataset is {args.dataset!r}, but the records hold {found} of the victim {args.victim!r}."
        )
    return measured, args.dataset or found[0]


def refuse(of: str, settings: list[dict], facts) -> None:
    try:
        refuse_differences(of, settings, facts)
    except ValueError as error:
        raise SystemExit(f"figures: {error}") from error


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def caption_of(measured: Measured, dataset: str, figure_of_seeds: str) -> str:
    """What was measured, and over how many seeds."""
    seeds = {len(measured.by_seed("accuracy", key)) for key in measured.keys(dataset)}
    counts = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    scale = next(scale for scale in measured.scales if scale.startswith(f"{dataset}: "))
    return f"{scale}\n{'one seed each' if seeds == {1} else f'{figure_of_seeds} over {counts} seeds'}"


def finish(figure, axes, args: argparse.Namespace, caption: str, order: Sequence[str] = ()) -> None:
    """Legend, and what `save` does."""
    handles: dict = {}  # by label, over all panels: there may be none that has all lines
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    labels = [*(label for label in order if label in handles), *(label for label in handles if label not in order)]
    axes[-1].legend(
        [handles[label] for label in labels],
        labels,
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    save(figure, args, caption)


def save(figure, args: argparse.Namespace, caption: str) -> None:
    """Caption and file."""
    notes = ["smoke run: no figure means anything"] if args.smoke else []
    notes += [] if args.roles == "disjoint" else [ROLES_SAID[args.roles].strip("*.")]
    figure.draw_without_rendering()  # lays out the panels, whose titles take more or less room
    top = figure.get_tightbbox().y1 / figure.get_figheight()
    figure.suptitle("\n".join([*notes, caption]), fontsize=8, y=top + 0.02, va="bottom")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


# Name on the command line -> what it shows, its options, how it is drawn.
FIGURES = {
    "poisons": ("all poisons on the same images", add_poisons_arguments, draw_poisons),
    "purified": ("the same images of several data sets", add_purified_arguments, draw_purified),
    "curves": ("test accuracy by epoch, from records", add_curves_arguments, draw_curves),
    "strength": ("accuracy against purification strength, from records", add_strength_arguments, draw_strength),
    "evaluations": ("accuracy against UNet evaluations, from records", add_evaluations_arguments, draw_evaluations),
    "scales": ("accuracy by the scales of both guides, from records", add_scales_arguments, draw_scales),
}


def parser_of_figures() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.partition("\n")[0])
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, (help_text, add_arguments, draw) in FIGURES.items():
        figure = figures.add_parser(name, help=help_text)
        add_arguments(figure)
        figure.set_defaults(draw=draw)
    return parser


def main() -> None:
    args = parser_of_figures().parse_args()
    with ends_in_one_sentence("figures"):
        args.draw(args)


if __name__ == "__main__":
    main()
