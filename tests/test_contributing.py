"""The three recipes of CONTRIBUTING.md, followed to the letter in a copy of the package, up to the table of a grid."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sklearn.datasets import load_digits

from jcdp_diffusers.data import LabelledImages, write_dataset


ROOT = Path(__file__).parents[1]
# Path of a file, what to do with it, and the text.
STEPS = re.compile(r"^`(\S+?)`(?:, (at the end|in `(\w+)`))?:\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)


def follow(section: str, root: Path) -> None:
    """Do what a section says: write a file, add to its end, or add an entry to a list."""
    steps = STEPS.findall(section)
    assert len(steps) == 2
    for path, where, entry_of, text in steps:
        file = root / path
        if not where:
            assert not file.exists()
            file.write_text(text, encoding="utf-8")
        elif not entry_of:
            file.write_text(f"{file.read_text(encoding='utf-8')}\n\n{text}", encoding="utf-8")
        else:
            source, count = re.subn(
                rf"^({entry_of} = [{{(\[])",
                lambda found: f"{found[1]}\n{text}",
                file.read_text(encoding="utf-8"),
                flags=re.M,
            )
            assert count == 1
            file.write_text(source, encoding="utf-8")


# Runs scripts and modules in one process, which loads torch once.
ONE_AFTER_ANOTHER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    try:
        run(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package, its evaluation scripts and its tests of methods, with the three additions."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("jcdp_diffusers", "eval", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    recipes = [section for section in sections if section.startswith("Add a ")]
    assert len(recipes) == 3
    for section in recipes:
        follow(section, root)
    return root


def run(root: Path, *words) -> str:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(copy, tmp_path_factory) -> str:
    """What a grid of the three prints, its table, and the property tests, one after another in one process."""
    tmp_path = tmp_path_factory.mktemp("grid")
    digits = load_digits()
    images = digits.images[:180, :, :, None].repeat(3, axis=3) * 15
    data = LabelledImages(images.astype("uint8"), digits.target[:180], tuple(f"d{row}" for row in range(180)))
    write_dataset(tmp_path / "clean", data.subset(range(120)))
    write_dataset(tmp_path / "clean", data.subset(range(120, 180)), split="test")
    role = {"source": str(tmp_path / "clean"), "split": "train"}
    grid = {
        "name": "additions",
        "data": {
            "name": "digits8",
            "protected": role | {"count": 80},
            "collected": role | {"first": 80, "count": 40},
            "test": role | {"split": "test"},
        },
        "poisons": ["none", "grain"],
        "countermeasures": ["none", "box-blur"],
        "victims": ["two_layers"],
        "protocol": "smoke",
        "seeds": [0],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    measure = ["eval/benchmark.py", tmp_path / "grid.yaml", "--output", tmp_path / "out", "--processes", 1]
    show = ["eval/tables.py", "grid", "--records", tmp_path / "out/records.jsonl", "--smoke", "--victim", "two_layers"]
    properties = ["pytest", "-q", "-p", "no:cacheprovider", "tests/poisons/test_poisons.py"]
    properties += ["tests/countermeasures/test_countermeasures.py"]
    commands = (measure, show, [*properties, "-k", "grain or box-blur"])
    return run(copy, "-c", ONE_AFTER_ANOTHER, json.dumps([list(map(str, command)) for command in commands]))


def test_a_grid_of_the_three_ends_in_a_table(printed):
    assert "eval/tables.py grid" in printed
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in row] for row in rows]
    assert head[1:3] == ["clean", "Grain"]
    found = {row[0]: row[1:3] for row in rows}
    assert {"vanilla", "box-blur"} <= found.keys()
    assert all(0 <= float(cell) <= 100 for name in ("vanilla", "box-blur") for cell in found[name])


def test_the_property_tests_run_over_the_additions(printed):
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 15


def test_a_recipe_that_names_no_file_is_noticed(tmp_path):
    with pytest.raises(AssertionError):
        follow("## Add a poison\n\nWrite some code.\n", tmp_path)
