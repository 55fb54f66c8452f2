"""The activation benchmark compares three ways to the same numbers."""

from benchmarks import activation as bench
from tests.benchmarks.layer.tiny import tiny_context


def test_every_way_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "UP", (128, 64))
    context = tiny_context(tmp_path)
    bench.section_activation(context)
    (row,) = context.report.records
    assert row["activation"] == "gelu"
    assert row["ours fused ms"] > 0 and row["fused over dense x"] > 0
