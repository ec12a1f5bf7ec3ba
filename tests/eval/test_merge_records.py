"""Finished trials go from a grid's output folder into results/, each of them once."""

import json
import sys

import pytest

from eval import merge_records
from eval.merge_records import merge
from jcdp_diffusers.results import read_records


def trial(name, value=0.5, *, poison="lsp", smoke=False, parts=("victim", "accuracy")):
    settings = {"trial": name, "poison": poison, "column": "none", "recipe": {"smoke": smoke}, "grid": "g"}
    values = {"victim": {"history": [], "title": "ü"}, "accuracy": value}
    return [{"what": part, "value": values[part], "settings": settings, "protocol": "mini"} for part in parts]


def test_only_what_is_missing_is_added(tmp_path):
    into = tmp_path / "into.jsonl"
    assert merge([*trial("a"), *trial("b")], into) == (2, 0)
    before = into.read_text()
    assert read_records(into) == [*trial("a"), *trial("b")]
    assert merge([*trial("b"), *trial("c", 0.7), *trial("a")], into) == (1, 2)
    assert into.read_text().startswith(before) and read_records(into)[4:] == trial("c", 0.7)
    assert merge([*trial("b"), *trial("c", 0.7)], into) == (0, 2)
    assert len(read_records(into)) == 6


def test_a_trial_that_is_not_finished_and_other_measurements_stay_out(tmp_path):
    into = tmp_path / "into.jsonl"
    others = [
        {"what": "peak", "value": 1.0, "settings": {"trial": "b"}},
        {"what": "accuracy", "value": 1, "settings": {}},
        {"what": "accuracy", "value": 1},
    ]
    assert merge([*trial("a", parts=("victim",)), *others], into) == (0, 0)
    assert not into.exists()


@pytest.mark.parametrize(
    ("new", "error"), [(trial("a", 0.6), "accuracy 0.6 .* 0.5"), (trial("b", smoke=True), "trial b")]
)
def test_another_figure_of_one_trial_and_smoke_runs_are_refused(tmp_path, new, error):
    into = tmp_path / "into.jsonl"
    merge(trial("a"), into)
    with pytest.raises(ValueError, match=error):
        merge([*trial("c"), *new], into)
    assert read_records(into) == trial("a")


def test_the_documented_command_takes_what_it_names(tmp_path, monkeypatch, capsys):
    source, into = tmp_path / "records.jsonl", tmp_path / "into.jsonl"
    records = [*trial("a"), *trial("b", poison="emn"), *trial("c", poison="emn")]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["merge_records", "--records", str(source), "--into", str(into), "--poisons"]
    monkeypatch.setattr(sys, "argv", [*options, "emn"])
    for said in ("2 trials added, 0 ", "0 trials added, 2 "):
        merge_records.main()
        assert said in capsys.readouterr().out
    assert read_records(into) == records[2:]
    monkeypatch.setattr(sys, "argv", [*options, "tap"])
    with pytest.raises(SystemExit, match="poisons is 'tap'"):
        merge_records.main()


def test_a_folder_that_is_missing_is_made(tmp_path):
    assert merge(trial("a"), tmp_path / "missing/into.jsonl") == (1, 0)
    assert read_records(tmp_path / "missing/into.jsonl") == trial("a")


@pytest.mark.parametrize("end", ["", '\n{"what": "victim", "val'])
def test_a_last_line_that_was_cut_short_or_has_no_end(end, tmp_path):
    into = tmp_path / "into.jsonl"
    merge(trial("a"), into)
    into.write_text(into.read_text().rstrip("\n") + end)
    assert merge(trial("b"), into) == (1, 0)
    assert read_records(into) == [*trial("a"), *trial("b")]


def test_a_victim_that_was_begun_again_does_not_stand_beside_an_older_accuracy(tmp_path):
    again = trial("a", parts=("victim",))
    again[0]["value"] = {"history": [1]}
    merge([*trial("a"), *again], tmp_path / "into.jsonl")
    assert read_records(tmp_path / "into.jsonl") == trial("a")
