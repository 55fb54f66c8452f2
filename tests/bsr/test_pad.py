"""`pad=True`: the last blocks are stored padded, and everything that is seen is the unpadded layer's."""

import copy
import io
import itertools

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.bsr.common import CountCalls, assert_unchanged, snapshot
from tests.ops.common import DEVICES
from tests.reference import block_mask, expand_mask
from torchao_superblock import (
    MagnitudeSparsifier,
    load_bsr,
    save_bsr,
    swap_to_bsr,
    swap_to_dense,
    to_bsr_linear,
)
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.format import bsr_to_dense, dense_to_bsr, infer_blocksize
from torchao_superblock.bsr.gated_mlp import GatedMLP

SHAPES = [  # N, K, blocksize
    (37, 53, (16, 16)),
    (37, 64, (32, 16)),
    (48, 53, (16, 8)),
    (100, 96, (64, 32)),
    (5, 3, (8, 8)),
]
LARGE = [
    (1000, 768, (32, 32)),
    (1000, 768, (64, 64)),
    (50257, 64, (64, 64)),
    (2730, 1024, (64, 64)),
    (1024, 2730, (32, 32)),
]
TOLERANCES = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def ragged(N, K, blocksize, sparsity=0.5, *, bias=True, dtype=torch.float32, device="cpu"):
    """A linear layer with blocks of zeros, of which those at the edges are not whole; the last one is kept."""
    r, c = blocksize
    torch.manual_seed(N + K)
    linear = nn.Linear(K, N, bias=bias)
    mask = block_mask(-(-N // r), -(-K // c), sparsity)
    mask[-1, -1] = True
    if mask.numel() > 2:
        mask[0, 0] = False
    with torch.no_grad():
        linear.weight.mul_(expand_mask(mask, blocksize)[:N, :K])
    return linear.to(device, dtype)


def padding_of(layer: BSRLinear) -> torch.Tensor:
    """Bool like `values`: what lies beyond the weight."""
    ones = torch.ones(layer.out_features, layer.in_features)
    r, c = layer.blocksize
    R, C = -(-layer.out_features // r), -(-layer.in_features // c)
    whole = nn.functional.pad(ones, (0, C * c - layer.in_features, 0, R * r - layer.out_features))
    whole = whole.view(R, r, C, c).transpose(1, 2).to(layer.values.device)
    rows = torch.repeat_interleave(layer.crow_indices.diff().long())
    return whole[rows, layer.col_indices.long()] == 0


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_the_unpadded_layer(shape, dtype, device):
    N, K, blocksize = shape
    for bias, M in itertools.product((True, False), (1, 3, 40)):
        linear = ragged(N, K, blocksize, bias=bias, dtype=dtype, device=device)
        layer = to_bsr_linear(linear, blocksize, pad=True)
        assert (layer.in_features, layer.out_features) == (K, N)
        assert torch.equal(layer.to_dense(), linear.weight)
        check_against_dense(linear, layer, M, TOLERANCES[dtype])


def check_against_dense(linear, layer, M, tolerance):
    N, K = linear.weight.shape
    exact = copy.deepcopy(linear).double()
    layer.zero_grad()
    x = torch.randn(M, K, device=linear.weight.device).to(linear.weight.dtype)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = layer(ours), exact(theirs)
    assert y.shape == (M, N) and y.is_contiguous()
    assert error(y, expected) < tolerance
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert ours.grad.shape == x.shape and error(ours.grad, theirs.grad) < tolerance
    kept = layer.to_dense() != 0
    values_grad = bsr_to_dense(layer.crow_indices, layer.col_indices, layer.values.grad, (N, K))
    assert error(values_grad[kept], exact.weight.grad[kept]) < tolerance
    if linear.bias is not None:
        assert error(layer.bias.grad, exact.bias.grad) < tolerance
    assert not layer.values.grad[padding_of(layer)].any()
    with torch.no_grad():
        assert error(layer(x), expected) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shapes_of_real_models(shape, device):
    N, K, blocksize = shape
    linear = ragged(N, K, blocksize, 0.9, device=device)
    layer = to_bsr_linear(linear, blocksize, pad=True)
    for M in (1, 24):
        check_against_dense(linear, layer, M, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_activations_and_leading_dimensions(device):
    linear = ragged(37, 53, (16, 16), device=device)
    model = nn.Sequential(copy.deepcopy(linear), nn.GELU())
    x = torch.randn(2, 3, 53, device=device)
    expected = model(x)
    swap_to_bsr(model, 16, min_sparsity=0.0, pad=True, fuse_activations=True)
    assert model[0].activation == "gelu"
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach())
        strided = torch.randn(3, 2, 53, device=device).transpose(0, 1)
        torch.testing.assert_close(model(strided), nn.functional.gelu(linear(strided)).detach())
        assert model(x[:, :0]).shape == (2, 0, 37)
    torch.testing.assert_close(model(x), expected)


def test_the_report_says_how_much_is_padded():
    model = nn.Sequential(
        ragged(100, 96, (32, 32)), ragged(64, 100, (64, 32)), ragged(64, 64, (32, 32))
    )
    before = snapshot(model)
    report = swap_to_bsr(model, 32, min_sparsity=0.0)
    assert [entry.fqn for entry in report.swapped] == ["2"]
    assert all("and pad=True pads its last blocks" in entry.reason for entry in report.skipped)
    swap_to_dense(model)
    assert_unchanged(model, (*before[:2], list(map(id, model.modules()))))
    report = swap_to_bsr(model, 32, min_sparsity=0.0, pad=True)
    assert [entry.padded for entry in report.swapped] == [(128, 96), (64, 128), None]
    assert [entry.shape for entry in report.swapped] == [(100, 96), (64, 100), (64, 64)]
    lines = str(report).splitlines()
    assert lines[2].endswith("swapped, padded to 128x96 (28.0% more)")
    assert lines[4].endswith("  swapped")
    assert "padded=(128, 96)" in repr(model[0]) and "padded" not in repr(model[2])


def test_padding_counts_where_the_table_decides():
    # 3 of 4 blocks are zero, and the one that is stored is larger than three quarters of the weight.
    linear = nn.Linear(66, 66)
    with torch.no_grad():
        linear.weight[64:].zero_()
        linear.weight[:, 64:].zero_()
    model = nn.Sequential(linear)
    (entry,) = swap_to_bsr(model, 64, pad=True).skipped
    assert entry.code == "slower_than_dense"
    assert "75.0% of its blocks are zero (6.0% with their padding counted)" in entry.reason
    (entry,) = swap_to_bsr(model, 64, pad=True, min_sparsity=0.7).swapped
    assert entry.padded == (128, 128)


@pytest.mark.parametrize("wrong", [1, 64, None, "yes"])
def test_pad_is_yes_or_no(wrong):
    model = nn.Sequential(ragged(37, 53, (16, 16)))
    before = snapshot(model)
    with pytest.raises(TypeError, match="pad must be True or False"):
        swap_to_bsr(model, 16, pad=wrong)
    assert_unchanged(model, before)


def test_without_pad_a_ragged_layer_is_refused():
    with pytest.raises(ValueError, match="pass pad=True to pad its last blocks"):
        to_bsr_linear(ragged(37, 53, (16, 16)), 16)
    with pytest.raises(ValueError, match="or pad=True to pad its last blocks"):
        to_bsr_linear(ragged(37, 53, (16, 16)))


@pytest.mark.parametrize(
    ("shape", "blocksize", "found"),
    [
        ((1000, 768), (64, 64), (64, 64)),
        ((1000, 768), (32, 64), (32, 64)),
        ((2730, 1024), (64, 32), (64, 32)),
        ((37, 53), (16, 16), (16, 16)),
        ((128, 768), (64, 64), (64, 64)),
        ((5, 3), (8, 8), (8, 8)),
        # 128 x 96 instead of 96 x 96 would be a third more; 32 divides it.
        ((96, 384), (64, 64), (32, 64)),
    ],
)
def test_the_block_size_is_read_off_the_zeros_of_the_weight(shape, blocksize, found):
    r, c = blocksize
    R, C = -(-shape[0] // r), -(-shape[1] // c)
    mask = (torch.arange(R)[:, None] + torch.arange(C)) % 2 == 0  # no two neighbours
    weight = torch.randn(shape) * expand_mask(mask, blocksize)[: shape[0], : shape[1]]
    assert infer_blocksize(weight, pad=True) == found


def test_what_the_padding_holds_counts_for_nothing():
    linear = ragged(37, 53, (16, 16))
    layer = to_bsr_linear(linear, 16, pad=True)
    padding = padding_of(layer)
    assert padding.any() and not layer.values[padding].any()
    with torch.no_grad():
        layer.values[padding] = 3.0
    for M in (1, 24):
        check_against_dense(linear, layer, M, 1e-5)
    assert torch.equal(layer.to_dense(), linear.weight)
    model = nn.Sequential(layer)
    swap_to_dense(model)
    assert torch.equal(model[0].weight, linear.weight)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
    ids=["sgd", "adamw", "adam", "rmsprop", "nadam"],
)
def test_padding_stays_zero_in_training_and_the_loss_is_the_dense_one(optimizer):
    model = nn.Sequential(
        ragged(37, 53, (16, 16)).double(), nn.Tanh(), ragged(11, 37, (8, 16)).double()
    )
    masks = [layer.weight.detach() != 0 for layer in model if isinstance(layer, nn.Linear)]
    dense, sparse = model, copy.deepcopy(model)
    theirs, ours = optimizer(dense.parameters()), optimizer(sparse.parameters())
    for m, o in ((dense, theirs), (sparse, ours)):  # state to take over
        train(m, o, 2, masks)
    report = swap_to_bsr(sparse, (8, 16), min_sparsity=0.0, pad=True, optimizer=ours)
    assert len(report.swapped) == 2
    losses = [train(m, o, 6, masks) for m, o in ((dense, theirs), (sparse, ours))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-9)
    for layer in (sparse[0], sparse[2]):
        assert not layer.values[padding_of(layer)].any()


def train(model, optimizer, steps, masks):
    torch.manual_seed(0)
    x, losses = torch.randn(24, 53, dtype=torch.float64), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        for layer, mask in zip(linears, masks, strict=False):
            layer.weight.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for layer, mask in zip(linears, masks, strict=False):
                layer.weight.mul_(mask)
        losses.append(loss.detach())
    return torch.stack(losses)


def test_measured_swaps_time_padded_layers():
    first, second = ragged(5, 3, (8, 8)), ragged(11, 5, (8, 8))
    with torch.no_grad():
        second.weight[:8].zero_()
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.randn(2, 3)
    expected = model(x)
    report = swap_to_bsr(model, 8, pad=True, measure=x, drop_dead_features=True)
    # Whichever is faster here; with times, padding is no reason.
    (entry,) = (e for e in (*report.swapped, *report.skipped) if e.fqn == "2")
    assert entry.padded == (16, 8) and entry.dense_ms > 0 and entry.bsr_ms > 0
    torch.testing.assert_close(model(x), expected)


def test_files_and_the_way_back(tmp_path):
    def build():
        return nn.Sequential(ragged(37, 53, (16, 16)), nn.ReLU(), ragged(50, 37, (8, 16)))

    model = build()
    weights = [model[0].weight, model[2].weight]
    x = torch.randn(5, 53)
    swap_to_bsr(model, (8, 16), min_sparsity=0.0, pad=True)
    expected = model(x)
    save_bsr(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["version"] == "3"  # what earlier releases refuse by its number
    for other in (build(), copy.deepcopy(model)):
        load_bsr(other, tmp_path / "model.safetensors")
        assert torch.equal(other(x), expected)
        assert [other[i].to_dense().shape for i in (0, 2)] == [(37, 53), (50, 37)]
    fresh = build()
    swap_to_bsr(fresh, (8, 16), min_sparsity=0.0, pad=True)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(fresh)(x), expected)
    assert swap_to_dense(fresh) == ["0", "2"]
    assert all(map(torch.equal, (fresh[0].weight, fresh[2].weight), weights))
    too_wide = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 56))
    before = snapshot(too_wide)
    with pytest.raises(ValueError, match=r"shape \(37, 53\) in the file, but \(48, 64\)"):
        load_bsr(too_wide, tmp_path / "model.safetensors")
    assert_unchanged(too_wide, before)


@pytest.mark.parametrize(("one", "other"), [((29, 37), (32, 48)), ((29, 37), (29, 40))])
def test_the_state_dict_of_another_shape_in_as_many_blocks_is_refused(one, other):
    """Its tensors fit: where the last blocks are padded, their shapes do not say where the weight ends."""
    buffer = io.BytesIO()
    for shape, fresh in ((one, other), (other, one)):
        saved, model = (
            nn.Sequential(to_bsr_linear(nn.Linear(K, N, bias=False), 16, pad=True))
            for N, K in (shape, fresh)
        )
        buffer.seek(0)
        torch.save(saved.state_dict(), buffer)
        buffer.seek(0)
        before = snapshot(model)
        rule = rf"0: the state dict is of a layer of shape \({shape[0]}, {shape[1]}\), this one"
        with pytest.raises(RuntimeError, match=rule):
            model.load_state_dict(torch.load(buffer))
        assert_unchanged(model, before)


def test_dead_features_go_from_ragged_pairs_too():
    first, second = ragged(37, 53, (16, 16)), ragged(29, 37, (16, 16))
    with torch.no_grad():
        first.weight[32:].zero_()  # the last features, which are no whole block, are constant
        second.weight[:, :16].zero_()  # unread
    model = nn.Sequential(first, nn.Sigmoid(), second)
    x = torch.randn(4, 53)
    expected = model(x)
    report = swap_to_bsr(model, 16, min_sparsity=0.0, pad=True, drop_dead_features=True)
    assert "21 of its features are dropped: 16 that 2 does not read, 5 that are" in report.notes[-1]
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (16, 16, 29)
    torch.testing.assert_close(model(x), expected)
    swap_to_dense(model)
    assert model[0].weight.shape == (37, 53) and model[2].weight.shape == (29, 37)
    torch.testing.assert_close(model(x), expected)


def test_a_ragged_last_block_that_is_needed_stays():
    first, second = ragged(37, 53, (16, 16)), ragged(29, 37, (16, 16))
    with torch.no_grad():
        first.weight[32:].fill_(0.1)
        second.weight[:, 32:].fill_(0.1)
        second.weight[:, :16].zero_()
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.randn(4, 53)
    expected = model(x)
    swap_to_bsr(model, 16, min_sparsity=0.0, pad=True, drop_dead_features=True)
    assert model[0].out_features == 21
    torch.testing.assert_close(model(x), expected)


def test_compiled_exported_and_under_autocast():
    model = nn.Sequential(ragged(37, 53, (16, 16)), nn.ReLU(), ragged(50, 37, (16, 16)))
    x = torch.randn(5, 53)
    expected = model(x)
    swap_to_bsr(model, 16, min_sparsity=0.0, pad=True)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("M")},))
    for M in (3, 5):
        torch.testing.assert_close(exported.module()(x[:M]), expected[:M])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert model[0].values.grad is not None
    with torch.autocast("cpu", torch.bfloat16), CountCalls() as calls:
        y = model(x)
    assert calls.count == 2 and y.dtype == torch.bfloat16
    assert error(y, expected.double()) < 2e-2


