"""The grid on which the Triton kernel of gated MLPs is checked, wherever it runs.

Without a GPU in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.ops.cuda.gated_cases`.
"""

import math

import torch

from tests.ops.cuda import triton_cases  # makes older interpreters loop
from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.cuda import gated
from torchao_superblock.ops.cuda.problem import FMA, NATIVE, TF32
from torchao_superblock.ops.operands import Operands

DEVICE = triton_cases.DEVICE


def operands(N, K, blocksize, dtype, *, bias: bool, seed: int, sparsity=0.5, mask=None):
    dense, crow, col, values = random_bsr(
        N, K, blocksize, sparsity, dtype, DEVICE, seed=seed, mask=mask
    )
    bias = torch.randn(N, dtype=dtype, device=DEVICE) if bias else None
    return dense, Operands(crow, col, values, bias)


def reference(x, gate, up, activation):
    def product(dense, one):
        y = x.double() @ dense.double().T
        return y if one.bias is None else y + one.bias.double()

    return ACTIVATIONS[activation](product(*gate)) * product(*up)


def check(blocksize, dtype, M, activation="silu", *, bias=False, R=3, C=5, masks=(None, None)):
    r, c = blocksize
    pair = [
        operands(R * r, C * c, blocksize, dtype, bias=bias, seed=seed, mask=mask)
        for seed, mask in enumerate(masks)
    ]
    x = torch.randn(M, C * c, dtype=dtype, device=DEVICE)
    precision = NATIVE if dtype is not torch.float32 else TF32 if DEVICE == "cuda" else FMA
    y = gated.forward(x, pair[0][1], pair[1][1], activation, precision=precision)
    error = relative_error(y, reference(x, *pair, activation))
    tolerance = 3e-3 if precision == TF32 else 3 * TOLERANCE[dtype]
    where = f"block {blocksize}, {dtype}, M {M}, {activation}"
    assert math.isfinite(error) and error <= tolerance, f"error {error:.1e} at {where}"
    assert y.is_contiguous() and y.dtype == dtype


def sizes():
    for blocksize in ((16, 16), (32, 32), (64, 16), (16, 64), (128, 128), (256, 32)):
        for dtype in (torch.float32, torch.float16):
            check(blocksize, dtype, 37)
    for M in (1, 16, 129):
        check((32, 32), torch.float16, M, bias=True)


def activations():
    for activation in ACTIVATIONS:
        check((32, 32), torch.float32, 20, activation, bias=True)


def empty_rows():
    masks = [torch.zeros(3, 5, dtype=torch.bool) for _ in range(2)]
    masks[0][0, 2] = masks[1][0, 1] = masks[1][1, 3] = True
    for both in (masks, masks[::-1]):
        check((32, 32), torch.float32, 20, bias=True, masks=tuple(both))


def halves_and_strides():
    """Both weights in the rows of one, and x a part of something larger."""
    dense, one = operands(192, 128, (32, 32), torch.float32, bias=True, seed=0)
    gate = one._replace(crow_indices=one.crow_indices[:4], bias=one.bias[:96])
    up = one._replace(crow_indices=one.crow_indices[3:], bias=one.bias[96:])
    for x in (
        torch.randn(40, 256, device=DEVICE)[::2, 64:192],
        torch.randn(128, 20, device=DEVICE).T,
    ):
        y = gated.forward(x, gate, up, "silu", precision=FMA)
        expected = reference(x, (dense[:96], gate), (dense[96:], up), "silu")
        assert relative_error(y, expected) <= 1e-5


def bad_indices():
    """They may give wrong numbers, never a wild access: what is beyond the operands is not read."""
    _, gate = operands(64, 64, (32, 32), torch.float32, bias=False, seed=0)
    for crow, column in (([0, 100, 200], 0), ([-5, 1, 2], -7), ([3, 2, 1], 99)):
        bad = gate._replace(
            crow_indices=torch.tensor(crow, dtype=torch.int32, device=DEVICE),
            col_indices=torch.full_like(gate.col_indices, column),
        )
        y = gated.forward(torch.ones(20, 64, device=DEVICE), bad, bad, "silu", precision=FMA)
        assert y.isfinite().all()


GROUPS = [sizes, activations, empty_rows, halves_and_strides, bad_indices]

if __name__ == "__main__":
    torch.manual_seed(0)
    for group in GROUPS:
        group()
        print(f"{group.__name__} passed", flush=True)
