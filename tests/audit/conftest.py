"""The sets of an audit, and one audit of them that several files look at."""

from pathlib import Path

import pytest
import torch
from audit_runs import ATTACKS, command, digits

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons import get


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("audit")
    clean = digits(range(200))
    data = clean.tensor()
    noise = get("lsp")(data, torch.from_numpy(clean.labels))
    sets = {
        "clean": clean,
        "protected": clean.with_images(apply_perturbation(clean.images, noise)),
        "collected": digits(range(200, 300)),
        "test": digits(range(300, 450)),
    }
    for role, images in sets.items():
        write_dataset(folder / role, images, split="test" if role == "test" else "train")
    return {role: str(folder / role) for role in sets}


@pytest.fixture(scope="session")
def audited(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("audited") / "out"
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, output, "--countermeasures", ATTACKS, roles=roles)) == 0
    return output


@pytest.fixture
def without_labels(folders, tmp_path) -> dict[str, str]:
    bare = load_images(folders["protected"])
    write_dataset(tmp_path / "bare", LabelledImages(bare.images, None, bare.ids))
    write_dataset(tmp_path / "probe", digits(range(500, 620)))
    return {**folders, "protected": str(tmp_path / "bare"), "probe": str(tmp_path / "probe")}
