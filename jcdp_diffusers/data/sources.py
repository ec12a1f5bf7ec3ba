"""Any source of images: opened as a data set of any size, or loaded into memory."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .arrays import arrays_of
from .columns import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    ROW_ID,
    find_column,
    renamed,
    with_images_encoded,
    with_row_ids,
    with_string_ids,
)
from .decoding import ImageRejected, decode_image, one_line
from .fence import fenced_dataset, path_on_hub
from .found import say_once
from .image_folder import open_image_folder
from .labelled import LabelledImages
from .labels import LABEL_COLUMNS, LIKE_LABELS, label_array
from .names import name_of, no_rows
from .parquet import is_url, open_parquet, parquet_files
from .splits import choose_split
from .writing import as_picture, encoded


def load_images(
    source: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
    rejected: list[dict] | None = None,
) -> LabelledImages:
    """All images of a source in memory, with labels and ids.

    Args:
        source (`Any`): What [`open_dataset`] takes, an (images, labels) pair of arrays, or a [`LabelledImages`].
        split (`str`, *optional*): The split to take; None takes the only one and otherwise raises with the splits
            listed.
        image_column, label_column, id_column (`str`, *optional*): Names of the columns; found by their usual names
            when None.
        image_size (`int`, *optional*): Side of the square that every image is brought to, as [`decode_image`] says.
        channels (`int`, defaults to 3): 3 or 1, as [`decode_image`] says.
        rejected (`list[dict]`, *optional*): A list that takes `{"id", "file", "reason"}` of every image that cannot be
            used, whose row is left out; None raises at the first of them. Rows in = rows out + rejected. `file` is
            None where there is none.

    Labels are None when the source has no label column, or a label column not named by the caller that is empty
    throughout (None or -1); a part of them missing is an error. Labels that are strings become their rank among the
    sorted names.
    """
    arrays = arrays_of(source, split)
    if arrays is not None:
        return _adapted(arrays, channels, image_size, rejected, source)
    # Files are read in one pass, without the copy in the cache that random access would need.
    streaming = is_url(source) or (isinstance(source, (str, os.PathLike)) and Path(source).exists())
    dataset, id_space = _open(
        source,
        split=split,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
        streaming=streaming,
    )
    images, labels, ids, files = [], [], [], []
    for row, image in _decoded(dataset, channels, image_size, rejected, source):
        images.append(image)
        ids.append(row["id"])
        files.append(_file_of(row))
        labels.append(row.get("label"))
    if not images:
        raise ValueError(f"source {name_of(source)} has no image that can be used; at least one is accepted.")
    feature, class_names = dataset.features.get("label"), None
    if feature is not None:
        labels, class_names = label_array(labels, ids, feature, label_column)
    else:
        labels = None
    named = tuple(files) if any(files) else None
    by_text = class_names is not None and not isinstance(feature, datasets.ClassLabel)
    return LabelledImages(_stack(images, ids), labels, tuple(ids), class_names, id_space, named, by_text)


def open_dataset(
    source: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A source of any size as a data set with the columns `id`, `image`, `label` (if it has labels), then all others.

    Images are left encoded (`datasets.Image(decode=False)`), so that a bad one cannot break the iteration;
    [`decode_image`] decodes a row's.

    Args:
        source (`Any`): A path, a URL, or else a Hub id, or an object.

            - a folder of Parquet files, `<split>-*.parquet` (files of other names make up the split "train"), or one
              file; a numbered set of shards has to be complete;
            - an image folder: `<class>/*.png`, labelled by the rank of the class's name, or `*.png`, unlabelled;
              either of them optionally in folders named like splits; a `metadata.csv`, `.jsonl` or `.parquet` with a
              `file_name` column adds columns (a `label` in it goes before the folders); files with other suffixes than
              images' are no rows;
            - `.npz` with `images` and optionally `labels` and `ids`, or `.npy` with images: (N, H, W, 1 or 3), uint8
              or floats in [0, 1], which are rounded to 8 bits;
            - a URL of fsspec (`s3://...`) of a folder with `<split>-*.parquet`, or of one such file, for which split
              must be given; images that its rows name by paths are not opened;
            - "owner/name" on the Hub, or "owner/name:config";
            - a `datasets.Dataset`, an `IterableDataset` (which stays one), a dict of these; an (images, labels) pair
              of arrays; a [`LabelledImages`].
        split (`str`, *optional*): The split to take; None takes the only one and otherwise raises with the splits
            listed.
        image_column, label_column, id_column (`str`, *optional*): Names of the columns, by default the first present
            of `image`, `img`; of `label`, `labels`, `fine_label`; and `id`. A column that stood under the new name
            becomes `other_<name>`.
        streaming (`bool`): An `IterableDataset` that reads as it goes, instead of a `Dataset` in the cache.

    Ids are the id column as strings, else `<split>/<row>` with the row's number in the source's order; so shuffle and
    filter what this function returns rather than what it is given. Files of an image folder are ordered with numbers
    in their names taken as numbers ("2.png" before "10.png"). In a stream, ids are right under any sharding and
    shuffling of it.
    """
    return _open(
        source,
        split=split,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
        streaming=streaming,
    )[0]


