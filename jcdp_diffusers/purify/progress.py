"""The one progress bar of a purification; where stderr is no terminal, a line now and then."""

import sys

from tqdm import tqdm


SECONDS_BETWEEN_LINES = 30.0


class Progress(tqdm):
    """
    Images done, at what rate, what remains and how many were rejected.

    Args:
        total (`int`, *optional*): Number of images; None if nobody knows.
        done (`int`): Images that were done before.
        show (`bool`): False says nothing at all.
    """

    def __init__(self, total: int | None, done: int, *, show: bool = True):
        self.lines, self.rejected = not sys.stderr.isatty(), 0
        interval = SECONDS_BETWEEN_LINES if self.lines else 0.1
        options = {"mininterval": interval, "smoothing": 0, "dynamic_ncols": not self.lines, "file": sys.stderr}
        super().__init__(total=total, initial=done, unit=" images", disable=not show, **options)

    def add(self, images: int, rejected: int) -> None:
        """Some more images have been dealt with."""
        self.rejected += rejected
        self.set_postfix_str(f"{self.rejected} rejected", refresh=False)
        self.update(images)

    def at(self, image: str, done: int, squares: int) -> None:
        """So many squares of an image that is cut into them are purified."""
        if self.disable or squares == 1:
            return
        self.set_postfix_str(f"{self.rejected} rejected; {image}: square {done:,} of {squares:,}", refresh=False)
        if self._time() - self.last_print_t >= self.mininterval:
            self.last_print_t = self._time()
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)
