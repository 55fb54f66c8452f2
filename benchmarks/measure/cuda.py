"""Times candidates on a GPU, by device events or as CUDA graphs.

A call starts with a cold L2 cache, as it would in a model whose other layers ran in between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.measure.rounds import Candidate, functions_of, orders
from benchmarks.measure.timings import Failure, Measurements, Timing

_flush_buffer: torch.Tensor | None = None


def _flush_l2() -> None:
    """Reads more than L2 holds, then keeps the GPU busy while the host enqueues the call.

    Reads, because overwriting leaves L2 full of lines that the call to be timed must write back first.
    """
    global _flush_buffer
    if _flush_buffer is None:
        size = max(256 * 2**20, 3 * l2_bytes())
        _flush_buffer = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    _flush_buffer.amax()
    # About half a millisecond: without it a short kernel's time would contain the host's.
    torch.cuda._sleep(1_000_000)


def l2_bytes() -> int:
    """Bytes of the current CUDA device's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(), "L2_cache_size", 64 * 2**20))


def copies_beyond_cache(nbytes: int, device: str | torch.device) -> int:
    """Copies of an operand of `nbytes` that exceed the L2 cache three times (1 on the CPU)."""
    if torch.device(device).type != "cuda":
        return 1
    return max(1, min(64, -(-3 * l2_bytes() // max(1, nbytes))))


def capture(functions: Sequence[Callable[[], object]], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls that take turns through `functions`, after a few to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions[:2]:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(calls):
            functions[i % len(functions)]()
    return captured


def measure_cuda(
    candidates: Mapping[str, Candidate],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    graph: bool,
) -> Measurements:
    """As :func:`benchmarks.measure.interleaved.measure`, by device events, with a cold L2 cache."""
    results = Measurements()
    # name -> (function that enqueues one sample, calls in a sample, note)
    samplers: dict[str, tuple[Callable[[], object], int, str]] = {}
    round_time = 0.0
    for name, candidate in candidates.items():
        functions = functions_of(candidate)
        note = ""
        try:
            for function in functions:
                function()
            torch.cuda.synchronize()
            start = time.perf_counter()
            functions[0]()
            torch.cuda.synchronize()
            once = time.perf_counter() - start
            sampler, calls = functions[0], 1
            if graph:
                calls = len(functions) * max(1, -(-20 // len(functions)))
                try:
                    sampler = capture(functions, calls).replay
                    sampler()
                    torch.cuda.synchronize()
                except Exception as error:
                    torch.cuda.synchronize()
                    calls, note = (
                        1,
                        f"not capturable ({Failure.of(error).reason}): host time included",
                    )
        except Exception as error:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            results[name] = Failure.of(error)
            continue
        samplers[name] = (sampler, calls, note)
        round_time += once * calls + 8e-4
    if not samplers:
        return results
    count = max(min_rounds, min(max_rounds, int(seconds / max(round_time, 1e-6))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in samplers}
    for order in orders(list(samplers), count):
        for name in order:
            sampler, calls, _ = samplers[name]
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            _flush_l2()
            start.record()
            sampler()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    for name, pairs in events.items():
        _, calls, note = samplers[name]
        samples = tuple(start.elapsed_time(end) * 1e-3 / calls for start, end in pairs)
        results[name] = Timing(samples, note)
    return results
