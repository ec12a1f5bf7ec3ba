"""A run that is cut off right after it has saved its state."""

import contextlib
from collections.abc import Iterator

import pytest

from jcdp_diffusers import saved_state


@contextlib.contextmanager
def cut_off_at_save(kind: type, number: int = 1) -> Iterator[None]:
    """The block saves its state at every chance, and must end by the save of that number, which is whole."""
    save, count = kind.save, 0

    def save_and_stop(self, *arguments):
        nonlocal count
        save(self, *arguments)
        count += 1
        if count == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_state, "SAVE_EVERY", 0.0)
        patch.setattr(kind, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            yield
