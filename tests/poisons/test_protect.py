import argparse
import hashlib
from dataclasses import asdict, replace

import datasets
import numpy as np
import pytest
import torch
import torchvision
from interrupts import cut_off_at_save
from safetensors.torch import save_file

from jcdp_diffusers import engines, poisons
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms, visibility
from jcdp_diffusers.data.writing import png
from jcdp_diffusers.perceptual import lpips_at_hand
from jcdp_diffusers.poisons import protect
from jcdp_diffusers.poisons.aue import AUESettings
from jcdp_diffusers.poisons.checkpoint import Checkpoint


def command(*options):
    parser = argparse.ArgumentParser()
    protect.add_arguments(parser)
    protect.run(parser.parse_args([str(option) for option in options]))


@pytest.fixture
def source(tmp_path, data):
    """A folder with a train and a test split, and a column that is nobody's business."""
    folder = tmp_path / "clean"
    write_dataset(folder, data, columns={"camera": [f"c{row % 3}" for row in range(40)]})
    write_dataset(folder, data.subset(range(8)), split="test")
    return folder


def test_a_folder_in_which_another_command_is_at_work_is_refused_until_its_card_is_there(data, tmp_path, monkeypatch):
    noise, output = tmp_path / "noise.npy", tmp_path / "protected"
    np.save(noise, np.zeros(data.images.shape, np.float32))
    measure, refused = protect.visibility, []

    def another_command(*images, **options):
        for make, what in ((protect.protect_dataset, "method"), (protect.protect_with_file, "perturbation")):
            with pytest.raises(ValueError, match=r"output_dir is .*protected', but another command is at work there"):
                make(data, output, **{what: "lsp" if what == "method" else noise}, seed=2)
            refused.append(what)
        return measure(*images, **options)

    monkeypatch.setattr(protect, "visibility", another_command)  # between the images and the card
    protect.protect_dataset(data, output, method="lsp", seed=1)
    assert refused == ["method", "perturbation"] and protect.read_card(output)["seed"] == 1
    with engines.folder_lock(output / ".lock"):  # a finished set is read by any number of commands at once
        protect.protect_dataset(data, output, method="lsp", seed=1)


def test_command_writes_one_split_and_leaves_the_others_alone(source, data, tmp_path, capsys):
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in source.iterdir()}
    output = tmp_path / "protected"
    command("--method", "lsp", "--dataset", source, "--split", "train", "--output", output, "--seed", 4)
    assert digests == {path: hashlib.sha256(path.read_bytes()).digest() for path in source.iterdir()}
    assert sorted(path.name for path in output.glob("[!.]*")) == ["README.md", "train-00000-of-00001.parquet"]

    protected = load_images(output)
    assert protected.ids == data.ids and protected.class_names == data.class_names
    np.testing.assert_array_equal(protected.labels, data.labels)
    perturbation = poisons.get("lsp")(data.tensor(), torch.from_numpy(data.labels), seed=4)
    np.testing.assert_array_equal(protected.images, apply_perturbation(data.images, perturbation))
    rows = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["camera"][:4] == ["c0", "c1", "c2", "c0"]
    assert "40 protected images of 40 in" in capsys.readouterr().out


def test_card_says_what_was_done(source, data, tmp_path):
    output = tmp_path / "protected"
    command("--method", "emn-class", "--dataset", source, "--split", "train", "--output", output, "--preset", "smoke")
    card = protect.read_card(output)
    assert (card["method"], card["preset"], card["seed"], card["images"]) == ("emn-class", "smoke", 0, 40)
    assert card["settings"]["epsilon"] == 8.0 and card["settings"]["max_rounds"] == 2
    assert card["promised"] == {"linf": 8.0} and "Huang" in card["reference"]
    written = load_images(output).images
    assert card["measured"] == measured_norms(data.images, written)
    assert card["visibility"] == visibility(data.images, written, perceptual=lpips_at_hand())
    text = (output / "README.md").read_text()
    assert (
        "| `step` | 4.0 (published: 0.8) |" in text
        and "| `epsilon` | 8.0 |" in text
        and "| measured linf, after rounding to 8 bits |" in text
    )
    (psnr,) = (line for line in text.splitlines() if line.startswith("| PSNR |"))
    assert f"{card['visibility']['psnr']['mean']:.1f} dB, std " in psnr and "over 40 images" in psnr


