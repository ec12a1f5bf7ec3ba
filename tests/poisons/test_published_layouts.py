"""Files as the poisons' own programs write them, written here: CP, UC, PIL, AUE, AAP, DUNE, SEM."""

import argparse
import pickle
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from jcdp_diffusers.data import load_images, open_dataset, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons.published import read_perturbation


EIGHT = {"linf": 8}


def agrees(path, data, poisoned, **options):
    """The file is read as what makes the poisoned images; returns what was recognised."""
    perturbation, recognised = read_perturbation(path, data, **options)
    np.testing.assert_array_equal(apply_perturbation(data.images, perturbation), poisoned)
    return recognised


# CP: noise is a parameter in [-1, 1], multiplied by the bound when it is added; not clipped to the images' range.


@pytest.fixture(scope="module")
def parameter(data):
    draw = torch.Generator().manual_seed(0)
    return (1.3 * (2 * torch.rand(data.tensor().shape, generator=draw) - 1)).clamp(-1, 1)


def test_cp_sample_wise_is_in_fractions_of_its_bound(tmp_path, data, parameter):
    torch.save(parameter, tmp_path / "cifar10_res18_simclr_cps.pth")
    wanted = apply_perturbation(data.images, 8 / 255 * parameter)
    recognised = agrees(tmp_path / "cifar10_res18_simclr_cps.pth", data, wanted, budget=EIGHT, order="given")
    assert "as fractions of 8/255" in recognised["holds"] and recognised["norms"].startswith("linf 8/255")
    with pytest.raises(ValueError, match="budget is empty.*'cifar10_res18_simclr_cps.pth'.*linf"):
        read_perturbation(tmp_path / "cifar10_res18_simclr_cps.pth", data, order="given")
    with pytest.raises(ValueError, match="black and white values darker.*'given'"):
        read_perturbation(tmp_path / "cifar10_res18_simclr_cps.pth", data, budget=EIGHT)


def test_cp_class_wise_and_its_checkpoints(tmp_path, data, parameter):
    wanted = apply_perturbation(data.images, 8 / 255 * parameter[:4][data.labels])
    torch.save(parameter[:4], tmp_path / "cifar10_res18_simclr_cpc.pth")
    options = argparse.Namespace(delta_weight=8 / 255, classwise=True)
    model = {"delta": parameter[:4], "backbone.conv1.weight": torch.zeros(8, 3, 3, 3)}
    state = {"opt": options, "model": model, "optimizer": {"state": {}}, "epoch": 200}
    torch.save(state, tmp_path / "last.pth")
    for name in ("cifar10_res18_simclr_cpc.pth", "last.pth"):
        recognised = agrees(tmp_path / name, data, wanted, budget=EIGHT)
        assert recognised["kind"] == "class-wise" and "as fractions of 8/255" in recognised["holds"]


def test_noise_that_keeps_its_bound_is_no_fraction(tmp_path, data):
    """Of one pixel, noise goes from -1 to 1 as well; it is small, and stays what it is."""
    noise = np.zeros(data.tensor().shape, dtype=np.float32)
    noise[:, :, 3, 3] = np.where(data.images[:, 3, 3] > 100, -1, 1)
    np.save(tmp_path / "ops.npy", noise)
    with pytest.raises(ValueError, match="'ops.npy' with linf .* 8 "):
        read_perturbation(tmp_path / "ops.npy", data, budget=EIGHT)


# UC: images in folders of classes, numbered within each; or noises of clusters, and the cluster of each image.


def test_uc_images_are_numbered_within_their_class(tmp_path, data, poisoned):
    count = [0] * 4
    for image, label in zip(poisoned, data.labels, strict=True):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(label) / f"{count[label]}.png")
        count[label] += 1
    recognised = agrees(tmp_path, data, poisoned, budget=EIGHT)
    assert recognised["rows"] == "grouped by class, in the order of the clean images within a class"
    with pytest.raises(ValueError, match="look like images.*order"):
        read_perturbation(tmp_path, data.subset([36, 37, 38, 39, *range(36)]))


def test_uc_images_beside_a_set_without_ids(tmp_path, data, poisoned):
    """Row numbers of both, `train/0` and so on, are the same text and no ids."""
    write_dataset(tmp_path / "with_ids", data)
    rows = open_dataset(tmp_path / "with_ids").remove_columns("id")
    (tmp_path / "clean").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "clean" / "train-00000-of-00001.parquet")
    count = [0] * 4
    for image, label in zip(poisoned, data.labels, strict=True):
        folder = tmp_path / "uc" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{count[label]}.png")
        count[label] += 1
    clean = load_images(tmp_path / "clean")
    assert set(clean.ids) == set(load_images(tmp_path / "uc").ids)
    assert agrees(tmp_path / "uc", clean, poisoned, budget=EIGHT)["rows"].startswith("grouped by class")


