"""The benchmark of measured swaps says how long one takes and what it decided."""

from benchmarks import measured_swap as bench
from benchmarks.model.catalogue import TINY_VIT
from tests.benchmarks.layer.tiny import tiny_context


def test_a_swap_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MODELS", {"cpu": [("tiny", TINY_VIT, 2, 16)]})
    context = tiny_context(tmp_path)
    bench.section_swap(context)
    (row,) = context.report.records
    assert row["model"] == "tiny" and row["seconds"] > 0 and row["error"] < 1e-5
    # Two projections of an attention count one by one, as the two layers of an MLP do.
    assert row["swapped"] + row["slower"] == 8
