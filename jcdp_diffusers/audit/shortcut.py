"""
What gives a protection away before any victim is trained: a linear model that reads it.

Availability poisons work as shortcuts, patterns that even a linear model reads: Yu et al., *Availability Attacks
Create Shortcuts*, KDD 2022.
"""

import warnings
from collections.abc import Mapping

import numpy as np

from ..data import USUAL_BUDGET, LabelledImages
from .division import likenesses


# A linear model on more pixels than this takes long and tells no more.
SHORTCUT_IMAGES = 5000
SHORTCUT_VALUES = 2**25
PIXEL_MODELS = ("linear", "two-layer")
BATCH = 64


def shortcut_test(
    protected: LabelledImages, test: LabelledImages, clean: LabelledImages | None = None, *, seed: int = 0
) -> dict:
    """
    How much better a linear model does on held-out images of its own set than on clean test images.

    The model is fitted to 4/5 of the protected images. It is tested on the other 1/5, which it has not seen but which
    carry the same protection, and on the test images, which carry none. Honest images give about the same figure
    twice. Images that are nearly the same stay on one side (`division.likenesses`): the copy of an image that the
    model was fitted to is right without a shortcut. The classes of the test images are weighted to the proportions of
    the protected ones, because a frequent class is easy to guess.

    Args:
        protected, test, clean (`LabelledImages`): Labelled; the same is done with the clean originals where there are
            any.
        seed (`int`): Of the choice of images.

    Returns:
        `dict`: `protected` and, where given, `clean`, each with `fitted`, `held_out` and `test` accuracies in [0, 1],
        the last one with the class proportions of the protected images;
        `images`, how many were used; `gap`, held-out minus test accuracy of the protected set; `found`, whether the
        gap is larger than 0.1 and than three standard deviations of chance; `exchanged`, whether that is so of the
        clean originals and not of the protected images.
    """
    count = min(len(protected), SHORTCUT_IMAGES, max(50, SHORTCUT_VALUES // protected.images[0].size))
    rows = np.random.default_rng(seed).permutation(len(protected))[:count]
    groups = likenesses(protected.subset(rows), USUAL_BUDGET)
    ends = np.cumsum(np.bincount(groups))
    is_fitted = ends[groups] <= max(count * 4 // 5, ends[0])
    fitted, held_out = rows[is_fitted], rows[~is_fitted]
    test = test.subset(np.random.default_rng(seed).permutation(len(test))[:count])
    weights = weights_by_class(test.labels, protected.labels)
    counts = len(held_out), effective_count(weights)
    result: dict = {"images": count}
    for name, data in (("protected", protected), ("clean", clean)):
        if data is not None:
            result[name] = _linear_accuracies(data, fitted, held_out, test, weights)
    gap, found = gap_of(result["protected"], *counts)
    exchanged = clean is not None and not found and gap_of(result["clean"], *counts)[1]
    return result | {"gap": gap, "found": found, "exchanged": exchanged}


def weights_by_class(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """
    How often each image counts, so that a set has the class proportions of another.

    Args:
        labels (`np.ndarray`): int64 (N,), of the set.
        wanted (`np.ndarray`): int64 (M,), of the other set.

    Returns:
        `np.ndarray`: float64 (N,), 1 on average; all 1 where the proportions agree.
    """
    size = 1 + max(labels.max(), wanted.max())
    own, other = np.bincount(labels, minlength=size), np.bincount(wanted, minlength=size)
    weights = other[labels] / own[labels]
    return weights / weights.mean()


def effective_count(weights: np.ndarray) -> float:
    """Of how many images that count alike a mean is as certain (Kish, *Survey Sampling*, 1965)."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def gap_of(figures: Mapping[str, float], *counts: float) -> tuple[float, bool]:
    """Held-out minus test accuracy, of so many images each, and whether that is a shortcut rather than chance."""
    gap = figures["held_out"] - figures["test"]
    # Of few images all or none may be right, which is no certainty: one right and one wrong image more each, as in
    # `intervals` (Agresti and Caffo, 2000).
    shares = [(figures[name] * n + 1) / (n + 2) for name, n in zip(("held_out", "test"), counts)]
    deviation = np.sqrt(sum(share * (1 - share) / (n + 2) for share, n in zip(shares, counts)))
    return gap, bool(gap > max(0.1, 3 * deviation))


def _linear_accuracies(
    data: LabelledImages, fitted, held_out, test: LabelledImages, weights: np.ndarray
) -> dict[str, float]:
    model = PixelModel("linear").fit(data.subset(fitted))
    return {
        "fitted": model.accuracy(data.subset(fitted)),
        "held_out": model.accuracy(data.subset(held_out)),
        "test": float(np.average(model.is_right(test), weights=weights)),
    }


class PixelModel:
    """
    A small classifier of raw pixels, which reads shortcuts and little else.

    Args:
        kind (`str`): One of `PIXEL_MODELS`: `"linear"`, multinomial logistic regression; or `"two-layer"`, a network
            with 64 hidden units, which also reads what no linear model can.
        seed (`int`): Of the network's weights and batches.
    """

    def __init__(self, kind: str, *, seed: int = 0):
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier

        self.kind = kind
        # Stopped early rather than converged: a shortcut is what is learned first.
        if kind == "linear":
            self._model = LogisticRegression(C=0.01, max_iter=50, tol=1e-3)
        elif kind == "two-layer":
            self._model = MLPClassifier((64,), batch_size=BATCH, max_iter=20, random_state=seed)
        else:
            raise ValueError(f"kind is {kind!r}, but must be one of {PIXEL_MODELS}.")

    def fit(self, data: LabelledImages) -> "PixelModel":
        """Learn from labelled images; returns itself."""
        self._centre = data.images.mean(axis=0, dtype=np.float64)
        self._scale = data.images.std(dtype=np.float64) or 1.0
        if len(np.unique(data.labels)) == 1:  # of a rare class all images may be held out
            from sklearn.dummy import DummyClassifier

            self._model = DummyClassifier()
        elif self.kind == "two-layer":  # of fewer images than fill a batch
            self._model.set_params(batch_size=min(BATCH, len(data)))
        self._model = _fit_quietly(self._model, self._pixels(data), data.labels)
        return self

    def accuracy(self, data: LabelledImages) -> float:
        """Share of labelled images that it calls by their label, in [0, 1]."""
        return float(self._model.score(self._pixels(data), data.labels))

    def probability_of_label(self, data: LabelledImages) -> np.ndarray:
        """float64 (N,), what probability it gives to each image's own label; 0 for labels that it has not seen."""
        probabilities = self._model.predict_proba(self._pixels(data))
        column = {label: column for column, label in enumerate(self._model.classes_)}
        return np.array([row[column[y]] if y in column else 0.0 for row, y in zip(probabilities, data.labels)])

    def is_right(self, data: LabelledImages) -> np.ndarray:
        """bool (N,), which images it calls by their label."""
        return self._model.predict(self._pixels(data)) == data.labels

    def _pixels(self, data: LabelledImages) -> np.ndarray:
        return ((data.images - self._centre) / self._scale).reshape(len(data), -1).astype(np.float32)


def _fit_quietly(model, pixels: np.ndarray, labels: np.ndarray):
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(pixels, labels)
