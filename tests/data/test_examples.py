"""The two example data sets."""

import numpy as np
import pytest

from jcdp_diffusers.data import LabelledImages, check_roles, write_dataset
from jcdp_diffusers.data.examples import cifar10, digits


def test_digits_are_three_disjoint_roles_of_one_size():
    roles = digits((900, 500, 397))
    assert [len(role) for role in roles] == [900, 500, 397]
    assert len({i for role in roles for i in role.ids}) == 1797
    check_roles(*roles)
    for role in roles:
        assert role.images.shape[1:] == (32, 32, 3) and len(np.unique(role.labels)) == 10
        assert 0.29 * 255 < role.images.min() and role.images.max() < 0.71 * 255


def test_more_digits_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"sizes is \(900, 500, 398\).*1797"):
        digits((900, 500, 398))


def test_cifar10_is_taken_from_two_splits_in_their_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)
    data = LabelledImages(pixels, np.arange(14) % 2, tuple(f"image-{row}" for row in range(14)), ("cat", "dog"))
    write_dataset(tmp_path, data.subset(range(10)), split="train")
    write_dataset(tmp_path, data.subset(range(10, 14)), split="test")
    protected, collected, test = cifar10(tmp_path, (4, 5, 3))
    assert protected.ids == data.ids[:4] and collected.ids == data.ids[4:9] and test.ids == data.ids[10:13]
    assert np.array_equal(np.concatenate([protected.images, collected.images]), pixels[:9])
    with pytest.raises(ValueError, match="10 training and 4 test images.* 11 and 3"):
        cifar10(tmp_path, (6, 5, 3))
