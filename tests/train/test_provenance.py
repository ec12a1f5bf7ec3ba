"""The list of the images that trained a purifier: what is in it, when there is none, and what it keeps out."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hub_server import HubServer
from tiny import tiny_unet
from training_runs import HELD_OUT, IMAGES, make_images, train

from jcdp_diffusers import JointConditionalPurificationPipeline
from jcdp_diffusers.acceleration import place
from jcdp_diffusers.data import open_dataset
from jcdp_diffusers.train import provenance
from jcdp_diffusers.train.images import ImageFiles
from jcdp_diffusers.train.loop import TrainingConfig, train_purifier
from jcdp_diffusers.train.provenance import check_trained_on, image_digests, trained_on, write_trained_on


def fine_tuned(folder, base, images, **more):
    config = TrainingConfig(max_train_steps=1, train_batch_size=2, checkpointing_steps=None, cpu=True)
    unet, scheduler = tiny_unet(size=8), DDPMScheduler()
    options = {"unet": unet, "scheduler": scheduler, "output_dir": folder, "config": config, "base_model": str(base)}
    return train_purifier(images, **options, **more, progress=False)


def test_a_digest_is_of_one_image_and_of_all_its_pixels():
    one = image_digests(IMAGES.images)
    assert len(set(one)) == len(one) == 24 and all(len(digest) == 16 for digest in one)
    assert image_digests(IMAGES.images[5:7]) == one[5:7]
    changed = IMAGES.images.copy()
    changed[3, 7, 7, 2] ^= 1
    assert [row for row, pair in enumerate(zip(one, image_digests(changed))) if pair[0] != pair[1]] == [3]
    grey = np.zeros((1, 4, 8, 1), np.uint8)
    assert image_digests(grey) != image_digests(grey.reshape(1, 8, 4, 1))


def test_training_lists_its_images_and_not_the_held_out_ones(tmp_path):
    listed = trained_on(train(tmp_path, held_out=HELD_OUT, max_train_steps=1))
    assert listed == set(image_digests(IMAGES.images))
    assert not listed & set(image_digests(HELD_OUT.images))


def test_fine_tuning_adds_to_the_list_of_what_it_started_from(tmp_path):
    base = train(tmp_path / "base", max_train_steps=1)
    more = make_images(6, seed=2)
    both = trained_on(fine_tuned(tmp_path / "tuned", base, more))
    assert both == set(image_digests(IMAGES.images)) | set(image_digests(more.images))


@pytest.mark.parametrize("missing", ["list of the base", "images as files", "a base nobody can reach"])
def test_there_is_no_list_that_is_not_whole(tmp_path, missing):
    base = train(tmp_path / "base", max_train_steps=1)
    images = IMAGES
    if missing == "list of the base":
        (base / "trained_on.json").unlink()
    elif missing == "images as files":
        from PIL import Image

        for row in range(4):
            Image.fromarray(IMAGES.images[row]).save(tmp_path / f"{row}.png")
        images = ImageFiles(open_dataset(tmp_path, split=None), resolution=8)
    else:
        base = "nobody/nothing"
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "trained_on.json").write_text("of another purifier")
    assert trained_on(fine_tuned(folder, base, images)) is None
    assert not (folder / "trained_on.json").exists()


def test_the_list_is_that_of_the_revision_which_is_fine_tuned(tmp_path, monkeypatch):
    asked = []

    def look_up(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return tmp_path / "nothing"

    monkeypatch.setattr(provenance, "snapshot_download", look_up)
    fine_tuned(tmp_path / "tuned", "me/base", IMAGES, base_revision="old")
    assert asked == [("me/base", "old")]


def test_a_list_beside_other_weights_counts_as_none(tmp_path):
    folder = train(tmp_path, max_train_steps=1)
    pipe = JointConditionalPurificationPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)
    assert trained_on(folder) is not None
    pipe.unet.conv_in.bias.data += 1
    pipe.save_pretrained(folder)
    assert trained_on(folder) is None and check_trained_on(folder, {"test": IMAGES}, roles="disjoint") is None


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "20KB"},
        {"variant": "bf16", "safe_serialization": False},
    ],
)
def test_a_variant_that_is_saved_beside_the_weights_leaves_their_list(tmp_path, options):
    base = train(tmp_path / "base", max_train_steps=1)
    listed = trained_on(base)
    JointConditionalPurificationPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(base, **options)
    assert trained_on(base) == listed
    with pytest.raises(ValueError, match="24 of the 24 test images"):
        check_trained_on(base, {"test": IMAGES}, roles="disjoint")
    more = make_images(6, seed=2)
    assert trained_on(fine_tuned(tmp_path / "tuned", base, more)) == listed | set(image_digests(more.images))


@pytest.mark.parametrize(
    ("opening", "saving"),
    [({}, {}), ({}, {"max_shard_size": "20KB"}), ({"dtype": torch.float16}, {}),
     ({"dtype": torch.float16}, {"variant": "fp16"})],
)  # fmt: skip
def test_a_copy_of_a_purifier_keeps_its_list(tmp_path, opening, saving):
    base = train(tmp_path / "base", max_train_steps=1)
    listed = trained_on(base)
    pipe = JointConditionalPurificationPipeline.from_pretrained(base, **opening)
    for folder in (tmp_path / "copy", base):
        pipe.save_pretrained(folder, **saving)
        assert trained_on(folder) == listed
    pipe.unet.conv_in.bias.data += 1
    pipe.save_pretrained(tmp_path / "other", **saving)
    assert trained_on(tmp_path / "other") is None


def test_a_placed_purifier_is_copied_with_its_list(tmp_path):
    base = train(tmp_path / "base", max_train_steps=1)
    pipe = JointConditionalPurificationPipeline.from_pretrained(base)
    place(pipe, "cpu", precision="bfloat16").save_pretrained(tmp_path / "copy")
    assert trained_on(tmp_path / "copy") == trained_on(base) is not None


def test_a_list_is_not_written_over_that_of_other_weights(tmp_path):
    base = train(tmp_path / "base", max_train_steps=1)
    others = make_images(8, seed=3)
    folder = train(tmp_path / "other", images=others, max_train_steps=1)
    pipe = JointConditionalPurificationPipeline.from_pretrained(base)
    pipe.save_pretrained(folder, variant="ema")
    assert trained_on(folder) == set(image_digests(others.images))


def test_who_must_have_been_seen_by_whom(tmp_path):
    folder = train(tmp_path, max_train_steps=1)
    others = make_images(8, seed=3)
    assert check_trained_on(folder, {"protected": others, "test": HELD_OUT}, roles="disjoint") == 24
    with pytest.raises(ValueError, match="purifier .* 24 of the 24 test images.*'0'"):
        check_trained_on(folder, {"protected": others, "test": IMAGES}, roles="disjoint")
    assert check_trained_on(folder, {"protected": others, "test": IMAGES}, roles="paper") == 24
    with pytest.raises(ValueError, match="purifier .* 24 of the 24 protected images"):
        check_trained_on(folder, {"protected": IMAGES, "test": IMAGES}, roles="paper")
    with pytest.raises(ValueError, match="roles is 'paper',.*test images"):
        check_trained_on(folder, {"protected": others, "test": HELD_OUT}, roles="paper")


@pytest.mark.long
def test_the_list_goes_to_the_hub_and_is_read_there(tmp_path):
    script = """
