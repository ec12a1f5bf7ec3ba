"""The folder `spaces/`, as the Hub and pip read it."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def metadata() -> dict:
    return yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_metadata_is_what_the_hub_reads():
    facts = metadata()
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert facts["sdk"] == "gradio" and (SPACE / facts["app_file"]).is_file()
    assert {facts["colorFrom"], facts["colorTo"]} <= colours
    assert len(facts["short_description"]) <= 60  # the Hub refuses more
    assert isinstance(facts["sdk_version"], str) and isinstance(facts["python_version"], str)
    assert all(isinstance(word, str) for word in facts["tags"] + facts["models"])


def test_its_versions_are_those_that_the_package_accepts():
    (gradio,) = map(Requirement, PROJECT["optional-dependencies"]["demo"])
    assert gradio.name == "gradio" and gradio.specifier.contains(metadata()["sdk_version"])
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(metadata()["python_version"])


def test_it_installs_what_the_package_needs():
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith(("#", "--"))] == PROJECT["dependencies"]


def test_its_model_is_the_purifier_that_it_starts_with():
    assert [f'"{name}"' in (SPACE / "app.py").read_text(encoding="utf-8") for name in metadata()["models"]] == [True]
