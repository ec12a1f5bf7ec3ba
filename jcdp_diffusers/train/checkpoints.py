"""
Training checkpoints that a kill at any moment cannot spoil.

A folder named `checkpoint-<step>` is complete: it is written under a name with a leading dot, flushed to the disk and
then renamed. A folder that is to go is renamed first, too, so no half-deleted one bears a checkpoint's name.

States are kept as safetensors and JSON, never as pickles, so that going on with somebody's folder runs none of their
code. (Accelerate unpickles optimisers, random states and registered objects, `weights_only=False` among them.) Random
states are not kept: everything that is drawn is a function of the seed, the step and the place in the batch.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


WEIGHTS_NAME = "unet.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
EMA_NAME = "ema.safetensors"
STATES_NAME = "states.json"
PROGRESS_NAME = "progress.json"
_PATTERN = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a training folder, oldest first."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := _PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: str | os.PathLike, wanted: str) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir (`str` or `os.PathLike`): Training folder.
        wanted (`str`): `"latest"`, or the name or path of a checkpoint.

    Returns:
        `Path`: The folder, or None for `"latest"` if there is none yet, so that one command starts and resumes a run.
    """
    if wanted == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    path = Path(output_dir) / Path(wanted).name
    if not (path / PROGRESS_NAME).is_file():
        names = [checkpoint.name for checkpoint in list_checkpoints(output_dir)]
        raise ValueError(f"resume_from_checkpoint is {wanted!r}, but {output_dir} holds {names or 'no checkpoint'}.")
    return path


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    save_state: Callable[[Path], None],
    progress: dict,
    *,
    is_main_process: bool,
    wait_for_everyone: Callable[[], None],
    total_limit: int | None = None,
) -> Path:
    """
    Write `checkpoint-<step>`; every process must call this, and waits until it is complete.

    Args:
        save_state (`Callable`): Writes the states into a folder, see `save_states`; called on the main process.
        progress (`dict`): What a resumed run must know; JSON.
        wait_for_everyone (`Callable`): A barrier.
        total_limit (`int`, *optional*): How many checkpoints to keep; the oldest go once the new one is safe.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f".{final.name}.partial")
    wait_for_everyone()
    if is_main_process:
        remove_leftovers(output_dir)
        partial.mkdir(parents=True)
        save_state(partial)
        (partial / PROGRESS_NAME).write_text(json.dumps(progress))
        flush_to_disk(partial)
        if final.exists():  # a run resumed from an older checkpoint passes this step again
            _remove(final)
        os.replace(partial, final)
        _flush(final.parent)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                _remove(old)
    wait_for_everyone()
    return final


def save_states(folder: Path, unet: torch.nn.Module, optimizer: Any, others: dict[str, dict], ema: Any) -> None:
    """
    Write what a training needs to go on.

    Args:
        folder (`Path`): Of the checkpoint.
        unet (`torch.nn.Module`): The weights in training, without the wrapper of several processes, so that a run can
            go on with another number of them.
        optimizer: A torch optimiser, or Accelerate's.
        others (`dict`): State dictionaries of plain numbers, strings and lists, by name.
        ema (`EMAModel`): The averaged weights.
    """
    save_file({name: tensor.contiguous() for name, tensor in unet.state_dict().items()}, folder / WEIGHTS_NAME)
    state = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value).contiguous()
        for parameter, values in state["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, folder / OPTIMIZER_NAME)
    averaged = ema.state_dict()
    shadows = {str(index): tensor.contiguous() for index, tensor in enumerate(averaged.pop("shadow_params"))}
    save_file(shadows, folder / EMA_NAME)
    states = {"optimizer": state["param_groups"], "ema": averaged, **others}
    (folder / STATES_NAME).write_text(json.dumps(states))


def load_states(folder: Path, unet: torch.nn.Module, optimizer: Any, ema: Any) -> dict[str, dict]:
    """
    Read what `save_states` wrote into network, optimiser and averaged weights.

    Returns:
        `dict`: The `others`.

    Raises:
        ValueError: If a file is missing or damaged, or holds the states of another network.
    """
    unet.load_state_dict(_tensors(folder / WEIGHTS_NAME))
    states = read_json(folder / STATES_NAME)
    state: dict[int, dict] = {}
    for key, value in _tensors(folder / OPTIMIZER_NAME).items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": states.pop("optimizer")})
    shadows = _tensors(folder / EMA_NAME)
    ema.load_state_dict(states.pop("ema") | {"shadow_params": [shadows[str(index)] for index in range(len(shadows))]})
    return states


def read_json(path: Path) -> Any:
    """
    A file of a training folder.

    Raises:
        ValueError: If it is no JSON; the sentence names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged ({error}): it must be JSON as this package wrote it.") from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint is {path.parent.name!r}, which has no {path.name}: checkpoints of version 0.1 "
            "cannot be continued, so begin anew in another folder."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from error


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Delete what a killed run was writing or deleting."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(path)


def flush_to_disk(folder: Path) -> None:
    """fsync every file and folder below a folder, so that a rename after it cannot overtake the content."""
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(Path(root) / name)
        _flush(Path(root))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)
