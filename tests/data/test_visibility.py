"""How visible a perturbation is, against scikit-image, `lpips` and closed forms; and what a JPEG save leaves of it."""

import io
import statistics

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import get_model_weights, squeezenet1_1

from jcdp_diffusers.countermeasures.iss import jpeg
from jcdp_diffusers.data import perturbations
from jcdp_diffusers.data.perturbations import noise_kept, visibility, visibility_in_words
from jcdp_diffusers.perceptual import LPIPSModel, lpips_at_hand


def photographs(count: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(30, 226, (count, side // 8, side // 8, channels))
    return np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)


def noisy(images: np.ndarray, size: int, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-size, size + 1, images.shape)
    return (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_scikit_images(channels):
    clean = photographs(6, 40, channels)
    poisoned = noisy(clean, 8)
    found = visibility(clean, poisoned)
    psnr = [peak_signal_noise_ratio(one, other, data_range=255) for one, other in zip(clean, poisoned)]
    options = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    ssim = [structural_similarity(*pair, **options, use_sample_covariance=False) for pair in zip(clean, poisoned)]
    for name, values in (("psnr", psnr), ("ssim", ssim)):
        assert found[name]["mean"] == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert found[name]["std"] == pytest.approx(statistics.stdev(values), abs=1e-9)
        assert found[name]["least"] == pytest.approx(min(values), abs=1e-9)
        assert found[name]["images"] == found["images"] == 6


def test_norms_are_those_of_a_plain_loop():
    clean = photographs(4, 16)
    poisoned = noisy(clean, 5)
    found = visibility(clean, poisoned)
    change = [(other.astype(int) - one.astype(int)).ravel() / 255 for one, other in zip(clean, poisoned)]
    l2 = [np.linalg.norm(one) for one in change]
    assert found["linf"]["most"] == pytest.approx(255 * max(np.abs(one).max() for one in change))
    assert found["l2"]["mean"] == pytest.approx(np.mean(l2)) and found["l2"]["std"] == pytest.approx(
        np.std(l2, ddof=1)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_that_of_the_package(channels, monkeypatch):
    torch.manual_seed(0)
    package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)  # its own heads, a trunk without download
    clean = photographs(5, 32, channels)
    poisoned = noisy(clean, 8)
    monkeypatch.setattr(perturbations, "VALUES_AT_A_TIME", 2 * clean[0].size)  # in parts of two images
    network = LPIPSModel.from_lpips(package)
    found = visibility(clean, poisoned, perceptual=network)
    one, other = (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in (clean, poisoned))
    with torch.no_grad():
        wanted = package(*(images.expand(-1, 3, -1, -1) for images in (one, other))).flatten().double()
    assert found["network"] == "lpips-squeeze"
    assert found["lpips"]["mean"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert found["lpips"]["std"] == pytest.approx(wanted.std().item(), rel=1e-4)


def test_only_changed_images_count():
    clean = photographs(5, 16)
    poisoned = clean.copy()
    poisoned[[1, 3]] = noisy(clean[[1, 3]], 8)
    found, those = visibility(clean, poisoned), visibility(clean[[1, 3]], poisoned[[1, 3]])
    assert found == those and found["images"] == 2
    nothing = visibility(clean, clean)
    assert nothing["images"] == 0 and nothing["psnr"] is None
    assert nothing["not_measured"]["psnr"] == "no image is changed"
    one = visibility(clean[:2], poisoned[:2])
    assert one["images"] == 1 and one["l2"]["std"] is None
    with pytest.raises(ValueError, match=r"poisoned has shape \(4, 16, 16, 3\).*\(5, 16,"):
        visibility(clean, poisoned[:4])


def test_slow_measures_take_a_part_and_say_so(monkeypatch):
    monkeypatch.setattr(perturbations, "MOST_IMAGES", 3)
    clean = photographs(8, 16)
    poisoned = noisy(clean, 8)
    found = visibility(clean, poisoned)
    assert (found["psnr"]["images"], found["ssim"]["images"]) == (8, 3)
    assert found["ssim"] != visibility(clean, poisoned, seed=1)["ssim"]
    assert "over 3 images" in dict(visibility_in_words(found))["SSIM"]


def test_what_cannot_be_measured_says_why():
    clean = photographs(3, 8)
    found = visibility(clean, noisy(clean, 8), perceptual=LPIPSModel("squeeze"))
    said = dict(visibility_in_words(found))
    assert said["SSIM"] == "not measured: images of 8x8 pixels are smaller than 11x11"
    assert said["LPIPS"] == "not measured: images of 8x8 pixels are smaller than 17x17"
    assert dict(visibility_in_words(visibility(clean, noisy(clean, 8))))["LPIPS"] == "not measured: no network"


def test_a_distance_without_published_heads_is_not_called_lpips():
    clean = photographs(2, 24)
    network = LPIPSModel("squeezenet1_0", calibrated=False)
    said = dict(visibility_in_words(visibility(clean, noisy(clean, 8), perceptual=network)))
    assert "LPIPS" not in said and said["Perceptual distance, not LPIPS"].endswith("network features-squeezenet1_0")


def test_a_network_at_hand_is_one_that_torch_has_downloaded_before(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert lpips_at_hand() is None
    weights = squeezenet1_1().state_dict()
    name = get_model_weights("squeezenet1_1").IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / name)
    network = lpips_at_hand()
    assert network.name == "lpips-squeeze"
    assert torch.equal(network.layers[0].weight, weights["features.0.weight"])


def test_noise_that_a_change_halves_is_kept_by_half():
    clean = np.full((3, 8, 8, 3), 100, np.uint8)
    poisoned = np.full_like(clean, 108)
    halve = lambda image: np.rint(100 + (image.astype(float) - 100) / 2).astype(np.uint8)
    assert noise_kept(clean, poisoned, halve) == {"mean": 0.5, "std": 0.0, "least": 0.5, "most": 0.5, "images": 3}
    assert noise_kept(clean, poisoned, lambda image: image)["mean"] == 1
    assert noise_kept(clean, poisoned, lambda image: np.zeros_like(image))["mean"] == 0
    with pytest.raises(ValueError, match="poisoned has no image that differs"):
        noise_kept(clean, clean, halve)


def test_a_jpeg_save_keeps_the_fraction_of_a_plain_loop():
    clean = photographs(4, 32)
    poisoned = noisy(clean, 8)

    def saved(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=75)
        return np.asarray(Image.open(file)).astype(float)

    wanted = []
    for one, other in zip(clean, poisoned):
        noise = other.astype(float) - one
        wanted.append(((saved(other) - saved(one)) * noise).sum() / (noise**2).sum())
    found = noise_kept(clean, poisoned, lambda image: jpeg(image, 75))
    assert found["mean"] == pytest.approx(np.mean(wanted))
    assert found["mean"] < noise_kept(clean, poisoned, lambda image: jpeg(image, 95))["mean"]
