"""The study of photographs, with small ones and in a smoke run."""

import numpy as np
import pytest
from PIL import Image

from eval.studies import photographs
from jcdp_diffusers.results import read_records


@pytest.mark.long
def test_two_commands_give_a_report_and_cleaned_pictures_of_every_size(tmp_path):
    sizes = [(150, 100), (100, 90), (90, 80), (80, 70)] * 2
    records = tmp_path / "records.jsonl"
    options = ["--protocol", "smoke", "--processes", "1", "--device", "cpu"]
    found = photographs.study(tmp_path / "out", records, sizes, options)
    assert found["photographs"] == 16 and found["side"] == 64
    assert {"clean", "protected", "purified"} <= found["accuracy"].keys()
    assert found["psnr"]["protected"] > 25 and 5 < found["psnr"]["cleaned"] < 60
    (record,) = read_records(records)
    assert record["value"]["seconds"].keys() == {"audit", "purify"} and record["settings"]["photographs"] == 16


def test_pictures_that_are_equal_to_their_originals_have_no_ratio(tmp_path):
    for folder in ("originals", "protected", "cleaned"):
        (tmp_path / folder).mkdir()
        for name, level in (("IMG_1.png", 100), ("IMG_2.png", 100 + 10 * (folder == "protected"))):
            Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / folder / name)
    found = photographs.compare_at_full_size(*(tmp_path / one for one in ("originals", "protected", "cleaned")))
    assert found == {"protected": pytest.approx(20 * np.log10(255 / 10)), "cleaned": None}
