"""Counts the CUDA kernels of a step."""

from __future__ import annotations

import collections
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.measure.quiet import quiet


def launched_kernels(step: Callable[[], object]) -> collections.Counter[str]:
    """Names of the CUDA kernels of one step, with how often each was launched."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # Copies and memsets have categories of their own.
    return collections.Counter(e["name"] for e in events if e.get("cat") == "kernel")


def count_kernels(
    steps: Mapping[str, Callable[[], object]],
) -> tuple[dict[str, int | None], dict[str, collections.Counter[str]]]:
    """Kernels of one step of each candidate: the number, and the names."""
    counts: dict[str, int | None] = {}
    names: dict[str, collections.Counter[str]] = {}
    for name, step in steps.items():
        try:
            with quiet():
                names[name] = launched_kernels(step)
            counts[name] = sum(names[name].values())
        except Exception as error:  # profiling needs rights that some machines do not give
            print(f"kernels of {name} not counted: {error}", file=sys.stderr)
            counts[name] = None
    return counts, names
