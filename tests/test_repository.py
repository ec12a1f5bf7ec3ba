"""Purifiers' repositories as users have them: other schedulers, variants, spellings, and files that are broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from tiny import tiny_unet

from jcdp_diffusers import GuidedDDPMScheduler, JointConditionalPurificationPipeline, LPIPSModel, PurificationConfig
from jcdp_diffusers.countermeasures.purifiers import check_purifier
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.hub import create_repository, files_of_purifier, push_files
from jcdp_diffusers.purifier_digest import purifier_digest
from jcdp_diffusers.purify.dataset import purify_to_folder
from jcdp_diffusers.repository import check_folder, check_on_hub, only_variant, read_json


Pipeline = JointConditionalPurificationPipeline
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2752120\n"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def purify(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return pipe(images, diffusion_steps=3, micro_batch_size=4, seed=0, output_type="pt").images


@pytest.fixture
def folder(ddpm_folder, tmp_path):
    """A copy of a plain DDPM's folder, to be changed."""
    return shutil.copytree(ddpm_folder, tmp_path / "purifier")


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(beta_end=0.015),
        PNDMScheduler(beta_start=1e-4, beta_end=0.015),
        DPMSolverMultistepScheduler(beta_end=0.015),
        EulerDiscreteScheduler(beta_end=0.015),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_network_saved_with_another_scheduler_of_the_same_schedule_is_a_purifier(scheduler, tmp_path):
    if isinstance(scheduler, DDIMScheduler):
        DDIMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    else:
        DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler) is GuidedDDPMScheduler and pipe.scheduler.config.beta_end == 0.015
    expected = purify(Pipeline(tiny_unet(), DDPMScheduler(beta_end=0.015)))
    assert torch.equal(purify(pipe), expected)
    pipe.save_pretrained(tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again").scheduler) is DDPMScheduler


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    def unreachable(*arguments, **options):
        raise HTTPError("[Errno 111] Connection refused")

    for name in ("create_repo", "list_repo_files", "create_commit"):
        monkeypatch.setattr(HfApi, name, unreachable)
    for module in ("repository", "purifier_digest", "purification_config"):
        monkeypatch.setattr(f"jcdp_diffusers.{module}.hf_hub_download", unreachable)
    for ask in (
        lambda: create_repository("me/x"),
        lambda: push_files({}, "me/x", repo_type="model", commit_message="Upload"),
        lambda: purifier_digest("me/x"),
        lambda: PurificationConfig.from_pretrained("me/x"),
    ):
        with pytest.raises(OSError, match=r"'me/x' cannot be reached on the Hub at http.*Errno 111.* when it can\.$"):
            ask()
    with pytest.raises(OSError, match="purifier is 'me/x', but must be"):
        check_on_hub("me/x")
    # After the repository is there: while its files are listed, or sent.
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: SimpleNamespace(repo_id=name))
    with pytest.raises(OSError, match="'me/x' cannot be reached"):
        push_files({}, "me/x", repo_type="model", commit_message="Upload")
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name, **options: [])
    with pytest.raises(OSError, match="'me/x' cannot be reached"):
        push_files({}, "me/x", repo_type="model", commit_message="Upload")


def test_another_noise_schedule_is_refused():
    with pytest.raises(ValueError, match="scheduler is a ScoreSdeVeScheduler"):
        Pipeline(tiny_unet(), ScoreSdeVeScheduler())


