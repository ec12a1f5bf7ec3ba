"""The state of a costly poison on disk."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..saved_state import SavedState


class Checkpoint(SavedState):
    """
    The state of one poison in a folder.

    Args:
        checkpoint_dir (`Path`, *optional*): A folder of the user's own; `None` keeps nothing.
        method (`str`): The poison's name.
        settings (dataclass): Its numbers.
        seed (`int`): Its seed.
        images (`torch.Tensor`): What it is made for, `(N, C, H, W)`.
        labels (`torch.Tensor`, *optional*): Labels of the images, `(N,)`; `None` for a method without labels.
    """

    def __init__(
        self,
        checkpoint_dir: Path | None,
        method: str,
        settings: Any,
        seed: int,
        images: torch.Tensor,
        labels: torch.Tensor | None,
    ):
        content = hashlib.sha256(images.contiguous().numpy())
        if labels is not None:
            content.update(labels.contiguous().numpy())
        run = f"{method}, {settings}, seed {seed}, data {content.hexdigest()[:16]}"
        super().__init__(None if checkpoint_dir is None else checkpoint_dir / f"{method}.pt", run)
