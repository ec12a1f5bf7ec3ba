"""A purifier placed by one switch: the type and layout it runs in, its bits, and runs that go on as they were begun."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from purifying import quick_pipe, read_back, same, source_folder
from tiny import tiny_unet

from jcdp_diffusers import JointConditionalPurificationPipeline, LPIPSModel
from jcdp_diffusers.acceleration import PRECISIONS, place
from jcdp_diffusers.acceleration.folded_upsampling import is_folded
from jcdp_diffusers.acceleration.placement import compiled_normal_noise
from jcdp_diffusers.devices import has_bfloat16
from jcdp_diffusers.noise import image_keys, normal_noise
from jcdp_diffusers.purify.__main__ import main
from jcdp_diffusers.purify.dataset import open_purifier


GUIDED = dict(diffusion_steps=4, num_rounds=2, pixel_guidance_scale=2000.0, perceptual_guidance_scale=50.0)


@pytest.fixture
def pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LPIPSModel("alex")
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler(), network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photos(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("instructions", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_device_has_it(instructions, expected, pipe, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert has_bfloat16("cpu") is instructions
    assert place(pipe, "cpu") is pipe and pipe.unet.dtype == expected


def test_what_is_placed_and_what_stays(pipe):
    place(pipe, "cpu", precision="bfloat16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in [*pipe.perceptual.parameters(), *pipe.perceptual.buffers()]} == {torch.float32}
    weights = [p for p in pipe.unet.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert pipe.unet._compiled_call_impl is None  # never unless asked for
    place(pipe, "cpu", precision="float32")
    assert pipe.unet.dtype == torch.float32


def test_another_precision_is_refused(pipe):
    with pytest.raises(ValueError, match="precision is 'tf32'"):
        place(pipe, "cpu", precision="tf32")


def test_any_pipeline_with_a_unet_is_placed():
    plain = DDPMPipeline(tiny_unet(), DDPMScheduler())
    plain.set_progress_bar_config(disable=True)
    run = lambda: plain(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    before = run()
    assert place(plain, "cpu", precision="float32") is plain and not hasattr(plain, "normal_noise")
    assert is_folded(plain.unet) and abs(run() - before).max() < 1e-4
    with pytest.raises(ValueError, match="pipe is a Module without a network"):
        place(torch.nn.Module(), "cpu")


# What others wrote is loaded once; then each order is a process of its own, in which nothing of ours is loaded yet.
IN_ANY_ORDER = """
import os, sys
from diffusers import DDPMPipeline, UNet2DModel
for first in ("acceleration", "pipeline_jcdp", "acceleration.placement", "acceleration.feature_cache"):
    assert not any(name.startswith("jcdp_diffusers") for name in sys.modules)
    child = os.fork()
    if child == 0:
        __import__(f"jcdp_diffusers.{first}")
        from jcdp_diffusers.acceleration import PRECISIONS, place
        from jcdp_diffusers import PurificationOutput
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, first
"""


@pytest.mark.long
def test_acceleration_and_pipeline_may_be_imported_in_any_order():
    subprocess.run([sys.executable, "-c", IN_ANY_ORDER], check=True)


def test_acceleration_has_no_other_names():
    assert PRECISIONS[0] == "auto"
    with pytest.raises(ImportError, match="teleport"):
        from jcdp_diffusers.acceleration import teleport  # noqa: F401


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_bits_alone_in_five_in_nine_and_permuted(precision, pipe):
    place(pipe, "cpu", precision=precision)
    images, ids = photos(9), [f"image {i}" for i in range(9)]
    settings = dict(seed=3, output_type="pt", micro_batch_size=4, **GUIDED | {"diffusion_steps": 2})
    run = lambda rows: pipe(images[rows], ids=[ids[i] for i in rows], **settings).images
    everything = run(list(range(9)))
    assert torch.equal(run([5])[0], everything[5])
    assert torch.equal(run(list(range(2, 7))), everything[2:7])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(run(order), everything[order])


def test_a_run_goes_on_in_the_precision_it_was_begun_in(tmp_path, capsys):
    source, folder = source_folder(tmp_path / "source", 10), tmp_path / "out"
    quick_pipe().save_pretrained(tmp_path / "purifier")
    command = f"--purifier {tmp_path}/purifier --dataset {source} --output {folder} --diffusion_steps 3".split()
    for precision in ("float32", "bfloat16"):
        begun = [*command, "--output", f"{folder}-{precision}"]
        assert main([*begun, "--precision", precision, "--rows_per_shard", "5"]) == 0
        expected = read_back(tmp_path / f"out-{precision}")
        next((tmp_path / f"out-{precision}").glob("*.parquet")).unlink()
        assert main(begun) == 0
        assert same(read_back(tmp_path / f"out-{precision}"), expected)
        run = json.loads((tmp_path / f"out-{precision}" / "run.json").read_text())
        assert run["arithmetic"]["dtype"] == precision and run["arithmetic"]["channels_last"] is True
        pipe = open_purifier(tmp_path / "purifier", "cpu", output_dir=tmp_path / f"out-{precision}")
        assert pipe.unet.dtype == getattr(torch, precision)
    capsys.readouterr()
    assert main([*begun, "--precision", "float32"]) == 1
    assert "whose dtype is 'bfloat16', but 'float32' is wanted now" in capsys.readouterr().err


def test_noise_is_compiled_on_request_alone(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append((function, options)) or function)
    assert place(pipe, "cpu").normal_noise is normal_noise and not calls
    place(pipe, "cpu", compiled=True)
    assert [options for function, options in calls if function is normal_noise] == [{"dynamic": True}]
    assert place(pipe, "cpu").normal_noise is normal_noise


@pytest.mark.long
def test_compiled_noise_has_the_bits_of_the_plain_one_and_is_compiled_once():
    torch._dynamo.reset()
    keys, compiled = image_keys(5, [f"image {i}" for i in range(9)]), compiled_normal_noise()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for round_index, step_index, use in ((0, 0, "start"), (0, 0, "variance"), (0, 3, "reference"), (2, 1, "variance")):
        counter = {"round_index": round_index, "step_index": step_index, "use": use}
        assert torch.equal(compiled(keys, (3, 32, 32), **counter), normal_noise(keys, (3, 32, 32), **counter))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.long
def test_a_compiled_network_stays_within_a_level_and_says_so(pipe, tmp_path):
    settings = dict(seed=0, output_type="pt", **GUIDED)
    eager = place(pipe, "cpu", precision="float32")(photos(3), **settings).images
    names = list(pipe.unet.state_dict())
    compiled = place(pipe, "cpu", precision="float32", compiled=True)
    assert (compiled(photos(3), **settings).images - eager).abs().max() < 1 / 255
    assert list(compiled.unet.state_dict()) == names
