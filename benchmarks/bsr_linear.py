"""One linear layer: dense, torch's BSR, torchao's BlockSparseTensor and ours, in one interleaved run.

    python benchmarks/bsr_linear.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/bsr_linear.py --device cpu --sections forward
    python benchmarks/bsr_linear.py --quick            # a minute's impression

Speedups are dense time / candidate time within the run. The dense layer has random weights without
zeros; on a GPU the pruned weight itself can run faster through a dense product, because zeros draw
less power, so that ratio is reported too (`over dense with zeros x`). `x floor` is our time over the
roofline: the larger of (bytes of x, y, bias and stored blocks) / (copy bandwidth) and (2 * M *
stored elements) / (dense product rate), both measured at the start of the same run. Errors are
||out - reference|| / ||reference|| against float64. Dimensions: M tokens, N out, K in.

Sections on CUDA
    vit         the MLP and attention shapes of ViT-B/16, batch 256, bfloat16, all peers
    sweep       speedup over sparsity for each block size, and where it breaks even
    llm         14336 x 4096 and back, M = 1, 16 (kernel time from a CUDA graph, weights cold), 512,
                8192; the shapes of larger models at M = 8192
    host        what a call costs the host, eager, with and without grad
    float32     IEEE and TF32
    float16     against our own bfloat16
    backward    gradients of x, the stored blocks and the bias
    activation  gelu and relu in the kernel against the op followed by the function
Sections on the CPU
    forward     M = 1, 197, 1576, float32 and bfloat16, all peers
    sweep, backward, activation as above; dtypes: float64 and float16
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.common import (
    BLOCK_COLORS,
    BlockSparse,
    Candidate,
    Measurements,
    Progress,
    Report,
    Roofline,
    add_common_arguments,
    copies_beyond_cache,
    float32_mode,
    measure,
    measure_host,
    measure_roofline,
    pick_device,
    pyplot,
    quiet,
    random_block_sparse,
    relative_error,
    verdict,
)

Block = int | tuple[int, int]
Row = dict[str, Any]

UP, DOWN = (3072, 768), (768, 3072)  # N, K of the two MLP layers of ViT-B/16
VIT_TOKENS = 256 * 197

# Speedups over dense that the project set itself; the lower of the two shapes counts.
CUDA_VIT_GOALS: dict[tuple[int, float], float] = {
    (64, 0.9): 3.0,
    (64, 0.8): 2.4,
    (64, 0.7): 1.9,
    (64, 0.5): 1.25,
    (32, 0.9): 2.5,
    (32, 0.8): 1.8,
    (16, 0.9): 1.5,
    (128, 0.9): 3.0,
}
CUDA_LLM_GOALS: dict[tuple[int, int], float] = {  # (M, block) at sparsity 0.9
    (8192, 64): 6.0,
    (8192, 128): 7.0,
    (512, 64): 4.0,
    (512, 128): 4.0,
    (16, 64): 3.5,
    (16, 128): 3.5,
    (1, 64): 3.5,
    (1, 128): 3.5,
}
# The MLPs of larger models, whose x is more than an L2 cache holds.
CUDA_LARGE_SHAPES = ((13824, 5120), (5120, 13824), (28672, 8192), (8192, 28672))
CUDA_FLOAT32_GOALS: dict[tuple[str, int, tuple[int, int]], float] = {
    ("float32", 64, UP): 9.0,
    ("float32", 64, DOWN): 9.0,
    ("float32", 32, UP): 8.0,
    ("float32", 32, DOWN): 8.0,
    ("tf32", 64, UP): 2.2,
    ("tf32", 64, DOWN): 3.2,
}
CUDA_BREAK_EVEN_GOALS = {16: 0.85, 32: 0.60, 64: 0.40}
CUDA_FLOOR_GOAL = 1.25  # time over floor at 0.9, block 64
IEEE_ERROR_GOAL = 3e-7
# A relative error above this is no rounding, in any dtype: the time of a wrong result says nothing.
LARGEST_ERROR = 1e-2
HOST_GOAL_US = 20.0  # above F.linear
CPU_GOALS: dict[tuple[int, int, float], float] = {
    (m, block, sparsity): goal
    for m, at_90, at_80, at_50 in (
        (1, (6.0, 6.0, 6.0), 3.5, 1.6),
        (197, (9.5, 10.0, 10.0), 5.0, 1.9),
        (1576, (8.0, 8.5, 9.0), 4.5, 1.8),
    )
    for block, sparsity, goal in (
        *zip((16, 32, 64), (0.9, 0.9, 0.9), at_90, strict=True),
        (16, 0.8, at_80),
        (32, 0.8, at_80),
        (64, 0.8, at_80),
        (64, 0.5, at_50),
    )
}
BACKWARD_GOALS = {"cuda": 2.0, "cpu": 5.0}
REFERENCE_BREAK_EVEN = {16: 0.86, 32: 0.82, 64: 0.70}  # published: A100, float32, whole ViT-B/16

PEERS = ("torch BSR", "torchao")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        M: rows of x.
        shape: (N, K) of the weight.
        block: block size, int or (rows, cols).
        sparsity: fraction of blocks that are zero.
        mode: `"float32"`, `"tf32"`, `"bfloat16"`, `"float16"` or `"float64"`.
        goal: speedup over dense to reach, if any.
        peers: measure the peers too.
        graph: time replays of a CUDA graph with cold weights instead of single calls.
    """

    M: int
    shape: tuple[int, int]
    block: Block
    sparsity: float
    mode: str
    goal: float | None = None
    peers: bool = True
    graph: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands: float32 for the TF32 mode too."""
        return torch.float32 if self.mode == "tf32" else getattr(torch, self.mode)

    @property
    def label(self) -> str:
        """What the progress line calls it."""
        n, k = self.shape
        return (
            f"M {self.M}, {n} x {k}, block {block_text(self.block)}, {self.sparsity}, {self.mode}"
        )


def block_text(block: Block) -> str:
    """`64` or `64x16`."""
    return str(block) if isinstance(block, int) else "x".join(map(str, block))


@dataclass(frozen=True)
class Operands:
    """Inputs of one cell. `plan` is the layer's precomputed schedule, as BSRLinear passes it."""

    x: torch.Tensor
    weight: BlockSparse
    bias: torch.Tensor
    plan: torch.Tensor


