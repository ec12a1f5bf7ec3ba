"""Progress of one worker among several: a bar on a terminal, now and then a line in a log."""

import os
import sys
import time

from tqdm import tqdm


SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """
    Images done by all workers together, at what rate, what remains and what was rejected by this one.

    Args:
        total (`int`, *optional*): Number of images; None if nobody knows.
        show (`bool`): False says nothing at all.
    """

    def __init__(self, total: int | None, *, show: bool = True):
        self.total, self.rejected, self.done = total, 0, 0
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._bar = None
        self._lines = show and not sys.stderr.isatty()
        if show and not self._lines and first:  # one bar per terminal
            self._bar = tqdm(total=total, unit=" images", smoothing=0, dynamic_ncols=True)
        self._start = self._last_line = time.monotonic()
        self._before: int | None = None
        self._said = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._lines and self.done != self._before:
            self._line()
        if self._bar is not None:
            self._bar.close()

    def at(self, done: int) -> None:
        """All workers' finished shards hold so many images."""
        if self._before is None:
            self._before = done
            if self._bar is not None:
                self._bar.initial = done
        self._show(done)

    def add(self, images: int, rejected: int) -> None:
        """This worker has dealt with some more images."""
        self.rejected += rejected
        self._show(self.done + images)

    def say(self, text: str) -> None:
        """A line, unless it is the same as the last one."""
        if text == self._said:
            return
        self._said = text
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(f"[worker {os.getpid()}] {text}", file=sys.stderr, flush=True)

    def _show(self, done: int) -> None:
        self.done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(f"{self.rejected} rejected", refresh=False)
            self._bar.update(0)
        elif self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self.done - (self._before or 0)) / max(self._last_line - self._start, 1e-9)
        of = "" if self.total is None else f" of {self.total:,}"
        left = ""
        if self.total is not None and rate > 0:
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        text = f"{self.done:,}{of} images, {rate:.3g} images/s{left}, {self.rejected} rejected"
        print(f"[worker {os.getpid()}] {text}", file=sys.stderr, flush=True)
