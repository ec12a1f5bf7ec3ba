"""Devices and seeds that a machine has or takes."""

import numpy as np
import pytest
import torch

from jcdp_diffusers.devices import check_seed, usable_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there(name, two_gpus):
    assert usable_device(name) == usable_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "cpu:1", "banana", ""])
def test_a_device_that_is_not_there(name, two_gpus):
    with pytest.raises(ValueError, match=f"device is '{name}', but must be one .*: cpu, cuda, cuda:0, cuda:1"):
        usable_device(name)


def test_seeds():
    for seed in (0, 2**32 - 1, np.int64(3)):
        check_seed(seed)
    check_seed(2**64 - 1, bits=64)
    for seed, bits in ((-1, 32), (2**32, 32), (2**64, 64), (1.0, 32), (None, 32), ("1", 32)):
        with pytest.raises(ValueError, match=rf"seed is {seed!r}, but must be a whole number in \[0, 2\*\*{bits}\)"):
            check_seed(seed, bits)
