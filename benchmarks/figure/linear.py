"""Figure 1: one linear layer in the shapes of ViT-B/16."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cells.question import Row, Tick
from benchmarks.figure.points import Point, Sweep
from benchmarks.layer import cells
from benchmarks.layer.candidates import PEERS, make_candidates
from benchmarks.layer.operands import forward_error, make_operands
from benchmarks.layer.runs import make_row
from benchmarks.layer.script import LARGEST_ERROR
from benchmarks.measure.interleaved import measure
from benchmarks.measure.precision import precision
from benchmarks.measure.roofline import Roofline

SHAPES = ("3072 x 768", "768 x 3072", "2304 x 768", "768 x 768")
"""Out x in of the MLP's layers, the input projections of attention together, and its output projection."""
TINY_SHAPES = ("64 x 32", "32 x 64")
TOKENS = 197
NO_ROOFLINE = Roofline(float("nan"))  # a figure shows no distance to the floor


@dataclass
class LinearLayer(Sweep):
    """Speedup of a linear layer over dense: ours and the peers."""

    def run(self, cell: Point, tick: Tick) -> Row:
        """Measures a layer; `what` is its shape, and an image is 197 tokens."""
        n, k = map(int, cell.what.removeprefix("tiny ").split(" x "))
        tokens = 3 if self.tiny else TOKENS
        asked = cells.Cell(
            cell.batch * tokens, (n, k), cell.block, cell.sparsity, cell.mode, self.peers
        )
        with precision(cell.mode), torch.no_grad():
            operands = make_operands(asked, self.device)
            candidates = make_candidates(operands, asked, self.device)
            tick("measuring")
            measured = measure(
                candidates, self.device, seconds=self.seconds, min_rounds=3 if self.tiny else 7
            )
            if reason := measured.failure("ours") or measured.failure("dense"):
                raise RuntimeError(reason)
            error = forward_error(operands)
        if not error <= LARGEST_ERROR:
            raise ArithmeticError(f"our result is {error:.1e} off")
        row = make_row(asked, operands, measured, error, NO_ROOFLINE)
        shown = ["dense ms", "ours ms", "ours x", "quartiles", "over dense with zeros x", "error"]
        reasons = {name: reason for name in measured if (reason := measured.failure(name))}
        return {
            "M": asked.M,
            **{key: row[key] for key in [*shown, *(f"{peer} x" for peer in PEERS)] if key in row},
            "failures": "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        }
