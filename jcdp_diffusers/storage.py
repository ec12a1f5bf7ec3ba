"""Folders on a local disk, or wherever else fsspec can read and write (`s3://`, `gs://`, `hf://`, `memory://`)."""

import fnmatch
import hashlib
import os
from pathlib import Path

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from .outputs import replacing, write_atomically


class Folder:
    """
    A folder whose files appear whole or not at all.

    On a local disk a file is written under another name, flushed and renamed. Elsewhere it is uploaded in one piece.

    Args:
        url (`str` or `os.PathLike`): A path, or a URL of fsspec.
        name (`str`): Of the argument, for the error.

    Attributes:
        fs (`DirFileSystem`): The folder as a file system: names are relative to it.
        local (`Path`, *optional*): The folder, where it is on a local disk.

    Raises:
        ValueError: If fsspec, as it is installed here, cannot open such a URL.
    """

    def __init__(self, url: str | os.PathLike, name: str = "output_dir"):
        self.url = os.fspath(url)
        try:
            whole, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # no package for this kind of URL, or no such kind
            raise ValueError(
                f"{name} is {self.url!r}, but must be a URL that fsspec can open here: {error}."
            ) from error
        self.root = self.root.rstrip("/") or "/"
        self.fs = DirFileSystem(self.root, whole)
        self.local = Path(self.root) if isinstance(whole, LocalFileSystem) else None

    def url_of(self, name: str) -> str:
        """What `datasets` opens."""
        path = f"{self.root}/{name}"
        return path if self.local else self.fs.fs.unstrip_protocol(path)

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """What lies directly in a folder, without its name; what is hidden only if the pattern begins with a dot."""
        self.fs.fs.invalidate_cache()
        try:
            found = [path.rpartition("/")[2] for path in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in fnmatch.filter(found, pattern) if name[0] != "." or pattern[0] == ".")

    def write(self, name: str, text: str) -> None:
        """Write or replace a file."""
        if self.local is None:
            self.fs.pipe_file(name, text.encode())
        else:
            write_atomically(self.local / name, text)

    def put(self, temporary: Path, name: str) -> None:
        """Move a complete local file to its place."""
        if self.local is None:
            self.fs.put_file(os.fspath(temporary), name)
            temporary.unlink()
        else:
            with replacing(self.local / name) as place:
                os.replace(temporary, place)

    def remove(self, name: str) -> None:
        if self.fs.exists(name):
            self.fs.rm_file(name)


def digest(path: str | os.PathLike, open=open) -> str:
    """SHA-256 of a file, local unless another `open` is given."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