def test_a_square_sample_size_may_be_a_list(folder, ddpm_folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": [32, 32]}))
    PurificationConfig(noise_corner=8.0).save_pretrained(folder)  # which asks for the size
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.unet.config.sample_size == 32
    plain = Pipeline.from_pretrained(ddpm_folder)
    plain.purification_config = PurificationConfig(noise_corner=8.0)
    assert torch.equal(purify(pipe), purify(plain))
    oblong = tiny_unet()
    oblong.register_to_config(sample_size=[32, 64])
    assert list(Pipeline(oblong, DDPMScheduler()).unet.config.sample_size) == [32, 64]


@pytest.mark.parametrize("size", [None, [32, 64]])
def test_a_size_that_is_no_square_is_asked_for(size, tmp_path):
    unet = tiny_unet()
    unet.register_to_config(sample_size=size)
    pipe, images = Pipeline(unet, DDPMScheduler()), np.zeros((2, 32, 32, 3), np.uint8)
    options = dict(output_dir=tmp_path, diffusion_steps=2, progress=False)
    with pytest.raises(ValueError, match=f"image_size is None, .*sample_size .*{re.escape(str(size))}"):
        purify_to_folder(images, pipe, **options)
    assert purify_to_folder(images, pipe, image_size=32, **options)["rows_out"] == 2
    data = LabelledImages(images, np.zeros(2, int), ("a", "b"))
    if size is None:
        check_purifier(pipe, data)
    else:
        with pytest.raises(ValueError, match="purifier was trained on 32x64"):
            check_purifier(pipe, data)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_weights_that_come_in_a_variant_alone_are_found(variant, options, tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path, variant=variant, **options)
    assert not (tmp_path / WEIGHTS).exists() and (len(list((tmp_path / "unet").iterdir())) > 2) == bool(options)
    assert torch.equal(purify(Pipeline.from_pretrained(tmp_path)), purify(Pipeline(tiny_unet(), DDPMScheduler())))


@pytest.mark.parametrize("before", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
@pytest.mark.parametrize("after", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_the_last_weights_that_were_saved_are_those_that_load(before, after, tmp_path):
    """In whatever form: diffusers looks for safetensors first, and for an index before that."""
    scheduler = DDPMScheduler()
    Pipeline(tiny_unet(), scheduler).save_pretrained(tmp_path, **before)
    Pipeline(tiny_unet(), scheduler).save_pretrained(tmp_path, variant="fp16")
    Pipeline(tiny_unet(seed=1), scheduler).save_pretrained(tmp_path, **after)
    for options, seed in (({}, 1), ({"variant": "fp16"}, 0)):
        loaded = Pipeline.from_pretrained(tmp_path, **options).unet.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in tiny_unet(seed=seed).state_dict().items())


def test_all_that_loads_a_variant_in_several_files_is_pushed(tmp_path):
    Pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files_of_purifier(tmp_path).keys() == written


def test_a_variant_is_asked_for_only_where_there_is_nothing_else():
    plain, half, shard = (
        f"unet/diffusion_pytorch_model{name}.safetensors" for name in ("", ".fp16", ".ema-00001-of-00002")
    )
    assert only_variant([plain, half]) is None and only_variant(["model_index.json"]) is None
    assert only_variant([half]) == "fp16" and only_variant([shard]) == "ema"
    assert only_variant(["perceptual/diffusion_pytorch_model.safetensors", half]) == "fp16"
    assert only_variant(["diffusion_pytorch_model.fp16.bin"]) == "fp16"


def rewrite(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name, **changes):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rewrite("model_index.json", '{"unet": '), "model_index.json is no JSON"),
        (rewrite("model_index.json", "[" * 100_000), "model_index.json is no JSON"),
        (rewrite("model_index.json", b"\xff\xfe\x00"), "model_index.json is no JSON"),
        (rewrite("model_index.json", LFS_POINTER), "model_index.json is a git-lfs pointer"),
        (rewrite("model_index.json", "null"), "model_index.json is None"),
        (rewrite("model_index.json", "{}"), "model_index.json has None as unet"),
        (edit("model_index.json", unet="UNet2DModel"), "model_index.json has 'UNet2DModel' as unet"),
        (edit("model_index.json", unet=["diffusers", "UNet2DConditionModel"]), "model_index.json has a UNet2DCond"),
        (edit("model_index.json", scheduler=[None, None]), r"model_index.json has \[None, None\] as scheduler"),
        (rewrite("unet/config.json", "nonsense"), "unet/config.json is no JSON"),
        (edit("unet/config.json", block_out_channels="many"), "purifier"),
        (edit("unet/config.json", block_out_channels=[8, 24]), "purifier"),
        (remove("unet/config.json"), "unet has no config.json"),
        (rewrite("scheduler/scheduler_config.json", "[1]"), r"scheduler_config.json is \[1\]"),
        (edit("scheduler/scheduler_config.json", beta_schedule="loud"), "purifier"),
        (remove("scheduler/scheduler_config.json"), "scheduler has no scheduler_config.json"),
        (rewrite(WEIGHTS, LFS_POINTER), f"{WEIGHTS} is a git-lfs pointer"),
        (cut(WEIGHTS), f"{WEIGHTS} is cut short"),
        (rewrite(WEIGHTS, ""), f"{WEIGHTS} is cut short"),
        (remove(WEIGHTS), "unet has no weights"),
        (rewrite("purification_config.json", "{,}"), "purification_config.json is no JSON"),
        (rewrite("purification_config.json", LFS_POINTER), "purification_config.json is a git-lfs pointer"),
        (rewrite("purification_config.json", '"tuned"'), "purification_config.json is 'tuned'"),
        (rewrite("purification_config.json", '{"num_rounds": "3"}'), "purification_config.json cannot be used: num_r"),
        (rewrite("purification_config.json", '{"num_rounds": true}'), "purification_config.json cannot be used"),
        (rewrite("purification_config.json", '{"trained_timesteps": 5}'), "purification_config.json cannot be used"),
        (rewrite("purification_config.json", '{"trained_timesteps": ["a", 9]}'), "cannot be used: trained_timesteps"),
        (rewrite("purification_config.json", '{"pixel_guidance_scale": NaN}'), "cannot be used: pixel_guidance_scale"),
        (rewrite("purification_config.json", '{"strenght": 1}'), "purification_config.json holds 'strenght'"),
    ],
)
def test_a_broken_file_is_named_in_one_sentence(folder, change, named):
    change(folder)
    with pytest.raises((OSError, ValueError), match=named) as caught:
        Pipeline.from_pretrained(folder)
    said = str(caught.value)
    assert "\n" not in said and str(folder) in said and said.endswith(".")


