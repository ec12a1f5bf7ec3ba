"""Two example data sets in the three roles: scikit-learn's digits, which need no download, and a part of CIFAR-10."""

import os

import numpy as np
import torch

from .labelled import LabelledImages, to_uint8
from .sources import load_images


Roles = tuple[LabelledImages, LabelledImages, LabelledImages]


def digits(sizes: tuple[int, int, int]) -> Roles:
    """
    The digits of scikit-learn (1,797 images of 8x8, 17 grey levels) as 32x32 colour images, split into three roles.

    They are drawn at grey levels 0.3 to 0.7. A third of a full-contrast digit is black or white, and clipping would
    remove the poison there. The split is by id, in a fixed random order.

    Args:
        sizes (`tuple[int, int, int]`): Number of images of the roles protected, collected and test; at most 1,797 in
            all.

    Returns:
        `tuple`: Three `LabelledImages` of uint8 `(N, 32, 32, 3)`: protected (still clean), collected, test.

    Raises:
        ValueError: If more images are asked for than there are.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    if sum(sizes) > len(source.images):
        raise ValueError(f"sizes is {sizes}, but must not add up to more than {len(source.images)} images.")
    grey = torch.from_numpy(source.images).float()[:, None] / 16
    grey = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    images = to_uint8((0.3 + 0.4 * grey).expand(-1, 3, -1, -1))
    everything = LabelledImages(
        images=images,
        labels=source.target.astype(np.int64),
        ids=tuple(f"digit-{row:04d}" for row in range(len(images))),
        class_names=tuple(str(digit) for digit in range(10)),
    )
    order = np.random.default_rng(0).permutation(len(everything))
    ends = np.cumsum((0, *sizes))
    return tuple(everything.subset(order[start:end]) for start, end in zip(ends, ends[1:]))


def cifar10(folder: str | os.PathLike, sizes: tuple[int, int, int]) -> Roles:
    """
    CIFAR-10 from a folder, the first images of each role in their order.

    Args:
        folder (`str` or `os.PathLike`): Data set with the splits `train` and `test`.
        sizes (`tuple[int, int, int]`): Number of images of the roles protected, collected (both of the split `train`)
            and test (of the split `test`).

    Returns:
        `tuple`: Three `LabelledImages`: protected (still clean), collected, test.

    Raises:
        ValueError: If a split has fewer images than that.
    """
    train, test = load_images(folder, split="train"), load_images(folder, split="test")
    if len(train) < sizes[0] + sizes[1] or len(test) < sizes[2]:
        raise ValueError(
            f"data is {str(folder)!r} with {len(train)} training and {len(test)} test images, but must have at least "
            f"{sizes[0] + sizes[1]} and {sizes[2]}."
        )
    rows = np.arange(len(train))
    protected, collected = rows[: sizes[0]], rows[sizes[0] : sizes[0] + sizes[1]]
    return train.subset(protected), train.subset(collected), test.subset(np.arange(sizes[2]))
