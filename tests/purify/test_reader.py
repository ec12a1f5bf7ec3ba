"""Rows of any source, from any row on."""

from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from purifying import some_images, source_folder

from jcdp_diffusers.data import load_images, open_dataset, write_dataset
from jcdp_diffusers.data.decoding import OUTSIDE
from jcdp_diffusers.purify import reader
from jcdp_diffusers.purify.reader import ROWS_AT_ONCE, open_rows


datasets.disable_progress_bars()
COUNT = 3 * ROWS_AT_ONCE + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return source_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(params=["folder", "dataset", "stream"])
def rows(request, folder):
    return open_rows(
        folder if request.param == "folder" else open_dataset(folder, streaming=request.param == "stream")
    )


def ids(tables) -> list[str]:
    tables = list(tables)
    assert all(0 < len(table) <= ROWS_AT_ONCE for table in tables)
    return [name for table in tables for name in table["id"].to_pylist()]


def test_any_range_in_any_order(rows):
    every = list(some_images(COUNT).ids)
    assert rows.length in (COUNT, None) and rows.split == "train"
    for start, stop in ((0, 10), (10, 200), (200, COUNT), (7, 8), (150, 151), (COUNT - 1, COUNT), (0, COUNT)):
        assert ids(rows.read(start, stop)) == every[start:stop]
    assert ids(rows.read(COUNT - 3, COUNT + 50)) == every[-3:]
    assert ids(rows.read(COUNT + 50, COUNT + 60)) == []


def test_parquet_rows_are_numbered_through_all_files_and_row_groups(tmp_path):
    for part, count in enumerate((5, 300, 1, 44)):
        values = {"img": [b"x"] * count, "number": list(range(count))}
        pq.write_table(pa.table(values), tmp_path / f"test-{part}.parquet", row_group_size=37)
    rows = open_rows(tmp_path)
    assert (rows.length, rows.split, list(rows.features)) == (350, "test", ["id", "image", "number"])
    for start, stop in ((0, 350), (304, 307), (299, 301), (349, 350)):
        tables = list(rows.read(start, stop))
        assert ids(tables) == [f"test/{row}" for row in range(start, stop)]
        first = tables[0]["number"][0].as_py()
        assert first == (start if start < 5 else start - 5 if start < 305 else start - 306)


def test_of_several_splits_the_one_asked_for(tmp_path):
    write_dataset(tmp_path, some_images(4), split="train")
    write_dataset(tmp_path, some_images(6), split="test")
    assert open_rows(tmp_path, split="test").length == 6
    with pytest.raises(ValueError, match="has several splits and split is None; .* are accepted"):
        open_rows(tmp_path)


def test_a_fingerprint_follows_the_rows_not_their_place(folder, tmp_path):
    same = source_folder(tmp_path / "elsewhere", COUNT)
    other = source_folder(tmp_path / "other", COUNT, seed=1)
    assert open_rows(same).fingerprint == open_rows(folder).fingerprint != open_rows(other).fingerprint
    images = some_images(30)
    changed = images.images.copy()
    changed[17, 0, 0, 0] ^= 1
    prints = {open_rows(data).fingerprint for data in (images, images.with_images(changed), images.subset(range(29)))}
    assert len(prints) == 3
    relabelled = (images.images, np.roll(images.labels, 1))
    assert open_rows(relabelled).fingerprint != open_rows((images.images, images.labels)).fingerprint


def test_the_same_files_are_other_rows_by_other_columns_and_in_folders_of_other_names(tmp_path):
    values = {
        "image": [b"x"] * 4,
        "fine": [0, 1, 2, 3],
        "coarse": [0, 0, 1, 1],
        "key": list("abcd"),
        "name": list("efgh"),
    }
    (tmp_path / "set/kind=cat").mkdir(parents=True)
    pq.write_table(pa.table(values), tmp_path / "set/kind=cat/train.parquet")
    asked = [{}, {"label_column": "fine"}, {"label_column": "coarse"}, {"id_column": "key"}, {"id_column": "name"}]
    prints = [open_rows(tmp_path / "set", **columns).fingerprint for columns in asked]
    (tmp_path / "set/kind=cat").rename(tmp_path / "set/kind=bird")
    prints.append(open_rows(tmp_path / "set").fingerprint)
    assert len(set(prints)) == 6


