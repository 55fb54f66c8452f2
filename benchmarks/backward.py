"""How fast are the gradients of one linear layer? Of x, the stored blocks and the bias, against a dense layer's.

    python benchmarks/backward.py                      # CUDA if there is a GPU, else the CPU
    python benchmarks/backward.py --device cpu --quick

Speedups are dense time / our time within the run; how they are measured: bsr_linear.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.cells import DOWN, UP, VIT_TOKENS, Cell, block_text
from benchmarks.layer.operands import Operands, bsr_linear, make_operands
from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.timings import Failure, Measurements
from benchmarks.measure.weights import gather_blocks

Row = dict[str, Any]


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
        context.failures.note(cell, Measurements({"ours backward": Failure.of(error)}))
    return row


SECTIONS: Sections = {"cuda": {"backward": section_backward}, "cpu": {"backward": section_backward}}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script(
        "backward", "Gradients of one linear layer: dense, ours", __doc__, SECTIONS, argv
    )


if __name__ == "__main__":
    main()
