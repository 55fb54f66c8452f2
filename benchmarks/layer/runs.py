"""Runs cells: from what to measure to the row of a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.layer.candidates import PEERS, make_candidates
from benchmarks.layer.cells import Cell, block_text
from benchmarks.layer.operands import Operands, forward_error, make_operands
from benchmarks.measure.interleaved import measure
from benchmarks.measure.precision import precision
from benchmarks.measure.roofline import Roofline
from benchmarks.measure.timings import Measurements
from benchmarks.report.files import Report
from benchmarks.report.progress import Progress

Row = dict[str, Any]


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
    """What every section needs.

    Attributes:
        device: where.
        report: where tables go.
        roofline: of the device.
        failures: of the peers, so far.
        quick: fewer cells and rounds.
        pictures: whether to draw.
        share: of the usual time that a cell gets.
    """

    device: torch.device
    report: Report
    roofline: Roofline
    failures: Failures
    quick: bool
    pictures: bool = True
    share: float = 1.0

    @property
    def seconds(self) -> float:
        """How long one cell is measured."""
        if self.device.type == "cuda":
            return self.share * (0.05 if self.quick else 0.12)
        return self.share * (0.15 if self.quick else 1.0)

    @property
    def min_rounds(self) -> int:
        """How many rounds there are at least."""
        return 3 if self.quick else 7


def run_cell(cell: Cell, context: Context) -> Row:
    """Measures one cell.

    Returns:
        A row for the table: times, speedups over dense, error, distance to the floor, and rates.
    """
    with precision(cell.mode), torch.no_grad():
        operands = make_operands(cell, context.device)
        candidates = make_candidates(operands, cell, context.device)
        measured = measure(
            candidates, context.device, seconds=context.seconds, graph=cell.graph,
            min_rounds=context.min_rounds,
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
    progress = Progress(len(cells), title)
    rows = []
    for cell in cells:
        progress.step(cell.label)
        rows.append(run_cell(cell, context))
    progress.close()
    return rows
