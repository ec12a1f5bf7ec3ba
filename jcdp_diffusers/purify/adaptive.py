"""Preset `"adaptive"`: settings made for a data set, from its spectrum against that of collected images."""

import numpy as np

from ..data import LabelledImages
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PurificationConfig, adaptive_settings
from ..spectrum import protection_spectrum


SPECTRUM_IMAGES = 20_000  # of each set: more would sharpen the estimate by less than the sets differ


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

    def some(data: LabelledImages) -> np.ndarray:
        return data.images[np.linspace(0, len(data) - 1, min(len(data), SPECTRUM_IMAGES)).round().astype(int)]

    table = protection_spectrum(some(protected), some(collected)).table()
    facts = pipe.purification_config
    end = None if facts is None or facts.trained_timesteps is None else facts.trained_timesteps[1]
    corner = 0.0 if facts is None else facts.noise_corner
    return adaptive_settings(table, pipe.scheduler.alpha_bars[:end], noise_corner=corner)
