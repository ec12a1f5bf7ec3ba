"""What the spectra of protected and collected images say of a protection, without labels and without originals."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..data import LabelledImages
from ..spectrum import ROUNDING_POWER, describe_difference, power_spectra


PERMUTATIONS = 999
# Of each set. More images of this size take long, and the standard error is small by then.
VALUES = 2**29


def spectral_evidence(
    protected: LabelledImages, collected: LabelledImages, clean: LabelledImages | None = None, *, seed: int = 0
) -> dict:
    """
    Where a protection is, by colour axis and frequency, and whether chance explains it.

    Args:
        protected, collected (`LabelledImages`): *Other* images of the same kind, of one shape; labels are not used.
        clean (`LabelledImages`, *optional*): Originals of the protected images, row by row the same, to compare with.
        seed (`int`): Of the divisions and of the choice of images.

    Returns:
        `dict`: What `spectrum.describe_difference` finds, but for its spectrum; and of that, by colour axis (C) and
        frequency (F): `axes` (C, C), `frequencies` (F,) in cycles per image, `power`, `error`, `upper_bound` and
        `background` (C, F) in squared levels of 255, `seen` (C, F), False where nothing but the upper bound is known;
        `actual` (C, F), the mean power of protected minus clean images, None without these; `images`, of both sets;
        `permutations`.
    """
    most = max(2, VALUES // protected.images[0].size)
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.permutation(len(protected))[:most])
    others = np.sort(draw.permutation(len(collected))[:most])
    found = describe_difference(protected.images[rows], collected.images[others], permutations=PERMUTATIONS, seed=seed)
    spectrum = found.pop("spectrum")
    actual = None
    if clean is not None:
        change = protected.images[rows].astype(np.int16) - clean.images[rows]
        actual = power_spectra(change, spectrum.axes).mean(axis=0).tolist()
    return found | {
        "axes": spectrum.axes.tolist(),
        "frequencies": spectrum.frequencies.tolist(),
        "power": spectrum.power.tolist(),
        "error": spectrum.error.tolist(),
        "upper_bound": spectrum.upper_bound.tolist(),
        "background": spectrum.background.tolist(),
        "seen": (spectrum.seen & (spectrum.power > ROUNDING_POWER)).tolist(),
        "actual": actual,
        "images": list(spectrum.images),
        "permutations": PERMUTATIONS,
    }


def rise_in_words(found: Mapping) -> str:
    """
    What a set has more than collected images where the difference is largest.

    Args:
        found (`dict`): With `excess`, `excess_at`, `axes`, `frequencies`, `power` and `background`; see
            `spectral_evidence`.
    """
    axis, frequency = found["excess_at"]
    where = f"at {frequency} cycles per image"
    if len(found["axes"]) > 1:
        where += f" in colour axis {axis + 1} ({mixture_in_words(found['axes'][axis])})"
    place = found["frequencies"].index(frequency)
    # Grey images have no power at all in two colour axes, and nothing can be so many times as much.
    if found["background"][axis][place] < ROUNDING_POWER:
        power = found["power"][axis][place]
        return f"a power of {power:.1f} squared levels {where}, where collected images have none"
    return f"{1 + found['excess']:.1f} times the power of collected images {where}"


def mixture_in_words(axis: Sequence[float]) -> str:
    """A colour axis as a sum of channels."""
    names = ("R", "G", "B") if len(axis) == 3 else tuple(f"channel {number + 1}" for number in range(len(axis)))
    said = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight):.2f} {name}" for weight, name in zip(axis, names))
    return said.removeprefix("+ ").replace("- ", "-", 1) if axis[0] < 0 else said.removeprefix("+ ")


def evidence_in_words(found: Mapping) -> list[str]:
    """
    The evidence and its limits, in sentences.

    Args:
        found (`dict`): From `spectral_evidence`.
    """
    least = 1 / (found["permutations"] + 1)
    p_value = f"p {'at most' if found['p_value'] <= least else '='} {found['p_value']:.3g}"
    said = {
        "noise": f"Protected images have {rise_in_words(found)}, {p_value}: the sign of an added protection, seen "
        "without labels and without originals.",
        "filtered": f"Protected images have less power than collected ones at some frequencies ({p_value}), as after "
        "a JPEG save, a blur or a protection by convolution. The picture is of added noise, and does not hold for a "
        "filter.",
        "other kind": f"The spectra differ ({p_value}), but only in contrast or by little, as those of images of "
        "another kind do: no sign of an added protection.",
        "none": f"The spectra do not differ by more than chance explains ({p_value}): no added protection is seen, "
        "and the upper bounds say how much could be hidden.",
    }[found["finding"]]
    first, second = found["images"]
    return [
        said,
        f"The p-value comes from {found['permutations']} random divisions of the {first} protected and {second} "
        "collected images. It says that the two sets differ, not why they do.",
        "The estimate is right if both sets are of one kind. Other motifs, cameras or file formats have other "
        "spectra, and the difference then counts as protection.",
        "Grey bars are unknown: there, images differ so much among themselves that a protection up to the bar's end "
        "would not be seen.",
    ]
