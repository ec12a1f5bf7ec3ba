"""Purification as a countermeasure is the pipeline's, image for image."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_unet

from jcdp_diffusers import PRESETS, JointConditionalPurificationPipeline, PurificationConfig, countermeasures
from jcdp_diffusers.acceleration.placement import place
from jcdp_diffusers.countermeasures.purifiers import check_purifier
from jcdp_diffusers.data import to_uint8


SHORT = PurificationConfig(diffusion_steps=4, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe():
    pipe = JointConditionalPurificationPipeline(tiny_unet(size=16), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def few(train):
    return train.subset(range(20))


def purified(name, data, pipe, **options):
    return countermeasures.get(name).prepare(data, purifier=pipe, purification=SHORT, **options).data


def test_is_the_pipelines(few, pipe):
    result = purified("unconditional", few, pipe, seed=5)
    images = pipe(few.tensor(), preset=SHORT, seed=5, ids=list(few.ids), output_type="pt").images
    assert np.array_equal(result.images, to_uint8(images))


def test_depends_on_seed_and_settings(few, pipe):
    first = purified("unconditional", few, pipe).images
    assert not np.array_equal(first, few.images)
    assert not np.array_equal(first, purified("unconditional", few, pipe, seed=1).images)
    longer = countermeasures.get("eclipse-purifier").prepare(few, purifier=pipe).data.images
    assert not np.array_equal(first, longer)


def test_takes_a_folder(few, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    placed = place(JointConditionalPurificationPipeline.from_pretrained(tmp_path), "cpu")
    from_folder = purified("unconditional", few, tmp_path).images
    assert np.array_equal(from_folder, purified("unconditional", few, placed).images)


def test_keeps_its_work_and_knows_it_again(few, pipe, tmp_path):
    first = purified("unconditional", few, pipe, checkpoint_dir=tmp_path)
    assert (tmp_path / "unconditional-0").is_dir()
    again = purified("unconditional", few, pipe, checkpoint_dir=tmp_path)
    assert np.array_equal(first.images, again.images)


def test_draws_are_the_seeds_one_after_the_other_and_epochs_take_turns(few, pipe, tmp_path):
    options = dict(purifier=pipe, purification=SHORT, checkpoint_dir=tmp_path)
    prepared = countermeasures.get("unconditional+corruption").prepare(few, seed=4, draws=3, **options)
    draws, compensation = prepared.hooks
    assert hasattr(draws, "epoch_images") and hasattr(compensation, "before_forward")
    expected = [purified("unconditional", few, pipe, seed=seed).images for seed in (4, 5, 6)]
    assert np.array_equal(prepared.data.images, expected[0])
    stored = torch.from_numpy(prepared.data.images).permute(0, 3, 1, 2)
    for epoch in range(7):
        shown = draws.epoch_images(epoch, stored).permute(0, 2, 3, 1)
        assert np.array_equal(shown, expected[epoch % 3])
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [f"unconditional-{seed}" for seed in (4, 5, 6)]


def test_draws_need_chance(few, pipe):
    with pytest.raises(ValueError, match="draws is 2.*'gray'.* 1"):
        countermeasures.get("gray").prepare(few, draws=2)
    with pytest.raises(ValueError, match="draws is 0.*'unconditional'.* 1"):
        purified("unconditional", few, pipe, draws=0)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("jcdp", PRESETS["paper"]),
        ("jcdp-code", PRESETS["code"]),
        ("unconditional", PRESETS["unconditional"]),
        ("avatar", PurificationConfig(diffusion_steps=100, variance_type="fixed_large")),
        ("diffpure", PurificationConfig(diffusion_steps=100, variance_type="fixed_large")),
        ("diffpure-l2", PurificationConfig(diffusion_steps=75, variance_type="fixed_large")),
        ("gdmp", PRESETS["gdmp"]),
    ],
)
def test_settings_are_the_methods(name, expected):
    measure = countermeasures.get(name)
    assert PurificationConfig(**measure.settings) == expected
    assert measure.cost == f"{expected.evaluations_per_image} UNet evaluations per image, once"


def test_guides_without_their_network_are_refused(few, pipe):
    with pytest.raises(ValueError, match="perceptual is None.*'lpips-alex'"):
        countermeasures.get("jcdp").prepare(few, purifier=pipe)


def test_a_purifier_of_other_images_is_refused(few, pipe):
    check_purifier(pipe, few)
    larger = few.with_images(few.images.repeat(2, axis=1).repeat(2, axis=2))
    with pytest.raises(ValueError, match="purifier was trained on 16x16 pixels.*32x32"):
        check_purifier(pipe, larger)
    with pytest.raises(ValueError, match="purifier takes images of 3 channels.*these have 1"):
        check_purifier(pipe, few.with_images(few.images[..., :1]))
