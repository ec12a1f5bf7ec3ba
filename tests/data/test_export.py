"""Pictures under their owner's names: what they are called, and what is never written over."""

import io

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.data.export import check_export, export_names, export_picture


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_names_keep_their_folders_and_get_the_suffix_of_the_format():
    names = ["cat/IMG_1.JPG", "dog.v2/a.b.heic", "train/0", "IMG 2"]
    places = [place.as_posix() for place in export_names(names)]
    assert places == ["cat/IMG_1.png", "dog.v2/a.b.png", "train/0.png", "IMG 2.png"]
    assert export_names(["a.png"], "webp")[0].as_posix() == "a.webp"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "a.png"], "'a.jpg' and 'a.png' to 'a.png'"),
        (["A.png", "a.png"], "'A.png' and 'a.png'"),
        (["../a.png"], "'../a.png'"),
        (["/etc/a.png"], "'/etc/a.png'"),
        (["a/../../b.png"], "'a/../../b.png'"),
        (["a\\b.png"], "names below its folder"),
        (["a\nb.png"], "names without control characters"),
        (["\u732b" * 84], "has 256 bytes, but must have at most 255"),
    ],
)
def test_names_that_collide_or_lead_elsewhere_are_refused(names, words):
    with pytest.raises(ValueError, match="export ") as caught:
        export_names(names)
    assert words in str(caught.value)


def test_names_as_long_as_a_disk_takes(tmp_path):
    name = "\u732b" * 83 + "ab.jpg"
    assert len(name.encode()) == 255
    (place,) = export_names([name])
    export_picture(tmp_path, place, PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_pictures_are_lossless(tmp_path, suffix):
    (place,) = export_names(["cat/a.jpg"], suffix)
    export_picture(tmp_path, place, PIXELS)
    with Image.open(tmp_path / "cat" / f"a.{suffix}") as picture:
        assert np.array_equal(np.asarray(picture), PIXELS)


@pytest.mark.parametrize(
    "name", ["Bildschirmfoto 10.12.00\u202fPM.png", "\U0001f468\u200d\U0001f469.png", "a\u00a0b.png"]
)
def test_names_that_cameras_and_phones_give(name, tmp_path):
    (place,) = export_names([name])
    assert str(place) == name
    export_picture(tmp_path, place, PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_too_large_for_a_format_is_named(tmp_path):
    wide = np.zeros((1, 16_384, 3), np.uint8)
    (place,) = export_names(["cat/panorama.png"], "webp")
    with pytest.raises(ValueError, match="cannot write 'cat/panorama.webp': it has 16384x1 pixels, .* png takes it"):
        export_picture(tmp_path, place, wide)
    export_picture(tmp_path, place, wide[:, 1:])


def test_jpg_where_it_is_asked_for(tmp_path):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    (place,) = export_names(["a.png"], "jpg")
    export_picture(tmp_path, place, file.getvalue())
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (30, 20)


def test_nothing_is_written_over_nor_through_a_link(tmp_path):
    (place,) = export_names(["cat/a.png"])
    export_picture(tmp_path / "out", place, PIXELS)
    export_picture(tmp_path / "out", place, PIXELS)  # the same picture again, as after a stop
    with pytest.raises(ValueError, match="holds another 'cat/a.png'"):
        export_picture(tmp_path / "out", place, 255 - PIXELS)
    with pytest.raises(ValueError, match="holds 'cat/a.png'"):
        check_export(tmp_path / "out", [place], fresh=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="'cat/a.png' is behind a link"):
        export_picture(tmp_path / "linked", place, PIXELS)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder"):
        check_export(tmp_path / "file", [place], fresh=True)
