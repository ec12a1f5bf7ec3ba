"""What README.md and the pages of docs/ say is what the records say, and what they name exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import pages
from eval.benchmark import read_grid
from eval.speed_tables import Machine
from eval.tables import Measured, roles_table
from jcdp_diffusers.cli import COMMANDS
from jcdp_diffusers.purification_config import PRESETS
from jcdp_diffusers.results import as_settings, read_records, summarise


ROOT = Path(__file__).parents[2]
PAGES = {
    path: (ROOT / path).read_text() for path in ("README.md", "docs/results.md", "docs/speed.md", "docs/scaling.md")
}
README, FOUND, SPEED = (" ".join(PAGES[name].split()) for name in ("README.md", "docs/results.md", "docs/speed.md"))


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
    with pytest.raises(SystemExit, match="README.md has no <!-- story -->"):
        pages.main()


def test_what_is_said_of_the_story_is_on_record():
    records = [r for r in read_records(ROOT / "results/cifar10_mini/records.jsonl") if r["what"] == "accuracy"]
    means = {row["settings.row"]: 100 * row["mean"] for row in summarise(records, by=("settings.row",))}
    lost, won = means["clean"] - means["protected"], means["purified"] - means["protected"]
    assert f"costs {lost:.1f} points; purification wins back {won:.1f} of them ({100 * won / lost:.0f} %)" in README


def test_what_is_said_of_single_victims_is_on_record():
    text = between(FOUND, "A poison that leaves more than", "## Which countermeasure")
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


def test_what_is_said_of_the_best_recipes_is_on_record():
    measured = pages.measured("countermeasures")

    def accuracies(poison, column):
        return measured.accuracies("cifar10", poison, column)

    recipe = [np.mean(accuracies(p, "impulse-filter+unconditional+corruption")) for p in ("emn", "lsp", "tap", "ops")]
    text = between(FOUND, "### What to take from it", "### How the rows were run")
    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f} against EMN, LSP, TAP and OPS".format(*recipe) in text
    assert f"{np.mean(accuracies('ops', 'impulse-filter')):.1f}" in text
    for column in ("orthogonal-projection", "coloured noise", "coloured noise, 4 draws"):
        assert mean_and_spread(accuracies("lsp", column)) in text
    assert f"OPS, {np.mean(accuracies('ops', 'impulse-filter')):.1f}" in README
    (clean,) = accuracies("none", "impulse-filter+unconditional+corruption")
    cost = [clean - figure for figure in recipe[:3]]
    assert f"get {clean:.1f} by the same recipe" in text
    assert (
        f"{min(cost):.1f} to {max(cost):.1f} points against EMN, LSP and TAP and nothing" in text and recipe[3] > clean
    )


def test_what_is_said_of_costs_on_clean_images_is_on_record():
    measured = pages.measured("countermeasures")
    columns = ("impulse-filter", "coloured noise", "unconditional+corruption", "orthogonal-projection")
    columns += ("avatar, 10 evaluations", "jpeg-10", "ueraser-lite", "at-8")
    left = [f"{np.mean(measured.accuracies('cifar10', 'none', column)):.1f}" for column in columns]
    assert (
        "{} is left with the impulse filter, {} and {} with purification by coloured and by white noise, {} with "
        "projection, {} with AVATAR, {} with JPEG-10, {} with UEraser-Lite and {} with adversarial training."
    ).format(*left) in FOUND


def test_what_is_said_of_ueraser_max_is_on_record():
    low = {r["settings"]["poison"]: f"{100 * r['value']:.1f}" for r in records_of("ueraser_max_cifar10_mini")}
    assert low["lsp"] == low["ops"] and f"0.01 instead of 0.05 ({low['ops']} against LSP and OPS" in FOUND


def test_what_is_said_row_by_row_is_on_record():
    measured = pages.measured("countermeasures")
    text = between(FOUND, "### Row by row", "### What the authors' roles")

    def figures(column, *poisons):
        return [f"{np.mean(measured.accuracies('cifar10', poison, column)):.1f}" for poison in poisons]

    four = ("emn", "lsp", "tap", "ops")
    assert "{}, {}, {} and {} against EMN, LSP, TAP and OPS".format(*figures("avatar, 10 evaluations", *four)) in text
    assert "({}, {}, {} and {})".format(*figures("gdmp, 1 round of 9", *four)) in text
    assert "({}, {} and {} against EMN, LSP and TAP)".format(*figures("impulse-filter", *four[:3])) in text
    assert "against LSP ({} and {})".format(*figures("ueraser", "lsp"), *figures("ueraser-lite", "lsp")) in text
    for poison in ("tap", "ops"):
        assert figures("ueraser", poison) > figures("ueraser-lite", poison)
    assert "({}, {} and {} against EMN, LSP and TAP)".format(*figures("at-4", *four[:3])) in text
    assert "fails against OPS ({})".format(*figures("at-8", "ops")) in text
    weak, strong = (sorted(figures("at-8", "emn", "lsp", "tap"))[place] for place in (0, -1))
    assert f"at 8/255 gives {weak} to {strong}" in text
    sparse, dense = figures("eclipse, sparse", "lsp"), figures("eclipse, 4 evaluations", "lsp")
    assert "({} and {}, one seed)".format(*sparse, *dense) in text


def test_what_is_said_of_fast_is_on_record():
    purified = {
        (record["protocol"], record["settings"]["recipe"]["batch_size"]): f"{100 * record['value']:.1f}"
        for record in records_of("protocols_cifar10_mini")
        if record["settings"]["column"] == "coloured noise"
    }
    small, large, published = purified["fast", 32], purified["fast", 256], purified["bridgepure", 128]
    assert f"({large} against {published}). With batches of 32 it gets {small} in a quarter" in FOUND
    assert f"({small} where `bridgepure`'s 120 epochs give {published}, in a quarter of the time:" in README
    searched = {
        record["settings"]["recipe"]["learning_rate"]: f"{100 * record['value']:.1f}"
        for record in records_of("fast_search_cifar10_mini")
        if record["settings"]["column"] == "coloured noise" and record["settings"]["recipe"]["batch_size"] == 32
    }
    assert list(sorted(searched)) == [0.025, 0.05, 0.0707, 0.1]
    figures = "{}, {}, {} and {} with 0.025, 0.05, 0.0707 and 0.1".format(
        *(searched[rate] for rate in sorted(searched))
    )
    assert figures in FOUND


def test_what_is_said_of_another_purifier_is_on_record():
    def told(*files):
        return {
            (r["protocol"], r["settings"]["recipe"]["batch_size"]): f"{100 * r['value']:.1f}"
            for file in files
            for r in records_of(f"{file}_cifar10_mini")
            if r["settings"]["column"] == "coloured noise" and r["settings"]["victim"] in ("resnet18", "vgg16")
        }

    other, this = told("other_purifier"), told("protocols", "victims")
    cells = [("bridgepure", 128), ("fast", 256), ("mini", 32)]
    assert (
        "{} under `bridgepure`, {} under `fast` with batches of 256 and {} to".format(*map(other.get, cells)) in FOUND
    )
    assert "this one gives {}, {} and {}".format(*map(this.get, cells)) in FOUND


def test_what_is_said_of_the_guides_is_on_record():
    text = between(FOUND, "Without corruption while training", "## What purification leaves")
    for record in records_of("compensation_cifar10_mini") + records_of("guides_cifar10_mini"):
        if not record["settings"]["column"].startswith("eclipse"):  # only in the table
            assert f"{100 * record['value']:.1f}" in text, record["settings"]["column"]


def test_what_is_said_of_jcdp_on_test_images_is_on_record():
    measured = pages.measured("countermeasures")
    text = between(FOUND, "On test images and over three seeds", "How much purification is enough")
    for column in ("jcdp+corruption", "unconditional+corruption"):
        for poison in ("lsp", "emn", "tap"):
            values = measured.accuracies("cifar10", poison, column)
            assert len(values) == 3 and mean_and_spread(values) in text
    plain = [measured.accuracies("cifar10", poison, "jcdp, 8 rounds of 2")[0] for poison in ("lsp", "emn", "tap")]
    assert "{:.1f}, {:.1f} and {:.1f}".format(*plain) in text


def test_what_is_said_of_bfloat16_and_of_the_audit_is_on_record():
    float32 = json.loads((ROOT / "results/score_float32_purification.json").read_text())["accuracy"]
    assert f"in float32 victims get {100 * float32['mean']:.1f} ± {100 * float32['std']:.1f} %" in SPEED
    folder = ROOT / "results/audit_cifar10_mini"
    report = json.loads((folder / "report.json").read_text())
    measured = [r["value"] for r in read_records(folder / "records.jsonl") if r["what"] == "accuracy"]
    told = [value for row in report["rows"] for value in row["accuracy"]["values"]]
    assert len(told) == 15 and sorted(told) == sorted(measured)
    assert report["verdict"]["sentence"] in (folder / "report.md").read_text()


def test_what_readme_says_of_speed_is_in_the_table_of_speed():
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGES["docs/speed.md"].splitlines()]
    rows = {cells[0]: cells[1:] for cells in table if cells}
    machines = [head.split(":")[0] for head in rows["`ddpm-cifar10`"]]
    assert len(machines) == 4
    for column in (0, 2):
        said = README.split(f"of an {machines[column].split(',')[0]}")[1]
        cells = lambda title: map(float, rows[title][column : column + 2])
        float32, bfloat16 = cells("step with both guides / bare UNet, batch 64")
        assert f"{float32:.3f} times the bare network in float32 and {bfloat16:.3f} times in bfloat16" in said
        float32, bfloat16 = cells("the same, times the authors' loop")
        faster = f"{bfloat16:.1f} times as fast as the authors' loop in bfloat16 and {float32:.2f} times in float32"
        assert faster in said
        title = "arithmetic of diffusers' network in that time, share of the convolution's peak"
        float32, bfloat16 = rows[title][column : column + 2]
        assert f", at {bfloat16} and {float32}" in said


def test_what_is_said_of_small_networks_is_on_record():
    records = [
        r for r in read_records(ROOT / "results/throughput.jsonl") if r["settings"]["processor"].startswith("AMD EPYC")
    ]
    machine = Machine(records, "small32")
    float32, bfloat16 = (
        machine.step(f"{precision} channels_last", "guided", 64)["one_plus_rest"]
        for precision in ("float32", "bfloat16")
    )
    assert (
        f"takes {float32:.2f} times the bare network in float32 and {bfloat16:.2f} times in bfloat16 (EPYC)" in SPEED
    )


def test_what_is_said_of_folded_upsampling_is_on_record():
    (value,) = [
        r["value"]
        for r in read_records(ROOT / "results/throughput.jsonl")
        if r["what"] == "pixels" and r["settings"].get("precision") == "float32"
    ]
    values = 256 * 32 * 32 * 3
    assert value["largest"] == 1
    assert f"the two together change {value['share_changed'] * values:.0f} of {values:,} purified values" in SPEED
    column = "coloured noise, trained longer"
    accuracies = [
        pages.spread(pages.measured(name).accuracies("cifar10", *cell))
        for name, cell in (
            ("countermeasures", ("lsp", column)),
            ("unfolded", ("lsp", column)),
            ("countermeasures", ("lsp", "coloured noise")),
            ("countermeasures", ("none", column)),
            ("countermeasures", ("none", "coloured noise")),
        )
    ]
    with_it, without, shorter, clean, clean_shorter = accuracies
    assert f"victims get {with_it} % from LSP purified with it and {without} % without" in SPEED
    assert f"{with_it} against LSP where the other's victims get {shorter}, and {clean} on clean images" in FOUND
    assert f"instead of {clean_shorter})" in FOUND


def test_what_is_said_of_the_default_number_of_evaluations_is_on_record():
    found = Measured(read_records(ROOT / "results/evaluations_cifar10_3k.jsonl"))
    text = between(SPEED, "What the default's", "On validation images")

    def several(column):
        cells = [found.accuracies("cifar10", poison, column) for poison in ("lsp", "emn", "tap")]
        assert [len(cell) for cell in cells] == [3, 3, 3]
        return [np.array(cell) for cell in cells], "{}, {} and {}".format(*map(mean_and_spread, cells))

    hundred, in_words = several("100 evaluations")
    assert f"where a hundred give {in_words}" in text
    ten, in_words = several(f"{PRESETS['unconditional'].evaluations_per_image} evaluations")
    assert f"ten evaluations give {in_words} against LSP, EMN and TAP" in text
    # What the default rests on: it loses nothing beyond the spread of seeds.
    for fewer, all_of_them in zip(ten, hundred):
        assert fewer.mean() > all_of_them.mean() - max(fewer.std(ddof=1), all_of_them.std(ddof=1))
    assert f"25 give {several('25 evaluations')[1]}" in text
    assert f"reuse at two of three gives {several('25 evaluations, features reused twice')[1]}" in text


def test_what_is_said_of_combinations_and_evaluations_is_on_record():
    text = between(FOUND, "### What to take from it", "## What the guides do") + SPEED
    columns = (
        *("projection, impulse filter, purification, corruption", "none", "unconditional"),
        *("8 rounds of 4", "4 rounds of 2, then corruption", "4 rounds of 1, then corruption"),
    )
    found = [
        r
        for name in ("combinations", "evaluations", "stated", "victim_float32")
        for r in records_of(f"{name}_cifar10_mini")
        if r["settings"]["column"] in columns or name == "victim_float32"
    ]
    assert len(found) == 10
    for record in found:
        assert f"{100 * record['value']:.1f}" in text, record["settings"]["column"]
    both = [
        r for name in ("leak", "countermeasures") for r in read_records(ROOT / f"results/{name}_cifar10_mini.jsonl")
    ]
    paired = roles_table(Measured(both), Measured(both, roles="paper"), "cifar10")
    disjoint, paper, difference = [cell.strip() for cell in paired.splitlines()[-1].split("|")[3:6]]
    assert all(figure in text for figure in (disjoint, paper, difference))


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