def test_inductor_compiles_it():
    model = nn.Sequential(ragged(37, 53, (16, 16)), nn.GELU(), ragged(50, 37, (16, 16)))
    x = torch.randn(5, 53)
    swap_to_bsr(model, 16, min_sparsity=0.0, pad=True)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def test_kept_blocks_that_are_zero_are_stored_where_training_goes_on():
    model = nn.Sequential(nn.Linear(53, 37), nn.ReLU(), nn.Linear(37, 29))
    nn.init.zeros_(model[2].weight)  # as a projection may start
    sparsifier = MagnitudeSparsifier(0.5, 16)
    sparsifier.prepare(model, config=None)
    sparsifier.step()
    kept = {entry.fqn: entry.kept for entry in sparsifier.summary().groups}
    assert not any(entry.swap_obstacle for entry in sparsifier.summary().groups)
    sparsifier.squash_mask()
    optimizer = torch.optim.AdamW(model.parameters())
    swap_to_bsr(model, min_sparsity=0.0, pad=True, optimizer=optimizer)
    assert kept == {"0.weight": model[0].nnz, "2.weight": model[2].nnz}
    assert model[0].blocksize == model[2].blocksize == (16, 16)
    model(torch.randn(4, 53)).sum().backward()
    optimizer.step()
    padding = padding_of(model[2])
    assert model[2].values[~padding].any() and not model[2].values[padding].any()


