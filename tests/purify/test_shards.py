"""Claims that expire without trusting a clock, and files that appear whole or not at all."""

import json
import os
import subprocess
import time

import pyarrow as pa
import pytest

from jcdp_diffusers.purify.shards import Claims, ShardStore, ShardWriter, _process, create_once, write_atomically


TIMEOUT = 0.4


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path, "train", rows=10, rows_per_shard=4, count=None)


@pytest.fixture
def claims(store):
    with Claims(store.state / "claims", TIMEOUT) as claims:
        yield claims


def other(claims, **owner) -> Claims:
    """A worker that is not this process, and does not touch its claims."""
    worker = Claims(claims.folder, TIMEOUT)
    worker._owner = json.dumps({"token": worker.token, "machine": "elsewhere", "pid": 1, "started": "1", **owner})
    return worker


def test_a_claim_is_exclusive_until_it_is_released(claims):
    with Claims(claims.folder, TIMEOUT) as second:
        assert claims.take("0") and not second.take("0") and second.take("1")
        claims.release("0")
        assert second.take("0")
    assert claims.take("0") and claims.take("1")  # leaving releases


def test_a_living_claim_is_kept_alive(claims):
    assert claims.take("0")
    second = other(claims)
    until = time.monotonic() + 3 * TIMEOUT
    while time.monotonic() < until:
        assert not second.take("0")
        time.sleep(TIMEOUT / 10)


def test_a_silent_claim_from_elsewhere_expires(claims):
    assert other(claims).take("0")
    began = time.monotonic()
    while not claims.take("0"):
        time.sleep(TIMEOUT / 20)
    assert TIMEOUT <= time.monotonic() - began < 3 * TIMEOUT


@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 10 * 365 * 86400], ids=["past", "future"])
def test_file_times_of_any_clock_neither_free_nor_freeze_a_claim(jump, claims):
    assert other(claims).take("0")
    os.utime(claims.folder / "0", (time.time() + jump,) * 2)
    began = time.monotonic()
    assert not claims.take("0")
    while not claims.take("0"):
        time.sleep(TIMEOUT / 20)
    assert TIMEOUT <= time.monotonic() - began < 3 * TIMEOUT


def test_a_dead_process_of_this_machine_is_noticed_at_once(claims):
    process = subprocess.Popen(["sleep", "60"])
    owner = Claims(claims.folder, 60.0)
    owner._owner = json.dumps({"token": owner.token, **_process(process.pid)})
    assert owner.take("0") and not claims.take("0")
    process.kill()
    time.sleep(0.1)  # not yet waited for: a zombie
    assert claims.take("0")
    process.wait()


def test_taking_over_removes_what_the_dead_one_was_writing(store, claims):
    dead = other(claims)
    assert dead.take("0")
    leftovers = [store.state / "writing" / f"0-{dead.token}.{kind}" for kind in ("kept", "rejected")]
    for path in leftovers:
        path.write_text("half")
    while not claims.take("0"):
        time.sleep(TIMEOUT / 20)
    assert not any(path.exists() for path in leftovers)


def test_releasing_spares_the_claim_of_whoever_took_over(claims):
    assert claims.take("0")
    write_atomically(claims.folder / "0", other(claims)._owner)
    claims.release("0")
    assert (claims.folder / "0").exists()


@pytest.mark.parametrize(
    ("rows", "rows_per_shard", "count"), [(10, 4, None), (10, None, 4), (9, None, 6), (1, 7, None), (8, 4, None)]
)
def test_ranges_cover_all_rows_once(rows, rows_per_shard, count, tmp_path):
    store = ShardStore(tmp_path, "train", rows=rows, rows_per_shard=rows_per_shard, count=count)
    assert [row for index in range(store.end()) for row in range(*store.range(index))] == list(range(rows))


def test_a_shard_appears_whole_with_its_checksum_or_not_at_all(store):
    schema = pa.schema({"id": pa.string()})
    rows = pa.table({"id": ["a", "b", "c"]})
    with ShardWriter(store, 0, "t", schema, schema) as writer:
        writer.write(rows, rows[:0])
    assert not store.is_finished(0) and not list((store.state / "writing").iterdir())
    with ShardWriter(store, 0, "t", schema, schema) as writer:
        writer.write(rows[:2], rows[2:])
        record = writer.commit(rows_in=3)
    assert (record["rows_out"], record["rejected"]) == (2, 1)
    assert store.is_finished(0) and store.is_intact(0) and store.rejected_path(0).exists()
    store.path(0).write_bytes(store.path(0).read_bytes()[:-1])
    assert not store.is_intact(0)


def test_bytes_of_a_file_do_not_depend_on_how_its_rows_arrive(tmp_path):
    schema = pa.schema({"id": pa.string()})
    rows = pa.table({"id": [f"row {number}" for number in range(700)]})
    written = []
    for step in (1, 13, 256, 700):
        store = ShardStore(tmp_path / str(step), "train", rows=700, rows_per_shard=700, count=None)
        with ShardWriter(store, 0, "t", schema, schema) as writer:
            for start in range(0, 700, step):
                writer.write(rows[start : start + step], rows[:0])
            written.append(writer.commit()["sha256"])
    assert len(set(written)) == 1


def test_create_once_and_write_atomically(tmp_path):
    path = tmp_path / "file"
    assert create_once(path, "first") and not create_once(path, "second")
    assert path.read_text() == "first"
    write_atomically(path, "third")
    assert path.read_text() == "third" and list(tmp_path.iterdir()) == [path]


def test_a_stream_gets_the_number_of_its_shards_at_the_end(tmp_path):
    store = ShardStore(tmp_path, "train", rows=None, rows_per_shard=4, count=None)
    assert store.end() is None
    for index in range(2):
        store.path(index).touch()
    store.note_end(3)
    store.note_end(2)
    assert store.end() == 2
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    os.replace(store.path(0), tmp_path / names[0])  # as if killed between the two
    for _ in range(2):
        store.give_final_names()
        assert sorted(path.name for path in tmp_path.glob("*.parquet")) == names
        assert [store.path(index).name for index in range(2)] == names
