"""
What gives a protection away before any victim is trained: a linear model that reads it.

Availability poisons work as shortcuts, patterns that even a linear model reads: Yu et al., *Availability Attacks
Create Shortcuts*, KDD 2022.
"""

import warnings
from collections.abc import Mapping

import numpy as np

from ..data import LabelledImages


# A linear model on more pixels than this takes long and tells no more.
SHORTCUT_IMAGES = 5000
SHORTCUT_VALUES = 2**25


def shortcut_test(
    protected: LabelledImages, test: LabelledImages, clean: LabelledImages | None = None, *, seed: int = 0
) -> dict:
    """
    How much better a linear model does on held-out images of its own set than on clean test images.

    The model is fitted to 4/5 of the protected images. It is tested on the other 1/5, which it has not seen but which
    carry the same protection, and on the test images, which carry none. Honest images give about the same figure
    twice.

    Args:
        protected, test, clean (`LabelledImages`): Labelled; the same is done with the clean originals where there are
            any.
        seed (`int`): Of the choice of images.

    Returns:
        `dict`: `protected` and, where given, `clean`, each with `fitted`, `held_out` and `test` accuracies in [0, 1];
        `images`, how many were used; `gap`, held-out minus test accuracy of the protected set; `found`, whether the
        gap is larger than 0.1 and than three standard deviations of chance; `exchanged`, whether that is so of the
        clean originals and not of the protected images.
    """
    count = min(len(protected), SHORTCUT_IMAGES, max(50, SHORTCUT_VALUES // protected.images[0].size))
    rows = np.random.default_rng(seed).permutation(len(protected))[:count]
    fitted, held_out = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    test_rows = np.random.default_rng(seed).permutation(len(test))[:count]
    result: dict = {"images": count}
    for name, data in (("protected", protected), ("clean", clean)):
        if data is not None:
            result[name] = _linear_accuracies(data, fitted, held_out, test.subset(test_rows))
    gap, found = _gap(result["protected"], len(held_out), len(test_rows))
    exchanged = clean is not None and not found and _gap(result["clean"], len(held_out), len(test_rows))[1]
    return result | {"gap": gap, "found": found, "exchanged": exchanged}


def _gap(figures: Mapping[str, float], *counts: int) -> tuple[float, bool]:
    """Held-out minus test accuracy, of so many images each, and whether that is a shortcut rather than chance."""
    gap = figures["held_out"] - figures["test"]
    shares = (figures["held_out"], figures["test"])
    deviation = np.sqrt(sum(max(share * (1 - share), 1e-3) / n for share, n in zip(shares, counts)))
    return gap, bool(gap > max(0.1, 3 * deviation))


def _linear_accuracies(data: LabelledImages, fitted, held_out, test: LabelledImages) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    centre = data.images[fitted].mean(axis=0, dtype=np.float64)
    scale = data.images[fitted].std(dtype=np.float64) or 1.0

    def pixels(images: np.ndarray) -> np.ndarray:
        return ((images - centre) / scale).reshape(len(images), -1).astype(np.float32)

    # Stopped early rather than converged: a shortcut is what is learned first.
    model = LogisticRegression(C=0.01, max_iter=50, tol=1e-3)
    model = _fit_quietly(model, pixels(data.images[fitted]), data.labels[fitted])
    return {
        "fitted": float(model.score(pixels(data.images[fitted]), data.labels[fitted])),
        "held_out": float(model.score(pixels(data.images[held_out]), data.labels[held_out])),
        "test": float(model.score(pixels(test.images), test.labels)),
    }


def _fit_quietly(model, pixels: np.ndarray, labels: np.ndarray):
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(pixels, labels)
