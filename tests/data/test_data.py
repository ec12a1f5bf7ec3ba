"""data/ against sources made on the spot with NumPy, Pillow, pyarrow and datasets."""

import dataclasses
import io
import struct
import time
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from jcdp_diffusers.data import (
    ImageRejected,
    LabelledImages,
    check_roles,
    decode_image,
    find_overlap,
    load_images,
    open_dataset,
    to_uint8,
    write_dataset,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def random_images(count, height=6, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def labelled(count=7, seed=0, prefix="x", **sizes):
    labels = np.arange(count) % 3
    ids = tuple(f"{prefix}{index}" for index in range(count))
    return LabelledImages(random_images(count, seed=seed, **sizes), labels, ids, ("ant", "bee", "cat"))


def encoded(picture, image_format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(array, **options):
    return encoded(Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]), **options)


def save_all(images, folder, names):
    for image, name in zip(images, names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))


def same(one, other):
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and one.ids == other.ids
        and one.class_names == other.class_names
    )


# --------------------------------------------------------------------------------------------------- LabelledImages


def test_subset_and_with_images_keep_rows_aligned():
    data = labelled()
    part = data.subset([5, 0, 3])
    assert part.ids == ("x5", "x0", "x3") and part.labels.tolist() == [2, 0, 0]
    assert np.array_equal(part.images, data.images[[5, 0, 3]])
    mask = data.labels == 1
    assert data.subset(mask).ids == ("x1", "x4")
    other = data.with_images(255 - data.images)
    assert other.ids == data.ids and np.array_equal(other.images, 255 - data.images)
    assert len(data) == 7 and data.labels.dtype == np.int64


def test_tensor_and_back_is_exact_for_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    data = LabelledImages(levels, None, ("a",))
    tensor = data.tensor()
    assert tensor.shape == (1, 1, 16, 16) and tensor.dtype == torch.float32 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), levels)
    colours = labelled()
    assert np.array_equal(to_uint8(colours.tensor()), colours.images)


def test_to_uint8_clips_and_rounds_once():
    values = torch.tensor([-0.3, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.7]).view(1, 1, 2, 3)
    assert to_uint8(values).ravel().tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "images has dtype torch.uint8; floats in"),
        (torch.zeros(1, 2, 2, 3), r"images has shape \(1, 2, 2, 3\); \(N, 1 or 3, H, W\)"),
        (torch.full((1, 3, 2, 2), float("nan")), "images holds NaN or infinity"),
    ],
)
def test_to_uint8_refuses(images, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_uint8(images)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": np.zeros((7, 6, 8, 3))}, "images is of type float64; a uint8 array is accepted"),
        ({"images": np.zeros((7, 3, 6, 8), np.uint8)}, r"images has shape \(7, 3, 6, 8\); \(N, H, W, 1 or 3\)"),
        ({"images": np.zeros((0, 6, 8, 3), np.uint8), "ids": (), "labels": None}, "images is empty"),
        ({"ids": ("a", "b")}, "ids has 2 entries for 7 images"),
        ({"ids": ("a",) * 7}, "ids holds 'a' more than once"),
        ({"ids": tuple(range(7))}, "ids holds 0; strings are accepted"),
        ({"labels": np.zeros(6, int)}, r"labels has shape \(6,\) for 7 images"),
        ({"labels": np.zeros(7)}, "labels has dtype float64; integers are accepted"),
        ({"labels": np.array([0, 1, -1, 0, 0, 0, 0])}, "labels has -1 at id 'x2'"),
        ({"labels": np.full(7, 3)}, "labels goes up to 3 but class_names has 3 entries"),
    ],
)
def test_labelled_images_refuses(changes, sentence):
    data = labelled()
    fields = {"images": data.images, "labels": data.labels, "ids": data.ids, "class_names": data.class_names}
    with pytest.raises(ValueError, match=sentence):
        LabelledImages(**{**fields, **changes})


def test_subset_refuses_nothing_and_other_masks():
    with pytest.raises(ValueError, match="indices selects no image"):
        labelled().subset([])
    with pytest.raises(ValueError, match=r"indices is a mask of shape \(3,\); \(7,\) is accepted"):
        labelled().subset(np.ones(3, bool))


# ------------------------------------------------------------------------------------------------------ decode_image


