"""What the page of `jcdp demo` does to pictures, without the page."""

import numpy as np
import pytest
import torch
from PIL import Image
from purifying import quick_pipe
from skimage.metrics import peak_signal_noise_ratio

from jcdp_diffusers import poisons
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import ImageRejected, LabelledImages, load_images
from jcdp_diffusers.demo.command import HOW_TO_GET_A_PURIFIER
from jcdp_diffusers.demo.pictures import (
    COLUMNS,
    Change,
    PictureWork,
    Stopped,
    methods_for_pictures,
    methods_left_out,
    protect_picture,
    purify_picture,
    read_picture,
    usable_presets,
)
from jcdp_diffusers.noise import content_id
from jcdp_diffusers.purify import purify_dataset


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(30, 220, (height, width, 3)).astype(np.uint8)


def test_a_picture_gets_the_bits_that_jcdp_purify_gives_it(tmp_path):
    pipe, image = quick_pipe(), picture(13, 21)
    config = pipe.resolve_config(diffusion_steps=3)
    id_ = content_id(torch.from_numpy(image).permute(2, 0, 1))
    alone = LabelledImages(image[None], np.zeros(1, np.int64), (id_,), None)
    purify_dataset(alone, pipe, output_dir=tmp_path / "out", preset=config, seed=5, fit="tile", progress=False)
    expected = load_images(tmp_path / "out").images[0]
    counts = []
    change = purify_picture(pipe, image, config, seed=5, done=lambda tiles, of: counts.append((tiles, of)))
    assert np.array_equal(change.after, expected) and np.array_equal(change.before, image)
    # Squares of 8 that overlap by 2 at least: 2 of them span 13 pixels, 4 span 21.
    assert counts[0] == (0, 8) and counts[-1] == (8, 8)


def test_a_picture_below_the_purifiers_size_is_enlarged_in_both():
    pipe = quick_pipe()
    change = purify_picture(pipe, picture(4, 6), pipe.resolve_config(diffusion_steps=2))
    assert change.before.shape == change.after.shape == (8, 12, 3)


def test_what_is_told_of_the_tiles_can_stop_them():
    pipe = quick_pipe()

    def stop(tiles, of):
        raise Stopped("Stopped.")

    with pytest.raises(Stopped):
        purify_picture(pipe, picture(8, 8), pipe.resolve_config(diffusion_steps=2), done=stop)


@pytest.mark.parametrize("method,height,width", [("lsp", 48, 80), ("lsp", 33, 7), ("ar", 33, 7), ("cuda", 48, 80)])
def test_protection_of_one_picture(method, height, width):
    image = picture(height, width)
    one = protect_picture(image, method, label=1, seed=3)
    assert one.before is image and one.after.shape == image.shape and (one.after != image).any()
    assert np.array_equal(one.after, protect_picture(image, method, label=1, seed=3).after)
    assert not np.array_equal(one.after, protect_picture(image, method, label=2, seed=3).after)
    assert not np.array_equal(one.after, protect_picture(image, method, label=1, seed=4).after)


def test_lsp_has_its_published_strength_on_a_picture_of_any_size():
    change = protect_picture(np.full((96, 128, 3), 128, np.uint8), "lsp", label=1)
    difference = change.after.astype(float) - change.before
    assert np.sqrt(np.square(difference).mean()) == pytest.approx(6, rel=0.2)  # 6/255, root mean square
    # Patches of 32: whatever lies in one has one colour.
    assert (difference[:32, :32] == difference[0, 0]).all()


def test_ar_has_its_declared_strength_on_a_picture_of_any_size():
    change = protect_picture(np.full((70, 100, 3), 128, np.uint8), "ar", label=1)
    difference = change.after.astype(float) - change.before
    declared = poisons.budget("ar", "published", (3, 70, 100))["l2"]
    assert np.linalg.norm(difference) / 255 == pytest.approx(declared, rel=0.02)
    assert (difference[:35, :50] != 0).any(axis=2).mean() > 0.6


@pytest.mark.parametrize("method", ["emn", "ops"])
def test_a_method_without_use_for_one_picture_is_refused(method):
    with pytest.raises(ValueError, match=f"method is '{method}'.*lsp"):
        protect_picture(picture(32, 32), method)


def test_every_poison_is_offered_or_there_is_a_reason():
    said = " ".join(methods_left_out())
    for name in poisons.NAMES:
        offered, title = name in methods_for_pictures(), poisons.get(name).title
        assert offered != any(title in sentence.split(":")[0].split(", ") for sentence in methods_left_out()), said


def test_numbers_of_a_change():
    before, after = picture(9, 11), picture(9, 11, seed=1)
    largest, mean, changed, psnr = Change(before, after).in_numbers()
    difference = np.abs(before.astype(int) - after.astype(int))
    assert (largest, mean) == (difference.max(), pytest.approx(difference.mean()))
    assert changed == pytest.approx(100 * (before != after).mean())
    assert psnr == pytest.approx(peak_signal_noise_ratio(before, after))
    assert Change(before, before).in_numbers() == (0, 0.0, 0.0, float("inf"))


