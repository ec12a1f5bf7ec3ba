"""Where a training that was cut off goes on from: one file without pickle."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..results import plain


class Checkpoint:
    """
    Everything that the next epoch depends on, in one safetensors file whose metadata is JSON, replaced as a whole.

    Args:
        folder (`str` or `Path`): Holds the file `training.safetensors`.
        request (`Mapping`): Everything that decides the weights, in JSON's types. A file with another one is refused.
        objective (`nn.Module`): What is trained.
        optimizer (`torch.optim.SGD`), scheduler (`LRScheduler`): As they are before the first step.
        generators (`Mapping` of `str` to `torch.Generator`): What the training draws from, beside torch's global
            state.
    """

    NAME = "training.safetensors"
    TOLD = ("seed", "device", "number of threads")  # parts of a request that say something to a reader
    MOVING = ("last_epoch", "_step_count", "_last_lr")  # of a scheduler: the rest follows from the recipe

    def __init__(
        self,
        folder: str | Path,
        request: Mapping[str, Any],
        objective: nn.Module,
        optimizer: torch.optim.SGD,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        generators: Mapping[str, torch.Generator],
    ):
        self.path = Path(folder) / self.NAME
        self.request = plain(request, "request")  # tuples become lists, as they do in the file
        self.objective, self.optimizer, self.scheduler = objective, optimizer, scheduler
        self.generators = generators
        self.device = next(iter(generators.values())).device

    def save(self, history: list[dict[str, float]]) -> None:
        """Keeps everything as it is now, after the last epoch of the history."""
        tensors = {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors[f"momentum.{index}"] = state["momentum_buffer"]
        tensors |= {f"generator.{name}": generator.get_state() for name, generator in self.generators.items()}
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        scheduler = self.scheduler.state_dict()
        facts = {
            "request": self.request,
            "scheduler": {name: scheduler[name] for name in self.MOVING},
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "history": history,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"training": json.dumps(facts)})
        os.replace(temporary, self.path)

    def load(self) -> list[dict[str, float]]:
        """Puts everything as it was after the last finished epoch and returns the history until then."""
        if not self.path.exists():
            return []
        with _opened(self.path) as (file, facts):
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name, wanted in self.request.items():
            if (held := facts["request"].get(name)) != wanted:
                # On another machine, say, whoever gives the command again knows neither this folder nor what is in it.
                told = f", {held} instead of {wanted}" if name in self.TOLD else ""
                raise ValueError(
                    f"checkpoint_dir is {str(self.path.parent)!r}, but must be empty or hold the same training; "
                    f"it holds one with another {name}{told}."
                )
        self._restore(tensors, facts)
        return facts["history"]

    def _restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        kept = {kind: {} for kind in ("objective", "momentum", "generator")}
        for name, tensor in tensors.items():
            kind, _, name = name.partition(".")
            kept[kind][name] = tensor
        self.objective.load_state_dict(kept["objective"])
        state = self.optimizer.state_dict()
        state["state"] = {int(index): {"momentum_buffer": tensor} for index, tensor in kept["momentum"].items()}
        for group, learning_rate in zip(state["param_groups"], facts["learning_rates"], strict=True):
            group["lr"] = learning_rate
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(self.scheduler.state_dict() | facts["scheduler"])
        for name, generator in self.generators.items():
            generator.set_state(kept["generator"][name])
        torch.set_rng_state(kept["generator"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(kept["generator"]["cuda"], self.device)


def kept_seconds(folder: str | Path) -> float:
    """Seconds that the training in a folder took until its last checkpoint; 0 where there is none."""
    path = Path(folder) / Checkpoint.NAME
    if not path.exists():
        return 0.0
    with _opened(path) as (_, facts):
        return facts["history"][-1]["seconds"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, dict[str, Any]]]:
    """The file and the facts of a checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            yield file, json.loads(file.metadata()["training"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint_dir is {str(path.parent)!r}, but its {path.name} must be a checkpoint: {error}."
        ) from error


def digest(*tensors: torch.Tensor) -> str:
    """32 hexadecimal digits of tensors' shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
