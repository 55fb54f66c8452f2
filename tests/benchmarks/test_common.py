"""The helpers behind every benchmark: what they count, what they report, and that failures are reported too.

Nothing here asserts how long something takes.
"""

import csv
import logging
import math
import warnings

import expecttest
import pytest
import torch

from benchmarks.common import (
    Failure,
    Measurements,
    Report,
    Roofline,
    Timing,
    copies_beyond_cache,
    float32_mode,
    format_cell,
    markdown_table,
    measure,
    measure_host,
    measure_roofline,
    pyplot,
    quiet,
    random_block_sparse,
    relative_error,
    verdict,
)


def test_measure_times_every_candidate_in_every_round():
    calls: list[str] = []
    measured = measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.02, max_rounds=8
    )
    assert len(measured.timing("a").samples) == len(measured.timing("b").samples) >= 7
    last = "".join(calls).rstrip("a").rstrip("b")
    assert "ab" in last and "ba" in last  # neither always comes first


def test_measure_reports_a_candidate_that_fails_and_times_the_others():
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    measured = measure({"good": lambda: None, "bad": broken}, seconds=0.01)
    assert measured.failure("bad") == "RuntimeError: no kernel"
    assert measured.timing("bad") is None and measured.speedup("good", "bad") is None
    assert measured.timing("good") is not None


def test_measure_takes_turns_through_a_list():
    seen = []
    functions = [lambda i=i: seen.append(i) for i in range(3)]
    measure({"list": functions}, seconds=0.01, max_rounds=7)
    assert seen.count(0) > 3 and seen.count(1) > 3 and seen.count(2) > 3


def test_measure_host_counts_calls_of_each_candidate():
    measured = measure_host({"nothing": lambda: None}, calls=3, rounds=5)
    assert len(measured.timing("nothing").samples) == 5


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    measured = Measurements(dense=Timing((2.0, 4.0, 100.0)), ours=Timing((1.0, 1.0, 50.0)))
    assert measured.speedup("dense", "ours").value == 2.0
    assert str(measured.speedup("dense", "ours")) == "2.00x"


def test_timing_statistics():
    timing = Timing((3.0, 1.0, 2.0, 4.0, 5.0))
    assert (timing.median, timing.minimum, timing.spread) == (3.0, 1.0, 2.0 / 3.0)
    assert Failure("x").reason == "x"


def test_relative_error_is_that_of_float64_and_nan_never_passes():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == 0.1
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference))
    assert verdict(relative_error(torch.tensor([math.nan, 4.0]), reference), at_most=1.0) == "miss"


@pytest.mark.parametrize(
    ("value", "goal", "expected"),
    [
        (2.0, {"at_least": 2.0}, "pass"),
        (1.9, {"at_least": 2.0}, "miss"),
        (None, {"at_least": 2.0}, "miss"),
        (0.3, {"at_most": 0.4}, "pass"),
        (0.5, {"at_most": 0.4}, "miss"),
        (0.5, {}, ""),
    ],
)
def test_verdict(value, goal, expected):
    assert verdict(value, **goal) == expected


def test_quiet_silences_warnings_and_logs_and_restores_them():
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.warn("untuned", stacklevel=1)
        assert logging.root.manager.disable == logging.WARNING
    assert caught == []
    assert logging.root.manager.disable == logging.NOTSET


def test_float32_mode_is_restored():
    before = torch.get_float32_matmul_precision()
    with float32_mode("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("blocksize", [16, (8, 32)])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_random_block_sparse_matches_its_dense_form(blocksize, sparsity):
    weight = random_block_sparse(64, 96, blocksize, sparsity, dtype=torch.float64)
    expected = max(1, round(weight.dense.numel() / weight.values[0].numel() * (1 - sparsity)))
    assert len(weight.col) == len(weight.values) == expected
    size = tuple(weight.values.shape[1:])
    sparse = torch.sparse_bsr_tensor(weight.crow, weight.col, weight.values, (64, 96))
    assert torch.equal(sparse.to_dense(), weight.dense)
    assert size == ((16, 16) if blocksize == 16 else (8, 32))
    again = random_block_sparse(64, 96, blocksize, sparsity, dtype=torch.float64)
    assert torch.equal(again.dense, weight.dense)


def test_random_block_sparse_refuses_a_shape_of_broken_blocks():
    with pytest.raises(ValueError, match="no multiple"):
        random_block_sparse(60, 64, 16, 0.5)


def test_the_floor_is_the_larger_of_both_ceilings():
    roofline = Roofline(bandwidth=100.0, rates={"float32": 10.0, "tf32": 60.0})
    assert roofline.floor(1000, 1, "tf32") == 10.0
    assert roofline.floor(1, 6000, "tf32") == 100.0
    assert roofline.rate("float32") == 20.0  # three TF32 products beat the plain ones


def test_the_roofline_is_measured():
    roofline = measure_roofline("cpu", ["float32"], quick=True)
    assert roofline.bandwidth > 0 and roofline.rates["float32"] > 0
    assert set(roofline.describe()) == {"copy bandwidth (read + write)", "dense float32 product"}


def test_no_copies_are_made_on_the_cpu():
    assert copies_beyond_cache(10, "cpu") == 1


class TestText(expecttest.TestCase):
    def test_markdown_table(self):
        rows = [{"layer": "a|b", "speed": 12.345, "error": 2.5e-7}, {"layer": "c", "speed": None}]
        self.assertExpectedInline(
            markdown_table(rows),
            """\
| layer | speed |   error |
| ----- | ----: | ------: |
| a\\|b  |  12.3 | 2.5e-07 |
| c     |     - |         |""",
        )

    def test_format_cell(self):
        values = [None, True, 0.0, 1.2345, 123.4, 1e-5, 2e7, math.nan, "x", 7]
        text = " ".join(format_cell(value) for value in values)
        self.assertExpectedInline(text, """- yes 0 1.23 123 1.0e-05 2.0e+07 nan x 7""")


def test_a_report_writes_markdown_csv_and_pictures(tmp_path, capsys):
    report = Report("demo", "A demo", "cpu", directory=tmp_path, label="My Label")
    report.table("First", [{"M": 1, "speed": 2.0}], note="A note.")
    report.table("Second", [{"M": 2, "error": 0.5, "hidden": 1}], columns=["M", "error"])
    figure, _ = pyplot().subplots()
    picture = report.figure(figure, "curve", "A caption")
    path = report.write()
    assert path.name.endswith("_my-label.md") and "_demo_cpu_" in path.name
    text = path.read_text()
    assert "torch" in text and "A note." in text and f"![A caption]({picture.name})" in text
    assert "hidden" not in text
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["section"] for row in rows] == ["First", "Second"]
    assert rows[1]["hidden"] == "1" and rows[0]["hidden"] == ""
    assert picture.stat().st_size > 0
    assert "## First" in capsys.readouterr().out
