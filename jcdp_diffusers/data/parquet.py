"""Folders and files of Parquet, in shards or not."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from .columns import ROW_ID, image_columns, stored_images, undecoded
from .decoding import one_line
from .names import METADATA_FILES, choose_split, is_visible, name_of, natural_key, no_rows, split_of


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a folder (or the file itself) in order; empty if there are none."""
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    for pattern in ("*.parquet", "**/*.parquet"):
        files = [file.relative_to(source) for file in source.glob(pattern) if file.name not in METADATA_FILES]
        files = [file for file in files if all(map(is_visible, file.parts))]
        if files:
            return [source / file for file in sorted(files, key=natural_key)]
    return []


def open_parquet(source: Path, files: list[Path], split: str | None, streaming: bool):
    """The data set of the files of one split, and that split."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    split = choose_split(splits, split, source)
    files = splits[split]
    _check_shards_complete(source, files)
    rows = _rows_of_each(files)
    if sum(rows) == 0:
        raise no_rows(source, split)
    if not streaming:
        dataset = datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
        return dataset, split
    features = datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
    dataset = datasets.IterableDataset.from_generator(
        _parquet_rows,
        features=datasets.Features(
            {name: undecoded(feature) for name, feature in features.items()} | {ROW_ID: datasets.Value("string")}
        ),
        # Lists are what `datasets` divides among workers, so every file keeps the number of its first row.
        gen_kwargs={
            "files": files,
            "starts": list(itertools.accumulate(rows, initial=0))[:-1],
            "split": split,
            "images": image_columns(features),
        },
    )
    return dataset, split


def _rows_of_each(files: list[Path]) -> list[int]:
    rows, columns = [], None
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                rows.append(parquet.metadata.num_rows)
                present = parquet.schema_arrow.names
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"source {name_of(file)} is no readable Parquet file: {one_line(error)}") from error
        columns = columns or present
        if present != columns:
            raise ValueError(
                f"source {name_of(file)} has the columns {', '.join(present)}; those of {files[0].name} are accepted: "
                f"{', '.join(columns)}."
            )
    return rows


def _parquet_rows(files: list[Path], starts: list[int], split: str, images: tuple[str, ...]) -> Iterator[dict]:
    for file, row in zip(files, starts):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield {**values, **stored_images(values, images), ROW_ID: f"{split}/{row}"}
                    row += 1


def _check_shards_complete(source: Path, files: list[Path]) -> None:
    shards = [re.search(r"-(\d+)-of-(\d+)", file.stem) for file in files]
    found = {(int(shard[1]), int(shard[2])) for shard in shards if shard}
    totals = {total for _, total in found}
    if len(totals) > 1:
        raise ValueError(
            f"source {name_of(source)} mixes {' and '.join(map(str, sorted(totals)))} shards; one set is accepted."
        )
    for total in totals:
        missing = sorted(set(range(total)) - {index for index, _ in found})
        if missing:
            raise ValueError(
                f"source {name_of(source)} lacks {len(missing)} of {total} shards, the first {missing[0]:05d}; "
                "a complete set is accepted."
            )
