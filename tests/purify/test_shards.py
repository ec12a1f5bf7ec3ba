"""Shards that are there whole with their record or not at all, on a local disk and on other file systems."""

import json

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jcdp_diffusers.purify import shards
from jcdp_diffusers.purify.shards import ShardStore, ShardWriter
from jcdp_diffusers.storage import Folder


SCHEMA = pa.schema({"id": pa.string()})


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    """The same folder by its path, as a URL, and on a file system that is no disk at all."""
    url = {"path": str(tmp_path / "a [1]"), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[
        request.param
    ]
    yield Folder(url)
    fsspec.filesystem("memory").store.clear()


def store_of(folder, rows=10, rows_per_shard=4, count=None) -> ShardStore:
    return ShardStore(folder, "train", rows=rows, rows_per_shard=rows_per_shard, count=count)


@pytest.mark.parametrize(
    ("rows", "rows_per_shard", "count"), [(10, 4, None), (10, None, 4), (9, None, 6), (1, 7, None), (8, 4, None)]
)
def test_ranges_cover_all_rows_once(rows, rows_per_shard, count, tmp_path):
    store = store_of(Folder(tmp_path), rows, rows_per_shard, count)
    assert [row for index in range(store.count) for row in range(*store.range(index))] == list(range(rows))


def test_a_shard_appears_whole_with_its_checksum_or_not_at_all(folder):
    store, rows = store_of(folder), pa.table({"id": ["a", "b", "c"]})
    with ShardWriter(store, 0, SCHEMA, SCHEMA) as writer:
        writer.write(rows, rows[:0])
    assert not store.is_finished(0) and folder.names("", "*.parquet") == []
    with ShardWriter(store, 0, SCHEMA, SCHEMA) as writer:
        writer.write(rows[:2], rows[2:])
        record = writer.commit(rows_in=3)
    assert (record["rows_out"], record["rejected"]) == (2, 1)
    assert store.is_finished(0) and store.is_intact(0) and store.finished() == {0}
    assert folder.fs.exists("rejected/train-00000-of-00003.parquet") and not folder.names(".purify/writing")
    with folder.fs.open(store.name(0), "wb") as file:
        file.write(b"damaged")
    assert store.is_finished(0) and not store.is_intact(0)
    store.discard(0)
    assert not store.is_finished(0) and store.finished() == set()


def test_the_record_is_written_last(folder, monkeypatch):
    """Whatever is cut off before it, the shard is not finished; a file without a record is made again."""
    written = []
    put, write = Folder.put, Folder.write
    monkeypatch.setattr(Folder, "put", lambda self, *args: (written.append(args[1]), put(self, *args)))
    monkeypatch.setattr(Folder, "write", lambda self, *args: (written.append(args[0]), write(self, *args)))
    store, rows = store_of(folder), pa.table({"id": ["a", "b"]})
    with ShardWriter(store, 1, SCHEMA, SCHEMA) as writer:
        writer.write(rows[:1], rows[1:])
        writer.commit()
    shard = "train-00001-of-00003.parquet"
    assert written == [f"rejected/{shard}", shard, ".purify/shards/train-00001.json"]
    folder.remove(written[-1])
    assert folder.fs.exists(shard) and not store.is_finished(1) and store.finished() == set()


def test_bytes_of_a_file_do_not_depend_on_how_its_rows_arrive(tmp_path):
    rows = pa.table({"id": [f"row {number}" for number in range(700)]})
    written = []
    for step in (1, 13, 256, 700):
        store = store_of(Folder(tmp_path / str(step)), 700, 700)
        with ShardWriter(store, 0, SCHEMA, SCHEMA) as writer:
            for start in range(0, 700, step):
                writer.write(rows[start : start + step], rows[:0])
            written.append(writer.commit()["sha256"])
    assert len(set(written)) == 1


def test_a_text_is_replaced(folder):
    folder.fs.makedirs("", exist_ok=True)
    for text in ("first", "second é"):
        folder.write("file", text)
        assert folder.fs.read_text("file") == text and folder.names("") == ["file"]


def test_a_stream_gets_the_number_of_its_shards_at_the_end(folder):
    store = store_of(folder, None)
    assert store.count is None
    for index in range(2):
        folder.write(store.name(index), str(index))
        folder.write(store.record_name(index), json.dumps({"rows_in": 4}))
    killed = store_of(folder, None)
    store.end_at(2)
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    folder.fs.mv(names[1], killed.name(1))  # as if killed between the two
    for store in (store_of(folder, None), store_of(folder, None)):
        assert store.count == 2 and folder.names("", "*.parquet") == names
        assert [store.name(index) for index in range(2)] == names and store.finished() == {0, 1}


def test_leftovers_of_killed_workers_and_of_older_versions_go(folder):
    """A run that was begun when workers shared a folder by claim files: what a claim says is not read."""
    store = store_of(folder)
    folder.fs.makedirs(".purify/claims")
    folder.write(".purify/claims/0", '{"token": "../../precious", "machine": "x", "pid": 1, "started": "1"}')
    folder.write("precious", "stays")
    if folder.local:
        folder.write(".purify/writing/0-abc.kept", "half")
    store.remove_leftovers()
    assert not folder.names(".purify/claims") and not folder.names(".purify/writing")
    assert folder.fs.read_text("precious") == "stays"


def test_row_groups_of_large_images_end_before_arrow_cannot_hold_them(tmp_path, monkeypatch):
    """Their bytes decide, and not how the rows arrive; an image larger than a group has one for itself."""
    monkeypatch.setattr(shards, "BYTES_PER_GROUP", 100)
    sizes = [40, 60, 1, 300, 30, 30, 30, 30, 0]
    files = [{"bytes": bytes(size), "path": None} for size in sizes[:-1]] + [None]
    rows = pa.table({"image": pa.array(files, datasets.Image().pa_type)})
    for step in (1, 4, 9):
        store = store_of(Folder(tmp_path / str(step)), 9, 9)
        with ShardWriter(store, 0, rows.schema, rows.schema) as writer:
            for start in range(0, 9, step):
                writer.write(rows[start : start + step], rows[:0])
            writer.commit()
        written = pq.ParquetFile(tmp_path / str(step) / store.name(0))
        groups = [written.metadata.row_group(number).num_rows for number in range(written.num_row_groups)]
        assert groups == [2, 1, 1, 3, 2] and written.read() == rows
