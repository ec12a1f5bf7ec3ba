import numpy as np
import pytest
import torch
from scipy.signal import correlate2d

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation
from jcdp_diffusers.poisons import ar


@pytest.fixture(scope="module")
def processes():
    return ar.coefficients(5, 3, ar.ARSettings(), np.random.default_rng(0))


def answer(process, noise):
    """The matching filter's answer, channel by channel, by SciPy."""
    matching = process.copy()
    matching[:, 2, 2] = -1
    return sum(correlate2d(noise[channel], matching[channel], mode="valid") for channel in range(len(noise)))


def test_coefficients_are_an_averaging_process(processes):
    assert processes.shape == (5, 3, 3, 3)
    np.testing.assert_allclose(processes.sum(axis=(2, 3)), 1)
    assert not processes[:, :, 2, 2].any()


def test_every_pixel_follows_from_its_eight_predecessors(processes):
    noise = ar.generate(processes[:1], (3, 12, 12), np.random.default_rng(1))[0]
    for channel in range(3):
        for row in range(2, 12):
            for column in range(2, 12):
                window = noise[channel, row - 2 : row + 1, column - 2 : column + 1]
                predicted = (window * processes[0, channel]).sum()
                assert noise[channel, row, column] == pytest.approx(predicted, rel=1e-9, abs=1e-9)


def test_own_filter_is_silent_and_others_answer(processes):
    noise = ar.generate(processes, (3, 32, 32), np.random.default_rng(1))
    noise /= np.sqrt(np.square(noise).sum(axis=(1, 2, 3), keepdims=True))
    answers = np.array([[np.maximum(answer(process, one), 0).sum() for one in noise] for process in processes])
    assert np.abs(np.diag(answers)).max() < 1e-9
    assert answers[~np.eye(5, dtype=bool)].min() > 1
    np.testing.assert_allclose(ar.response(processes[0], noise[1]), answer(processes[0], noise[1]), atol=1e-12)


def test_noise_of_an_image_is_its_classs_process_and_a_fresh_draw():
    labels = torch.tensor([0, 1, 0, 1])
    perturbation = poisons.get("ar")(torch.rand(4, 3, 32, 32), labels, seed=3)
    assert perturbation.flatten(1).norm(dim=1).numpy() == pytest.approx(1.0, rel=1e-5)
    found = ar.coefficients(2, 3, ar.ARSettings(), np.random.default_rng([3, 0]))
    for noise, label in zip(perturbation.double().numpy(), labels.tolist(), strict=True):
        assert np.abs(answer(found[label], noise)).max() < 1e-5
        assert np.abs(answer(found[1 - label], noise)).max() > 1e-2
    assert not torch.equal(perturbation[0], perturbation[2])


@pytest.mark.parametrize("height,width", [(33, 32), (64, 64), (128, 128), (224, 224), (40, 100)])
def test_noise_covers_images_of_any_size(height, width):
    """One draw for a large image grows towards its end: scaled to the norm, it leaves most of the image as it was."""
    images, labels = torch.full((4, 3, height, width), 0.5), torch.tensor([0, 1, 0, 1])
    perturbation = poisons.get("ar")(images, labels, seed=0)
    declared = poisons.budget("ar", "published", (3, height, width))["l2"]
    assert perturbation.flatten(1).norm(dim=1).numpy() == pytest.approx(declared, rel=1e-5)
    clean = np.full((4, height, width, 3), 128, np.uint8)
    changed = (apply_perturbation(clean, perturbation) != clean).any(axis=3)
    squares = [
        changed[:, top : top + 16, left : left + 16] for top in range(0, height, 16) for left in range(0, width, 16)
    ]
    assert min(square.mean(axis=(1, 2)).min() for square in squares) > 0.1 and changed.mean() > 0.6


def test_each_tile_is_a_draw_of_the_classs_process():
    perturbation = poisons.get("ar")(torch.rand(2, 3, 48, 32), torch.arange(2), seed=3).double().numpy()
    found = ar.coefficients(2, 3, ar.ARSettings(), np.random.default_rng([3, 0]))
    for noise, process in zip(perturbation, found, strict=True):
        assert max(np.abs(answer(process, tile)).max() for tile in (noise[:, :24], noise[:, 24:])) < 1e-5
        assert np.abs(answer(process, noise)).max() > 1e-2  # across the border


def test_tiles_cover_a_side_once():
    assert [ar.cuts(side) for side in (1, 32, 33, 96)] == [
        [(0, 1)],
        [(0, 32)],
        [(0, 16), (16, 33)],
        [(0, 32), (32, 64), (64, 96)],
    ]


def test_norm_grows_with_the_image_as_published():
    assert poisons.budget("ar", "published", (3, 32, 32))["l2"] == pytest.approx(1.0)
    assert poisons.budget("ar", "published", (3, 96, 96))["l2"] == pytest.approx(3.0)


def test_a_search_that_cannot_succeed_says_so():
    settings = ar.ARSettings(required_response=1e6, max_candidates=2048)
    with pytest.raises(ValueError, match=r"required_response is 1e\+06.*1 of 3"):
        poisons.get("ar")(torch.rand(3, 3, 16, 16), torch.arange(3), preset=settings)
