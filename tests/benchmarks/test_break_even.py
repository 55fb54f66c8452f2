"""Where a curve crosses 1, and that it is drawn."""

import pytest

from benchmarks import break_even as bench
from tests.benchmarks.layer.tiny import tiny_context


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
        for shape, speeds in (("a", (0.5, 1.5)), ("b", (0.8, 1.1)))
        for s, x in zip((0.6, 0.8), speeds, strict=True)
    ]
    (row,) = bench.break_even_rows(rows)
    assert (row["a"], row["b"], row["worse of them"]) == ("0.70", "0.73", "0.73")
    rows[0]["ours x"] = 1.1
    rows[3]["ours x"] = 0.9
    (row,) = bench.break_even_rows(rows)
    assert (row["a"], row["b"], row["worse of them"]) == ("below 0.6", "never", "never")


def test_a_run_writes_the_sweep_that_pictures_are_drawn_from(tmp_path, monkeypatch):
    """With a measurement that takes no time."""
    pytest.importorskip("matplotlib")

    def rows(cells, context, title):
        assert context.seconds < tiny_context(tmp_path).seconds
        return [
            {"M": c.M, "N x K": f"{c.shape[0]} x {c.shape[1]}", "block": str(c.block), "dtype": c.mode,
             "sparsity": c.sparsity, "ours x": 3 * c.sparsity, "error": 1e-7}
            for c in cells
        ]  # fmt: skip

    monkeypatch.setattr(bench, "run_cells", rows)
    path = bench.main(["--device", "cpu", "--quick", "--output-dir", str(tmp_path)])
    assert "_break_even_cpu_" in path.name and "Break-even sparsity" in path.read_text()
    assert "\nsweep," in path.with_suffix(".csv").read_text()
    names = {picture.name.removeprefix(path.stem) for picture in tmp_path.glob("*.png")}
    assert names == {"_speedup.png", "_break_even.png"}


def test_wrong_results_are_not_drawn(tmp_path):
    report = tiny_context(tmp_path).report
    report.records.append({"section": "sweep", "ours x": 9.0, "error": 0.6})
    bench.draw(report)
    assert not list(tmp_path.glob("*.png"))
