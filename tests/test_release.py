"""What a release says of itself is the same everywhere."""

import re
from pathlib import Path

import yaml

import jcdp_diffusers
from jcdp_diffusers.quickstart import PRESETS
from jcdp_diffusers.victims import RECIPES


ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_citation_and_of_the_newest_changes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert citation["version"] == newest[1] == jcdp_diffusers.__version__
    assert str(citation["date-released"]) == newest[2]


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper" and paper["conference"]["name"] and len(paper["authors"]) == 6
    assert "https://arxiv.org/abs/2305.09241" in [one["value"] for one in paper["identifiers"]]


def test_the_smoke_quickstart_is_known_as_one():
    assert RECIPES[PRESETS["smoke"].recipe].smoke
