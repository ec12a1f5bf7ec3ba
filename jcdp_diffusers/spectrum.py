"""
The spectrum of a protection, read without clean originals and without labels.

Protected and collected images come from one distribution but for the protection. If the protection is independent of
the images, the mean power spectrum of the protected images is that of the collected images plus its own. So the
difference of the two means estimates where the protection is, by colour axis and by frequency, with a standard error.

Natural images have little power in their weakest colour axis and at high frequencies: there the estimate is sharp.
Their brightness below about four cycles per image varies so much that nothing can be said there but an upper bound.

Spectra differ for other reasons, too. Images of another kind have more or less contrast, which multiplies a whole
spectrum by about one factor; a JPEG save or a blur takes from the high frequencies. `describe_difference` tells these
apart as far as can be, and says "other kind" or "filtered" where it cannot call a difference a protection.
"""

import dataclasses
from typing import Any

import numpy as np


# Two standard errors: what may still be hidden where nothing is seen.
BOUND_ERRORS = 2.0
# Where an estimate is so many standard errors above zero, it counts as seen.
SEEN_ERRORS = 3.0
# A protection adds at least this share of the collected images' power somewhere, beyond what it adds at the median
# frequency. CIFAR-100 against CIFAR-10 reaches 0.23, LSP on a fifth of the images 0.26, on all of them 1.3.
LEAST_EXCESS = 0.25
SIGNIFICANCE = 0.01
LEAST_POWER = 1e-6  # of images in a table: grey ones have no colour at all
# Rounding to bytes alone adds 1/12 squared level to each value: a power below is none.
ROUNDING_POWER = 1 / 12
CHUNK_PIXELS = 2048 * 32 * 32  # of the images whose transforms are in memory at a time


@dataclasses.dataclass(frozen=True)
class ProtectionTable:
    """
    What a guide has to know of a protection (`guidance.towards_protected`): a small table that JSON can hold.

    Args:
        axes (`tuple[tuple[float, ...], ...]`): (C, C), the rows are orthonormal colour axes.
        power (`tuple[tuple[float, ...], ...]`): (C, F), the power of the protection per value of an image, by colour
            axis and by the frequencies 0, 1, ... F - 1 of `radial_bins`, in squared levels of 255; at least 0.
        background (`tuple[tuple[float, ...], ...]`): (C, F), that of unprotected images; positive. The first column,
            of the mean colour, is not used.

    Raises:
        ValueError: If the shapes do not fit together, or a number cannot be what it is for.
    """

    axes: tuple[tuple[float, ...], ...]
    power: tuple[tuple[float, ...], ...]
    background: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        for name in ("axes", "power", "background"):
            try:
                values = np.array(getattr(self, name), dtype=np.float64)
            except (TypeError, ValueError):
                values = np.empty(0)
            if values.ndim != 2 or not values.size or not np.isfinite(values).all():
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, but must be a table of finite numbers.")
            object.__setattr__(self, name, tuple(tuple(row) for row in values.tolist()))
        axes, power, background = (np.array(getattr(self, name)) for name in ("axes", "power", "background"))
        if axes.shape[0] != axes.shape[1] or not np.allclose(axes @ axes.T, np.eye(len(axes)), atol=1e-3):
            raise ValueError(f"axes is {self.axes}, but must have orthonormal rows, one for each channel.")
        for name, values in (("power", power), ("background", background)):
            if len(values) != len(axes) or values.shape != power.shape:
                raise ValueError(
                    f"{name} is of shape {values.shape}, but must have a row for each of the {len(axes)} axes and "
                    f"power's {power.shape[1]} frequencies."
                )
        if (power < 0).any():
            raise ValueError(f"power is {power.min():g} at its smallest, but must be at least 0.")
        if (background <= 0).any():
            raise ValueError(f"background is {background.min():g} at its smallest, but must be positive.")


