"""A data set as a folder of Parquet files that `load_dataset` opens."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from PIL import Image

from ..outputs import replacing
from .columns import decoded, undecoded
from .labelled import LabelledImages


def write_dataset(
    output_dir: str | os.PathLike,
    data: LabelledImages,
    *,
    split: str = "train",
    shards: int = 1,
    columns: Mapping[str, Sequence] | None = None,
    features: Mapping | None = None,
) -> list[Path]:
    """Write a folder that `datasets.load_dataset(output_dir)` and [`load_images`] open, bit for bit.

    The columns are `id`, `image` (PNG, lossless), `label` (with the class names, where known; texts, where they were
    texts), then `columns`. A shard
    appears under its name only when it is whole and on disk.

    Args:
        output_dir (`str` or `os.PathLike`): Folder, made if needed.
        split (`str`): First part of the files' names, `<split>-00000-of-0000K.parquet`.
        shards (`int`): K, the number of files, of equal length up to one row.
        columns (`dict`, *optional*): Further columns by name, one value per image.
        features (`dict`, *optional*): Types of `datasets` for some of these, such as class labels and images; found
            from the values elsewhere.

    Returns:
        `list[Path]`: The files, in order.
    """
    columns = {name: list(values) for name, values in (columns or {}).items()}
    for name, values in columns.items():
        if name in ("id", "image", "label"):
            raise ValueError(f"columns has {name!r}, which data itself provides; other names are accepted.")
        if len(values) != len(data):
            raise ValueError(
                f"columns[{name!r}] has {len(values)} values for {len(data)} images; one each is accepted."
            )
    if not 1 <= shards <= len(data):
        raise ValueError(f"shards is {shards} for {len(data)} images; 1 to {len(data)} are accepted.")
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split is {split!r}; letters, digits, _ and single dots are accepted.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [output_dir / f"{split}-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
    others = sorted(set(output_dir.glob(f"{split}-*-of-*.parquet")) - set(paths))
    if others:
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} holds {others[0].name}, not one of {shards} shards; a folder without "
            "it is accepted."
        )
    written = _features(data)
    if columns:
        given = {name: decoded(feature) for name, feature in (features or {}).items()}
        untold = {name: values for name, values in columns.items() if name not in given}
        told = given | dict(datasets.Dataset.from_dict(untold).features)
        written.update({name: told[name] for name in columns})
    for path, rows in zip(paths, np.array_split(np.arange(len(data)), shards)):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        extra = {name: values[start:stop] for name, values in columns.items()}
        dataset = datasets.Dataset.from_dict({**_encoded_columns(data, start, stop), **extra}, features=written)
        table = dataset.with_format("arrow")[:]
        write_table(path, table.replace_schema_metadata(written.arrow_schema.metadata))
    return paths


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet file that appears under its name only when it is whole and on disk."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(table, file, row_group_size=1000)


def _features(data: LabelledImages) -> datasets.Features:
    features = {"id": datasets.Value("string"), "image": datasets.Image()}
    if data.labels is not None:
        named = data.class_names is not None and not data.ranked_by_text
        kind = datasets.Value("string" if data.ranked_by_text else "int64")
        features["label"] = datasets.ClassLabel(names=list(data.class_names)) if named else kind
    return datasets.Features(features)


def _encoded_columns(data: LabelledImages, start: int, stop: int) -> dict[str, list]:
    columns = {
        "id": list(data.ids[start:stop]),
        "image": [{"bytes": png(image), "path": None} for image in data.images[start:stop]],
    }
    if data.labels is not None:
        labels = data.labels[start:stop].tolist()
        columns["label"] = [data.class_names[label] for label in labels] if data.ranked_by_text else labels
    return columns


def encoded(data: LabelledImages) -> datasets.Dataset:
    """Images in memory as a data set of PNG files."""
    features = datasets.Features({name: undecoded(feature) for name, feature in _features(data).items()})
    return datasets.Dataset.from_dict(_encoded_columns(data, 0, len(data)), features=features)


def png(image: np.ndarray) -> bytes:
    """A PNG file, lossless, of a uint8 array (H, W, 1 or 3)."""
    buffer = io.BytesIO()
    as_picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def as_picture(image: np.ndarray) -> Image.Image:
    """A grey or RGB picture of a uint8 array (H, W, 1 or 3)."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
