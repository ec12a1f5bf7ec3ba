"""The check that protected, collected and test images do not overlap: by id, by pixels and by nearness."""

import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np

from .found import say_once
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
# The same picture, stored again: compressed, mirrored or under small noise. The root mean square of the differences
# may be AGAIN_LEVELS, FEW of the values may differ by more than AGAIN_FAR, and the correlation has to be RESEMBLANCE.
# On CIFAR-10 that finds, mirrored or not, all images after JPEG of quality 95 (4:4:4; 95 % with 4:2:0), 68 and 31 %
# after quality 75, 12 and 6 % after quality 50. No training image is that near a test image, but a mirrored one is for
# 6 of the 10,000, and 1 in 400 handwritten digits is near another: up to NATURAL of the smaller set are said only.
AGAIN_LEVELS = 7.5
AGAIN_FAR = 32
RESEMBLANCE = 0.99
NATURAL = 0.005
USUAL_BUDGET = 16 / 255  # L-inf of images in [0, 1]: twice that of most protections
_BLOCK_LEVELS = 4  # such changes leave the means of blocks nearly alone


def check_roles(
    protected: LabelledImages, collected: LabelledImages, test: LabelledImages, *, budget: float = USUAL_BUDGET
) -> None:
    """Raise unless the three roles are disjoint.

    Every two roles are compared by id (within one id space, see [`LabelledImages`]: row numbers of different
    sources agree by chance), by pixels and by nearness, as they are and mirrored. Two images are near

    - closer than `budget` in every channel of every pixel;
    - closer than that in all but 1 % of the values (see `FEW`), if the means over a 4x4 grid of blocks differ by no
      more than the budget in root mean square;
    - the same picture stored again (see `AGAIN_LEVELS`): compressed, or under noise of small energy such as AR's,
      whatever its largest value. Where these and the mirrored ones are at most 1 in 200 of the smaller role, they
      are said and not refused.

    Images of different size are different. A protection that changes most of the values by much (CUDA) hides its
    originals from this; a set of clean originals, compared as well, finds them.

    The comparison by nearness is exact. The mean over a block of pixels cannot differ by more than the largest pixel
    difference, so two images within the budget have 4x4 block means within budget * sqrt(48) in L2, which one matrix
    product finds out for all pairs; the few pairs left are compared in a sixteenth of their pixels, and then in full.
    Measured on one core: 0.7 s for 10,000 and 10,000 images of CIFAR-10, 16 s at a quarter of their contrast, which
    leaves more pairs; twice that with the mirrored ones, for each of the three pairs of roles. The time grows with the
    product of the numbers, the memory with their sum.

    Args:
        protected, collected, test (`LabelledImages`): The images to learn from, those that train the purifier, those
            that test victims.
        budget (`float`): Largest change of a pixel by the protection, images in [0, 1]; L-inf.

    Raises:
        ValueError: with the two roles, the number of images concerned and the first pair of ids. The rows to leave out
            come from [`find_overlap`].
    """
    levels = _levels_of(budget)
    roles = {"protected": protected, "collected": collected, "test": test}
    pairs_of_roles = list(itertools.combinations(roles.items(), 2))
    for (first, one), (second, other) in pairs_of_roles:
        _refuse(_pairs_of_equal_ids(one, other), one, other, f"{first} and {second} have {{}} ids in common")
    for (first, one), (second, other) in pairs_of_roles:
        pairs = _pairs_of_equal_pixels(one, other)
        _refuse(pairs, one, other, f"{first} and {second} have {{}} images with the same pixels in common")
    few = f"up to {100 * FEW:g} % of the values aside"
    for (first, one), (second, other) in pairs_of_roles:
        within, again = _near_pairs(one, other, levels)
        _refuse(within, one, other, f"{first} has {{}} images within {levels}/255 of a {second} one ({few})")
        again = _unless_natural(again, one, other)
        what = "compressed, mirrored or under small noise"
        _refuse(again, one, other, f"{first} has {{}} images that are the picture of a {second} one ({what})")


