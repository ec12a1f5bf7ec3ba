import platform
import subprocess
import sys

import pytest


PROGRAM = """
import resource, torch
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
torch.set_num_threads(1)
layer = torch.nn.Conv2d(16, 16, 3, padding=1)
images = torch.rand(64, 16, 32, 32)

def faults():
    for _ in range(5):
        layer(layer(images))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        layer(layer(images))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with torch.no_grad():
    print(faults())
    assert keep_freed_memory()
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_network_no_longer_faults_its_memory_in_at_every_layer():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    as_it_is, kept = map(int, done.stdout.split())
    assert kept < as_it_is / 10
