"""What commands write: whole or not at all, never through a link, never into what they read."""

import os
from pathlib import Path

import pytest

from jcdp_diffusers.outputs import (
    check_output_file,
    check_output_folder,
    printable,
    public_name,
    replacing,
    write_atomically,
)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("content", ["Grüße\n", b"\x00\xff"])
def test_a_file_is_written_and_replaced(tmp_path, content):
    for before in (None, "much longer than what comes after it"):
        if before:
            (tmp_path / "file").write_text(before)
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert files(tmp_path) == ["file"]


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    write_atomically(tmp_path / "file", "before")
    with pytest.raises(RuntimeError, match="stopped"), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half of")
        raise RuntimeError("stopped")
    assert (tmp_path / "file").read_text() == "before" and files(tmp_path) == ["file"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_replaced_and_not_followed(tmp_path, dangling):
    elsewhere = tmp_path / "elsewhere"
    if not dangling:
        elsewhere.write_text("precious")
    (tmp_path / "report.html").symlink_to(elsewhere)
    write_atomically(tmp_path / "report.html", "page")
    assert not (tmp_path / "report.html").is_symlink() and (tmp_path / "report.html").read_text() == "page"
    assert not elsewhere.exists() if dangling else elsewhere.read_text() == "precious"


def begun(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    return folder


OPTIONS = {"marks": ("run.json",), "own": ("*.parquet", "README.md"), "name": "--output"}


@pytest.mark.parametrize("names", [(), ("run.json",), ("run.json", "a.parquet", "README.md"), (".state", ".git")])
def test_an_empty_folder_and_one_of_the_same_command_are_accepted(tmp_path, names):
    check_output_folder(tmp_path / "nothing", **OPTIONS)
    check_output_folder(begun(tmp_path / "out", *names), **OPTIONS)


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (("photo.png",), "photo.png"),
        (("a.parquet", "README.md"), "README.md"),
        (("run.json", "diary.txt"), "diary.txt"),
    ],
)
def test_a_folder_with_files_of_others_is_refused(tmp_path, names, foreign):
    folder = begun(tmp_path / "out", *names)
    with pytest.raises(ValueError, match=rf"--output is '{folder}', which holds '{foreign}'"):
        check_output_folder(folder, **OPTIONS)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="--output is .*out'.*folder"):
        check_output_folder(tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("place", ["README.md", "a.parquet", ".state", "deep/er/link"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_links_within_are_refused_at_any_depth(tmp_path, place, target):
    folder = begun(tmp_path / "out", "run.json")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    link = folder / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=rf"--output is .* holds the link '{place}'"):
        check_output_folder(folder, **OPTIONS | {"own": ("*.parquet", "README.md", "deep")})


def test_the_output_may_be_reached_through_a_link_but_not_a_source(tmp_path):
    real = begun(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    check_output_folder(tmp_path / "link", **OPTIONS)
    with pytest.raises(ValueError, match="--output is .*link', which is that of --dataset"):
        check_output_folder(tmp_path / "link", sources={"--dataset": real}, **OPTIONS)


@pytest.mark.parametrize(
    ("output", "source", "relation"),
    [
        ("data", "data", "is that of --dataset"),
        ("data/../data/.", "data", "is that of --dataset"),
        ("data/out", "data", "lies inside that of --dataset"),
        (".", "data", "holds that of --dataset"),
        ("data", "data/a.png", "holds that of --dataset"),
    ],
)
def test_what_is_read_is_never_written_to(tmp_path, output, source, relation):
    begun(tmp_path / "data", "a.png")
    options = OPTIONS | {"marks": ("data", "a.png")}
    with pytest.raises(ValueError, match=relation):
        check_output_folder(f"{tmp_path}/{output}", sources={"--dataset": str(tmp_path / source)}, **options)
    assert files(tmp_path) == ["data", "data/a.png"]


def test_a_folder_may_hold_sources_where_the_command_says_so(tmp_path):
    begun(tmp_path / "data")
    options = OPTIONS | {"marks": ("data",), "sources": {"data": tmp_path / "data"}}
    check_output_folder(tmp_path, holds_sources=True, **options)


def test_sources_that_are_no_path_are_passed_over(tmp_path):
    check_output_folder(tmp_path, sources={"a": None, "b": "uoft-cs/cifar10", "c": object()}, **OPTIONS)


def test_a_file_is_never_a_source_a_link_or_a_folder(tmp_path):
    begun(tmp_path / "data", "a.png")
    check_output_file(tmp_path / "score.json", sources={"--train": tmp_path / "data"})
    for path, relation in (("data/score.json", "lies inside that of --train"), ("data", "is that of --train")):
        with pytest.raises(ValueError, match=f"output is .*{path}', which {relation}"):
            check_output_file(tmp_path / path, sources={"--train": tmp_path / "data"})
    with pytest.raises(ValueError, match="output is .*data'.*file"):
        check_output_file(tmp_path / "data")
    (tmp_path / "link.json").symlink_to(tmp_path / "data" / "a.png")
    with pytest.raises(ValueError, match="output is .*link.json'.*file"):
        check_output_file(tmp_path / "link.json")


def test_cards_name_paths_by_their_last_part_and_obey_no_escape(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    assert public_name(tmp_path / "photos") == "photos" == public_name(str(tmp_path / "photos") + os.sep)
    assert public_name("/gone/since/photos") == "photos"
    assert public_name("uoft-cs/cifar10") == "uoft-cs/cifar10"
    monkeypatch.chdir(tmp_path / "photos")
    assert public_name(".") == "photos"
    assert printable("a\x1b[31mred\nline\u202e") == r"a\x1b[31mred\nline\u202e"
    assert printable("Grüße, 猫") == "Grüße, 猫" and printable("name-\udcff") == "name-?"
