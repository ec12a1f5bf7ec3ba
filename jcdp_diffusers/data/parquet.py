"""Folders and files of Parquet, in shards or not, on a disk or at a URL of fsspec."""

import glob
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast
from fsspec.implementations.local import LocalFileSystem

from ..storage import Folder
from .columns import IMAGE_COLUMNS, ROW_ID, image_columns, stored_images, undecoded
from .decoding import OUTSIDE, is_lfs_pointer, one_line
from .fence import path_below, with_fenced_images
from .files import allowed_root, files_below
from .found import PassedOver
from .labels import merged_names
from .names import METADATA_FILES, folder_values, name_of, natural_key, no_rows
from .splits import choose_split, split_of_file, splits_of


def is_url(source: Any) -> bool:
    """Whether a source is named by a URL of fsspec, such as `s3://bucket/folder`."""
    return isinstance(source, str) and "://" in source


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a folder (or the file itself) in order; empty if there are none."""
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    for deep in (False, True):  # a data set at the top is whole; what lies below it is something else
        found = files_below(source, (".parquet",), (), PassedOver(""), deep=deep)
        if files := [source / file for file in found if file.name not in METADATA_FILES]:
            return sorted(files, key=natural_key)
    return []


def parquet_splits(source: Path) -> dict[str, list[Path]]:
    """
    The Parquet files of each split; empty if there are none.

    Raises:
        ValueError: As `splits_of`, and where the files of one split lie in several folders.
    """
    files = parquet_files(source)
    if not files:
        return {}
    if source.is_file():
        return {split_of_file(source): files}
    splits = splits_of([file.relative_to(source) for file in files], source)
    for split, of_split in splits.items():
        places = sorted({"/".join(part for part in file.parts[:-1] if "=" not in part) for file in of_split})
        if len(places) > 1:
            raise ValueError(
                f"source {name_of(source)} has files of split {split!r} in several folders, {places[0] or '.'!r} and "
                f"{places[1]!r} among them; one folder per split is accepted, so give one of these."
            )
    return {split: [source / file for file in of_split] for split, of_split in splits.items()}


@dataclass
class Shards:
    """
    The files of one split, and what makes their rows alike.

    Args:
        source (`Path` or `str`): The file or folder, which images that are stored as paths must lie in; of those in
            files at a URL, none may be opened.
        split (`str`): Its name.
        system (`fsspec.AbstractFileSystem`): Where the files lie.
        files (`list[PurePath]`): In order, as `system` names them.
        rows (`list[int]`): Number of rows of each.
        features (`datasets.Features`): Of all rows: class names of all files, and the columns of folders such as
            `label=cat`.
        own_names (`list[dict]`): Per file, the class names of each column that has some.
        folder_values (`list[dict]`): Per file, the values that its folders stand for.
        images (`tuple`): Names of the image columns.
        has_paths (`bool`): Whether some image may be stored as a path.
    """

    source: Path | str
    split: str
    system: fsspec.AbstractFileSystem
    files: list[PurePath]
    rows: list[int]
    features: datasets.Features
    own_names: list[dict[str, tuple[str, ...]]]
    folder_values: list[dict[str, str | None]]
    images: tuple[str, ...]
    has_paths: bool

    @property
    def as_stored(self) -> bool:
        """Whether the files' rows are those of the split without a change."""
        same = all(names == self._joint_names() for names in self.own_names)
        return same and not self.has_paths and not any(self.folder_values)

    def adapted(self, table: pa.Table, index: int) -> pa.Table:
        """Rows of file number `index` as rows of the split."""
        if self.as_stored:
            return table
        joint = self._joint_names()
        for name, names in self.own_names[index].items():
            if names != joint[name]:
                labels = [
                    None if value in (None, -1) else joint[name].index(_name_of(value, names, name, self.files[index]))
                    for value in table[name].to_pylist()
                ]
                table = table.set_column(table.column_names.index(name), name, pa.array(labels, pa.int64()))
        for name, value in self.folder_values[index].items():
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
        if self.has_paths:
            table = with_fenced_images(table, self.images, self._allowed())
        return table_cast(table, self.features.arrow_schema)

    def tables(self, index: int, row: int = 0, *, at_once: int) -> Iterator[pa.Table]:
        """
        Rows of file number `index` as rows of the split, from one on.

        Args:
            index (`int`): Of the file.
            row (`int`): The first row, counted within the file; row groups before it are not read.
            at_once (`int`): Number of rows of a table, at most.
        """
        name = self.files[index].as_posix()
        with pq.ParquetFile(name, filesystem=self.system, buffer_size=2**20, pre_buffer=False) as parquet:
            counts = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
            ends = list(itertools.accumulate(counts))
            group = bisect_right(ends, row)
            skip = row - (ends[group - 1] if group else 0)
            for batch in parquet.iter_batches(batch_size=at_once, row_groups=range(group, len(counts))):
                if skip < len(batch):
                    table = pa.Table.from_batches([batch[skip:]], schema=parquet.schema_arrow)
                    yield self.adapted(table, index)
                skip = max(0, skip - len(batch))

    def _allowed(self) -> Callable[[str], str]:
        if is_url(self.source):
            return lambda path: OUTSIDE + path  # rows from elsewhere may name files of this machine
        folder = self.source.parent if self.source.is_file() else self.source
        return partial(path_below, folder=folder, roots=(allowed_root(folder),))

    def _joint_names(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(feature.names) for name, feature in self.features.items() if _has_names(feature)}


