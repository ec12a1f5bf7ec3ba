"""
A median filter for outliers only, against poisons that change single pixels by much (one-pixel shortcuts).

Diffusion leaves such a pixel standing: a change of 0.7 is far beyond the noise that it can afford to add. A detector
of impulse noise finds it without a network. ROAD (Garnett et al., "A universal noise removal algorithm with an impulse
detector", IEEE Transactions on Image Processing 14(11), 2005) sums a pixel's absolute differences to the four of its
eight neighbours that are most like it, so that an edge, which always has neighbours on its own side, is none.

Ours are the threshold and colour, where the difference of two pixels is the mean over their channels. At 0.15 per
neighbour 1.2 % of the pixels of CIFAR-10's training images are replaced, and 97 % of those that OPS changed.
"""

import numpy as np
from scipy.ndimage import median_filter

from . import Countermeasure


SOURCE = "Impulse detector ROAD (Garnett et al., IEEE TIP 2005), then the median of 3x3 pixels"
NEIGHBOURS = 4
THRESHOLD = 0.15  # mean difference to those neighbours, values in [0, 1]


def rank_ordered_difference(image: np.ndarray) -> np.ndarray:
    """ROAD of every pixel, (H, W), divided by 4 x 255: in [0, 1]. Beyond its edges an image (H, W, C) is mirrored."""
    height, width = image.shape[:2]
    values = image.astype(np.float64) / 255
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    offsets = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    differences = np.stack(
        [np.abs(padded[row : row + height, column : column + width] - values).mean(axis=2) for row, column in offsets]
    )
    return np.sort(differences, axis=0)[:NEIGHBOURS].mean(axis=0)


def replace_impulses(image: np.ndarray) -> np.ndarray:
    """Each pixel beyond the threshold becomes the median of its 3x3 pixels, channel by channel; the others stay."""
    impulses = rank_ordered_difference(image) > THRESHOLD
    return np.where(impulses[:, :, None], median_filter(image, size=(3, 3, 1), mode="mirror"), image)


COUNTERMEASURES = (
    Countermeasure(
        "impulse-filter",
        "transform",
        SOURCE,
        "one filter per image",
        replace_impulses,
        {"neighbours": NEIGHBOURS, "threshold": THRESHOLD},
        takes="bytes",
    ),
)