def find_overlap(one: LabelledImages, other: LabelledImages, *, budget: float = 0.0) -> np.ndarray:
    """All pairs of rows that are one image by [`check_roles`]: same id, same pixels, or near.

    Args:
        budget (`float`): As for [`check_roles`]; 0 finds the very same pixels only.

    Returns:
        `np.ndarray`: int64 (pairs, 2), sorted: rows of `one` and rows of `other`. To be rid of them, pass
        `np.delete(np.arange(len(other)), pairs[:, 1])` to `other.subset`.
    """
    levels = _levels_of(budget)
    within, again = _near_pairs(one, other, levels)
    pairs = {*_pairs_of_equal_ids(one, other), *_pairs_of_equal_pixels(one, other), *within}
    pairs.update(_unless_natural(again, one, other))
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def find_likenesses(data: LabelledImages, *, budget: float = 0.0) -> np.ndarray:
    """All pairs of rows of one set that are one image by [`check_roles`]: equal, near, stored again or mirrored.

    Args:
        budget (`float`): As for [`check_roles`]; 0 finds the very same pixels only.

    Returns:
        `np.ndarray`: int64 (pairs, 2), sorted, the smaller row first.
    """
    within, again = _near_pairs(data, data, _levels_of(budget))
    pairs = {(min(pair), max(pair)) for pair in (*_pairs_of_equal_pixels(data, data), *within, *again)}
    return np.array(sorted(pair for pair in pairs if pair[0] != pair[1]), np.int64).reshape(-1, 2)


def _levels_of(budget: float) -> int:
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget}; 0 to 1 is accepted (16/255 is 16 levels).")
    return math.floor(budget * 255 + 1e-6)


