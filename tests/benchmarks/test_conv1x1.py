"""The benchmark of 1x1 convolutions compares modules that compute the same."""

from benchmarks import conv1x1 as bench
from tests.benchmarks.layer.tiny import tiny_context


def test_dense_and_swapped_are_timed_in_both_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(64, 32, 5, 2)])
    context = tiny_context(tmp_path)
    bench.section_layers(context)
    assert [row["memory"] for row in context.report.records] == list(bench.FORMATS)
    for row in context.report.records:
        assert row["dense ms"] > 0 and row["ours ms"] > 0 and row["eager x"] > 0
        assert row["error"] < 1e-5