@dataclasses.dataclass(frozen=True)
class ProtectionSpectrum:
    """
    Estimated power of a protection, per value of an image, in squared levels of 255.

    Noise that is white with a standard deviation of s levels in every channel has the power s^2 everywhere.

    Args:
        axes (`np.ndarray`): (C, C), the rows are colour axes: the principal axes of the collected images' pixels, the
            strongest first.
        frequencies (`np.ndarray`): (F,), cycles per image; bin f holds radii that round to f, and the last bin all
            that are larger.
        power (`np.ndarray`): (C, F), the difference of the mean power spectra; negative where protected images have
            less.
        error (`np.ndarray`): (C, F), its standard error.
        background (`np.ndarray`): (C, F), the mean power spectrum of the collected images.
        images (`tuple[int, int]`): Number of protected and of collected images.
    """

    axes: np.ndarray
    frequencies: np.ndarray
    power: np.ndarray
    error: np.ndarray
    background: np.ndarray
    images: tuple[int, int]

    @property
    def z(self) -> np.ndarray:
        """(C, F), the estimate in standard errors; about standard normal where there is no protection."""
        with np.errstate(divide="ignore"):  # images that all have one power there: infinitely many, or none
            return np.divide(self.power, self.error, out=np.zeros_like(self.power), where=self.power != 0)

    @property
    def seen(self) -> np.ndarray:
        """(C, F) of bool, where the estimate is clearly above zero."""
        return self.z > SEEN_ERRORS

    @property
    def upper_bound(self) -> np.ndarray:
        """(C, F), what the power is not above, up to the chance of two standard errors."""
        return np.maximum(self.power, 0) + BOUND_ERRORS * self.error

    def table(self) -> ProtectionTable:
        """
        What a guide has to know: the estimate where it is seen, and a lessened upper bound where it is not.

        Brightness varies so much that its own bound is far above any protection. So where a protection is not seen in
        an axis, it is taken to be no stronger than in the axes where it is seen at that frequency; if it is in none,
        no stronger than the smallest of their bounds. That is no upper bound any more: a protection that is stronger
        in brightness, such as OPS, is underestimated there. The mean colour is taken as the frequency 1.
        """
        power, bound, seen = self.power[:, 1:], self.upper_bound[:, 1:], self.seen[:, 1:]
        elsewhere = np.where(seen.any(axis=0), np.where(seen, power, 0).max(axis=0), bound.min(axis=0))
        power = np.where(seen, power, np.minimum(bound, elsewhere))
        power, background = np.concatenate([power[:, :1], power], axis=1), np.maximum(self.background, LEAST_POWER)
        # Five digits: more than the estimate has, and the same on every machine.
        digits = np.vectorize(lambda value: float(f"{value:.5g}"))
        return ProtectionTable(digits(self.axes), digits(power), digits(background))