def _refuse(pairs: list[tuple[int, int]], one: LabelledImages, other: LabelledImages, sentence: str) -> None:
    if pairs:
        first, second = min(pairs)
        count = len({row for row, _ in pairs})
        raise ValueError(
            f"{sentence.format(count)}, the first {one.called(first)} and {other.called(second)}; disjoint roles are "
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


def _near_pairs(
    one: LabelledImages, other: LabelledImages, levels: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs that are near by the budget, and others that are one picture, stored again or mirrored."""
    within = _pairs_within(one, other, levels)
    if not levels:
        return within, []
    mirrored = one.with_images(np.ascontiguousarray(one.images[:, :, ::-1]))
    again = {
        *_compared(one, other, _BLOCK_LEVELS, _Again(one.images, other.images)),
        *_compared(mirrored, other, _BLOCK_LEVELS, _Again(mirrored.images, other.images)),
        *_resembling(_pairs_within(mirrored, other, levels), mirrored, other),
    }
    return within, sorted(again.difference(within))


def _unless_natural(pairs: list[tuple[int, int]], one: LabelledImages, other: LabelledImages) -> list[tuple[int, int]]:
    """The pairs, or none (and a sentence) if no more images are concerned than many sets have by nature."""
    concerned = min(len({row for row, _ in pairs}), len({row for _, row in pairs}))
    if not 0 < concerned <= NATURAL * min(len(one), len(other)):
        return pairs
    first, second = pairs[0]
    say_once(
        f"{concerned} images of one set are those of another, compressed or mirrored, the first {one.called(first)} "
        f"and {other.called(second)}; up to {100 * NATURAL:g} % are accepted."
    )
    return []


def _pairs_within(one: LabelledImages, other: LabelledImages, levels: int) -> list[tuple[int, int]]:
    """All (row of one, row of other) that are near by the budget: see `check_roles`."""
    return _compared(one, other, levels, _Within(one.images, other.images, levels))


def _compared(one: LabelledImages, other: LabelledImages, levels: int, near: Callable) -> list[tuple[int, int]]:
    """The pairs that `near` confirms, of those whose means over blocks differ by `levels` at most."""
    if one.images.shape[1:] != other.images.shape[1:]:
        return []
    ours, theirs = _block_means(one.images), _block_means(other.images)
    centre = theirs.mean(axis=0)  # smaller numbers, smaller rounding errors in the product
    ours, theirs = ours - centre, theirs - centre
    our_norms, their_norms = np.square(ours).sum(axis=1), np.square(theirs).sum(axis=1)
    # Rounding in float32 stays below 10 for sums of 48 squares up to 255^2.
    largest_l2 = ours.shape[1] * levels**2 + 64
    pairs = []
    rows_at_once = max(1, 2**24 // len(theirs))
    pairs_at_once = max(1, 2**25 // one.images[0].size)
    for start in range(0, len(ours), rows_at_once):
        part = slice(start, start + rows_at_once)
        distances = ours[part] @ theirs.T
        distances *= -2
        distances += our_norms[part, None]
        distances += their_norms
        mine, yours = np.nonzero(distances <= largest_l2)
        mine += start
        for first in range(0, len(mine), pairs_at_once):
            a, b = mine[first : first + pairs_at_once], yours[first : first + pairs_at_once]
            a, b = near(a, b, np.square(ours[a] - theirs[b]).mean(axis=1))
            pairs += zip(a.tolist(), b.tolist())
    return pairs


class _Within:
    """Pairs within `levels` in every value, or in nearly all of them."""

    def __init__(self, ours: np.ndarray, theirs: np.ndarray, levels: int):
        self.ours, self.theirs, self.levels = ours, theirs, levels
        self.few = max(ours.shape[3], int(FEW * ours[0].size)) if levels else 0
        self.samples = [np.ascontiguousarray(images[:, ::4, ::4]) for images in (ours, theirs)]

    def __call__(self, a: np.ndarray, b: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # More far values than `few` in a part of the pixels are more than `few` in all of them.
        possible = (_differences(self.samples[0][a], self.samples[1][b]) > self.levels).sum(axis=1) <= self.few
        a, b, means = a[possible], b[possible], means[possible]
        differences = _differences(self.ours[a], self.theirs[b])
        in_all = (differences <= self.levels).all(axis=1)
        in_most = (differences > min(self.levels, FEW_LEVELS)).sum(axis=1) <= self.few
        in_most &= means <= self.levels**2
        near = in_all | in_most
        return a[near], b[near]


class _Again:
    """Pairs of one picture, stored again: see `AGAIN_LEVELS`."""

    def __init__(self, ours: np.ndarray, theirs: np.ndarray):
        self.ours, self.theirs = ours, theirs

    def __call__(self, a: np.ndarray, b: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = means <= _BLOCK_LEVELS**2
        a, b = a[near], b[near]
        differences = _differences(self.ours[a], self.theirs[b])
        near = (differences > AGAIN_FAR).sum(axis=1) <= FEW * self.ours[0].size
        near &= np.square(differences, dtype=np.float32).mean(axis=1) <= AGAIN_LEVELS**2
        a, b = a[near], b[near]
        near = _resemble(self.ours[a], self.theirs[b])
        return a[near], b[near]


def _resembling(pairs: list[tuple[int, int]], one: LabelledImages, other: LabelledImages) -> list[tuple[int, int]]:
    """The pairs whose correlation is that of one picture; by values alone, faint pictures are all near each other."""
    return [(a, b) for a, b in pairs if _resemble(one.images[[a]], other.images[[b]])[0]]


def _resemble(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether images, row by row, have a correlation of `RESEMBLANCE` at least."""
    one, other = (
        images.reshape(len(images), math.prod(images.shape[1:])).astype(np.float32) for images in (one, other)
    )
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    spread = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    return ((one * other).sum(axis=1) >= RESEMBLANCE * spread) & (spread > 0)


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
