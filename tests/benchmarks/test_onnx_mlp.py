"""The ONNX benchmark compares two files of one model that compute the same."""

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from benchmarks import onnx_mlp


def test_both_files_compute_the_same_and_one_is_small():
    row = onnx_mlp.cell(16, 0.9, threads=1, seconds=0.01, width=64, hidden=256)
    assert row["dense error"] < 1e-6 and row["BSR error"] < 1e-6
    assert row["BSR MB"] < row["dense MB"]
    assert row["dense ms"] > 0 and row["BSR ms"] > 0 and row["speedup"] > 0
