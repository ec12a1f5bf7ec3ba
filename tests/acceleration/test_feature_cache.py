"""Reuse of deep features: the same bits where nothing changes, the stated number of whole and partial evaluations."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from purifying import source_folder
from tiny import tiny_unet

from jcdp_diffusers import GuidedDDPMScheduler, JointConditionalPurificationPipeline, PurificationConfig
from jcdp_diffusers.acceleration.feature_cache import FeatureCache
from jcdp_diffusers.purifier_digest import purifier_digest
from jcdp_diffusers.purify.dataset import purify_to_folder
from jcdp_diffusers.train.unets import UNETS, named_unet


def photos(count, size=16, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


# As many levels as mini64, mini128 and mini256 have, and as many layers per level as ddpm-cifar10.
WIDER = ("small64", "small128", "small256")


def at(timestep, count=2):
    return torch.full((count,), timestep)


@pytest.fixture
def pipe():
    pipe = JointConditionalPurificationPipeline(tiny_unet(size=16), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(unet):
    """Counts of a UNet's evaluations, whole or not, and of the whole ones, as they go."""
    counts = {"all": 0, "whole": 0}

    def count(name):
        counts[name] += 1

    unet.conv_out.register_forward_hook(lambda *a: count("all"))
    unet.mid_block.register_forward_hook(lambda *a: count("whole"))
    return counts


@torch.no_grad()
@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in UNETS if name not in WIDER] + [("small32", torch.bfloat16)],
    ids=str,
)
def test_bits_of_whole_and_reused_evaluations(name, dtype):
    size = max(16, 2 ** (len(UNETS[name]["block_out_channels"]) - 1))  # the least that all levels can halve
    unet = named_unet(name, sample_size=size).eval().to(dtype, memory_format=torch.channels_last)
    x, expected = photos(2, size).to(dtype), {}
    for t in (40, 39):
        expected[t] = unet(x, at(t)).sample
    reuse = FeatureCache(unet, 2)
    assert torch.equal(reuse(x, at(40))[0], expected[40])  # whole
    assert torch.equal(reuse(x, at(40))[0], expected[40])  # reused where nothing has changed
    assert torch.equal(reuse(x, at(39))[0], expected[39])
    assert not torch.equal(expected[39], expected[40])
    assert torch.equal(unet(x, at(40)).sample, expected[40])  # and the network is as it was
    assert not unet.up_blocks[-1]._forward_pre_hooks


@torch.no_grad()
def test_a_reused_evaluation_sees_the_present_image_and_time():
    """Against the network's own forward whose deeper levels are made to return what they did before."""
    unet, (x, other) = tiny_unet(), (photos(2), 1 - photos(2))
    reuse = FeatureCache(unet, 3)
    reuse(x, at(9))
    kept = reuse.features
    second, third = reuse(other, at(5))[0], reuse(other, at(4))[0]
    assert reuse.features is kept and not torch.equal(second, third)
    with unet.up_blocks[-2].register_forward_hook(lambda *a: kept):
        assert torch.equal(second, unet(other, at(5)).sample)
        assert torch.equal(third, unet(other, at(4)).sample)
    assert not torch.equal(second, unet(other, at(5)).sample)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_refused_and_known_by_its_own_weights(in_place, pipe):
    before = purifier_digest(pipe)
    if in_place:
        pipe.unet.compile()
    else:
        pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match="feature_reuse is 2, but this UNet is compiled"):
        pipe(photos(1), feature_reuse=2)
    assert purifier_digest(pipe) == before


