"""
The pictures of a report: images of each class, the same at 1:1, where the protection is in the spectrum, learning
curves, accuracy over the protected fraction, and the loss of a purifier trained for it.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import LabelledImages
from ..outputs import printable, replacing
from .evidence import mixture_in_words


COLOURS = {
    "clean": "#2f6f4f",
    "control": "#2f8f9d",
    "early-stopping": "#d98880",
    "protected": "#b3261e",
    "purified": "#1f5fa8",
}
OTHER_COLOURS = ("#8a5a00", "#6b4fa0", "#4a6a73", "#a0427d", "#5c6b1f", "#7a4a2b")
SHOWN = 10  # images, one of each class
# Of the pictures at 1:1: two beside each other fit a phone, four a printed page.
NATIVE_SIDE, NATIVE_GAP = 160, 4
LEAST_POWER = 0.01  # squared levels of 255, the bottom of a spectrum's picture: an eighth of rounding's own
AXIS_COLOURS = ("#3c4043", "#8a3b9e", "#1f7a8c")


@dataclass(frozen=True)
class Strips:
    """
    Images of one of each class side by side.

    Args:
        images (`dict`): uint8 `(n, H, W, C)` by title.
        classes (`tuple[str, ...]`): Names of the n classes, or of the images where there are no labels.
        gain (`float`): By which differences are magnified, the same in every row.
        labelled (`bool`): Whether there are labels.
    """

    images: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    gain: float
    labelled: bool = True

    @property
    def caption(self) -> str:
        """What the rows show, in a few sentences."""
        said = "The first image of each class." if self.labelled else "The first images."
        said += f" What changed is shown on grey, magnified {self.gain:.0f} times: all such rows have one scale."
        if "clean" in self.images:
            said += " What purification left is noise that remains and detail that is lost."
        return said


def picture_strips(sets: Mapping[str, LabelledImages]) -> Strips:
    """
    Images of one of each class, and what protection and purification changed of them.

    Args:
        sets (`dict`): `protected`, `purified` and, where known, `clean` images, row by row the same.
    """
    protected, purified, clean = sets["protected"], sets["purified"], sets.get("clean")
    labels = np.arange(len(protected)) if protected.labels is None else protected.labels
    chosen = [int(np.argmax(labels == label)) for label in np.unique(labels)[:SHOWN]]
    strips = {} if clean is None else {"clean": clean.images[chosen]}
    strips |= {"protected": protected.images[chosen], "purified": purified.images[chosen]}
    changes = {"what purification changed": (protected, purified)}
    if clean is not None:
        changes = {"what protection added": (clean, protected), "what purification left": (clean, purified)}
    differences = {
        title: other.images[chosen].astype(np.float64) - one.images[chosen] for title, (one, other) in changes.items()
    }
    # The larger difference fills the scale and neither is cut off, so that the two can be compared.
    largest = max(np.percentile(np.abs(difference), 99.5) for difference in differences.values())
    gain = max(1, int(127.5 / max(1.0, largest)))
    for title, difference in differences.items():
        strips[f"{title}, x{gain}"] = np.rint((127.5 + gain * difference).clip(0, 255)).astype(np.uint8)
    if protected.labels is None:
        return Strips(strips, tuple(f"image {row + 1}" for row in chosen), gain, labelled=False)
    names = protected.class_names or tuple(map(str, range(protected.num_classes)))
    return Strips(strips, tuple(names[int(labels[row])] for row in chosen), gain)


@dataclass(frozen=True)
class NativePictures:
    """
    Images at 1:1, several of one kind in one picture.

    Args:
        pictures (`dict`): uint8 `(h, w, C)` by title, at most `NATIVE_SIDE` high and wide.
        caption (`str`): What they show.
    """

    pictures: Mapping[str, np.ndarray]
    caption: str


def native_pictures(strips: Strips) -> NativePictures:
    """
    The first images of the strips at 1:1, without the last row of differences: clean, protected, purified, difference.

    Args:
        strips (`Strips`): Images of one of each class.
    """
    titles = [title for title in strips.images if not title.startswith("what purification left")]
    height, width = strips.images[titles[0]].shape[1:3]
    sides = min(height, NATIVE_SIDE), min(width, NATIVE_SIDE)
    lines, columns = (max(1, (NATIVE_SIDE + NATIVE_GAP) // (side + NATIVE_GAP)) for side in sides)
    count = min(len(strips.classes), min(lines, 2) * columns)
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    pictures = {}
    for title in titles:
        images = strips.images[title][:count, top : top + sides[0], left : left + sides[1]]
        pictures[title] = _side_by_side(images, columns)
    said = "Actual size: a pixel of an image is a pixel of this page."
    if sides != (height, width):
        said += f" A part of {sides[1]}x{sides[0]} pixels from the middle of {width}x{height}."
    return NativePictures(pictures, f"{said} Changes are shown on grey, magnified {strips.gain:.0f} times.")


def save_native(path: Path, native: NativePictures) -> None:
    """All pictures at 1:1 in one PNG file, for Markdown."""
    blocks = list(native.pictures.values())
    picture = Image.fromarray(_side_by_side(np.stack(blocks), len(blocks), gap=4 * NATIVE_GAP).squeeze())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _side_by_side(images: np.ndarray, columns: int, gap: int = NATIVE_GAP) -> np.ndarray:
    """Images (n, H, W, C) in lines of so many, on white."""
    count, height, width, channels = images.shape
    lines = -(-count // columns)
    columns = min(columns, count)
    size = (lines * (height + gap) - gap, columns * (width + gap) - gap, channels)
    picture = np.full(size, 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def save_strips(path: Path, strips: Strips) -> None:
    """The strips as one PNG file, for Markdown."""
    plt = _pyplot()
    count, lines = len(strips.classes), len(strips.images)
    figure, axes = plt.subplots(lines, 1, figsize=(count, lines * 1.05), squeeze=False)
    for axis, (title, images) in zip(axes[:, 0], strips.images.items()):
        line = _side_by_side(images, count, gap=images.shape[2] // 12)  # axes for each image would take seconds
        axis.imshow(line.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, hspace=0.05)
    _save(figure, path, dpi=100, bbox_inches="tight", pad_inches=0.05)


def draw_curves(report: dict, path: Path | None = None) -> str:
    """Test accuracy by epoch, a line per victim: as SVG, or into a PNG file."""
    plt = _pyplot()
    # What learns without labels has no accuracy of its own while it learns.
    shown = "test accuracy" if report["victims"]["method"] == "supervised" else "accuracy of nearest neighbours"
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for entry, colour in zip(report["rows"], row_colours(report)):
        if not entry["curves"]:
            continue
        epochs = entry["curve_epochs"]
        for curve in entry["curves"]:
            axis.plot(epochs, 100 * np.array(curve), color=colour, alpha=0.25, linewidth=1)
        mean = 100 * np.mean(entry["curves"], axis=0)
        label = printable(entry["title"]).replace("$", r"\$")
        axis.plot(epochs, mean, color=colour, linewidth=2, marker="o", markersize=3, label=label)
    axis.axhline(100 * report["chance"], color="#9aa0a6", linewidth=1, linestyle=":", label="one answer for all")
    axis.set(xlabel="epoch", ylabel=f"{shown} (%)", ylim=(0, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    # Below the axes, where a long name takes no width from the curves on a phone.
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    figure.tight_layout(pad=0.3)
    return _finished(figure, path)


def draw_spectrum(spectrum: Mapping, path: Path | None = None) -> str:
    """
    Where the protection is, by colour axis and frequency: as SVG, or into a PNG file.

    Args:
        spectrum (`dict`): From `evidence.spectral_evidence`. What is seen is drawn as a point with its standard error;
            what is not seen is unknown, and drawn as a grey bar up to its upper bound.
        path (`Path`, *optional*): Of the PNG file.
    """
    plt = _pyplot()
    names = ("axes", "frequencies", "power", "error", "upper_bound")
    axes, frequencies, power, error, upper = (np.array(spectrum[name]) for name in names)
    seen = np.array(spectrum["seen"], bool)
    figure, panels = plt.subplots(
        len(axes), 1, figsize=(5, 0.7 + 1.6 * len(axes)), sharex=True, sharey=True, squeeze=False
    )
    for number, panel in enumerate(panels[:, 0]):
        known, colour = seen[number], AXIS_COLOURS[number % len(AXIS_COLOURS)]
        unknown = ~known & (upper[number] > LEAST_POWER)
        if unknown.any():
            heights = upper[number][unknown] - LEAST_POWER
            hatched = {"color": "#eceff1", "edgecolor": "#9aa0a6", "hatch": "////", "linewidth": 0.5}
            label = "unknown, at most this much"
            panel.bar(frequencies[unknown], heights, bottom=LEAST_POWER, width=0.8, label=label, **hatched)
        if known.any():
            points = {
                "fmt": "o",
                "markersize": 3.5,
                "capsize": 2,
                "color": colour,
                "label": "seen, with its standard error",
            }
            panel.errorbar(frequencies[known], power[number][known], yerr=error[number][known], **points)
        if spectrum["actual"] is not None:
            actual = np.maximum(spectrum["actual"][number], LEAST_POWER)
            panel.plot(frequencies, actual, color="#b3261e", linewidth=1.2, label="true, from the originals")
        panel.set_title(f"colour axis {number + 1}: {mixture_in_words(axes[number])}", fontsize=9, loc="left")
        panel.set(yscale="log", ylabel="power", xlim=(-0.6, frequencies[-1] + 0.6))
        panel.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylim(bottom=LEAST_POWER)
    panels[-1, 0].set_xlabel("frequency (cycles per image)")
    legend = {}
    for panel in panels[:, 0]:
        handles, labels = panel.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    figure.subplots_adjust(hspace=0.3, bottom=0.1, top=0.98)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02)}
    figure.legend(legend.values(), legend.keys(), frameon=False, fontsize=8, **place)
    return _finished(figure, path)


def draw_fractions(fractions: Sequence[Mapping], path: Path | None = None) -> str:
    """Both accuracies over the protected fraction, with the range over seeds: as SVG, or into a PNG file."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 2.6))
    for name, label, colour in (("all", "all images", "protected"), ("clean_rest", "clean images alone", "clean")):
        shown = [one for one in fractions if one[name] is not None]
        places = [100 * one["fraction"] for one in shown]
        values = np.array([[100 * value for value in one[name]["values"]] for one in shown]).reshape(len(shown), -1)
        axis.plot(places, values.mean(axis=1), color=COLOURS[colour], marker="o", markersize=4, label=label)
        axis.fill_between(places, values.min(axis=1), values.max(axis=1), color=COLOURS[colour], alpha=0.15)
    axis.set(xlabel="protected (%)", ylabel="test accuracy (%)", xlim=(0, 105), ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout(pad=0.3)
    return _finished(figure, path)


def draw_losses(report: dict) -> str | None:
    """The purifier's loss while it was trained here, as SVG; None where it was not, or for a few steps only."""
    training = report["purifier"]["training"]
    if not report["purifier"]["trained_here"] or training is None or len(training["losses"]) < 5:
        return None
    plt = _pyplot()
    steps, losses = np.array(training["losses"]).T
    figure, axis = plt.subplots(figsize=(5, 2))
    axis.plot(steps, losses, color="#1f5fa8", alpha=0.25, linewidth=1)
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color="#1f5fa8", linewidth=2)
    axis.set(xlabel="optimiser step", ylabel="loss", ylim=(0, float(np.percentile(losses, 99)) * 1.1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(pad=0.3)
    return _finished(figure, None)


def row_colours(report: dict) -> list[str]:
    """A colour for each row of a report."""
    others = [entry["row"] for entry in report["rows"] if entry["row"] not in COLOURS]
    return [
        COLOURS.get(entry["row"]) or OTHER_COLOURS[others.index(entry["row"]) % len(OTHER_COLOURS)]
        for entry in report["rows"]
    ]


def _pyplot():
    import matplotlib

    if "matplotlib.pyplot" not in sys.modules:  # a notebook that draws keeps the backend that shows its figures
        matplotlib.use("Agg")
    # Text stays text in SVG, in the page's own font.
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "jcdp"})
    import matplotlib.pyplot as plt

    return plt


def _finished(figure, path: Path | None) -> str:
    if path is not None:
        _save(figure, path, dpi=110, bbox_inches="tight")
        return ""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    _pyplot().close(figure)
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _save(figure, path: Path, **options) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", **options)
    _pyplot().close(figure)
