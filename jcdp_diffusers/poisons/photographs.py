"""
A perturbation on photographs at their own size.

A poison is made for images of one size. What it adds to a photograph's largest centred square, at that size, is
enlarged with the photograph. Beyond the square it goes on as its mirror image. Whoever brings the photograph to a
small square again finds the perturbation there, smoothed a little. No value changes by more than before.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..data import LabelledImages, decode_image, open_dataset
from ..data.export import check_export, export_names, export_picture
from ..data.perturbations import measured_norms
from ..data.photographs import sizes_in_words, stored_sizes, working_size
from ..devices import usable_device
from ..outputs import check_apart


def enlarged(perturbation: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    A perturbation for a photograph.

    Args:
        perturbation (`np.ndarray`): (S, S, C), of the largest centred square at S x S pixels.
        height, width (`int`): Of the photograph.

    Returns:
        `np.ndarray`: float32 (height, width, C).
    """
    side = min(height, width)
    small = torch.from_numpy(np.ascontiguousarray(perturbation)).float().permute(2, 0, 1)[None]
    square = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    square = square[0].permute(1, 2, 0).numpy()
    top, left = (height - side) // 2, (width - side) // 2
    return np.pad(square, ((top, height - side - top), (left, width - side - left), (0, 0)), mode="symmetric")


def protected_photograph(photograph: np.ndarray, perturbation: np.ndarray) -> np.ndarray:
    """
    A photograph with an enlarged perturbation, rounded once.

    Args:
        photograph (`np.ndarray`): uint8 (H, W, C).
        perturbation (`np.ndarray`): (S, S, C), in levels of 255; see `enlarged`.
    """
    added = enlarged(perturbation, *photograph.shape[:2])
    return np.rint((photograph + added).clip(0, 255)).astype(np.uint8)


def size_to_read(args: argparse.Namespace, where: Mapping[str, str | None]) -> int | None:
    """The side to which images are brought; None where they stay as they are."""
    if args.image_size is not None:
        return args.image_size
    sizes = stored_sizes(args.dataset, **where)
    side = working_size({"dataset": sizes}, usable_device(args.device).type)
    if side is not None:
        print(
            f"{sizes_in_words(sizes)}: the data set in --output has their centres at {side}x{side} pixels "
            "(--image_size chooses another side)."
        )
        if args.export is None:
            print("--export FOLDER protects them at their own size, too.")
    return side


def places_of_export(args: argparse.Namespace, data: LabelledImages, *, fresh: bool) -> list:
    """Where the pictures of `--export` go, checked before anything costly; none without it."""
    if args.export is None:
        return [None] * len(data)
    sources, outputs = {"--dataset": args.dataset}, {"--output": args.output}
    check_apart(args.export, sources=sources, outputs=outputs, name="--export")
    names = [(None if data.files is None else data.files[row]) or id_ for row, id_ in enumerate(data.ids)]
    places = export_names(names, args.export_format or "png")
    check_export(args.export, places, fresh=fresh)
    return places


def export(
    args: argparse.Namespace,
    clean: LabelledImages,
    protected: LabelledImages,
    places: Mapping[str, Any],
    where: Mapping[str, str | None],
) -> None:
    """
    Write the protected pictures; where they were brought to one size, photographs one by one at their own, with the
    perturbation enlarged.
    """
    if args.image_size is None:
        for id_, image in zip(protected.ids, protected.images):
            export_picture(args.export, places[id_], image)
        print(f"{len(protected)} pictures in {args.export}")
        return
    change = {
        id_: after.astype(np.int16) - before for id_, before, after in zip(clean.ids, clean.images, protected.images)
    }
    rows = open_dataset(args.dataset, streaming=True, **where)
    for row in tqdm(rows, desc="export", unit=" photographs", total=len(clean)):
        photograph = decode_image(row["image"], args.channels)
        export_picture(args.export, places[row["id"]], protected_photograph(photograph, change[row["id"]]))
    files = (Path(args.export) / places[id_] for id_ in clean.ids)
    found = [decode_image(file.read_bytes(), args.channels, args.image_size) for file in files]
    norms = measured_norms(clean.images, np.stack(found))
    print(
        f"{len(clean)} photographs at their own size in {args.export}; brought to {args.image_size}x{args.image_size} "
        f"pixels, a value differs by up to {norms['linf']}/255, the mean L2 norm is {norms['l2_mean']:.3f}"
    )
