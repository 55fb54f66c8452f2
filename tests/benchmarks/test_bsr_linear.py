"""The layer benchmark covers every goal, checks its numbers, and writes what it found."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bsr_linear as bench
from benchmarks.common import Measurements, Roofline, Timing

TINY = bench.Cell(4, (32, 64), 16, 0.75, "float32", goal=1e9)


@pytest.fixture
def context(tmp_path):
    report = bench.Report("bsr_linear", "Test", "cpu", directory=tmp_path)
    roofline = Roofline(1e9, {"float32": 1e9})
    return bench.Context(torch.device("cpu"), report, roofline, bench.Failures(), quick=True)


def test_every_cpu_goal_is_measured_at_both_shapes():
    cells = {(c.M, c.block, c.sparsity, c.shape): c.goal for c in bench.cpu_cells(quick=False)}
    for m in (1, 197, 1576):
        for shape in (bench.UP, bench.DOWN):
            for block in (16, 32, 64):
                assert cells[m, block, 0.9, shape] > cells[m, block, 0.8, shape] > 1
            assert cells[m, 64, 0.5, shape] > 1
    assert len(cells) == 42


def test_every_cuda_goal_is_measured_at_both_shapes():
    cells = bench.cuda_vit_cells(quick=True)
    assert len(cells) == 2 * len(bench.CUDA_VIT_GOALS)
    assert all(cell.goal and cell.M == 50432 and cell.mode == "bfloat16" for cell in cells)
    assert {(cell.block, cell.sparsity) for cell in cells} == set(bench.CUDA_VIT_GOALS)


def test_a_cell_reports_speed_error_and_peers(context):
    row = bench.run_cell(TINY, context)
    assert row["ours x"] > 0 and row["torch BSR x"] > 0
    assert row["error"] < 1e-6
    assert row["GFLOP/s"] > 0 and row["x floor"] > 0
    assert (row["goal"], row["met"]) == (1e9, "miss")


@pytest.mark.parametrize("mode", ["float64", "float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("block", [16, (32, 8)])
def test_a_cell_of_any_dtype_and_block(context, mode, block):
    cell = bench.Cell(3, (64, 32), block, 0.5, mode, peers=False)
    row = bench.run_cell(cell, context)
    assert row["ours x"] > 0
    assert row["error"] < 1e-2
    assert (row["goal"], row["met"]) == (None, "")


def test_a_peer_that_fails_is_reported_and_the_rest_measured(context, monkeypatch):
    def no_bsr(self, *args):
        raise NotImplementedError("no BSR here")

    monkeypatch.setattr(torch.Tensor, "to_sparse_bsr", no_bsr)
    row = bench.run_cell(TINY, context)
    assert row["torch BSR x"] == "fails"
    assert row["ours x"] > 0
    context.failures.report(context.report)
    record = context.report.records[-1]
    assert (record["candidate"], record["cells"]) == ("torch BSR", 1)
    assert record["what it said"] == "NotImplementedError: no BSR here"


def test_the_backward_is_compared_with_float64(context):
    row = bench.backward_row(bench.Cell(8, (32, 64), 16, 0.75, "float32"), context)
    assert max(row["error x"], row["error values"], row["error bias"]) < 1e-6
    assert row["ours x"] > 0


def test_gather_blocks_reads_the_stored_blocks():
    weight = bench.random_block_sparse(32, 64, (8, 16), 0.5)
    assert torch.equal(bench.gather_blocks(weight.dense, weight), weight.values)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.5), (0.7, 1.5)], 0.6),
        ([(0.5, 2.0), (0.7, 3.0)], 0.0),  # everywhere faster
        ([(0.5, 0.5), (0.7, 0.9)], None),  # never
        ([(0.5, 1.1), (0.6, 0.9), (0.7, 1.1)], 0.65),  # only from the last crossing on
        ([], None),
    ],
)
def test_break_even(points, expected):
    found = bench.break_even(points)
    assert found == (pytest.approx(expected) if expected is not None else None)


def test_the_worse_shape_decides_the_break_even():
    rows = [
        {"block": "16", "N x K": shape, "sparsity": s, "ours x": x}
        for shape, speeds in (("a", (0.5, 1.5)), ("b", (0.8, 1.2)))
        for s, x in zip((0.6, 0.8), speeds, strict=True)
    ]
    (row,) = bench.break_even_rows(rows, {16: 0.6})
    assert (row["a"], row["b"], row["worse of them"], row["met"]) == (
        "0.70",
        "0.70",
        "0.70",
        "miss",
    )
    rows[0]["ours x"] = 1.1
    (row,) = bench.break_even_rows(rows, {16: 0.75})
    assert (row["a"], row["met"]) == ("below 0.6", "pass")


def test_the_lower_of_the_shapes_counts():
    rows = [{"M": 1, "block": "16", "sparsity": 0.9, "ours x": x, "goal": 6.0} for x in (9.0, 5.0)]
    (row,) = bench.worst_of_shapes(rows)
    assert (row["ours x"], row["result"]) == (5.0, "miss")


def test_the_share_of_dense_counts_only_stored_blocks():
    dense, ours = Timing((1.0,)), Timing((0.2,))
    operands = bench.make_operands(
        bench.Cell(4, (64, 64), 16, 0.75, "float32"), torch.device("cpu")
    )
    cell = bench.Cell(4, (64, 64), 16, 0.75, "float32")
    row = bench.make_row(
        cell, operands, Measurements(dense=dense, ours=ours), 0.0, Roofline(1.0, {"float32": 1.0})
    )
    assert row["share of dense GFLOP/s"] == pytest.approx(0.25 / 0.2)
    assert row["x floor"] == pytest.approx(0.2 / (2 * 4 * 16 * 64))


def test_a_whole_run_writes_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "UP", (64, 32))
    monkeypatch.setattr(bench, "DOWN", (32, 64))
    monkeypatch.setattr(bench, "CPU_GOALS", {(2, 16, 0.9): 1e9, (2, 32, 0.5): 0.0})
    monkeypatch.setattr(bench, "BLOCK_COLORS", {16: "k", 32: "k", 64: "k"})
    monkeypatch.setattr(
        bench, "section_sweep", lambda context: context.report.records.extend(SWEEP)
    )
    monkeypatch.setitem(bench.SECTIONS["cpu"], "sweep", bench.section_sweep)
    path = bench.main(
        [
            "--device",
            "cpu",
            "--quick",
            "--sections",
            "forward",
            "sweep",
            "--output-dir",
            str(tmp_path),
        ]
    )
    text = path.read_text()
    assert "Goals missed" in text and "goals met" in text
    assert path.with_suffix(".csv").exists()
    names = {picture.name.removeprefix(path.stem) for picture in tmp_path.glob("*.png")}
    assert names == {"_speedup.png", "_break_even.png"}


SWEEP = [
    {"section": "sweep", "M": 2, "N x K": shape, "block": "16", "sparsity": s, "ours x": 3 * s,
     "dtype": "float32"}
    for shape in ("64 x 32", "32 x 64")
    for s in (0.2, 0.5, 0.9)
]  # fmt: skip


def test_a_wrong_result_is_a_miss_and_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "cpu_cells", lambda quick: [replace(TINY, goal=1e-9)])
    arguments = ["--device", "cpu", "--quick", "--sections", "forward", "--no-pictures"]
    arguments += ["--output-dir", str(tmp_path)]
    text = bench.main(arguments).read_text()
    assert "Wrong results" not in text and "**0 of " not in text
    monkeypatch.setattr(bench, "forward_error", lambda operands: 0.6)
    with pytest.raises(SystemExit, match="1 wrong result"):
        bench.main(arguments)
    (path,) = tmp_path.glob("*.md")
    text = path.read_text()
    assert "Wrong results" in text and "**0 of " in text


@pytest.mark.parametrize(("error", "wrong"), [(1e-3, False), (0.1, True), (float("nan"), True)])
def test_what_counts_as_wrong(error, wrong):
    assert bench.is_wrong({"error x": error, "error met": "pass", "ours x": 3.0}) is wrong
    assert not bench.is_wrong({"error": None, "ours x": 3.0})


def test_a_section_of_the_other_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--sections", "host"])
    assert "cpu has no section host" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_cell_on_cuda(tmp_path, graph):
    device = torch.device("cuda")
    report = bench.Report("bsr_linear", "Test", device, directory=tmp_path)
    roofline = Roofline(1e12, {"bfloat16": 1e14})
    context = bench.Context(device, report, roofline, bench.Failures(), quick=True)
    cell = bench.Cell(16, (256, 512), 64, 0.75, "bfloat16", peers=False, graph=graph)
    row = bench.run_cell(cell, context)
    assert row["ours x"] > 0 and row["dense ms"] > 0
    assert row["error"] < 1e-2
    assert ("over dense with zeros x" in row) and (row["over dense with zeros x"] is None) == graph
    assert "note" not in row  # both sides could be captured
