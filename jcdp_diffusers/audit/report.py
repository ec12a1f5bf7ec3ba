"""The report of an audit: one HTML file to read and forward, the same in Markdown, and the figures in JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..data import LabelledImages
from ..outputs import printable, write_atomically
from .evidence import evidence_in_words
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
    kind_of_test_images,
    marks,
    results_table,
    settings_in_words,
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
        *(f"- {escaped(sentence)}" for sentence in what_to_do(report)),
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
        *(f"- {escaped(sentence)}" for sentence in certainty(report)),
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
        *(f"- {escaped(sentence)}" for sentence in visible_said(report)),
        "",
        "## Where the protection is",
        "",
        *(pictured if spectrum is not None else []),
        *(f"- {escaped(sentence)}" for sentence in evidence_in_words(spectrum)),
        "",
        "## How they learned",
        "",
        "![Learning curves](pictures/curves.png)",
        "",
        "## The data",
        "",
        *(f"- {'' if good else '**!** '}{escaped(sentence)}" for good, sentence in checks(report)),
        "",
        "## Settings",
        "",
        *_table(("", ""), [[escaped(topic), escaped(said)] for topic, said in settings_in_words(report)]),
        "",
        "## Limits",
        "",
        *(f"- {escaped(limit)}" for limit in report["limits"]),
        "",
        "## How to repeat this",
        "",
        "```",
        printable(report["command"]).replace("```", "` ` `"),
        "```",
        "",
        f"{report['time']}; figures in `report.json`, one record per victim in `records.jsonl`.",
        "",
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def escaped(text: str) -> str:
    """Text in which Markdown finds no table, link, emphasis or HTML; backticks mark code."""
    return re.sub(r"([\\<|*]|\](?=\())", r"\\\1", printable(text))
