"""Whole models side by side: every form in every way of running it, timed in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.cells.question import Row, Tick
from benchmarks.measure import cuda
from benchmarks.measure.quiet import quiet
from benchmarks.measure.stream import measure_stream
from benchmarks.measure.timings import Failure, Measurements

EAGER, COMPILED, GRAPH, COMPILED_GRAPH = "eager", "compiled", "graph", "compiled graph"
WAYS = (EAGER, COMPILED, GRAPH, COMPILED_GRAPH)
LARGEST_ERROR = 0.1
"""Two computations of a deep model in bfloat16 differ by some hundredths; the time of anything worse says nothing."""

Step = Callable[[str, Callable[..., Any]], object]
"""One step of a side: its name, and what to call in the place of its model."""


def ways_on(device: torch.device, ways: Sequence[str]) -> tuple[str, ...]:
    """`ways` as far as the device has them: without graphs on a CPU."""
    if device.type == "cuda":
        return tuple(ways)
    plain = {GRAPH: EAGER, COMPILED_GRAPH: COMPILED}
    return tuple(dict.fromkeys(plain.get(way, way) for way in ways))


def replay(call: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph."""
    return cuda.capture([call]).replay


def measure_models(
    sides: Mapping[str, nn.Module | Failure],
    step: Step,
    ways: Sequence[str],
    device: torch.device,
    *,
    seconds: float,
    tick: Tick,
    no_graphs: Collection[str] = (),
    backend: str = "inductor",
    replay: Callable[[Callable[[], object]], Callable[[], object]] = replay,
) -> Measurements:
    """Times every side in every way, under whatever grad mode is active here.

    Args:
        sides: models by name, or why there is none.
        step: what is timed.
        ways: some of `EAGER`, `COMPILED` (torch.compile's default mode), and both as CUDA graphs.
        device: where the models are.
        seconds: for all together.
        tick: told what is being prepared.
        no_graphs: sides that are not run as graphs: a capture that fails spoils the random generator for all that
            follows, so nothing is captured that nobody has seen being captured.
        backend: of torch.compile.
        replay: makes a graph of a call.

    Returns:
        A timing or a failure for each `"side, way"`.
    """
    torch._dynamo.reset()
    calls: dict[str, Callable[[], object]] = {}
    failed = Measurements()

    def prepare(side: str, model: nn.Module, way: str) -> Callable[[], object]:
        runs: Callable[..., Any] = model
        if way in (COMPILED, COMPILED_GRAPH):
            runs = torch.compile(model, dynamic=False, backend=backend)
        call = lambda: step(side, runs)
        for _ in range(2):
            call()
        return replay(call) if way in (GRAPH, COMPILED_GRAPH) else call

    # Every side is a recompilation of the same code, and the limit is 8.
    with torch._dynamo.config.patch(recompile_limit=32), quiet():
        for side, model in sides.items():
            for way in ways:
                if side in no_graphs and way in (GRAPH, COMPILED_GRAPH):
                    continue
                name = f"{side}, {way}"
                tick(name)
                if isinstance(model, Failure):
                    failed[name] = model
                    continue
                try:
                    calls[name] = prepare(side, model, way)
                except Exception as error:  # the other candidates are still worth having
                    failed[name] = Failure.of(error)
        tick("measuring")
        measured = measure_stream(calls, device, seconds=seconds)
    measured.update(failed)
    return measured


def fastest(measured: Measurements, side: str) -> str:
    """Name of the fastest candidate whose name starts with `side`.

    Raises:
        RuntimeError: none could be timed; with the reasons.
    """
    times = {
        name: timing.median
        for name in measured
        if name.startswith(side + ",") and (timing := measured.timing(name)) is not None
    }
    if not times:
        reasons = {n: measured.failure(n) for n in measured if n.startswith(side + ",")}
        raise RuntimeError(f"nothing to time for {side}: {reasons}")
    return min(times, key=times.__getitem__)


def row_of(measured: Measurements, sides: Sequence[str], ways: Sequence[str]) -> Row:
    """Times and ratios of measured models.

    Args:
        measured: by :func:`measure_models`.
        sides: `"dense"`, `"ours"` and any others.
        ways: in which they were run.

    Returns:
        The best of `dense` and `ours`, which way that is, and their ratio; the ratio of the two run in the same way;
        the ratio of the best dense to the best of each other side, or "fails"; and what failed.
    """
    dense, ours = fastest(measured, "dense"), fastest(measured, "ours")
    row: Row = {
        "dense ms": measured.milliseconds(dense),
        "dense is": dense.partition(", ")[2],
        "ours ms": measured.milliseconds(ours),
        "ours is": ours.partition(", ")[2],
        "ours x": measured.speedup_value(dense, ours),
    }
    for way in ways:
        row[f"{way} x"] = measured.speedup_value(f"dense, {way}", f"ours, {way}")
    for side in sides:
        if side not in ("dense", "ours"):
            try:
                row[f"{side} x"] = measured.speedup_value(dense, fastest(measured, side))
            except RuntimeError:  # the reason is in the last column
                row[f"{side} x"] = "fails"
    reasons = {name: reason for name in measured if (reason := measured.failure(name))}
    row["failures"] = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return row
