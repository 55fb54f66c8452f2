"""Every figure runs in its tiny form, goes on where it stopped, and shows published points as such."""

import csv
import shutil

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark needs torchvision (the `examples` extra)")

from benchmarks import figures
from benchmarks.cells.results import Results
from benchmarks.figure import accuracy
from benchmarks.figure.points import Point
from benchmarks.report.files import RESULTS, Report

CPU = torch.device("cpu")


def ask(command, device=CPU):
    return figures.ask(figures.parse(command.split()), device)


def run(number, device="cpu", n=1):
    question = ask(f"{number} --quick")
    question.load(torch.device(device))
    cells = [cell for cell in question.cells() if cell.sparsity == 0.9]
    return {cell: question.run(cell, lambda text: None) for cell in cells[-n:]}


def test_the_grids():
    cuda = torch.device("cuda")
    sizes = {n: len(ask(str(n), cuda).cells()) for n in (1, 2, 3, 4, 6)}
    assert sizes == {1: 168, 2: 84, 3: 60, 4: 36, 6: 6}
    points = ask("2", cuda).cells()
    assert {p.mode for p in points[:42]} == {"bfloat16"} and {p.batch for p in points} == {256}
    assert [p.sparsity for p in points[:12:6]] == [0.9, 0.8]  # what is asked for most comes first
    assert {p.batch for p in ask("2").cells()} == {p.batch for p in ask("1").cells()} == {1}
    assert {p.setting for p in ask("6", cuda).cells()} == {"bfloat16, mlp", "bfloat16, all"}
    for number in (3, 4, 6):
        with pytest.raises(SystemExit, match=f"figure {number} is about a GPU"):
            ask(str(number))


def test_a_layer_is_compared_with_the_peers():
    ((point, row),) = run(1).items()
    assert point == Point("float32", "tiny 32 x 64", 32, 0.9, 2) and row["M"] == 6
    assert row["error"] < 1e-5 and row["ours x"] > 0 and row["torch BSR x"] is not None


@pytest.mark.parametrize("number", [2, 3])
def test_a_whole_model_is_compared_with_the_peers(number):
    ((point, row),) = run(number).items()
    assert point.setting == "float32, tiny all" and row["ours x"] == row["eager x"] > 0
    assert row["error"] < 1e-5 and row["ours narrow x"] > 0 and row["swapped"] >= 6
    assert isinstance(row["torch BSR x"], float) or "torch BSR, eager" in row["failures"]


def test_the_huge_model_is_built_where_it_is_asked_for():
    assert ask("6 --quick").huge and not ask("2").huge
    from benchmarks.model.vit import HUGE, build_vit

    with torch.device("meta"):
        model = build_vit(**HUGE)
    assert sum(p.numel() for p in model.parameters()) == 632_045_800  # of vit_h_14 at 224


def test_memory_of_the_swapped_weights_is_counted_with_their_indices():
    ((point, row),) = run(4).items()
    # Per MLP two weights of 64 x 128 in blocks of 32: 1 of 8 is kept. Indices and plans come on top.
    assert point.block == 32 and row["swapped"] >= 6
    assert 1 / 8 < row["weights"] < 1 / 2
    assert row["weights"] == pytest.approx(row["ours weights MB"] / row["dense weights MB"])
    assert row["file"] < 1 and row["peak"] is None


def test_a_whole_run_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the `examples` extra")
    command = f"1 --quick --device cpu --threads 1 --blocks 16 --output-dir {tmp_path}".split()
    report = figures.main([*command, "--sparsities", "0.5"])
    rows = list(csv.DictReader(report.with_suffix(".csv").open()))
    assert [row["what"] for row in rows] == ["tiny 64 x 32", "tiny 32 x 64"]
    assert report.with_name(report.stem + "_sparsity.png").exists()

    assert figures.main([*command, "--budget", "0"]) == report
    assert list(csv.DictReader(report.with_suffix(".csv").open())) == rows
    assert "2 points finished, 2 left" in capsys.readouterr().out
    assert "Left over: 2 points" in report.read_text()


def test_break_even_and_published_points_stand_beside_the_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the `examples` extra")
    rows = {
        Point("float32", "mlp", block, sparsity, 256): {"ours x": speedup, "failures": "torchao, eager: E: no"}
        for block, sparsity, speedup in [(16, 0.5, 0.8), (16, 0.9, 1.2), (64, 0.5, 1.5), (64, 0.9, 3.0)]
    }  # fmt: skip
    rows[Point("float32", "mlp", 32, 0.5, 256)] = {"ours x": 0.5, "torch BSR x": "fails"}
    table = {row["block"]: row for row in figures.break_even_rows(figures.records(2, rows))}
    assert {b: row["break-even sparsity"] for b, row in table.items()} == {
        16: "0.70", 32: "never", 64: "below 0.5",
    }  # fmt: skip
    assert table[64]["speedup at 0.9"] == 3.0 and table[64]["published at 0.9 (A100)"] == 1.65

    report = Report("figure2", "t", "cpu", directory=tmp_path)
    text = figures.write(report, 2, rows, [], True).read_text()
    assert "torchao, eager: E: no" in text and "0.70" in text
    assert [p.suffix for p in tmp_path.iterdir() if p.suffix != ".md"] == [".png"]

    huge = {Point("bfloat16", "mlp", 64, s, 256): {"ours x": 2.0} for s in (0.5, 0.8, 0.9)}
    shown = [row.get("published x (A100)") for row in figures.records(6, huge)]
    assert shown[0] is None and shown[1:] == pytest.approx([1.354, 1.552], abs=1e-3)


def test_accuracy_comes_from_the_newest_files_with_published_points_beside_it(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the `examples` extra")
    with pytest.raises(SystemExit, match=r"no file of benchmarks/quality.py"):
        figures.main(f"5 --quality-dir {tmp_path} --output-dir {tmp_path}".split())
    (source,) = RESULTS.glob("2026-11-30_quality_mnist_*.csv")
    shutil.copy(source, tmp_path / source.name)
    older = tmp_path / source.name.replace("2026-11-30", "2001-01-01")
    older.write_text("never read")
    files = accuracy.newest_files(tmp_path)
    assert [path.name for path in files] == [source.name]
    path = figures.main(f"5 --quality-dir {tmp_path} --output-dir {tmp_path}".split())
    text = path.read_text()
    assert "| reference README" in text and "63.00" in text and source.name in text
    assert list(tmp_path.glob("*_figure5_*_accuracy.png"))


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_figures_run_on_a_gpu(number):
    for row in run(number, "cuda", n=4).values():
        assert all(row.get(f"{way} x", 1) is not None for way in ("ours", "eager", "graph"))
        assert number != 4 or row["peak"] > 0


def test_points_survive_in_the_file(tmp_path):
    point = Point("bfloat16", "mlp", 64, 0.9, 256)
    Results(tmp_path / "a.csv", Point).add(point, {"ours x": 1.5, "torchao x": "fails"})
    assert Results(tmp_path / "a.csv", Point).rows == {point: {"ours x": 1.5, "torchao x": "fails"}}