def deep_png(width, height, depth, colour_type, rows=b""):
    """A PNG written by hand, because Pillow writes no 16-bit colour and no bombs."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in chunks)


PICTURE = Image.fromarray(random_images(1, 40, 48)[0])
BLACK = Image.new("RGB", PICTURE.size)
FRAMES = {"save_all": True, "append_images": [BLACK]}

BAD_IMAGES = {
    "truncated png": (encoded(PICTURE)[:-2000], "damaged or truncated"),
    "truncated jpeg": (encoded(PICTURE, "JPEG")[:-500], "damaged or truncated"),
    "truncated webp": (encoded(PICTURE, "WEBP", lossless=True)[:-500], "damaged or truncated"),
    "flipped bytes": (encoded(PICTURE)[:60] + b"\xff" * 9 + encoded(PICTURE)[69:], "damaged or truncated"),
    "tiff header": (b"II*\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00", "damaged or truncated|not a readable image"),
    "zero bytes": (b"", "empty file"),
    "text": (b"<html>not found</html>", "not a readable image"),
    "null": ({"bytes": None, "path": None}, "no image"),
    "missing file": ({"bytes": None, "path": "/no/such/file.png"}, "cannot be read .*No such file"),
    "cmyk": (encoded(PICTURE.convert("CMYK"), "JPEG"), "colour space CMYK"),
    "16-bit grey": (encoded(Image.new("I;16", (4, 4), 700)), "16 bits per channel"),
    "16-bit colour": (deep_png(4, 4, 16, 2, (b"\0" + bytes(24)) * 4), "16 bits per channel"),
    "float": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "more than 8 bits per channel"),
    "animated gif": (encoded(PICTURE.quantize(16), "GIF", **FRAMES), r"animated or multi-page \(2 frames\)"),
    "animated webp": (encoded(PICTURE, "WEBP", **FRAMES), "animated"),
    "animated png": (encoded(PICTURE, **FRAMES), "animated"),
    "two pages": (encoded(PICTURE, "TIFF", **FRAMES), "multi-page"),
    "bomb": (deep_png(30_000, 30_000, 8, 2), "decompression bomb"),
    "smaller bomb": (deep_png(10_000, 10_000, 8, 2), "decompression bomb: 10000x10000"),
    "unknown format": (encoded(PICTURE, "PPM"), "not a readable image .PNG, JPEG"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_decode_image_rejects_with_the_reason(name):
    value, reason = BAD_IMAGES[name]
    with pytest.raises(ImageRejected, match=reason) as caught:
        decode_image(value)
    assert caught.value.reason == str(caught.value) and "\n" not in caught.value.reason


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about damaged TIFF headers
def test_damaged_bytes_of_every_format_never_raise_anything_else():
    rng = np.random.default_rng(0)
    formats = [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {}), ("TIFF", {})]
    for image_format, options in formats:
        good = encoded(PICTURE, image_format, **options)
        for _ in range(150):
            bad = bytearray(good)
            for place in rng.integers(0, min(len(bad), 150), size=3):
                bad[place] = rng.integers(0, 256)
            try:
                decode_image(bytes(bad[: rng.integers(1, 2 * len(bad))]))
            except ImageRejected:
                pass


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_decode_image_is_lossless(image_format):
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    assert np.array_equal(decode_image(encoded(PICTURE, image_format, **options)), np.asarray(PICTURE))


def test_decode_image_takes_bytes_dict_path_and_picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PICTURE))
    values = [path, str(path), path.read_bytes(), PICTURE]
    values += [{"bytes": path.read_bytes(), "path": "elsewhere.png"}, {"bytes": None, "path": str(path)}]
    for value in values:
        assert np.array_equal(decode_image(value), np.asarray(PICTURE))
    with pytest.raises(TypeError, match="value is a int; bytes, a path"):
        decode_image(3)


def test_decode_image_expands_what_loses_nothing():
    grey = PICTURE.convert("L")
    assert np.array_equal(decode_image(encoded(grey)), np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    assert np.array_equal(decode_image(encoded(grey), channels=1), np.asarray(grey)[:, :, None])
    assert np.array_equal(decode_image(encoded(grey.convert("RGB")), channels=1), np.asarray(grey)[:, :, None])
    palette = PICTURE.quantize(16)
    assert np.array_equal(decode_image(encoded(palette)), np.asarray(palette.convert("RGB")))
    bilevel = PICTURE.convert("1")
    assert np.array_equal(decode_image(encoded(bilevel), channels=1)[:, :, 0], np.asarray(bilevel) * np.uint8(255))
    # A phone's JPEG with a second picture behind the first is one photograph.
    assert np.array_equal(decode_image(encoded(BLACK, "MPO", **FRAMES)), np.asarray(BLACK))
    with pytest.raises(ImageRejected, match="colour, which would be dropped by channels=1"):
        decode_image(encoded(PICTURE), channels=1)


def test_decode_image_turns_photographs_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    upright = decode_image(encoded(PICTURE, exif=exif))
    assert np.array_equal(upright, np.rot90(np.asarray(PICTURE), -1))


def test_resizing_is_shorter_side_then_centre_crop():
    picture = PICTURE.resize((96, 64))
    # 96x64 -> 48x32 with the crop at a whole pixel: the two steps can be done one after the other here.
    expected = picture.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    assert np.array_equal(decode_image(picture, image_size=32), np.asarray(expected))
    assert decode_image(PICTURE, image_size=64).shape == (64, 64, 3)
    square = random_images(1, 16, 16)[0]
    assert np.array_equal(decode_image(png(square), image_size=16), square)
    thin = Image.new("L", (1, 50_000), 7)
    assert (decode_image(thin, image_size=64) == 7).all()


def test_decode_image_refuses_other_settings():
    with pytest.raises(ValueError, match="channels is 4; 1 and 3 are accepted"):
        decode_image(PICTURE, channels=4)
    with pytest.raises(ValueError, match="image_size is 0; 1 and above"):
        decode_image(PICTURE, image_size=0)


# ---------------------------------------------------------------------------------------------------- write and read


@pytest.mark.parametrize("channels", [1, 3])
def test_written_data_reads_back_the_same_bits(tmp_path, channels):
    data = labelled(10, channels=channels)
    paths = write_dataset(tmp_path, data, shards=3, columns={"score": np.arange(10) / 2, "note": ["n"] * 10})
    assert [path.name for path in paths] == [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    assert same(load_images(tmp_path, channels=channels), data)
    plain = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert plain.column_names == ["id", "image", "label", "score", "note"]
    assert plain.features["label"].names == ["ant", "bee", "cat"] and plain["score"][3] == 1.5
    pixels = np.stack([np.asarray(picture).reshape(6, 8, channels) for picture in plain["image"]])
    assert np.array_equal(pixels, data.images) and plain["id"][:] == list(data.ids)


def test_write_dataset_replaces_whole_files_only(tmp_path, monkeypatch):
    first, second = labelled(4, seed=1), labelled(4, seed=2)
    write_dataset(tmp_path, first)
    assert same(load_images(open_dataset(tmp_path)), first)
    write_dataset(tmp_path, second)
    assert same(load_images(tmp_path), second)
    assert same(load_images(open_dataset(tmp_path)), second)  # not the cached first one

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(tmp_path, first)
    assert len(list(tmp_path.iterdir())) == 1 and same(load_images(tmp_path), second)


def test_write_dataset_refuses(tmp_path):
    data = labelled(4)
    with pytest.raises(ValueError, match="shards is 5 for 4 images; 1 to 4"):
        write_dataset(tmp_path, data, shards=5)
    with pytest.raises(ValueError, match=r"columns\['x'\] has 3 values for 4 images"):
        write_dataset(tmp_path, data, columns={"x": [1, 2, 3]})
    with pytest.raises(ValueError, match="columns has 'label', which data itself provides"):
        write_dataset(tmp_path, data, columns={"label": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="split is 'a/b'; letters"):
        write_dataset(tmp_path, data, split="a/b")
    write_dataset(tmp_path, data, shards=2)
    with pytest.raises(FileExistsError, match="holds train-00000-of-00002.parquet, not one of 4 shards"):
        write_dataset(tmp_path, data, shards=4)
    write_dataset(tmp_path, data, split="test", shards=4)


def test_without_labels_there_is_no_label_column(tmp_path):
    data = LabelledImages(random_images(3), None, ("a", "b", "c"))
    write_dataset(tmp_path, data)
    assert open_dataset(tmp_path).column_names == ["id", "image"]
    assert load_images(tmp_path).labels is None


# ---------------------------------------------------------------------------------------------------------- sources


def write_parquet(path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))
    table = dataset.with_format("arrow")[:]
    pq.write_table(table.replace_schema_metadata(dataset.features.arrow_schema.metadata), path)


def cifar_like(path, images, labels, label="label"):
    write_parquet(
        path,
        {"img": [{"bytes": png(image), "path": None} for image in images], label: labels},
        {"img": datasets.Image(), label: datasets.ClassLabel(names=["ant", "bee"])},
    )


def test_parquet_folder_takes_names_splits_and_row_numbers(tmp_path):
    images = random_images(9)
    cifar_like(tmp_path / "train-00000-of-00002.parquet", images[:4], [0, 1, 0, 1], "fine_label")
    cifar_like(tmp_path / "train-00001-of-00002.parquet", images[4:7], [1, 1, 0], "fine_label")
    cifar_like(tmp_path / "test-00000-of-00001.parquet", images[7:], [0, 0], "fine_label")
    data = load_images(tmp_path, split="train")
    assert data.ids == tuple(f"train/{row}" for row in range(7)) and data.class_names == ("ant", "bee")
    assert data.labels.tolist() == [0, 1, 0, 1, 1, 1, 0] and np.array_equal(data.images, images[:7])
    assert load_images(tmp_path, split="test").ids == ("test/0", "test/1")
    with pytest.raises(ValueError, match="several splits and split is None; test, train are accepted"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="split is 'validation', which source .* lacks; test, train are accepted"):
        open_dataset(tmp_path, split="validation")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 shards, the first 00000"):
        load_images(tmp_path, split="train")
    cifar_like(tmp_path / "train-00000-of-00001.parquet", images[:4], [0, 1, 0, 1], "fine_label")
    with pytest.raises(ValueError, match="mixes 1 and 2 shards"):
        load_images(tmp_path, split="train")


def test_a_set_that_was_downloaded_twice_is_not_read_as_one(tmp_path):
    """The Hub's older names end with a digest."""
    (tmp_path / "data").mkdir()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    for digest in ("0a1b2c3d", "9f8e7d6c"):
        cifar_like(tmp_path / f"data/train-00000-of-00001-{digest}.parquet", images, [0, 1, 0, 1], "fine_label")
    with pytest.raises(ValueError, match="0a1b2c3d.parquet and .*9f8e7d6c.parquet, which are the same part of a set"):
        load_images(tmp_path)