class Gated(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = ragged(hidden, 53, (16, 16)), ragged(hidden, 53, (16, 16))
        self.down, self.act = ragged(53, hidden, (16, 16)), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("device", DEVICES)
def test_gated_mlps_compute_the_same_and_say_why_two_products_stay(device):
    for hidden, is_fused in ((37, False), (48, True)):
        model = nn.Sequential(Gated(hidden)).to(device)
        x = torch.randn(70, 53, device=device)
        with torch.no_grad():
            expected = model(x)
            report = swap_to_bsr(model, 16, min_sparsity=0.0, pad=True, fuse_activations=True)
            assert len(report.swapped) == 3
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert any("computed at once" in note for note in report.notes) == is_fused
        if not is_fused:
            assert any("since their last blocks are padded" in note for note in report.notes)


def test_a_fused_gated_mlp_takes_other_layers_that_are_padded(tmp_path):
    """The forward that computes both at once is there before them, and its op knows of whole blocks only."""

    class Bare(nn.Module):  # nothing behind the product would notice more features
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (ragged(48, 53, (32, 16), bias=False) for _ in range(2))
            self.act = nn.SiLU()

        def forward(self, x):
            return self.act(self.gate(x)) * self.up(x)

    fused, padded = (nn.Sequential(Bare()) for _ in range(2))
    x = torch.randn(3, 53)
    expected = padded(x).detach()
    swap_to_bsr(fused, 16, min_sparsity=0.0, pad=True, fuse_activations=True)
    swap_to_bsr(padded, (32, 16), min_sparsity=0.0, pad=True)
    save_bsr(padded, tmp_path / "model.safetensors")
    assert isinstance(fused[0], GatedMLP)
    load_bsr(fused, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)


def test_convolutions_are_padded_too():
    conv = nn.Conv2d(20, 37, 1)
    with torch.no_grad():
        conv.weight[16:].zero_()
    model = nn.Sequential(conv)
    x = torch.randn(2, 20, 5, 4)
    expected = model(x)
    (entry,) = swap_to_bsr(model, 16, min_sparsity=0.0, pad=True).swapped
    assert entry.padded == (48, 32)
    torch.testing.assert_close(model(x), expected)
    swap_to_dense(model)
    assert model[0].weight.shape == (37, 20, 1, 1)
    torch.testing.assert_close(model(x), expected)


def test_pictures_show_the_whole_grid():
    pytest.importorskip("matplotlib", reason="pictures need the `examples` extra")
    from torchao_superblock.visualize import block_masks

    layer = to_bsr_linear(ragged(37, 53, (16, 16)), 16, pad=True)
    (mask,) = block_masks(nn.Sequential(layer))
    assert mask.mask.shape == (3, 4) and int(mask.mask.sum()) == layer.nnz


def test_attention_is_not_padded():
    attention = nn.MultiheadAttention(24, 2)
    with torch.no_grad():
        attention.in_proj_weight[:24].zero_()
        attention.out_proj.weight[:16].zero_()
    model = nn.ModuleDict({"attention": attention})
    report = swap_to_bsr(model, 16, min_sparsity=0.0, pad=True)
    assert {entry.code for entry in report.skipped} == {"shape_not_multiple"}
    assert all("of attention are never padded" in entry.reason for entry in report.skipped)


def test_dense_to_bsr_pads():
    weight = torch.randn(5, 7)
    crow, col, values = dense_to_bsr(weight, (2, 3))
    assert crow.tolist() == [0, 3, 6, 9] and values.shape == (9, 2, 3)
    assert torch.equal(bsr_to_dense(crow, col, values, (5, 7)), weight)
    assert values.count_nonzero() == weight.count_nonzero()