def radial_bins(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The bin of each coefficient of a two-dimensional Fourier transform.

    Returns:
        `tuple`: int (H, W), radius in cycles per image, rounded, at most half of the shorter side; and (F,) the
        frequencies of the bins.
    """
    rows = np.fft.fftfreq(height, 1 / height)
    columns = np.fft.fftfreq(width, 1 / width)
    last = min(height, width) // 2
    radius = np.rint(np.hypot(rows[:, None], columns[None, :])).astype(int)
    return np.minimum(radius, last), np.arange(last + 1)


def colour_axes(images: np.ndarray) -> np.ndarray:
    """
    Principal axes of pixel colours.

    Args:
        images (`np.ndarray`): uint8 (N, H, W, C).

    Returns:
        `np.ndarray`: (C, C) with orthonormal rows, the axis of the largest variance first. Brightness is the first and
        positive for natural images.
    """
    channels = images.shape[3]
    total, squares, count = np.zeros(channels), np.zeros((channels, channels)), 0
    chunk = _chunk(images)
    for start in range(0, len(images), chunk):
        pixels = images[start : start + chunk].reshape(-1, channels).astype(np.float64)
        total += pixels.sum(axis=0)
        squares += pixels.T @ pixels
        count += len(pixels)
    mean = total / count
    _, vectors = np.linalg.eigh(squares / count - np.outer(mean, mean))
    axes = vectors.T[::-1]
    signs = np.where(axes.sum(axis=1) < 0, -1.0, 1.0)
    return axes * signs[:, None]


def power_spectra(images: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """
    Each image's power by colour axis and frequency.

    Args:
        images (`np.ndarray`): uint8 (N, H, W, C).
        axes (`np.ndarray`): (C, C), see `colour_axes`.

    Returns:
        `np.ndarray`: float64 (N, C, F), the mean of |FFT|^2 / (H W) over the coefficients of a bin, in squared levels.
    """
    count, height, width, channels = images.shape
    bins, frequencies = radial_bins(height, width)
    # Of a real image, the right half of the transform repeats the left one.
    half = width // 2 + 1
    weights = np.full(half, 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    member = np.zeros((height * half, len(frequencies)))
    member[np.arange(height * half), bins[:, :half].ravel()] = np.tile(weights, height)
    member /= member.sum(axis=0) * height * width
    spectra = np.empty((count, channels, len(frequencies)))
    chunk = _chunk(images)
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        rotated = np.einsum("nhwc,ac->nahw", images[rows].astype(np.float64), axes)
        power = np.square(np.abs(np.fft.rfft2(rotated)))
        spectra[rows] = power.reshape(-1, channels, height * half) @ member
    return spectra


def protection_spectrum(
    protected: np.ndarray,
    collected: np.ndarray,
    *,
    photographs: tuple[np.ndarray, np.ndarray] | None = None,
) -> ProtectionSpectrum:
    """
    Estimate a protection's power spectrum.

    Args:
        protected, collected (`np.ndarray`): uint8 (N, H, W, C) and (M, H, W, C): *other* images of the same kind.
        photographs (`tuple[np.ndarray, np.ndarray]`, *optional*): Where images are squares of photographs, the number
            of each one's photograph, (N,) and (M,). Squares of one photograph are alike: they count as one image, by
            their mean.

    Returns:
        `ProtectionSpectrum`: With Welch's standard error, which does not ask for equal variances.

    Raises:
        ValueError: If the images differ in shape, or a set has fewer than two.
    """
    if protected.shape[1:] != collected.shape[1:]:
        raise ValueError(
            f"protected has images of shape {protected.shape[1:]}, but they must have collected's, "
            f"{collected.shape[1:]}."
        )
    counted = (protected, collected) if photographs is None else map(np.unique, photographs)
    for name, images in zip(("protected", "collected"), counted):
        if len(images) < 2:
            raise ValueError(f"{name} has {len(images)} image, but at least 2 are needed for a standard error.")
    axes = colour_axes(collected)
    _, frequencies = radial_bins(*collected.shape[1:3])
    ours, theirs = power_spectra(protected, axes), power_spectra(collected, axes)
    if photographs is not None:
        ours, theirs = map(_means, (ours, theirs), photographs)
    return ProtectionSpectrum(
        axes=axes,
        frequencies=frequencies,
        power=ours.mean(axis=0) - theirs.mean(axis=0),
        error=_welch_error(ours, theirs),
        background=theirs.mean(axis=0),
        images=(len(ours), len(theirs)),
    )


def _means(spectra: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """(P, C, F), the mean of (N, C, F) over the squares of each photograph."""
    _, number, count = np.unique(photographs, return_inverse=True, return_counts=True)
    total = np.zeros((len(count), *spectra.shape[1:]))
    np.add.at(total, number, spectra)
    return total / count[:, None, None]


def permutation_p_value(
    ours: np.ndarray, theirs: np.ndarray, *, permutations: int = 999, seed: int = 0
) -> tuple[float, float]:
    """
    Whether two sets of spectra come from one distribution: their largest |z| against that of random divisions.

    All axes and frequencies are tested at once, so the chance of a false alarm is that of the whole, not of each bin
    (Westfall and Young's max-T). It is exact where the images are exchangeable.

    Args:
        ours, theirs (`np.ndarray`): (N, C, F) and (M, C, F), see `power_spectra`.
        permutations (`int`): Random divisions.
        seed (`int`): Of the divisions.

    Returns:
        `tuple[float, float]`: The p-value, at least 1 / (permutations + 1), and the largest |z|.
    """
    n, m = len(ours), len(theirs)
    pooled = np.concatenate([ours, theirs]).reshape(n + m, -1)
    pooled = pooled - pooled.mean(axis=0)
    total, squares = pooled.sum(axis=0), np.square(pooled)
    total_squares = squares.sum(axis=0)

    def largest(chosen: np.ndarray) -> np.ndarray:
        """The largest |z| of each division; chosen is (K, n + m) of 0 and 1, which images are in the first set."""
        sums, sums_of_squares = chosen @ pooled, chosen @ squares
        first, second = sums / n, (total - sums) / m
        variance = (sums_of_squares / n - first**2) / (n - 1)
        variance += ((total_squares - sums_of_squares) / m - second**2) / (m - 1)
        return (np.abs(first - second) / np.sqrt(np.maximum(variance, np.finfo(float).tiny))).max(axis=1)

    actual = largest((np.arange(n + m) < n).astype(np.float64)[None])[0]
    generator, at_least = np.random.default_rng(seed), 0
    for start in range(0, permutations, 50):  # so that memory does not grow with the number of divisions
        chosen = np.zeros((min(50, permutations - start), n + m))
        for row in chosen:
            row[generator.choice(n + m, n, replace=False)] = 1.0
        at_least += int((largest(chosen) >= actual).sum())
    return (at_least + 1) / (permutations + 1), float(actual)


def describe_difference(
    protected: np.ndarray, collected: np.ndarray, *, permutations: int = 999, seed: int = 0
) -> dict[str, Any]:
    """
    What the spectra of two sets say of a protection, without labels and without clean originals.

    Args:
        protected, collected (`np.ndarray`): As for `protection_spectrum`.
        permutations, seed (`int`): As for `permutation_p_value`.

    Returns:
        `dict`: `finding`, `p_value`, `largest_z`, `excess` and `deficit` (the largest rise and fall of power, relative
        to the collected images' but at least to that of rounding, beyond what all frequencies of an axis have in
        common, and more than 3 standard errors; mean colours do not count), `excess_at` (colour axis from 0, cycles
        per image) and the `spectrum`. The finding is one of

        - `"none"`: no difference that chance would not explain;
        - `"noise"`: power is added at some frequencies, as an additive protection does;
        - `"filtered"`: some frequencies lose power, as by a JPEG save, a blur or a convolutional protection;
        - `"other kind"`: the sets differ, but only in contrast or by less than `LEAST_EXCESS`.
    """
    spectrum = protection_spectrum(protected, collected)
    # By colour axes of both sets together: those of one alone would make its images unlike the others by themselves.
    axes = colour_axes(np.concatenate([protected, collected]))
    ours, theirs = power_spectra(protected, axes), power_spectra(collected, axes)
    p_value, largest_z = permutation_p_value(ours, theirs, permutations=permutations, seed=seed)
    # Grey images have no power in two colour axes but that of rounding, which nothing is to be compared with.
    background = np.maximum(spectrum.background, ROUNDING_POWER)
    relative, error = spectrum.power / background, spectrum.error / background
    # A factor on a whole spectrum is contrast. So a rise counts from the median over frequencies, and a fall from what
    # nearly all frequencies have. Contrast makes nothing of nothing.
    has_power = spectrum.background > ROUNDING_POWER
    above = relative - np.where(has_power, np.median(relative[:, 1:], axis=1, keepdims=True), 0.0)
    below = np.quantile(relative[:, 1:], 0.9, axis=1, keepdims=True) - relative
    seen = spectrum.seen & (spectrum.power > ROUNDING_POWER)
    rises = np.where(seen & (above > SEEN_ERRORS * error), np.minimum(above, relative), 0.0)
    falls = np.where((-spectrum.z > SEEN_ERRORS) & (below > SEEN_ERRORS * error), np.minimum(below, -relative), 0.0)
    rises[:, 0] = falls[:, 0] = 0.0  # an image's mean colour depends on what it shows
    axis, frequency = np.unravel_index(rises.argmax(), rises.shape)
    excess, deficit = float(rises.max()), float(falls.max())
    if p_value > SIGNIFICANCE:
        finding = "none"
    elif excess >= LEAST_EXCESS and excess >= deficit:
        finding = "noise"
    elif deficit >= LEAST_EXCESS:
        finding = "filtered"
    else:
        finding = "other kind"
    return {
        "finding": finding,
        "p_value": p_value,
        "largest_z": largest_z,
        "excess": excess,
        "deficit": deficit,
        "excess_at": (int(axis), int(spectrum.frequencies[frequency])),
        "spectrum": spectrum,
    }


def _chunk(images: np.ndarray) -> int:
    return max(1, CHUNK_PIXELS // (images.shape[1] * images.shape[2]))


def _welch_error(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.sqrt(ours.var(axis=0, ddof=1) / len(ours) + theirs.var(axis=0, ddof=1) / len(theirs))