def make_operands(cell: Cell, device: torch.device) -> Operands:
    """Random operands of one cell on `device`."""
    from torchao_superblock.ops.plan import build_plan

    n, k = cell.shape
    generator = torch.Generator(device).manual_seed(1)
    weight = random_block_sparse(
        n, k, cell.block, cell.sparsity, dtype=cell.dtype, device=device, seed=2
    )
    x = torch.randn(cell.M, k, device=device, generator=generator).to(cell.dtype)
    bias = torch.randn(n, device=device, generator=generator).to(cell.dtype)
    blocksize = tuple(weight.values.shape[1:])
    plan = build_plan(weight.crow, weight.col, k // blocksize[1], blocksize)
    return Operands(x, weight, bias, plan)


def bsr_linear(
    operands: Operands,
    weight: BlockSparse | None = None,
    activation: str = "none",
    function: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Our op, or the function in front of it, with the arguments that BSRLinear passes."""
    weight = weight or operands.weight
    function = function or torch.ops.torchao_superblock.bsr_linear
    return function(
        operands.x,
        weight.crow,
        weight.col,
        weight.values,
        operands.bias,
        weight.dense.shape[0],
        activation,
        operands.plan,
    )


def _or_raise(build: Callable[[], Candidate]) -> Candidate:
    """A candidate that cannot even be built fails when called, so that it is reported like one that fails later."""
    try:
        return build()
    except Exception as error:
        failure = error

        def fail() -> None:
            raise failure

        return fail


def make_candidates(operands: Operands, cell: Cell, device: torch.device) -> dict[str, Candidate]:
    """Dense, ours and the peers as functions without arguments; lists of them, on copies, if the cell is a graph."""
    x, bias, weight = operands.x, operands.bias, operands.weight

    def copies(nbytes: int) -> range:
        return range(copies_beyond_cache(nbytes, device) if cell.graph else 1)

    def dense() -> Candidate:
        # What a user without sparsity has: no zeros.
        weights = [
            torch.randn_like(weight.dense) * weight.dense.shape[1] ** -0.5
            for _ in copies(weight.dense.nbytes)
        ]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    def dense_with_zeros() -> Candidate:
        return lambda: F.linear(x, weight.dense, bias)

    def ours() -> Candidate:
        weights = [
            replace(weight, values=weight.values.clone()) for _ in copies(weight.values.nbytes)
        ]
        return [lambda w=w: bsr_linear(operands, w) for w in weights]

    def torch_bsr() -> Candidate:
        sparse = weight.dense.to_sparse_bsr(tuple(weight.values.shape[1:]))
        weights = [sparse.clone() for _ in copies(weight.values.nbytes)]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    def torchao() -> Candidate:
        from torchao.sparsity.blocksparse import BlockSparseTensor

        if not isinstance(cell.block, int):
            raise ValueError("only square blocks")
        weights = [
            BlockSparseTensor.from_dense(weight.dense, cell.block)
            for _ in copies(weight.values.nbytes)
        ]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    builders = {"dense": dense, "ours": ours}
    if device.type == "cuda" and not cell.graph:
        builders["dense with zeros"] = dense_with_zeros
    if cell.peers:
        builders["torch BSR"] = torch_bsr
        if device.type == "cuda":
            builders["torchao"] = torchao
    with quiet():
        return {name: _or_raise(build) for name, build in builders.items()}


def forward_error(operands: Operands, rows: int = 128) -> float:
    """Relative error of our output on the first and last rows of x, against float64."""
    out = bsr_linear(operands)
    chosen = torch.arange(out.shape[0], device=out.device)
    chosen = torch.cat([chosen[:rows], chosen[rows:][-rows:]])
    x, dense, bias = operands.x[chosen], operands.weight.dense, operands.bias
    return relative_error(out[chosen], F.linear(x.double(), dense.double(), bias.double()))


class Failures:
    """Peers that failed, and where."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], list[str]] = defaultdict(list)

    def note(self, cell: Cell, measured: Measurements) -> None:
        """Remembers every failure of `measured`."""
        for name in measured:
            if reason := measured.failure(name):
                self._cells[name, reason].append(cell.label)

    def report(self, report: Report) -> None:
        """Adds the table, if there is anything to tell."""
        rows = [
            {"candidate": name, "cells": len(cells), "first of them": cells[0], "what it said": why}
            for (name, why), cells in self._cells.items()
        ]
        if rows:
            report.table("Failures", rows)


@dataclass
class Context:
    """What every section needs."""

    device: torch.device
    report: Report
    roofline: Roofline
    failures: Failures
    quick: bool

    @property
    def seconds(self) -> float:
        """How long one cell is measured."""
        if self.device.type == "cuda":
            return 0.05 if self.quick else 0.12
        return 0.15 if self.quick else 1.0

    def progress(self, steps: int, title: str) -> Progress:
        """A live line for so many cells."""
        return Progress(steps, title)


def run_cell(cell: Cell, context: Context) -> Row:
    """Measures one cell.

    Returns:
        A row for the table: times, speedups over dense, error, distance to the floor, rates, and
        pass or miss.
    """
    mode = "high" if cell.mode == "tf32" else "highest"
    with float32_mode(mode), torch.no_grad():
        operands = make_operands(cell, context.device)
        candidates = make_candidates(operands, cell, context.device)
        measured = measure(
            candidates, context.device, seconds=context.seconds, graph=cell.graph,
            min_rounds=3 if context.quick else 7,
        )  # fmt: skip
        try:
            error: float | None = forward_error(operands)
        except Exception:  # the reason is in the table of failures already
            error = None
    context.failures.note(cell, measured)
    return make_row(cell, operands, measured, error, context.roofline)


def make_row(
    cell: Cell,
    operands: Operands,
    measured: Measurements,
    error: float | None,
    roofline: Roofline,
) -> Row:
    """The table row of a measured cell."""
    n, k = cell.shape
    row: Row = {
        "M": cell.M,
        "N x K": f"{n} x {k}",
        "block": block_text(cell.block),
        "sparsity": cell.sparsity,
        "dtype": cell.mode,
        "dense ms": measured.milliseconds("dense"),
        "ours ms": measured.milliseconds("ours"),
    }
    for peer in PEERS:
        if peer in measured:
            failed = measured.failure(peer)
            row[f"{peer} x"] = "fails" if failed else measured.speedup_value("dense", peer)
    ratio = measured.speedup("dense", "ours")
    row["ours x"] = ratio.value if ratio else None
    row["quartiles"] = f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else "-"
    row["over dense with zeros x"] = measured.speedup_value("dense with zeros", "ours")
    row["error"] = error
    ours, dense = measured.timing("ours"), measured.timing("dense")
    stored = operands.weight.stored
    operations = 2 * cell.M * stored
    nbytes = cell.M * (n + k) + stored + n
    nbytes *= operands.x.element_size()
    if ours is not None and dense is not None:
        if cell.mode in roofline.rates:
            row["x floor"] = ours.median / roofline.floor(nbytes, operations, cell.mode)
        row["GFLOP/s"] = operations / ours.median / 1e9
        row["share of dense GFLOP/s"] = ours_share(cell, operations, ours.median, dense.median)
    row["goal"] = cell.goal
    row["met"] = verdict(row["ours x"], at_least=cell.goal)
    notes = [f"{name}: {t.note}" for name in measured if (t := measured.timing(name)) and t.note]
    if notes:
        row["note"] = "; ".join(notes)
    return row


def ours_share(cell: Cell, operations: float, ours: float, dense: float) -> float:
    """Our rate on the stored blocks over the dense layer's rate on all of them."""
    dense_operations = 2 * cell.M * cell.shape[0] * cell.shape[1]
    return (operations / ours) / (dense_operations / dense)


def run_cells(cells: Sequence[Cell], context: Context, title: str) -> list[Row]:
    """Measures cells one after another, with a progress line."""
    progress = context.progress(len(cells), title)
    rows = []
    for cell in cells:
        progress.step(cell.label)
        rows.append(run_cell(cell, context))
    progress.close()
    return rows


# -------------------------------------------------------------------------------------------------
# Sections
# -------------------------------------------------------------------------------------------------

FORWARD_COLUMNS = [
    "M", "N x K", "block", "sparsity", "dense ms", "torch BSR x", "torchao x", "ours x",
    "quartiles", "over dense with zeros x", "x floor", "error", "goal", "met",
]  # fmt: skip
CPU_COLUMNS = [
    "M", "N x K", "block", "sparsity", "dense ms", "torch BSR x", "ours x", "quartiles", "GFLOP/s",
    "share of dense GFLOP/s", "error", "goal", "met", "bfloat16 x float32", "bfloat16 met",
]  # fmt: skip


def cuda_vit_cells(quick: bool) -> list[Cell]:
    """The goal cells at the MLP shapes, then the attention shapes and rectangular blocks."""
    cells = [
        Cell(VIT_TOKENS, shape, block, sparsity, "bfloat16", goal)
        for (block, sparsity), goal in CUDA_VIT_GOALS.items()
        for shape in (UP, DOWN)
    ]
    if quick:
        return cells
    cells += [
        Cell(VIT_TOKENS, shape, 64, sparsity, "bfloat16")
        for shape in ((768, 768), (2304, 768))
        for sparsity in (0.9, 0.8)
    ]
    return cells + [
        Cell(VIT_TOKENS, shape, block, 0.9, "bfloat16", peers=False)
        for block in ((64, 16), (128, 32), (32, 64))
        for shape in (UP, DOWN)
    ]


def section_vit(context: Context) -> None:
    """ViT-B/16's shapes at batch 256 in bfloat16."""
    cells = cuda_vit_cells(context.quick)
    rows = run_cells(cells, context, "vit")
    for cell, row in zip(cells, rows, strict=True):
        if (cell.block, cell.sparsity) == (64, 0.9) and cell.shape in (UP, DOWN):
            row["floor met"] = verdict(row.get("x floor"), at_most=CUDA_FLOOR_GOAL)
    context.report.table(
        "ViT-B/16 shapes, batch 256 (50432 tokens), bfloat16",
        rows,
        columns=[*FORWARD_COLUMNS, "floor met"],
        note=f"Goal for `x floor` at 0.9, block 64: at most {CUDA_FLOOR_GOAL}.",
    )


def section_llm(context: Context) -> None:
    """Language-model shapes in bfloat16, from one token to 8192."""
    cells = [
        Cell(m, shape, block, 0.9, "bfloat16", goal, graph=m <= 16)
        for (m, block), goal in CUDA_LLM_GOALS.items()
        for shape in ((14336, 4096), (4096, 14336))
        if not (context.quick and block == 128)
    ]
    if not context.quick:
        cells += [
            Cell(8192, shape, block, 0.9, "bfloat16")
            for shape in CUDA_LARGE_SHAPES
            for block in (64, 128)
        ]
    context.report.table(
        "Language-model shapes, bfloat16, sparsity 0.9",
        run_cells(cells, context, "llm"),
        columns=[*FORWARD_COLUMNS, "note"],
        note="M = 1 and 16: kernel time from CUDA graph replays that rotate through copies of the "
        "weights, so that they come from memory and not from the L2 cache.",
    )


def section_float32(context: Context) -> None:
    """float32 in IEEE mode and with TF32."""
    cells = [
        Cell(VIT_TOKENS, shape, block, 0.9, mode, CUDA_FLOAT32_GOALS.get((mode, block, shape)))
        for mode in ("float32", "tf32")
        for block in (64, 32)
        for shape in (UP, DOWN)
    ]
    rows = run_cells(cells, context, "float32")
    for row in rows:
        if row["dtype"] == "float32":
            row["error met"] = verdict(row["error"], at_most=IEEE_ERROR_GOAL)
    context.report.table(
        "float32, IEEE (`highest`) and TF32 (`high`), sparsity 0.9",
        rows,
        columns=["dtype", *FORWARD_COLUMNS, "error met"],
        note=f"Error goal in IEEE mode: at most {IEEE_ERROR_GOAL}. The floor of IEEE mode takes "
        "three TF32 products for one.",
    )


def section_float16(context: Context) -> None:
    """Our float16 against our bfloat16."""
    rows = []
    for shape in (UP, DOWN):
        cell = Cell(VIT_TOKENS, shape, 64, 0.9, "bfloat16", peers=False)
        with torch.no_grad():
            brain = make_operands(cell, context.device)
            half = make_operands(replace(cell, mode="float16"), context.device)
            measured = measure(
                {
                    "bfloat16": lambda o=brain: bsr_linear(o),
                    "float16": lambda o=half: bsr_linear(o),
                    "dense float16": lambda o=half: F.linear(o.x, o.weight.dense, o.bias),
                },
                context.device,
                seconds=context.seconds,
            )
            error = forward_error(half) if measured.timing("float16") else None
        context.failures.note(cell, measured)
        ratio = measured.speedup_value("bfloat16", "float16")
        rows.append(
            {
                "N x K": f"{shape[0]} x {shape[1]}",
                "block": 64,
                "sparsity": 0.9,
                "bfloat16 ms": measured.milliseconds("bfloat16"),
                "float16 ms": measured.milliseconds("float16"),
                "float16 speed / bfloat16 speed": ratio,
                "over dense float16 x": measured.speedup_value("dense float16", "float16"),
                "error": error,
                "goal": 0.95,
                "met": verdict(ratio, at_least=0.95),
            }
        )
    context.report.table("float16 against bfloat16", rows)


def section_sweep(context: Context) -> None:
    """Speedup over sparsity for each block size; where it crosses 1."""
    cuda = context.device.type == "cuda"
    m, mode = (VIT_TOKENS, "bfloat16") if cuda else (197, "float32")
    sparsities = (
        (0.3, 0.5, 0.7, 0.8, 0.9)
        if context.quick
        else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    )
    blocks = (16, 32, 64, 128) if cuda else (16, 32, 64)
    cells = [
        Cell(m, shape, block, sparsity, mode, peers=False)
        for block in blocks
        for shape in (UP, DOWN)
        for sparsity in sparsities
    ]
    faster = replace_seconds(context, 0.4)
    rows = run_cells(cells, faster, "sweep")
    context.report.table(
        f"Speedup over sparsity, M = {m}, {mode}",
        pivot(rows),
        note="Ours against dense; a row for each block size and shape.",
    )
    context.report.records.extend({"section": "sweep", **row} for row in rows)
    goals = CUDA_BREAK_EVEN_GOALS if cuda else {}
    context.report.table(
        "Break-even sparsity",
        break_even_rows(rows, goals),
        note="The lowest sparsity from which ours is faster than dense, interpolated; the worse of "
        "the two shapes counts. Published reference: A100, float32, whole ViT-B/16.",
    )


def replace_seconds(context: Context, factor: float) -> Context:
    """The same context with less time for each cell: a sweep's neighbours confirm each other."""

    class Shorter(Context):
        @property
        def seconds(self) -> float:
            return super().seconds * factor

    return Shorter(
        context.device, context.report, context.roofline, context.failures, context.quick
    )


def pivot(rows: Sequence[Row]) -> list[Row]:
    """One row for each block size and shape, one column for each sparsity."""
    table: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["block"], row["N x K"])
        line = table.setdefault(key, {"block": row["block"], "N x K": row["N x K"]})
        line[f"{row['sparsity']:g}"] = row["ours x"]
    return list(table.values())


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Sparsity from which a curve of (sparsity, speedup) stays above 1, linearly interpolated.

    Returns:
        0.0 if it is above 1 everywhere, None if it ends below 1.
    """
    points = sorted(points)
    if not points or points[-1][1] < 1:
        return None
    for (low, below), (high, above) in zip(points[-2::-1], points[:0:-1], strict=True):
        if below < 1:
            return low + (1 - below) / (above - below) * (high - low)
    return 0.0


def break_even_rows(rows: Sequence[Row], goals: Mapping[int, float]) -> list[Row]:
    """The worse shape's break-even sparsity of each block size, against the goals."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ours x"] is not None:
            curves[row["block"]][row["N x K"]].append((row["sparsity"], row["ours x"]))
    table: list[Row] = []
    for block, shapes in curves.items():
        found = {shape: break_even(points) for shape, points in shapes.items()}
        lowest = min(s for points in shapes.values() for s, _ in points)
        crossings = list(found.values())
        worst = None if None in crossings else max(c for c in crossings if c is not None)
        goal = goals.get(int(block)) if block.isdigit() else None

        def text(value: float | None, lowest: float = lowest) -> str:
            if value is None:
                return "never"
            return f"below {lowest:g}" if value == 0 else f"{value:.2f}"

        table.append(
            {
                "block": block,
                **{shape: text(value) for shape, value in found.items()},
                "worse of them": text(worst),
                "reference (A100, float32)": REFERENCE_BREAK_EVEN.get(
                    int(block) if block.isdigit() else -1
                ),
                "goal: at most": goal,
                "met": verdict(worst, at_most=goal),
            }
        )
    return table


def section_backward(context: Context) -> None:
    """Gradients of x, weight (ours: the stored blocks only) and bias."""
    device = context.device
    m, mode = (VIT_TOKENS, "bfloat16") if device.type == "cuda" else (1576, "float32")
    rows = []
    for block in (64,) if context.quick else (64, 32, 16):
        for shape in (UP, DOWN):
            cell = Cell(m, shape, block, 0.9, mode, peers=False)
            rows.append(backward_row(cell, context))
    context.report.table(
        f"Backward, M = {m}, {mode}, sparsity 0.9",
        rows,
        note="Time of the backward alone: gradients of x, the weight (ours: stored blocks) and the "
        "bias. The dense layer holds the pruned weight. Errors against float64.",
    )


def backward_row(cell: Cell, context: Context) -> Row:
    """Measures and checks the backward of one cell."""
    operands = make_operands(cell, context.device)
    weight = operands.weight

    def gradients(dtype: torch.dtype | None = None) -> tuple[Callable[[], Any], ...]:
        x = operands.x.to(dtype or cell.dtype).detach().requires_grad_()
        dense = weight.dense.to(x.dtype).requires_grad_()
        values = weight.values.to(x.dtype).requires_grad_()
        bias = operands.bias.to(x.dtype).requires_grad_()
        here = Operands(x, replace(weight, values=values), bias, operands.plan)
        generator = torch.Generator(x.device).manual_seed(3)
        upstream = torch.randn(cell.M, cell.shape[0], device=x.device, generator=generator)
        upstream = upstream.to(cell.dtype).to(x.dtype)

        def of(out: torch.Tensor, parameter: torch.Tensor) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(
                out, [x, parameter, bias], upstream, retain_graph=True
            )

        return of(F.linear(x, dense, bias), dense), of(bsr_linear(here), values)

    row: Row = {
        "N x K": f"{cell.shape[0]} x {cell.shape[1]}",
        "block": block_text(cell.block),
    }
    try:
        dense, ours = gradients()
        measured = measure(
            {"dense": dense, "ours": ours}, context.device, seconds=2 * context.seconds
        )
        context.failures.note(cell, measured)
        row |= {
            "dense ms": measured.milliseconds("dense"),
            "ours ms": measured.milliseconds("ours"),
        }
        ratio = measured.speedup("dense", "ours")
        row["ours x"] = ratio.value if ratio else None
        row["quartiles"] = f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else "-"
        reference = gradients(torch.float64)[0]()
        got = gradients()[1]()
        row["error x"] = relative_error(got[0], reference[0])
        row["error values"] = relative_error(got[1], gather_blocks(reference[1], weight))
        row["error bias"] = relative_error(got[2], reference[2])
    except Exception as error:
        failed = Measurements()
        from benchmarks.common import Failure

        failed["ours backward"] = Failure(f"{type(error).__name__}: {error}"[:160])
        context.failures.note(cell, failed)
    goal = BACKWARD_GOALS[context.device.type] if cell.block == 64 else None
    return row | {"goal": goal, "met": verdict(row.get("ours x"), at_least=goal)}


def gather_blocks(dense: torch.Tensor, weight: BlockSparse) -> torch.Tensor:
    """The stored blocks of a dense (N, K) tensor, (nnz, r, c)."""
    _, r, c = weight.values.shape
    n, k = dense.shape
    blocks = dense.reshape(n // r, r, k // c, c).transpose(1, 2)
    counts = weight.crow.diff().long()
    rows = torch.repeat_interleave(torch.arange(n // r, device=dense.device), counts)
    return blocks[rows, weight.col.long()]


def section_activation(context: Context) -> None:
    """Activation in the kernel's epilogue against the op followed by the function."""
    device = context.device
    m, mode = (VIT_TOKENS, "bfloat16") if device.type == "cuda" else (197, "float32")
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
    rows = []
    with torch.no_grad():
        for name, function in list(functions.items())[: 1 if context.quick else None]:
            cell = Cell(m, UP, 64, 0.9, mode, peers=False)
            operands = make_operands(cell, device)
            dense = operands.weight.dense
            measured = measure(
                {
                    "dense": lambda o=operands, f=function, w=dense: f(F.linear(o.x, w, o.bias)),
                    "apart": lambda o=operands, f=function: f(bsr_linear(o)),
                    "fused": lambda o=operands, a=name: bsr_linear(o, activation=a),
                },
                device,
                seconds=context.seconds,
            )
            context.failures.note(cell, measured)
            fused = measured.speedup_value("apart", "fused")
            rows.append(
                {
                    "activation": name,
                    "dense then function ms": measured.milliseconds("dense"),
                    "ours then function ms": measured.milliseconds("apart"),
                    "ours fused ms": measured.milliseconds("fused"),
                    "fused over ours then function x": fused,
                    "fused over dense x": measured.speedup_value("dense", "fused"),
                }
            )
    context.report.table(f"Fused activation, M = {m}, 3072 x 768, block 64, 0.9, {mode}", rows)


def section_host(context: Context) -> None:
    """Microseconds of host time per call at M = 1, and the eager wall time of a stream of calls."""
    cell = Cell(1, (14336, 4096), 64, 0.9, "bfloat16", peers=False)
    operands = make_operands(cell, context.device)
    dense = torch.nn.Linear(*cell.shape[::-1], device=context.device, dtype=cell.dtype)
    with torch.no_grad():
        dense.weight.copy_(operands.weight.dense)

    def layer() -> Callable[[], object]:
        from torchao_superblock import to_bsr_linear

        swapped = to_bsr_linear(dense, cell.block)
        return lambda: swapped(operands.x)

    from torchao_superblock.ops import bsr_linear as function

    candidates: dict[str, Callable[[], object]] = {
        "F.linear": lambda: F.linear(operands.x, dense.weight, dense.bias),
        "op": lambda: bsr_linear(operands),
        "function": lambda: bsr_linear(operands, function=function),
        "nn.Linear": lambda: dense(operands.x),
        "BSRLinear": _or_raise(layer),
    }
    modes = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "grad": torch.enable_grad,
    }
    rows, walls = [], []
    calls = 50
    for name, mode in modes.items():
        operands.x.requires_grad_(name == "grad")
        operands.weight.values.requires_grad_(name == "grad")
        with mode():
            measured = measure_host(candidates, calls=calls, rounds=20 if context.quick else 60)
            context.failures.note(cell, measured)
            wall = measure_host(
                candidates, calls=calls, rounds=20 if context.quick else 60, wait=True
            )
        row: Row = {"mode": name}
        for candidate in candidates:
            row[f"{candidate} us"] = microseconds(measured, candidate)
        pairs = {"op": "F.linear", "function": "F.linear", "BSRLinear": "nn.Linear"}
        for ours, theirs in pairs.items():
            a, b = row[f"{ours} us"], row[f"{theirs} us"]
            row[f"{ours} - {theirs} us"] = None if a is None or b is None else a - b
        judged = name != "grad"
        goal = HOST_GOAL_US if judged else None
        row |= {"goal": goal, "met": verdict(row["op - F.linear us"], at_most=goal)}
        rows.append(row)
        walls.append(
            {
                "mode": name,
                "F.linear us": microseconds(wall, "F.linear"),
                "op us": microseconds(wall, "op"),
                "op x": (ratio := wall.speedup_value("F.linear", "op")),
                "function us": microseconds(wall, "function"),
                "function x": wall.speedup_value("F.linear", "function"),
                "BSRLinear us": microseconds(wall, "BSRLinear"),
                "BSRLinear x": wall.speedup_value("nn.Linear", "BSRLinear"),
                "goal": 1.0 if judged else None,
                "met": verdict(ratio, at_least=1.0 if judged else None),
            }
        )
    context.report.table(
        "Host time per call, M = 1, 14336 x 4096, bfloat16, block 64, 0.9",
        rows,
        note=f"Goal: the op at most {HOST_GOAL_US:g} us above `F.linear`.",
    )
    context.report.table(
        "Eager calls one after another, M = 1 (whichever of host and GPU is slower)", walls
    )


def microseconds(measured: Measurements, name: str) -> float | None:
    """Median microseconds per call, or None."""
    timing = measured.timing(name)
    return None if timing is None else timing.median * 1e6


def cpu_cells(quick: bool) -> list[Cell]:
    """Every CPU goal at both shapes."""
    return [
        Cell(m, shape, block, sparsity, "float32", goal)
        for (m, block, sparsity), goal in CPU_GOALS.items()
        for shape in (UP, DOWN)
        if not (quick and (m == 1576 or (m, sparsity) == (1, 0.8)))
    ]


def section_forward(context: Context) -> None:
    """The CPU goals: float32 against dense and torch BSR, bfloat16 against our float32."""
    cells = cpu_cells(context.quick)
    progress = context.progress(len(cells), "forward")
    rows = []
    for cell in cells:
        progress.step(cell.label)
        rows.append(cpu_row(cell, context))
    progress.close()
    context.report.table(
        "Forward, float32 (and bfloat16 against our float32)",
        rows,
        columns=CPU_COLUMNS,
        note="`bfloat16 x float32`: our float32 time over our bfloat16 time; the goal is no "
        "slower, taken as at least 0.97 for the noise of the clock.",
    )
    context.report.table(
        "Goals, the lower of the two shapes",
        worst_of_shapes(rows),
        note="As set for two AVX2 cores; read the header for what this run had.",
    )


def cpu_row(cell: Cell, context: Context) -> Row:
    """One CPU cell with our bfloat16 in the same run."""
    with torch.no_grad():
        operands = make_operands(cell, context.device)
        brain = make_operands(replace(cell, mode="bfloat16"), context.device)
        candidates = make_candidates(operands, cell, context.device)
        candidates["ours bfloat16"] = lambda: bsr_linear(brain)
        candidates["dense bfloat16"] = lambda: F.linear(brain.x, brain.weight.dense, brain.bias)
        measured = measure(
            candidates, context.device, seconds=context.seconds,
            min_rounds=3 if context.quick else 7,
        )  # fmt: skip
        error = forward_error(operands) if measured.timing("ours") else None
        brain_error = forward_error(brain) if measured.timing("ours bfloat16") else None
    context.failures.note(cell, measured)
    row = make_row(cell, operands, measured, error, context.roofline)
    ratio = measured.speedup_value("ours", "ours bfloat16")
    return row | {
        "bfloat16 x float32": ratio,
        "bfloat16 met": verdict(ratio, at_least=0.97),
        "bfloat16 over dense bfloat16 x": measured.speedup_value("dense bfloat16", "ours bfloat16"),
        "bfloat16 error": brain_error,
    }


def worst_of_shapes(rows: Sequence[Row]) -> list[Row]:
    """For each goal the lower speedup of the two shapes."""
    groups: dict[tuple[int, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["M"], row["block"], row["sparsity"]].append(row)
    table = []
    for (m, block, sparsity), members in groups.items():
        speeds = [row["ours x"] for row in members]
        worst = None if None in speeds else min(speeds)
        goal = members[0]["goal"]
        table.append(
            {
                "M": m,
                "block": block,
                "sparsity": sparsity,
                "ours x": worst,
                "goal": goal,
                "result": verdict(worst, at_least=goal),
            }
        )
    return table


def section_dtypes(context: Context) -> None:
    """float64 and float16 on the CPU, M = 197."""
    cells = [
        Cell(197, shape, 32, 0.9, mode) for mode in ("float64", "float16") for shape in (UP, DOWN)
    ]
    context.report.table(
        "Other dtypes, M = 197, block 32, sparsity 0.9",
        run_cells(cells, context, "dtypes"),
        columns=["dtype", *CPU_COLUMNS[1:-4]],
    )


SECTIONS: dict[str, dict[str, Callable[[Context], None]]] = {
    "cuda": {
        "vit": section_vit,
        "sweep": section_sweep,
        "llm": section_llm,
        "host": section_host,
        "float32": section_float32,
        "float16": section_float16,
        "backward": section_backward,
        "activation": section_activation,
    },
    "cpu": {
        "forward": section_forward,
        "sweep": section_sweep,
        "backward": section_backward,
        "activation": section_activation,
        "dtypes": section_dtypes,
    },
}


# -------------------------------------------------------------------------------------------------
# Pictures
# -------------------------------------------------------------------------------------------------


def draw_bars(rows: Sequence[Row], title: str) -> Any:
    """Speedup of each block size at each sparsity, one panel a shape.

    Args:
        rows: rows of the sweep section.
        title: of the figure.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys(row["N x K"] for row in rows))
    blocks = sorted({int(row["block"]) for row in rows})
    wanted = [s for s in (0.5, 0.7, 0.8, 0.9, 0.95) if any(r["sparsity"] == s for r in rows)]
    speed = {(r["N x K"], int(r["block"]), r["sparsity"]): r["ours x"] for r in rows}
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.2 * len(shapes), 3.8), sharey=True, squeeze=False
    )
    width = 0.8 / len(blocks)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for i, block in enumerate(blocks):
            heights = [speed.get((shape, block, s)) or 0.0 for s in wanted]
            places = [j + (i - (len(blocks) - 1) / 2) * width for j in range(len(wanted))]
            bars = axis.bar(
                places, heights, width * 0.92, color=BLOCK_COLORS[block], label=f"block {block}"
            )
            axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=7, padding=1)
        axis.axhline(1, color="#c1121f", linewidth=1)
        axis.set_xticks(range(len(wanted)), [f"{s:.0%}" for s in wanted])
        axis.set_xlabel("blocks that are zero")
        axis.set_title(f"{shape} (out x in)")
    axes[0][0].set_ylabel("speedup over dense")
    axes[0][0].legend(loc="upper left")
    figure.suptitle(title)
    return figure


def draw_curves(rows: Sequence[Row], title: str) -> Any:
    """Speedup over sparsity, one line a block size, break-even marked where it crosses 1.

    Args:
        rows: rows of the sweep section.
        title: of the figure.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys(row["N x K"] for row in rows))
    blocks = sorted({int(row["block"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.2 * len(shapes), 3.8), sharey=True, squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for block in blocks:
            points = sorted(
                (r["sparsity"], r["ours x"])
                for r in rows
                if r["N x K"] == shape and int(r["block"]) == block and r["ours x"] is not None
            )
            if not points:
                continue
            crossing = break_even(points)
            label = f"block {block}"
            if crossing:
                label += f", even at {crossing:.2f}"
            elif crossing == 0:
                label += f", faster from {points[0][0]:g} on"
            color = BLOCK_COLORS[block]
            axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=3.5, label=label)
            if crossing:
                axis.plot(crossing, 1, "o", color="white", markeredgecolor=color, markersize=8)
        axis.axhline(1, color="#c1121f", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel("fraction of blocks that are zero")
        axis.set_title(f"{shape} (out x in)")
        axis.legend(loc="upper left")
    axes[0][0].set_ylabel("speedup over dense")
    figure.suptitle(title)
    return figure


def draw(report: Report, device: torch.device) -> None:
    """Both pictures, from the sweep's rows."""
    rows = [
        record
        for record in report.records
        if record["section"] == "sweep" and record["ours x"] is not None and not is_wrong(record)
    ]
    if not rows:
        return
    where = report.facts["device"].split(" (")[0]
    what = f"{where}, {rows[0]['dtype']}, M = {rows[0]['M']}"
    report.figure(draw_bars(rows, what), "speedup", f"Speedup of one linear layer, {what}")
    report.figure(draw_curves(rows, what), "break_even", f"Where it pays, {what}")


def is_wrong(record: Row) -> bool:
    """Whether any error in a record is too large to be rounding, or no number."""
    errors = [value for key, value in record.items() if key.split(" ")[0] == "error"]
    return any(isinstance(e, float) and not e <= LARGEST_ERROR for e in errors)


def summarise(report: Report) -> int:
    """Counts the goals met and lists those missed, and results that are wrong.

    Returns:
        How many results are wrong.
    """
    met = missed = 0
    wrong = [record for record in report.records if is_wrong(record)]
    misses = []
    for record in report.records:
        for key, value in record.items():
            if key.endswith("met") and value in ("pass", "miss"):
                right = value == "pass" and not is_wrong(record)
                met += right
                if not right:
                    missed += 1
                    misses.append(
                        {
                            "section": record["section"],
                            "goal of": key.removesuffix("met").strip() or "speed",
                            **{k: record[k] for k in ("M", "N x K", "block", "sparsity", "dtype",
                                                      "mode", "ours x", "x floor", "goal")
                               if k in record},
                        }
                    )  # fmt: skip
    if met + missed:
        report.text(f"**{met} of {met + missed} goals met.**")
    if misses:
        report.table("Goals missed", misses)
    if wrong:
        report.table("Wrong results", wrong, note="Their times say nothing.")
    return len(wrong)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    every = sorted({name for sections in SECTIONS.values() for name in sections})
    parser.add_argument(
        "--sections", nargs="+", choices=every, metavar="NAME", help="default: all of the device"
    )
    arguments = parser.parse_args(argv)
    device = pick_device(arguments)
    available = SECTIONS[device.type]
    chosen = arguments.sections or list(available)
    unknown = [name for name in chosen if name not in available]
    if unknown:
        parser.error(
            f"{device.type} has no section {', '.join(unknown)}; it has {', '.join(available)}"
        )
    import torchao_superblock.ops  # noqa: F401  registers the op

    report = Report(
        "bsr_linear",
        "One linear layer: dense, torch BSR, torchao, ours",
        device,
        directory=arguments.output_dir,
        label=arguments.label,
    )
    roofline = measure_roofline(device, quick=arguments.quick)
    for name, value in roofline.describe().items():
        report.fact(name, value)
    context = Context(device, report, roofline, Failures(), arguments.quick)
    broken = []
    for name in chosen:
        try:
            available[name](context)
        except Exception as error:  # the other sections are still worth having
            traceback.print_exc()
            report.text(f"**Section {name} failed:** {type(error).__name__}: {error}")
            broken.append(name)
    context.failures.report(report)
    n_wrong = summarise(report)
    if not arguments.no_pictures:
        draw(report, device)
    path = report.write()
    print(f"\nwritten: {path}")
    if broken:
        raise SystemExit(f"failed sections: {', '.join(broken)}")
    if n_wrong:
        raise SystemExit(f"{n_wrong} wrong results, listed in {path}")
    return path


if __name__ == "__main__":
    main()