def test_a_difference_is_magnified_to_fill_the_scale():
    before = np.full((10, 10, 3), 100, np.uint8)
    after = before.copy()
    after[:5], after[5:] = 104, 98
    shown, factor = Change(before, after).magnified()
    assert factor == 31  # 31 x 4 = 124, and 32 x 4 would be above 127.5
    assert (shown[:5] == round(127.5 + 124)).all() and (shown[5:] == round(127.5 - 62)).all()


def test_a_picture_is_reduced_to_the_longest_side(tmp_path):
    Image.fromarray(picture(60, 120)).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 3, 40).shape == (20, 40, 3)
    assert read_picture(tmp_path / "wide.png", 3, 500).shape == (60, 120, 3)
    with pytest.raises(ImageRejected, match="colour"):
        read_picture(tmp_path / "wide.png", 1)


def test_presets_are_those_that_the_purifier_can_follow():
    usable = usable_presets(quick_pipe())
    assert "unconditional" in usable and "paper" not in usable  # which needs a perceptual network


def test_one_wrong_file_does_not_stop_the_others(tmp_path):
    Image.fromarray(picture(8, 16)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    pipe, told = quick_pipe(), []
    work = PictureWork(pipe)
    results, refused, notes = work.purify(
        [str(tmp_path / "bad.png"), str(tmp_path / "good.png")],
        pipe.resolve_config(diffusion_steps=2),
        0,
        None,
        "session",
        lambda fraction, words: told.append((fraction, words)),
    )
    assert len(refused) == 1 and refused[0].startswith("bad.png: ") and "PNG" in refused[0]
    assert [one["name"] for one in results] == ["good.png"] and len(results[0]["row"]) == len(COLUMNS)
    assert np.array_equal(np.asarray(Image.open(results[0]["before"])), picture(8, 16))
    assert told[-1][0] == 1 and "good.png: 3 of 3 tiles" in told[-1][1]
    work.forget("session")
    with pytest.raises(FileNotFoundError):
        Image.open(results[0]["after"])


def test_a_stopped_session_ends_and_can_begin_again(tmp_path):
    Image.fromarray(picture(8, 8)).save(tmp_path / "good.png")
    pipe = quick_pipe()
    work, config = PictureWork(pipe), pipe.resolve_config(diffusion_steps=2)
    with pytest.raises(Stopped):
        work.purify([str(tmp_path / "good.png")], config, 0, None, "one", lambda fraction, words: work.stop("one"))
    assert work.purify([str(tmp_path / "good.png")], config, 0, None, "one", lambda fraction, words: None)[0]


def test_what_was_stopped_does_not_go_on_beside_what_is_begun_next(tmp_path):
    """Whoever stops and begins again at once has both in work until the first comes to its next tiles."""
    Image.fromarray(picture(8, 8)).save(tmp_path / "good.png")
    pipe = quick_pipe()
    work, config = PictureWork(pipe), pipe.resolve_config(diffusion_steps=2)
    done = []

    def stop_and_begin_again(fraction, words):
        work.stop("one")
        done.append(work.purify([str(tmp_path / "good.png")], config, 0, None, "one", lambda fraction, words: None)[0])

    with pytest.raises(Stopped):
        work.purify([str(tmp_path / "good.png")], config, 0, None, "one", stop_and_begin_again)
    assert len(done) == 1 and Image.open(done[0][0]["after"]).size == (8, 8)


def test_a_session_of_any_name_stays_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "other").mkdir()
    PictureWork(None).forget("../other")
    assert (tmp_path / "other").is_dir()


def test_protecting_pictures_names_the_results_after_them(tmp_path):
    Image.fromarray(picture(8, 16)).save(tmp_path / "good.png")
    results, refused, notes = PictureWork(None).protect(
        [str(tmp_path / "good.png")], "cuda", 0, 0, None, "session", lambda fraction, words: None
    )
    assert refused == notes == [] and results[0]["after"].endswith("good-protected.png")


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'jcdp-diffusers[demo]'" in capsys.readouterr().err


def test_what_is_said_without_a_purifier_names_three_ways():
    for way in ("jcdp quickstart", "training/train_purifier.py", "--purifier google/ddpm-cifar10-32"):
        assert way in HOW_TO_GET_A_PURIFIER


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--port", "70000"), "--port is 70000, but must lie between 1 and 65535"),
        (("--port", "0"), "--port is 0, but must lie between 1 and 65535"),
        (("--host", "nowhere.invalid"), "--host is 'nowhere.invalid', but must be a name or an address"),
    ],
)
def test_a_place_where_no_page_could_be_served_is_refused(option, said, capsys):
    assert main(["demo", *option]) == 1
    assert said in capsys.readouterr().err
