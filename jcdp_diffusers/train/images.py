"""
Training images: in memory where they fit, else decoded as they are needed; and the order in which they are visited.

The order, and where a crop falls, are a pure function of (seed, position in the run), so neither a resumed run nor
another number of processes changes which images a step sees. Labels are never read.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from ..data import ImageRejected, LabelledImages, decode_image, load_images
from ..data.found import say_once
from ..data.writing import as_picture


MEMORY_LIMIT = 2**30  # bytes of uint8 pixels that are held in memory rather than decoded again at every visit


class ImageFiles(torch.utils.data.Dataset):
    """
    Images of any size and any number, decoded and cropped when they are needed, so memory stays bounded.

    Args:
        dataset (`datasets.Dataset`): From `data.open_dataset`: columns `id` and `image`; no other column is read.
        resolution (`int`): Side of the square in pixels. The largest square that fits into an image is cut out and
            resized to it.
        channels (`int`, defaults to 3): 3 (grey images are repeated) or 1 (colour is refused).
        center_crop (`bool`, defaults to `False`): Cut the square from the middle rather than at random.
        seed (`int`, defaults to 0): Of the random places, each a function of (seed, draw).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        resolution: int,
        channels: int = 3,
        center_crop: bool = False,
        seed: int = 0,
    ):
        self.dataset = dataset.select_columns(["id", "image"])
        self.resolution, self.channels, self.center_crop, self.seed = resolution, channels, center_crop, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        """Image number key[0], cropped for draw number key[1]: uint8, shape (C, resolution, resolution)."""
        index, draw = key
        row = self.dataset[int(index)]
        changes: list[str] = []
        size = self.resolution if self.center_crop else None
        try:
            pixels = decode_image(row["image"], self.channels, size, changes=changes)
        except ImageRejected as error:
            name = (row["image"] or {}).get("path") or row["id"]
            raise ValueError(
                f"image {name!r} cannot be used: {error.reason}; --skip_unusable_images leaves such images out."
            ) from error
        for change in changes:  # once for all images: which of them, only reading all would tell
            say_once(f"Among the training images: {change}.")
        if not self.center_crop:
            pixels = self._random_square(pixels, draw)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor | Exception:
        """A batch, shape (B, C, resolution, resolution), or what is wrong with it: raised in another process, an error
        would come back with a traceback in its text."""
        try:
            return torch.stack([self[key] for key in keys])
        except (OSError, ValueError) as error:
            return error

    def fingerprint(self) -> str:
        """Digest of every image's id, file name and size in bytes; nothing is decoded, and the folder may move."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.dataset:
            path = (row["image"] or {"path": None})["path"]
            digest.update(json.dumps([row["id"], path and os.path.basename(path), _file_size(row["image"])]).encode())
        return digest.hexdigest()

    def shared_with(self, others: datasets.Dataset) -> list[tuple[str, str]]:
        """
        Images whose file is among other ones, byte for byte; a file is read only where another one has its size.

        Args:
            others (`datasets.Dataset`): From `data.open_dataset`.

        Returns:
            `list[tuple[str, str]]`: Id here, and id there.
        """
        by_size = collections.defaultdict(dict)
        for row in others:
            by_size[_file_size(row["image"])][_file_content(row["image"])] = row["id"]
        suspects = ((row, by_size[size]) for row in self.dataset if (size := _file_size(row["image"])) in by_size)
        contents = ((row["id"], _file_content(row["image"]), there) for row, there in suspects)
        return [(id_, there[content]) for id_, content, there in contents if content in there]

    def _random_square(self, pixels: np.ndarray, draw: int) -> np.ndarray:
        height, width, channels = pixels.shape
        side = min(height, width)
        left, top = np.random.default_rng([self.seed, draw]).random(2) * (width - side, height - side)
        square = as_picture(pixels).resize(
            (self.resolution, self.resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        return np.asarray(square).reshape(self.resolution, self.resolution, channels)


def training_images(
    dataset: datasets.Dataset,
    *,
    resolution: int,
    channels: int = 3,
    center_crop: bool = False,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
) -> LabelledImages | ImageFiles:
    """
    Images to train on: in memory if they fit and every visit would cut out the same square, else `ImageFiles`.

    Args:
        dataset (`datasets.Dataset`): From `data.open_dataset`.
        memory_limit (`int`): Bytes of uint8 pixels.

    Other arguments as in [`ImageFiles`].
    """
    dataset = dataset.select_columns(["id", "image"])
    files = ImageFiles(dataset, resolution=resolution, channels=channels, center_crop=center_crop, seed=seed)
    if len(dataset) * resolution**2 * channels > memory_limit:
        return files
    if not center_crop and any(width != height for width, height in map(_size, dataset["image"])):
        return files
    return load_images(dataset, image_size=resolution, channels=channels)


def _file_content(value: dict | None) -> bytes:
    """An image's file; nothing for a missing one."""
    if value is None:
        return b""
    return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def _file_size(value: dict | None) -> int:
    """How many bytes its file has, without reading it."""
    if value is None:
        return 0
    return os.path.getsize(value["path"]) if value["bytes"] is None else len(value["bytes"])


