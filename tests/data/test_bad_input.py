"""Files as people and attackers leave them: each is read rightly, set aside with a reason, or refused in one sentence."""

import io
import logging
import os
import struct
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from jcdp_diffusers.data import ImageRejected, LabelledImages, decode_image, join_labels, load_images, open_dataset
from jcdp_diffusers.data.checks import check_sets, match_originals, with_originals
from jcdp_diffusers.data.decoding import picture_size
from jcdp_diffusers.data.found import say_once
from jcdp_diffusers.purify.reader import open_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    say_once.cache_clear()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed, side=8):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def stored(image, image_format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, image_format, **options)
    return file.getvalue()


def plant(root, *names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(stored(picture(seed)))


def refused(source, words, **options):
    with pytest.raises(ValueError, match=words) as caught:
        load_images(source, **options)
    assert "\n" not in str(caught.value)


def a_set(names, labels, prefix="", **fields):
    images = np.stack([picture(seed) for seed in range(len(labels))])
    ids = tuple(f"{prefix}{row}" for row in range(len(labels)))
    return LabelledImages(images, np.array(labels), ids, names, **fields)


# -------------------------------------------------------------------------------------------------- splits and classes


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["TRAIN/a/0.png", "TRAIN/b/1.png", "VAL/a/2.png", "VAL/b/3.png"], ["train", "validation"]),
        (["set-dev/0.png", "set-eval/1.png"], ["test", "validation"]),
        (["birds_training_0.png", "birds_testing_0.png"], ["test", "train"]),
        (["split=train/0.png", "split=test/1.png"], ["test", "train"]),
        (["data/fold.train.1/a/0.png", "data/fold.train.1/b/1.png", "data/fold.test.1/b/2.png"], ["test", "train"]),
    ],
)
def test_splits_in_the_words_of_names(tmp_path, files, splits):
    plant(tmp_path, *files)
    refused(tmp_path, f"several splits and split is None; {', '.join(splits)} are accepted")
    assert sum(len(load_images(tmp_path, split=split)) for split in splits) == len(files)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/a/0.png", "a/1.png"], "'a/' is in none of them"),
        (["train/a/0.png", "train_test/a/1.png"], "speaks of the splits test and train"),
        (["photo.png", "photo-test.png"], "'photo.png' is in none of them"),
        (["x/a/0.png", "x/b/1.png", "y/a/2.png", "y/b/3.png"], "folders in folders: 'x', 'y' over 'a', 'b'"),
        (["one/train/a/0.png", "two/train/a/1.png"], "folders of splits below 'one' and below 'two'"),
        (["group=a/0.png", "group=b/1.png"], "named by 'group' and '='"),
    ],
)
def test_layouts_with_two_meanings_are_refused(tmp_path, files, words):
    plant(tmp_path, *files)
    refused(tmp_path, words)


def test_classes_in_folder_names(tmp_path):
    plant(tmp_path, "label=black%20cat/0.png", "label=dog/1.png")
    assert load_images(tmp_path).class_names == ("black cat", "dog")


def test_tables_in_folders_that_hold_the_label(tmp_path):
    """As Spark and pyarrow write a partitioned table: the column is in the folders' names only."""
    table = pa.table({"image": [stored(picture(seed)) for seed in range(4)], "label": ["owl", "cat", "owl", "cat"]})
    pq.write_to_dataset(table, tmp_path / "d", partition_cols=["label"])
    for streaming in (False, True):
        rows = list(open_dataset(tmp_path / "d", streaming=streaming))
        assert [row["label"] for row in rows] == ["cat", "cat", "owl", "owl"]
    data = load_images(tmp_path / "d")
    assert data.class_names == ("cat", "owl") and np.array_equal(data.images[2], picture(0))
    tables = list(open_rows(tmp_path / "d").read(1, 4))
    assert [name for table in tables for name in table["label"].to_pylist()] == ["cat", "owl", "owl"]


