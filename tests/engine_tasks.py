"""Tasks for the tests of engines: each leaves one file, and a line about who wrote it."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jcdp_diffusers import engines


@dataclass(frozen=True)
class Square:
    """Writes the square of a number. `ends` says how it fails: with an error, or by a signal on the first try."""

    folder: Path
    number: int
    ends: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"square-{self.number}"

    def is_done(self) -> bool:
        return (self.folder / self.name).exists()

    def run(self, worker: str) -> int:
        time.sleep(self.seconds)
        if self.ends == "error":
            raise ValueError(f"number is {self.number},\nbut must be another.")
        tried = self.folder / f"tried-{self.number}"
        if self.ends == "always killed" or (self.ends == "killed" and not tried.exists()):
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.folder / "log", "a") as log:
            log.write(f"{self.number} {os.getpid()} {worker}\n")
        temporary = self.folder / f".{self.name}.{os.getpid()}"
        temporary.write_text(str(self.number**2))
        temporary.rename(self.folder / self.name)
        return self.number**2


def open_worker(folder: Path) -> str:
    """A worker is its number in the order of opening, as the log has it."""
    with open(folder / "opened", "a") as log:
        log.write(f"{os.getpid()}\n")
    return f"opened by {os.getpid()}"


def cannot_open() -> None:
    raise OSError("purifier is 'nowhere', but must be a folder.")


def ends_at_once() -> None:
    os._exit(3)


def squares(folder: Path) -> dict[int, int]:
    return {int(path.name.split("-")[1]): int(path.read_text()) for path in folder.glob("square-*")}


def on_ranks() -> None:
    """What a rank of the test runs: the tasks named by the command line, in the folder that it names."""
    folder, ends = Path(sys.argv[1]), sys.argv[2]
    tasks = [Square(folder, number, ends if number == 5 else "") for number in range(12)]
    said = engines.first_rank_decides(lambda: f"rank {engines.ranks()[0]}")
    try:
        engines.run(tasks, open_worker=partial(open_worker, folder))
    except RuntimeError as error:
        said += f": {error}"
    (folder / f"said-{engines.ranks()[0]}").write_text(said)


if __name__ == "__main__":
    on_ranks()
