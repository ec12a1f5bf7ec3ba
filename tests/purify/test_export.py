"""Purified pictures under their owner's file names."""

import datasets
import numpy as np
from PIL import Image
from purifying import quick_pipe, source_folder

from jcdp_diffusers.cli import main


def test_purified_pictures_under_their_own_names(tmp_path, capsys):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    draw, photos, pictures = np.random.default_rng(0), tmp_path / "photos", tmp_path / "pictures"
    for name in ("cat/a.jpg", "dog/b.webp"):
        (photos / name).parent.mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (20, 13, 3), dtype=np.uint8)).save(photos / name)

    def command(output: str) -> list[str]:
        where = ["--dataset", str(photos), "--output", str(tmp_path / output), "--export", str(pictures)]
        how = ["--diffusion_steps", "3", "--num_inference_steps", "3", "--device", "cpu"]
        return ["purify", "--purifier", str(tmp_path / "purifier"), *where, *how]

    assert main(command("out")) == 0 and "2 pictures in" in capsys.readouterr().out
    purified = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert len(purified) == 2
    for row in purified:
        with Image.open((pictures / row["file_name"]).with_suffix(".png")) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(row["image"])) and picture.size == (13, 20)
    assert main(command("out")) == 0  # all of it is there already
    assert main(command("other")) == 1 and "--export is" in capsys.readouterr().err
    (photos / "cat" / "a.png").write_bytes((pictures / "cat" / "a.png").read_bytes())
    assert main(command("other")) == 1 and "'cat/a.jpg' and 'cat/a.png'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_folders_with_brackets_and_sources_at_a_url(tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    for name, count in (("out[1]", 3), ("out1", 2)):
        source = source_folder(tmp_path / f"source of {name}", count)
        where = ["--dataset", f"file://{source}", "--split", "train", "--output", str(tmp_path / name)]
        how = ["--diffusion_steps", "3", "--num_inference_steps", "3", "--device", "cpu"]
        export = ["--export", str(tmp_path / f"pictures of {name}")]
        assert main(["purify", "--purifier", str(tmp_path / "purifier"), *where, *how, *export]) == 0
        assert len(list((tmp_path / f"pictures of {name}").iterdir())) == count
