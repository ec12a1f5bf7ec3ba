"""Mutated files of every format: the decoder rejects them with a reason or reads them as Pillow does, and never fails."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from jcdp_diffusers.data import ImageRejected, decode_image


SIDE = 24
WRITERS = {
    "PNG": [{}, {"pnginfo": None, "compress_level": 1}],
    "JPEG": [{"quality": 90}, {"quality": 60, "progressive": True}],
    "WEBP": [{"lossless": True}, {"quality": 80}],
    "GIF": [{}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}],
}


def originals(image_format):
    """Files of one format: colour, grey, with a palette and with an orientation."""
    draw = np.random.default_rng(0)
    few = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(few).resize((SIDE, SIDE + 3), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    files = []
    for options in WRITERS[image_format]:
        for version in (picture, picture.convert("L"), picture.quantize(32)):
            if image_format in ("JPEG", "WEBP") and version.mode == "P":
                continue
            for more in ({}, {"exif": exif} if image_format in ("PNG", "JPEG", "WEBP", "TIFF") else {}):
                file = io.BytesIO()
                version.save(file, image_format, **options, **more)
                files.append(file.getvalue())
    return files


def mutated(content, draw):
    """A copy with bytes changed, cut out, doubled, moved or added."""
    content = bytearray(content)
    for _ in range(draw.integers(1, 5)):
        if not content:
            break
        start = int(
            draw.integers(0, len(content)) if draw.random() < 0.5 else draw.integers(0, min(len(content), 200))
        )
        length = int(draw.integers(1, 9))
        match draw.integers(0, 6):
            case 0:
                content[start] ^= 1 << int(draw.integers(0, 8))
            case 1:
                content[start : start + length] = draw.bytes(length)
            case 2:
                del content[start : start + length]
            case 3:
                content[start:start] = content[start : start + length]
            case 4:
                del content[start:]
            case 5:
                content[start : start + 4] = b"\xff\xff\xff\xff"
    return bytes(content)


def as_pillow_reads(content):
    """What a plain reader of the same bytes has: upright, in RGB."""
    picture = Image.open(io.BytesIO(content))
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("RGBA", "LA"):
        upright = upright.convert(upright.mode[:-1])
    return np.asarray(upright.convert("RGB"))


def survives(image_format, count):
    draw = np.random.default_rng(len(image_format))
    files = originals(image_format)
    clean = [decode_image(content) for content in files]
    outcomes = {"read": 0, "rejected": 0, "compared": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged headers
        for turn in range(count):
            content = mutated(files[turn % len(files)], draw)
            try:
                image = decode_image(content)
            except ImageRejected as error:
                assert error.reason and "\n" not in error.reason
                outcomes["rejected"] += 1
                continue
            outcomes["read"] += 1
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            if image_format == "PNG" and content[:4] == b"\x89PNG":  # checksums leave no changed pixel
                assert np.array_equal(image, clean[turn % len(files)])
            try:
                expected = as_pillow_reads(content)
            except Exception:  # a damaged tag that the orientation does not need
                continue
            assert np.array_equal(image, expected)
            outcomes["compared"] += 1
    assert outcomes["read"] == 0 or 2 * outcomes["compared"] > outcomes["read"]
    return outcomes


@pytest.mark.parametrize("image_format", WRITERS)
def test_mutated_files_are_rejected_or_read_as_they_are(image_format):
    outcomes = survives(image_format, 250)
    assert outcomes["rejected"] > 20


@pytest.mark.long
@pytest.mark.parametrize("image_format", WRITERS)
def test_ten_thousand_mutated_files(image_format):
    outcomes = survives(image_format, 10_000)
    assert outcomes["rejected"] > 1000 and sum(outcomes.values()) == 10_000
