"""What published files mean: scales, arrangements and orders, against files made here for images like photographs."""

import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from jcdp_diffusers.data import LabelledImages, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons.published import read_perturbation


def photographs(count=48, side=24):
    """Bright above, dark below, coloured a little, with some pixels at black and white."""
    images = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        few = (
            draw.integers(-60, 60, (5, 5, 1))
            + draw.integers(-25, 25, (5, 5, 3))
            + np.linspace(230, 20, 5)[:, None, None]
        )
        few = Image.fromarray(few.clip(0, 255).astype(np.uint8))
        sharp = np.asarray(few.resize((side, side), Image.Resampling.BICUBIC)).astype(int) * 1.3 - 35
        images.append(sharp.clip(0, 255).astype(np.uint8))
    return LabelledImages(
        np.stack(images), np.arange(count) % 4, tuple(f"p{row}" for row in range(count)), tuple("abcd")
    )


@pytest.fixture(scope="module")
def clean():
    return photographs()


@pytest.fixture(scope="module")
def poisoned(clean):
    noise = np.random.default_rng(1).choice([-8, 8], clean.tensor().shape)
    return apply_perturbation(clean.images, noise / 255.0)


def channels_first(images):
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def normalised(images, mean, deviation):
    return (channels_first(images) / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(deviation, (-1, 1, 1))


SCALES = {
    "ImageNet": lambda images: normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Tiny-ImageNet": lambda images: normalised(images, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "CIFAR-100": lambda images: normalised(images, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    r"in \[-1, 1\]": lambda images: channels_first(images) / 127.5 - 1,
    r"in \[0, 1\]": lambda images: (images / 255).astype(np.float16),
    "0 to 255": lambda images: images.astype(np.int16),
}


@pytest.mark.parametrize("scale", SCALES)
def test_images_in_every_usual_scale_are_told_from_noise(scale, tmp_path, clean, poisoned):
    np.save(tmp_path / "file.npy", SCALES[scale](poisoned))
    perturbation, recognised = read_perturbation(tmp_path / "file.npy", clean, budget={"linf": 8})
    assert np.abs(apply_perturbation(clean.images, perturbation).astype(int) - poisoned).max() <= 1
    assert re.search(f"poisoned images .*{scale}", recognised["holds"])


def test_means_and_deviations_near_known_ones_are_not_taken_for_them(tmp_path, clean, poisoned):
    """Of images in bytes and in floats: CIFAR-10's test images have means and deviations of their own."""
    near = ((0.4942, 0.4851, 0.4504), (0.2467, 0.2429, 0.2616))
    far = ((0.44, 0.44, 0.44), (0.27, 0.27, 0.27))
    floats = (clean.images + np.random.default_rng(2).uniform(-3, 3, clean.images.shape)).clip(0, 255)
    for images, scale in ((poisoned, near), (floats, far)):
        np.save(tmp_path / "file.npy", normalised(images, *scale))
        with pytest.raises(ValueError, match="'file.npy', .* normalised by unknown means and deviations"):
            read_perturbation(tmp_path / "file.npy", clean)


def test_images_in_an_unknown_scale_are_refused(tmp_path, clean, poisoned):
    np.save(tmp_path / "file.npy", normalised(poisoned, (0.3, 0.3, 0.3), (0.05, 0.1, 0.2)))
    with pytest.raises(ValueError, match="'file.npy', which holds images like the clean ones"):
        read_perturbation(tmp_path / "file.npy", clean)


ARRANGED = {
    "upside down": lambda images: images[:, ::-1],
    "mirrored": lambda images: images[:, :, ::-1],
    "in BGR order": lambda images: images[..., ::-1] / 255,
    "mirrored and in BGR order": lambda images: images[:, :, ::-1, ::-1],
    "in RBG order": lambda images: images[..., [0, 2, 1]],
    "in GBR order": lambda images: images[..., [1, 2, 0]],
    "turned to the right": lambda images: np.rot90(images, 1, (1, 2)),
    "turned to the left": lambda images: np.rot90(images, -1, (1, 2)),
    "with height and width exchanged": lambda images: images.transpose(0, 2, 1, 3),
}


@pytest.mark.parametrize("how", ARRANGED)
def test_images_in_another_arrangement_are_refused_and_it_is_named(how, tmp_path, clean, poisoned):
    np.save(tmp_path / "file.npy", ARRANGED[how](poisoned))
    with pytest.raises(ValueError, match=f"'file.npy', which resembles the clean images most when it is read {how} "):
        read_perturbation(tmp_path / "file.npy", clean)


def noise_of(clean, poisoned):
    return channels_first(poisoned) - channels_first(clean.images)


@pytest.mark.parametrize("in_levels", [True, False])
@pytest.mark.parametrize("wrong", ["reversed", "by class", "one place on"])
def test_noise_of_images_in_another_order_is_refused(wrong, in_levels, tmp_path, clean, poisoned):
    rows = {
        "reversed": np.arange(len(clean))[::-1],
        "by class": np.argsort(clean.labels, kind="stable"),
        "one place on": np.roll(np.arange(len(clean)), 1),
    }[wrong]
    noise = noise_of(clean, poisoned) / (1 if in_levels else 255)
    np.save(tmp_path / "right.npy", noise)
    perturbation, _ = read_perturbation(tmp_path / "right.npy", clean, budget={"linf": 8})
    assert np.array_equal(apply_perturbation(clean.images, perturbation), poisoned)
    np.save(tmp_path / "wrong.npy", noise[rows])
    with pytest.raises(
        ValueError, match="'wrong.npy', which makes .* darker and lighter still.* in_order_of .* torchvision"
    ):
        read_perturbation(tmp_path / "wrong.npy", clean, budget={"linf": 8})
    assert read_perturbation(tmp_path / "wrong.npy", clean, order="given")[1]["kind"] == "sample-wise"
    perturbation, recognised = read_perturbation(
        tmp_path / "wrong.npy", clean, budget={"linf": 8}, in_order_of=clean.subset(rows)
    )
    assert np.array_equal(apply_perturbation(clean.images, perturbation), poisoned)
    assert recognised["rows"] == "by the pixels of in_order_of"


def test_a_subset_is_joined_by_content(tmp_path, clean, poisoned):
    np.save(tmp_path / "all.npy", noise_of(clean, poisoned))
    rows = [40, 3, 17, 5]
    perturbation, _ = read_perturbation(tmp_path / "all.npy", clean.subset(rows), in_order_of=clean)
    assert np.array_equal(apply_perturbation(clean.images[rows], perturbation), poisoned[rows])
    with pytest.raises(ValueError, match="in_order_of lacks the clean image 'p47'"):
        read_perturbation(tmp_path / "all.npy", clean.subset([47]), in_order_of=clean.with_images(clean.images ^ 1))
    with pytest.raises(ValueError, match="order is 'any'"):
        read_perturbation(tmp_path / "all.npy", clean, order="any")


def test_images_of_other_rows_are_named(tmp_path):
    few = LabelledImages(
        np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), None, tuple("abcdef")
    )
    np.save(tmp_path / "few.npy", few.images[[1, 2, 3, 4, 5, 0]] / 127.5 - 1)
    with pytest.raises(
        ValueError, match="not like the clean ones in their order: row 0 resembles the clean image of row 1"
    ):
        read_perturbation(tmp_path / "few.npy", few)


