import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jcdp_diffusers.train.unets import UNETS, ddpm_scheduler, named_unet


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ddpm-cifar10", 35.746307),
        ("small32", 2.736099),
        ("mini32", 0.948931),
        ("tiny32", 0.687347),
        ("mini64", 0.985163),
        ("mini128", 2.077675),
        ("mini256", 2.067779),
        ("small64", 18.204803),
        ("small128", 27.784835),
        ("small256", 27.290691),
    ],
)
def test_number_of_parameters(name, millions):
    with torch.device("meta"):
        assert named_unet(name).num_parameters() == round(millions * 1e6)


def test_ddpm_cifar10_is_the_paper_network():
    """What the paper's network has and diffusers' defaults have not, written out."""
    with torch.device("meta"):
        config = named_unet("ddpm-cifar10").config
    assert config.block_out_channels == (128, 256, 256, 256)
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert config.up_block_types == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert (config.layers_per_block, config.dropout, config.attention_head_dim) == (2, 0.1, None)
    assert (config.downsample_padding, config.norm_eps, config.norm_num_groups) == (0, 1e-6, 32)
    assert (config.flip_sin_to_cos, config.freq_shift) == (False, 1)


def test_scheduler_is_the_paper_schedule():
    scheduler = ddpm_scheduler()
    assert torch.equal(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == ("fixed_large", True)


@pytest.mark.parametrize("name", sorted(name for name in UNETS if name.startswith(("mini", "tiny", "small32"))))
def test_small_networks_run_in_colour_and_grey(name):
    for channels, size in ((3, 32), (1, 2 ** (len(UNETS[name]["block_out_channels"]) - 1))):
        sample = torch.zeros(2, channels, size, size)
        unet = named_unet(name, in_channels=channels, sample_size=size)
        assert unet(sample, 5).sample.shape == sample.shape


@pytest.mark.parametrize(
    ("name", "side", "gigaflops"),
    [("mini64", 64, 0.86), ("mini128", 128, 3.5), ("mini256", 256, 7.0), ("small64", 64, 12.9), ("small128", 128, 51)],
)
def test_networks_of_larger_images_cost_what_is_said(name, side, gigaflops):
    """Counted by torch, on tensors without memory."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        named_unet(name, sample_size=side)(torch.zeros(1, 3, side, side), torch.tensor(3))
    assert counted.get_total_flops() / 1e9 == pytest.approx(gigaflops, rel=0.02)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (named_unet("tiny32", seed=seed).conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_errors():
    with pytest.raises(ValueError, match=r"unet is 'huge',"):
        named_unet("huge")
    with pytest.raises(ValueError, match="sample_size is 30,"):
        named_unet("mini32", sample_size=30)


def test_the_global_generators_are_left_alone(monkeypatch):
    """A GPU's is seeded by `torch.manual_seed`, and not put back by a fork of the CPU's."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    before = torch.get_rng_state()
    first, second = named_unet("tiny32", seed=3), named_unet("tiny32", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
