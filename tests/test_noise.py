import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from jcdp_diffusers.noise import USES, coloured, content_id, image_keys, normal_noise, philox4x32, times_covariance


IDS = [f"image {i}" for i in range(512)]


def draw(ids, shape=(3, 32, 32), seed=0, round_index=0, step_index=0, use="variance"):
    return normal_noise(image_keys(seed, ids), shape, round_index=round_index, step_index=step_index, use=use)


def test_philox_matches_the_known_answers_of_random123():
    cases = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, expected in cases:
        words = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_words_beyond_31_bits_agree_with_plain_integers():
    """The vectorised product in int64 wraps; this loop in unbounded integers does not."""

    def plain(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [high >> 32 ^ c[1] ^ k[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ k[1], low & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    words = torch.randint(2**32, (6, 200), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ours = torch.stack(philox4x32(list(words[:4]), list(words[4:])))
    assert ours.T.tolist() == [plain(column[:4], column[4:]) for column in words.T.tolist()]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 23)])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_images_noise_does_not_depend_on_its_batch(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = IDS[:40]
        batch = draw(ids, shape)
        assert all(torch.equal(draw([i], shape)[0], row) for i, row in zip(ids, batch))
        assert torch.equal(draw(ids[3:10], shape), batch[3:10])
        assert torch.equal(draw(ids[::-1], shape), batch.flip(0))
    finally:
        torch.set_num_threads(before)


def test_another_process_draws_the_same_bits():
    script = (
        "import hashlib; from jcdp_diffusers.noise import *;"
        "z = normal_noise(image_keys(5, ['a', 'b']), (3, 8, 8), round_index=1, step_index=2, use='start');"
        "print(hashlib.sha256(z.numpy().tobytes()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    here = draw(["a", "b"], (3, 8, 8), seed=5, round_index=1, step_index=2, use="start")
    assert run.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_moments_and_tails_are_those_of_a_normal():
    z = draw(IDS).double().flatten()  # 1.6 million values: four standard errors are given each
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = 1 - torch.special.erf(torch.tensor(bound / 2**0.5, dtype=torch.float64))
        assert abs((z.abs() > bound).double().mean() - share) < 4 * (share / n) ** 0.5


@pytest.mark.parametrize(
    "other",
    [
        {"ids": [f"other {i}" for i in range(512)]},
        {"ids": IDS[1:] + IDS[:1]},
        {"seed": 1},
        {"round_index": 1},
        {"step_index": 1},
        {"use": "reference"},
        {"use": "start"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_change_of_any_argument_gives_independent_noise(other):
    a, b = draw(IDS).flatten(1).double(), draw(**({"ids": IDS} | other)).flatten(1).double()
    assert abs((a * b).mean()) < 4 / a.numel() ** 0.5
    per_image = (a * b).mean(1) * a.shape[1] ** 0.5  # standard normal if independent
    assert per_image.abs().max() < 5 and abs(per_image.var() - 1) < 0.3


def test_values_within_an_image_are_uncorrelated():
    z = draw(IDS).flatten(1).double()
    for lag in (1, 2, 3, 64, 256, 512, 768, 1024):
        product = z[:, lag:] * z[:, :-lag]
        assert abs(product.mean()) < 4 / product.numel() ** 0.5, lag


def test_uses_are_told_apart_even_at_the_largest_round():
    drawn = [draw(IDS[:1], round_index=2**24 - 1, use=use) for use in USES]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_seed_out_of_range_is_refused():
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            image_keys(seed, ["a"])


def test_content_id_depends_on_bytes_and_shape():
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    assert content_id(image) == content_id(image.clone())
    assert content_id(image) != content_id(image.reshape(3, 2, 8))
    assert content_id(image) != content_id(image.flip(0))


# ------------------------------------------------------------------------------------------------------ coloured noise


def power_by_distance(height, width, corner):
    """1 + (corner / f)^2 by NumPy, the mean taken as f = 1."""
    down, across = np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width
    return 1 + corner**2 / np.maximum(1, down[:, None] ** 2 + across[None] ** 2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 20, 13)])
def test_coloured_noise_has_the_spectrum_it_says(shape):
    noise = coloured(draw([str(i) for i in range(4000)], shape), 5.0)
    power = np.abs(np.fft.fft2(noise.numpy().astype(np.float64))) ** 2 / (shape[1] * shape[2])
    measured, expected = power.mean((0, 1)), power_by_distance(*shape[1:], 5.0)
    # A mean of n exponentials, or of half as many where a frequency is its own mirror image, twice as wide there.
    assert np.abs(measured / expected - 1).max() < 6 * (2 / (4000 * shape[0])) ** 0.5
    assert coloured(noise, 0.0) is noise and times_covariance(noise, 0.0) is noise


def test_coloured_noise_is_the_filter_that_numpy_computes():
    white = draw(IDS[:3], (2, 16, 24))
    spectrum = np.fft.fft2(white.numpy().astype(np.float64))
    power = power_by_distance(16, 24, 3.0)
    assert np.allclose(coloured(white, 3.0), np.fft.ifft2(spectrum * power**0.5).real, atol=1e-5)
    assert np.allclose(times_covariance(white, 3.0), np.fft.ifft2(spectrum * power).real, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 23)])
def test_coloured_noise_of_an_image_does_not_depend_on_its_neighbours(shape):
    """Of its place among 16, that is: the pipeline fills every micro-batch."""
    batch = coloured(draw(IDS[:16], shape), 8.0)
    for turn in (1, 5):
        assert torch.equal(coloured(draw(IDS[turn:16] + IDS[:turn], shape), 8.0), batch.roll(-turn, 0))
    others = coloured(draw(IDS[100:115] + IDS[3:4], shape), 8.0)
    assert torch.equal(others[15], batch[3])
