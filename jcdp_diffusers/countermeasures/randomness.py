"""Chance for libraries that draw from torch's global generator, as kornia does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..devices import seeded


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Seeds torch's global state from `generator` and puts it back afterwards."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with seeded(seed, generator.device):
        yield
