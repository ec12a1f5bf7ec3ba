"""Fixtures that all tests may use; nothing reaches for the network."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `datasets` finds a folder with a card in its cache by the folder's name alone, so that a test would see the images
# of an earlier run of the tests.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="jcdp-tests-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from tiny import tiny_unet  # noqa: E402


logging.disable_progress_bar()


@pytest.fixture(scope="session")
def ddpm_folder(tmp_path_factory) -> Path:
    """A folder that plain diffusers wrote, as google/ddpm-cifar10-32 is configured (fixed_large), only tiny."""
    folder = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return folder


@pytest.fixture
def shared() -> Path:
    """
    The folder of real data and weights beside the repository (or named by JCDP_SHARED), which is never committed.
    """
    folder = Path(os.environ.get("JCDP_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set JCDP_SHARED to a folder with data/cifar10 and weights")
    return folder


@pytest.fixture(autouse=True)
def seeded_test() -> None:
    """What a test draws from the global generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def without_drawing(monkeypatch) -> None:
    """Reports of audits without what matplotlib draws, which takes a second and a half of each."""
    from jcdp_diffusers.audit import page, report

    for module, name in ((report, "save_strips"), (report, "draw_curves"), (page, "draw_curves")):
        monkeypatch.setattr(module, name, lambda *arguments: "")
    for module in (report, page):
        monkeypatch.setattr(module, "draw_spectrum", lambda *arguments: "")
