"""Times candidates interleaved: every round each of them once, in a random order.

A machine that slows down half-way slows all of them down, and the ratio of two candidates is taken round by
round. So a result is a ratio from one run; milliseconds are there to judge the ratio. A candidate that
fails is reported with the reason instead of aborting the run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.measure.cpu import measure_cpu
from benchmarks.measure.cuda import measure_cuda
from benchmarks.measure.quiet import quiet
from benchmarks.measure.rounds import Candidate
from benchmarks.measure.timings import Measurements


def measure(
    candidates: Mapping[str, Candidate],
    device: str | torch.device = "cpu",
    *,
    seconds: float | None = None,
    min_rounds: int = 7,
    max_rounds: int = 60,
    graph: bool = False,
) -> Measurements:
    """Times several candidates in one interleaved run.

    Args:
        candidates: what to time, by name. Called under whatever grad mode is active here.
        device: `"cpu"` (wall clock) or `"cuda"` (device events, the L2 cache flushed before
            every call).
        seconds: wall time to spend on all candidates together; by default 1.0 on the CPU and 0.15
            on CUDA. `min_rounds` rounds are run even if they take longer.
        min_rounds: fewest rounds; a candidate that takes longer than `seconds` for one call gets
            three.
        max_rounds: most rounds.
        graph: CUDA only: time replays of a CUDA graph that holds several calls, so that host time
            does not count. Give such candidates as lists whose operands together exceed the L2
            cache (see :func:`benchmarks.measure.cuda.copies_beyond_cache`). A candidate that cannot be
            captured is timed with events and says so in its note.

    Returns:
        A :class:`Timing` or :class:`Failure` for each candidate.
    """
    device = torch.device(device)
    with quiet():
        if device.type == "cuda":
            return measure_cuda(candidates, seconds or 0.15, min_rounds, max_rounds, graph)
        return measure_cpu(candidates, seconds or 1.0, min_rounds, max_rounds)
