"""An exception at every line: what it leaves behind must be the old state or the new one."""

from collections.abc import Callable, Iterator

from benchmarks.faults.injection import Lines


class Interruption(BaseException):
    """What is raised; like KeyboardInterrupt, nobody who catches Exception catches it."""


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
    fired: list[int] = []

    def act() -> None:
        fired.append(at)
        raise error("injected")

    at = 0
    while True:
        run = Lines(prepare(), at + 1, act)
        if at not in fired:
            if run.raised is not None:
                raise run.raised
            break
        yield at
        at += step
    assert at > 0
