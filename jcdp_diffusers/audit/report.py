"""The report of an audit: one HTML file to read and forward, the same in Markdown, and the figures in JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..data import LabelledImages
from ..outputs import printable, write_atomically
from .page import page
from .pictures import draw_curves, picture_strips, save_strips
from .words import certainty, checks, marks, results_table, settings_in_words


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
    draw_curves(report, pictures / "curves.png")
    write_atomically(output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(output_dir / "report.md", markdown(report, strips.caption))
    write_atomically(output_dir / "report.html", page(report, strips))


def markdown(report: dict, caption: str) -> str:
    """
    The report as Markdown, with the pictures beside it.

    Args:
        report (`dict`): What `report.json` holds.
        caption (`str`): What `pictures/images.png` shows.
    """
    head = ("victims", "test accuracy", "std", "each seed", "best epoch", "training accuracy", "before", "training")
    names = ("title", "test", "std", "values", "best", "train", "before", "seconds")
    table = [[_text(row[name]) for name in names] for row in results_table(report)]
    lines = [
        "# Audit of a protected data set",
        "",
        f"**{_text(report['verdict']['sentence'])}**",
        "",
        *(f"> {mark}\n" for mark in marks(report)),
        *_table(head, table),
        "",
        "Test accuracy is that after the last epoch, mean over seeds. The best epoch is chosen by the test images and "
        "is no result. Seconds are per victim, before and while training.",
        "",
        "## How sure this is",
        "",
        *(f"- {_text(sentence)}" for sentence in certainty(report)),
        "",
        "## What the images look like",
        "",
        f"![{caption}](pictures/images.png)",
        "",
        caption,
        "",
        "![Learning curves](pictures/curves.png)",
        "",
        "## The data",
        "",
        *(f"- {'' if good else '**!** '}{_text(sentence)}" for good, sentence in checks(report)),
        "",
        "## Settings",
        "",
        *_table(("", ""), [[_text(topic), _text(said)] for topic, said in settings_in_words(report)]),
        "",
        "## Limits",
        "",
        *(f"- {_text(limit)}" for limit in report["limits"]),
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
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _text(text: str) -> str:
    """Text in which Markdown finds no table, link, emphasis or HTML; backticks mark code."""
    return re.sub(r"([\\<|*]|\](?=\())", r"\\\1", printable(text))
