"""
Training checkpoints that a kill at any moment cannot spoil.

A folder named `checkpoint-<step>` is complete: it is written under a name with a leading dot, flushed to the disk and
then renamed. A folder that is to go is renamed first, too, so no half-deleted one bears a checkpoint's name.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path


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
    save_state: Callable[[str], None],
    progress: dict,
    *,
    is_main_process: bool,
    wait_for_everyone: Callable[[], None],
    total_limit: int | None = None,
) -> Path:
    """
    Write `checkpoint-<step>`; every process must call this, because each has states of its own to save.

    Args:
        save_state (`Callable`): Writes the states of this process into a folder (`Accelerator.save_state`).
        progress (`dict`): What a resumed run must know; JSON.
        wait_for_everyone (`Callable`): A barrier.
        total_limit (`int`, *optional*): How many checkpoints to keep; the oldest go once the new one is safe.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f".{final.name}.partial")
    if is_main_process:
        remove_leftovers(output_dir)
        partial.mkdir(parents=True)
    wait_for_everyone()
    save_state(str(partial))
    wait_for_everyone()
    if is_main_process:
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
