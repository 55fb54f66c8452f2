"""Forms of a model in several ways: what each is called with, which is best, and what becomes of one that fails."""

import pytest
import torch
from torch import nn

from benchmarks.measure.timings import Failure, Measurements, Timing
from benchmarks.model.compare import fastest, measure_models, row_of, ways_on

CPU = torch.device("cpu")


class Refuses(nn.Module):
    def forward(self, x):
        raise NotImplementedError("no kernel\nand more")


def test_graphs_are_made_of_eager_and_compiled_calls():
    made = []

    def replay(call):
        made.append(call())
        return lambda: made.append("replayed")

    sides = {"dense": nn.Linear(4, 4), "ours": nn.Linear(4, 4), "torch BSR": Refuses()}
    sides["torchao"] = Failure("ImportError: no torchao")
    sides["slow"] = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    ways = ("eager", "graph", "compiled graph")
    measured = measure_models(
        sides, lambda side, runs: (side, runs(x).shape), ways, CPU,
        no_graphs=("slow",), seconds=0.001, tick=lambda text: None, backend="eager", replay=replay,
    )  # fmt: skip
    shape = torch.Size([2, 4])
    assert made[:4] == [("dense", shape)] * 2 + [("ours", shape)] * 2
    assert set(made[4:]) == {"replayed"}
    assert {n for n in measured if measured.timing(n)} == {
        f"{side}, {way}" for side in ("dense", "ours") for way in ways
    } | {"slow, eager"}
    row = row_of(measured, list(sides), ways)
    assert row["torch BSR x"] == row["torchao x"] == "fails"
    assert "torch BSR, eager: NotImplementedError: no kernel;" in row["failures"]
    assert "torchao, graph: ImportError: no torchao" in row["failures"]


def test_the_best_of_each_side_is_compared():
    measured = Measurements(
        {
            "dense, eager": Timing((4.0, 4.0)),
            "dense, compiled": Timing((2.0, 2.0)),
            "ours, eager": Timing((1.0, 1.0)),
            "ours, compiled": Failure("x"),
            "ours narrow, eager": Timing((0.5, 0.5)),
        }
    )
    row = row_of(measured, ("dense", "ours", "ours narrow"), ("eager", "compiled"))
    assert (row["ours x"], row["eager x"], row["compiled x"]) == (2.0, 4.0, None)
    assert (row["dense is"], row["ours is"], row["ours narrow x"]) == ("compiled", "eager", 4.0)
    with pytest.raises(RuntimeError, match="nothing to time for torchao"):
        fastest(measured, "torchao")


def test_a_cpu_has_no_graphs():
    assert ways_on(CPU, ("eager", "graph", "compiled graph")) == ("eager", "compiled")
    assert ways_on(torch.device("cuda"), ("graph",)) == ("graph",)
