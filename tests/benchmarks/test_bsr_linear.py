"""How fast one layer is: which cells are measured, and what is said of them."""

import csv

from benchmarks import bsr_linear as bench
from tests.benchmarks.layer.tiny import TINY


def test_both_mlp_shapes_are_measured_on_the_cpu():
    cells = {(c.M, c.block, c.sparsity, c.shape) for c in bench.cpu_cells(quick=False)}
    assert len(cells) == len(bench.cpu_cells(quick=False)) == 42
    for m in (1, 197, 1576):
        for shape in (bench.UP, bench.DOWN):
            assert {(m, b, s, shape) for b in (16, 32, 64) for s in (0.9, 0.8)} <= cells
            assert (m, 64, 0.5, shape) in cells


def test_both_mlp_shapes_are_measured_on_a_gpu():
    cells = bench.cuda_vit_cells(quick=True)
    assert all(cell.M == 50432 and cell.mode == "bfloat16" for cell in cells)
    for shape in (bench.UP, bench.DOWN):
        assert {(c.block, c.sparsity) for c in cells if c.shape == shape} == set(bench.VIT_MASKS)
    more = bench.cuda_vit_cells(quick=False)
    assert more[: len(cells)] == cells
    assert {(64, 16), (128, 32), (32, 64)} < {cell.block for cell in more}


def test_the_lower_of_the_shapes_counts():
    rows = [{"M": 1, "block": "16", "sparsity": 0.9, "ours x": x} for x in (9.0, 5.0)]
    assert bench.worst_of_shapes(rows) == [{"M": 1, "block": "16", "sparsity": 0.9, "ours x": 5.0}]
    rows[0]["ours x"] = None  # it failed
    assert bench.worst_of_shapes(rows)[0]["ours x"] is None


def test_a_whole_run_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "cpu_cells", lambda quick: [TINY])
    arguments = ["--device", "cpu", "--quick", "--sections", "forward"]
    path = bench.main([*arguments, "--output-dir", str(tmp_path)])
    assert "_bsr_linear_cpu_" in path.name
    assert "The lower of the two shapes" in path.read_text()
    with path.with_suffix(".csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["section"].startswith("Forward, float32")
    assert (row["M"], row["N x K"], row["block"], row["sparsity"]) == ("4", "32 x 64", "16", "0.75")
    assert float(row["ours x"]) > 0 and float(row["torch BSR x"]) > 0
    assert float(row["bfloat16 x float32"]) > 0 and float(row["bfloat16 error"]) < 1e-2
