"""
Files of a training folder, read as if a stranger had written them: JSON and safetensors, checked, never unpickled.

Whatever is wrong with a file, the error is one sentence that names it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_json(path: Path, expected: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`Path`): The file.
        expected (`dict`): Type of each entry that must be there; `"data.num_images"` is one of an object within it.

    Raises:
        ValueError: If the file is no JSON object, or lacks an entry of the type expected.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or thousands of brackets
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__} instead of an object")
    for name, kind in expected.items():
        value: Any = content
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise damaged(path, f"{name} is missing")
            value = value[part]
        # True is an int in Python, but no number in JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise damaged(path, f"{name} is a {type(value).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    Read a safetensors file, onto the CPU.

    Raises:
        ValueError: If the file is no safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, error) from error


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turns what a library says about unsuitable content into an error that names the file it came from."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: Exception | str) -> ValueError:
    """The error about a file; libraries explain at length, so only their first line is quoted."""
    first_line = str(reason).strip().split("\n")[0].rstrip(".:")
    kind = "JSON" if path.suffix == ".json" else "safetensors"
    return ValueError(f"{path} is damaged ({first_line}), but must be {kind} as this package writes it.")
