"""
Shards that any number of workers share through a folder, without talking to each other.

A shard is finished when its file bears its final name: it is written under a temporary one, flushed to the disk and
renamed, after a record with its checksum. What a worker is busy with, it claims by a file that it touches again and
again. A claim that stands still is taken over; should its owner be alive after all, both write the same file.

No clock of one machine is compared with that of another: a worker waits, by its own monotonic clock, for another's
claim to change. So clocks that jump or disagree neither free a living claim at once nor keep a dead one for ever.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


STATE = ".purify"  # with a leading dot, readers of the data set pass it by
CLAIM_TIMEOUT = 300.0  # seconds; well above the minute for which network file systems may show an old file time
ROWS_PER_GROUP = 256  # row groups are cut by rows alone, so that a file's bytes do not depend on how its rows arrived


class ShardTakenOver(Exception):
    """A worker was silent for so long that another makes its shard, or has made it."""


class ShardStore:
    """
    The shards of one split in an output folder.

    Args:
        output_dir (`Path`): The data set's folder; state is kept in a hidden folder within.
        split (`str`): First part of the files' names.
        rows_per_shard (`int`, *optional*): Rows of the source that make a shard; the last may have fewer.
        rows (`int`, *optional*): Rows of the source; None for a stream whose end is not known yet.
        count (`int`, *optional*): Number of shards of nearly equal length, instead of `rows_per_shard`.
    """

    def __init__(
        self, output_dir: Path, split: str, *, rows: int | None, rows_per_shard: int | None, count: int | None
    ):
        self.output_dir, self.split, self.rows, self.rows_per_shard = output_dir, split, rows, rows_per_shard
        self.count = count if count is not None or rows is None else -(-rows // rows_per_shard)
        self.even = count is not None
        self.state = output_dir / STATE
        for folder in (self.state / "shards", self.state / "claims", self.state / "writing", output_dir / "rejected"):
            folder.mkdir(parents=True, exist_ok=True)

    def range(self, index: int) -> tuple[int, int]:
        """First row of a shard and the end (exclusive); a stream may end before it."""
        if self.even:
            return index * self.rows // self.count, (index + 1) * self.rows // self.count
        stop = (index + 1) * self.rows_per_shard
        return index * self.rows_per_shard, stop if self.rows is None else min(stop, self.rows)

    def name(self, index: int, count: int | None) -> str:
        """Name of a shard's file; the number of shards is part of it once it is known."""
        if count is None:
            return f"{self.split}-{index:05d}.parquet"
        width = max(5, len(str(count - 1)))  # names sort as their numbers do
        return f"{self.split}-{index:0{width}d}-of-{count:0{width}d}.parquet"

    def path(self, index: int) -> Path:
        return self._present(self.output_dir, index)

    def rejected_path(self, index: int) -> Path:
        return self._present(self.output_dir / "rejected", index)

    def _present(self, folder: Path, index: int) -> Path:
        """A stream's shards get their final names at the end; until then, a shard may have either."""
        if self.rows is None and (end := self.end()) is not None:
            final = folder / self.name(index, end)
            if final.exists():
                return final
        return folder / self.name(index, self.count)

    def record_path(self, index: int) -> Path:
        return self.state / "shards" / f"{self.split}-{index:05d}.json"

    def is_finished(self, index: int) -> bool:
        return self.path(index).exists() and self.record_path(index).exists()

    def recorded(self) -> list[int]:
        """Shards that have been written, though perhaps removed or damaged since."""
        return [int(path.stem.rpartition("-")[2]) for path in (self.state / "shards").glob(f"{self.split}-*.json")]

    def finished(self) -> set[int]:
        """All finished shards, by two listings rather than a question to the file system for each shard."""
        name = re.compile(rf"{re.escape(self.split)}-(\d+)(-of-\d+)?\.parquet")
        files = {int(match[1]) for entry in os.listdir(self.output_dir) if (match := name.fullmatch(entry))}
        return files.intersection(self.recorded())

    def rows_of(self, finished: set[int]) -> int:
        """Rows of the source that went into these shards."""
        rows = sum(stop - start for start, stop in map(self.range, finished))
        if self.rows is None and finished:  # all shards of a stream are full, but perhaps the last
            rows -= self.rows_per_shard - self.record(max(finished))["rows_in"]
        return rows

    def record(self, index: int) -> dict:
        return json.loads(self.record_path(index).read_text())

    def is_intact(self, index: int) -> bool:
        """Whether a finished shard's files are what was written, byte for byte."""
        if not self.is_finished(index):
            return False
        try:
            record = self.record(index)
        except json.JSONDecodeError:  # the record is damaged, so nobody knows about the files
            return False
        rejected = self.rejected_path(index)
        found = digest(self.path(index)), digest(rejected) if rejected.exists() else None
        return found == (record["sha256"], record["rejected_sha256"])

    def discard(self, index: int) -> None:
        """Make a shard unfinished again."""
        self.path(index).unlink(missing_ok=True)

    def note_end(self, index: int) -> None:
        """Record that a stream has no row in this shard or any later one."""
        create_once(self.state / f"end-{index:05d}", "")

    def end(self) -> int | None:
        """Number of shards, None as long as no worker has met the stream's end."""
        if self.count is not None:
            return self.count
        return min((int(path.name[4:]) for path in self.state.glob("end-*")), default=None)

    def give_final_names(self) -> None:
        """Put the number of shards into the names of those of a stream, now that it has been read to its end."""
        count = self.end()
        for folder, present in ((self.output_dir, self.path), (self.output_dir / "rejected", self.rejected_path)):
            for index in range(count):
                if present(index).exists():
                    os.replace(present(index), folder / self.name(index, count))

    def remove_leftovers(self) -> None:
        """Delete what killed workers were writing; only for a finished data set."""
        for pattern in ("writing/*", "claims/[0-9]*"):
            for path in self.state.glob(pattern):
                path.unlink(missing_ok=True)


