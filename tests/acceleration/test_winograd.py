"""Winograd's algorithm: torch's convolution for fewer multiplications, and a purifier saved and loaded as before."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from purifying import quick_pipe, source_folder
from torch import nn

from jcdp_diffusers import JointConditionalPurificationPipeline
from jcdp_diffusers.acceleration import winograd
from jcdp_diffusers.acceleration.placement import place
from jcdp_diffusers.acceleration.winograd import WinogradConv2d, convolve, transformed, use_winograd, uses_winograd
from jcdp_diffusers.purify.__main__ import main
from jcdp_diffusers.train.unets import named_unet


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def convolution(channels, out_channels, seed=0, **options):
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, **options)
    with torch.no_grad():
        for index, parameter in enumerate(conv.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + index) / (3 * channels**0.5))
    return conv


def wide_unet(seed=0, **options):
    """Both kinds of levels: 16x16, and 4x4, which is too small for the algorithm; 8x8 lies between."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"sample_size": 16, "block_out_channels": (64, 64, 128), "norm_num_groups": 8} | options
        return UNet2DModel(
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            **options,
        ).eval()


@torch.no_grad()
def forward(unet, size=16):
    return unet(random(2, 3, size, size), torch.tensor([3, 40])).sample


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 2, 8, 20), (2, 5, 12, 4), (24, 1, 32, 32)])
def test_it_is_the_convolution_in_exact_arithmetic(shape, bias):
    conv = convolution(shape[1], 7, bias=bias).double()
    x = random(*shape, dtype=torch.float64)
    torch.testing.assert_close(convolve(x, transformed(conv.weight), conv.bias), conv(x), rtol=0, atol=1e-13)


@torch.no_grad()
def test_rounding_in_float32():
    conv, x = convolution(256, 256), random(2, 256, 16, 16)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    error = WinogradConv2d(conv)(x) - exact
    assert 1e-7 < error.std() / exact.std() < 5e-6
    assert error.abs().max() / exact.abs().max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_same_bits_in_every_place_of_a_batch(size, threads):
    layer = WinogradConv2d(convolution(64, 96))
    x = random(16, 64, size, size).contiguous(memory_format=torch.channels_last)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    others = x.clone()
    others[1:] = random(15, 64, size, size, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = layer(x)
        assert torch.equal(layer(x[order].contiguous(memory_format=torch.channels_last)), expected[order])
        assert torch.equal(layer(others)[0], expected[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 4, 4, 4), torch.float32), ((1, 4, 14, 16), torch.float32), ((1, 4, 16, 10), torch.float32),
     ((1, 4, 8, 8), torch.bfloat16), ((1, 4, 8, 8), torch.float64)],
    ids=["too small", "no whole tiles of rows", "no whole tiles of columns", "bfloat16", "float64"],
)  # fmt: skip
@torch.no_grad()
def test_other_inputs_are_convolved_as_before(shape, dtype):
    conv = convolution(4, 4).to(dtype)
    x = random(*shape).to(dtype)
    assert torch.equal(WinogradConv2d(conv)(x), conv(x))


def test_a_gradient_is_that_of_the_convolution():
    conv, x = convolution(4, 4), random(1, 4, 8, 8).requires_grad_()
    for layer in (conv, WinogradConv2d(conv)):
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad / 2, torch.autograd.grad(conv(x).square().sum(), x)[0])


def test_a_compiler_sees_one_operation():
    conv = convolution(64, 64).requires_grad_(False)
    layer, x = WinogradConv2d(conv), random(2, 64, 8, 8)
    torch.library.opcheck(convolve, (x, layer.kernel, layer.bias), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(("name", "layers"), [("ddpm-cifar10", 30), ("small32", 15), ("mini32", 9), ("tiny32", 9)])
def test_where_pixels_and_channels_are_enough(name, layers):
    unet = named_unet(name)
    use_winograd(unet)
    found = [module for module in unet.modules() if isinstance(module, WinogradConv2d)]
    assert len(found) == layers
    assert min(min(layer.in_channels, layer.out_channels) for layer in found) >= winograd.FEWEST_CHANNELS
    deepest_side = 32 >> (len(unet.down_blocks) - 1)
    assert uses_winograd(unet.mid_block) is (deepest_side >= winograd.SMALLEST_SIDE)


@pytest.mark.parametrize("size", [16, 12], ids=["the size it was made for", "levels without whole tiles"])
@pytest.mark.parametrize("sample_size", [16, (16, 24), None])
def test_a_whole_network_against_diffusers(sample_size, size):
    unet = wide_unet(sample_size=sample_size)
    plain = forward(unet, size)
    use_winograd(unet)
    found = forward(unet, size)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5 * plain.abs().max().item())
    assert not torch.equal(found, plain)  # another order of sums: it is another operation


def test_a_state_that_is_loaded_is_transformed():
    unet, other = wide_unet(), wide_unet(seed=1)
    use_winograd(unet)
    assert unet.state_dict().keys() == other.state_dict().keys()
    unet.load_state_dict(other.state_dict())
    plain = forward(other)
    torch.testing.assert_close(forward(unet), plain, rtol=0, atol=2e-5 * plain.abs().max().item())


def test_a_placed_purifier_is_saved_as_a_plain_one(tmp_path):
    unet = wide_unet()
    expected = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    pipe = place(JointConditionalPurificationPipeline(unet, DDPMScheduler()), "cpu", precision="float32")
    once = forward(pipe.unet)
    assert torch.equal(forward(place(pipe, "cpu", precision="float32").unet), once)  # once more changes nothing
    pipe.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path / "unet")
    assert not uses_winograd(again)
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_only_in_float32_on_a_cpu():
    pipe = JointConditionalPurificationPipeline(wide_unet(), DDPMScheduler())
    assert not uses_winograd(place(pipe, "cpu", precision="bfloat16").unet)
    assert uses_winograd(place(pipe, "cpu", precision="float32").unet)
    assert not uses_winograd(place(pipe, "cpu", precision="bfloat16").unet)


def test_a_network_that_was_rounded_computes_with_its_rounded_weights():
    rounded, expected = wide_unet().to(torch.bfloat16).float(), wide_unet()
    use_winograd(expected)
    expected.to(torch.bfloat16).float()
    use_winograd(rounded)
    assert torch.equal(forward(expected), forward(rounded))


def test_same_bits_in_any_batch_of_a_placed_purifier():
    pipe = place(JointConditionalPurificationPipeline(wide_unet(), DDPMScheduler()), "cpu", precision="float32")
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = [f"image {index}" for index in range(20)]

    def run(rows):
        settings = dict(diffusion_steps=4, num_inference_steps=2, seed=3, output_type="pt")
        return pipe(images[rows], ids=[ids[row] for row in rows], **settings).images

    everything = run(list(range(20)))
    assert torch.equal(run([17])[0], everything[17])
    assert torch.equal(run(list(range(5, 9))), everything[5:9])


def test_a_run_says_so(tmp_path):
    pipe = quick_pipe()
    JointConditionalPurificationPipeline(wide_unet(), pipe.scheduler).save_pretrained(tmp_path / "purifier")
    source = source_folder(tmp_path / "source", 3, size=16)
    words = ["--purifier", str(tmp_path / "purifier"), "--dataset", str(source), "--diffusion_steps", "2"]
    for precision, expected in (("float32", True), ("bfloat16", None)):
        folder = tmp_path / precision
        assert main([*words, "--output", str(folder), "--precision", precision]) == 0
        assert json.loads((folder / "run.json").read_text())["arithmetic"].get("winograd") is expected
