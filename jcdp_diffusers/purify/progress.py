"""The one progress bar of a purification; where stderr is no terminal, a line now and then."""

import sys

from tqdm import tqdm

from ..outputs import printable


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
        options["miniters"] = 0  # squares of an image that is not done yet are shown, too
        super().__init__(total=total, initial=done, unit=" images", disable=not show, **options)

    def add(self, images: int, rejected: int) -> None:
        """Some more images have been dealt with."""
        self.rejected += rejected
        self.set_postfix_str(f"{self.rejected} rejected", refresh=False)
        self.update(images)

    def at(self, image: str, done: int, squares: int) -> None:
        """So many squares of an image that is cut into them are purified."""
        if squares > 1:
            place = f"{printable(image)}: square {done:,} of {squares:,}"
            self.set_postfix_str(f"{self.rejected} rejected; {place}", refresh=False)
            self.update(0)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)
