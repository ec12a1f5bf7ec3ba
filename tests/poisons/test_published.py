import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons.published import read_perturbation


def write(path, array):
    if path.suffix == ".safetensors":
        save_file({"noise": torch.from_numpy(np.ascontiguousarray(array))}, path)
    elif path.suffix == ".npz":
        np.savez(path, noise=array)
    elif path.suffix == ".npy":
        np.save(path, array)
    else:
        torch.save(torch.from_numpy(np.ascontiguousarray(array)), path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npy", ".npz", ".safetensors"])
def test_every_file_format_is_read(suffix, tmp_path, data, delta):
    perturbation, recognised = read_perturbation(write(tmp_path / f"noise{suffix}", delta), data, budget={"linf": 8})
    assert perturbation.dtype == torch.float32
    np.testing.assert_allclose(perturbation.numpy(), delta / 255.0, atol=1e-7)
    assert recognised["kind"] == "sample-wise" and "in 1/255" in recognised["holds"] and "int8" in recognised["holds"]
    assert recognised["norms"].startswith("linf 8/255, l2 ")


@pytest.mark.parametrize(
    "stored, words",
    [
        (
            lambda delta, poisoned: (delta / 255).astype(np.float32),
            "perturbations for images in an interval of length 1",
        ),
        (lambda delta, poisoned: delta.astype(np.float32), "perturbations in 1/255"),
        (lambda delta, poisoned: delta.astype(np.int16), "perturbations in 1/255"),
        (lambda delta, poisoned: (delta / 255).astype(np.float32).transpose(0, 2, 3, 1), "interval of length 1"),
        (lambda delta, poisoned: poisoned, r"poisoned images 0 to 255, values from 0 to 255 \(uint8\)"),
        (lambda delta, poisoned: poisoned.astype(np.float32), "poisoned images 0 to 255"),
        (lambda delta, poisoned: poisoned / 255, r"poisoned images in \[0, 1\]"),
        (lambda delta, poisoned: poisoned / 255 - 0.5, r"poisoned images in \[-0.5, 0.5\]"),
    ],
)
def test_every_range_and_layout_is_recognised(stored, words, tmp_path, data, delta, poisoned):
    path = write(tmp_path / "noise.npy", stored(delta, poisoned))
    perturbation, recognised = read_perturbation(path, data, budget={"linf": 8})
    np.testing.assert_array_equal(apply_perturbation(data.images, perturbation), poisoned)
    assert recognised["kind"] == "sample-wise"
    assert re.search(words, recognised["holds"])


def test_class_wise_noise_follows_the_labels(tmp_path, data):
    pattern = np.random.default_rng(0).uniform(-8, 8, (4, 3, 16, 16)).astype(np.float32) / 255
    shuffled = data.subset(np.random.default_rng(1).permutation(40)[:31])
    perturbation, recognised = read_perturbation(write(tmp_path / "noise.pt", pattern), shuffled)
    np.testing.assert_array_equal(perturbation.numpy(), pattern[shuffled.labels])
    assert recognised["kind"] == "class-wise"


def test_rows_with_ids_are_joined_by_id(tmp_path, data, delta):
    order = np.random.default_rng(2).permutation(40)
    np.savez(tmp_path / "noise.npz", noise=delta[order], labels=data.labels[order], ids=np.array(data.ids)[order])
    kept = data.subset(np.flatnonzero(data.labels != 2)[::-1])
    with pytest.raises(ValueError, match="perturbation is 'noise.npz' with 40 rows.* 30 .* 4"):
        read_perturbation(tmp_path / "noise.npz", kept)
    perturbation, _ = read_perturbation(tmp_path / "noise.npz", data.subset(np.arange(39, -1, -1)))
    np.testing.assert_allclose(perturbation.numpy(), delta[::-1] / 255.0, atol=1e-7)


def test_folder_of_numbered_images_is_read_in_their_order(tmp_path, data, poisoned):
    for row, image in enumerate(poisoned):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    perturbation, recognised = read_perturbation(tmp_path, data, budget={"linf": 8})
    np.testing.assert_array_equal(apply_perturbation(data.images, perturbation), poisoned)
    assert "poisoned images 0 to 255" in recognised["holds"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({0: 1}, "whose labels are not in the clean images' order, from row 1 on"),
        ({0: 1, 1: 0}, "whose image for row 0 is not like the clean one"),
    ],
)
def test_folder_in_another_label_order_is_refused(changes, said, tmp_path, data, poisoned):
    """Grouped by class is accepted (test_published_layouts.py), but not with one or two images in a wrong class."""
    for row, (image, label) in enumerate(zip(poisoned, data.labels, strict=True)):
        label = changes.get(row, label)
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(label) / f"image {row}.png")
    with pytest.raises(ValueError, match=said):
        read_perturbation(tmp_path, data)


