"""Folders of image files, in class folders or not, with metadata files or not."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from .files import files_below
from .found import PassedOver
from .labels import LABEL_COLUMNS, class_order
from .metadata import read_metadata
from .names import METADATA_FILES, folder_values, is_visible, name_of, natural_key
from .splits import below_split, choose_split, splits_of


IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".heic", ".heif",
)  # fmt: skip


def open_image_folder(source: Path, split: str | None) -> tuple[datasets.Dataset, str]:
    """
    The data set of a folder of image files, and its split.

    An image's class is the folder that it lies in, directly below the split's folder. Folders between the two, or
    below a class, are accepted only where it is certain which of them is the class.

    Args:
        source (`Path`): A folder.
        split (`str`, *optional*): The split to take; the only one by default.

    Raises:
        ValueError: If there is no image, or splits or classes cannot be told from the folders.
    """
    if source.is_file():
        raise ValueError(
            f"source {name_of(source)} is a {source.suffix or 'nameless'} file; .parquet, .npz and .npy are accepted."
        )
    passed = PassedOver(name_of(source))
    found = files_below(source, IMAGE_SUFFIXES, METADATA_FILES, passed)
    metadata_files = sorted((file for file in found if file.name in METADATA_FILES), key=natural_key)
    images = sorted((file for file in found if file.name not in METADATA_FILES), key=natural_key)
    if not images:
        beside = "" if not len(passed) else f" but {next(iter(passed.reasons.values()))[0]!r}"
        raise ValueError(
            f"source {name_of(source)} holds no Parquet file and no image{beside}; {', '.join(IMAGE_SUFFIXES)} are "
            "accepted."
        )
    splits = splits_of(images, source)
    split = choose_split(splits, split, source)
    paths = splits[split]
    metadata = read_metadata(source, metadata_files, images, paths)
    # Every split's classes count, or a class that one split lacks would shift the labels there.
    classes = {} if set(LABEL_COLUMNS) & set(metadata.column_names) else _classes(splits, source)
    folder = _split_folder(paths)
    columns = {
        "image": [{"path": str(source.absolute() / path), "bytes": None} for path in paths],
        "file_name": [path.relative_to(folder).as_posix() for path in paths],
    }
    features = {"image": datasets.Image(decode=False), "file_name": datasets.Value("string")}
    if classes:
        names = class_order(classes.values())
        rank = {name: label for label, name in enumerate(names)}
        columns["label"] = [rank[classes[path]] for path in paths]
        features["label"] = datasets.ClassLabel(names=names)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name in metadata.column_names:
        free_name = f"other_{name}" if name in dataset.column_names else name
        dataset = dataset.add_column(free_name, metadata[name].to_pylist())
    passed.say(len(paths), f"images of split {split!r}")
    return dataset, split


def _split_folder(paths: Sequence[Path]) -> Path:
    """The folder that names the split of these images; the source's own where none does."""
    parts = paths[0].parts[:-1]
    below = below_split(paths[0])[1]
    folder = Path(*parts[: len(parts) - len(below)])
    return folder if all(path.is_relative_to(folder) for path in paths) else Path()


def _classes(splits: Mapping[str, Sequence[Path]], source: Path) -> dict[Path, str]:
    """The class of every image of all splits; empty where there are no classes."""
    images = [path for paths in splits.values() for path in paths]
    before = {below_split(path)[0] for path in images}
    if len(before) > 1:
        first, second = sorted("/".join(parts) or "." for parts in before)[:2]
        raise ValueError(
            f"source {name_of(source)} has folders of splits below {first!r} and below {second!r}; splits below one "
            "folder are accepted."
        )
    folders = {path: below_split(path)[1] for path in images}
    if labelled := _labels_in_folder_names(folders, source):
        return labelled
    levels = {len(parts) for parts in folders.values()}
    if levels == {0}:
        return {}
    if 0 in levels:
        beside = next(path for path, parts in folders.items() if not parts)
        raise ValueError(
            f"source {name_of(source)} holds {beside.as_posix()} beside class folders; images inside them are "
            "accepted."
        )
    highest = {parts[0] for parts in folders.values()}
    lowest = {parts[-1] for parts in folders.values()}
    if len(levels) == 1 and levels != {1} and len(lowest) > 1:
        raise ValueError(
            f"source {name_of(source)} has folders in folders: {_few(highest)} over {_few(lowest)}, and either may be "
            "the classes; give the folder that holds the class folders, and images directly in these."
        )
    if len(highest) == 1:
        return {}
    _refuse_empty(source, {path.parents[len(parts) - 1].parent for path, parts in folders.items()}, highest)
    return {path: parts[0] for path, parts in folders.items()}


def _labels_in_folder_names(folders: Mapping[Path, tuple[str, ...]], source: Path) -> dict[Path, str]:
    """Classes of folders such as `label=cat`."""
    values = {path: folder_values(parts) for path, parts in folders.items()}
    keys = {key for of_one in values.values() for key in of_one}
    if not keys:
        return {}
    if keys != {"label"} or any(value.get("label") is None for value in values.values()):
        raise ValueError(
            f"source {name_of(source)} has folders that are named by {_few(keys)} and '='; label=... on the way to "
            "every image is accepted."
        )
    return {path: value["label"] for path, value in values.items()}


def _refuse_empty(source: Path, places: set[Path], classes: set[str]) -> None:
    """Refuse a class folder without images; in another split's folder it may have some."""
    for place in sorted(places):
        for entry in sorted((source / place).iterdir()):
            if entry.is_dir() and not entry.is_symlink() and is_visible(entry.name) and entry.name not in classes:
                if not entry.name.startswith("__"):
                    raise ValueError(
                        f"source {name_of(source)} has the class folder {entry.name!r} without an image; a class "
                        "without images is accepted nowhere."
                    )


def _few(names: set[str]) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