def test_a_path_is_no_pattern(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    for name, rows in (("set[1]", images[:4]), ("set1", images[4:])):
        (tmp_path / name).mkdir()
        cifar_like(tmp_path / name / "train-00000-of-00001.parquet", rows, [0, 1, 0, 1], "fine_label")
    opened = [decode_image(row["image"], 3) for row in open_dataset(tmp_path / "set[1]")]
    assert np.array_equal(opened, images[:4])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("anything.parquet", "train"),
        ("test.parquet", "test"),
        ("test-clean.parquet", "test"),
        ("data/validation-00000-of-00001-0a1b2c3d4e5f.parquet", "validation"),
        ("plain_text/test/0000.parquet", "test"),
        ("protected-00000-of-00001.parquet", "protected"),
    ],
)
def test_split_of_other_parquet_names(tmp_path, name, split):
    cifar_like(tmp_path / name, random_images(2), [0, 1])
    for source in (tmp_path, tmp_path / name):
        assert load_images(source).ids == (f"{split}/0", f"{split}/1")
        assert open_dataset(source)["id"][:] == [f"{split}/0", f"{split}/1"]


def test_parquet_of_bare_bytes_and_string_labels(tmp_path):
    images = random_images(3)
    columns = {"jpg": [png(image) for image in images], "kind": ["dog", "cat", "dog"], "key": [30, 10, 20]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    names = {"image_column": "jpg", "label_column": "kind", "id_column": "key"}
    data = load_images(tmp_path / "x.parquet", **names)
    assert data.ids == ("30", "10", "20") and data.class_names == ("cat", "dog") and data.labels.tolist() == [1, 0, 1]
    assert np.array_equal(data.images, images)
    assert open_dataset(tmp_path / "x.parquet", **names)["id"][:] == ["30", "10", "20"]


def test_columns_in_the_way_are_kept_under_another_name(tmp_path):
    images = random_images(4)
    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images[:2]],
        "poisoned": [{"bytes": png(image), "path": None} for image in images[2:]],
        "label": [0, 1],
        "note": ["a", "b"],
    }
    features = {"image": datasets.Image(), "poisoned": datasets.Image()}
    features |= {"label": datasets.Value("int64"), "note": datasets.Value("string")}
    write_parquet(tmp_path / "x.parquet", columns, features)
    for streaming in (False, True):
        dataset = open_dataset(tmp_path, image_column="poisoned", streaming=streaming)
        assert list(dataset.features) == ["id", "image", "label", "other_image", "note"]
        row = next(iter(dataset))
        assert np.array_equal(decode_image(row["image"]), images[2]) and row["note"] == "a"
        assert np.array_equal(decode_image(row["other_image"]), images[0])


