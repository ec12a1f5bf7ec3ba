"""Any image data set in; images, labels and stable ids out; and the check that the three roles do not overlap.

An image is uint8 of shape (height, width, channels) here. Floats exist between :meth:`LabelledImages.tensor` and
:func:`to_uint8`, which rounds once. Ids travel with the images, so that shuffles and filters cannot misalign anything.
"""

import hashlib
import io
import itertools
import math
import os
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps


IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
ID_COLUMNS = ("id",)
ROW_ID = "row_id__"  # carries a stream's row numbers until it is known whether the source has ids of its own
# JPEG 2000 and AVIF are left out: Pillow reduces their 10 to 16 bits to 8 without a sign of it.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = ("train", "validation", "test", "val", "valid", "dev")
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # what Pillow itself calls a decompression bomb
# Two images are near each other when no value differs by more than the budget, and also when few values do, for OPS
# changes one pixel by up to 255 and AR single values by up to 44. This share of the values may (one pixel always),
# while the others lie within the budget or, if that is larger, FEW_LEVELS. Measured at 16 levels: OPS on CIFAR-10
# leaves 0.1 % of the values outside, AR 0.6 % (median; two images in three are found, and with 2 % all but one in a
# hundred would be), CUDA 42 %, which no nearness finds. Different images: every training image of CIFAR-10 differs
# from every test image in 5.6 % at least, but strokes on a black ground come closer. Handwritten digits of 8x8 differ
# in 15.6 % at least, in 3.9 % amidst a black margin that makes them 16x16: 5 % would take 61 of 807,300 such pairs
# for one image, 1 to 3 % none.
FEW = 0.01
FEW_LEVELS = 16
# What Pillow's decoders raise on bytes that are no image (cutting and changing bytes of every format raised these).
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageRejected(ValueError):
    """One image cannot be used; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their labels and ids, in memory.

    Args:
        images: uint8 of shape (N, H, W, C), C = 1 or 3, N at least 1.
        labels: integers of shape (N,), kept as int64, or None.
        ids: N different strings.
        class_names: name of label 0, 1, ..., where known.
        id_space: where the ids have their meaning. "" for ids that were given (an `id` column, the caller); the
            source's name for row numbers of a source without ids, which mean something within that source only; None
            for row numbers of something without a name. Ids of two sets are compared only within one space.
    """

    images: np.ndarray
    labels: np.ndarray | None
    ids: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    id_space: str | None = ""

    def __post_init__(self):
        _check_image_array(self.images, "images")
        object.__setattr__(self, "ids", tuple(self.ids))
        if len(self.ids) != len(self.images):
            raise ValueError(f"ids has {len(self.ids)} entries for {len(self.images)} images; one each is accepted.")
        _check_ids(self.ids)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.shape != (len(self.images),):
                raise ValueError(
                    f"labels has shape {labels.shape} for {len(self.images)} images; one label per image is accepted."
                )
            if labels.dtype.kind not in "iu":
                raise ValueError(f"labels has dtype {labels.dtype}; integers are accepted.")
            if labels.min() < 0:
                row = int(np.argmax(labels < 0))
                raise ValueError(f"labels has {labels[row]} at id {self.ids[row]!r}; 0 and above are accepted.")
            if self.class_names is not None and labels.max() >= len(self.class_names):
                raise ValueError(
                    f"labels goes up to {labels.max()} but class_names has {len(self.class_names)} entries; "
                    "a name for every label is accepted."
                )
            object.__setattr__(self, "labels", labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "LabelledImages":
        """The rows at `indices` (integers, or a boolean mask of length N), in that order, ids and labels with them."""
        indices = np.asarray(indices)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise ValueError(f"indices is a mask of shape {indices.shape}; ({len(self)},) is accepted.")
            indices = np.flatnonzero(indices)
        if indices.size == 0:
            raise ValueError("indices selects no image; at least one is accepted.")
        return replace(
            self,
            images=self.images[indices],
            labels=None if self.labels is None else self.labels[indices],
            ids=tuple(self.ids[index] for index in indices),
        )

    def with_images(self, images: np.ndarray) -> "LabelledImages":
        """The same rows with other pixels: uint8 (N, H, W, C), of any size."""
        return replace(self, images=images)

    def tensor(self) -> torch.Tensor:
        """float32 (N, C, H, W) in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2))).float().div_(255)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Clip to [0, 1] and round once.

    Args:
        images: float (N, C, H, W); 1.0 is level 255.

    Returns:
        uint8 (N, H, W, C).
    """
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; floats in [0, 1] are accepted.")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}; (N, 1 or 3, H, W) is accepted.")
    if not torch.isfinite(images).all():
        raise ValueError("images holds NaN or infinity; finite values are accepted.")
    levels = images.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


