"""What does a call cost the host, eager, with and without grad?

    python benchmarks/host_time.py                     # CUDA only

Microseconds of host time per call of one token, and the wall time of a stream of such calls. How it is measured:
bsr_linear.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.candidates import or_raise
from benchmarks.layer.cells import Cell
from benchmarks.layer.operands import bsr_linear, make_operands
from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.host import measure_host

Row = dict[str, Any]


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
        "BSRLinear": or_raise(layer),
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
            row[f"{candidate} us"] = measured.microseconds(candidate)
        pairs = {"op": "F.linear", "function": "F.linear", "BSRLinear": "nn.Linear"}
        for ours, theirs in pairs.items():
            a, b = row[f"{ours} us"], row[f"{theirs} us"]
            row[f"{ours} - {theirs} us"] = None if a is None or b is None else a - b
        rows.append(row)
        walls.append(
            {
                "mode": name,
                "F.linear us": wall.microseconds("F.linear"),
                "op us": wall.microseconds("op"),
                "op x": wall.speedup_value("F.linear", "op"),
                "function us": wall.microseconds("function"),
                "function x": wall.speedup_value("F.linear", "function"),
                "BSRLinear us": wall.microseconds("BSRLinear"),
                "BSRLinear x": wall.speedup_value("nn.Linear", "BSRLinear"),
            }
        )
    context.report.table("Host time per call, M = 1, 14336 x 4096, bfloat16, block 64, 0.9", rows)
    context.report.table(
        "Eager calls one after another, M = 1 (whichever of host and GPU is slower)", walls
    )


SECTIONS: Sections = {"cuda": {"host": section_host}}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script(
        "host_time", "Host time of a call of one linear layer", __doc__, SECTIONS, argv
    )


if __name__ == "__main__":
    main()
