"""The driver that raises an exception at the n-th line that the package executes.

What is raised stands for what may come at any line: no memory left (`MemoryError`, out of memory on a device) or the
user's Ctrl-C. Only lines of the package count: between two of its lines torch may fail as well, which looks the same
from here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import torchao_superblock

PACKAGE = str(Path(torchao_superblock.__file__).parent)
ERRORS = (MemoryError, KeyboardInterrupt)


class Lines:
    """Counts the lines executed in a folder while `call` runs, and acts at one of them.

    Args:
        call: what to run.
        at: the line at which to act, counted from 1; 0 acts at none.
        action: called there; what it raises is raised at that line.
        folder: only code of this folder counts.

    Attributes:
        count: lines executed.
        raised: what came out of `call`, or None.
    """

    def __init__(
        self,
        call: Callable[[], object],
        at: int = 0,
        action: Callable[[], object] = lambda: None,
        folder: str | Path = PACKAGE,
    ) -> None:
        self.count = 0
        self.raised: BaseException | None = None
        folder = str(folder)

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                self.count += 1
                if self.count == at:
                    action()
            return line

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            return line if frame.f_code.co_filename.startswith(folder) else None

        # Raised at the very line that leaves a `with torch.no_grad()`, an exception keeps it from
        # being left: Python's own gap, and no model's state.
        grad_mode = torch.is_grad_enabled()
        previous = sys.gettrace()
        sys.settrace(enter)
        try:
            call()
        except BaseException as error:
            self.raised = error
        finally:
            sys.settrace(previous)
            torch.set_grad_enabled(grad_mode)


def count_lines(call: Callable[[], object], folder: str | Path = PACKAGE) -> int:
    """Lines that `call` executes in a folder.

    Raises:
        BaseException: what `call` raises.
    """
    lines = Lines(call, folder=folder)
    if lines.raised is not None:
        raise lines.raised
    return lines.count


def interrupt(
    call: Callable[[], object], at: int, error: BaseException, folder: str | Path = PACKAGE
) -> Lines:
    """Runs `call` and raises `error` at its `at`-th line in a folder (counted from 1)."""

    def action() -> None:
        raise error

    return Lines(call, at, action, folder)


def spread(index: int, size: int) -> int:
    """The `index`-th of the numbers from 0 to `size - 1`: all once before any twice, and far apart at first."""
    step = max(1, round(size * 0.618))
    while _gcd(step, size) != 1:
        step += 1
    return index * step % size


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
