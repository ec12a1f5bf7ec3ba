"""The guide by a protection's spectrum, where images and protection are Gaussian and the posterior is known."""

import argparse
import json
import math

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from purifying import SIZE, quick_pipe, some_images, source_folder
from tiny import tiny_unet

from jcdp_diffusers import JointConditionalPurificationPipeline, PurificationConfig
from jcdp_diffusers.audit.purifier import choose_purifier
from jcdp_diffusers.audit.settings import AuditSettings
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.data.writing import png
from jcdp_diffusers.guidance import posterior_start, towards_protected
from jcdp_diffusers.purify import command
from jcdp_diffusers.spectrum import ProtectionTable, radial_bins


SIDE = 8
BINS, FREQUENCIES = radial_bins(SIDE, SIDE)
AXES = torch.linalg.qr(torch.tensor([[1.0, 1, 1], [1, -1, 0.2], [1, 1, -2]], dtype=torch.float64).T)[0].T
# Power by colour axis and frequency, images in [-1, 1]: images as 1 / f^2 and weaker by axis, a protection of another
# shape that is stronger than the images at some frequencies, weaker at others, and nowhere in one.
IMAGES = torch.tensor([[0.5], [0.05], [0.02]], dtype=torch.float64) / torch.tensor([1, 1, 4, 9, 16.0])
PROTECTION = torch.tensor(
    [[0.01, 0.02, 0.02, 0.02, 0.02], [0.01, 0.1, 0.01, 0.004, 0.002], [0.01, 0.001, 0.002, 0.0, 0.05]],
    dtype=torch.float64,
)
TABLE = ProtectionTable(AXES.tolist(), (PROTECTION * 127.5**2).tolist(), (IMAGES * 127.5**2).tolist())


def rotated(images, axes=AXES):
    return torch.einsum("bchw,ac->bahw", images.double(), axes)


def transform(images):
    """By colour axis and coefficient of the Fourier transform, float64; complex (B, C, H, W)."""
    return torch.fft.fft2(rotated(images))


def of_transform(coefficients):
    return rotated(torch.fft.ifft2(coefficients).real, AXES.T)


def by_coefficient(table):
    return table[:, torch.from_numpy(BINS)]


def colour(corner):
    """Power of the noise by coefficient, f = 0 taken as 1."""
    frequency = torch.fft.fftfreq(SIDE, 1 / SIDE, dtype=torch.float64)
    return 1 + corner**2 / (frequency[:, None] ** 2 + frequency**2).clamp(min=1)


def exact_network(bars, corner):
    """E[noise | x_t] of Gaussian images, of whose mean colour nothing is known."""
    images = by_coefficient(IMAGES).masked_fill(torch.from_numpy(BINS) == 0, math.inf)

    def network(sample, time, return_dict):
        bar = bars[int(time[0])]
        gain = (1 - bar) ** 0.5 * colour(corner) / (bar * images + (1 - bar) * colour(corner))
        return (of_transform(transform(sample) * gain),)

    return network


def posterior(scale):
    """Wiener's filter and the variance that it leaves, by colour axis and coefficient."""
    images, protection = by_coefficient(IMAGES), by_coefficient(PROTECTION) / scale
    filtered = (images / (images + protection)).masked_fill(torch.from_numpy(BINS) == 0, 1.0)
    return filtered, filtered * protection


def sampled(protected, *, start=None, table=TABLE, scale=1.0, corner=0.0, finer=1, **settings):
    """
    Mean and variance of all samples by colour axis and coefficient.

    Every step is linear. So three images go through it: the mean, without noise; an impulse, which shows by how much a
    step multiplies each coefficient; and the noise alone.
    """
    schedule = DDPMScheduler(1000 * finer, 1e-4 / finer, 0.02 / finer, clip_sample=False)
    pipe = JointConditionalPurificationPipeline(tiny_unet(size=SIDE), schedule)
    steps = 100 * finer
    config = PurificationConfig(
        diffusion_steps=steps, noise_corner=corner, protection=table, protection_guidance_scale=scale, **settings
    )
    scheduler = pipe.prepare_scheduler(config)
    network = exact_network(scheduler.alpha_bars, corner)
    impulse = of_transform(torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)).float()
    noise = of_transform(colour(corner).sqrt().expand(1, 3, SIDE, SIDE)).float()
    nothing = torch.zeros_like(impulse)
    original = torch.cat([protected, nothing, nothing])
    draws = torch.cat([nothing, nothing, noise])
    bar = scheduler.alpha_bars[steps - 1]
    start = pipe.start_by_protection if start is None else start
    begun = start(config, original, draws * (1 - bar) ** 0.5, bar)
    mean, variance = begun[:1], transform(begun[2:]).abs() ** 2
    for timestep in scheduler.timesteps.tolist():
        sample = torch.cat([mean, impulse, nothing])
        moved, _ = pipe.reverse_step(
            scheduler, config, timestep, sample, original, draws, bar, lambda use: draws, network
        )
        mean, (factor, added) = moved[:1], transform(moved[1:]).abs() ** 2
        variance = factor * variance + added
    return transform(mean), variance


