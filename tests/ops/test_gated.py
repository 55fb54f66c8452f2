"""The op of gated MLPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import random_bsr, relative_error
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.gated import OPS, bsr_gated_linear
from torchao_superblock.ops.operands import Operands
from torchao_superblock.ops.plan import build_plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(seed=0, N=96, K=64, dtype=torch.float32, device="cpu", bias=True, blocksize=(16, 32)):
    dense, crow, col, values = random_bsr(N, K, blocksize, 0.5, dtype, device, seed=seed)
    bias = torch.randn(N, dtype=dtype, device=device) if bias else None
    plan = build_plan(crow, col, K // blocksize[1], blocksize)
    return dense, Operands(crow, col, values, bias, plan)


def expected(x, gate, up, activation):
    def product(dense, one):
        y = x.double() @ dense.double().T
        return y if one.bias is None else y + one.bias.double()

    return ACTIVATIONS[activation](product(*gate)) * product(*up)


def flat(gate, up):
    return (*gate[:4], *up[:4], gate.plan, up.plan)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", OPS)
def test_matches_dense_float64(activation, dtype, device):
    gate, up = (layer(seed, dtype=dtype, device=device, bias=seed == 0) for seed in (0, 1))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 1e-2)
    for shape in ((64,), (1, 64), (5, 64), (2, 70, 64), (0, 64)):
        x = torch.randn(shape, dtype=dtype, device=device)
        reference = expected(x, gate, up, activation)
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients):
                for y in (
                    bsr_gated_linear(x, gate[1], up[1], activation),
                    OPS[activation](x, *flat(gate[1], up[1])),
                ):
                    assert y.shape == (*shape[:-1], 96) and y.dtype == dtype and y.is_contiguous()
                    assert x.numel() == 0 or relative_error(y, reference) <= tolerance


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_registration(activation):
    gate, up = (layer(seed, dtype=torch.float64)[1] for seed in (0, 1))
    for one in (gate, up):
        one.values.requires_grad_()
        one.bias.requires_grad_()
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS[activation], (x, *flat(gate, up)))
    torch.library.opcheck(OPS[activation], (x.detach(), *flat(gate, up)[:8]))


def test_gradients():
    gate, up = (layer(seed, dtype=torch.float64)[1] for seed in (0, 1))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    tensors = (x, gate.values, gate.bias, up.values, up.bias)
    for tensor in tensors:
        tensor.requires_grad_()

    def function(x, gate_values, gate_bias, up_values, up_bias):
        rest = (
            (gate._replace(values=gate_values, bias=gate_bias)[:4])
            + (up._replace(values=up_values, bias=up_bias)[:4])
        )
        return OPS["silu"](x, *rest)

    torch.autograd.gradcheck(function, tensors)


def test_transforms():
    (dense, gate), (other, up) = (layer(seed, dtype=torch.float64) for seed in (0, 1))
    x = torch.randn(4, 64, dtype=torch.float64)
    y, tangent = torch.func.jvp(
        lambda x: bsr_gated_linear(x, gate, up, "silu"), (x,), (torch.ones_like(x),)
    )
    reference, expected_tangent = torch.func.jvp(
        lambda x: expected(x, (dense, gate), (other, up), "silu"), (x,), (torch.ones_like(x),)
    )
    assert relative_error(y, reference) <= 1e-12
    assert relative_error(tangent, expected_tangent) <= 1e-12
    mapped = torch.vmap(lambda row: bsr_gated_linear(row, gate, up, "silu"))(x)
    assert relative_error(mapped, reference) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    gate, up = (layer(seed, device=device) for seed in (0, 1))
    x = torch.randn(5, 64, device=device)
    reference = expected(x, gate, up, "silu")
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        for y in (
            bsr_gated_linear(x, gate[1], up[1], "silu"),
            OPS["silu"](x, *flat(gate[1], up[1])),
        ):
            assert y.dtype == torch.bfloat16
            assert relative_error(y, reference) <= 2e-2


def test_meta_tensors():
    gate, up = (Operands(*(t.to("meta") for t in layer(seed)[1])) for seed in (0, 1))
    y = OPS["silu"](torch.empty(2, 5, 64, device="meta"), *flat(gate, up))
    assert y.shape == (2, 5, 96) and y.is_meta


def test_errors():
    gate, up = layer(0)[1], layer(1)[1]
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match="unknown activation 'none'; choose one of 'relu'"):
        bsr_gated_linear(x, gate, up, "none")
    with pytest.raises(ValueError, match=r"no kernel computes both products of x \(5, 64\)"):
        bsr_gated_linear(x, gate, up, "silu", at_once=True)
    op = OPS["silu"]
    cases = [
        (ValueError, "same features and block size", (x, *flat(gate, layer(1, N=48)[1]))),
        (ValueError, r"x must have shape \(\.\.\., in_features\)", (x[0, 0], *flat(gate, up))),
        (TypeError, "must be float32, float64", (x.int(), *flat(gate, up))),
        (TypeError, "x and gate must have one dtype", (x.double(), *flat(gate, up))),
        (
            ValueError,
            r"bias of up must have shape \(96,\), got \(3,\)",
            (x, *flat(gate, up._replace(bias=x[0, :3]))),
        ),
        (TypeError, "must be int32", (x, *flat(gate._replace(col_indices=x[0].long()), up))),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            op(*arguments)


def test_flops():
    gate, up = layer(0)[1], layer(1)[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        OPS["silu"](torch.randn(2, 5, 64), *flat(gate, up))
    assert counter.get_total_flops() == 2 * 10 * (gate.values.numel() + up.values.numel())