def test_purification_reads_shards_with_the_names_of_all(tmp_path):
    for shard, names in enumerate((["ant", "bee"], ["cat", "ant"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": [{"bytes": stored(picture(row)), "path": None} for row in range(2)], "label": [0, 1]}
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / f"train-{shard:05d}-of-00002.parquet")
    rows = open_rows(tmp_path)
    names = rows.features["label"].names
    read = [names[label] for table in rows.read(0, 4) for label in table["label"].to_pylist()]
    assert read == ["ant", "bee", "cat", "ant"]


# ---------------------------------------------------------------------------------------------------------- labels


def test_numbers_as_names_are_numbers(tmp_path):
    plant(tmp_path, *(f"{label}/0.png" for label in range(12)))
    assert load_images(tmp_path).class_names == tuple(map(str, range(12)))
    columns = {"image": [stored(picture(row)) for row in range(3)], "label": ["10", "9", "10"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert load_images(tmp_path / "x.parquet").labels.tolist() == [1, 0, 1]


def test_labels_are_joined_by_name():
    one = a_set(("cat", "dog", "owl"), [0, 1, 2, 0])
    other = a_set(("owl", "emu", "dog", "cat"), [0, 2, 3, 0])
    joined = join_labels({"train": one, "test": other})
    assert joined["train"] is one and joined["test"].class_names == one.class_names
    assert joined["test"].labels.tolist() == [2, 1, 0, 2]
    padded, bare = a_set(("08", "09", "10"), [0, 1, 2]), a_set(None, [8, 10, 9])
    assert join_labels({"train": padded, "test": bare})["test"].labels.tolist() == [0, 2, 1]
    bare = join_labels({"train": one, "test": a_set(None, [2, 0, 1])})["test"]
    assert bare.labels.tolist() == [2, 0, 1] and bare.class_names == one.class_names
    subset = join_labels({"train": a_set(tuple("abcde"), [4, 1]), "test": a_set(tuple("edcba"), [3, 0])})
    assert [data.class_names for data in subset.values()] == [("b", "e")] * 2
    assert [data.labels.tolist() for data in subset.values()] == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (a_set(("cat", "dog"), [0, 1]), a_set(("Cat", "dog"), [0, 1]), "train has no image of class 'Cat'"),
        (a_set(("1", "2"), [0, 1]), a_set(None, [0, 1]), "train has no image of class '0'"),
        (a_set(("1", "01"), [0, 1]), a_set(None, [0, 1]), "train has the class '01' twice"),
        (a_set(("a", "b"), [0, 1]), a_set(None, [1, 2]), "test has label 2, but there are names for 2 classes"),
        (a_set(("a", "b"), [0, 0]), a_set(("a", "b"), [0, 0]), "train has images of one class only"),
    ],
)
def test_labels_that_cannot_be_joined(one, other, words):
    with pytest.raises(ValueError, match=words):
        check_sets({"train": one, "test": other}, {})


@pytest.mark.parametrize("label", [5, -2])
def test_a_label_without_a_name_is_refused_in_shards_whose_names_differ(label, tmp_path):
    for part, (names, labels) in enumerate(((["a", "b"], [0, 1, 0]), (["b", "a"], [1, 0, label]))):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = pa.table({"image": [stored(picture(row)) for row in range(3)], "label": pa.array(labels, pa.int64())})
        rows = rows.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(rows, tmp_path / f"train-0000{part}-of-00002.parquet")
    refused(tmp_path, f"00001-of-00002.*has the label {label} in column 'label'; 0 to 1, and -1")


def test_parts_are_numbered_from_0(tmp_path):
    for part in (1, 2):
        rows = pa.table({"image": [stored(picture(part))], "label": [part]})
        rows_to = tmp_path / f"train-0000{part}-of-00002.parquet"
        pq.write_table(rows, rows_to)
    refused(tmp_path, "train-00002-of-00002.parquet, but parts are numbered from 0: 00001 is the last")


def test_ids_of_arrays_are_texts(tmp_path):
    images = np.stack([picture(row) for row in range(2)])
    np.savez(tmp_path / "a.npz", images=images, ids=np.array([b"one", b"two"]))
    assert load_images(tmp_path / "a.npz").ids == ("one", "two")
    np.savez(tmp_path / "b.npz", images=images, ids=np.array([["one"], ["two"]]))
    refused(tmp_path / "b.npz", r"ids has shape \(2, 1\)")


def test_a_column_with_the_name_that_another_one_would_get(tmp_path):
    rows = pa.table({"image": [stored(picture(0)), stored(picture(1))], "label": [0, 1], "other_label": [1, 0]})
    pq.write_table(rows, tmp_path / "x.parquet")
    assert load_images(tmp_path / "x.parquet", label_column="other_label").labels.tolist() == [1, 0]


def test_spaces_behind_commas_make_no_classes(tmp_path):
    plant(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name, label\n0.png, cat\n1.png,cat\n2.png, dog\n")
    data = load_images(tmp_path)
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("labels", [["a", "  ", "b"], ["a", None, "b"], [1.0, float("nan"), 2.0]])
def test_missing_labels_are_no_class(tmp_path, labels):
    pq.write_table(
        pa.table({"image": [stored(picture(row)) for row in range(3)], "label": labels}), tmp_path / "x.parquet"
    )
    refused(tmp_path / "x.parquet", "lacks 1 of 3 labels .* 'train/1'")


def test_originals_in_another_order_are_refused():
    clean = a_set(None, [0, 1] * 10, "train/")
    noisy = clean.with_images((clean.images.astype(int) + 5).clip(0, 255).astype(np.uint8))
    assert np.array_equal(match_originals(clean, noisy).images, clean.images)
    for rows in (np.arange(20)[::-1], np.roll(np.arange(20), 2), np.arange(20) ^ 1):
        with pytest.raises(ValueError, match="clean has .* they do not resemble, the first 'train/"):
            match_originals(clean, noisy.with_images(noisy.images[rows]))
    # A part of the rows is enough: whoever adds a picture moves those that follow.
    part = np.r_[np.arange(14), np.roll(np.arange(14, 20), 1)]
    with pytest.raises(ValueError, match="clean has 6 images .* the first 'train/14'"):
        match_originals(clean, noisy.with_images(noisy.images[part]))


def test_originals_are_found_by_the_names_of_their_files_where_ids_are_row_numbers():
    """Those of the protected set were given, by the tool that wrote it; a picture was added to the originals since."""
    clean = replace(a_set(None, [0, 1] * 10, "train/"), id_space="folder")
    clean = replace(clean, files=tuple(f"{row:02d}.png" for row in range(20)))
    before = clean.subset(np.delete(np.arange(20), 3))
    ids = tuple(f"train/{row}" for row in range(19))
    protected = replace(before, ids=ids, id_space="", files=tuple(f"{name[:2]}.webp" for name in before.files))
    assert np.array_equal(match_originals(clean, protected).images, before.images)
    assert len(with_originals(protected, clean.subset(np.arange(10)))) == 9


# ------------------------------------------------------------------------------------------------------- passed over


def test_what_is_passed_over_is_said_once(tmp_path, caplog):
    plant(tmp_path, "0.jfif", "1.JPE", "b/2.dib")
    (tmp_path / "b").rename(tmp_path / "flat")
    (tmp_path / "flat" / "2.dib").rename(tmp_path / "2.dib")
    for name in ("3.avif", "4.mp4", "5.avif"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    os.symlink(tmp_path / "nothing.png", tmp_path / "6.png")
    os.mkfifo(tmp_path / "7.png")
    with caplog.at_level(logging.INFO, logger="jcdp_diffusers"):
        assert len(load_images(tmp_path)) == len(load_images(tmp_path)) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "3 images of split 'train' read, 5 passed over: 2, the first '3.avif' (.avif files are not read here)" in said
    )
    assert "'4.mp4'" in said and "'6.png' (a link to nothing)" in said and "'7.png' (no regular file)" in said


@pytest.mark.parametrize("written", ["sub\\0.png", "./sub/./0.png", "other/../sub/0.png", " sub/0.png"])
def test_metadata_may_write_a_path_in_any_usual_way(tmp_path, written):
    plant(tmp_path, "sub/0.png")
    (tmp_path / "metadata.csv").write_text(f"file_name, label\n{written},7\n")
    assert load_images(tmp_path).labels.tolist() == [7]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("../secret.png", "lies outside of its folder"),
        ("/etc/passwd", "lies outside of its folder"),
        ("file:///etc/passwd", "is a URL"),
        ("0.avif", "is no image that can be read"),
        ("9.png", "does not exist"),
        ("", "a file_name in every row"),
        ("./0.png\n0.png", "names '0.png' twice"),
    ],
)
def test_metadata_that_names_something_else_is_an_error(tmp_path, written, words):
    plant(tmp_path / "d", "0.png")
    plant(tmp_path, "secret.png")
    (tmp_path / "d" / "0.avif").write_bytes(b"avif")
    rows = [f'{{"file_name": "{name}", "label": 1}}' for name in written.split("\n")]
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(rows))
    refused(tmp_path / "d", words)


