"""Names: of sources in sentences, of files and of folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def no_rows(source: Any, split: str) -> ValueError:
    """What to raise where a split is empty."""
    return ValueError(f"source {name_of(source)} has no rows in split {split!r}; at least one is accepted.")


def name_of(source: Any) -> str:
    """A source in a sentence: its path or id, or what kind of object it is."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"({type(source).__name__})"


def folder_values(parts: Sequence[str]) -> dict[str, str | None]:
    """What folders named `key=value` say of the rows below them; the key `split` is for `splits`."""
    values = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key and key != "split":
            # As Hive, Spark and pyarrow write it.
            values[key] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return values


def is_visible(name: str) -> bool:
    """Whether a file or folder is meant to be seen, and no leaving of an archive."""
    return name[0] != "." and name != "__MACOSX"


def natural_key(path: Path) -> tuple:
    """Numbers compare as numbers; equal numbers written differently ("1", "01") fall back to the text."""
    # Splitting by digits alternates text and number, so that text never meets a number in a comparison.
    parts = [[int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", part)] for part in path.parts]
    return parts, path.as_posix()