def parquet_shards(source: Path | str, split: str | None, image_column: str | None = None) -> Shards:
    """
    The files of one split, checked and compared.

    Args:
        source (`Path` or `str`): A folder with Parquet files, or one such file; or the URL of a folder with
            `<split>-*.parquet`, or of one such file.
        split (`str`, *optional*): The split to take; the only one by default. At a URL it must be given.
        image_column (`str`, *optional*): The column of images, where it has no usual name.

    Raises:
        ValueError: If files are missing, damaged, or do not fit together.
    """
    if is_url(source):
        system, files = _files_at_url(source, split)
    else:
        splits = parquet_splits(source)
        split = choose_split(splits, split, source)
        system, files = LocalFileSystem(), splits[split]
    _check_shards_complete(source, files)
    rows, features, may_have_paths = zip(*(_footer(file, system) for file in files))
    for file, columns in zip(files, features):
        if list(columns) != list(features[0]):
            raise ValueError(
                f"source {name_of(file)} has the columns {', '.join(columns)}; those of {files[0].name} are accepted: "
                f"{', '.join(features[0])}."
            )
    if sum(rows) == 0:
        raise no_rows(source, split)
    in_folders = isinstance(source, Path) and source.is_dir()
    folders = [folder_values(file.relative_to(source).parts[:-1]) if in_folders else {} for file in files]
    if len({tuple(sorted(values)) for values in folders}) > 1:
        raise ValueError(f"source {name_of(source)} has some files only in folders named key=value; all or none are.")
    # A column in the files goes before a folder's name; writers keep either.
    folders = [{key: value for key, value in values.items() if key not in features[0]} for values in folders]
    joint = _joint_features(files, features)
    joint.update({key: datasets.Value("string") for key in folders[0]})
    own = [{name: tuple(f.names) for name, f in columns.items() if _has_names(f)} for columns in features]
    images = set(image_columns(joint))
    for name in {image_column, *IMAGE_COLUMNS} & set(joint):
        if isinstance(joint[name], datasets.Value) and joint[name].dtype in ("string", "large_string"):
            joint[name] = datasets.Image()  # texts in it are paths
            images.add(name)
    for name in images:
        if not isinstance(joint[name], datasets.Image):  # pandas gives a path that is never there no type
            joint[name] = datasets.Image()
    untyped = any(_lacks_types(columns.get(name)) for columns in features for name in images)
    # Of files from elsewhere, not even what their footers count is believed.
    has_paths = is_url(source) or any(may_have_paths) or untyped or images != set(image_columns(features[0]))
    return Shards(source, split, system, files, list(rows), joint, own, folders, tuple(sorted(images)), has_paths)


def open_parquet(source: Path | str, split: str | None, streaming: bool, image_column: str | None = None):
    """The data set of the files of one split, and that split; arguments as for [`parquet_shards`]."""
    shards = parquet_shards(source, split, image_column)
    passed = PassedOver(name_of(source))
    if not is_url(source) and source.is_dir() and shards.files[0].parent == source:
        files_below(source, (".parquet",), (), passed, deep=False)
    passed.say(sum(shards.rows), f"rows of split {shards.split!r}")
    split, files = shards.split, shards.files
    if shards.as_stored and not streaming:
        paths = [glob.escape(str(file)) for file in files]  # `datasets` takes them for patterns
        dataset = datasets.load_dataset("parquet", data_files={split: paths}, split=split)
        return dataset, split
    features = datasets.Features({name: undecoded(feature) for name, feature in shards.features.items()})
    rows_of = {
        # Lists are what `datasets` divides among workers, so every file keeps the number of its first row.
        "files": list(range(len(files))),
        "starts": list(itertools.accumulate(shards.rows, initial=0))[:-1],
        "shards": shards,
    }
    if streaming:
        features[ROW_ID] = datasets.Value("string")
        return datasets.IterableDataset.from_generator(_parquet_rows, features=features, gen_kwargs=rows_of), split
    # Sizes, times and the like stand for the files' content in the name under which the cache keeps the rows.
    state = [str(shards.system.info(file.as_posix())) for file in files]
    rows_of |= {"state": [state] * len(files), "with_ids": False}
    return datasets.Dataset.from_generator(_parquet_rows, features=features, gen_kwargs=rows_of), split