def test_only_an_empty_field_is_a_missing_label(tmp_path):
    for row in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{row}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,note\n0.png,NA,null\n1.png, null,\n2.png,yes,x\n")
    found = load_images(tmp_path)
    assert [found.class_names[label] for label in found.labels] == ["NA", "null", "yes"]
    assert [row["note"] for row in open_dataset(tmp_path)] == ["null", None, "x"]
    (tmp_path / "metadata.csv").write_text('file_name,label\n0.png,NA\n1.png,""\n2.png,yes\n')
    with pytest.raises(ValueError, match="lacks 1 of 3 labels"):
        load_images(tmp_path)


def test_metadata_in_several_folders_and_in_two_alphabets(tmp_path):
    plant(tmp_path, "train/é.png", "test/ü.png", "test/v.png")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "e\\u0301.png", "label": "a"}')
    (tmp_path / "test/metadata.jsonl").write_text(
        '{"file_name": "u\\u0308.png", "label": "b"}\n{"file_name": "v.png", "label": "a"}'
    )
    data = load_images(tmp_path, split="test")
    assert [data.class_names[label] for label in data.labels] == ["a", "b"]  # "v" comes before "ü"
    assert load_images(tmp_path, split="train").class_names == ("a",)


def test_a_column_that_looks_like_labels_is_said(tmp_path, caplog):
    pq.write_table(pa.table({"image": [stored(picture(0))], "category": ["cat"]}), tmp_path / "x.parquet")
    with caplog.at_level(logging.WARNING):
        load_images(tmp_path / "x.parquet")
    assert "has no label column, but 'category', which label_column can name" in caplog.text


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_labels_of_metadata_count_and_class_folders_beside_them_do_not(column, tmp_path):
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(f"file_name,{column}\ncat/0.png,7\ndog/1.png,7\n")
    found = load_images(tmp_path)
    assert found.labels.tolist() == [7, 7] and found.class_names is None