def image_folder(tmp_path):
    images = random_images(6)
    names = ["cat/1.png", "cat/2.png", "cat/10.png", "dog/a.PNG", "dog/x9/b.png", "dog/x10/a.png"]
    save_all(images, tmp_path, names)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return images, names


def test_image_folder_of_classes_in_natural_order(tmp_path):
    images, names = image_folder(tmp_path)
    data = load_images(tmp_path)
    assert np.array_equal(data.images, images) and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.class_names == ("cat", "dog") and data.ids == tuple(f"train/{row}" for row in range(6))
    dataset = open_dataset(tmp_path)
    assert dataset.column_names == ["id", "image", "label", "file_name"] and dataset["file_name"][:] == names


def test_flat_image_folder_has_no_labels_and_keeps_metadata(tmp_path):
    images = random_images(3)
    save_all(images, tmp_path, ["1.png", "2.png", "10.png"])
    assert load_images(tmp_path).labels is None
    (tmp_path / "metadata.csv").write_text("file_name,camera\n10.png,B\n1.png,A\n")
    dataset = open_dataset(tmp_path)
    assert dataset["camera"][:] == ["A", None, "B"] and dataset["file_name"][:] == ["1.png", "2.png", "10.png"]
    (tmp_path / "metadata.csv").unlink()
    lines = [
        '{"file_name": "%d.png", "label": "%s", "id": "k%d"}' % (n, c, n) for n, c in ((10, "b"), (1, "b"), (2, "a"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = load_images(tmp_path)
    assert data.ids == ("k1", "k2", "k10") and data.labels.tolist() == [1, 0, 1] and data.class_names == ("a", "b")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "7.png"}')
    with pytest.raises(ValueError, match="names '7.png', which does not exist"):
        open_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file": "1.png"}')
    with pytest.raises(ValueError, match="has the columns file; file_name is needed"):
        open_dataset(tmp_path)


def test_image_folder_with_splits_numbers_classes_over_all_of_them(tmp_path):
    images = random_images(3)
    save_all(images, tmp_path, ["train/a/0.png", "train/b/0.png", "test/b/0.png"])
    data = load_images(tmp_path, split="test")
    assert data.labels.tolist() == [1] and data.class_names == ("a", "b") and data.ids == ("test/0",)
    with pytest.raises(ValueError, match="several splits and split is None; test, train"):
        load_images(tmp_path)


def test_image_folder_refuses_a_mixture_and_emptiness(tmp_path):
    with pytest.raises(ValueError, match="holds no Parquet file and no image; .png, .jpg"):
        load_images(tmp_path)
    save_all(random_images(2), tmp_path / "hole", ["train/a/0.png", "train/b/0.png"])
    (tmp_path / "hole/train/c").mkdir()
    with pytest.raises(ValueError, match="has the class folder 'c' without an image"):
        load_images(tmp_path / "hole", split="train")
    save_all(random_images(2), tmp_path / "mixed", ["a/0.png", "1.png"])
    with pytest.raises(ValueError, match="holds 1.png beside class folders"):
        load_images(tmp_path / "mixed")


def test_numpy_files(tmp_path):
    data = labelled()
    np.savez(tmp_path / "a.npz", images=data.images, labels=data.labels.astype(np.int32), ids=np.array(data.ids))
    read = load_images(tmp_path / "a.npz")
    assert same(read, LabelledImages(data.images, data.labels, data.ids))
    np.save(tmp_path / "b.npy", data.images)
    read = load_images(str(tmp_path / "b.npy"), split="val")
    assert read.labels is None and read.ids[6] == "val/6" and np.array_equal(read.images, data.images)
    dataset = open_dataset(tmp_path / "a.npz")
    assert dataset.column_names == ["id", "image", "label"]
    assert np.array_equal(decode_image(dataset[5]["image"]), data.images[5])

    np.savez(tmp_path / "c.npz", x=data.images)
    with pytest.raises(ValueError, match="has the arrays x; images, ids and one of labels"):
        load_images(tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="is no NumPy file without pickles"):
        load_images(tmp_path / "d.npy")
    (tmp_path / "e.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="is no NumPy file"):
        load_images(tmp_path / "e.npz")


def test_pair_of_arrays_floats_are_rounded():
    data = labelled()
    read = load_images((data.images / 255.0, data.labels.astype(np.uint8)))
    assert np.array_equal(read.images, data.images) and read.labels.dtype == np.int64
    assert read.ids[:2] == ("train/0", "train/1")
    assert load_images(data) is data
    assert load_images((data.images, None)).labels is None


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ((np.full((2, 4, 4, 3), np.nan), None), "images holds NaN or infinity"),
        ((np.full((2, 4, 4, 3), 128.0), None), "images goes from 128 to 128; uint8 and floats in"),
        ((np.zeros((2, 4, 4, 3), np.int64), None), "images is of type int64; a uint8 array"),
        ((np.zeros((2, 3, 4, 4), np.uint8), None), r"images has shape \(2, 3, 4, 4\)"),
        ((np.zeros((2, 4, 4), np.uint8), None), r"images has shape \(2, 4, 4\)"),
        ((np.zeros((0, 4, 4, 3), np.uint8), None), "images is empty"),
        ((np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int)), r"labels has shape \(3,\) for 2 images"),
        ((np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1])), "labels has -1 at id 'train/1'"),
        ((np.zeros((2, 4, 4, 3), np.uint8), np.array([0, None])), "labels has dtype object"),
    ],
)
def test_arrays_refused(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_images(source)


def test_arrays_are_brought_to_channels_and_size():
    grey = LabelledImages(random_images(2, 16, 16, 1), None, ("a", "b"))
    assert np.array_equal(load_images(grey).images, np.repeat(grey.images, 3, axis=3))
    assert load_images(grey, channels=1, image_size=8).images.shape == (2, 8, 8, 1)
    colour = labelled(3)
    with pytest.raises(ValueError, match="id 'x0': colour, which would be dropped by channels=1"):
        load_images(colour, channels=1)
    mixed = colour.with_images(np.concatenate([np.repeat(random_images(1, channels=1), 3, axis=3), colour.images[1:]]))
    rejected = []
    assert load_images(mixed, channels=1, rejected=rejected).ids == ("x0",)
    assert [entry["id"] for entry in rejected] == ["x1", "x2"]


def test_datasets_objects_keep_ids_through_shuffle_and_filter(tmp_path):
    images = random_images(20)
    cifar_like(tmp_path / "train-0.parquet", images, list(np.arange(20) % 2))
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, datasets.Dataset) and dataset.features["image"] == datasets.Image(decode=False)
    mixed = dataset.shuffle(seed=3).filter(lambda row: row["label"] == 1)
    data = load_images(mixed)
    assert len(data) == 10 and data.ids != tuple(sorted(data.ids))
    for id_, image in zip(data.ids, data.images):
        assert np.array_equal(image, images[int(id_.split("/")[1])])

    decoding = datasets.load_dataset("parquet", data_files=str(tmp_path / "train-0.parquet"))
    assert np.array_equal(load_images(decoding).images, images)  # a DatasetDict of one split
    assert load_images(decoding["train"].select(range(3)), split="part").ids == ("part/0", "part/1", "part/2")


