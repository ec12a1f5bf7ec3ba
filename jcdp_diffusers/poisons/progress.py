"""The state of a costly poison, kept so that one that was cut off goes on and ends as if it had not been."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch


# Seconds of work that an interruption may cost.
SAVE_EVERY = 60.0


class Progress:
    """Keeps one dictionary of tensors and numbers in `checkpoint_dir`; keeps nothing if that is None.

    Args:
        checkpoint_dir: a folder of the user's own.
        method: the poison's name.
        settings: its dataclass.
        seed: its seed.
        images: what it is made for.
        labels: what it is made for.
    """

    def __init__(
        self,
        checkpoint_dir: Path | None,
        method: str,
        settings: Any,
        seed: int,
        images: torch.Tensor,
        labels: torch.Tensor,
    ):
        self.path = None
        if checkpoint_dir is not None:
            self.path = checkpoint_dir / f"{method}.pt"
            content = hashlib.sha256(images.contiguous().numpy())
            content.update(labels.contiguous().numpy())
            self.run = f"{method}, {settings}, seed {seed}, data {content.hexdigest()[:16]}"
        self.saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state saved by the same run, or None if there is none.

        Raises:
            ValueError: if the folder holds the state of another run.
        """
        if self.path is None or not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        if state["run"] != self.run:
            raise ValueError(
                f"checkpoint_dir is {str(self.path.parent)!r}, but it holds another run ({state['run']}); "
                "give an empty folder."
            )
        return state

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.monotonic() - self.saved_at >= SAVE_EVERY

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the last state: all of it or, whatever happens meanwhile, nothing."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save({"run": self.run, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.saved_at = time.monotonic()
