"""How far a run is."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """A live line on stderr: position, elapsed time, current cell; on a pipe a line now and then.

    Args:
        total: number of steps.
        title: what runs.
        every: seconds between lines when stderr is not a terminal.
    """

    def __init__(self, total: int, title: str, every: float = 15.0) -> None:
        self.total, self.title, self.every = total, title, every
        self.done = 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, cell: str) -> None:
        """Announces the next cell."""
        self.done += 1
        self.show(cell)

    def show(self, cell: str) -> None:
        """Says how far the current cell is."""
        now = time.monotonic()
        text = f"{self.title} [{self.done}/{self.total}] {now - self.start:5.0f} s  {cell}"
        if self.terminal:
            # A line that wraps cannot be overwritten.
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif now - self.last > self.every:
            self.last = now
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self.terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