@pytest.mark.parametrize("with_features", [True, False])
def test_a_file_in_the_working_directory_never_replaces_stored_bytes(tmp_path, monkeypatch, with_features):
    image, other = random_images(2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "1.png").write_bytes(png(other))
    monkeypatch.chdir(tmp_path / "here")
    features = datasets.Features({"img": datasets.Image()})
    table = pa.Table.from_pydict({"img": [{"bytes": png(image), "path": "1.png"}]}, schema=features.arrow_schema)
    pq.write_table(table if with_features else table.replace_schema_metadata(None), tmp_path / "x.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", streaming=True)
    for source in (tmp_path, open_dataset(tmp_path), open_dataset(tmp_path, streaming=True), stream):
        assert np.array_equal(load_images(source).images[0], image)


@pytest.mark.parametrize("ids_in_source", [False, True])
def test_streams_keep_ids_under_sharding_and_shuffling(tmp_path, ids_in_source):
    images = random_images(24)
    if ids_in_source:
        data = LabelledImages(images, np.arange(24), tuple(f"train/{row}" for row in range(24)))
        write_dataset(tmp_path, data, shards=4)
    else:
        for shard in range(4):
            part = images[6 * shard : 6 * shard + 6]
            cifar_like(tmp_path / f"train-{shard:05d}-of-00004.parquet", part, [0] * 6)
    stream = open_dataset(tmp_path, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["id"] for row in stream] == [f"train/{row}" for row in range(24)]
    rows = [row for rank in (0, 1) for row in split_dataset_by_node(stream.shuffle(seed=1, buffer_size=5), rank, 2)]
    assert len(rows) == 24 and len({row["id"] for row in rows}) == 24
    for row in rows:
        assert np.array_equal(decode_image(row["image"]), images[int(row["id"].split("/")[1])])


