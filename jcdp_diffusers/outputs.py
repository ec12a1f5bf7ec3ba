"""
What commands write: files that are replaced whole or not at all, in folders that hold nothing of anybody else.

A file is written under a temporary name beside it, flushed to the disk and renamed. A rename replaces a link itself
and never writes to what the link names.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path


def public_name(source: str | os.PathLike) -> str:
    """
    What a card or report calls a source.

    Args:
        source (`str` or `os.PathLike`): A Hub id stays as it is. Of a path, which may tell more than its owner wants
            to publish, the last part remains.
    """
    path = Path(source)
    return printable(path.resolve().name if path.is_absolute() or path.exists() else str(source))


def printable(text: str) -> str:
    """
    A text from outside as a line that no terminal obeys.

    Args:
        text (`str`): Control characters in it, line breaks among them, become escapes such as `\\x1b`, and bytes that
            are no UTF-8 question marks.
    """
    text = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write or replace a file, whole or not at all.

    The block writes to the path that it is given. After it, the file is flushed to the disk and gets its name. If the
    block raises, nothing remains of it.

    Args:
        path (`str` or `os.PathLike`): Of the file; its folder must exist.

    Returns:
        `Path`: Of the temporary file, in the same folder. Its name begins with a dot, so that readers of a data set
        pass it over, has no suffix that a format could be read from, and is short where the file's is as long as a
        disk takes.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """
    Write or replace a file, whole or not at all; see `replacing`.

    Args:
        path (`str` or `os.PathLike`): Of the file; its folder must exist.
        content (`str` or `bytes`): All that the file holds; text is written as UTF-8.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_output_folder(
    output: str | os.PathLike,
    *,
    marks: Sequence[str],
    own: Sequence[str] = (),
    sources: Mapping[str, object] | None = None,
    holds_sources: bool = False,
    name: str = "output_dir",
) -> None:
    """
    Refuse a folder in which a command could damage what is not its own.

    Accepted are a folder that does not exist, an empty one, and one in which the same command was begun.

    Args:
        output (`str` or `os.PathLike`): The folder. It may itself be a link, but must not hold any.
        marks (`Sequence[str]`): Names of files or folders that the command makes first; one of them tells a folder in
            which it was begun.
        own (`Sequence[str]`): Patterns of the other names that the command writes into the folder. Names that begin
            with a dot are passed over.
        sources (`dict`, *optional*): What the command reads, by argument; whatever is no path of this machine, such as
            a Hub id, is passed over.
        holds_sources (`bool`): Whether sources may lie inside the folder.
        name (`str`): Of the argument or option, for the error.

    Raises:
        ValueError: If the folder is a source, lies in one or holds one; if it holds other files, or a link; or if it
            is no folder, or a URL.
    """
    _check_place(output, sources or {}, holds_sources, name)
    if not os.path.lexists(output):
        return
    if not os.path.isdir(output):
        raise ValueError(f"{name} is {str(output)!r}, but must be a folder or a path where there is nothing yet.")
    entries = sorted(entry for entry in os.listdir(output) if not entry.startswith("."))
    begun = any(os.path.lexists(os.path.join(output, mark)) for mark in marks)
    foreign = [entry for entry in entries if not begun or not any(fnmatch(entry, one) for one in (*marks, *own))]
    if foreign:
        raise ValueError(
            f"{name} is {str(output)!r}, which holds {foreign[0]!r}, but must be empty or a folder in which the same "
            "command was begun, without other files."
        )
    for link in _links(output):
        raise ValueError(
            f"{name} is {str(output)!r}, which holds the link {os.path.relpath(link, output)!r}, but must not hold "
            "links: they would lead to files elsewhere."
        )


def check_output_file(
    output: str | os.PathLike, *, sources: Mapping[str, object] | None = None, name: str = "output"
) -> None:
    """
    Refuse a path where writing a file could damage what is not the command's own.

    Args:
        output (`str` or `os.PathLike`): The file; whether one that exists is the command's own is for its format to
            say.
        sources, name: As for `check_output_folder`.

    Raises:
        ValueError: If the path is a source or lies in one, or is a link or anything else that is no regular file.
    """
    _check_place(output, sources or {}, False, name)
    if os.path.islink(output) or (os.path.lexists(output) and not os.path.isfile(output)):
        raise ValueError(
            f"{name} is {str(output)!r}, but must be a regular file or a path where there is nothing yet."
        )


def check_apart(
    output: str | os.PathLike,
    *,
    sources: Mapping[str, object],
    outputs: Mapping[str, str | os.PathLike] | None = None,
    name: str,
) -> None:
    """
    Refuse a path that is that of a source or of another output, lies in one or holds one.

    Args:
        output, sources, name: As for `check_output_folder`.
        outputs (`dict`, *optional*): Other paths that the command writes, by argument, whether or not they exist yet.
    """
    _check_place(output, sources, False, name)
    for argument, other in (outputs or {}).items():
        if (relation := _relation(output, other, False)) is not None:
            raise ValueError(f"{name} is {str(output)!r}, which {relation} {argument}, but must be another path.")


def _check_place(output, sources: Mapping[str, object], holds_sources: bool, name: str) -> None:
    """Refuse a URL, and a place where a source would be written to."""
    if "://" in os.fspath(output):
        raise ValueError(f"{name} is {str(output)!r}, but must be a path of this machine: no URL is written to.")
    for argument, source in sources.items():
        if not isinstance(source, (str, os.PathLike)) or not os.path.exists(source):
            continue
        if (relation := _relation(output, source, holds_sources)) is not None:
            raise ValueError(
                f"{name} is {str(output)!r}, which {relation} {argument}, but must be another path: what is read must "
                "stay as it is."
            )


def _relation(output: str | os.PathLike, other: str | os.PathLike, may_hold: bool) -> str | None:
    """How one path lies to another, in words; None where they are apart."""
    place, read = Path(os.path.realpath(output)), Path(os.path.realpath(other))
    if place == read:
        return "is that of"
    if place.is_relative_to(read):
        return "lies inside that of"
    return "holds that of" if read.is_relative_to(place) and not may_hold else None


def _links(folder: str | os.PathLike) -> Iterator[str]:
    """All symbolic links in a folder, at any depth; none is followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir(follow_symlinks=False):
                yield from _links(entry.path)
