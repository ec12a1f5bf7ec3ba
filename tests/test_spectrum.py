"""The spectrum of a protection against closed forms, and what is said of a difference against known causes."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.spectrum import (
    ProtectionSpectrum,
    ProtectionTable,
    colour_axes,
    describe_difference,
    permutation_p_value,
    power_spectra,
    protection_spectrum,
    radial_bins,
)


def natural(count: int, seed: int, *, contrast: float = 18.0, size: int = 32) -> np.ndarray:
    """Images with the spectrum of photographs, power 1 / f^2, mostly in brightness: uint8 (N, size, size, 3)."""
    draw = np.random.default_rng(seed)
    rows = np.fft.fftfreq(size, 1 / size)
    radius = np.maximum(np.hypot(rows[:, None], rows[None, :]), 1)
    mixing = np.array([[1.0, 0.25, 0.05], [1.0, 0.0, -0.1], [1.0, -0.25, 0.05]])  # brightness and two weaker colours
    spectrum = np.fft.fft2(draw.standard_normal((count, 3, size, size))) / radius
    channels = np.einsum("ck,nkhw->nhwc", mixing, np.fft.ifft2(spectrum).real)
    loudness = np.exp(draw.normal(0, 0.3, (count, 1, 1, 1)))  # images differ in contrast
    return np.rint(127 + contrast * 6 * loudness * channels).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def protected() -> np.ndarray:
    return natural(1500, 0)


@pytest.fixture(scope="module")
def collected() -> np.ndarray:
    return natural(1500, 1)


def test_bins_are_the_rounded_radius_up_to_half_the_side():
    bins, frequencies = radial_bins(8, 8)
    assert bins[0, 0] == 0 and bins[0, 3] == bins[3, 0] == bins[0, 5] == 3 and bins[3, 4] == 4
    np.testing.assert_array_equal(frequencies, [0, 1, 2, 3, 4])


def test_axes_are_those_of_a_covariance_that_is_known():
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(np.array([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]).T)[0].T
    values = draw.standard_normal((50, 40, 40, 3)) * [30, 10, 3]
    axes = colour_axes(np.rint(127 + values @ basis).clip(0, 255).astype(np.uint8))
    np.testing.assert_allclose(np.abs(axes @ basis.T), np.eye(3), atol=0.02)
    assert axes[0].sum() > 0


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (12, 9)])
def test_the_powers_are_parsevals_sum(height, width):
    images = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    bins, frequencies = radial_bins(height, width)
    spectra = power_spectra(images, np.eye(3))
    members = np.bincount(bins.ravel(), minlength=len(frequencies))
    energy = (spectra * members).sum(axis=2)
    np.testing.assert_allclose(energy, np.square(images.astype(float)).sum(axis=(1, 2)), rtol=1e-10)


def test_a_wave_is_found_where_it_is():
    column = np.arange(16)
    wave = np.rint(127 + 40 * np.cos(2 * np.pi * 5 * column / 16))
    images = np.broadcast_to(wave[None, None, :, None], (2, 16, 16, 1)).astype(np.uint8)
    spectra = power_spectra(images, np.eye(1))
    assert spectra[0, 0, 1:].argmax() + 1 == 5
    np.testing.assert_allclose(spectra[0, 0, [2, 3, 7]], 0, atol=1)


def test_white_noise_has_its_variance_everywhere_it_can_be_seen(protected, collected):
    noise = np.random.default_rng(2).normal(0, 4, protected.shape)
    noisy = np.rint(protected + noise).clip(0, 255).astype(np.uint8)
    found = protection_spectrum(noisy, collected)
    weakest = found.power[2, 4:]
    np.testing.assert_allclose(weakest, 16, rtol=0.15)
    assert (np.abs(found.power - 16) < 5 * found.error + 2)[:, 1:].all()  # rounding adds a twelfth, clipping takes
    assert found.seen[2, 4:].all()
    assert (found.upper_bound >= found.power).all()


def test_a_guides_table_is_the_estimate_where_it_is_seen_and_bounded_where_it_is_not():
    """
    Brightness at 1, seen nowhere: the smallest bound of all axes. At 2, seen in colour alone: no more than there, or
    than its own bound. At 3, seen in both: the estimates. The mean colour: as at 1.
    """
    found = ProtectionSpectrum(
        axes=np.eye(2),
        frequencies=np.arange(4),
        power=np.array([[900.0, 50, -20, 40], [90.0, 1, 30, 35]]),
        error=np.array([[100.0, 25, 30, 2], [1.0, 2, 3, 4]]),
        background=np.array([[1e6, 1e4, 1e3, 0], [1e3, 100, 50, 20]]),
        images=(100, 100),
    )
    table = found.table()
    assert table.power == ((5.0, 5.0, 30.0, 40.0), (5.0, 5.0, 30.0, 35.0))
    assert table.axes == ((1.0, 0.0), (0.0, 1.0))
    assert 0 < table.background[0][3] < 1e-5 and table.background[1][1:] == (100.0, 50.0, 20.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(power=((1.0, -1.0),)), "power is -1 at its smallest"),
        (dict(background=((1.0, 0.0),)), "background is 0 at its smallest"),
        (dict(background=((1.0,),)), r"background is of shape \(1, 1\)"),
        (dict(axes=((2.0,),)), r"axes is \(\(2.0,\),\)"),
        (dict(power=(("a", "b"),)), r"power is \(\('a', 'b'\),\)"),
        (dict(power=((1.0, float("nan")),)), r"power is \(\(1.0, nan\),\)"),
        (dict(power=((1.0,), (1.0, 2.0))), "power is "),
    ],
)
def test_tables_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ProtectionTable(**dict(axes=((1.0,),), power=((1.0, 2.0),), background=((3.0, 4.0),)) | change)


def test_without_a_protection_z_is_about_standard_normal():
    scores = [protection_spectrum(natural(300, 2 * k), natural(300, 2 * k + 1)).z for k in range(2, 14)]
    scores = np.stack(scores)[:, 0]  # of one axis: neighbours depend on each other, repetitions do not
    assert abs(scores.mean()) < 0.9  # three standard errors: contrast moves all frequencies of a set at once
    assert 0.6 < scores.std() < 1.4


def test_the_false_alarms_of_the_permutation_test_are_as_many_as_it_says():
    spectra = power_spectra(natural(1200, 50), np.eye(3))
    draw = np.random.default_rng(3)
    values = []
    for repetition in range(60):
        rows = draw.permutation(len(spectra))[:200]
        values.append(
            permutation_p_value(spectra[rows[:100]], spectra[rows[100:]], permutations=59, seed=repetition)[0]
        )
    assert np.mean(np.array(values) <= 0.1) <= 0.2  # binomial(60, 0.1): above 12 with a chance of 0.004
    assert 0.3 < np.mean(values) < 0.7


def test_few_images_of_one_kind_are_rarely_called_different():
    """Colour axes of one set alone would tell them apart: with those, one in eight was called so at 0.05."""
    tint = np.random.default_rng(0).normal(0, 1, (400, 1, 1, 3)) * np.array([30.0, 10.0, 3.0])
    images = np.rint(natural(400, 60, size=16) + tint).clip(0, 255).astype(np.uint8)
    draw, values = np.random.default_rng(1), []
    for repetition in range(80):
        rows = draw.permutation(len(images))[:42]
        found = describe_difference(images[rows[:30]], images[rows[30:]], permutations=59, seed=repetition)
        values.append(found["p_value"])
    assert np.mean(np.array(values) <= 0.05) <= 0.125  # binomial(80, 0.05): above 10 with a chance of 0.003


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    saved = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        saved.append(np.asarray(Image.open(buffer)))
    return np.stack(saved)


def patches(images: np.ndarray) -> np.ndarray:
    """A pattern of 8x8 patches per class, as linearly separable perturbations have."""
    draw = np.random.default_rng(4)
    patterns = np.kron(draw.choice([-8, 8], (10, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    return np.rint(images + patterns[np.arange(len(images)) % 10]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        pytest.param(lambda images: images, "none", id="clean"),
        pytest.param(patches, "noise", id="patches"),
        pytest.param(lambda images: jpeg(images, 75), "filtered", id="JPEG"),
        pytest.param(lambda images: natural(1500, 9, contrast=25.0), "other kind", id="contrast"),
    ],
)
def test_a_difference_is_called_by_its_cause(change, finding, protected, collected):
    found = describe_difference(change(protected), collected, permutations=199)
    assert found["finding"] == finding, found
    assert (found["p_value"] <= 0.01) == (finding != "none")


@pytest.mark.parametrize("noise", [0, 25])
def test_grey_images_of_three_channels_are_as_those_of_one(noise, protected, collected):
    """Two of their colour axes have no power but that of rounding errors, in which there is nothing to see."""
    added = np.random.default_rng(2).integers(-noise, noise + 1, protected[..., :1].shape)
    one = np.clip(protected[..., :1].astype(int) + added, 0, 255).astype(np.uint8), collected[..., :1]
    expected, found = (describe_difference(*sets, permutations=99) for sets in (one, [x.repeat(3, 3) for x in one]))
    assert expected["finding"] == found["finding"] == ("noise" if noise else "none")
    assert found["excess"] == pytest.approx(expected["excess"]) and found["excess_at"] == expected["excess_at"]


def test_colour_noise_on_grey_images_is_found_and_measured_against_rounding(collected):
    grey = collected[..., :1].repeat(3, 3)
    noisy = np.clip(grey[:700].astype(int) + np.random.default_rng(2).choice([-3, 3], (700, 32, 32, 3)), 0, 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = describe_difference(noisy.astype(np.uint8), grey[700:], permutations=99)
        flat = np.full((40, 8, 8, 3), 100, np.uint8)
        assert describe_difference(flat, flat[:20], permutations=99)["finding"] == "none"
    # White noise of 3 levels has the power 9 everywhere, and that of rounding is 1/12.
    assert found["finding"] == "noise" and found["excess"] == pytest.approx(9 * 12, rel=0.1)
    assert found["excess_at"][0] in (1, 2)
    assert found["spectrum"].power[1:, 1:] == pytest.approx(9, rel=0.1)


def test_sets_that_do_not_fit_are_refused(protected, collected):
    with pytest.raises(ValueError, match=r"protected .*\(16, 16, 3\).*\(32, 32, 3\)"):
        protection_spectrum(protected[:, :16, :16], collected)
    with pytest.raises(ValueError, match="collected has 1 "):
        protection_spectrum(protected, collected[:1])


def test_squares_of_a_photograph_count_as_one_image():
    photographs, others = natural(12, 3), natural(10, 4)
    whole = protection_spectrum(photographs, others)
    numbers = np.repeat(np.arange(12), 3), np.repeat(np.arange(10), 2)
    copies = protection_spectrum(photographs[numbers[0]], others[numbers[1]], photographs=numbers)
    assert copies.images == whole.images == (12, 10)
    np.testing.assert_allclose(copies.power, whole.power)
    np.testing.assert_allclose(copies.error, whole.error)
    with pytest.raises(ValueError, match="protected has 1 image"):
        protection_spectrum(photographs, others, photographs=(np.zeros(12, int), np.arange(10)))
