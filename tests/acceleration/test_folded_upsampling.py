"""Folded upsampling: diffusers' numbers for less arithmetic, and a purifier that is saved and loaded as before."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.upsampling import Upsample2D
from purifying import quick_pipe, source_folder
from tiny import tiny_unet
from torch.utils.flop_counter import FlopCounterMode

from jcdp_diffusers import JointConditionalPurificationPipeline
from jcdp_diffusers.acceleration.folded_upsampling import FoldedUpsample2D, fold_upsampling, is_folded
from jcdp_diffusers.acceleration.placement import place
from jcdp_diffusers.purify.__main__ import main
from jcdp_diffusers.train.unets import UNETS, named_unet


# As many levels as mini64, mini128 and mini256 have.
WIDER = ("ddpm-cifar10", "small64", "small128", "small256")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def forward(unet, dtype=torch.float64, size=32):
    with torch.no_grad():
        return unet.to(dtype)(random(2, 3, size, size, dtype=dtype), torch.tensor([3, 40])).sample


@torch.no_grad()
@pytest.mark.parametrize(("channels", "out", "height", "width"), [(3, 5, 1, 1), (4, 4, 2, 3), (6, 2, 7, 5)])
def test_one_layer_against_diffusers(channels, out, height, width):
    layer = Upsample2D(channels, use_conv=True, out_channels=out).double()
    x = random(2, channels, height, width)
    torch.testing.assert_close(FoldedUpsample2D(layer.conv)(x), layer(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in UNETS if name not in WIDER])
def test_a_whole_network_against_diffusers(name):
    size = max(16, 2 ** (len(UNETS[name]["block_out_channels"]) - 1))  # the least that all levels can halve
    unet = named_unet(name, sample_size=size).eval()
    plain = forward(unet, size=size)
    fold_upsampling(unet)
    folded_layers = [module for module in unet.modules() if isinstance(module, FoldedUpsample2D)]
    assert len(folded_layers) == len(UNETS[name]["block_out_channels"]) - 1
    # Folded in float32, which is the type of its weights; all else in float64.
    torch.testing.assert_close(forward(unet, size=size), plain, rtol=0, atol=1e-6)
    assert not torch.equal(forward(unet, size=size), plain)  # another order of sums: it is another operation


def test_four_ninths_of_the_arithmetic_of_those_layers():
    def flops(run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    layer = Upsample2D(8, use_conv=True)
    x = torch.zeros(1, 8, 6, 6)
    assert flops(lambda: FoldedUpsample2D(layer.conv)(x)) * 9 == flops(lambda: layer(x)) * 4
    with torch.device("meta"):
        unet, x = named_unet("ddpm-cifar10"), torch.empty(1, 3, 32, 32)
    plain = flops(lambda: unet(x, 3))
    fold_upsampling(unet)
    assert flops(lambda: unet(x, 3)) / plain == pytest.approx(0.93, abs=0.005)


def test_other_upsampling_stays():
    unet = UNet2DModel(32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, upsample_type="resnet",
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    plain = forward(unet)
    fold_upsampling(unet)
    assert not is_folded(unet) and torch.equal(forward(unet), plain)


def test_another_output_size_is_refused():
    layer = FoldedUpsample2D(torch.nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r"output_size is \(5, 5\).*None"):
        layer(torch.zeros(1, 4, 2, 2), (5, 5))


def test_a_state_that_is_loaded_is_folded():
    unet, other = tiny_unet(), tiny_unet(seed=1)
    fold_upsampling(unet)
    assert unet.state_dict().keys() == other.state_dict().keys()
    unet.load_state_dict(other.state_dict())
    torch.testing.assert_close(forward(unet), forward(other), rtol=0, atol=1e-6)


def test_a_placed_purifier_is_saved_as_a_plain_one(tmp_path):
    unet = tiny_unet()
    expected = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    pipe = place(JointConditionalPurificationPipeline(unet, DDPMScheduler()), "cpu", precision="float32")
    assert is_folded(place(pipe, "cpu", precision="float32").unet)  # once more changes nothing
    pipe.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path / "unet")
    assert not is_folded(again)
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_run_says_that_its_upsampling_was_folded(tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    source = source_folder(tmp_path / "source", 3)
    folder = tmp_path / "out"
    command = ["--purifier", str(tmp_path / "purifier"), "--dataset", str(source), "--output", str(folder)]
    assert main([*command, "--diffusion_steps", "2"]) == 0
    assert json.loads((folder / "run.json").read_text())["arithmetic"]["folded_upsampling"] is True