@pytest.fixture(scope="module")
def protected():
    white = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = by_coefficient(IMAGES + PROTECTION)
    return of_transform(torch.fft.fft2(white) * power.sqrt()).float()


def error_of_mean(mean, protected, scale=1.0):
    wanted = transform(protected) * posterior(scale)[0]
    return ((mean - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (dict(), 0.12),
        (dict(variance_type="fixed_large"), 0.01),
        (dict(corner=3.0, variance_type="fixed_large"), 0.12),
        (dict(scale=0.1), 0.12),
        (dict(sampler="ddim"), 0.06),
    ],
    ids=["small variance", "large variance", "coloured noise", "weaker", "DDIM"],
)
def test_samples_follow_the_posterior(settings, most, protected):
    """The mean is exact at any number of steps. The variance becomes so with finer ones, as DDPM's does."""
    scale = settings.get("scale", 1.0)
    wanted = posterior(scale)[1]
    worst = []
    for finer in (1, 4):
        mean, variance = sampled(protected, finer=finer, **settings)
        assert error_of_mean(mean, protected, scale) < 1e-5
        assert (variance[0][wanted == 0] < 1e-10).all()
        worst.append((variance[0] / wanted - 1)[wanted > 0].abs().max().item())
    assert worst[1] < most and worst[1] < 0.5 * worst[0]


def test_what_is_known_and_where_it_starts_both_matter(protected):
    """The usual start, and a guide that trusts all frequencies alike, as the pixel guide does, miss the posterior."""

    def usual_start(config, original, noise, bar):
        return bar**0.5 * original + noise

    assert error_of_mean(sampled(protected)[0], protected) < 1e-5
    assert error_of_mean(sampled(protected, start=usual_start)[0], protected) > 0.03
    alike = PROTECTION.mean().expand_as(PROTECTION) * 127.5**2
    alike = ProtectionTable(TABLE.axes, alike.tolist(), TABLE.background)
    assert error_of_mean(sampled(protected, table=alike)[0], protected) > 0.1


def test_an_estimate_is_corrected_as_by_kalman(protected):
    """Against the gain of two Gaussian observations of one image, a coefficient at a time."""
    estimate = torch.randn(protected.shape, generator=torch.Generator().manual_seed(1))
    ratio = 0.05
    images = by_coefficient(IMAGES).masked_fill(torch.from_numpy(BINS) == 0, math.inf)
    left = 1 / (1 / images + 1 / ratio)
    gain = left / (left + by_coefficient(PROTECTION))
    wanted = of_transform(transform(estimate) * (1 - gain) + transform(protected) * gain)
    found = towards_protected(estimate, protected, TABLE, torch.tensor(ratio))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
    nowhere = ProtectionTable(TABLE.axes, [[0.0] * len(FREQUENCIES)] * 3, TABLE.background)
    torch.testing.assert_close(towards_protected(estimate, protected, nowhere, torch.tensor(ratio)), protected)
    noise = torch.randn(protected.shape, generator=torch.Generator().manual_seed(2))
    start = posterior_start(protected, nowhere, 0.9, noise, torch.tensor(ratio))
    torch.testing.assert_close(start, 0.9**0.5 * protected + noise)


