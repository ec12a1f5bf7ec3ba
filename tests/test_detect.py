"""What `jcdp detect` says of sets whose protection is known."""

import json
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image
from test_spectrum import natural

from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.detect import detect


CLASSES = 4
COUNT = 400


def make(count: int, seed: int, *, prefix: str = "", contrast: float = 18.0) -> LabelledImages:
    """Images like photographs, 16x16, whose brightness says a little about their label."""
    labels = np.arange(count) % CLASSES
    images = natural(count, seed, size=16, contrast=contrast).astype(float) + 4 * labels[:, None, None, None]
    return LabelledImages(
        images=np.rint(images).clip(0, 255).astype(np.uint8),
        labels=labels,
        ids=tuple(f"{prefix}{seed}-{row}" for row in range(count)),
        class_names=("ant", "bee", "cat", "dog"),
    )


def protect(data: LabelledImages, rows, strength: float = 8.0) -> LabelledImages:
    """Patches of one pattern per class on some images."""
    draw = np.random.default_rng(7)
    patterns = np.kron(draw.choice([-strength, strength], (CLASSES, 4, 4, 3)), np.ones((1, 4, 4, 1)))
    images = data.images.astype(float)
    images[rows] += patterns[data.labels[rows]]
    return data.with_images(np.rint(images).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def clean() -> LabelledImages:
    return make(COUNT, 0)


@pytest.fixture(scope="module")
def collected() -> LabelledImages:
    return make(COUNT, 1)


@pytest.fixture(scope="module")
def few(clean, collected) -> tuple[LabelledImages, LabelledImages]:
    """Where it matters which labels are compared, and not what they give away."""
    return clean.subset(np.arange(120)), collected.subset(np.arange(120))


@pytest.fixture(scope="module")
def more() -> tuple[LabelledImages, LabelledImages]:
    """Where a part of the set is left out."""
    return make(600, 0), make(600, 1)


def test_an_honest_set_is_not_called_protected(clean, collected):
    found = detect(clean, collected, permutations=99)
    assert found["protected"] is False
    assert not found["shortcut"]["linear"]["found"] and not found["shortcut"]["two-layer"]["found"]
    assert found["spectrum"]["finding"] == "none"
    assert found["shortcut"]["carriers"]["share"] < 0.05


def test_a_shortcut_is_found_and_its_carriers_are_named(clean, collected):
    rows = np.flatnonzero(np.arange(COUNT) % 10 < 4)  # all classes
    found = detect(protect(clean, rows), collected, permutations=99)
    assert found["protected"] is True and found["shortcut"]["linear"]["found"]
    protected = {clean.ids[row] for row in rows}
    first = found["shortcut"]["carriers"]["first"]
    assert len(first) == 20 and sum(id_ in protected for id_ in first) >= 18


def test_the_protected_class_has_the_largest_gap(clean, collected):
    rows = np.flatnonzero(clean.labels == 2)
    gaps = detect(protect(clean, rows), collected, permutations=99)["shortcut"]["classes"]
    assert max(gaps, key=gaps.get) == "cat" and set(gaps) == {"ant", "bee", "cat", "dog"}


def test_a_set_in_which_one_class_prevails_is_not_called_protected(more):
    """Whoever always names that class is right about most of the set, and about few of the collected images."""
    clean, collected = more
    rows = np.flatnonzero((clean.labels == 2) | (np.arange(600) % 40 < 4))
    assert (clean.labels[rows] == 2).mean() > 0.7
    found = detect(clean.subset(rows), collected, permutations=99)
    assert found["protected"] is False and found["shortcut"]["linear"]["held_out"] > 0.6
    assert found["shortcut"]["carriers"]["share"] < 0.05
    assert detect(collected, clean.subset(rows), permutations=99)["protected"] is False
    protected = protect(clean, slice(None)).subset(rows)
    assert detect(protected, collected, permutations=99)["shortcut"]["linear"]["found"]


def test_without_labels_the_spectrum_remains(clean, collected):
    without = LabelledImages(protect(clean, slice(None), 6.0).images, None, clean.ids)
    found = detect(without, collected, permutations=199)
    assert found["protected"] is True and found["shortcut"] is None and found["spectrum"]["finding"] == "noise"
    honest = LabelledImages(clean.images, None, clean.ids)
    assert detect(honest, collected, permutations=199)["protected"] is False


def test_colour_on_grey_images_is_said_in_levels_and_not_as_a_multiple_of_nothing():
    """Grey images have no power in two colour axes, but for the last digit of a float."""
    grey = [np.repeat(natural(200, seed, size=16)[..., :1], 3, axis=3) for seed in (0, 1)]
    noise = np.random.default_rng(2).choice([-6, 6], grey[0].shape)
    protected = LabelledImages((grey[0] + noise).clip(0, 255).astype(np.uint8), None, tuple(map(str, range(200))))
    collected = LabelledImages(grey[1], None, tuple(map(str, range(200, 400))))
    found = detect(protected, collected, permutations=99)
    power = float(re.search(r"a power of ([\d.]+) squared levels at \d+ cycles", found["sentence"])[1])
    assert power == pytest.approx(36, rel=0.1) and "where collected images have none" in found["sentence"]


def test_without_a_reference_nothing_is_claimed(clean):
    assert detect(clean)["protected"] is None
    found = detect(protect(clean, slice(None)))
    assert found["protected"] is None and found["shortcut"]["linear"]["held_out"] > 0.7


def test_labels_that_nothing_is_compared_with_are_not_called_honest(clean, collected):
    """The mean colour tells the classes apart, which no spectrum counts; the collected images have no labels."""
    casts = np.array([[20, -20, 0], [-20, 20, 0], [0, -20, 20], [0, 20, -20]])
    images = (clean.images + casts[clean.labels][:, None, None]).clip(0, 255).astype(np.uint8)
    unlabelled = LabelledImages(collected.images, None, collected.ids)
    found = detect(clean.with_images(images), unlabelled, permutations=99)
    assert found["spectrum"]["finding"] != "noise" and found["shortcut"]["two-layer"]["held_out"] > 0.7
    assert found["protected"] is None and "pixels alone give" in found["sentence"]
    assert detect(clean, unlabelled, permutations=99)["protected"] is False


def test_its_own_purified_copy_is_a_reference(clean):
    protected = protect(clean, slice(None))
    order = np.random.default_rng(0).permutation(COUNT)
    found = detect(protected, purified=clean.subset(order))  # an ideal purifier, its rows in another order
    assert found["protected"] is True and found["shortcut"]["linear"]["reference"] < 0.6
    assert detect(clean, purified=clean)["protected"] is False


def test_copies_of_images_are_no_shortcut(more):
    """Bursts and files that were saved again: what a model was fitted to, it knows."""
    clean, collected = more
    few, draw = clean.subset(np.arange(300)), np.random.default_rng(0)
    again = (few.images.astype(int) + draw.integers(-2, 3, few.images.shape)).clip(0, 255).astype(np.uint8)
    ids = (*few.ids, *(f"again {id_}" for id_ in few.ids))
    doubled = LabelledImages(np.concatenate([few.images, again]), np.tile(few.labels, 2), ids, few.class_names)
    found = detect(doubled, collected, permutations=99)
    assert found["protected"] is False and found["shortcut"]["linear"]["gap"] < 0.1
    assert detect(protect(doubled, slice(None)), collected, permutations=99)["protected"] is True


def test_other_images_under_the_ids_of_the_set_are_no_purified_copy(clean, collected):
    with pytest.raises(ValueError, match="purified has (3..|400) images that do not resemble"):
        detect(clean, purified=replace(collected, ids=clean.ids))


def test_classes_are_joined_by_name(few):
    """A folder of classes beside a file whose labels are the same names, in another order and without a list."""
    clean, collected = few
    order = np.array([2, 0, 3, 1])
    renamed = LabelledImages(
        collected.images, order[collected.labels], collected.ids, tuple(np.array(clean.class_names)[np.argsort(order)])
    )
    found = detect(clean, renamed, permutations=19)
    assert found["shortcut"]["linear"] == detect(clean, collected, permutations=19)["shortcut"]["linear"]


def test_a_purified_copy_takes_the_labels_of_its_set_and_other_images_keep_theirs(clean, collected):
    found = detect(clean, purified=LabelledImages(clean.images, None, clean.ids))
    assert found["protected"] is False and found["shortcut"]["linear"]["reference"] > 0.3
    # Two folders of equal size may have the same ids, which are row numbers.
    numbered = (tuple(map(str, range(COUNT))), "a"), (tuple(map(str, range(COUNT))), "b")
    sets = [
        replace(data, ids=ids, id_space=space)
        for data, (ids, space) in zip((clean, collected.subset(np.arange(COUNT)[::-1])), numbered)
    ]
    assert detect(*sets, permutations=99)["protected"] is False


def test_sets_that_differ_in_contrast_are_not_called_protected(clean):
    louder = make(COUNT, 3, contrast=22.0)
    found = detect(clean, LabelledImages(louder.images, None, louder.ids), permutations=199)
    assert found["protected"] is False and found["spectrum"]["finding"] == "other kind"


def test_a_purified_copy_that_nothing_would_read_is_refused(clean, collected):
    with pytest.raises(ValueError, match="purified has 400 images, but must be None where collected has labels"):
        detect(clean, collected, clean)
    unlabelled = [LabelledImages(data.images, None, data.ids) for data in (clean, collected)]
    with pytest.raises(ValueError, match="purified has 400 images, but must be None where dataset has no labels"):
        detect(*unlabelled, clean)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda d, c: (d.subset(range(20)), c), ("dataset", "20"), id="few images"),
        pytest.param(lambda d, c: (d, c.subset(range(9))), ("collected", "9"), id="few collected"),
        pytest.param(lambda d, c: (d.subset(d.labels == 1), c), ("dataset", "one class"), id="one class"),
        pytest.param(lambda d, c: (d, d), ("collected", "400"), id="the same images"),
        pytest.param(lambda d, c: (d, c.with_images(c.images[:, :8])), ("collected", "8"), id="another size"),
        pytest.param(
            lambda d, c: (LabelledImages(d.images, None, d.ids), None), ("labels", "collected"), id="nothing"
        ),
        pytest.param(
            lambda d, c: (d, LabelledImages(c.images, c.labels, c.ids, ("a", "b", "c", "d"))),
            ("dataset has no image of class", "'a'"),
            id="other classes",
        ),
    ],
)
def test_sets_that_say_nothing_are_refused(change, words, clean, collected):
    with pytest.raises(ValueError) as error:
        detect(*change(clean, collected))
    assert all(word in str(error.value) for word in words)


