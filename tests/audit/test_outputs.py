"""What an audit writes to, and what it leaves alone."""

import json
import shutil
from pathlib import Path

import pytest
from audit_runs import command, sentence

from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.cli import main


@pytest.mark.parametrize(
    "changes, begun",
    [
        (["--protocol", "fast"], "protocol 'smoke'"),
        (["--seed", "1"], "seed 0"),
        (["--preset", "unconditional"], "another preset"),
        (["--protected", "clean"], "other protected images"),
        (["--purifier", "purifier"], "a purifier of its own"),
    ],
)
def test_an_output_of_another_audit_is_refused_before_any_work(changes, begun, folders, audited, tmp_path, capfd):
    output = shutil.copytree(audited, tmp_path / "out")
    places = {"clean": folders["clean"], "purifier": str(audited / "purifier")}
    before = (output / "records.jsonl").read_text()
    assert main(command(folders, output, *(places.get(word, word) for word in changes))) == 1
    said = sentence(capfd)
    assert said == (
        f"jcdp audit: --output is {str(output)!r}, where an audit with {begun} was begun, whose purifier and "
        "purified images cannot serve this one: take another --output."
    )
    assert (output / "records.jsonl").read_text() == before


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("planted", ["report.html", "records.jsonl", "pictures", "pictures/images.png", "purified"])
def test_planted_links_are_not_written_through(planted, audited, folders, tmp_path, capfd):
    output = shutil.copytree(audited, tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    place = output / planted
    if place.is_dir():
        place.rename(elsewhere)
    else:
        elsewhere.write_text("precious")
        place.unlink()
    place.symlink_to(elsewhere)
    before = contents(tmp_path)
    assert main(command(folders, output)) == 1
    assert f"--output is {str(output)!r}, which holds the link {planted!r}" in sentence(capfd)
    assert contents(tmp_path) == before


def test_what_is_read_and_files_of_others_stay_as_they_are(audited, folders, tmp_path, capfd):
    roles = ("protected", "collected", "test", "clean")
    own = {role: str(shutil.copytree(folders[role], tmp_path / role)) for role in roles}
    before = contents(tmp_path)
    for output, said in [(own[role], f"is that of --{role}") for role in own] + [
        (f"{own['test']}/out", "lies inside that of --test"),
        (str(tmp_path), "holds that of --protected"),
        (str(audited / "purifier"), "which holds '"),
    ]:
        assert main(command(own, output, roles=roles)) == 1
        assert f"--output is {output!r}, which {said}".replace("which which", "which") in sentence(capfd)
    with pytest.raises(ValueError, match="output_dir is .* is that of purifier"):
        audit(protected="x", test="y", purifier=audited / "purifier", output_dir=audited / "purifier")
    assert contents(tmp_path) == before


def test_a_report_names_folders_by_their_last_part(audited):
    outside = str(audited.parent.parent)
    for name in ("report.html", "report.md", "report.json", "records.jsonl", "purified/README.md"):
        assert outside not in (audited / name).read_text(), name
    assert (
        "--protected protected --collected collected" in json.loads((audited / "report.json").read_text())["command"]
    )
