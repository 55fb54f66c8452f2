"""The attention benchmark compares modules that compute the same."""

from benchmarks import attention as bench
from tests.benchmarks.layer.tiny import tiny_context


def test_dense_and_swapped_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 64)
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "TOKENS", 5)
    context = tiny_context(tmp_path)
    bench.section_attention(context)
    (row,) = context.report.records
    assert row["swapped"] == "both"
    assert row["eager x"] > 0 and row["best of both x"] > 0
    assert row["error"] < 1e-5