def test_a_seed_below_zero_is_refused(clean, collected):
    with pytest.raises(ValueError, match=r"seed is -1, but must be a whole number in \[0, 2\*\*32\)"):
        detect(clean, collected, seed=-1)


def test_a_size_of_zero_is_not_taken_for_none(clean, tmp_path, capsys):
    write_dataset(tmp_path / "suspicious", clean, split="train")
    assert main(["detect", "--dataset", str(tmp_path / "suspicious"), "--image_size", "0"]) == 1
    assert "--image_size is 0; 1 and above are accepted" in capsys.readouterr().err


def test_the_command_writes_what_it_says(clean, collected, tmp_path, capsys):
    write_dataset(tmp_path / "suspicious", protect(clean, slice(None)), split="train")
    write_dataset(tmp_path / "collected", collected, split="train")
    options = ["--dataset", str(tmp_path / "suspicious"), "--collected", str(tmp_path / "collected")]
    assert main(["detect", *options, "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["protected"] is True
    assert found["sentence"] in capsys.readouterr().out


def test_columns_that_are_named_are_those_of_collected_images_too(few, tmp_path, capsys):
    clean, collected = few
    named = {"picture": datasets.Image(), "kind": datasets.Value("string")}
    for name, data in (("suspicious", clean), ("collected", collected), ("plain", collected)):
        kinds = [data.class_names[label] for label in data.labels]
        table = {"picture": list(map(Image.fromarray, data.images)), "kind": kinds}
        features = named
        if name == "plain":
            table, features = {"picture": table["picture"]}, {"picture": datasets.Image()}
        (tmp_path / name).mkdir()
        made = datasets.Dataset.from_dict(table, features=datasets.Features(features))
        made.to_parquet(tmp_path / name / "train-0.parquet")
    options = ["detect", "--dataset", str(tmp_path / "suspicious"), "--image_column", "picture"]
    options += ["--label_column", "kind", "--output", str(tmp_path / "found.json"), "--collected"]
    assert main([*options, str(tmp_path / "collected")]) == 0
    assert "would show" not in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["shortcut"]["reference"] == 120
    assert main([*options, str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["shortcut"]["reference"] is None


@pytest.mark.parametrize("content", ["my thesis", "[1]", '{"protected": true}'])
def test_a_file_of_somebody_else_is_not_replaced(content, clean, tmp_path, capsys):
    write_dataset(tmp_path / "suspicious", clean, split="train")
    mine = tmp_path / "mine.txt"
    mine.write_text(content)
    assert main(["detect", "--dataset", str(tmp_path / "suspicious"), "--output", str(mine)]) == 1
    assert "holds something else" in capsys.readouterr().err and mine.read_text() == content


def test_integers_are_no_ranks_of_texts(few, tmp_path):
    """The first class of a column of texts is not the class 0 of a set with integers."""
    clean, collected = few
    texts, integers = replace(clean, ranked_by_text=True), replace(collected, class_names=None)
    with pytest.raises(ValueError, match="collected has integers for labels and dataset has texts, such as 'ant'"):
        detect(texts, integers)
    assert detect(clean, integers, permutations=19)["protected"] is False  # as for folders and class labels
    written = write_dataset(tmp_path, texts)[0].parent  # texts stay texts
    assert load_images(written).ranked_by_text and load_images(written).class_names == texts.class_names
    numbered = replace(texts, class_names=("0", "1", "2", "3"))
    assert detect(numbered, integers, permutations=19)["protected"] is False


def test_photographs_of_assorted_sizes_are_looked_at_in_one(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for row in range(60):
        path = tmp_path / ("cat", "dog")[row % 2] / f"{row:02d}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((70 + row, 130 - row), Image.Resampling.BICUBIC).save(path)
    assert main(["detect", "--dataset", str(tmp_path), "--output", str(tmp_path.parent / "found.json")]) == 0
    assert "looked at with 64x64 pixels" in capsys.readouterr().out  # half of them are narrower than 100
    assert json.loads((tmp_path.parent / "found.json").read_text())["images"] == 60


def test_images_are_not_enlarged_to_be_compared(tmp_path, capsys):
    """Enlarged images have no power at high frequencies, so that of honest ones would be so many times as much."""
    images = natural(120, 0, size=48, contrast=18.0)
    for row, pixels in enumerate(images):
        path = tmp_path / ("set" if row < 60 else "collected") / f"{row:03d}.png"
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(pixels)
        if row >= 60 and row % 2:  # fewer than a half, and one more pixel makes the sizes assorted
            picture = picture.resize((24, 25), Image.Resampling.LANCZOS)
        picture.save(path)
    command = ["detect", "--dataset", str(tmp_path / "set"), "--collected", str(tmp_path / "collected")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "looked at with 24x24 pixels" in out and "The set is protected" not in out
    for size, code in (("48", 1), ("25", 1), ("24", 0)):
        assert main([*command, "--image_size", size]) == code
    err = capsys.readouterr().err
    assert "--image_size is 48, but must be 24 at most: --collected has smaller images" in err
    assert main([*command[:3], "--image_size", "64"]) == 1  # nothing to compare with; the set has no labels
    assert "dataset has no labels and collected is None" in capsys.readouterr().err
