"""Attacks of an audit that need more than the protected images: pairs, and victims that start elsewhere."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from jcdp_diffusers.audit.pairs import check_labels, check_pairs_asked, pairs_of
from jcdp_diffusers.audit.settings import AuditSettings
from jcdp_diffusers.cli import main
from jcdp_diffusers.countermeasures import paired
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.poisons.protect import protect_dataset
from jcdp_diffusers.trials import results_by_trial
from jcdp_diffusers.victims import RECIPES


pytestmark = pytest.mark.usefixtures("without_drawing")  # of all but the session's audit


def digits(rows) -> LabelledImages:
    source = load_digits()
    images = (source.images * 15).astype(np.uint8)[:, :, :, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    ids = tuple(f"digit-{row}" for row in range(len(images)))
    return LabelledImages(images, source.target, ids, tuple("0123456789")).subset(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    protect_dataset(digits(range(100)), folder / "protected", method="lsp", preset="stated", seed=3)
    write_dataset(folder / "collected", digits(range(200, 300)))
    write_dataset(folder / "test", digits(range(300, 360)), split="test")
    return folder


@pytest.fixture
def sets():
    return {"protected": digits(range(100)), "collected": digits(range(200, 300))}


PAIRED = AuditSettings(attacks=["gray", "paired-small"], pairs=40, protocol=dataclasses.replace(RECIPES["mini"]))


def test_an_audit_with_both(folder, tmp_path, monkeypatch):
    short = paired.PairedSettings(unet="tiny32", epochs=1, batch_size=50)
    monkeypatch.setitem(paired.SETTINGS, "paired-small", short)
    roles = [word for role in ("protected", "collected", "test") for word in (f"--{role}", str(folder / role))]
    asked = ["--attacks", "pretrained,paired-small+cutout", "--protocol", "smoke", "--seeds", "1"]
    output = tmp_path / "out"
    assert main(["audit", *roles, *asked, "--output", str(output), "--processes", "1", "--device", "cpu"]) == 0
    report = json.loads((output / "report.json").read_text())
    titles = {row["row"]: row["title"] for row in report["rows"]}
    said = "paired-small+cutout (assumes that the protection tool and its seed are public)"
    assert titles["paired-small+cutout"] == said
    assert titles["pretrained"] == "pretrained"
    assert any("The row paired-small+cutout assumes more" in limit for limit in report["limits"])
    page = (output / "report.md").read_text()
    assert f"protected images, with {said}" in page
    assert "SimCLR on the collected images" in report["attacks"]["pretrained"]["source"]
    found = {
        one["settings"]["row"]: one["settings"]
        for one in results_by_trial(output / "records.jsonl", what="accuracy").values()
    }
    assert found["pretrained"]["init_from"]["pretraining"]["collected"]["images"] == 100
    assert 90 <= found["paired-small+cutout"]["pairs"]["originals"]["images"] <= 100
    assert "init_from" not in found["protected"] and "pairs" not in found["protected"]


def test_the_tool_is_that_of_the_card_with_its_settings_and_seed(folder, sets, tmp_path):
    tool = check_pairs_asked(PAIRED, {"protected": folder / "protected", "collected": folder / "collected"})
    assert (tool.method, tool.seed, tool.settings.norm) == ("lsp", 3, 1.0)
    check_labels(tool, sets)
    pairs = pairs_of(tool, PAIRED, sets, tmp_path / "pairs", torch.device("cpu"))
    assert np.bincount(pairs.originals.labels).tolist() == [4] * 10
    change = pairs.protected.images.astype(float) - pairs.originals.images
    assert 0.5 < np.sqrt(np.square(change / 255).sum(axis=(1, 2, 3))).max() <= 1.05
    again = pairs_of(tool, PAIRED, sets, tmp_path / "pairs", torch.device("cpu"))
    assert np.array_equal(again.protected.images, pairs.protected.images)


def test_pairs_that_are_given_need_no_card(sets, tmp_path):
    sources = {"protected": sets["protected"], "collected": "somewhere", "collected_protected": "elsewhere"}
    assert check_pairs_asked(PAIRED, sources) is None
    darker = sets["collected"].with_images(sets["collected"].images // 2)
    pairs = pairs_of(None, PAIRED, sets | {"collected_protected": darker}, tmp_path, torch.device("cpu"))
    assert np.array_equal(pairs.protected.images, darker.images)
    assert pairs_of(None, AuditSettings(), sets, tmp_path, torch.device("cpu")) is None


def test_pairs_that_cannot_be_had(folder, sets, tmp_path):
    with pytest.raises(ValueError, match="attacks has 'paired-small', .*collected_protected"):
        check_pairs_asked(PAIRED, {"protected": folder / "test", "collected": "somewhere"})
    with pytest.raises(ValueError, match="attacks has 'paired-small', .*collected_protected"):
        check_pairs_asked(PAIRED, {"protected": "owner/name", "collected": "somewhere"})
    with pytest.raises(ValueError, match="collected is None, .*'paired-small'"):
        check_pairs_asked(PAIRED, {"protected": folder / "protected", "collected": None})
    with pytest.raises(ValueError, match="collected_protected is 'x'.*None"):
        check_pairs_asked(AuditSettings(), {"protected": "p", "collected": "c", "collected_protected": "x"})
    tool = check_pairs_asked(PAIRED, {"protected": folder / "protected", "collected": "somewhere"})
    with pytest.raises(ValueError, match="collected has no labels.*lsp"):
        check_labels(tool, sets | {"collected": dataclasses.replace(sets["collected"], labels=None)})
    with pytest.raises(ValueError, match="pairs is 0"):
        AuditSettings(pairs=0)
    with pytest.raises(ValueError, match="collected is None, .*'pretrained'"):
        from jcdp_diffusers.audit.run import audit

        options = {"protected": folder / "protected", "test": folder / "test", "purifier": "owner/name"}
        audit(**options, attacks=["pretrained"], output_dir=tmp_path / "out", say=len)
