"""A cell says how fast ours and the peers are, how far from right, and why something failed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.layer.cells import Cell
from benchmarks.layer.operands import make_operands
from benchmarks.layer.runs import make_row, run_cell, run_cells
from benchmarks.measure.roofline import Roofline
from benchmarks.measure.timings import Measurements, Timing
from tests.benchmarks.layer.tiny import TINY, tiny_context


@pytest.fixture
def context(tmp_path):
    return tiny_context(tmp_path)


def test_a_cell_reports_speed_error_and_peers(context):
    row = run_cell(TINY, context)
    assert row["ours x"] > 0 and row["torch BSR x"] > 0
    assert row["error"] < 1e-6
    assert row["GFLOP/s"] > 0 and row["x floor"] > 0


@pytest.mark.parametrize("mode", ["float64", "float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("block", [16, (32, 8)])
def test_a_cell_of_any_dtype_and_block(context, mode, block):
    row = run_cell(Cell(3, (64, 32), block, 0.5, mode, peers=False), context)
    assert row["ours x"] > 0
    assert row["error"] < 1e-2


def test_every_row_keeps_the_columns_that_results_are_read_by(context):
    (row,) = run_cells([replace(TINY, peers=False)], context, "one")
    columns = "M, N x K, block, sparsity, dtype, dense ms, ours ms, ours x, quartiles"
    assert set(columns.split(", ")) <= set(row)
    assert (row["N x K"], row["block"]) == ("32 x 64", "16")


def test_a_peer_that_fails_is_reported_and_the_rest_measured(context, monkeypatch):
    def no_bsr(self, *args):
        raise NotImplementedError("no BSR here")

    monkeypatch.setattr(torch.Tensor, "to_sparse_bsr", no_bsr)
    row = run_cell(TINY, context)
    assert row["torch BSR x"] == "fails"
    assert row["ours x"] > 0
    context.failures.report(context.report)
    record = context.report.records[-1]
    assert (record["candidate"], record["cells"]) == ("torch BSR", 1)
    assert record["what it said"] == "NotImplementedError: no BSR here"


def test_the_share_of_dense_counts_only_stored_blocks():
    dense, ours = Timing((1.0,)), Timing((0.2,))
    cell = Cell(4, (64, 64), 16, 0.75, "float32")
    operands = make_operands(cell, torch.device("cpu"))
    row = make_row(
        cell, operands, Measurements(dense=dense, ours=ours), 0.0, Roofline(1.0, {"float32": 1.0})
    )
    assert row["share of dense GFLOP/s"] == pytest.approx(0.25 / 0.2)
    assert row["x floor"] == pytest.approx(0.2 / (2 * 4 * 16 * 64))


def test_a_share_of_the_time(context):
    assert replace(context, share=0.5).seconds == context.seconds / 2


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_cell_on_cuda(tmp_path, graph):
    cell = Cell(16, (256, 512), 64, 0.75, "bfloat16", peers=False, graph=graph)
    row = run_cell(cell, tiny_context(tmp_path, "cuda"))
    assert row["ours x"] > 0 and row["dense ms"] > 0
    assert row["error"] < 1e-2
    assert (row["over dense with zeros x"] is None) == graph
    assert "note" not in row  # both sides could be captured
