"""A swap that decides by measuring: what is timed, with what, and what follows from the times."""

import copy

import pytest
import torch
from torch import nn

from tests.bsr.common import prune, prune_all
from torchao_superblock import swap_to_bsr
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.measure import Timing, find_parts, time_parts


class Model(nn.Module):
    """Two layers of one kind, one that is called twice, a dense one, and one that no forward reaches."""

    def __init__(self):
        super().__init__()
        self.first = prune(nn.Linear(64, 64), 16, 0.75)
        self.second = prune(nn.Linear(64, 64), 16, 0.75)
        self.twice = prune(nn.Linear(64, 64), 16, 0.5)
        self.dense = nn.Linear(64, 64)
        self.unused = prune(nn.Linear(64, 64), 16, 0.75)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x, scale=1.0):
        x = self.second(self.first(x)) * scale
        return self.norm(self.dropout(self.dense(self.twice(self.twice(x)))))


def entries(report):
    return {entry.fqn: entry for entry in [*report.swapped, *report.skipped]}


@pytest.mark.parametrize(
    "example", [torch.ones(5, 64), (torch.ones(5, 64), 2.0), {"x": torch.ones(5, 64)}]
)
def test_the_times_decide_and_stand_in_the_report(example):
    torch.manual_seed(0)
    model = Model()
    before = copy.deepcopy(model)
    report = swap_to_bsr(model, measure=example)
    found = entries(report)
    for name in ("first", "second", "twice"):
        entry = found[name]
        assert entry.dense_ms > 0 and entry.bsr_ms > 0
        faster = entry.bsr_ms < entry.dense_ms
        assert isinstance(getattr(model, name), BSRLinear) is faster
        assert entry.code == ("swapped" if faster else "slower_than_dense")
        assert f"{entry.dense_ms:.3f}" in str(report) and "BSR ms" in str(report)
    # Layers of one kind, called with inputs of one kind, are timed once.
    assert found["first"].dense_ms == found["second"].dense_ms
    assert found["dense"].code == "too_few_zero_blocks"
    assert found["unused"].code == "not_called" and found["unused"].dense_ms is None
    # The forward that looked for the inputs left nothing behind.
    assert model.training and model.dropout.training
    assert torch.equal(model.norm.running_mean, before.norm.running_mean)
    assert all(parameter.grad is None for parameter in model.parameters())
    x = torch.randn(5, 64)
    torch.testing.assert_close(model.eval()(x), before.eval()(x))


def test_a_training_step_is_timed_with_an_optimizer():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = swap_to_bsr(model, measure=torch.ones(5, 64), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    assert all(parameter.grad is None for parameter in model.parameters())
    assert entries(report)["first"].bsr_ms > 0


def test_times_of_all_calls_add_up():
    model = Model()
    layers = [model.first, model.twice]
    replacements = {layer: BSRLinear.from_dense(layer, 16) for layer in layers}
    first, twice = find_parts(model, replacements)
    time_parts(model, [first, twice], torch.ones(5, 64), train=False, progress=False)
    assert sum(first.calls.values()) == 1 and sum(twice.calls.values()) == 2


def test_an_encoder_layer_is_timed_whole():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    for layer in encoder.layers:
        prune(layer.linear1, 16, 0.75)
        prune(layer.linear2, 16, 0.75)
    expected = encoder(torch.ones(2, 7, 64))
    replacements = {
        layer: BSRLinear.from_dense(layer, 16)
        for block in encoder.layers
        for layer in (block.linear1, block.linear2)
    }
    parts = find_parts(encoder, replacements)
    assert [part.fqn for part in parts] == ["layers.0", "layers.1"]
    swapped = parts[0].swapped()
    assert isinstance(swapped.linear1, BSRLinear)
    assert swapped.norm1.weight is encoder.layers[0].norm1.weight
    assert isinstance(encoder.layers[0].linear1, nn.Linear)
    times = time_parts(encoder, parts, torch.ones(2, 7, 64), train=False, progress=False)
    assert isinstance(times[parts[0]], Timing)
    report = swap_to_bsr(encoder, measure=torch.ones(2, 7, 64))
    for block in encoder.layers:
        # Both or none.
        assert isinstance(block.linear1, BSRLinear) == isinstance(block.linear2, BSRLinear)
    assert len({entry.dense_ms for entry in entries(report).values() if entry.dense_ms}) == 1
    torch.testing.assert_close(encoder(torch.ones(2, 7, 64)), expected)


@pytest.mark.parametrize("example", [torch.ones(5, 3), {"y": torch.ones(5, 64)}, 7])
def test_an_example_that_the_model_does_not_take_is_refused_and_nothing_changes(example):
    model = Model()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="does not take the example given as measure"):
        swap_to_bsr(model, measure=example)
    assert dict(model.named_modules()) == modules and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_min_sparsity_still_holds():
    model = prune_all(nn.Sequential(nn.Linear(64, 64)), 16, 0.5)
    report = swap_to_bsr(model, measure=torch.ones(2, 64), min_sparsity=0.9)
    assert report.skipped[0].code == "too_few_zero_blocks"
