"""results.py: records that survive other processes, crashes and nonsense values."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jcdp_diffusers import results
from jcdp_diffusers.results import append_record, package_versions, read_records, summarise


ROOT = Path(__file__).parents[1]


def record(path, **changes):
    fields = {
        "what": "accuracy",
        "value": 0.5,
        "seed": 0,
        "protocol": "smoke",
        "settings": {"poison": "lsp"},
        "device": "cpu",
        "seconds": 1.5,
    }
    return append_record(path, **{**fields, **changes})


def test_a_record_reads_back_as_it_was_returned(tmp_path):
    path = tmp_path / "new folder" / "records.jsonl"
    first = record(path)
    second = record(
        path, what="per class", value=np.array([0.25, 1]), seed=np.int64(3), settings={"norm": np.float32(0.5)}
    )
    assert read_records(path) == [first, second]
    assert set(first) == {
        "what", "value", "seed", "protocol", "settings", "packages", "device", "seconds", "commit", "time",
    }  # fmt: skip
    assert second["value"] == [0.25, 1.0] and second["seed"] == 3 and second["settings"] == {"norm": 0.5}
    assert first["time"].endswith("Z") and first["packages"]["numpy"] == np.__version__
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"value": math.nan}, "value is nan; finite numbers are accepted"),
        ({"value": np.float32("inf")}, "value is inf; finite"),
        ({"value": {"a": [1.0, math.inf]}}, r"value\['a'\]\[1\] is inf"),
        ({"settings": {"scale": float("nan")}}, r"settings\['scale'\] is nan"),
        ({"settings": {"device": object()}}, r"settings\['device'\] is a object; strings, numbers"),
        ({"settings": None}, "settings is None; a dict is accepted"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"what": ""}, "what is ''; a string that is not empty"),
        ({"protocol": None}, "protocol is None; a string"),
    ],
)
def test_nonsense_is_refused_and_nothing_written(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        record(tmp_path / "records.jsonl", **changes)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_append_at_once(tmp_path):
    path = tmp_path / "records.jsonl"
    program = (
        "import sys; from jcdp_diffusers.results import append_record\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for index in range(100):\n"
        "    append_record(sys.argv[1], what='x' * (10 + 37 * index % 5000), value=index, seed=int(sys.argv[2]),\n"
        "                  protocol='smoke', settings={}, device='cpu', seconds=0.0)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    workers = [subprocess.Popen([sys.executable, "-c", program, str(path), str(seed)], **pipes) for seed in (0, 1)]
    for worker in workers:
        assert worker.stdout.readline() == b"ready\n"
    for worker in workers:
        worker.stdin.write(b"go\n")
        worker.stdin.close()
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for worker in workers:
        worker.stdout.close()
    records = read_records(path)
    assert len(records) == 200
    for seed in (0, 1):
        assert [entry["value"] for entry in records if entry["seed"] == seed] == list(range(100))


def test_a_last_line_cut_short_is_left_out_and_makes_way(tmp_path):
    path = tmp_path / "records.jsonl"
    first = record(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    with pytest.warns(UserWarning, match="records.jsonl ends in a line that was cut short, which is left out"):
        assert read_records(path) == [first] and path.read_bytes() == whole + whole[:40]  # reading changes nothing
    second = record(path, value=0.75)
    assert read_records(path) == [first, second] and len(path.read_text().splitlines()) == 2
    path.write_bytes(path.read_bytes()[:-1])  # as an editor leaves it: the last record is whole
    assert read_records(path) == [first, second]
    third = record(path, value=0.5)
    assert read_records(path) == [first, second, third]


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    record(path)
    path.write_text('{"what": \n' + path.read_text())
    with pytest.raises(ValueError, match="records.jsonl, line 1, is no JSON record"):
        read_records(path)
    path.write_text('{"what": "x", "value": 1}\n[1]\n')
    with pytest.raises(ValueError, match="records.jsonl, line 2, is no record: an object with what and value"):
        read_records(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="line 1, is no JSON record"):
        read_records(path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    first = record(path)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[:17]))
        with pytest.raises(OSError, match="took 17 of .* bytes; the disk is probably full"):
            record(path)
    assert read_records(path) == [first]


# ----------------------------------------------------------------------------------------------------------- commit


@pytest.fixture
def git(tmp_path, monkeypatch):
    """`git` in a fresh repository with one commit, whatever the user's own settings."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def run(*arguments):
        settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *settings, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.jsonl").write_text("")
    run("add", ".")
    run("commit", "-qm", "first")
    results._commit.cache_clear()
    return run


def commit_of(folder):
    results._commit.cache_clear()
    return results._commit(folder.resolve())


def test_commit_names_head_and_whether_the_tree_differs(tmp_path, git):
    head = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == head
    (tmp_path / "results" / "old.jsonl").write_text("{}\n")
    (tmp_path / "results" / "new.jsonl").write_text("{}\n")
    assert commit_of(tmp_path) == head  # a record is no change of the program
    (tmp_path / "new.py").write_text("")
    assert commit_of(tmp_path) == f"{head}-dirty"
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == f"{head}-dirty"


def test_commit_is_null_outside_the_package_s_own_checkout(tmp_path, git, tmp_path_factory, monkeypatch):
    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert commit_of(installed) is None  # somebody else's repository
    assert commit_of(tmp_path_factory.mktemp("plain")) is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as within a git hook
    assert commit_of(tmp_path_factory.mktemp("plain")) is None
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) is None
    results._commit.cache_clear()


def test_package_versions_name_what_decides_a_figure():
    versions = package_versions()
    assert {"python", "torch", "diffusers", "datasets", "jcdp-diffusers"} <= versions.keys()
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


# -------------------------------------------------------------------------------------------------------- summarise


def cell(value, seed, **settings):
    return {"what": "accuracy", "value": value, "seed": seed, "protocol": "fast", "settings": settings}


def test_summarise_gives_mean_and_sample_deviation():
    rows = summarise([cell(0.1, 0, w=1), cell(0.9, 0, w=2), cell(0.2, 1, w=1), cell(0.6, 2, w=1)])
    assert [row["n"] for row in rows] == [3, 1] and rows[0]["settings"] == {"w": 1}
    assert rows[0]["mean"] == pytest.approx(0.3) and rows[0]["values"] == [0.1, 0.2, 0.6]
    assert rows[0]["std"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1)) and rows[1]["std"] is None


def test_summarise_takes_the_last_of_repeated_cells():
    rows = summarise([cell(0.1, 0), cell(0.3, 1), cell(0.5, 0)])
    assert rows[0]["values"] == [0.5, 0.3]


def test_summarise_groups_by_single_settings_and_refuses_mixtures():
    records = [cell(0.1, 0, w=1, p="lsp"), cell(0.2, 0, w=2, p="lsp"), cell(0.4, 0, w=1, p="em")]
    rows = summarise(records, by=("settings.p", "settings.w"))
    assert [(row["settings.p"], row["settings.w"], row["mean"]) for row in rows] == [
        ("lsp", 1, 0.1),
        ("lsp", 2, 0.2),
        ("em", 1, 0.4),
    ]
    with pytest.raises(
        ValueError, match=r"by is \('settings.p',\), which puts different settings with seed 0 into one"
    ):
        summarise(records, by=("settings.p",))
    with pytest.raises(ValueError, match=r"records has the value \[1\] for 'accuracy'; numbers are accepted"):
        summarise([cell([1], 0)])
    assert summarise([]) == []