def _open(
    source: Any,
    *,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    id_column: str | None,
    streaming: bool,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str | None]:
    """`open_dataset`, and the space in which the ids mean something (see LabelledImages)."""
    arrays = arrays_of(source, split)
    if arrays is not None:
        dataset = encoded(arrays)
        return (dataset.to_iterable_dataset() if streaming else dataset), arrays.id_space
    dataset, split, id_space, on_hub = _rows_of(source, split, streaming, image_column)
    columns = [column for column in dataset.features if column != ROW_ID]
    names = {
        "id": find_column(columns, id_column, ID_COLUMNS, "id_column", source),
        "image": find_column(columns, image_column, IMAGE_COLUMNS, "image_column", source),
        "label": find_column(columns, label_column, LABEL_COLUMNS, "label_column", source),
    }
    if names["image"] is None:
        raise ValueError(
            f"source {name_of(source)} has no image column among {', '.join(columns)}; image, img or the one "
            "named by image_column is accepted."
        )
    if names["label"] is None and (like := [column for column in columns if column in LIKE_LABELS]):
        say_once(f"source {name_of(source)} has no label column, but {like[0]!r}, which label_column can name.")
    dataset = renamed(dataset, names)
    dataset = with_row_ids(dataset, split) if names["id"] is None else with_string_ids(dataset, source)
    dataset = with_images_encoded(dataset, source)
    if on_hub:
        dataset = fenced_dataset(dataset, partial(path_on_hub, name=id_space.partition(":")[0]))
    first = [name for name in ("id", "image", "label") if name in dataset.features]
    others = [name for name in dataset.features if name not in (*first, ROW_ID)]
    dataset = dataset.select_columns(first + others)
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset, id_space if names["id"] is None else ""


def column_names(source: Any, *, split: str | None = None) -> list[str]:
    """
    Columns of a source under its own names.

    Args:
        source, split: As for `open_dataset`.
    """
    if (arrays := arrays_of(source, split)) is not None:
        return ["id", "image"] + (["label"] if arrays.labels is not None else [])
    return [column for column in _rows_of(source, split, True, None)[0].features if column != ROW_ID]


def present_columns(source: Any, named: Mapping[str, str | None], *, split: str | None = None) -> dict[str, str]:
    """
    Of the columns that are named for several sources, those that this one has; for one whose labels nobody needs.

    Args:
        source, split: As for `open_dataset`.
        named (`dict`): By argument of `open_dataset`, the name of a column; None where none is named.
    """
    given = {argument: name for argument, name in named.items() if name is not None}
    there = column_names(source, split=split) if given else ()
    return {argument: name for argument, name in given.items() if name in there}