# ------------------------------------------------------------------------------------------------ what programs export


def test_a_packed_export_is_read_by_its_row_numbers(tmp_path, clean, poisoned):
    order = np.random.default_rng(3).permutation(len(clean))
    packed = {
        "poison_setup": {"poison_budget": 0.01, "target_class": None},
        "poison_delta": torch.from_numpy(noise_of(clean, poisoned)[order] / 255),
        "poison_ids": torch.from_numpy(order),
        "target_images": [(torch.zeros(3, 24, 24), 1, 5)],
    }
    torch.save(packed, tmp_path / "poisons_packed.pth")
    perturbation, recognised = read_perturbation(tmp_path / "poisons_packed.pth", clean, budget={"linf": 8})
    assert np.array_equal(apply_perturbation(clean.images, perturbation), poisoned)
    assert recognised["rows"] == "by the numbers that the file has of them"
    packed["poison_ids"] = packed["poison_ids"] + 1
    torch.save(packed, tmp_path / "poisons_packed.pth")
    with pytest.raises(ValueError, match="whose row numbers are not 0 to 47"):
        read_perturbation(tmp_path / "poisons_packed.pth", clean)


@pytest.mark.parametrize("marks", ["poison_ids", "ids"])
def test_what_a_file_says_of_its_rows_holds_beside_in_order_of(marks, tmp_path, clean, poisoned):
    order, mine = (np.random.default_rng(seed).permutation(len(clean)) for seed in (3, 4))
    said = {"poison_ids": order, "ids": np.array(clean.ids)[order]}[marks]
    np.savez(tmp_path / "noise.npz", noise=noise_of(clean, poisoned)[order], **{marks: said})
    own = dataclasses.replace(clean.subset(mine), ids=tuple(f"q{row}" for row in range(48)))
    perturbation, recognised = read_perturbation(tmp_path / "noise.npz", own, in_order_of=clean)
    assert np.array_equal(apply_perturbation(own.images, perturbation), poisoned[mine])
    assert recognised["rows"].endswith(", by the pixels of in_order_of")


def test_labels_of_a_file_are_compared_with_those_of_in_order_of(tmp_path, clean, poisoned):
    labels = np.roll(clean.labels, 1)
    np.savez(tmp_path / "noise.npz", noise=noise_of(clean, poisoned), labels=labels)
    with pytest.raises(ValueError, match="'noise.npz', whose labels are not in the clean images' order, from row 0"):
        read_perturbation(tmp_path / "noise.npz", clean.subset(range(47, -1, -1)), in_order_of=clean, order="given")