@pytest.fixture(params=["file", "memory"])
def at_url(request, tmp_path):
    """A folder's URL once what is put into the folder has gone there."""

    def put(folder) -> str:
        url = f"{request.param}://{folder if request.param == 'file' else folder.name}"
        if request.param == "memory":
            for path in folder.iterdir():
                fsspec.filesystem("memory").pipe(f"/{folder.name}/{path.name}", path.read_bytes())
        return url

    yield put
    fsspec.filesystem("memory").store.clear()


def test_a_url_is_read_as_a_folder_is(folder, at_url):
    url, images = at_url(folder), some_images(COUNT)
    rows, (first, *_) = open_rows(url, split="train"), sorted(folder.iterdir())
    assert rows.length == COUNT and rows.fingerprint == open_rows(folder).fingerprint
    assert ids(rows.read(0, COUNT)) == list(images.ids) and ids(rows.read(COUNT - 3, COUNT)) == list(images.ids)[-3:]
    loaded, opened = load_images(f"{url}/", split="train"), open_dataset(url, split="train")
    assert loaded.ids == images.ids == tuple(opened["id"]) and loaded.class_names == images.class_names
    assert np.array_equal(loaded.images, images.images) and np.array_equal(loaded.labels, images.labels)
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        open_rows(f"{url}/{first.name}", split="train")
    with pytest.raises(ValueError, match=f"split is None, but must be given where the source is a URL .'{url}'"):
        load_images(url)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_at_a_url_names_no_file_of_this_machine(streaming, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    image = {"bytes": None, "path": str(tmp_path / "private.png")}
    (tmp_path / "set").mkdir()
    table = pa.table({"image": pa.array([image, image], datasets.Image().pa_type)})
    pq.write_table(table, tmp_path / "set/train-00000-of-00001.parquet")
    (table,) = open_rows(f"file://{tmp_path}/set", split="train", streaming=streaming).read(0, 2)
    for stored in table["image"].to_pylist():
        assert stored["bytes"] is None and stored["path"].startswith(OUTSIDE)


def test_files_at_a_url_are_checked_and_joined_as_those_of_a_folder(at_url, tmp_path):
    for part, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        table = pa.table({"image": pa.array([{"bytes": b"x", "path": None}], datasets.Image().pa_type), "label": [0]})
        path = tmp_path / f"set/train-0000{part}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.cast(features.arrow_schema), path)
    url = at_url(tmp_path / "set")
    for place in (tmp_path / "set", url):
        rows = open_rows(place, split="train")
        (first,), (second,) = rows.read(0, 1), rows.read(1, 2)
        names = rows.features["label"].names
        assert [names[table["label"][0].as_py()] for table in (first, second)] == ["cat", "dog"]
    (tmp_path / "set").rename(tmp_path / "part")
    (tmp_path / "part/train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 shards, the first 00000"):
        open_rows(at_url(tmp_path / "part"), split="train")
    with pytest.raises(ValueError, match="where no file of split 'test' is; .* are accepted"):
        open_rows(at_url(tmp_path / "part"), split="test")
    with pytest.raises(ValueError, match="'nowhere://part', but must be a URL that fsspec can open here"):
        open_rows("nowhere://part", split="test")
    (tmp_path / "part/train-00000-of-00002.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="00000-of-00002.parquet' is no readable Parquet file: a Git LFS pointer"):
        open_rows(at_url(tmp_path / "part"), split="train")
    other = pa.table({"image": [b"x"], "price": [1]})
    pq.write_table(other, tmp_path / "part/train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match="00001-of-00002.parquet' has the columns image, label; those of train-00000"):
        open_rows(at_url(tmp_path / "part"), split="train")


def test_a_fingerprint_reads_no_file_that_is_too_large_for_an_image(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(bytes(11))
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert open_rows(tmp_path).length == 1


def test_a_fingerprint_of_an_image_folder_reads_the_files(tmp_path):
    prints = []
    for place, level in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / place).mkdir()
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / place / "0.png")
        prints.append(open_rows(tmp_path / place).fingerprint)
    assert prints[0] == prints[1] != prints[2]
