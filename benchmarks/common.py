"""Measuring and reporting shared by every benchmark in this folder.

Rules the helpers here enforce, so that each script need not repeat them:

* Candidates are measured *interleaved*: every round times each of them once, in a random order. A
  machine that slows down half-way slows all of them down, and the ratio of two candidates is taken
  round by round.
* A result is a ratio from one run, with the hardware and versions beside it; milliseconds are there
  to judge the ratio.
* On CUDA a call starts with a cold L2 cache, as it would in a model whose other layers ran in
  between.
* Whatever a candidate prints or warns about is kept out of the tables; a candidate that fails is
  reported with the reason instead of aborting the run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.metadata
import logging
import os
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"

Candidate = Callable[[], object] | Sequence[Callable[[], object]]
"""What is timed: a function without arguments, or several equivalent ones that are called in turn.

Several are given when the operands of one would stay in a cache between calls: each then works on a
copy of its own.
"""


# -------------------------------------------------------------------------------------------------
# Numbers
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one sample a round.

    Attributes:
        samples: seconds per call, in the order of the rounds.
        note: how it was measured, if not as asked for (for example when a CUDA graph could not be
            captured).
    """

    samples: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """Seconds of the fastest call."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a fraction of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True)
class Failure:
    """A candidate that raised, and what it said."""

    reason: str


@dataclass(frozen=True)
class Ratio:
    """Baseline time / candidate time (above 1: the candidate is faster), with its quartiles."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x"


class Measurements(dict[str, "Timing | Failure"]):
    """What :func:`measure` returns: a timing or a failure for each candidate, by name."""

    def timing(self, name: str) -> Timing | None:
        """The timing of `name`; None if it failed or was not measured."""
        entry = self.get(name)
        return entry if isinstance(entry, Timing) else None

    def failure(self, name: str) -> str:
        """Why `name` failed; empty if it did not."""
        entry = self.get(name)
        return entry.reason if isinstance(entry, Failure) else ""

    def milliseconds(self, name: str) -> float | None:
        """Median milliseconds per call, or None."""
        timing = self.timing(name)
        return None if timing is None else timing.median * 1e3

    def speedup(self, baseline: str, name: str) -> Ratio | None:
        """How much faster `name` is than `baseline`: median of the ratios within a round."""
        base, other = self.timing(baseline), self.timing(name)
        if base is None or other is None:
            return None
        ratios = [b / o for b, o in zip(base.samples, other.samples, strict=False)]
        if len(ratios) < 2:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(middle, low, high)

    def speedup_value(self, baseline: str, name: str) -> float | None:
        """The number of :meth:`speedup`, or None."""
        ratio = self.speedup(baseline, name)
        return None if ratio is None else ratio.value


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """`||out - reference|| / ||reference||` in float64.

    Args:
        out: the result under test, any floating dtype.
        reference: the same shape, best computed in float64.

    Returns:
        The relative error; NaN if either holds one, so that NaN never passes a check.
    """
    out, reference = out.detach().double(), reference.detach().double()
    scale = torch.linalg.vector_norm(reference)
    return float(torch.linalg.vector_norm(out - reference) / scale.clamp_min(1e-300))


def verdict(
    value: float | None, *, at_least: float | None = None, at_most: float | None = None
) -> str:
    """`"pass"` or `"miss"` of a measured value against a goal; empty if there is no goal."""
    if at_least is None and at_most is None:
        return ""
    if value is None or value != value:
        return "miss"
    if at_least is not None and value < at_least:
        return "miss"
    if at_most is not None and value > at_most:
        return "miss"
    return "pass"


# -------------------------------------------------------------------------------------------------
# Measuring
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and log records below ERROR (peers warn at every untuned call)."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = re.sub(r"\s+", " ", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:160]


