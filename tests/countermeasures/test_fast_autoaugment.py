"""Fast AutoAugment: the policy as published, and its operations against torchvision and plain arrays."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from jcdp_diffusers.countermeasures.fast_autoaugment import RANGES, FastAutoAugment, apply_operation
from jcdp_diffusers.countermeasures.fast_autoaugment_policy import policy


@pytest.fixture(scope="module")
def picture(photos):
    return Image.fromarray(photos.images[0])


def applied(picture, name, level, **options):
    return np.asarray(apply_operation(picture, name, level, **options))


# --------------------------------------------------------------------------------------------------------------- policy


def test_policy_has_the_published_size():
    pairs = policy()
    assert len(pairs) == 493 and {len(pair) for pair in pairs} == {2}
    entries = [entry for pair in pairs for entry in pair]
    assert {name for name, _, _ in entries} == set(RANGES)
    assert all(0 <= probability < 1 and 0 <= level < 1 for _, probability, level in entries)
    assert len(set(pairs)) == 493


def test_policy_begins_and_ends_as_published():
    """To the digits that are kept: 0.83206..., 0.49884..., and so on."""
    assert policy()[0] == (("Contrast", 0.8320, 0.4988), ("TranslateX", 0.4184, 0.3940))
    assert policy()[-1] == (("Cutout", 0.7550, 0.0898), ("ShearX", 0.5844, 0.3605))


def test_numbers_are_spread_as_a_search_spreads_them():
    """Levels are hyperparameters drawn by a search over [0, 1]: a digit copied wrongly in bulk would show."""
    for column in (1, 2):
        values = np.sort([entry[column] for pair in policy() for entry in pair])
        assert np.abs(values - np.linspace(0, 1, len(values))).max() < 0.06
        last_digits = Counter(round(1e4 * value) % 10 for value in values)
        assert min(last_digits.values()) > 60 and max(last_digits.values()) < 140


# ----------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    "name, level, reference",
    [
        ("AutoContrast", 0.3, F.autocontrast),
        ("Invert", 0.3, F.invert),
        ("Equalize", 0.3, F.equalize),
        ("Solarize", 0.5, lambda image: F.solarize(image, 128)),
        ("Posterize", 0.3, lambda image: F.posterize(image, 5)),
        ("Contrast", 0.25, lambda image: F.adjust_contrast(image, 0.55)),
        ("Color", 0.75, lambda image: F.adjust_saturation(image, 1.45)),
        ("Brightness", 0.0, lambda image: F.adjust_brightness(image, 0.1)),
        ("Sharpness", 1.0, lambda image: F.adjust_sharpness(image, 1.9)),
        ("Rotate", 0.75, lambda image: F.rotate(image, 15.0)),
    ],
)
def test_operations_are_torchvisions(picture, name, level, reference):
    assert np.array_equal(applied(picture, name, level), np.asarray(reference(picture)))


def test_translation_moves_pixels(picture):
    pixels = np.asarray(picture)
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        moved = applied(picture, name, (0.25 + 0.45) / 0.9)  # a quarter of 32 pixels
        reference = np.zeros_like(pixels)
        keep, rest = (slice(0, 24), slice(8, 32))
        if axis:
            reference[:, keep] = pixels[:, rest]
        else:
            reference[keep] = pixels[rest]
        assert np.array_equal(moved, reference)


def test_shear_leaves_the_first_row_and_moves_the_last(picture):
    pixels, sheared = np.asarray(picture), applied(picture, "ShearX", 1.0)
    assert np.array_equal(sheared[0], pixels[0])
    shift = int(0.3 * 31.5 + 0.5)
    assert np.array_equal(sheared[31, : 32 - shift], pixels[31, shift:])
    turned = picture.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(applied(turned, "ShearY", 1.0).transpose(1, 0, 2), sheared)


@pytest.mark.parametrize("name", RANGES)
def test_only_what_has_a_direction_is_mirrored(picture, name):
    mirrored = applied(picture, name, 0.8, mirrored=True)
    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        assert np.array_equal(mirrored, applied(picture, name, 0.2))
        assert not np.array_equal(mirrored, applied(picture, name, 0.8))
    else:
        assert np.array_equal(mirrored, applied(picture, name, 0.8))


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Contrast", "Cutout"])
def test_the_middle_or_start_of_a_range_changes_nothing(picture, name):
    level = 0.0 if name == "Cutout" else 0.5
    assert np.array_equal(applied(picture, name, level), np.asarray(picture))


def test_cutout_is_a_patch_of_its_colour(picture):
    cut = applied(picture, "Cutout", 1.0, centre=(0.5, 0.25))
    changed = (cut != np.asarray(picture)).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows.min() >= 4 and rows.max() <= 12 and columns.min() >= 12 and columns.max() <= 20
    assert (cut[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == [125, 123, 114]).all()
    assert 0.02 < changed.mean() < 0.08


# ------------------------------------------------------------------------------------------------------------- the hook


def test_each_image_has_its_own_pair(photos):
    images = torch.from_numpy(photos.images[:1]).permute(0, 3, 1, 2).repeat(64, 1, 1, 1)
    augmented = FastAutoAugment().before_augmentation(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape and augmented.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in augmented}) > 30
    again = FastAutoAugment().before_augmentation(images, torch.Generator().manual_seed(0))
    assert torch.equal(augmented, again)


def test_probabilities_are_kept(photos):
    """With one pair of inversions, what happens to an image says which of them happened."""
    hook = FastAutoAugment()
    hook.policy = ((("Invert", 0.3, 0.0), ("Posterize", 0.6, 0.0)),)
    images = torch.full((4000, 3, 2, 2), 255, dtype=torch.uint8)
    seen = Counter(hook.before_augmentation(images, torch.Generator().manual_seed(0))[:, 0, 0, 0].tolist())
    assert seen[0] / 4000 == pytest.approx(0.3, abs=0.03)  # inverted, and then nothing is left to posterise
    assert seen[240] / 4000 == pytest.approx(0.7 * 0.6, abs=0.03)
    assert seen[255] / 4000 == pytest.approx(0.7 * 0.4, abs=0.03)


def test_grey_images(photos):
    grey = torch.from_numpy(photos.images[..., :1]).permute(0, 3, 1, 2)
    augmented = FastAutoAugment().before_augmentation(grey, torch.Generator().manual_seed(0))
    assert augmented.shape == grey.shape and not torch.equal(augmented, grey)
    picture = v2.functional.to_pil_image(grey[0])
    assert all(apply_operation(picture, name, 0.7).mode == "L" for name in RANGES)


def test_floats_are_refused():
    with pytest.raises(ValueError, match="images holds torch.float32.*fast-autoaugment"):
        FastAutoAugment().before_augmentation(torch.rand(2, 3, 4, 4), torch.Generator())
