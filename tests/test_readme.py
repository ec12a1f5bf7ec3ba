"""What README.md says is what the records say, and what it names exists."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval.tables import Measured, grid_table, poison_table, roles_table
from jcdp_diffusers.cli import COMMANDS
from jcdp_diffusers.quickstart import ROWS
from jcdp_diffusers.results import read_records, summarise


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "results" / "cifar10_mini"


def section(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL).group(1)


def records_of(name: str) -> list[dict]:
    return [r for r in read_records(ROOT / "results" / f"{name}.jsonl") if r["what"] == "accuracy"]


def test_the_table_is_that_of_the_records():
    rows = summarise(
        [r for r in read_records(RESULTS / "records.jsonl") if r["what"] == "accuracy"], by=("settings.row",)
    )
    assert {row["settings.row"] for row in rows} == set(ROWS)
    for row in rows:
        line = next(
            line for line in section("cifar10-mini").splitlines() if f"| {ROWS[row['settings.row']]} |" in line
        )
        cells = [cell.strip() for cell in line.split("|")[2:4]]
        assert row["n"] >= 3 and cells == [f"{100 * row['mean']:.1f} %", f"{100 * row['std']:.1f}"]


def test_the_table_of_poisons_is_that_of_the_records():
    measured = Measured(read_records(ROOT / "results" / "poisons_cifar10_mini.jsonl"))
    assert poison_table(measured, "cifar10") in section("poisons")


def test_what_is_said_of_single_victims_is_on_record():
    text = README[README.index("A poison that leaves more than") : README.index("## Which countermeasure")]
    single = [
        r for name in ("poisons_remn_variants", "poisons_cifar10_20k", "poisons_cifar10_5k") for r in records_of(name)
    ]
    assert len(single) == 8
    for record in single:
        assert f"{100 * record['value']:.1f} %" in text, record["settings"]
    for name in ("poisons_cifar10_mini", "poisons_cifar10_20k"):
        curves = [
            [epoch["test_accuracy"] for epoch in r["value"]["history"]]
            for r in read_records(ROOT / "results" / f"{name}.jsonl")
            if r["what"] == "victim" and r["settings"]["poison"] == "lsp"
        ]
        early = sum(sum(curve[:9]) for curve in curves) / (9 * len(curves))
        assert f"{100 * early:.1f} %" in text


def test_what_is_said_of_compensation_is_on_record():
    text = README[README.index("Without corruption while training") : README.index("## In Python")]
    for record in records_of("compensation_cifar10_mini") + records_of("guides_cifar10_mini"):
        if not record["settings"]["column"].startswith("eclipse"):  # only in the table
            assert f"{100 * record['value']:.1f}" in text, record["settings"]["column"]


def test_what_is_said_of_jcdp_on_test_images_is_on_record():
    measured = Measured(records_of("countermeasures_cifar10_mini"))
    text = README[
        README.index("On test images and over three seeds") : README.index("How much purification is enough")
    ]
    text = " ".join(text.split())
    for column in ("jcdp+corruption", "unconditional+corruption"):
        for poison in ("lsp", "emn", "tap"):
            values = measured.accuracies("cifar10", poison, column)
            assert len(values) == 3 and f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    plain = [measured.accuracies("cifar10", poison, "jcdp, 8 rounds of 2")[0] for poison in ("lsp", "emn", "tap")]
    assert "{:.1f}, {:.1f} and {:.1f}".format(*plain) in text


def test_what_is_said_of_bfloat16_and_of_the_audit_is_on_record():
    float32 = json.loads((ROOT / "results/score_float32_purification.json").read_text())["accuracy"]
    said = f"in float32 victims get {100 * float32['mean']:.1f} ± {100 * float32['std']:.1f} %"
    assert said in " ".join(README.split())
    folder = ROOT / "results/audit_cifar10_mini"
    report = json.loads((folder / "report.json").read_text())
    measured = [r["value"] for r in read_records(folder / "records.jsonl") if r["what"] == "accuracy"]
    told = [value for row in report["rows"] for value in row["accuracy"]["values"]]
    assert len(told) == 15 and sorted(told) == sorted(measured)
    assert report["verdict"]["sentence"] in (folder / "report.md").read_text()


def test_what_is_said_of_combinations_and_evaluations_is_on_record():
    text = README[README.index("Rows with diffusion purify") : README.index("What the guides do")]
    columns = ("projection, impulse filter, purification, corruption", "8 rounds of 4", "none", "unconditional")
    found = [
        r
        for name in ("combinations", "evaluations", "stated", "victim_float32")
        for r in records_of(f"{name}_cifar10_mini")
        if r["settings"]["column"] in columns or name == "victim_float32"
    ]
    assert len(found) == 6
    for record in found:
        assert f"{100 * record['value']:.1f}" in text, record["settings"]["column"]
    both = [
        r for name in ("leak", "countermeasures") for r in read_records(ROOT / f"results/{name}_cifar10_mini.jsonl")
    ]
    paired = roles_table(Measured(both), Measured(both, roles="paper"), "cifar10")
    disjoint, paper, difference = [cell.strip() for cell in paired.splitlines()[-1].split("|")[3:6]]
    assert all(figure in text for figure in (disjoint, paper, difference))


@pytest.mark.parametrize("name", ["countermeasures", "guides", "coloured"])
def test_the_tables_of_grids_are_those_of_the_records(name):
    measured = Measured(read_records(ROOT / "results" / f"{name}_cifar10_mini.jsonl"))
    assert grid_table(measured, "cifar10") in section(name)


def test_every_link_and_picture_exists():
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown(command):
    assert f"jcdp {command}" in README


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE) + re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
