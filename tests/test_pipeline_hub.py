"""Push a purifier from the pipeline and pull it with three classes, against a Hub on loopback, in another process."""

import hashlib
import os
import subprocess
import sys

import torch
from diffusers import DDPMScheduler
from hub_server import HubServer
from tiny import tiny_unet

from jcdp_diffusers import JointConditionalPurificationPipeline


SCRIPT = """
import hashlib
import sys
from unittest.mock import patch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from jcdp_diffusers import JointConditionalPurificationPipeline as Pipeline, LPIPSModel, PurificationConfig
sys.path.insert(0, "tests")
from tiny import tiny_unet

torch.set_num_threads(1)
pipe = Pipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large"), LPIPSModel("alex"))
pipe.purification_config = PurificationConfig(diffusion_steps=2, perceptual_guidance_scale=3.0, trained_timesteps=(0, 50))
pipe.push_to_hub("tester/purifier", commit_message="First")
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

loaded = Pipeline.from_pretrained("tester/purifier")
assert loaded.purification_config == pipe.purification_config and loaded.perceptual.name == "lpips-alex"
settings = dict(seed=0, output_type="pt")
assert torch.equal(loaded(images, **settings).images, pipe(images, **settings).images)
for cls in (DDPMPipeline, DiffusionPipeline):
    assert type(cls.from_pretrained("tester/purifier")) is DDPMPipeline

# once in the cache it loads without a network, everything beside the DDPM included
offline = Pipeline.from_pretrained("tester/purifier", local_files_only=True)
assert offline.purification_config == pipe.purification_config and offline.perceptual is not None

# a second push replaces all that the first has put there: a setting or network that is gone, files of sharded weights
pipe.push_to_hub("tester/again", max_shard_size="20KB")
other = Pipeline(tiny_unet(seed=1), DDPMScheduler(variance_type="fixed_large"))
other.push_to_hub("tester/again", commit_message="Second")
replaced = Pipeline.from_pretrained("tester/again")
assert replaced.purification_config is None and replaced.perceptual is None
assert torch.equal(replaced.unet.conv_in.weight, other.unet.conv_in.weight)

# a repository that has neither of the two is a purifier, too
DDPMPipeline(tiny_unet(), DDPMScheduler()).push_to_hub("tester/plain")
plain = Pipeline.from_pretrained("tester/plain")
assert plain.purification_config is None and plain.perceptual is None
assert PurificationConfig.from_pretrained("tester/plain") is None
assert PurificationConfig.from_pretrained("tester/purifier", revision="main").diffusion_steps == 2

# once in the cache it loads while the Hub cannot be reached
def unreachable(*args, **options):
    raise HTTPError("no network")
with patch.object(HfApi, "list_repo_files", unreachable):
    assert Pipeline.from_pretrained("tester/purifier").purification_config == pipe.purification_config
out = plain(images, diffusion_steps=3, seed=0, output_type="pt").images
print("purified", hashlib.sha256(out.numpy().tobytes()).hexdigest())
print("done")
"""


def purified_here() -> str:
    """What the other process makes of its images with the pulled purifier, here with the one that it has pushed."""
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = pipe(images, diffusion_steps=3, seed=0, output_type="pt").images
    finally:
        torch.set_num_threads(before)
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()


def test_push_and_pull_and_purify_to_the_same_bits(tmp_path):
    with HubServer() as hub:
        environment = (
            os.environ
            | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
            | hub.environment(tmp_path)
        )
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert f"purified {purified_here()}\n" in done.stdout
    assert sorted(hub.repos["models/tester/again"]) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    pushed = hub.commits[0]
    assert pushed.message == "First" and sorted(pushed.files) == [
        "model_index.json",
        "perceptual/config.json",
        "perceptual/diffusion_pytorch_model.safetensors",
        "purification_config.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