def _size(value: dict | None) -> tuple[int, int]:
    """Width and height from an image's header; what cannot be read counts as a square and is left to the decoder."""
    if value is None:
        return 0, 0
    try:
        with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as picture:
            return picture.size
    except OSError:
        return 0, 0


def usable(row: dict, channels: int) -> bool:
    """Whether `decode_image` accepts a row's image; for `datasets.Dataset.filter`."""
    try:
        decode_image(row["image"], channels)
    except ImageRejected:
        return False
    return True


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch visits the images: a permutation that depends on nothing but its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(length)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """
    Which positions of a step's total batch belong to a process, micro-batch by micro-batch.

    Args:
        rank, world (`int`): Number of this process, and of all.
        per_device (`int`): Images per process and micro-batch.
        accumulation (`int`): Micro-batches per optimiser step.
    """

    rank: int
    world: int
    per_device: int
    accumulation: int

    @property
    def total(self) -> int:
        return self.world * self.per_device * self.accumulation

    def positions(self, micro: int) -> slice:
        start = (micro * self.world + self.rank) * self.per_device
        return slice(start, start + self.per_device)

    def draws(self, seed: int, length: int, start_step: int, end_step: int) -> Iterator[list[tuple[int, int]]]:
        """(image, draw) pairs of this process's micro-batches; draw d is position d % total of step d // total."""
        order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, length=length))
        for step in range(start_step, end_step):
            for micro in range(self.accumulation):
                here = self.positions(micro)
                numbers = range(step * self.total + here.start, step * self.total + here.stop)
                yield [(int(order(d // length)[d % length]), d) for d in numbers]


def micro_batches(
    images: LabelledImages | ImageFiles,
    draws: Iterator[list[tuple[int, int]]],
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """
    The images of each micro-batch: uint8, shape (B, C, H, W), on the device.

    Args:
        draws (`Iterator`): From `BatchLayout.draws`.
        num_workers (`int`): Processes that decode `ImageFiles`; images in memory need none.
    """
    if isinstance(images, ImageFiles):
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=draws,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # by default the workers' seed would be taken from the global stream
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch.to(device, non_blocking=True)
    else:
        pixels = channels_first(images.images).to(device)
        for batch in draws:
            rows = torch.tensor([index for index, _ in batch])
            if device.type == "cuda":  # from memory that is not pinned the copy would wait for the step before
                rows = rows.pin_memory()
            yield pixels[rows.to(device, non_blocking=True)]


def _as_it_is(batch: torch.Tensor | Exception) -> torch.Tensor | Exception:
    return batch


def channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, C) as a tensor of shape (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
