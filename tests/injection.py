"""An exception at every line: what it leaves behind must be the old state or the new one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torchao_superblock

PACKAGE = str(Path(torchao_superblock.__file__).parent)


class Interruption(BaseException):
    """What is raised; like KeyboardInterrupt, nobody who catches Exception catches it."""


def interrupt(function: Callable[[], object], at: int, error: type[BaseException]) -> bool:
    """Run a function and raise `error` at the `at`-th line of the package that runs; whether it got that far."""
    lines = 0
    fired = False

    def trace(frame, event, argument):
        nonlocal lines, fired
        if fired or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            if lines == at:
                fired = True
                raise error("injected")
            lines += 1
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except BaseException:
        if not fired:
            raise
    finally:
        sys.settrace(previous)
    return fired


def each_interruption(
    prepare: Callable[[], Callable[[], object]],
    step: int,
    error: type[BaseException] = Interruption,
) -> Iterator[int]:
    """Yield after each run that was interrupted, at every `step`-th line.

    Args:
        prepare: makes everything anew and returns the function to interrupt.
        step: 1 for every line.
        error: what to raise.
    """
    at = 0
    while interrupt(prepare(), at, error):
        yield at
        at += step
    assert at > 0
