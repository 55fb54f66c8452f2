"""The op as every backend must serve it: values, gradients, dispatch, errors. Runs on the CPU, and on a GPU if any."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from tests.reference import TOLERANCE, block_mask, random_bsr, relative_error
from torchao_superblock.bsr.format import bsr_to_dense
from torchao_superblock.ops import ACTIVATIONS, bsr_linear, build_plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

SHAPES = [  # N, K, blocksize
    (64, 96, (16, 16)),
    (64, 128, (32, 32)),
    (128, 192, (64, 64)),
    (48, 40, (8, 8)),
    (12, 20, (4, 4)),
    (5, 7, (1, 1)),
    (9, 10, (3, 5)),
    (128, 64, (64, 16)),
    (32, 128, (16, 64)),
    (64, 64, (64, 64)),
]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K", "blocksize"), SHAPES)
def test_gradients_match_float64_over_the_grid(N, K, blocksize, dtype, device):
    r, c = blocksize
    mask = block_mask(N // r, K // c, 0.6)
    dense, crow, col, values = random_bsr(N, K, blocksize, mask=mask, dtype=dtype, device=device)
    for lead in ((1,), (37,), (3, 50)):
        x = torch.randn(*lead, K, device=device).to(dtype).requires_grad_()
        bias = torch.randn(N, device=device).to(dtype).requires_grad_()
        values = values.detach().requires_grad_()
        y = bsr_linear(x, crow, col, values, bias, plan=build_plan(crow, col, K // c))
        g = torch.randn_like(y)
        grad_x, grad_values, grad_bias = torch.autograd.grad(y, (x, values, bias), g)
        g2, x2 = g.double().reshape(-1, N), x.detach().double().reshape(-1, K)
        full = (g2.t() @ x2).view(N // r, r, K // c, c).transpose(1, 2)
        tolerance = TOLERANCE[dtype]
        assert relative_error(grad_x, (g.double() @ dense.double())) <= tolerance
        assert relative_error(grad_values, full[mask.to(device)]) <= tolerance
        assert relative_error(grad_bias, g2.sum(0)) <= tolerance


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradcheck_and_gradgradcheck(activation):
    _, crow, col, values = random_bsr(6, 8, (2, 4), 0.4, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()

    def function(x, values, bias):
        return bsr_linear(x, crow, col, values, bias, None, activation)

    assert torch.autograd.gradcheck(function, (x, values, bias))
    assert torch.autograd.gradgradcheck(function, (x, values, bias))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_match_one_by_one():
    """The backward of an ordinary call under vmap, as torch.autograd.functional's vectorized Jacobians run it."""
    _, crow, col, values = random_bsr(6, 8, (2, 4), 0.4, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    inputs = (x, values.requires_grad_())
    y = bsr_linear(x, crow, col, values, activation="gelu")
    grads = torch.randn(5, 3, 6, dtype=torch.float64)
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    for one, many in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(many))


