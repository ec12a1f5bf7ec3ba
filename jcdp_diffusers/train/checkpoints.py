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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..results import plain
from .reading import damaged, errors_name, read_json, read_tensors


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
        wanted (`str`): `"latest"`, or the name of a checkpoint, or its path in that folder.

    Returns:
        `Path`: The folder, or None for `"latest"` if there is none yet, so that one command starts and resumes a run.
    """
    if wanted == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    path = Path(output_dir) / Path(wanted).name
    elsewhere = Path(wanted).name != wanted and Path(wanted).resolve() != path.resolve()
    if elsewhere or not (path / PROGRESS_NAME).is_file():
        names = [checkpoint.name for checkpoint in list_checkpoints(output_dir)]
        raise ValueError(f"resume_from_checkpoint is {wanted!r}, but {output_dir} holds {names or 'no checkpoint'}.")
    return path


def check_form(checkpoint: Path) -> None:
    """
    Refuse a checkpoint of another form than `save_checkpoint` and `save_states` write.

    Raises:
        ValueError: If a file is missing; the sentence names it.
    """
    for name in (PROGRESS_NAME, WEIGHTS_NAME, OPTIMIZER_NAME, EMA_NAME, STATES_NAME):
        if not (checkpoint / name).is_file():
            raise ValueError(
                f"resume_from_checkpoint is {checkpoint.name!r}, which has no {name}: pickled checkpoints of earlier "
                "versions are not read, so begin anew in another folder."
            )


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
        total_limit (`int`, *optional*): How many checkpoints to keep: the new one and, once it is safe, the others of
            the highest steps, which are of an earlier run where this one went on from an older checkpoint.
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
            others = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint != final]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                _remove(old)
    wait_for_everyone()
    return final


def save_states(folder: Path, unet: torch.nn.Module, optimizer: Any, others: Mapping[str, Any], ema: Any) -> None:
    """
    Write what a training needs to go on.

    Args:
        folder (`Path`): Of the checkpoint.
        unet (`torch.nn.Module`): The weights in training, without the wrapper of several processes, so that a run can
            go on with another number of them.
        optimizer: A torch optimiser, or Accelerate's.
        others (`dict`): Learning rate schedule and loss scale, whose states are plain numbers and lists, by name.
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
    shadows = {str(index): tensor.contiguous() for index, tensor in enumerate(ema.shadow_params)}
    save_file(shadows, folder / EMA_NAME)
    (folder / STATES_NAME).write_text(json.dumps(_plain_states(optimizer, others, ema)))


def _plain_states(optimizer: Any, others: Mapping[str, Any], ema: Any) -> dict[str, Any]:
    """All states but tensors, in JSON's own types."""
    averaged = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
    states = {"optimizer": optimizer.state_dict()["param_groups"], "ema": averaged}
    states |= {name: part.state_dict() for name, part in others.items()}
    return plain(states, "states")


def _alike(found: Any, own: Any) -> bool:
    """Whether two values of JSON have the same structure: entries, lengths and types, not numbers."""
    if isinstance(own, dict):
        return isinstance(found, dict) and found.keys() == own.keys() and all(_alike(found[k], own[k]) for k in own)
    if isinstance(own, list):
        return isinstance(found, list) and len(found) == len(own) and all(map(_alike, found, own))
    if type(own) in (int, float):
        return type(found) in (int, float)
    return type(found) is type(own)


def load_states(folder: Path, unet: torch.nn.Module, optimizer: Any, others: Mapping[str, Any], ema: Any) -> None:
    """
    Read what `save_states` wrote; everything is checked before anything is changed.

    Args:
        others (`dict`): Learning rate schedule and loss scale, by the names that their states were saved under.

    Other arguments as in [`save_states`].

    Raises:
        ValueError: If a file is damaged or holds the states of another network; the sentence names the file.
    """
    states = read_json(folder / STATES_NAME, {})
    weights, moments, averaged = (read_tensors(folder / name) for name in (WEIGHTS_NAME, OPTIMIZER_NAME, EMA_NAME))
    parameters = list(unet.parameters())
    _check_shapes(folder / WEIGHTS_NAME, weights, {name: value.shape for name, value in unet.state_dict().items()})
    _check_shapes(
        folder / EMA_NAME, averaged, {str(index): parameter.shape for index, parameter in enumerate(parameters)}
    )
    if moments:  # none before the first step that float16's loss scale let pass
        expected = {
            f"{index}.{name}": torch.Size() if name == "step" else parameter.shape
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
        _check_shapes(folder / OPTIMIZER_NAME, moments, expected)
    own = _plain_states(optimizer, others, ema)
    if not _alike(states, own):
        names = [name for name in own if not _alike(states.get(name), own[name])] or sorted(states.keys() - own.keys())
        raise damaged(folder / STATES_NAME, f"{names[0]} has other entries than this training's")

    unet.load_state_dict(weights)
    state: dict[int, dict] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        placed = value if name == "step" else _placed(value, parameters[int(index)])
        state.setdefault(int(index), {})[name] = placed
    shadows = [_placed(averaged[str(index)], parameter) for index, parameter in enumerate(parameters)]
    optimizer.load_state_dict({"state": state, "param_groups": states["optimizer"]})
    with errors_name(folder / STATES_NAME):  # it checks ranges
        ema.load_state_dict(states["ema"] | {"shadow_params": shadows})
    for name, part in others.items():
        part.load_state_dict(states[name])


def _check_shapes(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuse the tensors of another network."""
    for name in sorted(found.keys() | expected.keys()):
        held = tuple(found[name].shape) if name in found else None
        wanted = tuple(expected[name]) if name in expected else None
        if held != wanted:
            raise damaged(path, f"the shape of {name} is {held}, where the network has {wanted}")


def _placed(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A tensor where the parameter is and in its memory format, so that a resumed run is as fast as before."""
    return torch.empty_like(parameter.detach()).copy_(value)


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
