"""What a run puts on record about its purifier and its threads."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from purifying import quick_pipe

from jcdp_diffusers.perceptual import LPIPSModel
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.purify.manifest import content_of, default_threads


CONFIG = PurificationConfig()


def test_content_is_that_of_the_weights_wherever_they_lie(tmp_path):
    pipe = quick_pipe()
    pipe.save_pretrained(tmp_path)
    assert content_of(type(pipe).from_pretrained(tmp_path), CONFIG) == content_of(pipe, CONFIG)
    pipe.unet.to(memory_format=torch.channels_last)
    assert content_of(pipe, CONFIG) == content_of(quick_pipe(), CONFIG)


def test_content_changes_with_every_part_that_takes_part():
    pipe = quick_pipe()
    found = {content_of(pipe, CONFIG), content_of(quick_pipe(seed=1), CONFIG)}
    next(reversed(list(pipe.unet.parameters()))).data[-1] += 1e-6
    found.add(content_of(pipe, CONFIG))
    pipe.scheduler = DDPMScheduler(beta_end=0.03)
    found.add(content_of(pipe, CONFIG))
    guided = dataclasses.replace(CONFIG, perceptual_guidance_scale=1.0)
    unguided = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipe.register_modules(perceptual=LPIPSModel("squeeze"))
        found.add(content_of(pipe, guided))
        unguided.append(content_of(pipe, CONFIG))
    assert len(found) == 6
    assert unguided[0] == unguided[1] and unguided[0] in found  # a network that is not used changes nothing


@pytest.mark.parametrize(("available", "local", "expected"), [(8, 1, 8), (8, 3, 2), (6, 1, 4), (2, 4, 1)])
def test_local_processes_share_the_cores(available, local, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(available)))
    assert default_threads() == expected