def _rows_of(
    source: Any, split: str | None, streaming: bool, image_column: str | None
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, str | None, bool]:
    """A source's rows as they are, its split, the space of its row numbers, and whether it lies on the Hub."""
    id_space, on_hub = None, False
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        split = choose_split(source, split, source)
        dataset = source[split]
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        dataset, split = source, split or str(source.split or "train")
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"source is a {type(source).__name__}; a path, a Hub id, a datasets.Dataset, LabelledImages and arrays "
            "are accepted."
        )
    elif is_url(source):
        id_space = source
        dataset, split = open_parquet(source, split, streaming, image_column)
    elif Path(source).exists():
        id_space = str(Path(source).resolve())
        if parquet_files(Path(source)):
            dataset, split = open_parquet(Path(source), split, streaming, image_column)
        else:
            dataset, split = open_image_folder(Path(source), split)
    else:
        id_space = str(source)
        dataset, split = _open_hub(id_space, split, streaming)
        on_hub = True
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise no_rows(source, split)
    if dataset.features is None:
        dataset = dataset._resolve_features()  # a stream of JSON or CSV knows its columns from its first rows only
    return dataset, split, id_space, on_hub


def _open_hub(source: str, split: str | None, streaming: bool):
    name, _, config = source.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).suffix in (".parquet", ".npz", ".npy"):
        raise FileNotFoundError(f"source {source!r} does not exist; a folder, a file and a Hub id are accepted.")
    config = config or None
    if split is None:
        splits = _from_hub(source, lambda: datasets.get_dataset_split_names(name, config))
        split = choose_split(splits, None, source)
    return _from_hub(source, lambda: datasets.load_dataset(name, config, split=split, streaming=streaming)), split


def _from_hub(source: str, load: Callable):
    try:
        return load()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"source {source!r} is no folder or file here and could not be loaded from the Hub: {one_line(error)}"
        ) from error


def _decoded(rows, channels: int, image_size: int | None, rejected: list[dict] | None, source: Any):
    """(row, image) of every usable row; the others go to `rejected`, or the first of them raises."""
    changed: dict[str, list[str]] = {}
    for row in rows:
        changes: list[str] = []
        try:
            image = decode_image(row["image"], channels, image_size, changes=changes)
        except ImageRejected as error:
            file = _file_of(row)
            if rejected is None:
                named = f"id {row['id']!r}" if file is None else repr(file)
                raise ValueError(
                    f"source {name_of(source)} has an image that cannot be used, {named}: {error.reason}."
                ) from error
            rejected.append({"id": row["id"], "file": file, "reason": error.reason})
            continue
        for change in changes:
            changed.setdefault(change, []).append(_file_of(row) or row["id"])
        yield row, image
    for change, names in changed.items():
        say_once(f"source {name_of(source)}: {change} in {len(names)} image(s), the first {names[0]!r}.")


def _file_of(row: Mapping) -> str | None:
    """The file that a row's image lies in, where it has one of its own."""
    path = row["image"].get("path") if isinstance(row["image"], Mapping) else None
    return row.get("file_name") or path


def _adapted(
    data: LabelledImages, channels: int, image_size: int | None, rejected: list[dict] | None, source: Any
) -> LabelledImages:
    size = data.images.shape[1:3] if image_size is None else (image_size, image_size)
    if data.images.shape[1:] == (*size, channels):
        return data
    rows = (
        {"image": as_picture(image), "id": id_, "index": index}
        for index, (id_, image) in enumerate(zip(data.ids, data.images))
    )
    kept, images = [], []
    for row, image in _decoded(rows, channels, image_size, rejected, source):
        kept.append(row["index"])
        images.append(image)
    if not images:
        raise ValueError(f"source {name_of(source)} has no image that can be used; at least one is accepted.")
    return data.subset(kept).with_images(np.stack(images))


def _stack(images: list[np.ndarray], ids: list[str]) -> np.ndarray:
    first = {}
    for image, id_ in zip(images, ids):
        first.setdefault(image.shape[:2], id_)
    if len(first) > 1:
        sizes = sorted(first, key=lambda size: (size[0] * size[1], size))
        small, large = (f"{size[1]}x{size[0]} (id {first[size]!r})" for size in (sizes[0], sizes[-1]))
        raise ValueError(
            f"the images have {len(first)} sizes, from {small} to {large}; one size is accepted, or image_size, which "
            "brings them all to one."
        )
    return np.stack(images)
