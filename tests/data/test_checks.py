"""What an audit refuses before it computes anything, and what it counts."""

import dataclasses

import numpy as np
import pytest

from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.data.checks import (
    check_separation,
    check_sets,
    describe_noise,
    describe_set,
    few_of_each_class,
    match_originals,
)


def images(count: int, seed: int, *, size: int = 8, channels: int = 3, prefix: str = "", classes: int = 3):
    """Random images, no two of which are near each other."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    names = ("cat", "dog", "eel")[:classes]
    return LabelledImages(
        pixels, np.arange(count) % classes, tuple(f"{prefix}{seed}-{i}" for i in range(count)), names
    )


def with_noise(data: LabelledImages, level: int = 8, seed: int = 9) -> LabelledImages:
    noise = np.random.default_rng(seed).integers(-level, level + 1, data.images.shape)
    return data.with_images((data.images.astype(int) + noise).clip(0, 255).astype(np.uint8))


def joined(one: LabelledImages, other: LabelledImages) -> LabelledImages:
    return LabelledImages(
        np.concatenate([one.images, other.images]),
        np.concatenate([one.labels, other.labels]),
        one.ids + other.ids,
        one.class_names,
    )


def renamed(data: LabelledImages, prefix: str) -> LabelledImages:
    return dataclasses.replace(data, ids=tuple(f"{prefix}{row}" for row in range(len(data))))


@pytest.fixture
def roles():
    clean = images(30, 0)
    return {"clean": clean, "protected": with_noise(clean), "collected": images(20, 1), "test": images(15, 2)}


def test_disjoint_roles_pass(roles):
    check_sets({"protected": roles["protected"], "test": roles["test"]}, {"collected": roles["collected"]})
    assert check_separation(roles["protected"], roles["collected"], roles["test"], roles["clean"]) == {
        "collected_in_test": 0
    }


def test_clean_originals_in_the_collected_set_are_found_by_nearness(roles):
    slipped_in = joined(roles["collected"], renamed(roles["clean"].subset([4, 7]), "other-"))
    with pytest.raises(ValueError, match=r"protected has 2 images within 16/255 of a collected one.*'0-4'.*other-0"):
        check_separation(roles["protected"], slipped_in, roles["test"], None)


def test_clean_originals_are_found_whatever_the_protection_changed(roles):
    """All pixels changed beyond any budget, as CUDA does: only the clean set gives it away, by nearness as well."""
    protected = roles["clean"].with_images(255 - roles["clean"].images)
    slipped = with_noise(renamed(roles["clean"].subset([4]), "other-"), level=1)
    for role in ("collected", "test"):
        sets = {"collected": roles["collected"], "test": roles["test"]}
        sets[role] = joined(sets[role], slipped)
        check_separation(protected, *sets.values(), None)
        with pytest.raises(
            ValueError, match=f"{role} has 1 images that are clean originals of protected ones, the first '0-4'"
        ):
            check_separation(protected, *sets.values(), roles["clean"])


def test_one_changed_pixel_is_found_without_the_clean_set(roles):
    one_pixel = roles["clean"].images.copy()
    one_pixel[:, 3, 3] = 255 - one_pixel[:, 3, 3] // 2
    slipped_in = joined(roles["collected"], renamed(roles["clean"].subset([4]), "other-"))
    with pytest.raises(ValueError, match="protected has 1 images within 16/255 of a collected one"):
        check_separation(roles["clean"].with_images(one_pixel), slipped_in, roles["test"], None)


def test_test_images_among_the_protected_are_found(roles):
    test = joined(roles["test"], renamed(roles["clean"].subset([1]), "t-"))
    with pytest.raises(ValueError, match="of a test one"):
        check_separation(roles["protected"], roles["collected"], test, None)
    with pytest.raises(ValueError, match="protected has 1 images that are test ones"):
        check_separation(roles["protected"], None, test, None)


def test_roles_of_the_paper(roles):
    protected, test = roles["protected"], roles["test"]
    assert check_separation(protected, test, test, None, roles="paper") == {"collected_in_test": 15}
    with pytest.raises(ValueError, match="collected and test have 15 ids in common"):
        check_separation(protected, test, test, None)
    with pytest.raises(ValueError, match="roles is 'paper'.*collected and test"):
        check_separation(protected, roles["collected"], test, None, roles="paper")
    with pytest.raises(ValueError, match="protected has 30 images that are collected ones"):
        check_separation(protected, renamed(roles["clean"], "c"), test, None, roles="paper")
    with pytest.raises(ValueError, match="roles is 'mixed'"):
        check_separation(protected, test, test, None, roles="mixed")


def test_sets_that_do_not_fit(roles):
    protected, test = roles["protected"], roles["test"]
    no_eel = test.subset(test.labels != 2)
    with pytest.raises(ValueError, match="test has no image of class 'eel'"):
        check_sets({"protected": protected, "test": no_eel}, {})
    with pytest.raises(ValueError, match="protected has no image of class 'dog'"):
        check_sets({"protected": protected.subset(protected.labels != 1), "test": test}, {})
    unnamed = dataclasses.replace(test, class_names=None, labels=test.labels + 1)
    with pytest.raises(ValueError, match="test has label 3.*3 classes"):
        check_sets({"protected": protected, "test": unnamed}, {})
    both = [dataclasses.replace(data, class_names=None) for data in (protected, test)]
    with pytest.raises(ValueError, match="test has no image of class '2'"):
        check_sets({"protected": both[0], "test": both[1].subset(both[1].labels != 2)}, {})
    with pytest.raises(ValueError, match="test has no labels"):
        check_sets({"protected": protected, "test": dataclasses.replace(test, labels=None)}, {})
    with pytest.raises(ValueError, match="protected has images of 8x8x3 and collected of 16x16x3"):
        check_sets({"protected": protected, "test": test}, {"collected": images(5, 5, size=16)})


@pytest.mark.parametrize("in_folders", ["clean", "protected"])
def test_originals_are_found_where_one_of_the_sets_was_put_into_class_folders(in_folders, roles):
    """The order of the files is then another one, and no path agrees."""
    flat = {"clean": roles["clean"], "protected": roles["protected"]}
    order = np.argsort(flat["clean"].labels, kind="stable")
    sets = {}
    for role, data in flat.items():
        files = [f"IMG_{row:02d}.{'png' if role == 'clean' else 'jpg'}" for row in range(30)]
        if role == in_folders:
            files = [f"{data.class_names[label]}/{file}" for label, file in zip(data.labels, files)]
        rows = order if role == in_folders else np.arange(30)
        numbers = {"ids": tuple(f"train/{row}" for row in range(30)), "id_space": role}
        sets[role] = dataclasses.replace(data.subset(rows), files=tuple(files[row] for row in rows), **numbers)
    wanted = flat["clean"].subset(order) if in_folders == "protected" else flat["clean"]
    assert np.array_equal(match_originals(sets["clean"], sets["protected"]).images, wanted.images)


def test_originals_are_matched_by_id(roles):
    clean, protected = roles["clean"], roles["protected"]
    shuffled = joined(clean, images(5, 7)).subset(np.random.default_rng(0).permutation(35))
    assert np.array_equal(match_originals(shuffled, protected).images, clean.images)
    with pytest.raises(ValueError, match="clean lacks the originals of 1 of 30 protected images, the first '0-29'"):
        match_originals(clean.subset(range(29)), protected)
    with pytest.raises(
        ValueError, match="clean and protected label 30 images differently, the first '0-0' as 1 and 0"
    ):
        match_originals(dataclasses.replace(clean, labels=(clean.labels + 1) % 3), protected)
    with pytest.raises(ValueError, match="clean has images of 16x16x3 and protected of 8x8x3"):
        match_originals(dataclasses.replace(images(30, 0, size=16), ids=clean.ids), protected)


def test_counts(roles):
    data = joined(roles["test"], renamed(roles["test"].subset([0, 1, 2]), "again-"))
    labels = data.labels.copy()
    labels[-1] = 0
    facts = describe_set(dataclasses.replace(data, labels=labels))
    assert facts == {
        "images": 18,
        "shape": [8, 8, 3],
        "images_per_class": {"cat": 7, "dog": 6, "eel": 5},
        "duplicates": 3,
        "contradictions": 1,
    }
    assert describe_set(dataclasses.replace(data, labels=None, class_names=None))["images_per_class"] is None


def test_noise(roles):
    same = roles["clean"].images.copy()
    same[:15] = roles["protected"].images[:15]
    facts = describe_noise(roles["clean"], roles["clean"].with_images(same))
    assert facts["linf"] == 8 and facts["share_changed"] == 0.5
    whole = describe_noise(roles["clean"].subset(range(15)), roles["protected"].subset(range(15)))
    assert facts == whole | {"share_changed": 0.5}  # as large as where it is, whatever the other images
    assert describe_noise(roles["clean"], roles["clean"])["l2_mean"] == 0


def test_few_of_each_class(roles):
    few = few_of_each_class(roles["protected"], 7)
    assert np.bincount(few.labels).tolist() == [3, 3, 3] and few.ids[:3] == ("0-0", "0-1", "0-2")