def test_a_broken_perceptual_network_is_named(folder):
    LPIPSModel("squeeze").save_pretrained(folder / "perceptual")
    check_folder(folder)
    cut("perceptual/diffusion_pytorch_model.safetensors")(folder)
    with pytest.raises(ValueError, match="perceptual/diffusion_pytorch_model.safetensors is cut short"):
        Pipeline.from_pretrained(folder)


def test_a_missing_part_of_sharded_weights_is_named(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path, max_shard_size="20KB")
    first = sorted((tmp_path / "unet").glob("*-00001-of-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"has no {re.escape(first.name)}"):
        Pipeline.from_pretrained(tmp_path)
    index = next((tmp_path / "unet").glob("*.index.json"))
    index.write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=re.escape(index.name)):
        Pipeline.from_pretrained(tmp_path)


def test_files_that_lie_flat_are_a_repository_too(folder, ddpm_folder):
    """As those of google/ddpm-cifar10-32 do."""
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            shutil.move(path, folder / path.name)
        (folder / part).rmdir()
    assert torch.equal(purify(Pipeline.from_pretrained(folder)), purify(Pipeline.from_pretrained(ddpm_folder)))


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"é": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"é": 1}


ON_THE_HUB = """
import sys
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import HfApi
from jcdp_diffusers import JointConditionalPurificationPipeline as Pipeline
sys.path.insert(0, "tests")
from tiny import tiny_unet

folder = sys.argv[1]
DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder + "/half", variant="fp16")
other = DDPMPipeline(tiny_unet(), DDPMScheduler())
other.save_pretrained(folder + "/other")
index = open(folder + "/other/model_index.json").read().replace("UNet2DModel", "UNet2DConditionModel")
open(folder + "/other/model_index.json", "w").write(index)
for name in ("half", "other"):
    HfApi().create_repo("tester/" + name)
    HfApi().upload_folder(repo_id="tester/" + name, folder_path=folder + "/" + name)
for options in ({}, {"local_files_only": True}):
    loaded = Pipeline.from_pretrained("tester/half", **options)
    for name, value in tiny_unet().state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
try:
    Pipeline.from_pretrained("tester/other")
except ValueError as error:
    assert "UNet2DConditionModel" in str(error) and "model_index.json" in str(error), error
try:
    Pipeline.from_pretrained("tester/absent")
except OSError as error:
    assert str(error).startswith("purifier is 'tester/absent', but must be"), error
    print("done")
"""


@pytest.mark.long
def test_on_the_hub_too(tmp_path):
    with HubServer() as hub:
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | hub.environment(tmp_path)
        asked = [sys.executable, "-c", ON_THE_HUB, str(tmp_path)]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
