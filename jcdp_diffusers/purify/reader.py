"""The rows of a source of any length as Arrow tables, from any row on, without holding more than a few of them."""

import hashlib
import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data import is_url, open_dataset, parquet_files, parquet_shards
from ..data.decoding import MAX_FILE_BYTES
from ..storage import digest


ROWS_AT_ONCE = 128
SAMPLED_ROWS = 1024  # of a data set, for its fingerprint
SAMPLED_FROM_STREAM = 64
HASHED_WHOLE = 2**30  # bytes of Parquet that a second or two suffice to read; of more, only the footers are hashed


@dataclass
class Rows:
    """
    Args:
        name: of the source, for people.
        split: which part of it.
        features: of its columns, `id` and `image` (encoded) among them.
        length: number of rows; None for a stream.
        fingerprint: changes when the rows do, but not with the place where they lie.
        from_row: tables from a row on, to the end.
        own_ids: the ids that the source itself has, some at a time; None where they are row numbers, or where nobody
            can look ahead.
    """

    name: str
    split: str
    features: datasets.Features
    length: int | None
    fingerprint: str
    from_row: Callable[[int], Iterator[pa.Table]]
    own_ids: Callable[[], Iterator[list[str]]] | None = None
    _at: int | None = field(default=None, init=False)
    _tables: Iterator[pa.Table] = field(default_factory=lambda: iter(()), init=False)
    _rest: pa.Table | None = field(default=None, init=False)

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows from `start` to `stop` (exclusive) or the end; reading on from where the last call stopped is free."""
        if self._at != start:
            self._tables, self._rest, self._at = self.from_row(start), None, start
        while self._at < stop:
            table = self._rest if self._rest is not None else next(self._tables, None)
            if table is None:
                return
            wanted = stop - self._at
            self._rest = table[wanted:] if len(table) > wanted else None
            table = table[:wanted]
            self._at += len(table)
            yield table


def open_rows(source: Any, *, split: str | None = None, streaming: bool = False, **columns: str | None) -> Rows:
    """
    Open what `open_dataset` opens, with the same options, columns and ids.

    Parquet files, on a disk or at a URL, are read where they lie, without a copy in the cache. Other sources go
    through the cache of `datasets` and memory-mapped Arrow files, or with `streaming` (and for an `IterableDataset`)
    through nothing.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    if is_url(source):
        return _parquet_rows(source, split, columns)
    if isinstance(source, (str, os.PathLike)) and Path(source).exists() and parquet_files(Path(source)):
        return _parquet_rows(Path(source), split, columns)
    dataset = open_dataset(source, split=split, streaming=streaming, **columns)
    split = re.match(r"[\w.]+", split or str(dataset.split or "train"))[0]  # "train" of "train[:100]"
    if isinstance(dataset, datasets.IterableDataset):
        stream = dataset.with_format("arrow")

        def from_row(row):
            return stream.skip(row).iter(batch_size=ROWS_AT_ONCE)

        sample = list(itertools.islice(stream.iter(batch_size=SAMPLED_FROM_STREAM), 1))
        return Rows(name, split, dataset.features, None, _fingerprint(None, dataset.features, sample), from_row)
    arrow, length = dataset.with_format("arrow"), len(dataset)

    def from_row(row):
        return (arrow[start : start + ROWS_AT_ONCE] for start in range(row, length, ROWS_AT_ONCE))

    rows = np.unique(np.linspace(0, length - 1, SAMPLED_ROWS).round().astype(int))
    sample = (arrow[part.tolist()] for part in np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)))
    return Rows(name, split, dataset.features, length, _fingerprint(length, dataset.features, sample), from_row)


