"""The report of an audit: one HTML file to read and forward, the same in Markdown, and the figures in JSON."""

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from ..data import FEW, LabelledImages
from ..noise import colour_in_words


COLOURS = {"clean": "#2f6f4f", "protected": "#b3261e", "purified": "#1f5fa8"}
OTHER_COLOURS = ("#8a5a00", "#6b4fa0", "#4a6a73", "#a0427d", "#5c6b1f", "#7a4a2b")
TONES = {
    "broken": "#b3261e",
    "undone": "#b3261e",
    "weakened": "#b26a00",
    "withstands": "#2f6f4f",
    "ineffective": "#5f6368",
    "exchanged": "#b26a00",
    "open": "#5f6368",
    "smoke": "#5f6368",
}
SHOWN = 10  # images, one of each class


def write_report(output_dir: Path, report: dict, sets: Mapping[str, LabelledImages]) -> None:
    """
    Write `report.html`, `report.md`, `report.json` and `pictures/`.

    Args:
        output_dir (`Path`): An existing folder.
        report (`dict`): What `audit.audit` returns.
        sets (`dict`): `protected`, `purified` and, where known, `clean` images, row by row the same.
    """
    pictures = output_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    strips = picture_strips(sets)
    save_strips(pictures / "images.png", strips)
    curves = draw_curves(report)
    draw_curves(report, pictures / "curves.png")
    losses = draw_losses(report) if _losses(report) else None
    _write(output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    _write(output_dir / "report.md", markdown(report))
    _write(output_dir / "report.html", page(report, strips, curves, losses))


# ------------------------------------------------------------------------------------------------------------ contents


def results_table(report: dict) -> list[dict]:
    """The main table in words; `row` and `share` (the mean accuracy, of 1) are what the page needs beside them."""
    purifier_seconds = report["purifier"]["train_seconds"]
    table = []
    for entry in report["rows"]:
        accuracy = entry["accuracy"]
        if entry["row"] in ("clean", "protected"):
            title, before = f"trained on {entry['title']}", "-"
        else:
            before = seconds_said(entry["prepare_seconds"]) if entry["prepare_seconds"] >= 0.5 else "-"
            if "purified" in (parts := entry["row"].split("+")) and purifier_seconds is not None:
                before += f" (+ {seconds_said(purifier_seconds)} for the purifier)"
            if parts[0] == "purified":
                title = f"trained on purified images{', with ' if parts[1:] else ''}{'+'.join(parts[1:])}"
            else:
                title = f"protected images, with {entry['title']}"
        table.append(
            {
                "row": entry["row"],
                "title": title,
                "test": f"{100 * accuracy['mean']:.1f} %",
                "spread": "-" if accuracy["std"] is None else f"{100 * accuracy['std']:.1f}",
                "values": ", ".join(f"{100 * value:.1f}" for value in accuracy["values"]),
                "peak": f"{100 * entry['best_accuracy']['mean']:.1f} %",
                "train": f"{100 * entry['train_accuracy']['mean']:.1f} %",
                "share": accuracy["mean"],
                "before": before,
                "seconds": seconds_said(entry["train_seconds"]),
            }
        )
    return table


def checks(report: dict) -> list[tuple[bool, str]]:
    """What the data checks found: whether it is as it should be, and a sentence."""
    data, found = report["data"], []
    sets = data["sets"]
    for role, facts in sets.items():
        counts = list((facts["images_per_class"] or {}).values())
        balance = f", {min(counts)} to {max(counts)} of each of {len(counts)} classes" if counts else ""
        shape = "x".join(map(str, facts["shape"]))
        found.append(
            (not counts or max(counts) <= 10 * min(counts), f"{role}: {facts['images']} images{balance}; {shape}")
        )
        if facts["duplicates"]:
            found.append(
                (
                    False,
                    f"{role}: {facts['duplicates']} images repeat the pixels of another, "
                    f"{facts['contradictions']} of them with another label",
                )
            )
    levels = round(255 * data["separation"]["budget"])
    ours = "protected image" if data["noise"] is None else "protected image and no clean original"
    near = f"within {levels}/255 (up to {100 * FEW:g} % of the values aside)"
    if "collected" not in sets:
        listed = report["purifier"]["trained_on"]
        if listed is None:
            found.append(
                (False, "What trained the purifier is not known and could not be compared with the other sets")
            )
        elif report["roles"] == "paper":
            found.append(
                (False, f"Among the {listed} images that trained the purifier are test images (roles: paper)")
            )
        else:
            seen = "protected or test image" if data["noise"] is None else "protected or test image or clean original"
            found.append((True, f"The purifier was trained on {listed} images, by its own list, and on no {seen}"))
        found.append((True, f"No {ours} has the id or pixels of a test image or lies {near} of one"))
    elif report["roles"] == "paper":
        shared = data["separation"]["collected_in_test"]
        found.append((False, f"{shared} collected images are test images, as in the paper (roles: paper)"))
        found.append((True, f"No {ours} has the id or pixels of a collected or test image or lies {near} of one"))
    else:
        found.append(
            (
                True,
                "No two images of different roles have the same id or the same pixels, and no "
                f"{ours} lies {near} of a collected or test image",
            )
        )
    if data["noise"] is not None:
        noise = data["noise"]
        if noise["linf"] > levels:
            found.append(
                (
                    False,
                    f"The protection changes values by up to {noise['linf']:.0f}/255, more than its budget of "
                    f"{levels}/255 (--budget): originals among the collected and test images can be told by the clean "
                    "ones only, which are compared with them as well",
                )
            )
        found.append(
            (
                True,
                f"Noise after rounding, in {100 * noise['share_changed']:.0f} % of the images: at most "
                f"{noise['linf']:.0f}/255 per value, Euclidean norm {noise['l2_mean']:.2f} on average and "
                f"{noise['l2_max']:.2f} at most (images in [0, 1]), {noise['l0_mean']:.0f} pixels per image",
            )
        )
    shortcut = data["shortcut"]
    figures = shortcut["protected"]
    clean = shortcut.get("clean")
    beside = (
        f"; from the clean originals it gets {100 * clean['held_out']:.0f} % and {100 * clean['test']:.0f} %"
        if clean
        else ""
    )
    found.append(
        (
            not shortcut["found"] and not shortcut["exchanged"],
            f"Shortcut test: a linear model fitted to protected images gets {100 * figures['held_out']:.0f} % of "
            f"other protected images right and {100 * figures['test']:.0f} % of clean test images{beside}. "
            + (
                "The protection is a shortcut that even a linear model reads."
                if shortcut["found"]
                else "It sees a shortcut in the clean originals instead: the two sets may be exchanged."
                if shortcut["exchanged"]
                else "It sees no shortcut, which proves nothing: a linear model cannot read every protection."
            ),
        )
    )
    return found


def settings_said(report: dict) -> list[tuple[str, str]]:
    """Settings in words, by topic."""
    purifier, purification, victims = report["purifier"], report["purification"], report["victims"]
    recipe = victims["recipe"]
    described = f"{purifier['name']}, {purifier['parameters'] / 1e6:.2f} million parameters"
    if purifier["unet"]:
        described += f" (`{purifier['unet']}`)"
    if purifier["perceptual"]:
        described += f", perceptual network {purifier['perceptual']}"
    training = purifier["training"]
    if training:
        described += (
            f"; {training['steps']} steps of {training['total_batch_size']} images, timesteps "
            f"{training['trained_timesteps'][0]} to {training['trained_timesteps'][1] - 1}, "
            f"{seconds_said(training['seconds'])} on {training['device']}"
        )
    guides = ", ".join(
        f"{name} guide {purification[f'{name}_guidance_scale']:g}"
        for name in ("pixel", "perceptual")
        if purification[f"{name}_guidance_scale"]
    )
    said = [
        ("Purifier", described),
        (
            "Purification",
            f"T_p {purification['diffusion_steps']}, {purification['num_rounds']} "
            f"round{'s' * (purification['num_rounds'] > 1)}, "
            f"{purification['evaluations_per_image']} network evaluations per image, {guides or 'no guide'}"
            + colour_in_words(purification.get("noise_corner")),
        ),
        (
            "Victims",
            f"{victims['victim']}, width {victims['width']}, protocol `{recipe['name']}` ({recipe['epochs']} epochs, "
            f"batch {recipe['batch_size']}, learning rate {recipe['learning_rate']:g}, {recipe['schedule']}), seeds "
            f"{', '.join(map(str, victims['seeds']))}; last epoch, test images never altered",
        ),
        ("Roles", _roles_said(report["roles"], purifier["trained_on"])),
        ("Device", report["device"]),
    ]
    said += [(f"`{name}`", f"{facts['source']}; cost: {facts['cost']}") for name, facts in report["attacks"].items()]
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    return [*said, ("Versions", packages)]


def _roles_said(roles: str, trained_on: int | None) -> str:
    if trained_on is None:
        return f"{roles}, as far as the purifier is believed: it does not list the images that trained it"
    listed = f"the purifier was trained on {trained_on} images,"
    return f"disjoint: {listed} none of the test" if roles == "disjoint" else f"paper: {listed} test images among them"


def seconds_said(seconds: float) -> str:
    """Rounded seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_strips(sets: Mapping[str, LabelledImages]) -> dict[str, np.ndarray]:
    """Images of one of each class side by side, by title: uint8 (n, H, W, C)."""
    protected, purified, clean = sets["protected"], sets["purified"], sets.get("clean")
    chosen = [int(np.argmax(protected.labels == label)) for label in np.unique(protected.labels)][:SHOWN]
    strips = {} if clean is None else {"clean": clean.images[chosen]}
    strips["protected"] = protected.images[chosen]
    strips["purified"] = purified.images[chosen]
    changes = {"what purification changed": (protected, purified)}
    if clean is not None:
        changes = {"what protection added": (clean, protected), "what purification left": (clean, purified)}
    differences = {
        title: other.images[chosen].astype(np.float64) - one.images[chosen] for title, (one, other) in changes.items()
    }
    # The first of them fills the scale, and the other is magnified as much, so that the two can be compared.
    gain = 127.5 / max(1.0, np.percentile(np.abs(next(iter(differences.values()))), 99.5))
    for title, difference in differences.items():
        strips[f"{title}, x{gain:.0f}"] = np.rint((127.5 + gain * difference).clip(0, 255)).astype(np.uint8)
    return strips


def save_strips(path: Path, strips: Mapping[str, np.ndarray]) -> None:
    """The same as one picture, for Markdown."""
    plt = _pyplot()
    count = len(next(iter(strips.values())))
    figure, axes = plt.subplots(len(strips), count, figsize=(count + 2.2, len(strips) * 1.05), squeeze=False)
    for line, (title, images) in zip(axes, strips.items()):
        for axis, image in zip(line, images):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(report: dict, path: Path | None = None) -> str:
    """Test accuracy by epoch, a line per victim; SVG, or a file."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 3.2))
    for entry, colour in zip(report["rows"], _row_colours(report)):
        epochs = range(1, len(entry["curves"][0]) + 1)
        for curve in entry["curves"]:
            axis.plot(epochs, 100 * np.array(curve), color=colour, alpha=0.25, linewidth=1)
        mean = 100 * np.mean(entry["curves"], axis=0)
        axis.plot(epochs, mean, color=colour, linewidth=2, marker="o", markersize=3, label=entry["title"])
    axis.axhline(100 * report["chance"], color="#9aa0a6", linewidth=1, linestyle=":", label="one answer for all")
    axis.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout(pad=0.3)
    return _finished(figure, path)


def draw_losses(report: dict) -> str:
    """The purifier's loss while it was trained here, as SVG."""
    plt = _pyplot()
    steps, losses = np.array(_losses(report)).T
    figure, axis = plt.subplots(figsize=(7.6, 2.2))
    axis.plot(steps, losses, color="#1f5fa8", alpha=0.25, linewidth=1)
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color="#1f5fa8", linewidth=2)
    axis.set(xlabel="optimiser step", ylabel="loss", ylim=(0, float(np.percentile(losses, 99)) * 1.1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(pad=0.3)
    return _finished(figure, None)


def _losses(report: dict) -> list | None:
    training = report["purifier"]["training"]
    if not report["purifier"]["trained_here"] or training is None or len(training["losses"]) < 5:
        return None
    return training["losses"]


def _row_colours(report: dict) -> list[str]:
    others = [entry["row"] for entry in report["rows"] if entry["row"] not in COLOURS]
    return [
        COLOURS.get(entry["row"]) or OTHER_COLOURS[others.index(entry["row"]) % len(OTHER_COLOURS)]
        for entry in report["rows"]
    ]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text in SVG, in the page's own font.
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "jcdp"})
    import matplotlib.pyplot as plt

    return plt


