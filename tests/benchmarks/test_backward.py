"""Gradients are timed, and compared with float64."""

from benchmarks import backward as bench
from benchmarks.layer.cells import Cell
from tests.benchmarks.layer.tiny import tiny_context


def test_the_backward_is_compared_with_float64(tmp_path):
    row = bench.backward_row(Cell(8, (32, 64), 16, 0.75, "float32"), tiny_context(tmp_path))
    assert max(row["error x"], row["error values"], row["error bias"]) < 1e-6
    assert row["ours x"] > 0


def test_a_backward_that_fails_is_reported(tmp_path, monkeypatch):
    def no_gradients(*args):
        raise NotImplementedError("no gradients here")

    monkeypatch.setattr(bench, "bsr_linear", no_gradients)
    context = tiny_context(tmp_path)
    row = bench.backward_row(Cell(8, (32, 64), 16, 0.75, "float32"), context)
    assert "ours x" not in row
    context.failures.report(context.report)
    (record,) = context.report.records
    assert record["what it said"] == "NotImplementedError: no gradients here"
