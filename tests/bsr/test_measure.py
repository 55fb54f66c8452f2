"""A swap that decides by measuring: what is timed, with what, and what follows from the times."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.bsr.common import CountCalls, assert_unchanged, prune, prune_all, snapshot
from torchao_superblock import swap_to_bsr
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.finish import Finish
from torchao_superblock.bsr.measure import Timing, time_parts
from torchao_superblock.bsr.parts import find_parts


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
    assert [part.fqns for part in parts] == [("layers.0",), ("layers.1",)]
    swapped = parts[0].swapped(Finish())
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


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 128), nn.Linear(64, 128)
        self.down, self.act = nn.Linear(128, 64), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """An MLP whose pieces can be fused, a gated one, and a layer alone."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        self.gated = Gated()
        self.proj = nn.Linear(64, 64)

    def forward(self, x):
        x = x + self.fc2(self.act(self.fc1(x)))
        return self.proj(x + self.gated(x))


def pruned_block():
    torch.manual_seed(0)
    return prune_all(Block(), 16, 0.75).eval()


def all_replaced(model):
    return {m: BSRLinear.from_dense(m, 16) for m in model.modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (Finish(), ["fc1", "fc2", "gated.gate", "gated.up", "gated.down", "proj"]),
        (Finish(fuse_activations=True), ["fc1", "fc2", "gated", "proj"]),
        (Finish(drop_dead_features=True), ["fc1 fc2", "gated", "proj"]),
        (Finish(True, True), ["fc1 fc2", "gated", "proj"]),
    ],
)
def test_what_would_be_fused_is_timed_together(finish, expected):
    model = pruned_block()
    before = snapshot(model)
    parts = find_parts(model, all_replaced(model), finish)
    assert [" ".join(part.fqns) for part in parts] == expected
    assert_unchanged(model, before)
    x = torch.randn(3, 64)
    times = time_parts(model, parts, x, finish, train=False, progress=False)
    assert all(timing.bsr_ms > 0 for timing in times.values())
    assert_unchanged(model, before)
    for part in parts:
        layer = next(m for m in part.module.modules() if isinstance(m, nn.Linear))
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(part.swapped(finish)(x), part.module(x))


def test_fused_parts_are_timed_as_what_they_become():
    model = pruned_block()
    with torch.no_grad():
        model.fc2.weight[:, :64] = 0  # half of the hidden features are not read
    replacements = all_replaced(model)
    finish = Finish(fuse_activations=True, drop_dead_features=True)
    mlp, gated, _ = find_parts(model, replacements, finish)
    first, place, second = mlp.swapped(finish)
    assert first.activation == "gelu" and place.activation == "gelu"
    assert first.out_features == second.in_features < 128
    assert type(gated.swapped(finish)).__name__ == "GatedGated"
    # The layers that a swap will put in place have learnt nothing.
    assert all(new.activation == "none" and new.place is None for new in replacements.values())
    assert mlp.kind(finish) != mlp.kind(Finish(fuse_activations=True))
    with CountCalls() as counted, torch.no_grad():
        mlp.swapped(finish)(torch.ones(2, 64))
    assert counted.activations == {"gelu", "none"}


def test_layers_that_are_fused_stand_or_fall_together():
    model = pruned_block()
    expected = model(torch.ones(3, 64))
    report = swap_to_bsr(
        model, measure=torch.ones(3, 64), fuse_activations=True, drop_dead_features=True
    )
    found = entries(report)
    for names in (("fc1", "fc2"), ("gated.gate", "gated.up", "gated.down")):
        rows = [found[name] for name in names]
        assert len({(row.dense_ms, row.bsr_ms, row.code) for row in rows}) == 1
        if rows[0].code == "slower_than_dense":
            assert rows[0].reason.startswith(
                "'fc1' and 'fc2' together" if "fc1" in names else "'gated' takes"
            )
    torch.testing.assert_close(model(torch.ones(3, 64)), expected)


def test_a_function_of_the_code_is_timed_with_its_layers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(64, 128), nn.Linear(128, 64), F.silu

        def forward(self, x):
            return self.fc2(F.dropout(torch.tanh(self.fc1(x)), 0.1, self.training))

    model = prune_all(Functional(), 16, 0.75).eval()
    finish = Finish(drop_dead_features=True)
    (part,) = find_parts(model, all_replaced(model), finish)
    x = torch.randn(2, 64)
    torch.testing.assert_close(part.module(x), model(x))
    torch.testing.assert_close(part.swapped(finish)(x), model(x))


def test_an_encoder_that_skips_padding_is_timed_whole():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = prune_all(nn.TransformerEncoder(layer, 2).eval(), 16, 0.75)
    padding = torch.arange(7) >= torch.tensor([[7], [2]])
    example = {"src": torch.randn(2, 7, 64), "src_key_padding_mask": padding}
    report = swap_to_bsr(encoder, measure=example)
    timed = {e.dense_ms: e.code for e in entries(report).values() if e.dense_ms is not None}
    assert len(timed) == 1
    assert encoder.use_nested_tensor is ("swapped" not in timed.values())


def test_the_module_that_refuses_the_example_is_named():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.Sequential(prune(nn.Linear(64, 32), 16)), pruned_block()]
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Outer()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"RuntimeError in blocks\.1\.fc1: "):
        swap_to_bsr(model, measure=torch.ones(2, 64))
    assert_unchanged(model, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_part_that_cannot_be_timed_is_named():
    class Picky(nn.ReLU):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients here")
            return super().forward(x)

    class Attended(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Attended(64, 4, 128, activation=Picky(), batch_first=True)).eval()
    prune_all(model, 16, 0.75)
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no gradients here") as caught:
        swap_to_bsr(model, measure=torch.ones(2, 3, 64), optimizer=optimizer)
    assert "while timing '0'" in caught.value.__notes__
    assert_unchanged(model, before)
