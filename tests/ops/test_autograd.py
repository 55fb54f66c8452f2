"""Derivatives of the op, for every backend: twice, in forward mode, under the transforms of torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from tests.ops.common import DEVICES, SHAPES
from tests.reference import EXTREMES, TOLERANCE, block_mask, random_bsr, relative_error
from torchao_superblock.bsr.format import bsr_to_dense
from torchao_superblock.ops import ACTIVATIONS, bsr_linear, build_plan


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_of_activations_at_extremes_are_torchs(activation, dtype, device):
    """Of the bias, which comes to the activation as it is, once and with a graph of its own."""
    bias = torch.tensor(EXTREMES, device=device).to(dtype).requires_grad_()
    N = len(bias)
    crow, col = torch.zeros(N + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    values = torch.zeros(0, 1, 1, dtype=dtype, device=device)
    x = torch.zeros(1, 1, dtype=dtype, device=device)
    y = bsr_linear(x, crow.to(device), col.to(device), values, bias, None, activation)
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](bias).sum(), bias)
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(y.sum(), bias, retain_graph=True, create_graph=create_graph)
        # Where torch's own formula ends in NaN, the limit may be given: 0 on the left, 1 on the right.
        better = expected.isnan() & (grad == (bias > 0).to(dtype))
        torch.testing.assert_close(grad.where(~better, expected), expected, equal_nan=True)


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


def test_autocast_gradients_reach_float32_parameters():
    _, crow, col, values = random_bsr(32, 32, 16, 0.5)
    values.requires_grad_()
    bias = torch.randn(32, requires_grad=True)
    x = torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        bsr_linear(x, crow, col, values, bias, activation="gelu").float().sum().backward()
    assert values.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32


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
