"""Times candidates on the CPU, by the wall clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

from benchmarks.measure.rounds import Candidate, functions_of, orders
from benchmarks.measure.timings import Failure, Measurements, Timing


def measure_cpu(
    candidates: Mapping[str, Candidate], seconds: float, min_rounds: int, max_rounds: int
) -> Measurements:
    """As :func:`benchmarks.measure.interleaved.measure`, by the wall clock."""
    shortest_sample = (
        2e-3  # one sample is at least this long: the clock and a stray interrupt do not matter then
    )
    results = Measurements()
    samplers: dict[str, Callable[[], float]] = {}
    round_time = 0.0
    for name, candidate in candidates.items():
        functions = functions_of(candidate)
        try:
            for function in functions:
                function()
            start = time.perf_counter()
            functions[0]()
            first = time.perf_counter() - start
            calls = max(1, round(shortest_sample / max(first, 1e-7)))
            start = time.perf_counter()
            for i in range(calls):
                functions[i % len(functions)]()
            warm = (time.perf_counter() - start) / calls
        except Exception as error:
            results[name] = Failure.of(error)
            continue
        calls = max(len(functions), round(shortest_sample / max(warm, 1e-7)), 1)
        if len(functions) > 1:
            calls -= calls % len(functions)

        def sample(functions: list[Callable[[], object]] = functions, calls: int = calls) -> float:
            cycle = functions * (calls // len(functions))
            start = time.perf_counter()
            for function in cycle:
                function()
            return (time.perf_counter() - start) / calls

        samplers[name] = sample
        round_time += calls * warm
    if not samplers:
        return results
    least = min_rounds if round_time * min_rounds < 4 * seconds else 3
    count = max(least, min(max_rounds, int(seconds / max(round_time, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    # The collector would charge a pause to whoever happens to run when it starts.
    enabled = gc.isenabled()
    gc.disable()
    try:
        for order in orders(list(samplers), count):
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        if enabled:
            gc.enable()
    results.update({name: Timing(tuple(values)) for name, values in samples.items()})
    return results
