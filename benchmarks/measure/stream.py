"""Times what a loop of calls takes by the wall clock: whichever of host and GPU is slower."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure.host import measure_host
from benchmarks.measure.interleaved import measure
from benchmarks.measure.quiet import quiet
from benchmarks.measure.timings import Failure, Measurements

SAMPLE = 0.05
"""Seconds of the slowest candidate's sample on a GPU: many calls of a small model, two of a large one."""


def measure_stream(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float
) -> Measurements:
    """Wall-clock seconds per call in a loop of calls, candidates interleaved.

    For whole models: their weights do not fit into a cache, and a user waits for the host as for the GPU.

    Args:
        candidates: what to time, by name, warmed up.
        device: where they compute.
        seconds: for all candidates together; five rounds are run even if they take longer.
    """
    if device.type != "cuda":
        return measure(candidates, device, seconds=seconds, min_rounds=5)
    once: dict[str, float] = {}
    failed = Measurements()
    with quiet():
        for name, call in candidates.items():
            try:
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                once[name] = time.perf_counter() - start
            except Exception as error:
                failed[name] = Failure.of(error)
    if not once:
        return failed
    calls = max(2, min(50, int(SAMPLE / max(once.values()))))
    rounds = max(5, min(40, int(seconds / (calls * sum(once.values())))))
    present = {name: candidates[name] for name in once}
    measured = measure_host(present, calls=calls, rounds=rounds, wait=True, warm=calls)
    measured.update(failed)
    return measured