# ---------------------------------------------------------------------------------------------------------- one image


def decode_image(value: Any, channels: int = 3, image_size: int | None = None) -> np.ndarray:
    """One stored image as an array, or the reason why not.

    Lossless where the file is: palettes without transparency and 1-bit images are expanded, a grey image becomes RGB
    by repetition for `channels=3`, an RGB image whose three channels agree becomes grey for `channels=1`. Refused,
    because something would be lost silently: alpha and transparency of any kind, CMYK and other colour spaces, more
    than 8 bits per channel, more than one frame, colour when `channels=1`. The orientation tag is applied (as
    `datasets.Image` does); colour profiles are not.

    With `image_size`, the shorter side is brought to `image_size` with Pillow's antialiased Lanczos filter and the
    centre is cropped, in one step: the largest centred square of the source becomes the result, so the scale is the
    same in both directions. A square of that size stays as it is.

    Args:
        value: `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives, the bytes of a file, a path or a
            PIL image.
        channels: 3 or 1.
        image_size: side of the square wanted, in pixels; None keeps the size.

    Returns:
        uint8 (H, W, channels).

    Raises:
        ImageRejected: the image cannot be used; `reason` says why.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; 1 and 3 are accepted.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; 1 and above are accepted.")
    picture = _open_picture(value)
    try:
        _refuse_before_decoding(picture)
        picture.load()
        if picture.getexif().get(0x0112, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
    except ImageRejected:
        raise
    except DECODING_ERRORS as error:
        raise ImageRejected(f"damaged or truncated ({_one_line(error)})") from error
    picture = _as_grey_or_rgb(picture)
    if image_size is not None and picture.size != (image_size, image_size):
        picture = _resize_and_crop(picture, image_size)
    return _with_channels(np.asarray(picture), channels)


def _open_picture(value: Any) -> Image.Image:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ImageRejected("no image (null)")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, os.PathLike)):
        value = _read_file(os.fspath(value))
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"value is a {type(value).__name__}; bytes, a path, a PIL image and their dict are accepted.")
    if len(value) == 0:
        raise ImageRejected("empty file (0 bytes)")
    try:
        return Image.open(io.BytesIO(value), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageRejected(f"not a readable image ({', '.join(IMAGE_FORMATS)} are accepted)") from error
    except Image.DecompressionBombError as error:
        raise ImageRejected(f"decompression bomb: more than {MAX_PIXELS} pixels") from error
    except DECODING_ERRORS as error:
        raise ImageRejected(f"damaged or truncated ({_one_line(error)})") from error


def _read_file(path: str) -> bytes:
    if "://" in path:  # a streamed Hub data set names its files like this; trouble on the way there is not the image's
        with fsspec.open(path, "rb") as file:
            return file.read()
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageRejected(f"cannot be read ({error.strerror}: {path})") from error


def _refuse_before_decoding(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ImageRejected(f"decompression bomb: {width}x{height} is more than {MAX_PIXELS} pixels")
    # A JPEG with a preview or a depth map behind it (MPO, most phones) is one picture all the same.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise ImageRejected(f"animated or multi-page ({frames} frames)")
    for tile in getattr(picture, "tile", ()):
        # 16-bit colour opens as mode RGB; only the decoder's raw mode ("RGB;16B") tells.
        raw_mode = tile[3] if isinstance(tile[3], str) else tile[3][0] if isinstance(tile[3], tuple) else ""
        if ";16" in str(raw_mode):
            raise ImageRejected("16 bits per channel")


def _as_grey_or_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if picture.has_transparency_data:
        raise ImageRejected(f"transparency (mode {mode}), which would be dropped")
    if mode.startswith("I") or mode == "F":
        raise ImageRejected(f"more than 8 bits per channel (mode {mode})")
    if mode == "1":
        return picture.convert("L")
    if mode == "P":
        return picture.convert("RGB")
    if mode not in ("L", "RGB"):
        raise ImageRejected(f"colour space {mode}")
    return picture


def _resize_and_crop(picture: Image.Image, image_size: int) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Only the box is resampled, so a 1x100000 image costs no more than its square.
    box = (left, top, left + side, top + side)
    return picture.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if channels == 3 and image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 1 and image.shape[2] == 3:
        if (image != image[:, :, :1]).any():
            raise ImageRejected("colour, which would be dropped by channels=1")
        return np.ascontiguousarray(image[:, :, :1])
    return image


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- sources


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
        source: what :func:`open_dataset` takes, an (images, labels) pair of arrays, or a :class:`LabelledImages`.
        split: the split to take; None takes the only one and otherwise raises with the splits listed.
        image_column, label_column, id_column: names of the columns; found by their usual names when None.
        image_size: side of the square that every image is brought to, as :func:`decode_image` says.
        channels: 3 or 1, as :func:`decode_image` says.
        rejected: a list that takes `{"id", "file", "reason"}` of every image that cannot be used, whose row is left
            out; None raises at the first of them. Rows in = rows out + rejected. `file` is None where there is none.

    Labels are None when the source has no label column, or a label column not named by the caller that is empty
    throughout (None or -1); a part of them missing is an error. Labels that are strings become their rank among the
    sorted names.
    """
    arrays = _arrays_of(source, split)
    if arrays is not None:
        return _adapted(arrays, channels, image_size, rejected, source)
    # Local files are read in one pass, without the copy in the cache that random access would need.
    streaming = isinstance(source, (str, os.PathLike)) and Path(source).exists()
    dataset, id_space = _open(
        source,
        split=split,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
        streaming=streaming,
    )
    images, labels, ids = [], [], []
    for row, image in _decoded(dataset, channels, image_size, rejected, source):
        images.append(image)
        ids.append(row["id"])
        labels.append(row.get("label"))
    if not images:
        raise ValueError(f"source {_name(source)} has no image that can be used; at least one is accepted.")
    class_names = None
    if "label" in dataset.features:
        labels, class_names = _label_array(labels, ids, dataset.features["label"], label_column)
    else:
        labels = None
    return LabelledImages(_stack(images, ids), labels, tuple(ids), class_names, id_space)


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
    :func:`decode_image` decodes a row's.

    Args:
        source: a path, or else a Hub id, or an object.

            - a folder of Parquet files, `<split>-*.parquet` (files of other names make up the split "train"), or one
              file; a numbered set of shards has to be complete;
            - an image folder: `<class>/*.png`, labelled by the rank of the class's name, or `*.png`, unlabelled;
              either of them optionally in folders named like splits; a `metadata.csv`, `.jsonl` or `.parquet` with a
              `file_name` column adds columns (a `label` in it goes before the folders); files with other suffixes than
              images' are no rows;
            - `.npz` with `images` and optionally `labels` and `ids`, or `.npy` with images: (N, H, W, 1 or 3), uint8
              or floats in [0, 1], which are rounded to 8 bits;
            - "owner/name" on the Hub, or "owner/name:config";
            - a `datasets.Dataset`, an `IterableDataset` (which stays one), a dict of these; an (images, labels) pair
              of arrays; a :class:`LabelledImages`.
        split: the split to take; None takes the only one and otherwise raises with the splits listed.
        image_column, label_column, id_column: names of the columns, by default the first present of `image`, `img`; of
            `label`, `labels`, `fine_label`; and `id`. A column that stood under the new name becomes `other_<name>`.
        streaming: an `IterableDataset` that reads as it goes, instead of a `Dataset` in the cache.

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
    arrays = _arrays_of(source, split)
    if arrays is not None:
        dataset = _encoded(arrays)
        return (dataset.to_iterable_dataset() if streaming else dataset), arrays.id_space
    id_space = None
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
    elif Path(source).exists():
        id_space = str(Path(source).resolve())
        files = parquet_files(Path(source))
        opener = _open_parquet if files else _open_image_folder
        dataset, split = opener(Path(source), files, split, streaming)
    else:
        id_space = str(source)
        dataset, split = _open_hub(id_space, split, streaming)
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise _no_rows(source, split)
    if dataset.features is None:
        dataset = dataset._resolve_features()  # a stream of JSON or CSV knows its columns from its first rows only
    columns = [column for column in dataset.features if column != ROW_ID]
    names = {
        "id": _find_column(columns, id_column, ID_COLUMNS, "id_column", source),
        "image": _find_column(columns, image_column, IMAGE_COLUMNS, "image_column", source),
        "label": _find_column(columns, label_column, LABEL_COLUMNS, "label_column", source),
    }
    if names["image"] is None:
        raise ValueError(
            f"source {_name(source)} has no image column among {', '.join(columns)}; image, img or the one "
            "named by image_column is accepted."
        )
    dataset = _renamed(dataset, names)
    dataset = _with_row_ids(dataset, split) if names["id"] is None else _with_string_ids(dataset, source)
    dataset = _with_images_encoded(dataset, source)
    first = [name for name in ("id", "image", "label") if name in dataset.features]
    others = [name for name in dataset.features if name not in (*first, ROW_ID)]
    dataset = dataset.select_columns(first + others)
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset, id_space if names["id"] is None else ""


