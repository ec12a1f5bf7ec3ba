"""The files below a folder: regular ones only, without walking in circles or out of the folder."""

import os
from pathlib import Path

from .found import PassedOver
from .names import is_visible, name_of


# What stands beside data and is none, written by us or by `datasets`.
DOCUMENTS = (
    "README",
    "LICENSE",
    "CITATION",
    "run.json",
    "dataset_info",
    "dataset_dict.json",
    "report.",
    "summary.json",
)
REJECTED = "rejected"  # where a purified set keeps the rows that could not be used


def files_below(
    source: Path, suffixes: tuple[str, ...], names: tuple[str, ...], passed: PassedOver, *, deep: bool = True
) -> list[Path]:
    """
    Files by suffix or name, relative to `source`, in no order.

    Hidden files, and folders that are hidden or begin with two underscores, are no part of a data set, as in
    `datasets`. Links to folders are never followed.

    Args:
        source (`Path`): A folder.
        suffixes (`tuple`): Endings of the files wanted, in small letters, with the dot.
        names (`tuple`): Whole names of further files wanted.
        passed (`PassedOver`): Takes the other files.
        deep (`bool`): Whether to look into folders.

    Raises:
        ValueError: If a wanted file's name is not UTF-8, or a link leads out of the folder or to another part of it.
    """
    root, found, places = allowed_root(source), [], [source]
    while places:
        with os.scandir(places.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path).relative_to(source)
                wanted = entry.name.lower().endswith(suffixes) or entry.name in names
                if not is_visible(entry.name):
                    continue
                if entry.is_symlink() and not _usable_link(source, path, root, wanted, passed):
                    continue
                if entry.is_dir():
                    if deep and not entry.name.startswith("__"):
                        places.append(Path(entry.path))
                    elif not deep and entry.name != REJECTED:
                        passed.add(f"{path.as_posix()}/", "folders beside files of rows are not read")
                elif not entry.is_file():
                    passed.add(path.as_posix(), "no regular file")
                elif not wanted and entry.name.startswith(DOCUMENTS):
                    continue
                elif not wanted:
                    passed.add(path.as_posix(), f"{path.suffix or 'nameless'} files are not read here")
                else:
                    _check_name(source, path)
                    found.append(path)
    return found


def allowed_root(source: Path) -> Path:
    """Where the files of a source may lie: in itself, or for a snapshot of the Hub's cache its repository."""
    resolved = source.resolve()
    for place in (resolved, *resolved.parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
            return place.parent.parent
    return resolved


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path is a regular file that, with all links followed, lies below `root`."""
    target = path.resolve()
    return target.is_relative_to(root) and target.is_file()


def _usable_link(source: Path, path: Path, root: Path, wanted: bool, passed: PassedOver) -> bool:
    """Whether a link is to be taken for the file behind it."""
    try:
        target = (source / path).resolve(strict=True)
    except (OSError, RuntimeError):  # a link to itself is a RuntimeError before Python 3.13
        passed.add(path.as_posix(), "a link to nothing")
        return False
    if target.is_dir():
        if (source / path).parent.resolve().is_relative_to(target):
            passed.add(path.as_posix(), "a link in a circle")
            return False
        raise ValueError(
            f"source {name_of(source)} holds the link {path.as_posix()!r} to the folder {str(target)!r}; folders "
            "themselves are accepted."
        )
    if wanted and not target.is_relative_to(root):
        raise ValueError(
            f"source {name_of(source)} holds the link {path.as_posix()!r} to {str(target)!r}, which lies outside of "
            "it; regular files are accepted."
        )
    return True


def _check_name(source: Path, path: Path) -> None:
    try:
        path.as_posix().encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"source {name_of(source)} holds {path.as_posix()!r}, whose name is not UTF-8; names in UTF-8 are "
            "accepted."
        ) from error