@pytest.fixture
def clusters(tmp_path):
    """Three generators' outputs, as they are before they are clamped, and what k-means found."""
    draw = np.random.default_rng(0)
    members = draw.integers(0, 3, 40)
    patterns = torch.from_numpy(draw.uniform(-1, 1, (3, 3, 16, 16))).float()
    for number, pattern in enumerate(patterns):
        weights = {"model.1.weight": torch.zeros(4, 3, 7, 7)}
        saved = {"state_dict": weights, "init_noise": torch.rand(1, 3, 16, 16), "perturbation": pattern[None]}
        torch.save(saved, tmp_path / f"perturbation_{number}.pth")
    found = {"pred_idx": torch.tensor(members), "pred_idx_test": members[:9].astype(np.int32)}
    torch.save(found | {"centers": torch.zeros(3, 2048)}, tmp_path / "pets_rn50_cluster3.pth")
    return patterns, members


@pytest.mark.parametrize("size", [16, 24])
def test_uc_noise_of_clusters(size, tmp_path, data, clusters):
    patterns, members = clusters
    if size != 16:
        data = data.with_images(np.repeat(np.repeat(data.images, 2, axis=1), 2, axis=2)[:, :size, :size])
    places = np.arange(size) * 16 // size
    noise = patterns.clamp(-16 / 255, 16 / 255).numpy()[members][:, :, places][:, :, :, places]
    wanted = apply_perturbation(data.images, noise)
    recognised = agrees(tmp_path, data, wanted, budget={"linf": 16}, order="given")
    assert recognised["norms"].startswith("linf 16/255")


def test_uc_noise_of_clusters_needs_all_that_it_is_added_with(tmp_path, data, clusters):
    with pytest.raises(ValueError, match="budget is {}.*linf"):
        read_perturbation(tmp_path, data, order="given")
    with pytest.raises(ValueError, match="order is 'checked'.*'given'"):
        read_perturbation(tmp_path, data, budget={"linf": 16})
    with pytest.raises(ValueError, match="one file with pred_idx, the cluster of each of 39 images, below 3"):
        read_perturbation(tmp_path, data.subset(range(39)), budget={"linf": 16}, order="given")
    _, members = clusters
    for wrong in (members - 1, members.astype(np.float32)):
        torch.save({"pred_idx": torch.from_numpy(wrong)}, tmp_path / "pets_rn50_cluster3.pth")
        with pytest.raises(ValueError, match="one file with pred_idx, .* below 3: whole numbers from 0 on"):
            read_perturbation(tmp_path, data, budget={"linf": 16}, order="given")
    torch.save({"perturbation": torch.zeros(1, 3, 8, 8)}, tmp_path / "perturbation_1.pth")
    with pytest.raises(ValueError, match=r"whose noises have the shapes \(1, 3, 8, 8\), \(1, 3, 16, 16\), but one"):
        read_perturbation(tmp_path, data, budget={"linf": 16}, order="given")
    (tmp_path / "perturbation_1.pth").unlink()
    with pytest.raises(ValueError, match="its noises must be perturbation_0.pth to perturbation_1.pth"):
        read_perturbation(tmp_path, data, budget={"linf": 16}, order="given")
    with pytest.raises(ValueError, match="perturbation is 'perturbation_0.pth' with 1 rows.*40"):
        read_perturbation(tmp_path / "perturbation_0.pth", data, budget={"linf": 16})


# PIL: all images and labels in one file. AUE, AAP: a tensor of noise. SEM: an array in a pickle.


def test_pil_has_images_and_labels(tmp_path, data, poisoned):
    images = torch.from_numpy(poisoned).permute(0, 3, 1, 2).float() / 255
    torch.save({"data": images, "labels": torch.from_numpy(data.labels)}, tmp_path / "unlearnable_cifar10.pt")
    recognised = agrees(tmp_path / "unlearnable_cifar10.pt", data, poisoned, budget=EIGHT)
    assert "poisoned images in [0, 1]" in recognised["holds"]
    wrong = data.subset([1, 0, *range(2, 40)])
    with pytest.raises(ValueError, match="whose labels are not in the clean images' order, from row 0 on"):
        read_perturbation(tmp_path / "unlearnable_cifar10.pt", wrong)


