"""
Images that a row names by a path instead of holding their bytes: only files of the row's source are opened.

A data set is made by somebody else. A path in it such as `/etc/passwd` or `file:///home/me/private.png` would put a
file of the reader into everything that is made of the set. Such a path gets the prefix `decoding.OUTSIDE`, with which
`decode_image` sets the image aside.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa

from .decoding import OUTSIDE
from .files import is_inside


_STORED = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def path_below(path: str, folder: Path, roots: Sequence[Path]) -> str:
    """
    A stored path as an absolute one, or marked as none of the source's.

    Args:
        path (`str`): As the row has it, relative to `folder` or absolute.
        folder (`Path`): Of the file that holds the row.
        roots (`Sequence[Path]`): Resolved folders that the file must lie in one of.
    """
    if path.startswith(OUTSIDE) or "://" in path:
        return path if path.startswith(OUTSIDE) else OUTSIDE + path
    target = folder.absolute() / path
    try:
        inside = any(is_inside(target, root) for root in roots)
    except (OSError, ValueError, RuntimeError):  # too long, with a null character, or a link to itself
        inside = False
    return str(target) if inside else OUTSIDE + path


def path_on_hub(path: str, name: str) -> str:
    """
    A path in a data set of the Hub, or marked as none of that data set's.

    Args:
        path (`str`): As the row has it: in the Hub's or the data sets' cache, or for a stream within the repository.
        name (`str`): The repository.
    """
    if "://" in path:
        place = path.split("::")[-1]
        belongs = place.startswith((f"hf://datasets/{name}@", f"hf://datasets/{name}/"))
        return path if belongs else OUTSIDE + path
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return path_below(path, Path(caches[0]), [Path(cache).resolve() for cache in caches])


def with_fenced_images(table: pa.Table, names: Sequence[str], allowed: Callable[[str], str]) -> pa.Table:
    """
    The table with its images as bytes, or as paths that `allowed` has looked at.

    Args:
        table (`pyarrow.Table`): Rows as stored.
        names (`Sequence[str]`): Its image columns; a column of texts holds paths.
        allowed (`Callable`): Takes a path and returns it, or the path to have instead.
    """
    for name in names:
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty column
            column = pa.array([], column.type)
        if pa.types.is_struct(column.type):
            stored, paths = column.field("bytes"), column.field("path").to_pylist()
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            stored, paths = pa.nulls(len(column), pa.binary()), column.to_pylist()
        else:
            continue
        needed = stored.is_null().to_pylist()
        paths = [allowed(path) if wanted and path is not None else None for wanted, path in zip(needed, paths)]
        struct = pa.StructArray.from_arrays(
            [stored.cast(pa.binary()), pa.array(paths, pa.string())],
            fields=list(_STORED),
            mask=column.is_null(),
        )
        table = table.set_column(table.column_names.index(name), name, struct)
    return table


def fenced_dataset(dataset, allowed: Callable[[str], str]):
    """
    A data set of the Hub whose images are bytes, or paths that `allowed` has looked at.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Its image columns not decoded.
        allowed (`Callable`): As for [`with_fenced_images`].
    """
    names = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_fenced_row, fn_kwargs={"names": names, "allowed": allowed}, features=dataset.features)
    plain = dataset.with_format("arrow")
    for name in names:
        column = dataset.data.column(name)
        has_paths = pa.types.is_string(column.type) or any(
            chunk.field("bytes").null_count for chunk in column.chunks if len(chunk)
        )
        if has_paths:
            table = with_fenced_images(plain.select_columns([name])[:], [name], allowed)
            rest = dataset.remove_columns(name)
            dataset = rest.add_column(name, table[name].combine_chunks(), feature=dataset.features[name])
    return dataset


def _fenced_row(row: dict, names: Sequence[str], allowed: Callable[[str], str]) -> dict:
    for name in names:
        value = row[name]
        if isinstance(value, dict) and value["bytes"] is None and value["path"] is not None:
            row[name] = {"bytes": None, "path": allowed(value["path"])}
    return row