def test_any_stream_gets_row_numbers_that_survive_sharding():
    images = random_images(12)
    columns = {"img": [Image.fromarray(image) for image in images], "n": list(range(12))}
    source = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=3)
    stream = open_dataset(source)
    assert [(row["id"], row["n"]) for row in stream] == [(f"train/{row}", row) for row in range(12)]
    rows = [row for rank in (0, 1) for row in split_dataset_by_node(stream.shuffle(seed=1), rank, 2)]
    assert sorted(row["n"] for row in rows) == list(range(12))
    assert all(row["id"] == f"train/{row['n']}" for row in rows)
    assert np.array_equal(load_images(source).images, images)


def test_sources_refused(tmp_path):
    with pytest.raises(TypeError, match="source is a int; a path, a Hub id"):
        load_images(3)
    with pytest.raises(FileNotFoundError, match="source '/no/such/folder' does not exist"):
        load_images("/no/such/folder")
    with pytest.raises(FileNotFoundError, match="source 'absent.npz' does not exist"):
        load_images("absent.npz")
    with pytest.raises(FileNotFoundError, match="'no-one/nothing' is no folder or file here and could not be loaded"):
        load_images("no-one/nothing", split="train")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="is a .txt file; .parquet, .npz and .npy are accepted"):
        load_images(tmp_path / "x.txt")
    cifar_like(tmp_path / "train-0.parquet", random_images(2), [0, 1])
    with pytest.raises(ValueError, match="label_column is 'breed', which source .* lacks; img, label are accepted"):
        load_images(tmp_path, label_column="breed")
    cifar_like(tmp_path / "train-1.parquet", random_images(2), [0, 1], "labels")
    with pytest.raises(ValueError, match="has the columns img, labels; those of train-0.parquet are accepted"):
        load_images(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-1.parquet' is no readable Parquet file"):
        load_images(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_refused(tmp_path, streaming):
    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), path)
    with pytest.raises(ValueError, match="has no image column among picture, label; image, img or the one"):
        open_dataset(path, streaming=streaming)
    pq.write_table(pa.table({"image": [[1, 2]], "label": [0]}), path)
    with pytest.raises(
        ValueError, match="has an image column of type .*int64.*; images, the bytes of files and paths"
    ):
        open_dataset(path, streaming=streaming)


@pytest.mark.parametrize(
    ("ids", "sentence"), [(["a", "b", "a"], "ids holds 'a' more than once"), (["a", None, "b"], "ids holds None")]
)
def test_ids_refused(tmp_path, ids, sentence):
    pq.write_table(pa.table({"image": [png(image) for image in random_images(3)], "id": ids}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=sentence):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_images(tmp_path)


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("url", [False, True])
def test_images_that_pandas_wrote(url, missing, tmp_path):
    """It gives a path that is never there no type."""
    images = random_images(5)
    stored = [None if row < missing else {"bytes": png(image), "path": None} for row, image in enumerate(images)]
    pq.write_table(
        pa.Table.from_pylist([{"image": one, "label": row % 2} for row, one in enumerate(stored)]),
        tmp_path / "train-0.parquet",
    )
    source = f"file://{tmp_path}" if url else tmp_path
    rejected = []
    data = load_images(source, split="train", rejected=rejected)
    assert np.array_equal(data.images, images[missing:]) and len(rejected) == missing
    assert data.labels.tolist() == [row % 2 for row in range(missing, 5)]
    rows = open_dataset(source, split="train", streaming=True)
    assert [row["image"] is None for row in rows] == [row < missing for row in range(5)]


def test_labels_that_number_no_classes():
    with pytest.raises(ValueError, match="labels has 20240101 at id 'x0'; at most 999,999 is accepted"):
        dataclasses.replace(labelled(), labels=np.full(7, 20_240_101), class_names=None)


def test_missing_labels(tmp_path):
    images = random_images(3)
    cifar_like(tmp_path / "some.parquet", images, [0, -1, None])
    with pytest.raises(ValueError, match="lacks 2 of 3 labels .None, -1 or empty., the first at id 'train/1'"):
        load_images(tmp_path / "some.parquet")
    cifar_like(tmp_path / "none.parquet", images, [-1, -1, -1])
    assert load_images(tmp_path / "none.parquet").labels is None
    with pytest.raises(ValueError, match="lacks 3 of 3 labels"):
        load_images(tmp_path / "none.parquet", label_column="label")
    columns = {"image": [png(image) for image in images], "label": [0.5, 1.0, 2.0]}
    pq.write_table(pa.table(columns), tmp_path / "float.parquet")
    with pytest.raises(
        ValueError, match="the label column has the type .*float64.*; class labels, integers and strings"
    ):
        load_images(tmp_path / "float.parquet")


def test_empty_set(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "x.parquet")
    for read in (load_images, open_dataset):
        with pytest.raises(ValueError, match="has no rows in split 'train'; at least one"):
            read(tmp_path)
    empty = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"source \(Dataset\) has no rows in split 'train'"):
        load_images(empty)
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="has no image that can be used; at least one is accepted"):
        load_images(tmp_path, rejected=[])