def test_kept_numbers_are_those_of_the_docstring():
    """Of tensors without content, because a network of this size takes seconds to draw and to evaluate."""
    with torch.device("meta"), torch.no_grad():
        reuse = FeatureCache(named_unet("ddpm-cifar10").eval(), 2)
        reuse(torch.empty(1, 3, 32, 32), torch.tensor([3]))
    assert reuse.features.shape == (1, UNETS["ddpm-cifar10"]["block_out_channels"][1], 32, 32)
    assert reuse.features.nbytes == 2 * 2**19  # the docstring's are of two bytes each


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_interval_of_one_is_the_pipeline_without_it(pipe, sampler):
    settings = dict(diffusion_steps=6, num_inference_steps=3, num_rounds=2, sampler=sampler, seed=0, output_type="pt")
    expected = pipe(photos(3), **settings).images
    assert torch.equal(pipe(photos(3), feature_reuse=1, **settings).images, expected)
    reused = pipe(photos(3), feature_reuse=2, **settings).images
    assert 0 < (reused - expected).abs().max() < 0.1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("interval", "evaluations", "whole_per_round"), [(2, 5, 3), (3, 5, 2), (5, 5, 1), (9, 5, 1), (2, None, 4)]
)
def test_evaluations_are_whole_and_partial_as_stated(pipe, sampler, interval, evaluations, whole_per_round):
    """Three micro-batches, two rounds; the interval begins anew with each."""
    counts = counted(pipe.unet)
    settings = dict(diffusion_steps=8, num_inference_steps=evaluations, num_rounds=2, sampler=sampler)
    pipe(photos(5), micro_batch_size=2, feature_reuse=interval, seed=0, **settings)
    assert counts == {"all": 3 * 2 * (evaluations or 8), "whole": 3 * 2 * whole_per_round}


def test_each_round_begins_with_a_whole_evaluation(pipe):
    counts, seen = counted(pipe.unet), []
    look = lambda *a: seen.append((counts["all"], counts["whole"]))
    settings = dict(diffusion_steps=4, num_inference_steps=(1, 4), num_rounds=2, feature_reuse=3, seed=0)
    pipe(photos(1), callback_on_step_end=look, **settings)
    assert seen == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_does_not_depend_on_its_batch(pipe, sampler):
    images, ids = photos(9), [str(i) for i in range(9)]
    settings = dict(diffusion_steps=6, num_inference_steps=4, num_rounds=2, feature_reuse=3, sampler=sampler, seed=0)
    run = lambda rows: pipe(images[rows], ids=[ids[i] for i in rows], output_type="pt", **settings).images
    everything = run(list(range(9)))
    assert torch.equal(run([7])[0], everything[7])
    assert torch.equal(run(list(reversed(range(9)))).flip(0), everything)


def test_guides_act_where_features_are_reused(pipe):
    settings = dict(diffusion_steps=4, feature_reuse=4, pixel_guidance_window=(1, 1), seed=0, output_type="pt")
    free = pipe(photos(2), **settings).images
    assert not torch.equal(free, pipe(photos(2), pixel_guidance_scale=2000.0, **settings).images)


def test_it_is_on_record(pipe, tmp_path):
    source = source_folder(tmp_path / "source", 4, size=32)
    run = dict(seed=0, progress=False, diffusion_steps=3)
    purify_to_folder(source, pipe, output_dir=tmp_path / "out", feature_reuse=2, **run)
    with pytest.raises(ValueError, match="holds a run whose feature_reuse is 2.*3"):
        purify_to_folder(source, pipe, output_dir=tmp_path / "out", feature_reuse=3, **run)


def test_an_interval_below_one_is_refused(pipe):
    with pytest.raises(ValueError, match="feature_reuse is 0.* 1"):
        pipe(photos(1), feature_reuse=0)
    assert pipe.resolve_config(PurificationConfig(feature_reuse=4)).feature_reuse == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(down_block_types=("AttnDownBlock2D", "DownBlock2D")), "from AttnDownBlock2D to UpBlock2D"),
        (dict(up_block_types=("UpBlock2D", "AttnUpBlock2D")), "from DownBlock2D to AttnUpBlock2D"),
        (dict(time_embedding_type="fourier"), "with positional time embeddings"),
        (dict(center_input_sample=True), "input that is not centred"),
        (
            dict(block_out_channels=(32, 32), down_block_types=("DownBlock2D", "SkipDownBlock2D"), norm_num_groups=8),
            "without skip blocks",
        ),
    ],
)
def test_networks_that_it_cannot_work_with_are_refused_before_the_first_step(changes, named):
    plain = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    unet = UNet2DModel(**plain | changes).eval()
    counts = counted(unet)
    pipe = JointConditionalPurificationPipeline(unet, GuidedDDPMScheduler())
    with pytest.raises(ValueError, match="feature_reuse is 3.*only 1") as caught:
        pipe(photos(1, 8), feature_reuse=3)
    assert named in str(caught.value) and "\n" not in str(caught.value) and counts["all"] == 0


def test_a_compiled_network_is_refused(pipe):
    pipe.unet.compile()
    with pytest.raises(ValueError, match="feature_reuse is 2.*compiled.*only 1"):
        pipe(photos(1), feature_reuse=2)