# ---------------------------------------------------------------------------------------------------- files elsewhere


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(stored(picture(99)))
    return path


@pytest.mark.parametrize("form", ["struct", "text", "relative", "file", "github", "link"])
@pytest.mark.parametrize("where", ["image", "img"])
def test_rows_that_point_to_other_files_are_set_aside(tmp_path, secret, form, where):
    folder = tmp_path / "d"
    folder.mkdir()
    os.symlink(secret, folder / "link.png")
    paths = {"relative": "../secret.png", "file": f"file://{secret}", "github": f"github://a:b@c/{secret}"}
    path = paths.get(form, str(folder / "link.png") if form == "link" else str(secret))
    good = stored(picture(1))
    if form == "text":
        (folder / "good.png").write_bytes(good)
        table = pa.table({where: [path, "good.png"], "label": [0, 1]})
    else:
        values = [{"bytes": None, "path": path}, {"bytes": good, "path": path}]
        table = pa.table(
            {where: pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": [0, 1]}
        )
    pq.write_table(table, folder / "train.parquet")
    for source in (folder, folder / "train.parquet"):
        for given in (source, open_dataset(source), open_dataset(source, streaming=True)):
            rejected = []
            data = load_images(given, rejected=rejected)
            assert data.labels.tolist() == [1] and np.array_equal(data.images[0], picture(1))
            assert "which is no file below its source" in rejected[0]["reason"]
        for table in open_rows(source).read(0, 2):
            assert secret.read_bytes() not in repr(table.to_pylist()).encode("latin-1", "replace")
            assert all(value is None or value["bytes"] != secret.read_bytes() for value in table["image"].to_pylist())


def test_rows_may_point_to_files_below_their_source(tmp_path):
    plant(tmp_path, "images/0.png", "images/1.png")
    values = [{"bytes": None, "path": "images/1.png"}, {"bytes": None, "path": str(tmp_path / "images/0.png")}]
    column = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": column}), tmp_path / "train.parquet")
    assert np.array_equal(load_images(tmp_path).images, np.stack([picture(1), picture(0)]))


@pytest.mark.parametrize("target", ["file", "folder", "parquet"])
def test_links_out_of_a_folder_are_refused(tmp_path, secret, target):
    plant(tmp_path / "d", "0.png") if target != "parquet" else (tmp_path / "d").mkdir()
    if target == "file":
        os.symlink(secret, tmp_path / "d" / "1.png")
    elif target == "folder":
        plant(tmp_path / "private", "me.png")
        os.symlink(tmp_path / "private", tmp_path / "d" / "more")
    else:
        pq.write_table(pa.table({"image": [stored(picture(3))]}), tmp_path / "rows.parquet")
        os.symlink(tmp_path / "rows.parquet", tmp_path / "d" / "train.parquet")
    refused(tmp_path / "d", "holds the link '(1.png|more|train.parquet)' to")


def test_links_within_a_folder_and_the_cache_of_the_hub_are_followed(tmp_path):
    plant(tmp_path / "d", "pool.png")
    os.symlink("pool.png", tmp_path / "d" / "again.png")
    assert len(load_images(tmp_path / "d")) == 2
    repository = tmp_path / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"image": [stored(picture(3))]}), repository / "blobs" / "0123")
    os.symlink("../../../blobs/0123", repository / "snapshots" / "abc" / "data" / "train-00000-of-00001.parquet")
    assert len(load_images(repository / "snapshots" / "abc")) == 1


