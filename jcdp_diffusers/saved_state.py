"""The state of long work on disk: what was interrupted continues and ends as if it had not been."""

import os
import time
from pathlib import Path
from typing import Any

import torch


# Seconds of work that an interruption may cost.
SAVE_EVERY = 60.0


class SavedState:
    """
    Keeps one dictionary of tensors and numbers in a file.

    Args:
        path (`Path`, *optional*): The file, in a folder of the user's own; `None` keeps nothing.
        run (`str`): What decides the result, in words. The state of another run is refused.
    """

    def __init__(self, path: Path | None, run: str):
        self.path = path
        self.run = run
        self.began = self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of the work until now, those before interruptions included."""
        return time.monotonic() - self.began

    def load(self) -> dict[str, Any] | None:
        """
        The last state of the same run.

        Returns:
            `dict`: As it was saved; `None` if there is none.

        Raises:
            ValueError: If the file is damaged, or holds the state of another run.
            OSError: If it cannot be read.
        """
        if self.path is None or not self.path.exists():
            return None
        state = _read(self.path)
        if state["run"] != self.run:
            raise ValueError(
                f"checkpoint_dir is {str(self.path.parent)!r}, which holds another run ({state['run']}), but must be "
                "an empty folder or one of the same run."
            )
        self.began = time.monotonic() - _seconds_of(state)
        return state

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.monotonic() - self.saved_at >= SAVE_EVERY

    def save(self, state: dict[str, Any]) -> None:
        """Replace the last state as a whole; a failure meanwhile leaves the last one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save({"run": self.run, "seconds": self.seconds, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.saved_at = time.monotonic()


def kept_seconds(folder: Path) -> float:
    """Seconds of the work whose states lie in a folder, until each was saved."""
    return sum(_seconds_of(_read(path, mmap=True)) for path in sorted(folder.glob("*.pt")))


def _read(path: Path, **options) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", **options)
        state["run"]
    except (OSError, MemoryError):  # the disk or the memory is at fault, and not the file
        raise
    except Exception as error:  # what torch's loader raises depends on the bytes
        raise ValueError(
            f"checkpoint_dir is {str(path.parent)!r}, but its {path.name} must be a saved state, and is damaged or "
            "something else: without it the work begins anew."
        ) from error
    return state


def _seconds_of(state: dict[str, Any]) -> float:
    return state.get("seconds", 0.0)  # states of earlier versions have none
