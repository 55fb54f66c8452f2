"""Candidates, and the order that a round takes them in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

Candidate = Callable[[], object] | Sequence[Callable[[], object]]
"""What is timed: a function without arguments, or several equivalent ones that are called in turn.

Several are given when the operands of one would stay in a cache between calls: each then works on a
copy of its own.
"""


def functions_of(candidate: Candidate) -> list[Callable[[], object]]:
    """A candidate as the list of functions that are called in turn."""
    return [candidate] if callable(candidate) else list(candidate)


def orders(names: list[str], count: int) -> Iterator[list[str]]:
    """Yields an order for each round, shuffled so that nobody always runs after the same one.

    (A rotation would not do: it leaves everyone's predecessor, whose traces in the caches and in the
    state of the threads cost the next call up to a third, as it is.)
    """
    shuffle = random.Random(0).shuffle
    for _ in range(count):
        order = list(names)
        shuffle(order)
        yield order
