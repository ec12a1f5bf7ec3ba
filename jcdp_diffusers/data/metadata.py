"""The `metadata` files of an image folder: one row per image, joined by the name of the file."""

import posixpath
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from .decoding import one_line
from .names import name_of


_CSV = pyarrow.csv.ConvertOptions(strings_can_be_null=False)  # a class may be called NA or null
_READERS = {
    ".csv": lambda file: pyarrow.csv.read_csv(file, convert_options=_CSV),
    ".jsonl": pyarrow.json.read_json,
    ".parquet": pq.read_table,
}


def read_metadata(source: Path, files: Sequence[Path], images: Sequence[Path], wanted: Sequence[Path]) -> pa.Table:
    """
    The columns of all metadata files, without `file_name`.

    A row may write the path of its image in any usual way: `./0.png`, `a\\\\0.png`, or absolute.

    Args:
        source (`Path`): The image folder.
        files (`Sequence[Path]`): The metadata files below it, relative to it.
        images (`Sequence[Path]`): All images below it, relative to it.
        wanted (`Sequence[Path]`): The images to have rows for.

    Returns:
        `pyarrow.Table`: One row for each of `wanted`; null where the metadata is silent.

    Raises:
        ValueError: If a row names what is no image of the folder, or one that another row has named.
    """
    if not files:
        return pa.table({})
    if len({file.suffix for file in files}) > 1:
        raise ValueError(
            f"source {name_of(source)} holds {files[0].as_posix()!r} and {files[-1].as_posix()!r}; metadata files of "
            "one kind are accepted."
        )
    by_name = {_comparable(path.as_posix()): path for path in images}
    tables, row_of, rows = [], {}, 0
    for file in files:
        table = _read(source / file)
        if tables and table.column_names != tables[0].column_names:
            raise ValueError(
                f"source {name_of(source / file)} has the columns {', '.join(table.column_names)}; those of "
                f"{files[0].as_posix()} are accepted: {', '.join(tables[0].column_names)}."
            )
        for row, name in enumerate(table["file_name"].to_pylist()):
            path = _named_image(source, file, name, by_name)
            if path in row_of:
                raise ValueError(f"source {name_of(source / file)} names {name!r} twice; one row each is accepted.")
            row_of[path] = rows + row
        rows += len(table)
        tables.append(table)
    try:
        table = pa.concat_tables(tables, promote_options="permissive").drop_columns(["file_name"])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"source {name_of(source)} has metadata files whose columns differ in type: {one_line(error)}"
        ) from error
    return table.take(pa.array([row_of.get(path) for path in wanted], pa.int64()))


def _read(file: Path) -> pa.Table:
    try:
        table = _READERS[file.suffix](file)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"source {name_of(file)} is no readable metadata file: {one_line(error)}") from error
    # Spreadsheets and people write "file_name, label", and so the rows.
    table = table.rename_columns([name.strip() for name in table.column_names])
    if file.suffix == ".csv":
        for place, column in enumerate(table.columns):
            if pa.types.is_string(column.type):
                texts = pc.utf8_trim_whitespace(column)
                texts = pc.if_else(pc.equal(texts, ""), None, texts)
                table = table.set_column(place, table.column_names[place], texts)
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"source {name_of(file)} has two columns of one name: {', '.join(table.column_names)}.")
    if "file_name" not in table.column_names:
        raise ValueError(
            f"source {name_of(file)} has the columns {', '.join(table.column_names)}; file_name is needed."
        )
    return table


def _named_image(source: Path, file: Path, name: str | None, by_name: dict[str, Path]) -> Path:
    """The image that a row of the metadata names."""
    names = f"source {name_of(source / file)} names {name!r}"
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{names} as a file; a file_name in every row is accepted.")
    written = name.strip()
    if "://" in written:
        raise ValueError(f"{names}, which is a URL; files below its folder are accepted.")
    if "\\" in written:
        written = written.replace("\\", "/")
    path = PurePosixPath(written)
    if path.is_absolute():
        places = (source.absolute(), source.resolve())
        base = next((place for place in places if path.is_relative_to(place.as_posix())), None)
        if base is None:
            raise ValueError(f"{names}, which lies outside of its folder; files below it are accepted.")
        relative = path.relative_to(base.as_posix()).as_posix()
    else:
        relative = (PurePosixPath(file.parent.as_posix()) / path).as_posix()
    relative = posixpath.normpath(relative)
    if relative.startswith("../"):
        raise ValueError(f"{names}, which lies outside of its folder; files below it are accepted.")
    if (found := by_name.get(_comparable(relative))) is not None:
        return found
    if (source / relative).exists():
        raise ValueError(f"{names}, which is no image that can be read; PNG, JPEG, WebP, BMP, GIF, TIFF are accepted.")
    raise ValueError(f"{names}, which does not exist; existing images are accepted.")


def _comparable(name: str) -> str:
    """A file's name in one of the ways to write its accents; macOS stores another than people type."""
    return unicodedata.normalize("NFC", name)
