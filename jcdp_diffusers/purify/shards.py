"""
The shards of a purified data set: files of Parquet with fixed rows, each with a record that is written last.

A shard is finished when its file and its record are there. The record has the checksum of the file.
"""

import contextlib
import errno
import functools
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..storage import Folder, digest


STATE = ".purify"  # with a leading dot, readers of the data set pass it by
# A row group ends where its rows say, so that a file's bytes do not depend on how its rows arrived.
ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 2**28  # of images; photographs are larger than this long before there are 256 of them


class ShardStore:
    """
    The shards of one split in an output folder.

    Args:
        folder (`Folder`): The data set's; state is kept in a hidden folder within.
        split (`str`): First part of the files' names.
        rows_per_shard (`int`, *optional*): Rows of the source that make a shard; the last may have fewer.
        rows (`int`, *optional*): Rows of the source; None for a stream whose end is not known yet.
        count (`int`, *optional*): Number of shards of nearly equal length, instead of `rows_per_shard`.
    """

    def __init__(self, folder: Folder, split: str, *, rows: int | None, rows_per_shard: int | None, count: int | None):
        self.folder, self.split, self.rows, self.rows_per_shard = folder, split, rows, rows_per_shard
        self.even = count is not None
        self.count = count if self.even or rows is None else -(-rows // rows_per_shard)
        for name in (f"{STATE}/shards", f"{STATE}/writing", "rejected"):
            folder.fs.makedirs(name, exist_ok=True)
        if rows is None and (ends := folder.names(STATE, "end-*")):
            self.end_at(min(int(name[4:]) for name in ends))

    def range(self, index: int) -> tuple[int, int]:
        """First row of a shard and the end (exclusive); a stream may end before it."""
        if self.even:
            return index * self.rows // self.count, (index + 1) * self.rows // self.count
        stop = (index + 1) * self.rows_per_shard
        return index * self.rows_per_shard, stop if self.rows is None else min(stop, self.rows)

    def name(self, index: int) -> str:
        """Name of a shard's file, in which the number of shards is missing until it is known."""
        if self.count is None:
            return f"{self.split}-{index:05d}.parquet"
        width = max(5, len(str(self.count - 1)))  # names sort as their numbers do
        return f"{self.split}-{index:0{width}d}-of-{self.count:0{width}d}.parquet"

    def rejected_name(self, index: int) -> str:
        """Of the rows that were refused, if there are any."""
        return f"rejected/{self.name(index)}"

    def record_name(self, index: int) -> str:
        return f"{STATE}/shards/{self.split}-{index:05d}.json"

    def is_finished(self, index: int) -> bool:
        return self.folder.fs.exists(self.name(index)) and self.folder.fs.exists(self.record_name(index))

    def recorded(self) -> list[int]:
        """Shards that have been written, though perhaps removed or damaged since."""
        names = self.folder.names(f"{STATE}/shards", f"{self.split}-*.json")
        return [int(name.removesuffix(".json").rpartition("-")[2]) for name in names]

    def finished(self) -> set[int]:
        """All finished shards, by two listings rather than a question to the file system for each shard."""
        files = set(self.folder.names(""))
        return {index for index in self.recorded() if self.name(index) in files}

    def record(self, index: int) -> dict:
        return json.loads(self.folder.fs.read_text(self.record_name(index)))

    def ids(self) -> Iterator[list[str]]:
        """Ids of all rows, refused ones included, one file at a time; all shards are finished."""
        for index in range(self.count):
            for name in (self.name(index), self.rejected_name(index)):
                if self.folder.fs.exists(name):
                    yield pq.read_table(name, columns=["id"], filesystem=self.folder.fs)["id"].to_pylist()

    def is_intact(self, index: int) -> bool:
        """Whether a shard is finished, and its files are what was written, byte for byte."""
        fs, names = self.folder.fs, (self.name(index), self.rejected_name(index))
        try:
            record = self.record(index)
            expected = [record["sha256"], record["rejected_sha256"]]
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # nothing or nonsense is on record
            return False
        return expected == [digest(name, fs.open) if fs.exists(name) else None for name in names]

    def discard(self, index: int) -> None:
        """Make a shard unfinished again."""
        self.folder.remove(self.name(index))

    def end_at(self, count: int) -> None:
        """Record that a stream has so many shards, and put that into the names of those that are there."""
        names = [self.name(index) for index in range(count)]
        self.folder.write(f"{STATE}/end-{count:05d}", "")
        self.count = count
        for index, name in enumerate(names):
            for place in ("", "rejected/"):
                if self.folder.fs.exists(place + name):
                    self.folder.fs.mv(place + name, place + self.name(index))

    def remove_leftovers(self) -> None:
        """Delete what killed workers were writing, and the claims of older versions; only for a finished data set."""
        for place in ("writing", "claims"):
            for name in self.folder.names(f"{STATE}/{place}"):
                self.folder.remove(f"{STATE}/{place}/{name}")


class ShardWriter:
    """
    Writes one shard, kept and rejected rows, in row groups as they come; nothing is visible before `commit`.

    Use as a context manager: what has not been committed is deleted on leaving.
    """

    def __init__(self, store: ShardStore, index: int, kept: pa.Schema, rejected: pa.Schema):
        self.store, self.index, local = store, index, store.folder.local
        # Where a rename is enough to put a file into its place.
        place = local / STATE / "writing" if local else Path(tempfile.gettempdir())
        name = f"{index}-{secrets.token_hex(8)}"
        self.kept = _GroupedFile(place / f"{name}.kept", kept)
        self.rejected = _GroupedFile(place / f"{name}.rejected", rejected)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.kept.discard()
        self.rejected.discard()

    def write(self, kept: pa.Table, rejected: pa.Table) -> None:
        self.kept.write(kept)
        self.rejected.write(rejected)

    def commit(self, **record) -> dict:
        """Flush everything, let the files appear, and then the record, which is `record` and the checksums."""
        store, folder = self.store, self.store.folder
        self.kept.close()
        if self.rejected.rows:
            self.rejected.close()
        record = {
            "index": self.index,
            "rows_out": self.kept.rows,
            "rejected": self.rejected.rows,
            "bytes": self.kept.path.stat().st_size,
            "sha256": digest(self.kept.path),
            "rejected_sha256": digest(self.rejected.path) if self.rejected.rows else None,
            **record,
        }
        if self.rejected.rows:
            folder.put(self.rejected.path, store.rejected_name(self.index))
        else:
            folder.remove(store.rejected_name(self.index))
        folder.put(self.kept.path, store.name(self.index))
        folder.write(store.record_name(self.index), json.dumps(record, indent=1))
        return record


class _GroupedFile:
    """A local Parquet file in row groups of bounded size; it comes into being with the first of them."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema, self.rows = path, schema, 0
        self._waiting, self._bytes = [], 0  # tables of one row each, for the next row group

    @functools.cached_property
    def _parquet(self) -> pq.ParquetWriter:
        return pq.ParquetWriter(self.path, self.schema)

    def write(self, table: pa.Table) -> None:
        """Some more rows, of a table that may have other columns, too."""
        table = table.select(self.schema.names).cast(self.schema)
        self.rows += len(table)
        for row, size in enumerate(_bytes_of_images(table)):
            if len(self._waiting) == ROWS_PER_GROUP or (self._waiting and self._bytes + size > BYTES_PER_GROUP):
                self._end_group()
            self._waiting.append(table[row : row + 1])
            self._bytes += size

    def close(self) -> None:
        if self._waiting:  # `datasets` cannot read a row group without rows, but a file without row groups it can
            self._end_group()
        self._parquet.close()

    def _end_group(self) -> None:
        self._parquet.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._bytes = [], 0

    def discard(self) -> None:
        if "_parquet" in vars(self):
            self._parquet.is_open = False  # or it would write a footer
        self.path.unlink(missing_ok=True)


def _bytes_of_images(table: pa.Table) -> list[int]:
    """How many bytes each row's files have."""
    sizes = np.zeros(len(table), np.int64)
    for name, kind in zip(table.column_names, table.schema.types):
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            lengths = pc.binary_length(pc.struct_field(table[name], "bytes"))
            sizes += pc.fill_null(lengths, 0).to_numpy()
    return sizes.tolist()


@contextlib.contextmanager
def explained(folder: Folder) -> Iterator[None]:
    """Trouble with the output in one sentence that says how to go on."""
    try:
        yield
    except OSError as error:
        within = Path(str(error.filename or "")).is_relative_to(folder.root)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and not within:
            raise
        raise OSError(
            f"output_dir {folder.url!r} cannot be written to ({os.strerror(error.errno).lower()}): mend "
            "that and give the same command again, finished shards stay."
        ) from error