@pytest.mark.parametrize(
    "preset,line",
    [
        ("published", "| `strength` | 0.6 |"),
        ("cifar100", "| `strength` | 1.0 |"),
        (AUESettings(strength=0.7), "| `strength` | 0.7 (published: 0.6 or 1.0) |"),
    ],
)
def test_card_knows_numbers_that_are_published_for_cifar100(preset, line, data):
    facts = {"method": "aue", "settings": asdict(poisons.settings("aue", preset)), "promised": {}, "measured": {}}
    facts |= {"images": 40, "protected_images": 40}
    facts["visibility"] = visibility(data.images, 255 - data.images)
    assert line in protect._card(facts).splitlines()


def test_same_command_again_does_nothing_and_another_is_refused(source, tmp_path):
    output = tmp_path / "protected"
    options = ("--dataset", source, "--split", "train", "--output", output)
    command("--method", "lsp", *options)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    command("--method", "lsp", *options)
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(ValueError, match="output is .*seed 0 instead of 1"):
        command("--method", "lsp", *options, "--seed", 1)
    with pytest.raises(ValueError, match="output is .*method 'lsp' instead of 'ops'"):
        command("--method", "ops", *options)


def other_rows(data):
    """By what differs, sets of the same number and shape."""
    return {
        "images": data.with_images(255 - data.images),
        "ids": replace(data, ids=data.ids[::-1]),
        "labels": replace(data, labels=data.labels[::-1].copy()),
    }


@pytest.mark.parametrize("changed", ["images", "ids", "labels"])
def test_a_finished_set_is_not_given_out_for_other_inputs(changed, data, tmp_path):
    protect.protect_dataset(data, tmp_path, method="lsp")
    with pytest.raises(ValueError, match="output is .*made with other images, ids or labels, but must be an empty"):
        protect.protect_dataset(other_rows(data)[changed], tmp_path, method="lsp")
    with pytest.raises(ValueError, match="output is .*split 'train' instead of 'test'"):
        protect.protect_dataset(data, tmp_path, method="lsp", split="test")


def test_a_set_of_an_earlier_version_is_compared_by_what_is_stored(data, tmp_path):
    done = protect.protect_dataset(data, tmp_path, method="lsp")
    card = tmp_path / "README.md"
    kept = [line for line in card.read_text().splitlines() if not line.startswith("  content: ")]
    card.write_text("\n".join(kept) + "\n")
    assert "content" not in protect.read_card(tmp_path)
    again = protect.protect_dataset(data, tmp_path, method="lsp")
    assert np.array_equal(again.images, done.images)
    for changed in ("ids", "labels"):
        with pytest.raises(ValueError, match=f"output is .*of an earlier version with other {changed}, but must be"):
            protect.protect_dataset(other_rows(data)[changed], tmp_path, method="lsp")
    small = data.with_images(data.images[:, :8])
    with pytest.raises(ValueError, match="output is .*of an earlier version with other shape, but must be"):
        protect.protect_dataset(small, tmp_path, method="lsp")


def test_a_finished_set_is_not_given_out_for_another_perturbation(data, tmp_path):
    noise = np.random.default_rng(0).integers(-8, 9, (40, 3, 16, 16)).astype(np.int8)
    for name, values in (("one", noise), ("other", -noise)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "noise.npy", values)
    options = {"output_dir": tmp_path / "out", "order": "given"}
    first = protect.protect_with_file(data, perturbation=tmp_path / "one" / "noise.npy", **options)
    again = protect.protect_with_file(data, perturbation=tmp_path / "one" / "noise.npy", **options)
    assert np.array_equal(first.images, again.images)
    refused = (
        ({"perturbation": tmp_path / "other" / "noise.npy"}, "made with another perturbation"),
        ({"kind": "sample-wise"}, "kind None instead of 'sample-wise'"),
        ({"in_order_of": data}, "made with another set for in_order_of"),
    )
    for changed, sentence in refused:
        with pytest.raises(ValueError, match=f"output is .*{sentence}"):
            protect.protect_with_file(data, **{"perturbation": tmp_path / "one" / "noise.npy"} | options | changed)