def test_wrong_length_is_refused(tmp_path, data, delta):
    with pytest.raises(ValueError, match="with 39 rows.* 40 .* 4 "):
        read_perturbation(write(tmp_path / "noise.npy", delta[:39]), data)
    with pytest.raises(ValueError, match="with 39 rows.*40 clean images"):
        read_perturbation(write(tmp_path / "noise.npy", delta[:39]), data, kind="sample-wise")
    with pytest.raises(ValueError, match="with 2 rows.*labels.* 3"):
        read_perturbation(write(tmp_path / "noise.npy", delta[:2]), data, kind="class-wise")


def test_wrong_size_is_refused(tmp_path, data, delta):
    path = write(tmp_path / "noise.npy", delta[:, :, :8])
    with pytest.raises(ValueError, match=r"of shape \(40, 3, 8, 16\).*\(rows, 3, 16, 16\)"):
        read_perturbation(path, data)


def test_wrong_label_order_is_refused(tmp_path, data, delta):
    labels = data.labels.copy()
    labels[[4, 5]] = labels[[5, 4]]
    torch.save({"noise": torch.from_numpy(delta), "targets": torch.from_numpy(labels)}, tmp_path / "noise.pt")
    with pytest.raises(ValueError, match="'noise.pt', whose labels are not in the clean images' order, from row 4 on"):
        read_perturbation(tmp_path / "noise.pt", data)


@pytest.mark.parametrize("shift", [0, 0.5])
def test_poisoned_images_in_another_order_are_refused(shift, tmp_path, data, poisoned):
    path = write(tmp_path / "images.npy", poisoned[np.random.default_rng(3).permutation(40)] / 255 - shift)
    with pytest.raises(ValueError, match="not like the clean ones in their order|as large as images are; declare"):
        read_perturbation(path, data)
    with pytest.raises(ValueError, match="not like the clean ones in their order|but 8 was declared"):
        read_perturbation(path, data, budget={"linf": 8})


@pytest.mark.parametrize("wrong", [4, 12])
def test_images_of_which_a_part_is_in_another_order_are_refused(wrong, tmp_path, data, poisoned):
    rows = np.arange(40)
    rows[-wrong:] = np.roll(rows[-wrong:], 1)
    path = write(tmp_path / "images.npy", poisoned[rows])
    with pytest.raises(
        ValueError, match="holds images like the clean ones, but whose image for row [23]. is not like"
    ):
        read_perturbation(path, data)


@pytest.mark.parametrize("budget", [{"linf": 4}, {"l2": 0.3}, {"l0": 1}])
def test_norm_beyond_the_declared_budget_is_refused(budget, tmp_path, data, delta):
    (norm, bound) = next(iter(budget.items()))
    with pytest.raises(ValueError, match=f"'noise.npy' with {norm} .* {bound:g} "):
        read_perturbation(write(tmp_path / "noise.npy", delta), data, budget=budget)


def test_rounding_does_not_break_a_budget(tmp_path, data):
    noise = np.random.default_rng(0).standard_normal(data.tensor().shape)
    noise /= np.sqrt(np.square(noise).sum(axis=(1, 2, 3), keepdims=True))
    read_perturbation(write(tmp_path / "noise.npy", noise), data, budget={"l2": 1.0}, order="given")