def few(count=5):
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("settings", [dict(), dict(sampler="ddim"), dict(num_inference_steps=1), dict(num_rounds=2)])
def test_where_there_is_no_protection_images_stay_as_they_are(settings, prediction_type):
    """Whatever the network says: it is random here."""
    pipe = quiet(
        JointConditionalPurificationPipeline(quick_pipe().unet, DDPMScheduler(prediction_type=prediction_type))
    )
    nowhere = ProtectionTable(TABLE.axes, [[0.0] * len(FREQUENCIES)] * 3, TABLE.background)
    options = dict(diffusion_steps=30, num_inference_steps=3) | settings
    config = PurificationConfig(protection_guidance_scale=0.3, protection=nowhere, **options)
    found = pipe(few(), preset=config, seed=0, output_type="pt").images
    torch.testing.assert_close(found, few(), rtol=0, atol=1e-4)


def test_an_images_bits_do_not_depend_on_its_neighbours():
    pipe = quiet(quick_pipe())
    config = PurificationConfig(diffusion_steps=4, protection_guidance_scale=0.3, protection=TABLE)
    ids = list("abcde")
    together = pipe(few(), preset=config, seed=0, ids=ids, micro_batch_size=4, output_type="pt").images
    order = [3, 4, 0]
    apart = pipe(
        few()[order], preset=config, seed=0, ids=[ids[k] for k in order], micro_batch_size=4, output_type="pt"
    ).images
    assert torch.equal(apart, together[order])
    assert not torch.allclose(together, few(), atol=0.01)


def test_a_spectrum_of_other_images_is_refused():
    pipe = quiet(quick_pipe())
    config = PurificationConfig(diffusion_steps=2, protection_guidance_scale=1.0, protection=TABLE)
    with pytest.raises(ValueError, match="protection has 3 colour axes and 5 frequencies, .* 16x16"):
        pipe(torch.rand(1, 3, 16, 16), preset=config)


def test_adaptive_on_the_command_line(tmp_path, capsys):
    """The protected set has noise in one colour alone: the run's record says so."""
    clean = source_folder(tmp_path / "clean", 60)
    collected = source_folder(tmp_path / "collected", 60, seed=1)
    data = load_images(clean)
    noise = np.random.default_rng(0).normal(0, 12, (60, SIZE, SIZE, 1)) * [1, -1, 0]
    protected = data.with_images(np.rint(data.images + noise).clip(0, 255).astype(np.uint8))
    write_dataset(tmp_path / "protected", protected, shards=1)
    quick_pipe().save_pretrained(tmp_path / "purifier")
    words = f"purify --purifier {tmp_path / 'purifier'} --dataset {tmp_path / 'protected'} --device cpu"
    words += f" --diffusion_steps 3 --num_inference_steps 2 --preset adaptive --output {tmp_path / 'out'}"
    assert main(words.split()) == 1
    assert "--collected is None" in capsys.readouterr().err
    for option in ("--output", "--export"):
        assert main([*words.split(), "--collected", str(collected), option, str(collected / "new")]) == 1
        assert f"{option} is '{collected / 'new'}', which lies inside that of --collected" in capsys.readouterr().err
    assert main([*words.split(), "--collected", str(collected)]) == 0
    table = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["protection"]
    # 2 * 12^2 in all axes together. These images are made of squares, which hide what is at 1 and 3.
    assert np.array(table["power"]).sum(axis=0)[[2, 4]] == pytest.approx(288, rel=0.3)
    assert "of the spectrum's guide 0.3" in (tmp_path / "out" / "README.md").read_text()
    assert main([*words.split(), "--collected", str(collected)]) == 0  # the same estimate, so the run goes on


def test_adaptive_reads_the_spectrum_of_the_tiles_that_are_purified(tmp_path):
    """White noise at full scale, of which shrunk photographs would show a sixteenth."""
    clean, collected = (some_images(40, size=4 * SIZE, seed=seed) for seed in (0, 1))
    noise = np.random.default_rng(0).normal(0, 12, (40, 4 * SIZE, 4 * SIZE, 1)) * [1, -1, 0]
    protected = clean.with_images(np.rint(clean.images + noise).clip(0, 255).astype(np.uint8))
    for name, data in (("protected", protected), ("collected", collected)):
        write_dataset(tmp_path / name, data, shards=1)
    quick_pipe().save_pretrained(tmp_path / "purifier")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = f"--purifier {tmp_path / 'purifier'} --dataset {tmp_path / 'protected'} --output {tmp_path / 'out'}"
    words += f" --preset adaptive --collected {tmp_path / 'collected'}"

    def power(*fit):
        return np.array(command._adaptive(parser.parse_args([*words.split(), *fit])).protection.power).sum(axis=0)

    assert power("--fit", "tile")[2:] == pytest.approx(288, rel=0.3)
    assert np.array_equal(power(), power("--fit", "tile"))  # settled before the estimate, where nobody asks for it
    assert not np.allclose(power("--fit", "resize"), power(), rtol=0.5)