def _parquet_rows(source: Path | str, split: str | None, columns: dict) -> Rows:
    features = open_dataset(source, split=split, streaming=True, **columns).features  # and all of its checks
    shards = parquet_shards(source, split, columns.get("image_column"))
    split, system, files = shards.split, shards.system, [file.as_posix() for file in shards.files]
    ends = list(itertools.accumulate(shards.rows))
    numbered = columns.get("id_column") is None and "id" not in shards.features
    id_column = columns.get("id_column") or "id"

    def from_row(row):
        for index in range(bisect_right(ends, row), len(files)):
            first = ends[index - 1] if index else 0
            for table in shards.tables(index, row - first, at_once=ROWS_AT_ONCE):
                table = open_dataset(datasets.Dataset(datasets.table.InMemoryTable(table)), split=split, **columns)
                table = table.with_format("arrow")[:]
                if numbered:
                    ids = pa.array([f"{split}/{number}" for number in range(row, row + len(table))])
                    table = table.set_column(table.column_names.index("id"), "id", ids)
                yield table
                row += len(table)

    def own_ids():
        for file in files:
            with pq.ParquetFile(file, filesystem=system) as parquet:
                for batch in parquet.iter_batches(columns=[id_column]):
                    # A missing id is refused where its row is read.
                    yield [str(id_) for id_ in batch.column(0).to_pylist() if id_ is not None]

    # The same files are other rows by other columns (whose names are those of the features), and in other folders.
    state = hashlib.blake2b(f"{sorted(features.items())} {shards.folder_values}".encode(), digest_size=16)
    sizes = [system.size(file) for file in files]
    of_file = digest if sum(sizes) <= HASHED_WHOLE else _footer_digest
    for file, size in zip(files, sizes):
        state.update(f"{file.rpartition('/')[2]} {size} {of_file(file, system.open)}\n".encode())
    own_ids = None if numbered or id_column in shards.folder_values[0] else own_ids
    return Rows(os.fspath(source), split, features, ends[-1], state.hexdigest(), from_row, own_ids)


def first_repeated(ids: Callable[[], Iterator[list[str]]]) -> str | None:
    """
    The first id that was there before, if there is one. Eight bytes are kept of each, and a repetition is looked up.

    Args:
        ids (`Callable`): Gives all ids, some at a time, as often as it is called.
    """
    hashes = np.concatenate([np.fromiter(map(hash, some), np.int64) for some in ids()] or [np.empty(0, np.int64)])
    hashes.sort()
    suspects, seen = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()), set()
    for some in ids() if suspects else ():
        for id_ in some:
            if id_ in seen:
                return id_
            if hash(id_) in suspects:
                seen.add(id_)
    return None


def _footer_digest(file: str, open: Callable) -> str:
    """Of a Parquet file's footer, which holds the size and the statistics of every column of every row group."""
    with open(file, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.seek(-8 - int.from_bytes(stream.read(4), "little"), os.SEEK_END)
        return hashlib.blake2b(stream.read(), digest_size=16).hexdigest()


def _fingerprint(length: int | None, features: datasets.Features, sample) -> str:
    state = hashlib.blake2b(f"{length} {sorted(features.items())}".encode(), digest_size=16)
    for table in sample:
        state.update(repr(table.drop_columns(["image"]).to_pylist()).encode())
        for value in table["image"].to_pylist():
            state.update(b"null" if value is None else _content(value)["bytes"] or b"")
    return state.hexdigest()


def with_content(table: pa.Table, images: list[str], **changed: pa.Array) -> pa.Table:
    """
    The table with the content of image files instead of paths, which mean nothing elsewhere.

    Of a path no more remains than the file's name, and of a file that is too large for an image
    (`decoding.MAX_FILE_BYTES`) no content.

    Args:
        images (`list[str]`): Names of its image columns.
        changed (`pyarrow.Array`): Columns to replace or to add, by name.
    """
    for name in images:
        stored = [None if value is None else _content(value) for value in table[name].to_pylist()]
        changed[name] = pa.array(stored, datasets.Image().pa_type)
    return pa.table(dict(zip(table.column_names, table.columns)) | changed)


def _content(value: dict) -> dict:
    path, content = value["path"], value["bytes"]
    if content is None and path is not None and Path(path).is_file() and os.path.getsize(path) <= MAX_FILE_BYTES:
        content = Path(path).read_bytes()
    return {"bytes": content, "path": path and Path(path).name}