def _parquet_rows(
    files: list[int], starts: list[int], shards: Shards, with_ids: bool = True, state: list | None = None
) -> Iterator[dict]:
    for index, row in zip(files, starts):
        for table in shards.tables(index, at_once=256):
            for values in table.to_pylist():
                row_id = {ROW_ID: f"{shards.split}/{row}"} if with_ids else {}
                yield {**values, **stored_images(values, shards.images), **row_id}
                row += 1


def _files_at_url(url: str, split: str | None) -> tuple[fsspec.AbstractFileSystem, list[PurePath]]:
    if split is None:
        raise ValueError(f"split is None, but must be given where the source is a URL ({url!r}).")
    name = url.rpartition("/")[2] if url.endswith(".parquet") else ""
    folder = Folder(url.removesuffix(name), "source")
    if name:  # not looked for in its folder, which a web server does not list
        names = [name] if folder.fs.exists(name) else []
    else:
        names = folder.names("", f"{split}-*.parquet")
    if not names:
        raise ValueError(
            f"source is {url!r}, where no file of split {split!r} is; a Parquet file and a folder with "
            f"{split}-*.parquet are accepted."
        )
    return folder.fs, sorted(map(PurePosixPath, names), key=natural_key)


def _footer(file: PurePath, system: fsspec.AbstractFileSystem) -> tuple[int, datasets.Features, bool]:
    """Number of rows of a file, its features, and whether some image of it may be stored as a path."""
    try:
        with pq.ParquetFile(file.as_posix(), filesystem=system) as parquet:
            features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
            return parquet.metadata.num_rows, features, _may_have_paths(parquet.metadata, features)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        with system.open(file.as_posix()) as stream:
            pointer = is_lfs_pointer(stream.read(64))
        reason = "a Git LFS pointer (git lfs pull fetches the file)" if pointer else one_line(error)
        raise ValueError(f"source {name_of(file)} is no readable Parquet file: {reason}") from error


def _may_have_paths(metadata: pq.FileMetaData, features: datasets.Features) -> bool:
    wanted = {f"{name}.bytes" for name in image_columns(features)}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema in wanted:
                counted = column.statistics is not None and column.statistics.has_null_count
                if not counted or column.statistics.null_count:
                    return True
    return False


def _lacks_types(feature) -> bool:
    """Whether an image's bytes or path are of the type of what is never there."""
    return isinstance(feature, Mapping) and any(getattr(part, "dtype", "") == "null" for part in feature.values())


def _has_names(feature) -> bool:
    return isinstance(feature, datasets.ClassLabel)


def _joint_features(files: Sequence[PurePath], features: Sequence[datasets.Features]) -> datasets.Features:
    """The first file's features, with the class names of all files."""
    joint = datasets.Features(features[0])
    for name in joint:
        with_names = [_has_names(columns[name]) for columns in features]
        if len(set(with_names)) > 1:
            other = files[with_names.index(not with_names[0])]
            raise ValueError(
                f"source {name_of(other)} has {'no class names' if with_names[0] else 'class names'} in column "
                f"{name!r}, unlike {files[0].name}; the same in all files is accepted."
            )
        if with_names[0]:
            joint[name] = datasets.ClassLabel(names=merged_names([columns[name].names for columns in features]))
    return joint


def _name_of(label: int, names: Sequence[str], column: str, file: PurePath) -> str:
    if not 0 <= label < len(names):
        raise ValueError(
            f"source {name_of(file)} has the label {label} in column {column!r}; 0 to {len(names) - 1}, and -1 for no "
            "label, are accepted."
        )
    return names[label]


def _check_shards_complete(source: str | Path, files: Sequence[PurePath]) -> None:
    found: dict[tuple[int, int], PurePath] = {}
    for file in files:
        if (shard := re.search(r"-(\d+)-of-(\d+)", file.stem)) is None:
            continue
        place = int(shard[1]), int(shard[2])
        if place[0] >= place[1]:
            raise ValueError(
                f"source {name_of(source)} has {file.name}, but parts are numbered from 0: {place[1] - 1:05d} is the "
                "last that is accepted."
            )
        if place in found:
            raise ValueError(
                f"source {name_of(source)} has {found[place].name} and {file.name}, which are the same part of a set; "
                "one of each is accepted."
            )
        found[place] = file
    totals = {total for _, total in found}
    if len(totals) > 1:
        raise ValueError(
            f"source {name_of(source)} mixes {' and '.join(map(str, sorted(totals)))} shards; one set is accepted."
        )
    for total in totals:
        missing = next((index for index in range(total) if (index, total) not in found), None)
        if missing is not None:
            raise ValueError(
                f"source {name_of(source)} lacks {total - len(found)} of {total} shards, the first {missing:05d}; "
                "a complete set is accepted."
            )
