"""Columns of a data set by the names that they have here: id, image, label."""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from .labelled import check_ids
from .names import name_of


IMAGE_COLUMNS = ("image", "img")
ID_COLUMNS = ("id",)
ROW_ID = "row_id__"  # carries a stream's row numbers until it is known whether the source has ids of its own


def find_column(
    columns: list[str], name: str | None, usual: tuple[str, ...], argument: str, source: Any
) -> str | None:
    """The column called `name`, or the first of its `usual` names; `argument` is what an error calls it."""
    if name is not None and name not in columns:
        raise ValueError(
            f"{argument} is {name!r}, which source {name_of(source)} lacks; {', '.join(columns)} are accepted."
        )
    return name or next((column for column in usual if column in columns), None)


def renamed(dataset, names: dict[str, str | None]):
    """`names` maps the name wanted to the present one; a column in the way gets the first free name `other_<name>`."""
    renames = {present: wanted for wanted, present in names.items() if present not in (None, wanted)}
    in_the_way = {wanted: _free(wanted, dataset) for wanted in renames.values() if wanted in dataset.features}
    for step in (in_the_way, renames):
        if step:
            dataset = dataset.rename_columns(step)
    return dataset


def _free(name: str, dataset) -> str:
    while name in dataset.features:
        name = f"other_{name}"
    return name


def with_images_encoded(dataset, source: Any):
    """The data set with its images as files, so that a bad one cannot break the iteration."""
    for name, feature in dataset.features.items():
        if name == "image" and not _can_hold_images(feature):
            raise ValueError(
                f"source {name_of(source)} has an image column of type {feature}; images, the bytes of files and "
                "paths are accepted."
            )
        if isinstance(feature, datasets.Image) or name == "image":
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _can_hold_images(feature) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or _is_image_struct(feature)


def _is_image_struct(feature) -> bool:
    """What an image column is in a Parquet file that was written without the features of `datasets`."""
    return isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}


def with_string_ids(dataset, source: Any):
    """The data set with its ids as strings, each of them once."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.cast_column("id", datasets.Value("string"))
    ids = [None if value is None else str(value) for value in dataset["id"][:]]
    check_ids(ids, f"source {name_of(source)}: ")
    if dataset.features["id"] == datasets.Value("string"):
        return dataset
    # A cast would write the whole data set anew, images and all.
    return dataset.remove_columns("id").add_column("id", ids)


def with_row_ids(dataset, split: str):
    """The data set with an id of split and row number for each row."""
    if isinstance(dataset, datasets.Dataset):
        return dataset.add_column("id", [f"{split}/{row}" for row in range(len(dataset))])
    if ROW_ID in dataset.features:
        return dataset.rename_column(ROW_ID, "id")
    # A stream's own index restarts in every shard and follows its shuffling, so the whole becomes one shard here.
    return datasets.IterableDataset.from_generator(
        _numbered_rows,
        features=datasets.Features({**dataset.features, "id": datasets.Value("string")}),
        gen_kwargs={"dataset": dataset, "split": split, "images": image_columns(dataset.features)},
    )


def _numbered_rows(dataset: datasets.IterableDataset, split: str, images: tuple[str, ...]) -> Iterator[dict]:
    for row, values in enumerate(dataset):
        yield {**values, **stored_images(values, images), "id": f"{split}/{row}"}


def image_columns(features: datasets.Features) -> tuple[str, ...]:
    """Names of the columns that hold images."""
    return tuple(
        name for name, feature in features.items() if isinstance(feature, datasets.Image) or _is_image_struct(feature)
    )


def stored_images(values: dict, images: tuple[str, ...]) -> dict:
    """The image columns of a row in the form that `datasets` leaves as it is.

    Given both bytes and a path, it would drop the bytes if a file of that name lay in the working directory, and a
    null inside the struct would stop the whole stream.
    """
    stored = {}
    for name in images:
        value = values[name]
        if isinstance(value, Mapping) and value["bytes"] is not None:
            value = {"bytes": value["bytes"], "path": None}
        elif isinstance(value, Mapping) and value["path"] is None:
            value = None
        stored[name] = value
    return stored


def undecoded(feature):
    """The feature, or for images the one that leaves them encoded."""
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def decoded(feature):
    """The feature, or for images the one that decodes them, as readers expect it."""
    return datasets.Image() if isinstance(feature, datasets.Image) else feature
