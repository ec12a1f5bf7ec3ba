"""The report of an audit: one HTML file to read and forward, the same in Markdown, and the figures in JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..data import LabelledImages
from ..outputs import printable, write_atomically
from .fractions import FRACTIONS_CAPTION, fractions_name, fractions_table, fractions_title
from .learners import report_of, title_of
from .owner import noise_in_short, numbers, what_to_do
from .page import page
from .pictures import (
    NativePictures,
    draw_curves,
    draw_fractions,
    draw_spectrum,
    native_pictures,
    picture_strips,
    save_native,
    save_strips,
)
from .words import (
    SPECTRUM_CAPTION,
    certainty,
    checks,
    curves_said,
    kind_of_test_images,
    marks,
    results_table,
    settings_in_words,
    spectrum_said,
    visible,
    visible_said,
)


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
    native = native_pictures(strips)
    save_native(pictures / "native.png", native)
    save_strips(pictures / "images.png", strips)
    draw_curves(report, pictures / "curves.png")
    if report["data"]["spectrum"] is not None:
        draw_spectrum(report["data"]["spectrum"], pictures / "spectrum.png")
    for number, one in enumerate((report, *report["others"])):
        if one["fractions"]:
            draw_fractions(one["fractions"], pictures / fractions_name(number))
    write_atomically(output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(output_dir / "report.md", markdown(report, strips.caption, native))
    write_atomically(output_dir / "report.html", page(report, strips, native))


def markdown(report: dict, caption: str, native: NativePictures) -> str:
    """
    The report as Markdown, with the pictures beside it.

    Args:
        report (`dict`): What `report.json` holds.
        caption (`str`): What `pictures/images.png` shows.
        native (`NativePictures`): What `pictures/native.png` shows.
    """
    return "\n".join([*_first_page(report, native), *_full_report(report, caption)])


def _first_page(report: dict, native: NativePictures) -> list[str]:
    shown = [[f"**{one['value']}**", escaped(one["title"]), escaped(one["note"])] for one in numbers(report)]
    kinds = "From left to right: " + "; ".join(map(escaped, native.pictures)) + "."
    return [
        "# Audit of a protected data set",
        "",
        f"**{escaped(report['verdict']['sentence'])}**",
        "",
        *(f"> {mark}\n" for mark in marks(report)),
        *(f"{escaped(sentence)}\n" for sentence in report["side_by_side"]),
        *_table(("test accuracy", "", "victims"), shown),
        "",
        f"![{kinds}](pictures/native.png)",
        "",
        f"{kinds} {native.caption} {noise_in_short(report)}".strip(),
        "",
        "## What to do",
        "",
        *(f"- {with_code(sentence)}" for sentence in what_to_do(report)),
        "",
    ]


def _results(report: dict) -> list[str]:
    head = ("victims", "test accuracy", "std", "each seed", "best epoch", "training accuracy", "before", "training")
    names = ("title", "test", "std", "values", "best", "train", "before", "seconds")
    return _table(head, [[escaped(row[name]) for name in names] for row in results_table(report)])


def _others(report: dict) -> list[str]:
    """Tables and verdicts of further ways of learning, and tables and curves of fractions."""
    lines = []
    for other in report["others"]:
        lines += [f"## {escaped(title_of(other))}", "", escaped(other["verdict"]["sentence"]), ""]
        lines += [*_results(report_of(report, other)), ""]
    for number, one in enumerate((report, *report["others"])):
        if one["fractions"]:
            head, *rows = fractions_table(one["fractions"])
            lines += [f"## {escaped(fractions_title(one))}", "", *_table(tuple(head), rows), "", FRACTIONS_CAPTION, ""]
            lines += [f"![Accuracy over the protected fraction](pictures/{fractions_name(number)})", ""]
    return lines


def _full_report(report: dict, caption: str) -> list[str]:
    measures = [[escaped(title), escaped(said)] for title, said in visible(report)]
    spectrum = report["data"]["spectrum"]
    pictured = ["![Spectrum of the protection](pictures/spectrum.png)", "", SPECTRUM_CAPTION, ""]
    return [
        "## What victims learned",
        "",
        *_results(report),
        "",
        f"Test accuracy is that after the last epoch on {report['data']['sets']['test']['images']} "
        f"{kind_of_test_images(report)}, mean over seeds. The best epoch is chosen by the test images and "
        "is no result. Seconds are per victim, before and while training.",
        "",
        *_others(report),
        "## How sure this is",
        "",
        *(f"- {with_code(sentence)}" for sentence in certainty(report)),
        "",
        "## What the images look like",
        "",
        f"![{caption}](pictures/images.png)",
        "",
        caption,
        "",
        "## How visible the protection is",
        "",
        *(_table(("measure", "over images"), measures) if measures else []),
        "",
        *(f"- {with_code(sentence)}" for sentence in visible_said(report)),
        "",
        "## Where the protection is",
        "",
        *(pictured if spectrum is not None else []),
        *(f"- {with_code(sentence)}" for sentence in spectrum_said(report)),
        "",
        "## How they learned",
        "",
        "![Learning curves](pictures/curves.png)",
        "",
        *([said, ""] if (said := curves_said(report)) else []),
        "## The data",
        "",
        *(f"- {'' if good else '**!** '}{escaped(sentence)}" for good, sentence in checks(report)),
        "",
        "## Settings",
        "",
        *_table(("", ""), [[with_code(topic), with_code(said)] for topic, said in settings_in_words(report)]),
        "",
        "## Limits",
        "",
        *(f"- {escaped(limit)}" for limit in report["limits"]),
        "",
        "## How to repeat this",
        "",
        *fenced(report["command"]),
        "",
        f"{report['time']}; figures in `report.json`, one record per victim in `records.jsonl`.",
        "",
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def fenced(command: str) -> list[str]:
    """The lines of a block of code, which no name in the command can end."""
    return ["```", printable(command).replace("```", "` ` `"), "```"]


def escaped(text: str) -> str:
    """Text from anywhere, in which Markdown finds no table, link, emphasis, code, character reference or HTML."""
    # Within a word, an underscore is no emphasis, and names of ours read better without backslashes.
    return re.sub(r"([\\<|*`~]|&(?=[#\w])|\](?=\()|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(text))


def with_code(text: str) -> str:
    """A sentence of ours, in which backticks mark code. A file's name may have backticks of its own."""
    parts = re.split("(`[^`]+`)", printable(text))
    # In a table a bar ends the cell, in code as well.
    return "".join(part.replace("|", r"\|") if index % 2 else escaped(part) for index, part in enumerate(parts))