def test_unknown_budget_and_kind_are_refused(tmp_path, data, delta):
    path = write(tmp_path / "noise.npy", delta)
    with pytest.raises(ValueError, match="budget has 'l1'.*linf, l2, l0"):
        read_perturbation(path, data, budget={"l1": 8})
    with pytest.raises(ValueError, match="kind is 'universal'.*sample-wise.*class-wise"):
        read_perturbation(path, data, kind="universal")


class Payload:
    """Would run code on unpickling."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz"])
def test_code_in_a_file_is_not_run(suffix, tmp_path, data, capfd):
    path = tmp_path / f"noise{suffix}"
    if suffix == ".pt":
        torch.save({"noise": Payload()}, path)
    elif suffix == ".npz":
        np.savez(path, noise=np.array([Payload()], dtype=object))
    else:
        np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="it can only be read by running code from it, or is damaged; plain tensors"):
        read_perturbation(path, data)
    assert "unpickled" not in capfd.readouterr().out


def test_pickles_and_missing_files_are_refused(tmp_path, data, delta):
    path = tmp_path / "noise.pkl"
    path.write_bytes(pickle.dumps(delta))
    with pytest.raises(ValueError, match="perturbation is 'noise.pkl'.*.safetensors"):
        read_perturbation(path, data)
    with pytest.raises(ValueError, match="perturbation is '.*none.pt'"):
        read_perturbation(tmp_path / "none.pt", data)


def test_files_without_one_image_array_are_refused(tmp_path, data, delta):
    np.savez(tmp_path / "two.npz", one=delta, other=delta)
    with pytest.raises(ValueError, match=r"'two.npz' with \['one', 'other'\].*four"):
        read_perturbation(tmp_path / "two.npz", data)
    np.save(tmp_path / "nan.npy", np.full(delta.shape, np.nan))
    with pytest.raises(ValueError, match="'nan.npy' of float64.*finite"):
        read_perturbation(tmp_path / "nan.npy", data)
    np.save(tmp_path / "large.npy", 300.0 * np.sign(delta - 0.5))
    with pytest.raises(ValueError, match="'large.npy' with values from -300 to 300 .*255"):
        read_perturbation(tmp_path / "large.npy", data)
    torch.save("noise", tmp_path / "text.pt")
    with pytest.raises(ValueError, match="'text.pt' with a str"):
        read_perturbation(tmp_path / "text.pt", data)


def test_as_many_images_as_classes_need_a_kind(tmp_path, data, delta):
    four = data.subset(range(4))
    path = write(tmp_path / "noise.npy", delta[:4])
    with pytest.raises(
        ValueError, match="kind must say whether the 4 rows of 'noise.npy' are sample-wise or class-wise"
    ):
        read_perturbation(path, four)
    assert read_perturbation(path, four, kind="class-wise")[1]["kind"] == "class-wise"


def test_one_pixel_noise_is_read_and_its_norm_stated(tmp_path, data):
    perturbation = poisons.get("ops")(data.tensor(), torch.from_numpy(data.labels))
    path = write(tmp_path / "ops.npy", perturbation.numpy())
    read, recognised = read_perturbation(path, data, budget={"l0": 1})
    assert torch.equal(read, perturbation) and recognised["norms"].endswith("l0 1")


def test_strongly_changed_images_are_recognised(tmp_path, data):
    poisoned = data.tensor() + poisons.get("cuda")(data.tensor(), torch.from_numpy(data.labels))
    path = write(tmp_path / "cuda.npy", poisoned.numpy())
    assert "poisoned images in [0, 1]" in read_perturbation(path, data)[1]["holds"]


def one_for_each(noise, **marks):
    return {"noise": torch.from_numpy(noise), **marks}


@pytest.mark.parametrize("marks", [{"labels": np.array([2, 0, 3, 1])}, {"index": np.array([2, 0, 3, 1])}])
def test_class_wise_rows_stand_where_the_file_says(marks, tmp_path, data):
    pattern = np.random.default_rng(0).integers(-8, 9, (4, 3, 16, 16)).astype(np.int8)
    order = np.array([2, 0, 3, 1])
    named = {"ids": [f"class {label}" for label in order]}
    for given in (marks, named):
        torch.save(one_for_each(pattern[order], **given), tmp_path / "noise.pt")
        perturbation, _ = read_perturbation(tmp_path / "noise.pt", data, kind="class-wise")
        np.testing.assert_allclose(perturbation.numpy(), pattern[data.labels] / 255, atol=1e-7)
    torch.save(one_for_each(pattern, labels=torch.tensor([0, 1, 1, 3])), tmp_path / "noise.pt")
    with pytest.raises(
        ValueError, match="'noise.pt', whose 4 class-wise rows are of the classes 0, 1, 1, 3, but each"
    ):
        read_perturbation(tmp_path / "noise.pt", data)


@pytest.mark.parametrize("marks", [{"labels": torch.arange(5)}, {"ids": ["a"]}, {"index": torch.tensor(3)}])
def test_a_file_with_fewer_marks_than_rows_is_refused(marks, tmp_path, data, delta):
    torch.save(one_for_each(delta, **marks), tmp_path / "noise.pt")
    with pytest.raises(ValueError, match="'noise.pt' with 40 rows and . (labels|ids|row numbers), but one for each"):
        read_perturbation(tmp_path / "noise.pt", data)


def test_labels_that_are_texts_are_compared_by_name_or_number(tmp_path, data, delta):
    for texts in (list(map(str, data.labels)), [data.class_names[label] for label in data.labels]):
        torch.save(one_for_each(delta, labels=texts), tmp_path / "noise.pt")
        read_perturbation(tmp_path / "noise.pt", data)
        torch.save(one_for_each(delta, labels=texts[::-1]), tmp_path / "noise.pt")
        with pytest.raises(
            ValueError, match="'noise.pt', whose labels are not in the clean images' order, from row 0"
        ):
            read_perturbation(tmp_path / "noise.pt", data)
    torch.save(one_for_each(delta, labels=["bird"] * 40), tmp_path / "noise.pt")
    with pytest.raises(ValueError, match="'noise.pt' with the label 'bird', but the clean images have no such class"):
        read_perturbation(tmp_path / "noise.pt", data)


@pytest.mark.parametrize("norm", ["linf", "l2", "l0"])
@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -5])
def test_a_budget_that_bounds_nothing_is_refused(norm, bound, tmp_path, data):
    with pytest.raises(ValueError, match=f"budget has {norm} {bound}, but for linf, l2, l0 numbers from 0 on"):
        read_perturbation(tmp_path / "none.npy", data, budget={norm: bound})


def tensors_of(delta):
    noise = torch.from_numpy(delta).float() / 255
    return {
        "tuple": (noise, torch.arange(40)),
        "list": [noise[0], noise[1, :, :8]],
        "list of pairs": [(one, 3) for one in noise],
        "Tensor": noise.to_sparse(),
        "dict": {"noise": [noise[0], noise[1, :, :8]]},
    }


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("stored", ["tuple", "list", "list of pairs", "Tensor", "dict"])
def test_what_is_no_array_of_one_shape_is_refused_in_one_sentence(stored, tmp_path, data, delta):
    torch.save(tensors_of(delta)[stored], tmp_path / "noise.pt")
    with pytest.raises(ValueError, match="'noise.pt' with a (tuple|list|Tensor), but dense tensors and arrays of one"):
        read_perturbation(tmp_path / "noise.pt", data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_floats_are_read_in_lists_too(dtype, tmp_path, data, delta):
    noise = (torch.from_numpy(delta).float() / 255).to(dtype)
    torch.save(list(noise), tmp_path / "noise.pt")
    perturbation, _ = read_perturbation(tmp_path / "noise.pt", data)
    assert torch.equal(perturbation, noise.float())
