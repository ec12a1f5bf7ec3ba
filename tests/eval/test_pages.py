"""What README.md and the pages of docs/ say is what the records say, and what they name exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import pages
from eval.benchmark import read_grid
from jcdp_diffusers.cli import COMMANDS
from jcdp_diffusers.results import as_settings, read_records


ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = " ".join(PAGES["README.md"].split())


def between(text: str, first: str, last: str) -> str:
    return text[text.index(first) : text.index(last, text.index(first))]


def records_of(name: str) -> list[dict]:
    return [r for r in read_records(ROOT / "results" / f"{name}.jsonl") if r["what"] == "accuracy"]


def mean_and_spread(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_are_those_of_the_records(page):
    assert pages.written(page) == PAGES[page]


def test_the_documented_command_finds_them_so():
    command = [sys.executable, "eval/pages.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_that_is_not_as_the_records_are_is_noticed_and_mended(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page, text in PAGES.items():
        (tmp_path / page).write_text(text.replace("| nothing |", "| nothing at all |"))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit, match="README.md does not say what the records say"):
        pages.main()
    assert "nothing at all" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    pages.main()
    assert (tmp_path / "README.md").read_text() == PAGES["README.md"]
    (tmp_path / "README.md").write_text("# Nothing")
    with pytest.raises(SystemExit, match="README.md has no <!-- cifar10-mini -->"):
        pages.main()


def test_a_figure_in_a_sentence_follows_its_records(tmp_path, monkeypatch):
    """Each key: it is used on a page, and it is another one when the records are."""
    used = {key for text in PAGES.values() for _, key, _ in pages.FIGURE.findall(text)}
    assert used == set(pages.FIGURES)
    before = {key: figure() for key, figure in pages.FIGURES.items()}
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.html"))
    for name in ("throughput.jsonl", "cifar10_mini/records.jsonl"):
        path = tmp_path / "results" / name
        path.write_text(
            "".join(json.dumps(changed(json.loads(line))) + "\n" for line in path.read_text().splitlines())
        )
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    assert all(figure() != before[key] for key, figure in pages.FIGURES.items())


def changed(record: dict) -> dict:
    """Another figure: guided steps and victims of protected images half as good, the authors' loop slower."""
    value, settings = record["value"], record["settings"]
    if isinstance(value, dict) and "ratio" in value:
        value |= {name: 1.5 * value[name] for name in ("ratio", "one_plus_rest") if name in value}
    elif isinstance(value, float) and settings.get("row") == "protected":
        record["value"] = value / 2
    if isinstance(value, dict) and "times_the_authors" in value:
        value["times_the_authors"] *= 1.5
    return record


def test_a_figure_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    for page, text in PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text + "\n<!-- n:guess -->99<!-- /n -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="README.md.*'guess'"):
        pages.written("README.md")


def test_every_cell_of_a_grid_is_measured_again_by_a_grid_that_ships():
    grids: dict[str, list] = {}
    for path in (ROOT / "eval/grids").glob("*.yaml"):
        grid = read_grid(path)
        grids.setdefault(grid.name, []).append((grid, grid.columns()))
    # Of a poison's, a victim's or a recipe's variants; eval/README.md says so.
    variants = {"cifar10-mini-remn", "cifar10-mini-remn-long", "cifar10-mini-float32", "cifar10-mini-recipe"}
    checked = 0
    for path in (ROOT / "results").glob("*.jsonl"):
        for record in read_records(path):
            settings = record["settings"]
            if record["what"] != "accuracy" or "grid" not in settings or settings["grid"] in variants:
                continue
            found = [
                (columns[settings["column"]].purification, grid.data["protected"]["count"], grid.data["test"]["count"])
                for grid, columns in grids[settings["grid"]]
                if settings["column"] in columns and settings["poison"] in grid.poisons
            ]
            told = [(config and json.loads(json.dumps(as_settings(config))), *counts) for config, *counts in found]
            cell = (settings.get("purification"), settings["train"]["images"], settings["test"]["images"])
            assert cell in told, (path.name, settings["column"], settings["poison"], settings["train"])
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_exists(page):
    for target, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)]+?)\)", PAGES[page])):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if place:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, place


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown(command):
    assert f"jcdp {command}" in README


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", PAGES["README.md"], re.MULTILINE) + re.findall(
        r"`make ([\w-]+)", README
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
