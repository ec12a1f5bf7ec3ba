"""Preset `"adaptive"`: settings made for a data set, from its spectrum against that of collected images."""

import itertools

import numpy as np

from ..data import LabelledImages
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PurificationConfig, adaptive_settings
from ..spectrum import ProtectionSpectrum, protection_spectrum
from .reader import Rows
from .tiling import TiledImage, prepare


SPECTRUM_IMAGES = 20_000  # of each set: more would sharpen the estimate by less than the sets differ
SQUARES_EACH = 64  # of a photograph at most, which are alike


def adaptive_config(
    protected: LabelledImages, collected: LabelledImages, pipe: JointConditionalPurificationPipeline
) -> PurificationConfig:
    """
    Settings that fit the protection of a data set, without its clean originals and without labels.

    Args:
        protected, collected (`LabelledImages`): The images to purify, and *other* images of the same kind that are not
            protected, both of the purifier's size. Of each at most `SPECTRUM_IMAGES` are used, evenly spaced.
        pipe (`JointConditionalPurificationPipeline`): The purifier, whose noise schedule decides T_p.

    Raises:
        ValueError: If the sets differ in shape, or have too few images.
    """
    some = (data.images[_evenly(len(data), SPECTRUM_IMAGES)] for data in (protected, collected))
    return _settings(protection_spectrum(*some), pipe)


def adaptive_config_of_rows(
    protected: Rows, collected: Rows, size: int, pipe: JointConditionalPurificationPipeline, *, tiled: bool
) -> PurificationConfig:
    """
    As `adaptive_config`, for images as they are stored, of any size.

    Args:
        protected, collected (`Rows`): Images, no streams; those that cannot be used are passed over.
        size (`int`): Side of the purifier's squares, in pixels.
        pipe (`JointConditionalPurificationPipeline`): The purifier.
        tiled (`bool`): Whether images are purified in squares at their own size, whose spectrum is then compared. Else
            all are brought to `size`.

    Raises:
        ValueError: If a set has fewer than two images that can be used.
    """
    how = {"channels": pipe.unet.config.in_channels, "size": size, "fit": "tile" if tiled else "resize"}
    protected, of_protected = _squares(protected, "protected", **how)
    collected, of_collected = _squares(collected, "collected", **how)
    photographs = (of_protected, of_collected) if tiled else None
    return _settings(protection_spectrum(protected, collected, photographs=photographs), pipe)


def _settings(spectrum: ProtectionSpectrum, pipe: JointConditionalPurificationPipeline) -> PurificationConfig:
    facts = pipe.purification_config
    end = None if facts is None or facts.trained_timesteps is None else facts.trained_timesteps[1]
    corner = 0.0 if facts is None else facts.noise_corner
    return adaptive_settings(spectrum.table(), pipe.scheduler.alpha_bars[:end], noise_corner=corner)


def _squares(rows: Rows, role: str, *, channels: int, size: int, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, size, size, C), about `SPECTRUM_IMAGES` squares side by side, and each one's photograph's number."""
    wanted = _evenly(rows.length, SPECTRUM_IMAGES)
    each = min(SQUARES_EACH, SPECTRUM_IMAGES // max(1, len(wanted)))
    images = itertools.chain.from_iterable(table["image"].to_pylist() for table in rows.read(0, rows.length))
    squares, photographs, chosen = [], [], set(wanted.tolist())
    for number, value in enumerate(images):
        tiled = prepare(value, channels=channels, size=size, fit=fit, overlap=0) if number in chosen else None
        if isinstance(tiled, TiledImage):
            cut = list(tiled.squares())
            squares += [cut[index].copy() for index in _evenly(len(cut), each)]  # a view would keep the photograph
            photographs += [number] * (len(squares) - len(photographs))
    if not squares:
        raise ValueError(f"{role} has no image that can be used, but at least 2 are needed for a standard error.")
    return np.stack(squares), np.array(photographs)


def _evenly(count: int, most: int) -> np.ndarray:
    """Numbers below `count`, evenly spaced, at most so many."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)
