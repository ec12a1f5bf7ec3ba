"""What the spectra of an audit's sets say of a protection that is known."""

import numpy as np
import pytest
from test_spectrum import natural

from jcdp_diffusers.audit import evidence
from jcdp_diffusers.audit.evidence import spectral_evidence
from jcdp_diffusers.data import LabelledImages


def images(count: int, seed: int) -> LabelledImages:
    return LabelledImages(natural(count, seed, size=16), None, tuple(f"{seed}-{row}" for row in range(count)))


def test_white_noise_has_its_variance_in_what_is_seen_and_in_the_truth(monkeypatch):
    monkeypatch.setattr(evidence, "PERMUTATIONS", 99)
    clean, collected = images(800, 0), images(800, 1)
    noise = np.random.default_rng(2).normal(0, 5, clean.images.shape)
    protected = clean.with_images(np.rint(clean.images + noise).clip(0, 255).astype(np.uint8))
    found = spectral_evidence(protected, collected, clean)
    assert found["finding"] == "noise" and found["p_value"] == pytest.approx(0.01) and found["images"] == [800, 800]
    np.testing.assert_allclose(found["actual"], 25, rtol=0.1)  # s^2 in every axis and at every frequency
    power, error, upper, seen = (np.array(found[name]) for name in ("power", "error", "upper_bound", "seen"))
    assert seen[2, 3:].all() and not seen[0, :3].any()  # the weakest colour axis is seen, coarse brightness is not
    assert (np.abs(power - 25)[seen] < 4 * error[seen]).all()
    assert (upper[~seen] > 25).all()  # what is unknown is not excluded


def test_a_difference_below_rounding_is_not_seen(monkeypatch):
    """Of grey images two colour axes have no power; the last digits of floats differ there."""
    monkeypatch.setattr(evidence, "PERMUTATIONS", 99)
    grey = [one.with_images(np.repeat(one.images[..., :1], 3, axis=3)) for one in (images(300, 0), images(300, 1))]
    found = spectral_evidence(*grey)
    assert found["actual"] is None and not np.array(found["seen"])[1:].any()


def test_of_many_large_images_a_part_is_compared(monkeypatch):
    monkeypatch.setattr(evidence, "PERMUTATIONS", 99)
    monkeypatch.setattr(evidence, "VALUES", 50 * 16 * 16 * 3)
    clean = images(200, 0)
    protected = clean.with_images(clean.images ^ 1)
    found = spectral_evidence(protected, images(70, 1), clean)
    assert found["images"] == [50, 50]
    np.testing.assert_allclose(np.array(found["actual"]).mean(), 1, rtol=0.6)  # rows of both belong together
