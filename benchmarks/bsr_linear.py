"""How fast is one linear layer? Dense, torch's BSR, torchao's BlockSparseTensor and ours, in one interleaved run.

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
    llm         14336 x 4096 and back, M = 1, 16 (kernel time from a CUDA graph, weights cold), 512,
                8192; the shapes of larger models at M = 8192
    float32     IEEE and TF32
    float16     against our own bfloat16
Sections on the CPU
    forward     M = 1, 197, 1576, float32 and bfloat16, all peers
    dtypes      float64 and float16

Other questions about one layer have scripts of their own: break_even.py (from which sparsity), backward.py,
activation.py (fused), host_time.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.candidates import make_candidates
from benchmarks.layer.cells import DOWN, UP, VIT_TOKENS, Cell
from benchmarks.layer.operands import bsr_linear, forward_error, make_operands
from benchmarks.layer.runs import Context, make_row, run_cells
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.interleaved import measure
from benchmarks.report.progress import Progress

Row = dict[str, Any]

# Block and sparsity.
VIT_MASKS = (
    (64, 0.9),
    (64, 0.8),
    (64, 0.7),
    (64, 0.5),
    (32, 0.9),
    (32, 0.8),
    (16, 0.9),
    (128, 0.9),
)
CPU_MASKS = ((16, 0.9), (32, 0.9), (64, 0.9), (16, 0.8), (32, 0.8), (64, 0.8), (64, 0.5))
# The MLPs of larger models, whose x is more than an L2 cache holds.
LARGE_SHAPES = ((13824, 5120), (5120, 13824), (28672, 8192), (8192, 28672))

FORWARD_COLUMNS = [
    "M", "N x K", "block", "sparsity", "dense ms", "torch BSR x", "torchao x", "ours x",
    "quartiles", "over dense with zeros x", "x floor", "error",
]  # fmt: skip
CPU_COLUMNS = [
    "M", "N x K", "block", "sparsity", "dense ms", "torch BSR x", "ours x", "quartiles", "GFLOP/s",
    "share of dense GFLOP/s", "error", "bfloat16 x float32",
]  # fmt: skip


def cuda_vit_cells(quick: bool) -> list[Cell]:
    """The MLP shapes, then the attention shapes and rectangular blocks."""
    cells = [
        Cell(VIT_TOKENS, shape, block, sparsity, "bfloat16")
        for block, sparsity in VIT_MASKS
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
    context.report.table(
        "ViT-B/16 shapes, batch 256 (50432 tokens), bfloat16",
        run_cells(cells, context, "vit"),
        columns=FORWARD_COLUMNS,
    )


def section_llm(context: Context) -> None:
    """Language-model shapes in bfloat16, from one token to 8192."""
    cells = [
        Cell(m, shape, block, 0.9, "bfloat16", graph=m <= 16)
        for m in (8192, 512, 16, 1)
        for block in (64, 128)
        for shape in ((14336, 4096), (4096, 14336))
        if not (context.quick and block == 128)
    ]
    if not context.quick:
        cells += [
            Cell(8192, shape, block, 0.9, "bfloat16")
            for shape in LARGE_SHAPES
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
        Cell(VIT_TOKENS, shape, block, 0.9, mode)
        for mode in ("float32", "tf32")
        for block in (64, 32)
        for shape in (UP, DOWN)
    ]
    context.report.table(
        "float32, IEEE (`highest`) and TF32 (`high`), sparsity 0.9",
        run_cells(cells, context, "float32"),
        columns=["dtype", *FORWARD_COLUMNS],
        note="The floor of IEEE mode takes three TF32 products for one.",
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
        rows.append(
            {
                "N x K": f"{shape[0]} x {shape[1]}",
                "block": 64,
                "sparsity": 0.9,
                "bfloat16 ms": measured.milliseconds("bfloat16"),
                "float16 ms": measured.milliseconds("float16"),
                "float16 speed / bfloat16 speed": measured.speedup_value("bfloat16", "float16"),
                "over dense float16 x": measured.speedup_value("dense float16", "float16"),
                "error": error,
            }
        )
    context.report.table("float16 against bfloat16", rows)


def cpu_cells(quick: bool) -> list[Cell]:
    """Both MLP shapes."""
    return [
        Cell(m, shape, block, sparsity, "float32")
        for m in (1, 197, 1576)
        for block, sparsity in CPU_MASKS
        for shape in (UP, DOWN)
        if not (quick and (m == 1576 or (m, sparsity) == (1, 0.8)))
    ]


def section_forward(context: Context) -> None:
    """float32 against dense and torch BSR, bfloat16 against our float32."""
    cells = cpu_cells(context.quick)
    progress = Progress(len(cells), "forward")
    rows = []
    for cell in cells:
        progress.step(cell.label)
        rows.append(cpu_row(cell, context))
    progress.close()
    context.report.table(
        "Forward, float32 (and bfloat16 against our float32)",
        rows,
        columns=CPU_COLUMNS,
        note="`bfloat16 x float32`: our float32 time over our bfloat16 time.",
    )
    context.report.table("The lower of the two shapes", worst_of_shapes(rows), to_csv=False)


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
            min_rounds=context.min_rounds,
        )  # fmt: skip
        error = forward_error(operands) if measured.timing("ours") else None
        brain_error = forward_error(brain) if measured.timing("ours bfloat16") else None
    context.failures.note(cell, measured)
    row = make_row(cell, operands, measured, error, context.roofline)
    return row | {
        "bfloat16 x float32": measured.speedup_value("ours", "ours bfloat16"),
        "bfloat16 over dense bfloat16 x": measured.speedup_value("dense bfloat16", "ours bfloat16"),
        "bfloat16 error": brain_error,
    }


def worst_of_shapes(rows: Sequence[Row]) -> list[Row]:
    """For each number of tokens and mask the lower speedup of the two shapes."""
    groups: dict[tuple[int, str, float], list[float | None]] = defaultdict(list)
    for row in rows:
        groups[row["M"], row["block"], row["sparsity"]].append(row["ours x"])
    return [
        {
            "M": m,
            "block": block,
            "sparsity": sparsity,
            "ours x": None if None in speeds else min(speeds),
        }
        for (m, block, sparsity), speeds in groups.items()
    ]


def section_dtypes(context: Context) -> None:
    """float64 and float16 on the CPU, M = 197."""
    cells = [
        Cell(197, shape, 32, 0.9, mode) for mode in ("float64", "float16") for shape in (UP, DOWN)
    ]
    context.report.table(
        "Other dtypes, M = 197, block 32, sparsity 0.9",
        run_cells(cells, context, "dtypes"),
        columns=["dtype", *CPU_COLUMNS[1:-1]],
    )


SECTIONS: Sections = {
    "cuda": {
        "vit": section_vit,
        "llm": section_llm,
        "float32": section_float32,
        "float16": section_float16,
    },
    "cpu": {"forward": section_forward, "dtypes": section_dtypes},
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script(
        "bsr_linear", "One linear layer: dense, torch BSR, torchao, ours", __doc__, SECTIONS, argv
    )


if __name__ == "__main__":
    main()
