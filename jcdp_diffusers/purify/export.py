"""`jcdp purify --export`: the purified pictures under their own file names."""

import os
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from ..data import is_url, open_dataset
from ..data.export import check_export, export_names, export_picture
from ..outputs import check_apart
from ..storage import Folder
from .manifest import RUN_NAME
from .reader import ROWS_AT_ONCE


def check_places(
    export: str | os.PathLike, dataset: Any, output: str | os.PathLike, suffix: str, **where: str | None
) -> None:
    """
    Refuse an export that could not be written, before anything is purified.

    Args:
        export (`str` or `os.PathLike`): Folder of the export.
        dataset, output: Of the purification.
        suffix (`str`): A key of `data.export.FORMATS`.
        where: Options of `data.open_dataset`.

    Raises:
        ValueError: If two pictures would have one name, or the folder holds one of them and nothing was purified yet.
    """
    outputs = {} if is_url(output) else {"--output": output}
    check_apart(export, sources={"--dataset": dataset}, outputs=outputs, name="--export")
    rows = open_dataset(dataset, streaming=True, **where)
    columns = [name for name in ("id", "file_name") if name in rows.features]
    places = export_names([_name(row) for row in rows.select_columns(columns)], suffix)
    check_export(export, places, fresh=not Folder(output).fs.exists(RUN_NAME))


def export_purified(export: str | os.PathLike, output: Folder, summary: Mapping, suffix: str) -> int:
    """
    Write the pictures of a finished purification, shard by shard.

    Args:
        export, suffix: As for `check_places`.
        output (`Folder`): With the shards.
        summary (`Mapping`): Of `purify_to_folder`.

    Returns:
        `int`: How many pictures there are.
    """
    count = 0
    for name in summary["files"]:
        with pq.ParquetFile(name, filesystem=output.fs) as parquet:
            columns = [column for column in ("id", "image", "file_name") if column in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    (place,) = export_names([_name(row)], suffix)
                    export_picture(export, place, row["image"]["bytes"])
                    count += 1
    return count


def _name(row: Mapping) -> str:
    return row.get("file_name") or row["id"]