import sys
sys.path.insert(0, "tests")
from training_runs import IMAGES, train
from jcdp_diffusers.hub import push_purifier
from jcdp_diffusers.train.provenance import image_digests, trained_on

push_purifier(train(sys.argv[1], max_train_steps=1), "tester/purifier")
assert trained_on("tester/purifier") == set(image_digests(IMAGES.images))
assert trained_on("tester/absent") is None
print("done")
"""
    with HubServer() as hub:
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | hub.environment(tmp_path)
        asked = [sys.executable, "-c", script, str(tmp_path / "purifier")]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert "trained_on.json" in hub.commits[-1].files


def test_a_list_may_be_written_for_weights_that_were_trained_elsewhere(tmp_path):
    """What a stranger does for a purifier that was converted: the digests of the images, by one call."""
    JointConditionalPurificationPipeline(tiny_unet(size=8), DDPMScheduler()).save_pretrained(tmp_path)
    assert trained_on(tmp_path) is None
    write_trained_on(tmp_path, image_digests(IMAGES.images))
    assert len(trained_on(tmp_path)) == 24


@pytest.mark.parametrize(
    "content",
    [b'{"weights": "0", "images": [', b"\xff\xfe", b"[]", b'{"weights": "0"}', b'{"weights": 0, "images": []}',
     b'{"weights": "0", "images": [7]}', b"[" * 10**6],
)  # fmt: skip
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "trained_on.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"trained_on\.json is damaged") as raised:
        trained_on(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
