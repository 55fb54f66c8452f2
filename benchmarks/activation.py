"""What does an activation in the kernel save, against the op followed by the function?

    python benchmarks/activation.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/activation.py --device cpu --quick

How it is measured: bsr_linear.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.cells import UP, VIT_TOKENS, Cell
from benchmarks.layer.operands import bsr_linear, make_operands
from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.interleaved import measure


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


SECTIONS: Sections = {
    "cuda": {"activation": section_activation},
    "cpu": {"activation": section_activation},
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script(
        "activation", "An activation in the kernel of a linear layer", __doc__, SECTIONS, argv
    )


if __name__ == "__main__":
    main()
