"""Times what a call costs the host: Python, the dispatcher, the launch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure.quiet import quiet
from benchmarks.measure.rounds import orders
from benchmarks.measure.timings import Failure, Measurements, Timing


def measure_host(
    candidates: Mapping[str, Callable[[], object]],
    *,
    calls: int = 50,
    rounds: int = 40,
    wait: bool = False,
    warm: int = 20,
) -> Measurements:
    """Host seconds per call: what Python, the dispatcher and the launch cost.

    Args:
        candidates: small calls whose work is enqueued, by name.
        calls: calls per sample, few enough that the launch queue never fills.
        rounds: samples of each candidate.
        wait: include the wait for the GPU at the end of a sample: the time per call of an eager
            stream of calls, whichever of host and GPU is slower.
        warm: calls of each candidate before the first sample.
    """
    results = Measurements()
    samples: dict[str, list[float]] = {}
    with quiet():
        for name, function in candidates.items():
            try:
                for _ in range(warm):
                    function()
                samples[name] = []
            except Exception as error:
                results[name] = Failure.of(error)
        enabled = gc.isenabled()
        gc.disable()
        try:
            for order in orders(list(samples) or [""], rounds if samples else 0):
                for name in order:
                    function = candidates[name]
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(calls):
                        function()
                    if wait and torch.cuda.is_available():
                        torch.cuda.synchronize()
                    samples[name].append((time.perf_counter() - start) / calls)
        finally:
            if enabled:
                gc.enable()
    results.update({name: Timing(tuple(values)) for name, values in samples.items()})
    return results