def test_adaptive_takes_what_other_presets_take(tmp_path, capsys):
    """A damaged image, a label that is missing, and a column that only the protected images have."""
    collected = source_folder(tmp_path / "collected", 12, seed=1)
    protected = load_images(source_folder(tmp_path / "clean", 12))
    files = [{"bytes": png(image), "path": None} for image in protected.images]
    files[3]["bytes"] = files[3]["bytes"][:100]
    columns = {"shot": datasets.Image(), "label": datasets.Value("int64")}
    data = {"shot": files, "label": [0, None, *[1] * 10]}
    (tmp_path / "protected").mkdir()
    made = datasets.Dataset.from_dict(data, features=datasets.Features(columns))
    made.to_parquet(tmp_path / "protected" / "train-00000-of-00001.parquet")
    quick_pipe().save_pretrained(tmp_path / "purifier")
    words = f"purify --purifier {tmp_path / 'purifier'} --dataset {tmp_path / 'protected'} --device cpu"
    words += (
        f" --image_column shot --diffusion_steps 3 --num_inference_steps 2 --preset adaptive --collected {collected}"
    )
    for option in ("output", "export"):  # what is written there would be read as collected images
        apart = {"output": tmp_path / "out", "export": tmp_path / "pictures"} | {option: collected / "out"}
        assert main([*words.split(), *(f"--{name}={path}" for name, path in apart.items())]) == 1
        said = f"--{option} is {str(collected / 'out')!r}, which lies inside that of --collected"
        assert said in capsys.readouterr().err
    assert main([*words.split(), "--output", str(tmp_path / "out")]) == 0
    assert "12 rows in, 11 out, 1 rejected" in capsys.readouterr().out


def test_collected_images_that_would_be_enlarged_are_refused(tmp_path, capsys):
    """They lack fine detail, and that of the protected images would be taken for a protection."""
    sides = {"protected": SIZE, "smaller": SIZE // 2, "larger": 2 * SIZE}
    for name, side in sides.items():
        write_dataset(tmp_path / name, some_images(8, size=side, seed=side), shards=1)
    quick_pipe().save_pretrained(tmp_path / "purifier")
    words = f"purify --purifier {tmp_path / 'purifier'} --device cpu --diffusion_steps 3 --num_inference_steps 2"
    for name, dataset, collected, code in (
        ("a", "protected", "smaller", 1),
        ("b", "protected", "larger", 0),
        ("c", "smaller", "smaller", 0),
    ):
        more = {"dataset": tmp_path / dataset, "collected": tmp_path / collected, "output": tmp_path / name}
        options = (f"--{option}={path}" for option, path in more.items())
        assert main([*words.split(), "--preset", "adaptive", "--fit", "resize", *options]) == code
    said = f"--collected has images with a side of {SIZE // 2} pixels, but must have at least {SIZE}"
    assert said in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_the_audit_reads_the_spectrum_against_the_collected_images(tmp_path):
    draw = np.random.default_rng(0)
    clean = draw.integers(90, 160, (60, 32, 32, 3), dtype=np.uint8)
    sets = {}
    for role, images in (
        ("collected", clean[:30]),
        ("protected", clean[30:] + 20 * (np.arange(32) % 4 == 0)[:, None]),
    ):
        ids = tuple(f"{role}-{row}" for row in range(30))
        sets[role] = LabelledImages(images.astype(np.uint8), np.arange(30) % 3, ids)
    asked = AuditSettings(protocol="smoke", preset="adaptive")
    config = choose_purifier(None, sets, asked, tmp_path, torch.device("cpu")).config
    power = np.array(config.protection.power)
    assert power.sum(axis=0).argmax() == 8 and config.protection_guidance_scale > 0  # every fourth column
    quick_pipe().save_pretrained(tmp_path / "purifier")
    with pytest.raises(ValueError, match="collected is None"):
        choose_purifier(
            str(tmp_path / "purifier"),
            {"protected": some_images(8)},
            asked,
            tmp_path / "out",
            torch.device("cpu"),
        )
