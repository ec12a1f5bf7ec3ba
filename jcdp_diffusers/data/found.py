"""What a reader passes over, and why: counted, and said once in one sentence."""

import functools
import logging
from collections.abc import Sequence


logger = logging.getLogger(__name__)  # without a handler of the program's own, warnings go to stderr


class PassedOver:
    """
    Counts what a source holds and a reader does not read.

    Args:
        source (`str`): The source, as sentences call it.
    """

    def __init__(self, source: str):
        self.source = source
        self.reasons: dict[str, list[str]] = {}

    def add(self, name: str, reason: str) -> None:
        """Count `name` (a file, a column, an array) under `reason`."""
        self.reasons.setdefault(reason, []).append(name)

    def __len__(self) -> int:
        return sum(len(names) for names in self.reasons.values())

    def say(self, read: int, what: str) -> None:
        """
        Say how much was read and what was not, as a warning if anything was passed over.

        Args:
            read (`int`): How many of `what` are read.
            what (`str`): A plural, such as `"images"`.
        """
        reasons = "; ".join(f"{_few(names)} ({reason})" for reason, names in self.reasons.items())
        passed = f", {len(self)} passed over: {reasons}" if self.reasons else ", nothing passed over"
        say_once(f"source {self.source}: {read} {what} read{passed}.", warn=bool(self.reasons))


@functools.lru_cache(maxsize=1024)
def say_once(sentence: str, *, warn: bool = True) -> None:
    """Log a sentence, each only once in a process: a command may open the same source several times."""
    logger.log(logging.WARNING if warn else logging.INFO, "%s", sentence)


def _few(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{len(names)}, the first {names[0]!r}"