def test_a_full_export_of_pictures_is_read_by_the_numbers_of_its_files(tmp_path, clean, poisoned):
    for row, image in enumerate(poisoned):
        path = tmp_path / "poisons" / "train" / "abcd"[clean.labels[row]] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for folder in (tmp_path / "poisons" / "train", tmp_path / "poisons"):
        perturbation, recognised = read_perturbation(folder, clean, budget={"linf": 8})
        assert np.array_equal(apply_perturbation(clean.images, perturbation), poisoned)
        assert recognised["rows"] == "by the numbers that the file has of them"
    for folder in ("test", "targets"):
        (tmp_path / "poisons" / folder / "a").mkdir(parents=True)
        Image.fromarray(poisoned[0]).save(tmp_path / "poisons" / folder / "a" / "0.png")
    with pytest.raises(ValueError, match="'targets/' is in none of them"):
        read_perturbation(tmp_path / "poisons", clean)


def test_a_data_set_with_ids_is_joined_by_them(tmp_path, clean, poisoned):
    order = np.random.default_rng(4).permutation(len(clean))
    write_dataset(tmp_path, clean.with_images(poisoned).subset(order))
    perturbation, recognised = read_perturbation(tmp_path, clean, budget={"linf": 8})
    assert np.array_equal(apply_perturbation(clean.images, perturbation), poisoned) and recognised["rows"] == "by id"


@pytest.mark.parametrize("names", [("3", "7"), ("03", "07")])
def test_class_wise_rows_follow_classes_that_are_named_by_numbers(names, tmp_path):
    """A folder of two of ten classes: its labels are 0 and 1, but the noise has a row for each of the ten."""
    images = np.full((4, 8, 8, 3), 100, np.uint8)
    clean = LabelledImages(images, np.array([0, 1, 1, 0]), tuple("wxyz"), names)
    np.save(tmp_path / "noise.npy", np.arange(10, dtype=np.int8).reshape(10, 1, 1, 1) * np.ones((1, 3, 8, 8), np.int8))
    perturbation, recognised = read_perturbation(tmp_path / "noise.npy", clean, kind="class-wise", budget={"linf": 9})
    assert (255 * perturbation[:, 0, 0, 0]).round().tolist() == [3, 7, 7, 3]
    assert recognised["rows"] == f"3 for {names[0]}, 7 for {names[1]}"
    words = LabelledImages(images, clean.labels, clean.ids, ("cat", "dog"))
    with pytest.raises(ValueError, match="'noise.npy' with 10 rows.* 2 classes"):
        read_perturbation(tmp_path / "noise.npy", words, kind="class-wise")


@pytest.mark.parametrize("first", [0, 1])
def test_class_wise_rows_follow_numbers_whose_names_are_in_the_order_of_texts(first, tmp_path):
    """As torchvision's ImageFolder sorts them: 0, 1, 10, 11, 2; the rows of a file are in the order of the numbers."""
    names = tuple(sorted(str(number) for number in range(first, first + 12)))
    clean = LabelledImages(np.full((12, 8, 8, 3), 100, np.uint8), np.arange(12), tuple("abcdefghijkl"), names)
    noise = np.arange(12, dtype=np.int8).reshape(12, 1, 1, 1) * np.ones((1, 3, 8, 8), np.int8)
    np.save(tmp_path / "noise.npy", noise)
    perturbation, _ = read_perturbation(tmp_path / "noise.npy", clean, kind="class-wise", budget={"linf": 11})
    assert (255 * perturbation[:, 0, 0, 0]).round().tolist() == [int(name) - first for name in names]


# ---------------------------------------------------------------------------------------------------------- broken files


class Payload:
    """Would leave a trace when it is unpickled."""

    def __reduce__(self):
        return (open, ("planted", "w"))


BROKEN = {
    "cut.pt": lambda path, noise: (torch.save(noise, path), path.write_bytes(path.read_bytes()[:-300])),
    "empty.pth": lambda path, noise: path.write_bytes(b""),
    "text.npz": lambda path, noise: path.write_text("not found"),
    "cut.npy": lambda path, noise: (np.save(path, noise.numpy()), path.write_bytes(path.read_bytes()[:-9])),
    "long.safetensors": lambda path, noise: path.write_bytes((10**12).to_bytes(8, "little") + b"{}"),
    "json.safetensors": lambda path, noise: path.write_text(json.dumps({"noise": 1})),
    "pickle.pt": lambda path, noise: path.write_bytes(pickle.dumps({"noise": Payload()})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence_with_their_name(name, tmp_path, monkeypatch, clean):
    monkeypatch.chdir(tmp_path)
    BROKEN[name](tmp_path / name, torch.zeros(48, 3, 24, 24))
    with pytest.raises(ValueError, match=f"perturbation is '{name}'") as caught:
        read_perturbation(tmp_path / name, clean)
    assert "\n" not in str(caught.value) and not (tmp_path / "planted").exists()


def test_a_pickle_is_refused_with_a_way_to_convert_it(tmp_path, clean):
    (tmp_path / "noise.pkl").write_bytes(pickle.dumps(np.zeros(3)))
    (tmp_path / "noise.pt").write_bytes(pickle.dumps({"noise": Payload()}))
    for name in ("noise.pkl", "noise.pt"):
        with pytest.raises(ValueError, match=f"'{name}'.*convert it with a program that you trust.*numpy.save"):
            read_perturbation(tmp_path / name, clean)
