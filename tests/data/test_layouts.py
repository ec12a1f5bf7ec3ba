"""
Random trees of splits, classes, names and metadata: what is read is what `datasets` reads, or an error.

`datasets` itself is the reference. It reads some trees where this package refuses, because a reader of the tree could
take it for something else; it never reads other rows or other labels.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from jcdp_diffusers.data import load_images, open_dataset


datasets.disable_progress_bars()
# The same trees in every run; the long tests try others each time.
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

FOLDERS = st.sampled_from(
    [
        "train",
        "test",
        "val",
        "validation",
        "training",
        "train_images",
        "my-test",
        "data",
        "cat",
        "dog",
        "10",
        "9",
        "007",
    ]
    + ["images", "evaluation", "best", "trainer", "label=cat", "__cache__", ".hidden"]
)
STEMS = st.sampled_from(["0", "1", "10", "a b", "photo-test-1", "train_1", "dev.2", "ü", "x", "testing1", "latest"])
PATHS = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]),
    st.lists(FOLDERS, max_size=3),
    STEMS,
    st.sampled_from([".png", ".png", ".PNG", ".bmp"]),
)
TREES = st.lists(PATHS, min_size=1, max_size=8, unique_by=lambda path: path.lower())


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def plant(root, paths):
    """An image of its own at every path; nothing where a file would have to be a folder."""
    for number, path in enumerate(paths):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(target, format={".bmp": "BMP"}.get(target.suffix.lower(), "PNG"))


def by_datasets(root, kind):
    """Rows of each split as (pixels, name of the class or None), in no order."""
    read = datasets.load_dataset(kind, data_dir=str(root), cache_dir=str(root.parent / "cache"))
    splits = {}
    for split, dataset in read.items():
        feature = dataset.features.get("label")
        rows = []
        for row in dataset:
            label = row.get("label")
            name = feature.names[label] if isinstance(feature, datasets.ClassLabel) and label is not None else label
            name = None if name is None else str(name).removeprefix("label=")
            rows.append((np.asarray(row["image"].convert("RGB")).tobytes(), name))
        # A file that two of its patterns fit, as in train/training/, `datasets` reads twice.
        splits[split] = sorted(set(rows), key=repr)
    return splits


def by_us(root, split):
    data = load_images(root, split=split)
    names = [None] * len(data) if data.labels is None else data.labels.tolist()
    if data.class_names is not None:
        names = [data.class_names[label] for label in names]
    rows = [(image.tobytes(), None if name is None else str(name)) for image, name in zip(data.images, names)]
    return sorted(rows, key=repr)


def compare(root, kind):
    """Ours against `datasets`: the same splits and rows, and the same labels where `datasets` has some."""
    try:
        theirs = by_datasets(root, kind)
    except Exception:  # it has many ways to say that it cannot; then there is nothing to compare with
        theirs = None
    try:
        if theirs is None:
            load_images(root)
            return
        ours = {split: by_us(root, split) for split in theirs}
        with pytest.raises(ValueError, match="lacks"):
            open_dataset(root, split="another")
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
        return
    unlabelled = all(name is None for rows in ours.values() for _, name in rows)
    for split, rows in theirs.items():
        assert [row for row, _ in ours[split]] == [row for row, _ in rows]
        names = {name for _, name in rows}
        # Where images lie directly in the folders of splits, `datasets` takes such a folder for the class of its images.
        if names != {None} and not (unlabelled and len(names) == 1):
            assert ours[split] == rows


def in_a_folder_of_its_own(check):
    place = Path(tempfile.mkdtemp())
    try:
        (place / "d").mkdir()  # no word of a split on the way
        return check(place / "d")
    finally:
        shutil.rmtree(place)


def check_tree(paths):
    files = set(paths)
    assume(not any(str(parent) in files for path in paths for parent in Path(path).parents))

    def check(root):
        plant(root, paths)
        compare(root, "imagefolder")

    in_a_folder_of_its_own(check)


@pytest.mark.parametrize(
    "paths",
    [
        ["train/cat/0.png", "train/dog/1.png", "test/cat/0.png", "test/dog/1.png"],
        ["cat/0.png", "cat/1.png", "dog/0.png"],
        ["photo-test-1.png", "train_1.png"],
    ],
)
def test_usual_trees_are_read_by_datasets_too_and_compared(paths, tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    plant(root, paths)
    theirs = by_datasets(root, "imagefolder")
    assert {split: len(by_us(root, split)) for split in theirs} == {split: len(rows) for split, rows in theirs.items()}
    compare(root, "imagefolder")


@QUICK
@given(TREES)
@example(["train/cat/0.png", "train/dog/1.png", "test/cat/0.png"])
@example(["photo-test-1.png", "train_1.png"])
@example(["cat/0.png", "cat/1.png", "dog/0.png"])
@example(["data/train/10/x.png", "data/train/9/x.png", "data/val/9/x.png"])
@example(["train/0.png", "test/0.png"])
@example(["train/test/0.png"])
@example(["cat/images/0.png", "dog/images/1.png"])
@example(["train/cat/0.png", "extra/cat/0.png"])
def test_image_trees_are_read_as_datasets_reads_them_or_refused(paths):
    check_tree(paths)


@pytest.mark.long
@LONG
@given(TREES)
def test_many_image_trees(paths):
    check_tree(paths)


SPELLINGS = st.sampled_from(
    [lambda name: name, lambda name: "./" + name, lambda name: "sub/../" + name, lambda name: name.replace("/", "\\")]
)


@QUICK
@given(
    st.lists(st.sampled_from(["0.png", "b/1.png", "b/c/2.png", "3.bmp"]), min_size=1, unique=True),
    st.lists(SPELLINGS, min_size=4, max_size=4),
    st.sampled_from([".csv", ".jsonl", ".parquet"]),
    st.lists(st.sampled_from(["ant", "bee", "7"]), min_size=4, max_size=4),
)
def test_metadata_rows_reach_their_images_however_they_are_written(paths, spellings, suffix, labels):
    assume(len(set(labels[: len(paths)])) > 1 or labels[0] != "7")

    def check(root):
        plant(root, paths)
        rows = [{"file_name": spell(path), "label": label} for path, spell, label in zip(paths, spellings, labels)]
        file = root / f"metadata{suffix}"
        if suffix == ".csv":
            file.write_text("file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows))
        elif suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
        expected = sorted(((pixels(n).tobytes(), label) for n, (_, label) in enumerate(zip(paths, labels))), key=repr)
        assert by_us(root, None) == expected
        if not any("\\" in row["file_name"] for row in rows):
            compare(root, "imagefolder")

    in_a_folder_of_its_own(check)


PARQUET = st.builds(
    lambda folders, stem: "/".join([*folders, f"{stem}.parquet"]),
    st.lists(st.sampled_from(["train", "test", "data", "part", "fog", "snow", "label=0", "dev-set"]), max_size=2),
    st.sampled_from(
        ["part-0", "part-1", "train-00000-of-00001", "test-00000-of-00001", "data-00000-of-00001", "0000"]
    ),
)


@QUICK
@given(st.lists(PARQUET, min_size=1, max_size=5, unique=True))
@example(["train/part-0.parquet", "test/part-0.parquet"])
@example(["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"])
@example(["fog/test-00000-of-00001.parquet", "snow/test-00000-of-00001.parquet"])
def test_parquet_trees_are_read_as_datasets_reads_them_or_refused(paths):
    def check(root):
        plant(root / "images", [f"{n}.png" for n in range(len(paths))])
        for number, path in enumerate(paths):
            stored = {"bytes": (root / "images" / f"{number}.png").read_bytes(), "path": None}
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            table = pa.Table.from_pydict({"image": [stored], "label": [number]}, schema=features.arrow_schema)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / path)
        shutil.rmtree(root / "images")
        at_top = any("/" not in path for path in paths)
        shards_at_top = any("-of-" in path and "/" not in path for path in paths)
        if at_top and any("/" in path for path in paths) or shards_at_top:
            # Our own layout: a set at the top is whole, and its files name its splits.
            names = {path.split("-0")[0] if "-of-" in path else "train" for path in paths if "/" not in path}
            try:
                found = [by_us(root, name) for name in names]
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert sum(map(len, found)) == sum("/" not in path for path in paths)
            return
        compare(root, "parquet")

    in_a_folder_of_its_own(check)


@QUICK
@given(st.permutations(["ant", "bee", "cat"]), st.permutations(["bee", "cat", "dog"]), st.booleans())
def test_shards_with_class_names_in_any_order_keep_the_names(first, second, streaming):
    def check(root):
        truth = []
        for shard, names in enumerate((first, second)):
            rows = [(pixels(10 * shard + n), name) for n, name in enumerate(sorted(names) * 2)]
            truth += [name for _, name in rows]
            path = root / "image.png"
            stored = []
            for image, _ in rows:
                Image.fromarray(image).save(path)
                stored.append({"bytes": path.read_bytes(), "path": None})
            path.unlink()
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
            labels = [names.index(name) for _, name in rows]
            table = pa.Table.from_pydict({"image": stored, "label": labels}, schema=features.arrow_schema)
            pq.write_table(table, root / f"train-{shard:05d}-of-00002.parquet")
        dataset = open_dataset(root, streaming=streaming)
        names = dataset.features["label"].names
        assert [names[row["label"]] for row in dataset] == truth
        data = load_images(root)
        assert [data.class_names[label] for label in data.labels] == truth

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    in_a_folder_of_its_own(check)