@pytest.mark.parametrize("links", [[("a/loop", "..")], [("a/self", ".")], [("a/x", "../b"), ("b/y", "../a")]])
def test_circles_of_links_end(tmp_path, links):
    plant(tmp_path, "a/0.png", "b/1.png")
    for name, target in links:
        os.symlink(target, tmp_path / name)
    if len(links) == 2:
        refused(tmp_path, "holds the link")
    else:
        assert len(load_images(tmp_path)) == 2


# ----------------------------------------------------------------------------------------------------- damaged files


def damaged_exif(kind):
    if kind == "rational text":
        entries = struct.pack(">HHII", 0x010F, 5, 1, 38) + struct.pack(">HHIHH", 0x0112, 3, 1, 8, 0)
        body = struct.pack(">H", 2) + entries + struct.pack(">I", 0) + struct.pack(">II", 72, 1)
    elif kind == "date of numbers":
        entries = struct.pack(">HHII", 0x0132, 10, 1, 38) + struct.pack(">HHIHH", 0x0112, 3, 1, 8, 0)
        body = struct.pack(">H", 2) + entries + struct.pack(">I", 0) + struct.pack(">ii", -1, 0)
    else:  # the orientation as a text
        body = struct.pack(">H", 1) + struct.pack(">HHI4s", 0x0112, 2, 4, b"ab\0\0") + struct.pack(">I", 0)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + body


@pytest.mark.parametrize("kind", ["rational text", "date of numbers", "orientation of text"])
def test_damaged_exif_concerns_one_image(tmp_path, kind):
    plant(tmp_path, "0.png")
    (tmp_path / "1.jpg").write_bytes(stored(picture(1), "JPEG", exif=damaged_exif(kind)))
    rejected = []
    data = load_images(tmp_path, rejected=rejected)
    assert len(data) + len(rejected) == 2 and all(entry["file"] == "1.jpg" for entry in rejected)
    if kind != "orientation of text":  # the orientation itself is sound
        plain = decode_image(stored(picture(1), "JPEG"))
        assert np.array_equal(data.images[1], np.rot90(plain))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("content", [b"Exif\0\0garbage", b"Exif\0\0II*\0", "cut"])
def test_an_image_whose_orientation_cannot_be_known_is_set_aside(content, image_format):
    if content == "cut":  # within the entry of the orientation
        exif = Image.Exif()
        exif[0x0112] = 6
        content = exif.tobytes()[:-10]
    with pytest.raises(ImageRejected, match="damaged"):
        decode_image(stored(picture(1), image_format, exif=content))


@pytest.mark.parametrize("orientation", (1, 3, 6, 8))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_the_size_in_the_header_is_that_of_the_decoded_image(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = {"bytes": stored(np.zeros((5, 7, 3), np.uint8), image_format, exif=exif), "path": None}
    height, width = decode_image(value).shape[:2]
    assert picture_size(value) == (width, height)


def test_sixteen_bits_of_a_pixel_are_no_sixteen_bits_of_a_channel():
    """A bitmap of 2x1 pixels with five bits of red, six of green and five of blue."""
    pixels = struct.pack("<HH", 0b11111_000000_00000, 0b00000_111111_00000)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    start = 14 + len(header) + len(masks)
    content = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + pixels
    assert decode_image(content).tolist() == [[[255, 0, 0], [0, 255, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8), exif=exif)
    assert np.array_equal(decode_image(content), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))))


