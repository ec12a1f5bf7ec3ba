"""
The shards of a purified data set: files of Parquet with fixed rows, each with a record that is written last.

A shard is finished when its file and its record are there. The record has the checksum of the file.
"""

import contextlib
import json
import re
import secrets
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .folder import STATE, Folder, digest


ROWS_PER_GROUP = 256  # row groups are cut by rows alone, so that a file's bytes do not depend on how its rows arrived


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
        self.count = count if count is not None or rows is None else -(-rows // rows_per_shard)
        self.even = count is not None
        folder.make(f"{STATE}/shards", f"{STATE}/writing", "rejected")

    def range(self, index: int) -> tuple[int, int]:
        """First row of a shard and the end (exclusive); a stream may end before it."""
        if self.even:
            return index * self.rows // self.count, (index + 1) * self.rows // self.count
        stop = (index + 1) * self.rows_per_shard
        return index * self.rows_per_shard, stop if self.rows is None else min(stop, self.rows)

    def name(self, index: int) -> str:
        """Name of a shard's file."""
        return self._present("", index)

    def rejected_name(self, index: int) -> str:
        """Of the rows that were refused, if there are any."""
        return self._present("rejected/", index)

    def _present(self, place: str, index: int) -> str:
        """A stream's shards get their final names at the end; until then, a shard may have either."""
        if self.rows is None and (end := self.end()) is not None:
            final = place + self._name(index, end)
            if self.folder.exists(final):
                return final
        return place + self._name(index, self.count)

    def _name(self, index: int, count: int | None) -> str:
        if count is None:
            return f"{self.split}-{index:05d}.parquet"
        width = max(5, len(str(count - 1)))  # names sort as their numbers do
        return f"{self.split}-{index:0{width}d}-of-{count:0{width}d}.parquet"

    def record_name(self, index: int) -> str:
        return f"{STATE}/shards/{self.split}-{index:05d}.json"

    def is_finished(self, index: int) -> bool:
        return self.folder.exists(self.name(index)) and self.folder.exists(self.record_name(index))

    def recorded(self) -> list[int]:
        """Shards that have been written, though perhaps removed or damaged since."""
        names = self.folder.names(f"{STATE}/shards", f"{self.split}-*.json")
        return [int(name.removesuffix(".json").rpartition("-")[2]) for name in names]

    def finished(self) -> set[int]:
        """All finished shards, by two listings rather than a question to the file system for each shard."""
        name = re.compile(rf"{re.escape(self.split)}-(\d+)(-of-\d+)?\.parquet")
        files = {int(match[1]) for entry in self.folder.names("") if (match := name.fullmatch(entry))}
        return files.intersection(self.recorded())

    def record(self, index: int) -> dict:
        return json.loads(self.folder.read(self.record_name(index)))

    def is_intact(self, index: int) -> bool:
        """Whether a finished shard's files are what was written, byte for byte."""
        if not self.is_finished(index):
            return False
        try:
            record = self.record(index)
        except json.JSONDecodeError:  # the record is damaged, so nobody knows about the files
            return False
        names = self.name(index), self.rejected_name(index)
        found = [self.folder.digest(name) if self.folder.exists(name) else None for name in names]
        return found == [record["sha256"], record["rejected_sha256"]]

    def discard(self, index: int) -> None:
        """Make a shard unfinished again."""
        self.folder.remove(self.name(index))

    def note_end(self, index: int) -> None:
        """Record that a stream has no row in this shard or any later one."""
        self.folder.write(f"{STATE}/end-{index:05d}", "")

    def end(self) -> int | None:
        """Number of shards, None as long as a stream's end has not been met."""
        if self.count is not None:
            return self.count
        return min((int(name[4:]) for name in self.folder.names(STATE, "end-*")), default=None)

    def give_final_names(self) -> None:
        """Put the number of shards into the names of those of a stream, now that it has been read to its end."""
        count = self.end()
        for place in ("", "rejected/"):
            for index in range(count):
                if self.folder.exists(place + self._name(index, None)):
                    self.folder.rename(place + self._name(index, None), place + self._name(index, count))

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
        self.store, self.index = store, index
        place, token = store.folder.place_to_write(), secrets.token_hex(8)
        self.kept = _GroupedFile(place / f"{index}-{token}.kept", kept)
        self.rejected = _GroupedFile(place / f"{index}-{token}.rejected", rejected)

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
    """A local Parquet file that comes into being with its first row, or when it is closed."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema, self.rows = path, schema, 0
        self._file = self._parquet = None
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self.rows += len(table)
        self._waiting.append(table)
        waiting = sum(map(len, self._waiting))
        if waiting >= ROWS_PER_GROUP:
            table = pa.concat_tables(self._waiting)
            full = waiting - waiting % ROWS_PER_GROUP
            self._open()
            self._parquet.write_table(table[:full].combine_chunks(), row_group_size=ROWS_PER_GROUP)
            self._waiting = [table[full:]]

    def close(self) -> None:
        self._open()
        table = pa.concat_tables([self.schema.empty_table(), *self._waiting])
        if len(table):  # `datasets` cannot read a row group without rows, but a file without row groups it can
            self._parquet.write_table(table.combine_chunks())
        self._parquet.close()
        self._file.close()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._file is not None and not self._file.closed:
            self._parquet.is_open = False  # it would write a footer
            with contextlib.suppress(OSError):  # the disk may be full, which is no matter now
                self._file.close()

    def _open(self) -> None:
        if self._file is None:
            self._file = open(self.path, "wb")
            self._parquet = pq.ParquetWriter(self._file, self.schema)