def test_a_folder_of_poisoned_images_is_known_by_its_files(data, poisoned, tmp_path):
    write_dataset(tmp_path / "poisoned", data.with_images(poisoned))
    options = {"output_dir": tmp_path / "out", "perturbation": tmp_path / "poisoned", "order": "given"}
    first = protect.protect_with_file(data, **options)
    assert np.array_equal(protect.protect_with_file(data, **options).images, first.images)
    write_dataset(tmp_path / "poisoned", data.with_images(poisoned // 2 * 2))
    with pytest.raises(ValueError, match="output is .*made with another perturbation"):
        protect.protect_with_file(data, **options)


def test_a_folder_of_other_images_or_another_file_is_not_taken_for_this_one(data, tmp_path):
    options = {"method": "lsp", "source": "photographs"}
    protect.protect_dataset(data, tmp_path / "made", **options)
    others = [
        (data.with_images(data.images[::-1].copy()), {}, "made with other images, ids or labels"),
        (replace(data, ids=tuple(reversed(data.ids))), {}, "made with other images, ids or labels"),
        (data, {"split": "test"}, "of split .* instead of"),
    ]
    for other, changes, said in others:
        with pytest.raises(ValueError, match=f"output is .* {said}"):
            protect.protect_dataset(other, tmp_path / "made", **options, **changes)
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        noise = np.random.default_rng(number).integers(-8, 9, (4, 3, 16, 16)).astype(np.int8)
        np.save(tmp_path / str(number) / "poison.npy", noise)
    protect.protect_with_file(data, tmp_path / "added", perturbation=tmp_path / "0/poison.npy")
    with pytest.raises(ValueError, match="output is .* made with another perturbation"):
        protect.protect_with_file(data, tmp_path / "added", perturbation=tmp_path / "1/poison.npy")


def test_command_goes_on_where_it_was_cut_off(source, data, tmp_path):
    output = tmp_path / "protected"
    options = ("--method", "tap", "--preset", "smoke", "--dataset", source, "--split", "train", "--output", output)
    with cut_off_at_save(Checkpoint):
        command(*options)
    kept = output / ".poison-state" / "tap.pt"
    assert not (output / "README.md").exists()
    state = torch.load(kept, weights_only=True)
    torch.save(state | {"seconds": state["seconds"] + 1000}, kept)
    command(*options)
    assert 1000 < protect.read_card(output)["seconds"] < 1100
    whole = poisons.get("tap")(data.tensor(), torch.from_numpy(data.labels), preset="smoke")
    np.testing.assert_array_equal(load_images(output).images, apply_perturbation(data.images, whole))
    assert not (output / ".poison-state").exists()


def test_published_file_is_added_and_what_it_is_is_stated(source, data, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(-8, 9, (4, 3, 16, 16)).astype(np.int8)
    np.save(tmp_path / "noise.npy", noise)
    output = tmp_path / "protected"
    options = ("--dataset", source, "--split", "train", "--output", output)
    command("--perturbation", tmp_path / "noise.npy", "--linf", 8, *options)
    expected = apply_perturbation(data.images, noise[data.labels] / 255.0)
    np.testing.assert_array_equal(load_images(output).images, expected)
    said = capsys.readouterr().out
    assert "kind: class-wise; rows: 0 for class 0, 1 for class 1, 2 for class 2, 3 for class 3; holds: " in said
    assert "; holds: perturbations in 1/255, values from -8 to 8 (int8); norms: linf 8/255" in said
    card = protect.read_card(output)
    assert card["perturbation"] == "noise.npy" and card["promised"] == {"linf": 8.0}
    assert "| `kind` | class-wise |" in (output / "README.md").read_text()


@pytest.mark.parametrize("options", [(), ("--method", "lsp", "--perturbation", "noise.npy"), ("--method", "noise")])
def test_wrong_usage_exits_with_2(options, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        command("--dataset", tmp_path, "--output", tmp_path / "out", *options)
    assert exit_info.value.code == 2


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_noise_that_rounding_takes_away_protects_nothing_and_is_refused(fraction, data, tmp_path):
    settings = replace(poisons.get("lsp").presets["smoke"], norm=0.001)
    with pytest.raises(ValueError, match="perturbation of lsp changes no image after rounding to 8 bits"):
        protect.protect_dataset(data, tmp_path, method="lsp", preset=settings, fraction=fraction)
    assert not list(tmp_path.rglob("*.parquet")) and not (tmp_path / "README.md").exists()


def test_data_without_labels_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="dataset has no labels.*lsp"):
        protect.protect_dataset(replace(data, labels=None), tmp_path, method="lsp")


def test_foreign_folder_is_not_overwritten(data, tmp_path):
    (tmp_path / "README.md").write_text("# My holiday\n")
    with pytest.raises(ValueError, match="output_dir is .*README.md"):
        protect.protect_dataset(data, tmp_path, method="lsp")


@pytest.mark.parametrize("fraction, count", [(0.2, 8), (0.5, 20), (0.001, 1)])
def test_a_fraction_of_the_images_is_protected(fraction, count, source, data, tmp_path):
    output = tmp_path / "protected"
    command("--method", "lsp", "--dataset", source, "--split", "train", "--output", output, "--fraction", fraction)
    rows = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    protected, images = np.array(rows["protected"]), load_images(output).images
    changed = (images != data.images).any(axis=(1, 2, 3))
    assert protected.sum() == count and np.array_equal(changed, protected)
    assert rows["camera"][:4] == ["c0", "c1", "c2", "c0"] and tuple(rows["id"]) == data.ids

    # The method saw these images alone.
    chosen = data.subset(protected)
    alone = poisons.get("lsp")(chosen.tensor(), torch.from_numpy(chosen.labels))
    assert np.array_equal(images[protected], apply_perturbation(chosen.images, alone))
    card = protect.read_card(output)
    assert (card["fraction"], card["protected_images"], card["images"]) == (fraction, count, 40)
    assert card["measured"] == measured_norms(chosen.images, images[protected])
    assert (
        f"{count} of 40 (fraction {fraction:g}); the column `protected` says which"
        in (output / "README.md").read_text()
    )


def test_which_images_are_protected_is_drawn_by_the_seed():
    first, again, other = (protect.protected_rows(100, 0.3, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(set(first)) == 30 and np.array_equal(protect.protected_rows(5, 1, 7), np.arange(5))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fractions_outside_are_refused(fraction, data, tmp_path):
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        protect.protect_dataset(data, tmp_path, method="lsp", fraction=fraction)
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        protect.protect_with_file(data, tmp_path, perturbation="noise.npy", fraction=fraction)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_seeds_outside_are_refused(seed, data, tmp_path):
    with pytest.raises(ValueError, match=f"seed is {seed}, but must be a whole number in"):
        protect.protect_dataset(data, tmp_path, method="lsp", seed=seed)
    assert not list(tmp_path.iterdir())


def test_another_fraction_is_another_data_set(source, data, tmp_path):
    output = tmp_path / "protected"
    options = ("--method", "lsp", "--dataset", source, "--split", "train", "--output", output)
    command(*options)
    with pytest.raises(ValueError, match="fraction 1.0 instead of 0.5"):
        command(*options, "--fraction", 0.5)


def test_a_fraction_of_a_published_file_keeps_its_rows(source, data, tmp_path):
    noise = np.random.default_rng(0).integers(1, 9, (40, 3, 16, 16)).astype(np.int8)
    np.save(tmp_path / "noise.npy", noise)
    output = tmp_path / "protected"
    options = ("--dataset", source, "--split", "train", "--output", output)
    command("--perturbation", tmp_path / "noise.npy", "--fraction", 0.5, "--seed", 2, "--order", "given", *options)
    rows = protect.protected_rows(40, 0.5, 2)
    expected = data.images.copy()
    expected[rows] = apply_perturbation(data.images[rows], noise[rows] / 255.0)
    np.testing.assert_array_equal(load_images(output).images, expected)


def test_the_source_and_files_of_others_stay_as_they_are(tmp_path, data, capsys):
    """The clean originals, a folder with somebody's own data set, and files behind a link."""
    for folder in ("clean", "others"):
        write_dataset(tmp_path / folder, data)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "notes.txt").write_text("precious")
    (tmp_path / "linked" / ".poison-state").mkdir(parents=True)
    (tmp_path / "linked" / "README.md").symlink_to(tmp_path / "diary" / "notes.txt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, said in (
        ("clean", "is that of --dataset"),
        ("clean/out", "lies inside that of --dataset"),
        (".", "holds that of --dataset"),
        ("others", "which holds 'train-00000-of-00001.parquet'"),
        ("diary", "which holds 'notes.txt'"),
        ("linked", "holds the link 'README.md'"),
    ):
        words = ["poison", "--method", "lsp", "--dataset", str(tmp_path / "clean"), "--output", str(tmp_path / output)]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("jcdp poison: --output is ") and said in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_card_tells_no_path_and_gives_no_terminal_orders(tmp_path, data):
    source = tmp_path / "home" / "alice" / "red\x1b[31m|photos"
    write_dataset(source, data)
    assert main(["poison", "--method", "lsp", "--dataset", str(source), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "alice" not in card and str(tmp_path) not in card and "\x1b" not in card
    assert r"| clean images | red\x1b[31m\|photos |" in card


def test_command_replaces_numbers_of_a_preset_and_its_card_keeps_paths_to_itself(source, tmp_path):
    torch.manual_seed(1)
    weights = tmp_path / "surrogate.safetensors"
    save_file(torchvision.models.squeezenet1_0().state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    options = ("--method", "uc", "--preset", "smoke", "--dataset", source, "--split", "train", "--set", "clusters=2")
    options += ("--set", f"weights={weights}", "--set", "normalisation=none")
    command(*options, "--output", tmp_path / "protected")
    card = protect.read_card(tmp_path / "protected")
    assert card["preset"] == "custom" and card["settings"]["clusters"] == 2 and card["promised"] == {"linf": 16.0}
    assert card["settings"]["weights"] == f"surrogate.safetensors (sha256 {digest})"
    assert str(tmp_path) not in (tmp_path / "protected" / "README.md").read_text()
    assert "reference" in card and len({image.tobytes() for image in load_images(tmp_path / "protected").images}) == 40
    command(*options, "--output", tmp_path / "protected")  # is done already


def test_numbers_may_be_written_in_powers_of_ten():
    given = ["learning_rate=1e-3", "epsilon=2E1", "weights=1e5.pt", "clusters=3"]
    assert protect._changes(given) == {"learning_rate": 1e-3, "epsilon": 20.0, "weights": "1e5.pt", "clusters": 3}


@pytest.mark.parametrize(
    "given, said",
    [
        ("epsilon", "--set is 'epsilon', but must be FIELD=VALUE"),
        ("epsilon=[", "--set is 'epsilon=\\['"),
        ("colour=3", "--set has 'colour'.*epsilon"),
        ("epsilon=much", "--set has epsilon 'much', but it must be float"),
    ],
)
def test_numbers_that_no_preset_has_are_refused(given, said, source, tmp_path):
    with pytest.raises(ValueError, match=said):
        command(
            *("--method", "uc", "--dataset", source, "--split", "train", "--output", tmp_path / "out"), "--set", given
        )


def test_a_set_that_was_protected_in_part_and_is_protected_again_is_protected_whole(source, data, tmp_path):
    command(
        "--method", "lsp", "--dataset", source, "--split", "train", "--output", tmp_path / "part", "--fraction", 0.5
    )
    command("--method", "ops", "--dataset", tmp_path / "part", "--split", "train", "--output", tmp_path / "whole")
    assert set(load_images(tmp_path / "whole").ids) == set(data.ids)
    rows = datasets.load_dataset(str(tmp_path / "whole"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(rows["protected"]) == {True}
    own = {"protected": [True, False] * 20}  # of somebody else, who means something else
    protect.protect_dataset(data, tmp_path / "own", method="lsp", columns=own)
    rows = datasets.load_dataset(str(tmp_path / "own"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(rows["protected"]) == {True, False}


def test_a_set_that_another_version_of_the_method_made_is_named(data, tmp_path, monkeypatch, capsys):
    """Whoever tries a poison of their own changes its file and not its settings."""
    made = protect.protect_dataset(data, tmp_path, method="lsp")
    protect.protect_dataset(data, tmp_path, method="lsp")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(poisons.Poison, "file_digest", "0" * 16)
    again = protect.protect_dataset(data, tmp_path, method="lsp")
    assert "another version of the file of lsp" in capsys.readouterr().err
    assert np.array_equal(made.images, again.images)


@pytest.mark.parametrize(
    "given, said",
    [
        (("--method", "lsp", "--linf", 4), "--linf is 4.0, but must be left out with --method"),
        (("--method", "lsp", "--order", "given"), "--order is 'given', but must be left out with --method"),
        (("--method", "lsp", "--in_order_of", "nowhere"), "--in_order_of is 'nowhere', but"),
        (("--method", "lsp", "--kind", "class-wise"), "--kind is 'class-wise', but"),
        (("--perturbation", "f.npy", "--preset", "nonsense"), "--preset is 'nonsense'.* with --perturbation"),
        (("--perturbation", "f.npy", "--set", "a=b"), r"--set is \['a=b'\], but must be left out with --perturbation"),
    ],
)
def test_options_of_the_other_mode_are_refused(given, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        command(*given, "--dataset", "nowhere", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_bounds_nothing_is_refused_before_anything(data, tmp_path):
    with pytest.raises(ValueError, match="budget has linf nan, but for linf, l2, l0 numbers from 0 on are accepted"):
        protect.protect_with_file(data, tmp_path, perturbation="noise.npy", budget={"linf": float("nan")})
    assert not list(tmp_path.iterdir())


def test_another_order_is_another_data_set(data, tmp_path):
    noise = np.random.default_rng(0).integers(-8, 9, (40, 3, 16, 16)).astype(np.int8)
    np.save(tmp_path / "noise.npy", noise)
    options = {"output_dir": tmp_path / "out", "perturbation": tmp_path / "noise.npy"}
    protect.protect_with_file(data, **options, order="given")
    with pytest.raises(ValueError, match="output is .* of order 'given' instead of 'checked'"):
        protect.protect_with_file(data, **options)
    # Cards of earlier versions tell the order only where it is given.
    card = tmp_path / "out" / "README.md"
    card.write_text("".join(line for line in card.open() if not line.startswith("  order: ")))
    protect.protect_with_file(data, **options)


def test_a_column_called_protected_is_refused_before_the_poison_is_made(data, tmp_path, monkeypatch):
    monkeypatch.setattr(poisons.Poison, "__call__", lambda *_, **__: pytest.fail("made"))
    options = {"fraction": 0.5, "columns": {"protected": [1] * 40}}
    with pytest.raises(ValueError, match="dataset has a column 'protected'"):
        protect.protect_dataset(data, tmp_path, method="lsp", **options)
    with pytest.raises(ValueError, match="dataset has a column 'protected'"):
        protect.protect_with_file(data, tmp_path, perturbation="nowhere.npy", **options)
    assert not list(tmp_path.iterdir())


FOREIGN = {
    "no YAML": b"---\ntitle: My set: a\n---\n",
    "no UTF-8": b"---\ntitle: caf\xe9\n---\n",
    "a word": b"---\npoison: lsp\n---\n",
    "no images": b"---\npoison:\n  measured: {linf: 8}\n---\n",
    "nothing measured": b"---\npoison:\n  images: 40\n---\n",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_readme_of_somebody_else_is_no_card(what, data, tmp_path):
    write_dataset(tmp_path / "clean", data)
    (tmp_path / "clean" / "README.md").write_bytes(FOREIGN[what])
    with pytest.raises(ValueError, match="output_dir is .*'.*clean', but its README.md must be the card of"):
        protect.read_card(tmp_path / "clean")
    command("--method", "lsp", "--dataset", tmp_path / "clean", "--output", tmp_path / "out")
    assert protect.read_card(tmp_path / "out")["images"] == 40


def test_further_columns_keep_their_types(data, tmp_path):
    """Masks stay images, and classes keep their names."""
    masks = [{"bytes": png(image), "path": None} for image in data.images]
    types = {
        "mask": datasets.Image(),
        "coarse_label": datasets.ClassLabel(names=["x", "y"]),
        "size": datasets.Value("int8"),
    }
    columns = {"mask": masks, "coarse_label": [0, 1] * 20, "size": [3] * 40, "note": ["n"] * 40}
    write_dataset(tmp_path / "clean", data, columns=columns, features=types)
    command("--method", "lsp", "--dataset", tmp_path / "clean", "--output", tmp_path / "out", "--fraction", 0.5)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert {name: rows.features[name] for name in types} == types and rows.features["note"].dtype == "string"
    assert rows.column_names[3:] == [*columns, "protected"] and rows["coarse_label"][:3] == [0, 1, 0]
    assert np.array_equal(np.asarray(rows[5]["mask"]), data.images[5])
