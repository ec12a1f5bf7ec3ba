"""What README.md and the pages of docs/ say is what the records say, and what they name exists."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval import page_figures, pages
from eval.benchmark import read_grid
from jcdp_diffusers import countermeasures
from jcdp_diffusers.cli import COMMANDS
from jcdp_diffusers.results import as_settings, read_records


ROOT = Path(__file__).parents[2]
PAGES = {page: (ROOT / page).read_text() for page in pages.PAGES}
FOLDERS = (".", "docs", "eval", "training", "results", "results/figures", "jcdp_diffusers/train")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("*.md")
}
README = " ".join(PAGES["README.md"].split())


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_are_those_of_the_records(page):
    assert pages.written(page) == PAGES[page]


def test_seconds_of_several_precisions_name_theirs():
    tables = pages.PAGES["docs/results.md"]
    seconds = [line.split("|")[-2].split()[1:] for line in tables["protocols"]().splitlines()[2:]]
    assert seconds == [["(bfloat16)"], ["(float32)"], ["(bfloat16)"]]
    assert "float" not in tables["victims"]() and "| several precisions |" in tables["countermeasures"]()


def test_the_row_of_a_stronger_attacker_says_what_it_assumes():
    (row,) = (line for line in PAGES["README.md"].splitlines() if line.startswith("| paired purifier"))
    assert countermeasures.get("paired-small").assumes in row.split("|")[1]
    assert "`n.m.` means not measured" in README


@pytest.mark.long  # the former tests do the same without a process of its own
def test_the_documented_command_finds_them_so():
    command = [sys.executable, "eval/pages.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_that_is_not_as_the_records_are_is_noticed_and_mended(tmp_path, monkeypatch):
    for page, text in PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
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


def test_every_figure_is_quoted_and_every_quoted_figure_is_known():
    """In whatever page of the repository: one that `pages.py` does not write would stay as it is."""
    quoted = {page: {key for _, key, _ in pages.FIGURE.findall(text)} for page, text in TEXTS.items()}
    assert set(pages.PAGES) <= set(TEXTS) and {page for page, keys in quoted.items() if keys} <= set(pages.PAGES)
    assert set.union(*quoted.values()) == set(page_figures.all_keys())
    for page, text in TEXTS.items():
        assert text.count("<!-- n:") == text.count("<!-- /n -->") == len(pages.FIGURE.findall(text)), page


def test_every_figure_follows_its_records(monkeypatch):
    """With other numbers on record, each figure is another one; three draws, as a rounded one may come out alike."""
    before = {key: page_figures.figure(key) for key in page_figures.all_keys()}
    read, read_json, same = page_figures.read_records, page_figures.read_json, set(before)
    for seed in range(3):

        def others(path, seed=seed):
            rng = random.Random(seed)
            return [altered(record, rng) for record in read(path)]

        monkeypatch.setattr(page_figures, "read_records", others)
        monkeypatch.setattr(
            page_figures, "read_json", lambda path, seed=seed: other(read_json(path), random.Random(seed))
        )
        same -= {key for key in same if page_figures.figure(key) != before[key]}
    assert same == set()


def altered(record: dict, rng: random.Random) -> dict:
    """The record with other measurements."""
    settings = {name: other(v, rng) if name == "load average" else v for name, v in record["settings"].items()}
    changed = {name: other(record[name], rng) for name in ("value", "seconds")}
    return record | changed | {"settings": settings}


def other(value, rng: random.Random):
    """The same with other numbers, each changed by a factor of its own."""
    if isinstance(value, dict):
        return {name: other(entry, rng) for name, entry in value.items()}
    if isinstance(value, list):
        return [other(entry, rng) for entry in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return type(value)(value * rng.uniform(1.3, 3)) + isinstance(value, int)


def test_a_figure_that_is_not_as_the_records_are_is_noticed(tmp_path, monkeypatch):
    for page, text in PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text)
    page = "training/README.md"
    wrong = PAGES[page].replace("<!-- n:finetune.scratch_lower -->", "<!-- n:finetune.scratch_lower -->9")
    (tmp_path / page).write_text(wrong)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit, match=page):
        pages.main()
    assert (tmp_path / page).read_text() == wrong
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    pages.main()
    assert (tmp_path / page).read_text() == PAGES[page]


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
    # Of a poison's, a victim's or a recipe's variants, and controls of another kind; eval/README.md says so.
    variants = {"cifar10-mini-remn", "cifar10-mini-remn-long", "cifar10-mini-float32", "cifar10-mini-recipe"}
    checked = 0
    for path in set((ROOT / "results").glob("*.jsonl")) - {ROOT / "results/controls_shuffled_in_place.jsonl"}:
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


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_and_picture_exists(page):
    for target, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)]+?)\)", TEXTS[page])):
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


def test_the_page_on_measuring_tells_scripts_from_modules():
    text = TEXTS["eval/README.md"]
    for path in (ROOT / "eval").glob("*.py"):
        is_script = "__main__" in path.read_text()
        assert f"`{path.name}" in text and (f"\n| `{path.name}" in text) == is_script, path.name