def _find_column(
    columns: list[str], name: str | None, usual: tuple[str, ...], argument: str, source: Any
) -> str | None:
    if name is not None and name not in columns:
        raise ValueError(
            f"{argument} is {name!r}, which source {_name(source)} lacks; {', '.join(columns)} are accepted."
        )
    return name or next((column for column in usual if column in columns), None)


def _renamed(dataset, names: dict[str, str | None]):
    """`names` maps the name wanted to the present one; a column in the way becomes `other_<name>`."""
    renames = {present: wanted for wanted, present in names.items() if present not in (None, wanted)}
    in_the_way = {wanted: f"other_{wanted}" for wanted in renames.values() if wanted in dataset.features}
    for step in (in_the_way, renames):
        if step:
            dataset = dataset.rename_columns(step)
    return dataset


def _with_images_encoded(dataset, source: Any):
    for name, feature in dataset.features.items():
        if name == "image" and not _can_hold_images(feature):
            raise ValueError(
                f"source {_name(source)} has an image column of type {feature}; images, the bytes of files and paths "
                "are accepted."
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


def _with_string_ids(dataset, source: Any):
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.cast_column("id", datasets.Value("string"))
    ids = [None if value is None else str(value) for value in dataset["id"][:]]
    _check_ids(ids, f"source {_name(source)}: ")
    if dataset.features["id"] == datasets.Value("string"):
        return dataset
    # A cast would write the whole data set anew, images and all.
    return dataset.remove_columns("id").add_column("id", ids)


def _with_row_ids(dataset, split: str):
    if isinstance(dataset, datasets.Dataset):
        return dataset.add_column("id", [f"{split}/{row}" for row in range(len(dataset))])
    if ROW_ID in dataset.features:
        return dataset.rename_column(ROW_ID, "id")
    # A stream's own index restarts in every shard and follows its shuffling, so the whole becomes one shard here.
    return datasets.IterableDataset.from_generator(
        _numbered_rows,
        features=datasets.Features({**dataset.features, "id": datasets.Value("string")}),
        gen_kwargs={"dataset": dataset, "split": split, "images": _image_columns(dataset.features)},
    )


def _numbered_rows(dataset: datasets.IterableDataset, split: str, images: tuple[str, ...]) -> Iterator[dict]:
    for row, values in enumerate(dataset):
        yield {**values, **_stored_images(values, images), "id": f"{split}/{row}"}


def _image_columns(features: datasets.Features) -> tuple[str, ...]:
    return tuple(
        name for name, feature in features.items() if isinstance(feature, datasets.Image) or _is_image_struct(feature)
    )


def _stored_images(values: dict, images: tuple[str, ...]) -> dict:
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


def choose_split(splits: Sequence[str] | Mapping, split: str | None, source: Any) -> str:
    """The split that was asked for, or the only one there is; `source` is named in the error."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None:
        raise ValueError(
            f"source {_name(source)} has several splits and split is None; {', '.join(splits)} are accepted."
        )
    if split not in splits:
        raise ValueError(f"split is {split!r}, which source {_name(source)} lacks; {', '.join(splits)} are accepted.")
    return split


def _no_rows(source: Any, split: str) -> ValueError:
    return ValueError(f"source {_name(source)} has no rows in split {split!r}; at least one is accepted.")


def _name(source: Any) -> str:
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"({type(source).__name__})"


# ----------------------------------------------------------------------------------------------------- kinds of source


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
            f"source {source!r} is no folder or file here and could not be loaded from the Hub: {_one_line(error)}"
        ) from error


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a folder (or the file itself) in order; empty if there are none."""
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    for pattern in ("*.parquet", "**/*.parquet"):
        files = [file.relative_to(source) for file in source.glob(pattern) if file.name not in METADATA_FILES]
        files = [file for file in files if all(map(_is_visible, file.parts))]
        if files:
            return [source / file for file in sorted(files, key=_natural_key)]
    return []


def _open_parquet(source: Path, files: list[Path], split: str | None, streaming: bool):
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    split = choose_split(splits, split, source)
    files = splits[split]
    _check_shards_complete(source, files)
    rows = _rows_of_each(files)
    if sum(rows) == 0:
        raise _no_rows(source, split)
    if not streaming:
        dataset = datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
        return dataset, split
    features = datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
    dataset = datasets.IterableDataset.from_generator(
        _parquet_rows,
        features=datasets.Features(
            {name: _undecoded(feature) for name, feature in features.items()} | {ROW_ID: datasets.Value("string")}
        ),
        # Lists are what `datasets` divides among workers, so every file keeps the number of its first row.
        gen_kwargs={
            "files": files,
            "starts": list(itertools.accumulate(rows, initial=0))[:-1],
            "split": split,
            "images": _image_columns(features),
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
            raise ValueError(f"source {_name(file)} is no readable Parquet file: {_one_line(error)}") from error
        columns = columns or present
        if present != columns:
            raise ValueError(
                f"source {_name(file)} has the columns {', '.join(present)}; those of {files[0].name} are accepted: "
                f"{', '.join(columns)}."
            )
    return rows


def _parquet_rows(files: list[Path], starts: list[int], split: str, images: tuple[str, ...]) -> Iterator[dict]:
    for file, row in zip(files, starts):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield {**values, **_stored_images(values, images), ROW_ID: f"{split}/{row}"}
                    row += 1


def _undecoded(feature):
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def split_of(file: Path) -> str:
    """The split that a Parquet file belongs to, by its name."""
    shard = re.fullmatch(r"(\w+(?:\.\w+)*)-\d+(-of-\d+)?(-[0-9a-f]+)?", file.stem)
    if shard:
        return shard[1]
    for name in (file.stem.split("-")[0], file.parent.name):
        if name in SPLIT_NAMES:
            return name
    return "train"


def _check_shards_complete(source: Path, files: list[Path]) -> None:
    shards = [re.search(r"-(\d+)-of-(\d+)", file.stem) for file in files]
    found = {(int(shard[1]), int(shard[2])) for shard in shards if shard}
    totals = {total for _, total in found}
    if len(totals) > 1:
        raise ValueError(
            f"source {_name(source)} mixes {' and '.join(map(str, sorted(totals)))} shards; one set is accepted."
        )
    for total in totals:
        missing = sorted(set(range(total)) - {index for index, _ in found})
        if missing:
            raise ValueError(
                f"source {_name(source)} lacks {len(missing)} of {total} shards, the first {missing[0]:05d}; "
                "a complete set is accepted."
            )


def _open_image_folder(source: Path, files: list[Path], split: str | None, streaming: bool):
    if source.is_file():
        raise ValueError(
            f"source {_name(source)} is a {source.suffix or 'nameless'} file; .parquet, .npz and .npy are accepted."
        )
    entries = list(source.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir() and _is_visible(entry.name))
    has_images = any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)
    in_splits = bool(folders) and set(folders) <= set(SPLIT_NAMES) and not has_images
    splits = {name: source / name for name in folders} if in_splits else {"train": source}
    split = choose_split(splits, split, source)
    # Every split's classes count, or a class that one split lacks would shift the labels there.
    images = {name: _image_files(folder) for name, folder in splits.items()}
    classes = sorted({path.parts[0] for paths in images.values() for path in paths if len(path.parts) > 1})
    if classes:
        below = {entry.name for place in splits.values() for entry in place.iterdir() if entry.is_dir()}
        if empty := sorted(name for name in below.difference(classes) if _is_visible(name)):
            raise ValueError(
                f"source {_name(source)} has the class folder {empty[0]!r} without an image; a class without images "
                "is accepted nowhere."
            )
    folder, paths = splits[split], images[split]
    if not paths:
        raise ValueError(
            f"source {_name(folder)} holds no Parquet file and no image; {', '.join(IMAGE_SUFFIXES)} are accepted."
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
                f"source {_name(folder)} holds {beside} beside class folders; images inside them are accepted."
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
        folders[:] = [name for name in folders if _is_visible(name)]
        relative = Path(place).relative_to(folder)
        paths += [relative / name for name in names if _is_visible(name) and name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(paths, key=_natural_key)


def _is_visible(name: str) -> bool:
    return name[0] != "." and name != "__MACOSX"


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
        raise ValueError(f"source {_name(file)} has the columns {', '.join(table.column_names)}; file_name is needed.")
    rows = {name: row for row, name in enumerate(table["file_name"].to_pylist())}
    for name in rows:
        if not (file.parent / name).exists():
            raise ValueError(
                f"source {_name(file)} names {name!r}, which does not exist; existing images are accepted."
            )
    order = pa.array([rows.get((folder / path).relative_to(file.parent).as_posix()) for path in paths], pa.int64())
    return table.drop_columns(["file_name"]).take(order)


def _natural_key(path: Path) -> tuple:
    """Numbers compare as numbers; equal numbers written differently ("1", "01") fall back to the text."""
    # Splitting by digits alternates text and number, so that text never meets a number in a comparison.
    parts = [[int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", part)] for part in path.parts]
    return parts, path.as_posix()


def _arrays_of(source: Any, split: str | None) -> LabelledImages | None:
    """`source` if it is arrays, in memory or in a NumPy file; None for all else."""
    if isinstance(source, LabelledImages):
        return source
    id_space, ids = None, None
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix in (".npz", ".npy") and Path(source).is_file():
        images, labels, ids = _read_numpy_file(Path(source))
        id_space = str(Path(source).resolve())
    elif isinstance(source, np.ndarray):
        images, labels = source, None
    elif isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], np.ndarray):
        images, labels = source
    else:
        return None
    images = _levels(images)
    _check_image_array(images, "images")
    if ids is not None:
        return LabelledImages(images, labels, tuple(str(value) for value in ids))
    ids = tuple(f"{split or 'train'}/{row}" for row in range(len(images)))
    return LabelledImages(images, labels, ids, id_space=id_space)


def _read_numpy_file(path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    try:
        stored = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return stored, None, None
        with stored:
            arrays = {name: stored[name] for name in ("images", "labels", "ids") if name in stored.files}
            names = stored.files
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"source {_name(path)} is no NumPy file without pickles: {_one_line(error)}") from error
    if "images" not in arrays:
        raise ValueError(
            f"source {_name(path)} has the arrays {', '.join(names)}; images, labels and ids are accepted."
        )
    return arrays["images"], arrays.get("labels"), arrays.get("ids")


def _levels(images: np.ndarray) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] rounded to 8 bits."""
    if images.dtype.kind != "f":
        return images
    if not np.isfinite(images).all():
        raise ValueError("images holds NaN or infinity; uint8 and floats in [0, 1] are accepted.")
    if images.size and (images.min() < 0 or images.max() > 1):
        raise ValueError(
            f"images goes from {images.min():g} to {images.max():g}; uint8 and floats in [0, 1] are accepted."
        )
    return np.rint(images * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- from rows to one array


def _decoded(rows, channels: int, image_size: int | None, rejected: list[dict] | None, source: Any):
    """(row, image) of every usable row; the others go to `rejected`, or the first of them raises."""
    for row in rows:
        try:
            image = decode_image(row["image"], channels, image_size)
        except ImageRejected as error:
            file = _file_of(row)
            if rejected is None:
                named = f"id {row['id']!r}" if file is None else repr(file)
                raise ValueError(
                    f"source {_name(source)} has an image that cannot be used, {named}: {error.reason}."
                ) from error
            rejected.append({"id": row["id"], "file": file, "reason": error.reason})
            continue
        yield row, image


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
        {"image": Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), "id": id_, "index": index}
        for index, (id_, image) in enumerate(zip(data.ids, data.images))
    )
    kept, images = [], []
    for row, image in _decoded(rows, channels, image_size, rejected, source):
        kept.append(row["index"])
        images.append(image)
    if not images:
        raise ValueError(f"source {_name(source)} has no image that can be used; at least one is accepted.")
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


def _label_array(values: list, ids: list[str], feature, label_column: str | None):
    """Labels as int64 and the class names, as far as they are known."""
    missing = [row for row, value in enumerate(values) if value is None or value == -1]
    if len(missing) == len(values) and label_column is None:
        return None, None
    if missing:
        raise ValueError(
            f"the label column lacks {len(missing)} of {len(values)} labels (None or -1), the first at id "
            f"{ids[missing[0]]!r}; a label for every image is accepted."
        )
    if isinstance(feature, datasets.ClassLabel):
        return np.array(values, np.int64), tuple(feature.names)
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        rank = {name: label for label, name in enumerate(names)}
        return np.array([rank[value] for value in values], np.int64), tuple(names)
    if all(isinstance(value, int) for value in values):
        return np.array(values, np.int64), None
    raise ValueError(f"the label column has the type {feature}; class labels, integers and strings are accepted.")


def _check_image_array(images: np.ndarray, name: str) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{name} is of type {kind}; a uint8 array is accepted (to_uint8 rounds floats).")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(f"{name} has shape {images.shape}; (N, H, W, 1 or 3) is accepted.")
    if len(images) == 0:
        raise ValueError(f"{name} is empty; at least one image is accepted.")


def _check_ids(ids: Sequence[str | None], prefix: str = "") -> None:
    seen = set()
    for id_ in ids:
        if not isinstance(id_, str):
            raise ValueError(f"{prefix}ids holds {id_!r}; strings are accepted.")
        if id_ in seen:
            raise ValueError(f"{prefix}ids holds {id_!r} more than once; different ids are accepted.")
        seen.add(id_)


# ------------------------------------------------------------------------------------------------------------- writing


def write_dataset(
    output_dir: str | os.PathLike,
    data: LabelledImages,
    *,
    split: str = "train",
    shards: int = 1,
    columns: Mapping[str, Sequence] | None = None,
) -> list[Path]:
    """Write a folder that `datasets.load_dataset(output_dir)` and :func:`load_images` open, bit for bit.

    The columns are `id`, `image` (PNG, lossless), `label` (with the class names, where known), then `columns`. A shard
    appears under its name only when it is whole and on disk.

    Args:
        output_dir: folder, made if needed.
        split: first part of the files' names, `<split>-00000-of-0000K.parquet`.
        shards: K, the number of files, of equal length up to one row.
        columns: further columns by name, one value per image.

    Returns:
        the paths of the files, in order.
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
    features = _features(data)
    if columns:
        features.update(datasets.Dataset.from_dict(columns).features)
    for path, rows in zip(paths, np.array_split(np.arange(len(data)), shards)):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        extra = {name: values[start:stop] for name, values in columns.items()}
        dataset = datasets.Dataset.from_dict({**_encoded_columns(data, start, stop), **extra}, features=features)
        table = dataset.with_format("arrow")[:]
        write_table(path, table.replace_schema_metadata(features.arrow_schema.metadata))
    return paths


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet file that appears under its name only when it is whole and on disk."""
    # The leading dot and the suffix keep every reader of `*.parquet` away from a file that is not finished.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            pq.write_table(table, file, row_group_size=1000)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def _features(data: LabelledImages) -> datasets.Features:
    features = {"id": datasets.Value("string"), "image": datasets.Image()}
    if data.labels is not None:
        names = data.class_names
        features["label"] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    return datasets.Features(features)


def _encoded_columns(data: LabelledImages, start: int, stop: int) -> dict[str, list]:
    columns = {
        "id": list(data.ids[start:stop]),
        "image": [{"bytes": _png(image), "path": None} for image in data.images[start:stop]],
    }
    if data.labels is not None:
        columns["label"] = data.labels[start:stop].tolist()
    return columns


def _encoded(data: LabelledImages) -> datasets.Dataset:
    features = datasets.Features({name: _undecoded(feature) for name, feature in _features(data).items()})
    return datasets.Dataset.from_dict(_encoded_columns(data, 0, len(data)), features=features)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------- roles


def check_roles(
    protected: LabelledImages, collected: LabelledImages, test: LabelledImages, *, budget: float = 16 / 255
) -> None:
    """Raise unless the three roles are disjoint.

    Every two roles are compared by id (within one id space, see :class:`LabelledImages`: row numbers of different
    sources agree by chance) and by pixels. The protected images are compared with the collected and with the test
    images by nearness as well, because a protected image never has the pixels of its clean original: closer than
    `budget` in every channel of every pixel counts as the same image, and so does closer in all but 1 % of the values
    (see `FEW`), if the means over a 4x4 grid of blocks differ by no more than the budget in root mean square. Images
    of different size are different.

    The comparison by nearness is exact. The mean over a block of pixels cannot differ by more than the largest pixel
    difference, so two images within the budget have 4x4 block means within budget * sqrt(48) in L2, which one matrix
    product finds out for all pairs; the few pairs left are compared in a sixteenth of their pixels, and then in full.
    Measured on one core: 0.7 s for 10,000 protected and 10,000 other images of CIFAR-10, 16 s at a quarter of their
    contrast, which leaves more pairs; the time grows with the product of the numbers.

    Args:
        protected, collected, test: the images to learn from, those that train the purifier, those that test victims.
        budget: largest change of a pixel by the protection, images in [0, 1]; L-inf.

    Raises:
        ValueError: with the two roles, the number of images concerned and the first pair of ids. The rows to leave out
            come from :func:`find_overlap`.
    """
    levels = _levels_of(budget)
    roles = {"protected": protected, "collected": collected, "test": test}
    pairs_of_roles = list(itertools.combinations(roles.items(), 2))
    for (first, one), (second, other) in pairs_of_roles:
        _refuse(_pairs_of_equal_ids(one, other), one, other, f"{first} and {second} have {{}} ids in common")
    for (first, one), (second, other) in pairs_of_roles:
        pairs = _pairs_of_equal_pixels(one, other)
        _refuse(pairs, one, other, f"{first} and {second} have {{}} images with the same pixels in common")
    for second, other in (("collected", collected), ("test", test)):
        pairs = _pairs_within(protected, other, levels)
        few = f"up to {100 * FEW:g} % of the values aside"
        _refuse(pairs, protected, other, f"protected has {{}} images within {levels}/255 of a {second} one ({few})")


def find_overlap(one: LabelledImages, other: LabelledImages, *, budget: float = 0.0) -> np.ndarray:
    """All pairs of rows that are one image by :func:`check_roles`: same id, same pixels, or near by `budget`.

    Args:
        budget: as for :func:`check_roles`; 0 finds the very same pixels only.

    Returns:
        int64 (pairs, 2), sorted: rows of `one` and rows of `other`. `np.delete(np.arange(len(other)), pairs[:, 1])` is
        what to pass to `other.subset` to be rid of them.
    """
    levels = _levels_of(budget)
    pairs = {*_pairs_of_equal_ids(one, other), *_pairs_of_equal_pixels(one, other), *_pairs_within(one, other, levels)}
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def _levels_of(budget: float) -> int:
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget}; 0 to 1 is accepted (16/255 is 16 levels).")
    return math.floor(budget * 255 + 1e-6)


def _refuse(pairs: list[tuple[int, int]], one: LabelledImages, other: LabelledImages, sentence: str) -> None:
    if pairs:
        first, second = min(pairs)
        count = len({row for row, _ in pairs})
        raise ValueError(
            f"{sentence.format(count)}, the first {one.ids[first]!r} and {other.ids[second]!r}; disjoint roles are "
            "accepted (data.find_overlap lists the rows)."
        )


def _pairs_of_equal_ids(one: LabelledImages, other: LabelledImages) -> list[tuple[int, int]]:
    if one.id_space is None or one.id_space != other.id_space:
        return []
    rows = {id_: row for row, id_ in enumerate(other.ids)}
    return [(row, rows[id_]) for row, id_ in enumerate(one.ids) if id_ in rows]


def _pairs_of_equal_pixels(one: LabelledImages, other: LabelledImages) -> list[tuple[int, int]]:
    if one.images.shape[1:] != other.images.shape[1:]:
        return []
    rows = {_digest(image): row for row, image in enumerate(other.images)}
    digests = map(_digest, one.images)
    return [(row, rows[digest]) for row, digest in enumerate(digests) if digest in rows]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def _pairs_within(one: LabelledImages, other: LabelledImages, levels: int) -> list[tuple[int, int]]:
    """All (row of one, row of other) that are near: see `check_roles`."""
    if one.images.shape[1:] != other.images.shape[1:]:
        return []
    ours, theirs = _block_means(one.images), _block_means(other.images)
    centre = theirs.mean(axis=0)  # smaller numbers, smaller rounding errors in the product
    ours, theirs = ours - centre, theirs - centre
    our_norms, their_norms = np.square(ours).sum(axis=1), np.square(theirs).sum(axis=1)
    # Rounding in float32 stays below 10 for sums of 48 squares up to 255^2.
    largest_l2 = ours.shape[1] * levels**2 + 64
    few = max(one.images.shape[3], int(FEW * one.images[0].size)) if levels else 0
    samples = [np.ascontiguousarray(data.images[:, ::4, ::4]) for data in (one, other)]
    pairs = []
    rows_at_once = max(1, 2**24 // len(theirs))
    for start in range(0, len(ours), rows_at_once):
        part = slice(start, start + rows_at_once)
        distances = ours[part] @ theirs.T
        distances *= -2
        distances += our_norms[part, None]
        distances += their_norms
        mine, yours = np.nonzero(distances <= largest_l2)
        mine += start
        pairs += _verified(mine, yours, ours, theirs, samples, one.images, other.images, levels, few)
    return pairs


def _verified(mine, yours, our_means, their_means, samples, our_images, their_images, levels, few):
    pairs = []
    pairs_at_once = max(1, 2**25 // our_images[0].size)
    for start in range(0, len(mine), pairs_at_once):
        a, b = mine[start : start + pairs_at_once], yours[start : start + pairs_at_once]
        # More far values than `few` in a part of the pixels are more than `few` in all of them.
        possible = (_differences(samples[0][a], samples[1][b]) > levels).sum(axis=1) <= few
        a, b = a[possible], b[possible]
        differences = _differences(our_images[a], their_images[b])
        in_all = (differences <= levels).all(axis=1)
        in_most = (differences > min(levels, FEW_LEVELS)).sum(axis=1) <= few
        in_most &= np.square(our_means[a] - their_means[b]).mean(axis=1) <= levels**2
        near = in_all | in_most
        pairs += zip(a[near].tolist(), b[near].tolist())
    return pairs


def _differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of images row by row: uint8 (N, values)."""
    return (np.maximum(one, other) - np.minimum(one, other)).reshape(len(one), math.prod(one.shape[1:]))


def _block_means(images: np.ndarray) -> np.ndarray:
    """Mean levels of a 4x4 grid of blocks (fewer where there are fewer pixels) per channel: float32 (N, 16 C)."""
    count, height, width, channels = images.shape
    rows = np.linspace(0, height, min(4, height), endpoint=False).astype(int)
    columns = np.linspace(0, width, min(4, width), endpoint=False).astype(int)
    sizes = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))[:, :, None]
    means = np.empty((count, len(rows) * len(columns) * channels), np.float32)
    images_at_once = max(1, 2**24 // images[0].size)
    for start in range(0, count, images_at_once):
        part = images[start : start + images_at_once]
        sums = np.add.reduceat(np.add.reduceat(part, rows, axis=1, dtype=np.uint32), columns, axis=2)
        means[start : start + images_at_once] = (sums / sizes).reshape(len(part), -1)
    return means
