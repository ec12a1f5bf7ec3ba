"""The output folder: on a local disk, or wherever else fsspec can write to (`s3://`, `gs://`, `hf://`, `memory://`)."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..outputs import replacing, write_atomically


STATE = ".purify"  # with a leading dot, readers of the data set pass it by


class Folder:
    """
    A folder whose files appear whole or not at all.

    On a local disk a file is written under another name, flushed and renamed. Elsewhere it is uploaded in one piece,
    and the record that names it is written last.

    Args:
        url (`str` or `os.PathLike`): A path, or a URL of fsspec.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = os.fspath(url)
        self.fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def make(self, *folders: str) -> None:
        """Make the folder and these in it; object stores need none."""
        for name in folders:
            self.fs.makedirs(self.path(name), exist_ok=True)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def url_of(self, name: str) -> str:
        """What `datasets` opens."""
        return self.path(name) if self.local else self.fs.unstrip_protocol(self.path(name))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Files directly in a folder, without its name; hidden ones only if the pattern begins with a dot."""
        self.fs.invalidate_cache()
        paths = (path.rpartition("/")[2] for path in self.fs.glob(f"{self.path(folder)}/{pattern}"))
        return sorted(name for name in paths if name.startswith(".") == pattern.startswith("."))

    def read(self, name: str) -> str:
        return self.fs.cat_file(self.path(name)).decode()

    def write(self, name: str, text: str) -> None:
        """Write or replace a file."""
        if self.local is None:
            self.fs.pipe_file(self.path(name), text.encode())
            return
        write_atomically(self.local / name, text)

    def put(self, temporary: Path, name: str) -> None:
        """Move a complete local file to its place."""
        if self.local is None:
            self.fs.put_file(os.fspath(temporary), self.path(name))
            temporary.unlink()
            return
        with replacing(self.local / name) as place:
            os.replace(temporary, place)

    def rename(self, name: str, other: str) -> None:
        self.fs.mv(self.path(name), self.path(other))

    def remove(self, name: str) -> None:
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def digest(self, name: str) -> str:
        return digest(self.path(name), self.fs.open)

    def place_to_write(self) -> Path:
        """A local folder for what is being written: where a rename is enough to put a file into its place."""
        return self.local / STATE / "writing" if self.local else Path(tempfile.gettempdir())


def digest(path: str | os.PathLike, open=open) -> str:
    """SHA-256 of a file, local unless another `open` is given."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(folder: Folder) -> Iterator[None]:
    """Trouble with the output in one sentence that says how to go on."""
    try:
        yield
    except OSError as error:
        within = str(error.filename or "").startswith(folder.root)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and not within:
            raise
        raise OSError(
            f"output_dir {folder.url!r} cannot be written to ({os.strerror(error.errno).lower()}): mend "
            "that and give the same command again, finished shards stay."
        ) from error