def test_one_token_without_a_batch_dimension_trains():
    dense, crow, col, values = random_bsr(6, 8, 2, 0.5)
    x = torch.randn(8, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    bsr_linear(x, crow, col, values.requires_grad_(), bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(6))
    assert relative_error(x.grad, dense.double().sum(0)) <= 1e-6


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_torch_func_transforms_and_forward_mode_match_dense(activation):
    _, crow, col, values = random_bsr(6, 8, (2, 4), 0.4, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)

    def sparse(x, values, bias):
        return bsr_linear(x, crow, col, values, bias, None, activation)

    def reference(x, values, bias):
        return ACTIVATIONS[activation](F.linear(x, bsr_to_dense(crow, col, values, (6, 8)), bias))

    def squares(function):
        return lambda *args: function(*args).square().sum()

    for argument in range(3):
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(
                transform(sparse, argument)(x, values, bias),
                transform(reference, argument)(x, values, bias),
            )
        torch.testing.assert_close(
            torch.func.hessian(squares(sparse), argument)(x, values, bias),
            torch.func.hessian(squares(reference), argument)(x, values, bias),
        )
    per_sample, expected = (
        torch.func.vmap(torch.func.grad(squares(function), 1), (0, None, None))(x, values, bias)
        for function in (sparse, reference)
    )
    torch.testing.assert_close(per_sample, expected)
    with forward_ad.dual_level():  # through the op itself, nothing requires a gradient
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y = torch.ops.torchao_superblock.bsr_linear(dual, crow, col, values, bias, None, activation)
        expected = forward_ad.unpack_dual(reference(dual, values, bias)).tangent
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


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


def test_autocast_gradients_reach_float32_parameters():
    _, crow, col, values = random_bsr(32, 32, 16, 0.5)
    values.requires_grad_()
    bias = torch.randn(32, requires_grad=True)
    x = torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        bsr_linear(x, crow, col, values, bias, activation="gelu").float().sum().backward()
    assert values.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32


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


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0)], ids=str)
@pytest.mark.parametrize(("R", "C"), [(0, 0), (0, 2), (2, 0)])
def test_gradients_where_there_are_no_features(leading, R, C):
    x = torch.randn(*leading, 4 * C, requires_grad=True)
    crow, col = torch.zeros(R + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    values, bias = torch.randn(0, 4, 4, requires_grad=True), torch.randn(4 * R, requires_grad=True)
    y = bsr_linear(x, crow, col, values, bias)
    assert torch.equal(y, bias.expand(*leading, 4 * R))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert values.grad.shape == values.shape
    assert torch.equal(bias.grad, torch.full_like(bias, y[..., 0].numel() if R else 0))


class TestErrors:
    @pytest.fixture
    def operands(self):
        _, crow, col, values = random_bsr(32, 48, 16, 0.5)
        return {"x": torch.randn(4, 48), "crow_indices": crow, "col_indices": col, "values": values}

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"x": torch.randn(4, 48).double()}, TypeError, "one dtype.*float64.*float32"),
            ({"x": torch.randn(4, 48).long()}, TypeError, "int64"),
            ({"x": torch.tensor(1.0)}, ValueError, "0-dim"),
            ({"bias": torch.randn(31)}, ValueError, r"\(32,\).*\(31,\)"),
            ({"bias": torch.randn(32).half()}, TypeError, "bias torch.float16"),
            ({"values": torch.randn(3, 16)}, ValueError, "nnz, block_rows, block_cols"),
            (
                {"values": torch.randn(0, 0, 16)},
                ValueError,
                r"blocks of at least 1x1, got \(0, 0, 16\)",
            ),
            ({"values": torch.randn(5, 16, 16)}, ValueError, "col_indices must have shape"),
            ({"crow_indices": torch.tensor([0, 1, 3])}, TypeError, "int32.*int64"),
            ({"crow_indices": torch.zeros(0).int()}, ValueError, "crow_indices"),
            ({"out_features": 16}, ValueError, r"out_features=16.*\[17, 32\]"),
            ({"out_features": 33}, ValueError, "out_features=33"),
            (
                {"x": torch.randn(4, 96), "in_features": 48},
                ValueError,
                r"in_features=48.*\(4, 96\)",
            ),
            ({"in_features": 32}, ValueError, r"in_features=32.*\(4, 48\)"),
            ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'.*'gelu'"),
            ({"plan": torch.zeros(3).int()}, ValueError, "plan must be int32.*build_plan"),
            ({"values": torch.randn(3, 16, 16, device="meta")}, RuntimeError, "one device.*meta"),
        ],
    )
    def test_bad_arguments_name_the_value_and_the_rule(self, operands, change, error, words):
        with pytest.raises(error, match=words):
            bsr_linear(**(operands | change))

    def test_errors_are_the_same_when_compiling(self, operands):
        with pytest.raises(Exception, match="one dtype"):
            torch.compile(bsr_linear, backend="eager")(
                **(operands | {"x": torch.randn(4, 48).double()})
            )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.tensor(1.0)}, ValueError, "grad must have shape"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape"),
        ({"values": torch.zeros(2, 4, 0)}, ValueError, "at least 1x1"),
        ({"values": torch.zeros(2, 4)}, ValueError, "values must have shape|at least 1x1"),
        ({"values": torch.zeros(2, 4, 4).to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"crow": torch.tensor(0).int()}, ValueError, "crow_indices must have shape"),
        ({"col": torch.tensor(0).int()}, ValueError, "col_indices must have shape"),
        ({"in_features": -8}, ValueError, "must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_gradient_ops_refuse_what_the_forward_refuses(change, error, message):
    arguments = {
        "grad": torch.randn(3, 8),
        "x": torch.randn(3, 8),
        "crow": torch.tensor([0, 1, 2]).int(),
        "col": torch.tensor([0, 1]).int(),
        "values": torch.randn(2, 4, 4),
        "in_features": 8,
        **change,
    }
    grad, x, crow, col, values, in_features = arguments.values()
    ops = torch.ops.torchao_superblock
    if "x" not in change:
        with pytest.raises(error, match=message):
            ops.bsr_linear_grad_x(grad, crow, col, values, in_features)
    if "in_features" not in change:
        rows, cols = (*values.shape[1:], 0)[:2]
        x = x.to(values.dtype)
        with pytest.raises(error, match=message):
            ops.bsr_linear_grad_values(grad, x, crow, col, rows, cols)
