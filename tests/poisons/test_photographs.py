"""Photographs of assorted sizes are protected at their own size."""

import datasets
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


def photographs(folder, sizes):
    """Smooth pictures of these sizes, in two classes."""
    draw = np.random.default_rng(0)
    for row, size in enumerate(sizes):
        path = folder / ("cat", "dog")[row % 2] / f"IMG_{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.mark.parametrize("side, more, brought", [(150, [], 64), (48, ["--image_size", "32"], 32)])
def test_photographs_that_all_have_one_size_keep_it(side, more, brought, tmp_path, capsys):
    photos = photographs(tmp_path / "photos", [(side, side)] * 4)
    command = ["poison", "--method", "lsp", "--dataset", str(photos), "--output", str(tmp_path / "out"), *more]
    assert main([*command, "--export", str(tmp_path / "pictures"), "--device", "cpu"]) == 0
    assert f"4 photographs at their own size in {tmp_path / 'pictures'}" in capsys.readouterr().out
    assert load_images(tmp_path / "pictures").images.shape[1:3] == (side, side)
    assert load_images(tmp_path / "out").images.shape[1:3] == (brought, brought)


@pytest.mark.parametrize("more", [[], ["--image_size", "32"]])
def test_poisoned_photographs_of_assorted_sizes_are_brought_to_that_of_the_clean_ones(more, tmp_path, capsys):
    photos = photographs(tmp_path / "photos", [(90 + row, 120 - 3 * row) for row in range(6)])
    command = ["poison", "--dataset", str(photos), "--device", "cpu", *more]
    made = [*command, "--method", "lsp", "--output", str(tmp_path / "a"), "--export", str(tmp_path / "poisoned")]
    assert main(made) == 0
    given = [*command, "--perturbation", str(tmp_path / "poisoned"), "--output", str(tmp_path / "b")]
    assert main([*given, "--export", str(tmp_path / "pictures")]) == 0, capsys.readouterr().err
    wanted, found = load_images(tmp_path / "poisoned", image_size=64), load_images(tmp_path / "b")
    if not more:
        assert np.array_equal(found.images, wanted.images)
    assert load_images(tmp_path / "pictures", image_size=64).files == wanted.files


def test_the_set_that_has_the_order_of_a_perturbation_may_lack_the_columns_of_the_others(tmp_path):
    """And where it has them, they are read by their names there, too."""
    draw = np.random.default_rng(0)
    images = draw.integers(20, 230, (8, 16, 16, 3), dtype=np.uint8)
    noise = draw.integers(-8, 9, images.shape)
    np.save(tmp_path / "noise.npy", ((images + noise) - images).astype(np.int16))
    np.savez(tmp_path / "arrays.npz", images=images, labels=np.arange(8) % 2)
    for name, order in (("same", np.arange(8)), ("turned", np.arange(8)[::-1])):
        columns = {"shot": datasets.Image(), "kind": datasets.Value("int64")}
        data = {"shot": [Image.fromarray(images[row]) for row in order], "kind": (order % 2).tolist()}
        (tmp_path / name).mkdir()
        made = datasets.Dataset.from_dict(data, features=datasets.Features(columns))
        made.to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    command = ["poison", "--perturbation", str(tmp_path / "noise.npy"), "--dataset", str(tmp_path / "turned")]
    command += ["--image_column", "shot", "--label_column", "kind"]
    for name in ("same", "arrays.npz"):
        output = tmp_path / f"by {name}"
        assert main([*command, "--in_order_of", str(tmp_path / name), "--output", str(output)]) == 0
        assert np.array_equal(load_images(output).images, (images + noise)[::-1])
