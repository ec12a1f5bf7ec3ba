"""Photographs as they come from cameras, phones and editors: orientation, colour profiles, transparency, HEIC."""

import builtins
import io

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from jcdp_diffusers.data import ImageRejected, decode_image, decoding, load_images, picture_size
from jcdp_diffusers.data.colour import _transform
from jcdp_diffusers.data.decoding import OVER_WHITE, TO_SRGB


def photograph(height: int = 48, width: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def wide_gamut() -> bytes:
    """Display P3 by hand: the profile of sRGB with other primaries, which stand at 0 and 1 of D65 adapted to D50."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    columns = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for entry in range(128 + 4, 128 + 4 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        name, place = bytes(profile[entry : entry + 4]), int.from_bytes(profile[entry + 4 : entry + 8], "big")
        for index, value in enumerate(columns.get(name, ())):
            at = place + 8 + 4 * index
            profile[at : at + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(profile)


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """By the standards' own formulas: the sRGB curve, and the matrix of CSS Color 4 from linear P3 to linear sRGB."""
    values = pixels / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[1.2249401, -0.2249404, 0.0], [-0.0420569, 1.0420571, 0.0], [-0.0196376, -0.0786361, 1.0982735]]
    )
    linear = (linear @ matrix.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_colours_are_converted_by_the_profile_and_srgb_is_left_alone():
    pixels, changes = photograph(), []
    picture = Image.fromarray(pixels)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(encoded(picture, icc_profile=srgb), changes=changes), pixels)
    assert changes == []
    converted = decode_image(encoded(picture, icc_profile=wide_gamut()), changes=changes)
    assert changes == [TO_SRGB]
    expected = p3_to_srgb(pixels)
    assert np.abs(expected - pixels).max() > 10  # or there would be nothing to see
    assert np.abs(converted - expected).max() < 3


def test_a_grey_photograph_with_the_profile_of_a_colour_one():
    grey = Image.fromarray(photograph()[:, :, 0])
    decoded = decode_image(encoded(grey, "JPEG", quality=100, icc_profile=wide_gamut()), channels=1)
    assert np.abs(decoded[:, :, 0].astype(int) - np.asarray(grey)).max() <= 3  # greys are greys in both


def test_a_damaged_profile_is_a_reason():
    _transform.cache_clear()
    with pytest.raises(ImageRejected, match="damaged colour profile"):
        decode_image(encoded(Image.fromarray(photograph()), icc_profile=wide_gamut()[:200]))


def test_transparency_is_laid_over_white():
    pixels, alpha = photograph(), np.full((48, 64), 255, np.uint8)
    alpha[:, 32:] = 51
    changes = []
    picture = Image.merge("RGBA", (*Image.fromarray(pixels).split(), Image.fromarray(alpha)))
    decoded = decode_image(encoded(picture), changes=changes)
    expected = pixels * (alpha[:, :, None] / 255) + 255 * (1 - alpha[:, :, None] / 255)
    assert np.abs(decoded - expected).max() <= 1 and changes == [OVER_WHITE]
    grey = Image.merge("LA", (Image.fromarray(pixels[:, :, 0]), Image.fromarray(alpha)))
    assert np.abs(decode_image(encoded(grey), channels=1)[:, :, 0] - expected[:, :, 0]).max() <= 1


def test_heic_is_read_and_turned_upright():
    pillow_heif.register_heif_opener()
    pixels, exif = photograph(), Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels)
    assert np.abs(decode_image(encoded(picture, "HEIF", quality=-1)).astype(int) - pixels).max() <= 2
    turned = encoded(picture, "HEIF", quality=-1, exif=exif.tobytes())
    assert np.abs(decode_image(turned).astype(int) - np.rot90(pixels, -1)).max() <= 2
    assert picture_size(turned) == (48, 64)
    deep = io.BytesIO()
    raw = np.zeros((64, 64, 3), np.uint16).tobytes()
    pillow_heif.from_bytes(mode="RGB;16", size=(64, 64), data=raw).save(deep)
    with pytest.raises(ImageRejected, match="10 bits per channel"):
        decode_image(deep.getvalue())


def test_without_the_package_for_heic_it_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    decoding._reads_heic.cache_clear()
    try:
        with pytest.raises(
            ImageRejected, match=r"needs the package pillow-heif: pip install 'jcdp-diffusers\[heic\]'"
        ):
            decode_image(b"\0\0\0\x18ftypheic" + bytes(40))
    finally:
        decoding._reads_heic.cache_clear()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_decoded_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG", "WEBP"):
        stored = encoded(Image.fromarray(photograph()), kind, exif=exif)
        height, width = decode_image(stored).shape[:2]
        assert picture_size(stored) == (width, height)


def test_what_was_changed_is_said_once_for_all_images(tmp_path, caplog):
    for name in "abc":
        picture = Image.fromarray(photograph()).convert("RGBA")
        picture.putalpha(255 if name == "a" else 128)
        (tmp_path / f"{name}.png").write_bytes(encoded(picture))
    load_images(tmp_path)
    assert f"{OVER_WHITE} in 2 image(s), the first 'b.png'" in caplog.text
