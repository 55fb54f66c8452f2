"""The benchmark of padded blocks times layers that hold the same blocks."""

import torch

from benchmarks import padding as bench
from tests.benchmarks.layer.tiny import tiny_context


def test_padded_and_rounded_up_layers_are_timed_forward_and_backward(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(37, 53, 16)])
    context = tiny_context(tmp_path)
    bench.section_forward(context)
    bench.section_step(context)
    forward, step = context.report.records
    for row in (forward, step):
        assert row["padded ms"] > 0 and row["rounded up ms"] > 0 and row["dense ms"] > 0
        assert row["padded x"] > 0 and row["error"] < 1e-6


def test_the_padded_layer_has_the_gradients_of_the_dense_one():
    calls, error = bench.candidates(37, 53, 16, 5, torch.device("cpu"), train=True)
    assert error < 1e-6
    shapes = {name: [grad.shape for grad in call()] for name, call in calls.items()}
    assert [shape[-1] for shape in shapes["padded"]][::2] == [53, 37]
    assert shapes["padded"][0] == shapes["dense"][0] == (5, 53)
    assert shapes["rounded up"][0] == (5, 64)