def test_mixed_sizes_ask_for_image_size(tmp_path):
    save_all(
        [random_images(1, 20, 30)[0], random_images(1, 8, 9)[0], random_images(1, 20, 30)[0]],
        tmp_path,
        ["0.png", "1.png", "2.png"],
    )
    with pytest.raises(
        ValueError, match=r"have 2 sizes, from 9x8 \(id 'train/1'\) to 30x20 \(id 'train/0'\); .*image_size"
    ):
        load_images(tmp_path)
    assert load_images(tmp_path, image_size=8).images.shape == (3, 8, 8, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named_or_set_aside(tmp_path):
    good = random_images(2, 40, 48)
    values = (
        [png(good[0])]
        + [value if isinstance(value, bytes) else None for value, _ in BAD_IMAGES.values()]
        + [png(good[1])]
    )
    labels = list(range(len(values)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [{"bytes": value, "path": None} for value in values], "label": labels}
    pq.write_table(pa.Table.from_pydict(columns, schema=features.arrow_schema), tmp_path / "x.parquet")
    first_reason = next(iter(BAD_IMAGES.values()))[1]
    with pytest.raises(ValueError, match=f"cannot be used, id 'train/1': {first_reason}.*\\.$"):
        load_images(tmp_path)
    for source in (tmp_path, open_dataset(tmp_path)):
        rejected = []
        data = load_images(source, rejected=rejected)
        assert data.ids == ("train/0", f"train/{len(values) - 1}") and data.labels.tolist() == [0, len(values) - 1]
        assert np.array_equal(data.images, good) and len(data) + len(rejected) == len(values)
        assert [entry["id"] for entry in rejected] == [f"train/{row}" for row in range(1, len(values) - 1)]
        assert all(set(entry) == {"id", "file", "reason"} and entry["reason"] for entry in rejected)


def test_bad_files_are_named_by_their_paths(tmp_path):
    for name in ("3/good.png", "3/bad.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(random_images(1)[0]) if "good" in name else b"nothing")
    with pytest.raises(ValueError, match="has an image that cannot be used, '3/bad.png': not a readable image"):
        load_images(tmp_path)
    rejected = []
    load_images(tmp_path, rejected=rejected)
    assert [entry["file"] for entry in rejected] == ["3/bad.png"]


# ------------------------------------------------------------------------------------------------------------ roles


def three_roles(size=12, count=30):
    """Roles of natural-looking contrast, ids from one source's row numbers."""
    parts = []
    for seed, name in enumerate(("protected", "collected", "test")):
        images = random_images(count, size, size, seed=seed)
        parts.append(LabelledImages(images, None, tuple(f"{name}/{row}" for row in range(count))))
    return parts


def test_disjoint_roles_pass():
    check_roles(*three_roles())


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (1, 2)])
def test_same_id_and_same_pixels_are_refused_between_any_two(one, other):
    names = ("protected", "collected", "test")
    roles = three_roles()
    ids = list(roles[other].ids)
    ids[4] = roles[one].ids[7]
    shared_id = [*roles]
    shared_id[other] = LabelledImages(roles[other].images, None, tuple(ids))
    pattern = f"{names[one]} and {names[other]} have 1 ids in common, the first '{names[one]}/7' and '{names[one]}/7'"
    with pytest.raises(ValueError, match=pattern):
        check_roles(*shared_id)

    images = roles[other].images.copy()
    images[4] = roles[one].images[7]
    images[9] = roles[one].images[2]
    roles[other] = roles[other].with_images(images)
    pattern = (
        f"{names[one]} and {names[other]} have 2 images with the same pixels in common, the first '{names[one]}/2'"
    )
    with pytest.raises(ValueError, match=pattern):
        check_roles(*roles)


def test_row_numbers_of_different_sources_agree_by_chance(tmp_path):
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        cifar_like(tmp_path / name / "train-0.parquet", random_images(5, seed=seed), [0] * 5)
    one, two, three = (load_images(tmp_path / name) for name in ("one", "two", "three"))
    assert one.ids == two.ids and one.id_space != two.id_space
    check_roles(one, two, three)
    check_roles(load_images((one.images, None)), load_images((two.images, None)), three)
    # Within one source the same row is the same image, even when no distance tells (a patch, say).
    again = load_images(tmp_path / "one").with_images(255 - one.images)
    with pytest.raises(ValueError, match="protected and collected have 5 ids in common"):
        check_roles(again, one, three)
    # Ids from a column always count.
    for name, data in (("a", one), ("b", two)):
        write_dataset(tmp_path / name, data)
    with pytest.raises(ValueError, match="protected and collected have 5 ids in common, the first 'train/0'"):
        check_roles(load_images(tmp_path / "a"), load_images(tmp_path / "b"), three)


@pytest.mark.parametrize(("position", "name"), [(1, "collected"), (2, "test")])
def test_clean_originals_are_found_though_protected_differ_by_8_levels(position, name):
    roles = three_roles()
    clean = roles[position].images[[3, 11, 25]].astype(int)
    signs = np.random.default_rng(5).choice([-8, 8], clean.shape)
    images = roles[0].images.copy()
    images[[20, 6, 1]] = np.clip(clean + signs, 0, 255)
    roles[0] = roles[0].with_images(images)
    with pytest.raises(
        ValueError,
        match=f"protected has 3 images within 16/255 of a {name} one .up to 1 % of the values aside., the first "
        f"'protected/1' and '{name}/25'",
    ):
        check_roles(*roles)
    check_roles(*roles, budget=7 / 255)
    with pytest.raises(ValueError, match="protected has 3 images within 8/255"):
        check_roles(*roles, budget=8 / 255)


@pytest.mark.parametrize("shape", [(12, 12, 3), (7, 5, 3), (3, 2, 1), (1, 1, 1)])
def test_nearness_agrees_with_comparing_every_pair(shape):
    from jcdp_diffusers.data import roles as module

    rng = np.random.default_rng(1)
    # Few levels, so that many pairs lie at and around the budget, flat images and extremes among them.
    centre = rng.integers(0, 256, (4, *shape))
    one, other = (
        np.clip(centre[rng.integers(0, 4, count)] + rng.integers(-10, 11, (count, *shape)), 0, 255).astype(np.uint8)
        for count in (90, 110)
    )
    one[:3], other[:3] = 0, 16
    one[3:6], other[3:6] = 255, 238
    one[6:12, 0, 0] = 255 - one[6:12, 0, 0]  # one pixel far away
    ours, theirs = (LabelledImages(images, None, tuple(map(str, range(len(images))))) for images in (one, other))
    differences = np.abs(one[:, None].astype(int) - other[None]).reshape(90, 110, -1)
    block_means = module._block_means(one)[:, None], module._block_means(other)[None]
    means = np.square(block_means[0] - block_means[1]).mean(axis=2)
    for levels in (0, 8, 16, 17, 25):
        few = max(shape[2], differences.shape[2] // 100) if levels else 0
        in_most = ((differences > min(levels, 16)).sum(axis=2) <= few) & (means <= levels**2)
        expected = (differences.max(axis=2) <= levels) | in_most
        found = module._pairs_within(ours, theirs, levels)
        assert set(found) == {tuple(pair) for pair in np.argwhere(expected).tolist()}
        assert levels < 16 or found


def test_clean_originals_are_found_though_a_few_values_differ_by_much():
    """One pixel in 1,024, as OPS does, or single values, as AR does; but not many of them."""
    protected, collected, test = three_roles(size=32)
    clean = collected.images[[3, 11, 25]].astype(int)
    clean[0, 5, 5] = 255 * (clean[0, 5, 5] < 128)
    clean[1].reshape(-1)[::110] += np.where(clean[1].reshape(-1)[::110] < 128, 44, -44)
    clean[2].reshape(-1)[::60] += np.where(clean[2].reshape(-1)[::60] < 128, 44, -44)
    images = protected.images.copy()
    images[:3] = clean
    protected = protected.with_images(images)
    assert find_overlap(protected, collected, budget=16 / 255).tolist() == [[0, 3], [1, 11]]
    # No budget asks for the very pixels, and a large one does not make the few values more.
    assert len(find_overlap(protected, collected)) == 0
    assert find_overlap(protected, collected, budget=32 / 255).tolist() == [[0, 3], [1, 11]]
    with pytest.raises(ValueError, match="protected has 2 images within 16/255 of a collected one"):
        check_roles(protected, collected, test)


def test_strokes_on_a_black_ground_are_different_images():
    from sklearn.datasets import load_digits

    images = np.pad((load_digits().images * 15).astype(np.uint8), ((0, 0), (4, 4), (4, 4)))[..., None].repeat(3, 3)
    data = LabelledImages(images, None, tuple(map(str, range(len(images)))))
    one, other = data.subset(range(900)), data.subset(range(900, len(data)))
    assert len(find_overlap(one, other, budget=16 / 255)) == 0


def test_find_overlap_lists_the_rows_to_leave_out():
    protected, collected, test = three_roles()
    images = collected.images.copy()
    images[4] = protected.images[9]
    images[17] = np.clip(protected.images[2].astype(int) + 8, 0, 255)
    ids = list(collected.ids)
    ids[21] = protected.ids[0]
    collected = LabelledImages(images, None, tuple(ids))
    assert find_overlap(protected, collected).tolist() == [[0, 21], [9, 4]]
    pairs = find_overlap(protected, collected, budget=8 / 255)
    assert pairs.tolist() == [[0, 21], [2, 17], [9, 4]]
    with pytest.raises(ValueError, match="data.find_overlap lists the rows"):
        check_roles(protected, collected, test)
    collected = collected.subset(np.delete(np.arange(len(collected)), pairs[:, 1]))
    check_roles(protected, collected, test)
    assert find_overlap(protected, collected).shape == (0, 2)


def test_images_of_other_sizes_are_other_images():
    protected, collected, test = three_roles()
    larger = LabelledImages(np.repeat(protected.images, 2, axis=1), None, collected.ids)
    check_roles(protected, larger, test)


def test_check_roles_refuses_other_budgets():
    with pytest.raises(ValueError, match="budget is 16; 0 to 1 is accepted"):
        check_roles(*three_roles(), budget=16)


# -------------------------------------------------------------------------------------------------------- real data


def test_cifar10_test_split(shared):
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    start = time.process_time()
    data = load_images(folder, split="test")
    seconds = time.process_time() - start
    assert data.images.shape == (10_000, 32, 32, 3) and data.class_names[3] == "cat" and data.ids[-1] == "test/9999"
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert seconds < 12  # of this process, whatever else runs; a fifth of the training split's minute


@pytest.mark.long
def test_cifar10_roles_are_disjoint_and_an_overlap_is_found(shared):
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    start = time.perf_counter()
    collected, test = load_images(folder, split="train"), load_images(folder, split="test")
    assert time.perf_counter() - start < 60
    protected = test.subset(range(5000))
    start = time.perf_counter()
    check_roles(protected, collected, test.subset(range(5000, 10_000)))
    assert time.perf_counter() - start < 30
    noise = np.random.default_rng(0).choice([-8, 8], protected.images.shape)
    leaked = collected.subset(range(49_000, 50_000))
    perturbed = np.clip(leaked.images.astype(int) + noise[:1000], 0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match="protected has 1000 images within 16/255 of a collected one"):
        check_roles(LabelledImages(perturbed, None, tuple(map(str, range(1000)))), collected, test)
