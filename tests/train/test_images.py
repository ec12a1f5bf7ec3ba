import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from jcdp_diffusers.data import LabelledImages, load_images, open_dataset
from jcdp_diffusers.data.found import say_once
from jcdp_diffusers.train.images import BatchLayout, ImageFiles, epoch_order, micro_batches, training_images, usable


def picture(width, height, seed, mode="RGB"):
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, mode)


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs of all shapes, in class folders that are never looked at."""
    sizes = [(40, 24), (24, 24), (17, 50), (100, 60), (9, 9)]
    for i, (width, height) in enumerate(sizes):
        (tmp_path / "photos" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        picture(width, height, i).save(tmp_path / "photos" / f"class{i % 2}" / f"{i}.png")
    return open_dataset(tmp_path / "photos")


def test_an_epoch_visits_every_image_once():
    orders = [epoch_order(0, epoch, 10) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    layout = BatchLayout(rank=0, world=1, per_device=4, accumulation=1)
    visited = [index for batch in layout.draws(3, 10, 0, 5) for index, _ in batch]
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_total_batch_does_not_depend_on_processes_and_accumulation(world, accumulation):
    per_device = 8 // world // accumulation
    layouts = [BatchLayout(rank, world, per_device, accumulation) for rank in range(world)]
    assert layouts[0].total == 8
    alone = list(BatchLayout(0, 1, 8, 1).draws(0, 30, 2, 5))
    shared = [list(layout.draws(0, 30, 2, 5)) for layout in layouts]
    for step in range(3):
        micros = range(step * accumulation, (step + 1) * accumulation)
        assert [draw for micro in micros for draws in shared for draw in draws[micro]] == alone[step]
    positions = [n for layout in layouts for micro in range(accumulation) for n in range(8)[layout.positions(micro)]]
    assert sorted(positions) == list(range(8))


def test_center_crops_are_those_of_load_images(photographs):
    files = ImageFiles(photographs, resolution=16, center_crop=True)
    expected = load_images(photographs, image_size=16).images
    for index in range(len(files)):
        assert np.array_equal(files[index, 99].permute(1, 2, 0).numpy(), expected[index])


def test_random_crops_are_a_function_of_seed_and_draw(photographs):
    files = ImageFiles(photographs, resolution=16, seed=1)
    assert torch.equal(files[0, 5], ImageFiles(photographs, resolution=16, seed=1)[0, 5])
    assert not torch.equal(files[0, 5], files[0, 6])
    assert not torch.equal(files[0, 5], ImageFiles(photographs, resolution=16, seed=2)[0, 5])
    assert files[3, 0].shape == (3, 16, 16) and files[3, 0].dtype == torch.uint8


def test_a_random_crop_of_a_square_is_the_whole_of_it(photographs):
    assert torch.equal(ImageFiles(photographs, resolution=24)[2, 7], ImageFiles(photographs, resolution=24)[2, 8])


def test_labels_are_never_read(photographs):
    assert "label" in photographs.column_names
    images = training_images(photographs, resolution=16)
    assert images.dataset.column_names == ["id", "image"]
    assert training_images(photographs, resolution=16, center_crop=True).labels is None


def test_what_is_kept_in_memory(photographs):
    squares = photographs.select([1, 3])  # 17x50 is the second in natural order of the classes
    assert isinstance(training_images(photographs, resolution=16), ImageFiles)
    assert isinstance(training_images(photographs, resolution=16, center_crop=True), LabelledImages)
    assert isinstance(training_images(photographs, resolution=16, center_crop=True, memory_limit=100), ImageFiles)
    images = [picture(20, 20, seed) for seed in range(3)]
    squares = open_dataset(datasets.Dataset.from_dict({"image": images}))
    in_memory, files = training_images(squares, resolution=16), ImageFiles(squares, resolution=16)
    assert isinstance(in_memory, LabelledImages)
    assert np.array_equal(in_memory.images[2], files[2, 0].permute(1, 2, 0).numpy())


def test_micro_batches_are_alike_from_memory_and_from_files():
    images = [picture(16, 16, seed, "L") for seed in range(5)]
    dataset = open_dataset(datasets.Dataset.from_dict({"image": images}))
    layout = BatchLayout(rank=1, world=2, per_device=3, accumulation=2)
    sources = (
        (training_images(dataset, resolution=16, channels=1), 0),
        (ImageFiles(dataset, resolution=16, channels=1), 0),
        (ImageFiles(dataset, resolution=16, channels=1), 2),
    )
    state = torch.get_rng_state()
    batches = [
        list(micro_batches(source, layout.draws(0, 5, 1, 3), torch.device("cpu"), workers))
        for source, workers in sources
    ]
    assert [batch.shape for batch in batches[0]] == [(3, 1, 16, 16)] * 4
    for one, two, three in zip(*batches):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), state)


def test_unusable_images_are_named_or_left_out():
    damaged = io.BytesIO()
    picture(16, 16, 0).save(damaged, "PNG")
    images = [{"bytes": damaged.getvalue()[:200], "path": None}]
    for mode in ("RGBA", "RGB"):
        buffer = io.BytesIO()
        picture(16, 16, 1, mode).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = open_dataset(datasets.Dataset.from_dict({"image": images}, features=features))
    with pytest.raises(ValueError, match="image 'train/0' .*damaged.*--skip_unusable_images"):
        ImageFiles(dataset, resolution=16)[0, 0]
    files, draws = ImageFiles(dataset, resolution=16), [[(1, 0)], [(1, 1), (0, 2)]]
    for workers in (0, 1):
        with pytest.raises(ValueError) as raised:
            list(micro_batches(files, iter(draws), torch.device("cpu"), workers))
        assert str(raised.value).startswith("image 'train/0' ") and "\n" not in str(raised.value)
    assert dataset.filter(usable, fn_kwargs={"channels": 3})["id"] == ["train/1", "train/2"]


def test_what_is_changed_in_training_images_is_said(caplog):
    images = []
    for _ in range(2):
        buffer = io.BytesIO()
        picture(16, 16, 1, "RGBA").save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    files = ImageFiles(open_dataset(datasets.Dataset.from_dict({"image": images}, features=features)), resolution=16)
    say_once.cache_clear()
    for row in range(2):
        files[row, 0]
    assert caplog.text.count("transparency laid over white") == 1
