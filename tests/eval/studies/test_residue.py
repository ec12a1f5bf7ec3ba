"""What purification leaves of a poison: against images whose change is known."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from eval.studies import residue
from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.poisons.protect import protect_dataset
from jcdp_diffusers.results import read_records


def wave(cycles: int, size: int = 16) -> np.ndarray:
    """Levels from -20 to 20, `cycles` across the image, shape (size, size, 1)."""
    across = np.rint(20 * np.cos(2 * np.pi * cycles * np.arange(size) / size))
    return np.tile(across, (size, 1))[..., None]


def test_what_is_left_is_found_in_its_octave():
    clean = np.full((2, 16, 16, 3), 120, np.uint8)
    protected = (clean + wave(1) + 10).astype(np.uint8)
    found = residue.residue(clean, protected, (clean + wave(1) + 5 + wave(8)).astype(np.uint8))
    assert found["cycles"] == [0, 1, 2, 4, 8]  # the corner of the spectrum, at 11.3, belongs to the last
    share = 200 / (200 + 100)  # of the energy: a wave of amplitude 20, and 10 everywhere
    assert found["poison"] == pytest.approx([1 - share, share, 0, 0, 0], abs=0.01)
    assert found["kept"][:2] == pytest.approx([0.5, 1.0], abs=0.01)
    assert found["change"] == pytest.approx([0, 0, 0, 0, 20], abs=0.5)  # cos(pi n) is -1 or 1, so 20 everywhere


def test_the_change_is_that_of_all_values():
    rng = np.random.default_rng(0)
    clean = rng.integers(60, 190, (5, 12, 20, 3), dtype=np.uint8)
    purified = (clean + rng.integers(-20, 20, clean.shape)).astype(np.uint8)
    protected = (clean + rng.integers(-8, 9, clean.shape)).astype(np.uint8)
    found = residue.residue(clean, protected, purified)
    difference = purified.astype(float) - clean
    assert np.sum(np.square(found["change"])) == pytest.approx((difference**2).mean(), rel=0.02)
    assert np.abs(found["kept"]).max() < 0.5 and sum(found["poison"]) == pytest.approx(1)


def test_other_shapes_and_no_poison_are_refused():
    clean = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="but both must be as clean"):
        residue.residue(clean, clean, clean[:1])
    with pytest.raises(ValueError, match="protected is equal to clean"):
        residue.residue(clean, clean, clean)


def test_command_writes_a_record_per_set_and_the_picture(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    clean = LabelledImages(images, np.arange(20) % 4, tuple(map(str, range(20))), ("a", "b", "c", "d"))
    write_dataset(tmp_path / "clean", clean)
    protect_dataset(clean, tmp_path / "protected", method="lsp", preset="cpu", source=None)
    for name in ("one", "two"):
        write_dataset(tmp_path / name, clean)
        run = {"settings": {"diffusion_steps": 30}, "purifier": {"name": name}, "seed": 0}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    command = ["residue", "--clean", "clean", "--protected", "protected", "--output", "r.jsonl", "--picture", "r.png"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command, "--purified", "T_p 30=one", "T_p 100=two"])
    residue.main()
    assert "T_p 30: of the poison 0 0 0 0 0 % is left" in capsys.readouterr().out.replace("-0", "0")
    found = read_records("r.jsonl")
    assert [record["settings"]["title"] for record in found] == ["T_p 30", "T_p 100"]
    assert found[0]["settings"]["poison"] == "lsp" and found[0]["settings"]["purification"] == {"diffusion_steps": 30}
    assert np.asarray(Image.open("r.png").convert("L")).std() > 5
    write_dataset(tmp_path / "three", clean.subset(range(5)))
    monkeypatch.setattr(sys, "argv", [*command, "--purified", "fewer=three"])
    with pytest.raises(SystemExit, match="residue: fewer lacks the image '5', but all sets must have the same ids"):
        residue.main()