def test_a_png_with_a_wrong_checksum_is_rejected():
    content = bytearray(stored(picture(0), compress_level=0))
    content[content.index(b"IDAT") + 20] ^= 1  # one level of one pixel
    with pytest.raises(ImageRejected, match="damaged"):
        decode_image(bytes(content))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 27\n"


@pytest.mark.parametrize("name", ["0.png", "train.parquet", "all.npz", "all.npy"])
def test_pointers_of_git_are_called_so(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    source = tmp_path if name[-3:] in ("png", "uet") else tmp_path / name
    refused(source, f"{name}.* Git LFS pointer")


def test_devices_and_pipes_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ImageRejected, match="no regular file"):
            decode_image({"bytes": None, "path": str(path)})


def npz_of_zeros(path, size):
    """A small archive whose array unpacks to `size` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (size // 48, 4, 4, 3)}
        )
        for _ in range(size // 2**22):
            file.write(bytes(2**22))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("shape", ["(9999999999999, 32, 32, 3)", "(2, 4, 4, 30)", "(-1, 4, 4, 3)"])
def test_headers_that_promise_more_than_there_is(tmp_path, suffix, shape):
    file = io.BytesIO()
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(96))
    path = tmp_path / f"all{suffix}"
    if suffix == ".npy":
        path.write_bytes(file.getvalue())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", file.getvalue())
    refused(path, f"all{suffix}' is no NumPy file .* promises")


def test_archives_that_grow_without_end(tmp_path, monkeypatch):
    from jcdp_diffusers.data import arrays

    monkeypatch.setattr(arrays, "MAX_UNPACKED", 2**23)
    npz_of_zeros(tmp_path / "bomb.npz", 2**24)
    refused(tmp_path / "bomb.npz", "bomb.npz' .* images.npy grows from .* at most 20 times")
    np.savez_compressed(tmp_path / "small.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    assert len(load_images(tmp_path / "small.npz")) == 2


def test_labels_of_arrays_have_one_of_the_usual_names(tmp_path):
    images = np.stack([picture(0), picture(1)])
    for name in ("targets", "y", "target"):
        np.savez(tmp_path / "a.npz", images=images, **{name: np.array([0, 1])})
        assert load_images(tmp_path / "a.npz").labels.tolist() == [0, 1]
    np.savez(tmp_path / "a.npz", images=images, klass=np.array([0, 1]))
    refused(tmp_path / "a.npz", "has the arrays images, klass; images, ids and one of")
    np.savez(tmp_path / "a.npz", images=images, label=np.array([0, 1]), y=np.array([1, 0]))
    refused(tmp_path / "a.npz", "has the arrays images, label, y;")


@pytest.mark.parametrize("excess", [1e-7, 5e-5])
def test_rounding_beyond_one_is_accepted_and_more_is_shown(excess):
    images = np.stack([picture(0), picture(1)]) / 255.0
    images[0, 0, 0, 0], images[1, 1, 1, 1] = 1 + excess, -excess
    expected = np.rint(images.clip(0, 1) * 255)
    assert np.array_equal(load_images((images, None)).images, expected)
    images[0, 0, 0, 0] = 1.0003
    refused((images, None), r"to 1\.0003;")


def test_names_that_are_not_utf8_are_named(tmp_path):
    plant(tmp_path, "a/0.png", "b/1.png")
    os.rename(os.fsencode(tmp_path / "b" / "1.png"), os.fsencode(tmp_path / "b") + b"/ni\xf1o.png")
    refused(tmp_path, r"b/ni\\udcf1o.png', whose name is not UTF-8")


def test_opaque_alpha_is_no_transparency():
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(picture(0)).convert(mode)
        assert np.array_equal(decode_image(stored(image)), np.asarray(image.convert("RGB")))
        changes = []
        decode_image(stored(image), changes=changes)
        assert changes == []
        image.putalpha(254)
        decode_image(stored(image), changes=changes)
        assert changes == ["transparency laid over white"]
