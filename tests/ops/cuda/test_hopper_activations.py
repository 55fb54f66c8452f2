"""The activations that the Gluon kernel fuses: their formulas, and at infinities and NaN on a GPU."""

import math

import pytest
import torch

from tests.ops.cuda.hopper_cases import (
    ACTIVATIONS,
    arithmetic,
    by_epilogue,
    candidates,
    check,
    forward,
    hopper,
    hopper_or_skip,
)
from tests.reference import EXTREMES, random_bsr, relative_error


@pytest.fixture
def activate():
    """The kernel's own arithmetic of an activation, in float32 on the CPU."""
    return arithmetic(
        hopper.kernels.activate,
        {"abs": torch.abs, "minimum": lambda a, b: a.clamp(max=b)},
        _positive=torch.relu,
        _exp2=torch.exp2,
        _reciprocal=torch.reciprocal,
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 4.0])
def test_activations_of_float32_have_float32_accuracy(activate, scale, activation):
    z = torch.randn(100_000) * scale
    expected = ACTIVATIONS[activation](z.double())
    assert relative_error(activate(z, True, activation), expected) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_polynomial_of_gelu_for_16_bits_is_within_their_rounding(activate, dtype):
    z = torch.linspace(-6, 30, 720_001)
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    expected = expected.detach()
    error = (activate(z, False, "gelu") - expected).abs()
    # Half a unit in the last place, of the result or, as it comes out of gelu, of z.
    info = torch.finfo(dtype)
    half = expected.abs().clamp(min=info.smallest_normal) * (info.eps / 2)
    assert (error <= torch.maximum(half, (slope * exact).abs() * (info.eps / 2))).all()
    assert error.max() <= 6e-5
    assert (error <= 4e-4 * expected.abs())[z >= -1].all()
    assert (error <= 3e-3 * expected.abs())[z >= -4].all()


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [(64, 64), (128, 128), (128, 32), (16, 16), (32, 32)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_float64(activation, blocksize):
    hopper_or_skip()
    r, c = blocksize
    tiles = candidates(768 // r, 768 // c, r, c, torch.float16)
    assert tiles
    for tile in by_epilogue(tiles):
        check(3001, 768, 768, blocksize, torch.float16, 5e-4, activation=activation, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu", "relu"])
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 3e-7), ("tf32", 2e-3)])
def test_float32_activations_match_float64(set_precision, activation, precision, bound, blocksize):
    hopper_or_skip()
    set_precision(precision)
    check(9000, 832, 768, blocksize, torch.float32, bound, activation=activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_extremes_are_torch_s(activation, dtype):
    hopper_or_skip()
    _, crow, col, values = random_bsr(768, 768, 64, 0.8, dtype, "cuda")
    bias = torch.tensor(EXTREMES, device="cuda").repeat(768)[:768].to(dtype)
    x = torch.zeros(9000, 768, device="cuda", dtype=dtype)
    y = forward(x, crow, col, values, bias, activation, None)
    expected = ACTIVATIONS[activation](bias.double()).to(dtype)
    if dtype != torch.float32 and activation == "gelu":
        expected = torch.where(bias == -torch.inf, 0, expected)
    torch.testing.assert_close(y, expected.expand(9000, -1), equal_nan=True, atol=6e-5, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_activations_of_infinity_and_nan_are_torchs(activation, dtype):
    hopper_or_skip()
    _dense, crow, col, values = random_bsr(128, 768, 64, 0.5, dtype, "cuda")
    x = torch.zeros(2048, 768, device="cuda", dtype=dtype)
    bias = torch.zeros(128, device="cuda", dtype=dtype)
    bias[:4] = torch.tensor([math.inf, math.nan, -30.0, 30.0])
    y = forward(x, crow, col, values, bias, activation, None)
    expected = ACTIVATIONS[activation](bias.float()).to(dtype).expand_as(y)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=1e-6)