def test_aue_and_aap_are_tensors_of_noise(tmp_path, data, delta, poisoned):
    torch.save(torch.nn.Parameter(torch.from_numpy(delta).float() / 255), tmp_path / "poison.pt")
    recognised = agrees(tmp_path / "poison.pt", data, poisoned, budget=EIGHT)
    assert recognised["kind"] == "sample-wise" and "interval of length 1" in recognised["holds"]
    with pytest.raises(ValueError, match="darker and lighter still.*in_order_of"):
        read_perturbation(tmp_path / "poison.pt", data.subset(range(39, -1, -1)), budget=EIGHT)
    torch.save(torch.from_numpy(delta[:4]).float() / 255, tmp_path / "poison.pt")
    wanted = apply_perturbation(data.images, delta[:4][data.labels] / 255)
    assert agrees(tmp_path / "poison.pt", data, wanted, budget=EIGHT)["kind"] == "class-wise"


def test_sem_is_a_pickle_whose_array_is_read(tmp_path, data, delta, poisoned):
    (tmp_path / "sem-fin-def-noise.pkl").write_bytes(pickle.dumps(delta))
    with pytest.raises(ValueError, match="'sem-fin-def-noise.pkl'.*convert it.*numpy.save"):
        read_perturbation(tmp_path / "sem-fin-def-noise.pkl", data)
    np.save(tmp_path / "sem.npy", delta)
    assert "perturbations in 1/255" in agrees(tmp_path / "sem.npy", data, poisoned, budget=EIGHT)["holds"]


# DUNE: pairs of an image and a class, class after class, in a pickle.


def test_dune_is_a_pickle_whose_rows_are_put_back_into_place(tmp_path, data, poisoned):
    images = poisoned.transpose(0, 3, 1, 2).astype(np.float32) / 255
    by_class = [row for label in range(4) for row in range(40) if data.labels[row] == label]
    (tmp_path / "DUNE.pkl").write_bytes(pickle.dumps([(images[row], data.labels[row]) for row in by_class]))
    with pytest.raises(ValueError, match="perturbation is 'DUNE.pkl'.*convert it"):
        read_perturbation(tmp_path / "DUNE.pkl", data)
    np.save(tmp_path / "alone.npy", images[by_class])
    np.savez(tmp_path / "both.npz", images=images[by_class], labels=data.labels[by_class])
    for name in ("alone.npy", "both.npz"):
        recognised = agrees(tmp_path / name, data, poisoned, budget=EIGHT)
        assert recognised["rows"] == "grouped by class, in the order of the clean images within a class"
    # A set in another order, joined by the pixels of the set that the file is of.
    order = np.random.default_rng(1).permutation(40)
    for name in ("alone.npy", "both.npz"):
        recognised = agrees(tmp_path / name, data.subset(order), poisoned[order], budget=EIGHT, in_order_of=data)
        assert recognised["rows"] == "grouped by class, by the pixels of in_order_of"
    with pytest.raises(ValueError, match="look like images|whose labels are not"):
        read_perturbation(tmp_path / "alone.npy", replace(data, labels=data.labels[::-1].copy()), budget=EIGHT)


def test_rows_in_their_order_stay_there(tmp_path, data, poisoned):
    """Images that stand in the clean images' order are not taken for grouped ones, nor is noise without labels."""
    np.save(tmp_path / "images.npy", poisoned)
    assert agrees(tmp_path / "images.npy", data, poisoned, budget=EIGHT)["rows"] == "in the order of the clean images"


def test_arrays_in_a_file_of_torchs_run_no_code(tmp_path, data, delta, capfd):
    torch.save({"noise": delta}, tmp_path / "array.pth")
    perturbation, _ = read_perturbation(tmp_path / "array.pth", data, budget=EIGHT)
    np.testing.assert_allclose(perturbation.numpy(), delta / 255.0, atol=1e-7)

    class Payload:
        def __reduce__(self):
            return (print, ("unpickled",))

    boxed = np.empty(1, dtype=object)
    boxed[0] = Payload()
    for content in ({"noise": boxed}, {"opt": argparse.Namespace(option=Payload())}):
        torch.save(content, tmp_path / "code.pth")
        with pytest.raises(ValueError, match="it can only be read by running code from it, or is damaged"):
            read_perturbation(tmp_path / "code.pth", data)
    assert "unpickled" not in capfd.readouterr().out
