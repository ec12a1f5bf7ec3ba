"""Names: of sources in sentences, of splits and of files."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = ("train", "validation", "test", "val", "valid", "dev")


def choose_split(splits: Sequence[str] | Mapping, split: str | None, source: Any) -> str:
    """The split that was asked for, or the only one there is; `source` is named in the error."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None:
        raise ValueError(
            f"source {name_of(source)} has several splits and split is None; {', '.join(splits)} are accepted."
        )
    if split not in splits:
        raise ValueError(
            f"split is {split!r}, which source {name_of(source)} lacks; {', '.join(splits)} are accepted."
        )
    return split


def no_rows(source: Any, split: str) -> ValueError:
    """What to raise where a split is empty."""
    return ValueError(f"source {name_of(source)} has no rows in split {split!r}; at least one is accepted.")


def name_of(source: Any) -> str:
    """A source in a sentence: its path or id, or what kind of object it is."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"({type(source).__name__})"


def split_of(file: Path) -> str:
    """The split that a Parquet file belongs to, by its name."""
    shard = re.fullmatch(r"(\w+(?:\.\w+)*)-\d+(-of-\d+)?(-[0-9a-f]+)?", file.stem)
    if shard:
        return shard[1]
    for name in (file.stem.split("-")[0], file.parent.name):
        if name in SPLIT_NAMES:
            return name
    return "train"


def is_visible(name: str) -> bool:
    """Whether a file or folder is meant to be seen, and no leaving of an archive."""
    return name[0] != "." and name != "__MACOSX"


def natural_key(path: Path) -> tuple:
    """Numbers compare as numbers; equal numbers written differently ("1", "01") fall back to the text."""
    # Splitting by digits alternates text and number, so that text never meets a number in a comparison.
    parts = [[int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", part)] for part in path.parts]
    return parts, path.as_posix()