class ShardWriter:
    """
    Writes one shard, kept and rejected rows, in row groups as they come; nothing is visible before `commit`.

    Use as a context manager: what has not been committed is deleted on leaving.
    """

    def __init__(self, store: ShardStore, index: int, token: str, kept: pa.Schema, rejected: pa.Schema):
        self.store, self.index = store, index
        writing = store.state / "writing"
        self.kept = _GroupedFile(writing / f"{index}-{token}.kept", kept)
        self.rejected = _GroupedFile(writing / f"{index}-{token}.rejected", rejected)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.kept.discard()
        self.rejected.discard()

    def write(self, kept: pa.Table, rejected: pa.Table) -> None:
        self.kept.write(kept)
        self.rejected.write(rejected)

    def commit(self, **record) -> dict:
        """
        Flush everything, then let the shard appear; `record` is kept with its checksum.

        Raises:
            ShardTakenOver: Another worker has taken this one for dead.
        """
        self.kept.close()
        if self.rejected.rows:
            self.rejected.close()
        try:
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
                _move(self.rejected.path, self.store.rejected_path(self.index))
            else:
                self.store.rejected_path(self.index).unlink(missing_ok=True)
            write_atomically(self.store.record_path(self.index), json.dumps(record, indent=1))
            _move(self.kept.path, self.store.path(self.index))
        except FileNotFoundError as error:
            raise ShardTakenOver(f"what was being written for shard {self.index} has been cleared away") from error
        return record


class _GroupedFile:
    """A Parquet file that comes into being with its first row, or when it is closed."""

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
        self._file.flush()
        os.fsync(self._file.fileno())
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


class Claims:
    """
    Claims of one worker; a thread keeps them alive for as long as the process lives.

    Args:
        folder (`Path`): Shared by all workers.
        timeout (`float`): Seconds for which another's claim must stand still before it is taken over. A worker of the
            same machine that has died is noticed at once.
    """

    def __init__(self, folder: Path, timeout: float = CLAIM_TIMEOUT):
        self.folder, self.timeout = folder, timeout
        self.token = secrets.token_hex(8)
        self._owner = json.dumps({"token": self.token, **_process(os.getpid())})
        self._held: set[str] = set()
        self._watched: dict[str, tuple[tuple, float]] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._beat, daemon=True, name="claims").start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim `name` if it is free or its owner is gone."""
        path = self.folder / name
        if path.exists() or not create_once(path, self._owner):
            if not self._is_abandoned(path):
                return False
            self._clear_after(path)
            write_atomically(path, self._owner)
            if self._read(path)[0] != self._owner:  # another worker took it over at the same moment
                return False
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        self._held.discard(name)
        path = self.folder / name
        if self._read(path)[0] == self._owner:
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stopped.wait(self.timeout / 10):
            for name in list(self._held):
                try:
                    os.utime(self.folder / name)
                except OSError:
                    pass  # a beat missed is no harm: at worst, another worker repeats the shard

    def _is_abandoned(self, path: Path) -> bool:
        text, beat = self._read(path)
        if text is None:
            return False
        owner = json.loads(text)
        now = _process(owner["pid"])
        if owner["machine"] is not None and owner["machine"] == now["machine"] and owner["started"] != now["started"]:
            return True
        last, since = self._watched.get(path.name, (None, 0.0))
        if last != (text, beat):
            self._watched[path.name] = ((text, beat), time.monotonic())
            return False
        return time.monotonic() - since > self.timeout

    def _clear_after(self, path: Path) -> None:
        text, _ = self._read(path)
        if text is not None:
            for leftover in (path.parent.parent / "writing").glob(f"*-{json.loads(text)['token']}.*"):
                leftover.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[str | None, int]:
        try:
            return path.read_text(), path.stat().st_mtime_ns
        except FileNotFoundError:
            return None, 0


def _process(pid: int) -> dict:
    """What tells a process from all others, on Linux; elsewhere `machine` is None and only time tells."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return {"machine": None, "pid": pid, "started": None}
    try:
        # The name of the program, in parentheses, may hold anything; state and start time follow it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = None if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        started = None
    return {"machine": f"{boot.read_text().strip()} {os.readlink(namespace)}", "pid": pid, "started": started}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def create_once(path: Path, text: str) -> bool:
    """Create a file, whole or not at all; False if it exists already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(temporary, text)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(temporary, text)
        _move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _move(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)
