"""The price of masks: every kind takes the same step as the dense model, and ratios are of means."""

import pytest
import torch
from torch import nn

from benchmarks import masking as bench
from benchmarks.measure.timings import Failure, Measurements, Timing


def test_every_kind_of_mask_takes_a_step():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    x = torch.randn(4, 32)
    before = model[0].weight.detach().clone()
    kinds = (*bench.KINDS, *bench.PHASES)
    steps = bench.make_steps(model, "*.weight", [16], lambda model: model(x).square().mean(), kinds)
    assert {"dense", *(f"{kind}, block 16" for kind in kinds)} <= set(steps)
    for step in steps.values():
        step()
    assert not torch.equal(model[0].weight, before)


def test_the_ratio_is_of_means():
    results = Measurements(
        {"dense": Timing((1.0, 1.0, 2.0)), "masked": Timing((1.0, 2.0, 2.0)), "bad": Failure("why")}
    )
    assert bench.overhead(results, "masked")[0] == pytest.approx(5 / 4)
    dense, masked, bad = bench.rows_of(results, {"batch": 8}, {"dense": 10, "masked": 13})
    assert (dense["ratio"], masked["ratio"], masked["of the fastest"]) == (
        "1.000x",
        "1.250x",
        "1.000x",
    )
    assert (masked["batch"], masked["kernels"], masked["more kernels"]) == (8, 13, 3)
    assert (bad["failed"], bad["ratio"], bad["more kernels"]) == ("why", None, None)
