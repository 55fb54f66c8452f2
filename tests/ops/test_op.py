"""The op as every backend must serve it: values, dispatch, autocast, compilers. On the CPU, and on a GPU if any."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.common import DEVICES, SHAPES
from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops import ACTIVATIONS, bsr_linear, build_plan

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def reference(x, dense, bias, activation="none"):
    bias = None if bias is None else bias.double()
    return ACTIVATIONS[activation](F.linear(x.double(), dense.double(), bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "blocksize"), SHAPES)
def test_forward_matches_float64_over_the_grid(N, K, blocksize, dtype, device):
    for sparsity in (0.0, 0.5, 0.9):
        dense, crow, col, values = random_bsr(N, K, blocksize, sparsity, dtype, device)
        bias = torch.randn(N, device=device).to(dtype)
        plan = build_plan(crow, col, K // blocksize[1])
        for M in (0, 1, 2, 17, 130):
            x = torch.randn(M, K, device=device).to(dtype)
            for b, p in ((bias, plan), (None, None)):
                y = bsr_linear(x, crow, col, values, b, plan=p)
                assert y.shape == (M, N)
                assert y.dtype == dtype
                assert y.is_contiguous()
                assert relative_error(y, reference(x, dense, b)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_forward_takes_any_leading_dimensions_and_strides(device):
    dense, crow, col, values = random_bsr(32, 48, 16, 0.5, device=device)

    def make(*shape):
        return torch.randn(*shape, device=device)

    inputs = {
        "1-D": make(48),
        "4-D": make(2, 3, 5, 48),
        "empty lead": make(2, 0, 48),
        "column slice": make(6, 100)[:, 3:51],
        "transposed": make(48, 7).t(),
        "every other column": make(6, 96)[:, ::2],
        "broadcast": make(1, 48).expand(9, 48),
        "broadcast features": make(9, 1).expand(9, 48),
        "permuted lead": make(4, 5, 48).transpose(0, 1),
        "unaligned": make(1 + 6 * 48)[1:].view(6, 48),
    }
    for name, x in inputs.items():
        y = bsr_linear(x, crow, col, values)
        assert y.shape == (*x.shape[:-1], 32), name
        assert y.is_contiguous(), name
        assert relative_error(y, reference(x, dense, None)) <= 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
def test_empty_rows_one_block_and_no_block(device):
    masks = {
        "empty first and last row": torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool(),
        "one block": torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool(),
        "no block": torch.zeros(3, 3, dtype=torch.bool),
        "one long row": torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 1]]).bool(),
    }
    for name, mask in masks.items():
        dense, crow, col, values = random_bsr(48, 48, 16, mask=mask, device=device)
        values.requires_grad_()
        x = torch.randn(5, 48, device=device, requires_grad=True)
        bias = torch.randn(48, device=device, requires_grad=True)
        y = bsr_linear(x, crow, col, values, bias)
        assert relative_error(y, reference(x, dense, bias)) <= 1e-6, name
        g = torch.randn_like(y)
        grad_x, grad_values, grad_bias = torch.autograd.grad(y, (x, values, bias), g)
        assert relative_error(grad_x, g.double() @ dense.double()) <= 1e-6, name
        assert relative_error(grad_bias, g.double().sum(0)) <= 1e-6, name
        full = (g.double().t() @ x.double()).view(3, 16, 3, 16).transpose(1, 2)
        assert relative_error(grad_values, full[mask.to(device)]) <= 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation_is_applied_to_the_output(activation, dtype, device):
    dense, crow, col, values = random_bsr(64, 64, 16, 0.5, dtype, device)
    x = (4 * torch.randn(33, 64, device=device)).to(dtype)
    bias = torch.randn(64, device=device).to(dtype)
    y = bsr_linear(x, crow, col, values, bias, activation=activation)
    assert relative_error(y, reference(x, dense, bias, activation)) <= TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    r=st.integers(1, 16),
    c=st.integers(1, 16),
    M=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_ragged_edges_match_the_cropped_weight(N, K, r, c, M, seed):
    R, C = -(-N // r), -(-K // c)
    dense, crow, col, values = random_bsr(R * r, C * c, (r, c), 0.5, torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, generator=generator)
    y = bsr_linear(x, crow, col, values, bias, out_features=N)
    expected = F.linear(x, dense[:N, :K], bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0]
    )


def _opcheck_samples(device):
    for dtype in (torch.float32, torch.float64):
        _, crow, col, values = random_bsr(24, 32, (8, 16), 0.5, dtype, device)
        x = torch.randn(2, 5, 32, dtype=dtype, device=device, requires_grad=True)
        bias = torch.randn(24, dtype=dtype, device=device, requires_grad=True)
        values.requires_grad_()
        plan = build_plan(crow, col, 2)
        yield (x, crow, col, values, bias, None, "none", plan)
        yield (x, crow, col, values, None, 24, "gelu", None)
        yield (x[..., :30].detach(), crow, col, values, None, None, "relu", plan)
        yield (x, crow, col, values, bias[:20].detach(), 20, "silu", plan)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    ops = torch.ops.torchao_superblock
    for sample in _opcheck_samples(device):
        torch.library.opcheck(ops.bsr_linear.default, sample)
    _, crow, col, values = random_bsr(24, 32, (8, 16), 0.5, device=device)
    values.requires_grad_()
    g = torch.randn(5, 24, device=device, requires_grad=True)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    plan = build_plan(crow, col, 2)
    for p in (plan, None):
        torch.library.opcheck(ops.bsr_linear_grad_x.default, (g, crow, col, values, 32, p))
        torch.library.opcheck(ops.bsr_linear_grad_values.default, (g, x, crow, col, 8, 16, p))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_as_linear_does(device):
    dense, crow, col, values = random_bsr(32, 32, 16, 0.5, device=device)
    x = torch.randn(5, 32, device=device)
    bias = torch.randn(32, device=device)
    dtypes = [torch.bfloat16, torch.float16]
    for dtype in dtypes:  # the region's own dtype, not one fixed at registration
        with torch.autocast(device, dtype):
            y = bsr_linear(x, crow, col, values, bias=bias)  # a keyword argument
            assert y.dtype == F.linear(x, dense, bias).dtype == dtype
        assert relative_error(y, reference(x, dense, bias)) <= TOLERANCE[dtype]
        with torch.autocast(device, dtype):
            y = bsr_linear(x.double(), crow, col, values.double(), bias.double())
            assert y.dtype == F.linear(x.double(), dense.double(), bias.double()).dtype
            assert y.dtype == torch.float64
        mixed = x.to(dtype)
        with torch.autocast(device, dtype):
            assert bsr_linear(mixed, crow, col, values, bias).dtype == dtype
        with torch.autocast(device, dtype, enabled=False):
            assert bsr_linear(x, crow, col, values, bias).dtype == torch.float32


def test_fake_and_meta_give_the_shape():
    _, crow, col, values = random_bsr(32, 48, 16, 0.5)
    meta = [tensor.to("meta") for tensor in (torch.randn(2, 3, 48), crow, col, values)]
    y = bsr_linear(*meta)
    assert y.is_meta
    assert y.shape == (2, 3, 32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_break_and_once_for_all_batch_sizes(training, device):
    torch._dynamo.reset()
    _, crow, col, values = random_bsr(32, 48, 16, 0.5, device=device)
    values.requires_grad_(training)
    plan = build_plan(crow, col, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x):
        return bsr_linear(x, crow, col, values, activation="relu", plan=plan)

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for M in (2, 3, 7, 64, 300):
        x = torch.randn(M, 48, device=device)
        y = compiled(x)
        torch.testing.assert_close(y, function(x))
        if training:
            (grad,) = torch.autograd.grad(y.square().sum(), values)
            (expected,) = torch.autograd.grad(function(x).square().sum(), values)
            torch.testing.assert_close(grad, expected)
    assert counter.frame_count == 1


def test_same_inputs_give_the_same_bits():
    _, crow, col, values = random_bsr(128, 128, 16, 0.5)
    x = torch.randn(77, 128)
    first = bsr_linear(x, crow, col, values)
    assert all(torch.equal(first, bsr_linear(x, crow, col, values)) for _ in range(5))
