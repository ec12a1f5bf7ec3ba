"""Photographs of assorted sizes are protected at their own size."""

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images
from jcdp_diffusers.poisons.photographs import enlarged, protected_photograph


def test_the_perturbation_of_a_square_is_enlarged_and_mirrored_beyond_it():
    draw = np.random.default_rng(0)
    small = draw.integers(-8, 9, (16, 16, 3))
    large = enlarged(small, 96, 200)
    assert large.shape == (96, 200, 3) and np.abs(large).max() <= 8
    assert np.array_equal(large[:, 52:72], large[:, 32:52][:, ::-1])  # the square begins at 52
    # Bilinear: between the centres of two values, a mean of theirs by distance.
    row = large[45, 52:148, 1]
    centre = lambda k: 6 * k + 2.5
    rows = [small[7, :, 1] + (small[8, :, 1] - small[7, :, 1]) * (45 - centre(7)) / 6]
    expected = np.interp(np.arange(96), [centre(k) for k in range(16)], rows[0])
    np.testing.assert_allclose(row, expected, atol=1e-4)
    assert np.array_equal(enlarged(small, 16, 16), small)


def test_a_photograph_is_rounded_once_and_clipped():
    white = np.full((8, 8, 3), 255, np.uint8)
    assert np.array_equal(protected_photograph(white, np.full((4, 4, 3), 5)), white)
    assert (protected_photograph(white // 2, np.full((4, 4, 3), -3)) == 124).all()


def test_the_command_writes_photographs_under_their_own_names(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for row in range(4):
            small = draw.integers(80, 170, (5, 5, 3), dtype=np.uint8)
            size = tuple(int(side) for side in draw.integers(90, 200, 2))
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(
                tmp_path / "photos" / name / f"{place}{row}.jpg"
            )
    photos, output, export = (str(tmp_path / name) for name in ("photos", "protected", "pictures"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/mine.png").write_bytes(b"of another program")  # stays, and is not read
    command = [
        "poison",
        "--method",
        "lsp",
        "--dataset",
        photos,
        "--output",
        output,
        "--export",
        export,
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    assert "centres at 64x64 pixels" in capsys.readouterr().out
    clean, protected = load_images(photos, image_size=64), load_images(output)
    (tmp_path / "pictures/mine.png").unlink()
    found = load_images(export, image_size=64)
    assert [file.removesuffix(".png") for file in found.files] == [file.removesuffix(".jpg") for file in clean.files]
    full, before = (Image.open(f"{folder}/cat/00{suffix}") for folder, suffix in ((export, ".png"), (photos, ".jpg")))
    assert full.size == before.size
    # At the size of a victim the perturbation is there.
    wanted = protected.images.astype(float) - clean.images
    there = found.images.astype(float) - clean.images
    assert np.corrcoef(wanted.ravel(), there.ravel())[0, 1] > 0.95
    assert np.abs(there).max() <= np.abs(wanted).max() + 2
    assert main(command) == 0  # all of it is there already
    (tmp_path / "pictures" / "cat" / "00.png").write_bytes(b"mine")
    assert main(command) == 1 and "holds another 'cat/00.png'" in capsys.readouterr().err
    taken = [*command[:6], str(tmp_path / "other"), *command[7:]]
    assert main(taken) == 1 and "--export is" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("export", ["protected", "protected/pictures", "."])
def test_an_export_is_apart_from_the_output(export, tmp_path, monkeypatch, capsys):
    """Also before either of them exists: the same command could not go on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for row in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * row, np.uint8)).save(tmp_path / "photos" / f"{row}.png")
    command = ["poison", "--method", "uc", "--preset", "smoke", "--dataset", "photos", "--output", "protected"]
    assert main([*command, "--export", export]) == 1
    assert "--export is" in capsys.readouterr().err and not (tmp_path / "protected").exists()