def _functions(candidate: Candidate) -> list[Callable[[], object]]:
    return [candidate] if callable(candidate) else list(candidate)


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
            cache (see :func:`copies_beyond_cache`). A candidate that cannot be captured is timed
            with events and says so in its note.

    Returns:
        A :class:`Timing` or :class:`Failure` for each candidate.
    """
    device = torch.device(device)
    with quiet():
        if device.type == "cuda":
            return _measure_cuda(candidates, seconds or 0.15, min_rounds, max_rounds, graph)
        return _measure_cpu(candidates, seconds or 1.0, min_rounds, max_rounds)


def _rounds(names: list[str], count: int) -> Iterator[list[str]]:
    """Yields an order for each round, shuffled so that nobody always runs after the same one.

    (A rotation would not do: it leaves everyone's predecessor, whose traces in the caches and in the
    state of the threads cost the next call up to a third, as it is.)
    """
    shuffle = random.Random(0).shuffle
    for _ in range(count):
        order = list(names)
        shuffle(order)
        yield order


def _measure_cpu(
    candidates: Mapping[str, Candidate], seconds: float, min_rounds: int, max_rounds: int
) -> Measurements:
    shortest_sample = (
        2e-3  # one sample is at least this long: the clock and a stray interrupt do not matter then
    )
    results = Measurements()
    samplers: dict[str, Callable[[], float]] = {}
    round_time = 0.0
    for name, candidate in candidates.items():
        functions = _functions(candidate)
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
            results[name] = Failure(_describe(error))
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
        for order in _rounds(list(samplers), count):
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        if enabled:
            gc.enable()
    results.update({name: Timing(tuple(values)) for name, values in samples.items()})
    return results


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


def _capture(functions: list[Callable[[], object]], calls: int) -> torch.cuda.CUDAGraph:
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


def _measure_cuda(
    candidates: Mapping[str, Candidate],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    graph: bool,
) -> Measurements:
    results = Measurements()
    # name -> (function that enqueues one sample, calls in a sample, note)
    samplers: dict[str, tuple[Callable[[], object], int, str]] = {}
    round_time = 0.0
    for name, candidate in candidates.items():
        functions = _functions(candidate)
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
                    sampler = _capture(functions, calls).replay
                    sampler()
                    torch.cuda.synchronize()
                except Exception as error:
                    torch.cuda.synchronize()
                    calls, note = 1, f"not capturable ({_describe(error)}): host time included"
        except Exception as error:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            results[name] = Failure(_describe(error))
            continue
        samplers[name] = (sampler, calls, note)
        round_time += once * calls + 8e-4
    if not samplers:
        return results
    count = max(min_rounds, min(max_rounds, int(seconds / max(round_time, 1e-6))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in samplers}
    for order in _rounds(list(samplers), count):
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


def measure_host(
    candidates: Mapping[str, Callable[[], object]],
    *,
    calls: int = 50,
    rounds: int = 40,
    wait: bool = False,
) -> Measurements:
    """Host seconds per call: what Python, the dispatcher and the launch cost.

    Args:
        candidates: small calls whose work is enqueued, by name.
        calls: calls per sample, few enough that the launch queue never fills.
        rounds: samples of each candidate.
        wait: include the wait for the GPU at the end of a sample: the time per call of an eager
            stream of calls, whichever of host and GPU is slower.
    """
    results = Measurements()
    samples: dict[str, list[float]] = {}
    with quiet():
        for name, function in candidates.items():
            try:
                for _ in range(20):
                    function()
                samples[name] = []
            except Exception as error:
                results[name] = Failure(_describe(error))
        enabled = gc.isenabled()
        gc.disable()
        try:
            for order in _rounds(list(samples) or [""], rounds if samples else 0):
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


# -------------------------------------------------------------------------------------------------
# Roofline
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """What this device can do at best, measured in this run.

    Attributes:
        bandwidth: bytes per second of a large copy, bytes read plus bytes written.
        rates: floating-point operations per second of a large dense product, by mode
            (`"bfloat16"`, `"float16"`, `"tf32"`, `"float32"`).
    """

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def rate(self, mode: str) -> float:
        """Operations per second for `mode`; float32 may also be three TF32 products."""
        if mode == "float32" and "tf32" in self.rates:
            return max(self.rates["float32"], self.rates["tf32"] / 3)
        return self.rates[mode]

    def floor(self, nbytes: float, operations: float, mode: str) -> float:
        """Seconds that moving `nbytes` and doing `operations` takes at the very least."""
        return max(nbytes / self.bandwidth, operations / self.rate(mode))

    def describe(self) -> dict[str, str]:
        """The measured ceilings as text, by name."""
        rows = {"copy bandwidth (read + write)": f"{self.bandwidth / 1e9:.0f} GB/s"}
        for mode, rate in self.rates.items():
            unit = f"{rate / 1e12:.0f} TFLOP/s" if rate > 5e12 else f"{rate / 1e9:.0f} GFLOP/s"
            rows[f"dense {mode} product"] = unit
        return rows


@contextlib.contextmanager
def float32_mode(mode: str) -> Iterator[None]:
    """How CUDA multiplies float32 inside the block: `"highest"` (IEEE) or `"high"` (TF32)."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def measure_roofline(
    device: str | torch.device, modes: Sequence[str] | None = None, *, quick: bool = False
) -> Roofline:
    """Measures copy bandwidth and the rate of a large dense product in each mode.

    Args:
        device: where.
        modes: some of `"bfloat16"`, `"float16"`, `"tf32"`, `"float32"`; all that make sense
            by default.
        quick: smaller operands.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    if modes is None:
        modes = ("bfloat16", "float16", "tf32", "float32") if cuda else ("float32", "bfloat16")
    nbytes = 2**30 if cuda else 2**26 if quick else 2**28
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": lambda s=source, t=target: t.copy_(s)}, device, seconds=0.3).timing(
        "copy"
    )
    del source, target
    rates: dict[str, float] = {}
    for mode in modes:
        dtype = torch.float32 if mode in ("tf32", "float32") else getattr(torch, mode)
        size = (4096 if mode == "float32" else 8192) if cuda else 512 if quick else 1536
        with float32_mode("high" if mode == "tf32" else "highest"):
            a = torch.randn(size, size, device=device).to(dtype)
            b = torch.randn(size, size, device=device).to(dtype)
            measured = measure(
                {"product": lambda a=a, b=b: torch.nn.functional.linear(a, b)}, device, seconds=0.3
            )
        timing = measured.timing("product")
        if timing is not None:
            rates[mode] = 2 * size**3 / (timing.median if cuda else timing.minimum)
    assert copy is not None
    return Roofline(2 * nbytes / (copy.median if cuda else copy.minimum), rates)


# -------------------------------------------------------------------------------------------------
# Operands
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSparse:
    """A random block-sparse weight in both forms.

    Attributes:
        dense: `(N, K)` with zero blocks.
        crow: int32 `(R + 1,)`.
        col: int32 `(nnz,)`, sorted within a block row.
        values: `(nnz, r, c)`.
    """

    dense: torch.Tensor
    crow: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor

    @property
    def stored(self) -> int:
        """Elements in the stored blocks."""
        return self.values.numel()


def random_block_sparse(
    out_features: int,
    in_features: int,
    blocksize: int | tuple[int, int],
    sparsity: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> BlockSparse:
    """A weight with `max(1, round(n_blocks * (1 - sparsity)))` randomly placed blocks.

    Args:
        out_features: N, a multiple of the block's rows.
        in_features: K, a multiple of the block's columns.
        blocksize: int for square blocks or `(rows, cols)`.
        sparsity: fraction of blocks that are zero.
        dtype: of the weight; scaled by `K ** -0.5` as a layer's weight is.
        device: where it lives; the mask itself does not depend on it.
        seed: of the mask and the values.
    """
    rows, cols = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    if out_features % rows or in_features % cols:
        raise ValueError(f"{out_features} x {in_features} is no multiple of {rows} x {cols}")
    grid = (out_features // rows, in_features // cols)
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, round(grid[0] * grid[1] * (1 - sparsity)))
    chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:kept].sort().values
    row_of, col_of = chosen // grid[1], chosen % grid[1]
    crow = torch.zeros(grid[0] + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(row_of, minlength=grid[0]).cumsum(0)
    values = torch.randn(kept, rows, cols, generator=generator) * in_features**-0.5
    values = values.to(device=device, dtype=dtype)
    blocks = torch.zeros(grid[0], grid[1], rows, cols, dtype=dtype, device=device)
    blocks[row_of.to(device), col_of.to(device)] = values
    dense = blocks.transpose(1, 2).reshape(out_features, in_features).contiguous()
    crow, col = crow.to(device, torch.int32), col_of.to(device, torch.int32)
    return BlockSparse(dense, crow, col, values)


# -------------------------------------------------------------------------------------------------
# Machine
# -------------------------------------------------------------------------------------------------


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str | torch.device) -> str:
    """Name of the hardware behind `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_name()} ({capability}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str | torch.device) -> dict[str, str]:
    """Hardware, versions and the backend in use: the header of every result file."""
    device = torch.device(device)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts["compute capability"] = f"{major}.{minor}"
    else:
        with contextlib.suppress(OSError):
            facts["load average at start"] = f"{os.getloadavg()[0]:.2f}"
    for package in ("torch", "triton", "torchao", "torchvision"):
        version = _version(package)
        facts[package] = version or "not installed"
    facts["python"] = platform.python_version()
    with contextlib.suppress(Exception):
        import torchao_superblock

        backends = torchao_superblock.backends()
        info = backends.get(device.type, backends)
        facts["torchao_superblock"] = (
            f"{_version('torchao_superblock') or 'source tree'}, backend {info.get('name', info)}"
        )
    return facts


# -------------------------------------------------------------------------------------------------
# Reports
# -------------------------------------------------------------------------------------------------


class Progress:
    """A live line on stderr: position, elapsed time, current cell; on a pipe a line now and then.

    Args:
        total: number of steps.
        title: what runs.
        every: seconds between lines when stderr is not a terminal.
    """

    def __init__(self, total: int, title: str, every: float = 15.0) -> None:
        self.total, self.title, self.every = total, title, every
        self.done = 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, cell: str) -> None:
        """Announces the next cell."""
        self.done += 1
        now = time.monotonic()
        text = f"{self.title} [{self.done}/{self.total}] {now - self.start:5.0f} s  {cell}"
        if self.terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif now - self.last > self.every:
            self.last = now
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self.terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def format_cell(value: Any) -> str:
    """Text of one table cell: three significant digits for numbers, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != value:
            return "nan"
        if value == 0:
            return "0"
        if abs(value) < 1e-3 or abs(value) >= 1e6:
            return f"{value:.1e}"
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned Markdown table.

    Args:
        rows: one mapping a row; a missing key is an empty cell.
        columns: which keys, in order; by default all, in order of first appearance.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_cell(row[c]) if c in row else "" for c in columns] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [
        max([3, len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(columns)
    ]
    numeric = [
        bool(rows) and all(isinstance(row.get(c), int | float | None) for row in rows)
        for c in columns
    ]

    def line(texts: Iterable[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(columns), line(rule), *(line(texts) for texts in cells)])


class Report:
    """Collects tables and pictures and writes them as one Markdown file, one CSV file and PNGs.

    The files are rewritten after every table, so an interrupted run leaves what it measured. They
    are called `<date>_<name>_<device>[_<label>]`.

    Args:
        name: of the benchmark, e.g. `"bsr_linear"`.
        title: first heading of the Markdown file.
        device: where it ran.
        directory: where the files go; `benchmarks/results` by default.
        label: appended to the file names, to keep two runs of a day apart.

    Example:
        >>> report = Report("bsr_linear", "One linear layer", "cpu")
        >>> report.table("Forward", [{"M": 1, "speedup": 6.1}])
    """

    def __init__(
        self,
        name: str,
        title: str,
        device: str | torch.device,
        *,
        directory: str | Path | None = None,
        label: str | None = None,
    ) -> None:
        device = torch.device(device)
        self.directory = Path(directory) if directory is not None else RESULTS
        hardware = device_name(device).split(" (")[0]
        parts = [datetime.date.today().isoformat(), name, device.type, hardware, label or ""]
        slugs = [re.sub(r"[^a-z0-9_-]+", "-", part.lower()).strip("-") for part in parts]
        self.stem = "_".join(slug for slug in slugs if slug)
        self.title = title
        self.facts = environment(device)
        self.facts["command"] = "python " + " ".join(
            [os.path.relpath(sys.argv[0]) if sys.argv[0] else "-c", *sys.argv[1:]]
        )
        self.records: list[dict[str, Any]] = []
        self._blocks: list[str] = []

    def fact(self, name: str, value: str) -> None:
        """Adds a line to the header."""
        self.facts[name] = value

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._blocks.append(paragraph.strip())
        print("\n" + paragraph.strip(), flush=True)

    def table(
        self,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        columns: Sequence[str] | None = None,
        note: str = "",
    ) -> None:
        """Adds, prints and saves a table; the CSV gets every key, whatever `columns` shows."""
        self.records.extend({"section": title, **row} for row in rows)
        block = f"## {title}\n\n"
        if note:
            block += note.strip() + "\n\n"
        block += markdown_table(rows, columns) if rows else "Nothing was measured."
        self._blocks.append(block)
        print("\n" + block, flush=True)
        self.write()

    def figure(self, figure: Any, name: str, caption: str) -> Path:
        """Saves a matplotlib figure as `<stem>_<name>.png` and shows it in the Markdown file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.stem}_{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
        self._blocks.append(f"![{caption}]({path.name})\n\n*{caption}*")
        self.write()
        return path

    def write(self) -> Path:
        """Writes the Markdown and the CSV file and returns the path of the first."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.stem}.md"
        head = f"# {self.title}\n\n" + markdown_table(
            [{"": key, "this run": value} for key, value in self.facts.items()]
        )
        path.write_text("\n\n".join([head, *self._blocks]) + "\n", encoding="utf-8")
        if self.records:
            columns = list(dict.fromkeys(key for record in self.records for key in record))
            with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(self.records)
        return path


def pyplot() -> Any:
    """The pyplot of matplotlib, without a display, with the look shared by all pictures here.

    Raises:
        ImportError: if matplotlib is missing, with the command that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'torchao_superblock[examples]' "
            "(or run with --no-pictures)"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


BLOCK_COLORS = {16: "#8ecae6", 32: "#219ebc", 64: "#1d4e89", 128: "#0b2545"}
"""One colour a block size in every picture, darker for larger blocks."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--device --quick --output-dir --label --threads --no-pictures`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--label", help="appended to the file names")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-pictures", action="store_true", help="tables only")


def pick_device(arguments: argparse.Namespace) -> torch.device:
    """The device asked for, after setting the number of threads asked for.

    Raises:
        SystemExit: if CUDA was asked for and there is none.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    return torch.device(arguments.device)