def _finished(figure, path: Path | None) -> str:
    plt = _pyplot()
    if path is not None:
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        return ""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(report: dict) -> str:
    """The report as Markdown, with the pictures beside it."""
    lines = ["# Audit of a protected data set", "", f"**{report['verdict']['sentence']}**", ""]
    if report["smoke"]:
        lines += ["> Smoke run: nothing was trained for long enough to mean anything.", ""]
    if report["roles"] == "paper":
        lines += ["> Roles as in the paper: the purifier has seen the test images.", ""]
    lines += [
        "| victims | test accuracy | std | each seed | peak epoch | training accuracy | before training | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results_table(report):
        names = ("title", "test", "spread", "values", "peak", "train", "before", "seconds")
        lines.append("| " + " | ".join(row[name] for name in names) + " |")
    lines += [
        "",
        "Test accuracy is that after the last epoch, mean over seeds; the peak is chosen by the test images and is no "
        "result. Seconds are per victim.",
        "",
        "![Images of each class](pictures/images.png)",
        "",
        "![Learning curves](pictures/curves.png)",
        "",
        "## The data",
        "",
        *(f"- {'' if good else '**!** '}{sentence}" for good, sentence in checks(report)),
        "",
        "## Settings",
        "",
        "| | |",
        "|---|---|",
        *(f"| {topic} | {text} |" for topic, text in settings_said(report)),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in report["limits"]),
        "",
        "## How to repeat this",
        "",
        "```",
        report["command"],
        "```",
        "",
        f"{report['time']}; figures in `report.json`, one record per victim in `records.jsonl`.",
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- HTML


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; color: #202124; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: #5f6368; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; }
p.verdict { margin: 0; padding: .2rem 0 .2rem 1.1rem; border-left: .4rem solid $tone; font-size: 1.6rem;
  line-height: 1.3; font-weight: 600; }
p.mark { display: inline-block; margin: 1rem 0 0; padding: .15rem .7rem; border-radius: .3rem; background: #fef3d6;
  font-size: .92rem; }
p.note, td.note { color: #5f6368; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th { text-align: left; font-weight: 600; color: #5f6368; font-size: .82rem; }
th, td { padding: .5rem .8rem .5rem 0; border-bottom: 1px solid #e4e6e9; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 17%; min-width: 7rem; vertical-align: middle; }
td:first-child { min-width: 11.5rem; }
#settings td:first-child { min-width: 8rem; color: #5f6368; }
.track { background: #f1f3f4; border-radius: .2rem; height: .85rem; position: relative; }
.fill { height: 100%; border-radius: .2rem; }
.tick { position: absolute; top: -.15rem; width: 1px; height: 1.15rem; background: #202124; opacity: .55; }
.strip { display: grid; grid-template-columns: 10.5rem repeat($count, 1fr); gap: .25rem; align-items: center; }
.strip span { font-size: .85rem; color: #5f6368; padding-right: .6rem; line-height: 1.2; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: .12rem; }
.classes span { font-size: .78rem; text-align: center; padding: 0; overflow: hidden; text-overflow: ellipsis; }
svg { width: 100%; height: auto; }
ul.checks { list-style: none; padding: 0; margin: 0; }
ul.checks li { padding: .3rem 0 .3rem 1.8rem; position: relative; }
ul.checks li::before { position: absolute; left: 0; font-weight: 700; }
li.good::before { content: "✓"; color: #2f6f4f; }
li.look::before { content: "!"; color: #b26a00; padding-left: .25rem; }
li { margin: .15rem 0; }
pre { background: #f6f7f8; padding: .9rem 1rem; border-radius: .3rem; overflow-x: auto; white-space: pre-wrap;
  font-size: .85rem; }
code { font-size: .92em; }
@media (max-width: 45rem) { .strip { grid-template-columns: 5rem repeat($count, 1fr); } td.bar, th.bar,
  .wide { display: none; } }
@media print { body { padding: 0; font-size: 11pt; } h2 { break-after: avoid; }
  table, .strip, svg { break-inside: avoid; } }
</style>
</head>
<body>
<h1>Audit of a protected data set</h1>
<p class="verdict" id="verdict" data-status="$status">$sentence</p>
$marks
<h2>What victims learned</h2>
<table id="results">
<thead><tr><th>victims</th><th class="n">test accuracy</th><th class="n">std</th><th class="bar"></th>
<th class="n wide">peak epoch</th><th class="n wide">training accuracy</th><th class="wide">before training</th>
<th class="n wide">training</th></tr></thead>
<tbody>
$rows
</tbody>
</table>
<p class="note">Accuracy after the last epoch on $test clean test images, mean over $seeds; the marks in a bar are the
single victims. The peak is chosen by the test images and is no result. Giving one answer for all images gets $chance.
Times are per victim, on $device.</p>
<h2>What the images look like</h2>
$strips
<h2>How they learned</h2>
$curves
$losses
<h2>The data</h2>
<ul class="checks" id="checks">
$checks
</ul>
<h2>Settings</h2>
<table id="settings"><tbody>
$settings
</tbody></table>
<h2>Limits</h2>
<ul id="limits">
$limits
</ul>
<h2>How to repeat this</h2>
<pre id="command">$command</pre>
<p class="note">Written $time. The figures are in <code>report.json</code>, one record per victim in
<code>records.jsonl</code>; the purified images are in <code>purified/</code>.</p>
</body>
</html>
""")


def page(report: dict, strips: Mapping[str, np.ndarray], curves: str, losses: str | None) -> str:
    """The report as one HTML file that needs nothing beside it."""
    colours = _row_colours(report)
    marks = []
    if report["smoke"]:
        marks.append("Smoke run: nothing was trained for long enough to mean anything.")
    if report["roles"] == "paper":
        marks.append("Roles as in the paper: the purifier has seen the test images.")
    if not any(entry["row"] == "clean" for entry in report["rows"]):
        marks.append("No clean originals were given.")
    rows = [
        _result_row(row, entry, colour) for row, entry, colour in zip(results_table(report), report["rows"], colours)
    ]
    seeds = len(report["victims"]["seeds"])
    sentence = report["verdict"]["sentence"].replace("->", "→").replace(" %", "\u00a0%")
    return _PAGE.substitute(
        title=_escape(f"Audit: {report['verdict']['sentence']}"),
        tone=TONES[report["verdict"]["status"]],
        status=report["verdict"]["status"],
        sentence=_escape(sentence),
        marks="\n".join(f'<p class="mark">{_escape(mark)}</p>' for mark in marks),
        rows="\n".join(rows),
        test=report["data"]["sets"]["test"]["images"],
        seeds="one seed" if seeds == 1 else f"{seeds} seeds",
        chance=f"{100 * report['chance']:.0f} %",
        device=_escape(report["device"]),
        strips=_strips(strips, list(report["data"]["sets"]["protected"]["images_per_class"])),
        count=len(next(iter(strips.values()))),
        curves=curves,
        losses=f"<h2>How the purifier learned</h2>\n{losses}" if losses else "",
        checks="\n".join(
            f'<li class="{"good" if good else "look"}">{_escape(sentence)}</li>' for good, sentence in checks(report)
        ),
        settings="\n".join(
            f"<tr><td>{_code(topic)}</td><td>{_code(text)}</td></tr>" for topic, text in settings_said(report)
        ),
        limits="\n".join(f"<li>{_escape(limit)}</li>" for limit in report["limits"]),
        command=_escape(report["command"]),
        time=_escape(report["time"]),
    )


def _result_row(row: dict, entry: dict, colour: str) -> str:
    ticks = "".join(f'<i class="tick" style="left:{100 * v:.2f}%"></i>' for v in entry["accuracy"]["values"])
    bar = f'<div class="fill" style="width:{100 * row["share"]:.2f}%;background:{colour}"></div>{ticks}'
    return (
        f'<tr data-row="{_escape(row["row"])}"><td>{_escape(row["title"])}</td><td class="n"><b>{row["test"]}</b></td>'
        f'<td class="n">{row["spread"]}</td><td class="bar"><div class="track">{bar}</div></td>'
        f'<td class="n wide">{row["peak"]}</td><td class="n wide">{row["train"]}</td>'
        f'<td class="wide note">{_escape(row["before"])}</td><td class="n wide">{row["seconds"]}</td></tr>'
    )


def _strips(strips: Mapping[str, np.ndarray], names: list[str]) -> str:
    count = len(next(iter(strips.values())))
    titles = "".join(f"<span>{_escape(name)}</span>" for name in names[:count])
    lines = [f'<div class="strip classes"><span></span>{titles}</div>']
    for title, images in strips.items():
        shown = "".join(f'<img alt="" src="{_embedded(image)}">' for image in images)
        lines.append(f'<div class="strip" style="margin-top:.25rem"><span>{_escape(title)}</span>{shown}</div>')
    return "\n".join(lines)


def _embedded(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _escape(text: str) -> str:
    return html.escape(str(text))


def _code(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    parts = _escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
