"""The check that protected, collected and test images do not overlap: by id, by pixels and by nearness."""

import hashlib
import itertools
import math

import numpy as np

from .labelled import LabelledImages


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
