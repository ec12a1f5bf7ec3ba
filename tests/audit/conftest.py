"""The sets of an audit, and one audit of them that several files look at."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from audit_runs import ATTACKS, command, digits

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons import get
from jcdp_diffusers.train.default_purifier import plan_for, train_planned


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the processes of `pytest -n` makes for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            (root / name).mkdir()
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


ROLES = ("clean", "protected", "collected", "test")


def write_sets(folder: Path) -> None:
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = once(tmp_path_factory, "audit", write_sets)
    return {role: str(folder / role) for role in ROLES}


@pytest.fixture(scope="session")
def audited(folders, tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        roles = ("protected", "collected", "test", "clean")
        assert main(command(folders, folder / "out", "--countermeasures", ATTACKS, roles=roles)) == 0

    return once(tmp_path_factory, "audited", make) / "out"


@pytest.fixture(scope="session")
def purifier(folders, tmp_path_factory) -> str:
    """A purifier as an audit of these sets trains it, with the list of its images."""

    def make(folder: Path) -> None:
        collected = load_images(folders["collected"])
        plan = plan_for(collected, torch.device("cpu"), smoke=True)
        train_planned(plan, collected, folder / "out", None, progress=False)
        plan.purification.save_pretrained(folder / "out")

    return str(once(tmp_path_factory, "purifier", make) / "out")


@pytest.fixture
def without_labels(folders, tmp_path) -> dict[str, str]:
    bare = load_images(folders["protected"])
    write_dataset(tmp_path / "bare", LabelledImages(bare.images, None, bare.ids))
    write_dataset(tmp_path / "probe", digits(range(500, 620)))
    return {**folders, "protected": str(tmp_path / "bare"), "probe": str(tmp_path / "probe")}
