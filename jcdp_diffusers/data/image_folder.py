"""Folders of image files, in class folders or not, with a metadata file or not."""

import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from .names import METADATA_FILES, SPLIT_NAMES, choose_split, is_visible, name_of, natural_key


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_image_folder(source: Path, files: list[Path], split: str | None, streaming: bool):
    """The data set of a folder of image files, and its split; `files` is what `open_parquet` takes."""
    if source.is_file():
        raise ValueError(
            f"source {name_of(source)} is a {source.suffix or 'nameless'} file; .parquet, .npz and .npy are accepted."
        )
    entries = list(source.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir() and is_visible(entry.name))
    has_images = any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)
    in_splits = bool(folders) and set(folders) <= set(SPLIT_NAMES) and not has_images
    splits = {name: source / name for name in folders} if in_splits else {"train": source}
    split = choose_split(splits, split, source)
    # Every split's classes count, or a class that one split lacks would shift the labels there.
    images = {name: _image_files(folder) for name, folder in splits.items()}
    classes = sorted({path.parts[0] for paths in images.values() for path in paths if len(path.parts) > 1})
    if classes:
        below = {entry.name for place in splits.values() for entry in place.iterdir() if entry.is_dir()}
        if empty := sorted(name for name in below.difference(classes) if is_visible(name)):
            raise ValueError(
                f"source {name_of(source)} has the class folder {empty[0]!r} without an image; a class without images "
                "is accepted nowhere."
            )
    folder, paths = splits[split], images[split]
    if not paths:
        raise ValueError(
            f"source {name_of(folder)} holds no Parquet file and no image; {', '.join(IMAGE_SUFFIXES)} are accepted."
        )
    columns = {
        "image": [{"path": str(folder.absolute() / path), "bytes": None} for path in paths],
        "file_name": [path.as_posix() for path in paths],
    }
    features = {"image": datasets.Image(decode=False), "file_name": datasets.Value("string")}
    metadata = _image_metadata(source, folder, paths)
    if classes and "label" not in metadata.column_names:
        beside = next((path for path in paths if len(path.parts) == 1), None)
        if beside is not None:
            raise ValueError(
                f"source {name_of(folder)} holds {beside} beside class folders; images inside them are accepted."
            )
        columns["label"] = [classes.index(path.parts[0]) for path in paths]
        features["label"] = datasets.ClassLabel(names=classes)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name in metadata.column_names:
        free_name = f"other_{name}" if name in dataset.column_names else name
        dataset = dataset.add_column(free_name, metadata[name].to_pylist())
    return dataset, split


def _image_files(folder: Path) -> list[Path]:
    """Paths below `folder`, relative to it, in natural order."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_visible(name)]
        relative = Path(place).relative_to(folder)
        paths += [relative / name for name in names if is_visible(name) and name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(paths, key=natural_key)


def _image_metadata(source: Path, folder: Path, paths: list[Path]) -> pa.Table:
    """The columns of the metadata file in `folder` or `source`, in the order of `paths`; null where it is silent."""
    file = next(
        (place / name for place in (folder, source) for name in METADATA_FILES if (place / name).exists()), None
    )
    if file is None:
        return pa.table({})
    read = {".csv": pyarrow.csv.read_csv, ".jsonl": pyarrow.json.read_json, ".parquet": pq.read_table}[file.suffix]
    table = read(file)
    if "file_name" not in table.column_names:
        raise ValueError(
            f"source {name_of(file)} has the columns {', '.join(table.column_names)}; file_name is needed."
        )
    rows = {name: row for row, name in enumerate(table["file_name"].to_pylist())}
    for name in rows:
        if not (file.parent / name).exists():
            raise ValueError(
                f"source {name_of(file)} names {name!r}, which does not exist; existing images are accepted."
            )
    order = pa.array([rows.get((folder / path).relative_to(file.parent).as_posix()) for path in paths], pa.int64())
    return table.drop_columns(["file_name"]).take(order)
