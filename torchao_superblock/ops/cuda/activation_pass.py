"""The gradient of an activation and the sums over tokens that are the gradient of a bias: one pass over both operands.

Legend: M tokens, N features; BM x BN the tile of a step.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.activations import CODES
from torchao_superblock.ops.cuda.device import device_at
from torchao_superblock.ops.cuda.launch import Kernel

# A program takes a strip of tokens: short enough for as many programs to a processor, and at least so many steps long.
_PROGRAMS = 16
_STEPS = 8
_TILE = (32, 128)
# Of the second pass, over the sums of strips, which are few.
_SUMS_TILE = (64, 32)


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """d activation / dz. SHORT says that the operands have 16 bits, which a shorter erf does for."""
    if ACTIVATION == 1:
        # Not z > 0: NaN passes.
        d = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == 2:
        density = tl.exp2(-0.7213475204444817 * z * z)
        if SHORT:
            # Abramowitz and Stegun, 7.1.26, to 1.5e-7. With the density for an exponential and the square of a root for
            # a division, it costs a fifth of erf; the pass would otherwise be bound by arithmetic.
            size = tl.abs(z)
            root = tl.rsqrt(1 + 0.2316418882 * size)
            t = root * root
            tail = 1.061405429 * t - 1.453152027
            tail = tail * t + 1.421413741
            tail = tail * t - 0.284496736
            tail = (tail * t + 0.254829592) * t * 0.5 * density
            below = tl.where(z < 0, tail, 1 - tail)
        else:
            below = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        d = below + z * density * 0.3989422804014327
    elif ACTIVATION == 3:
        square = z * z
        sigmoid = _sigmoid(1.5957691216057308 * z * (1 + 0.044715 * square))
        slope = sigmoid * (1 - sigmoid)
        # Where the slope is 0, the square may be infinite.
        rise = z * slope * (1.5957691216057308 + 0.2140644488178507 * square)
        d = sigmoid + tl.where(slope == 0, 0.0, rise)
    elif ACTIVATION == 4:
        sigmoid = _sigmoid(z)
        d = sigmoid + z * (sigmoid * (1 - sigmoid))
    else:
        sigmoid = _sigmoid(1.702 * z)
        d = sigmoid + z * (1.702 * sigmoid * (1 - sigmoid))
    return d


@triton.jit(do_not_specialize=("M", "tokens"))
def activation_gradient_kernel(
    grad_ptr,  # (M, N), any strides
    z_ptr,  # (M, N), what the activation was applied to, if there is one
    out_ptr,  # (M, N), if there is one
    sums_ptr,  # (strips, N), if SUMS
    M,
    tokens,  # of a strip, a multiple of BM
    N,
    grad_stride_m,
    grad_stride_n,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    FLOAT64: tl.constexpr,
    SHORT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = grad * activation'(z), and for each strip of tokens the sum of it over the strip.

    Bound by device memory: grad and z are read and out is written once. Each program adds up its strip in registers,
    so that sums come in a fixed order and cost no traffic worth the name.
    """
    acc_dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    strip = tl.program_id(1)
    m0 = strip.to(tl.int64) * tokens
    left = tl.minimum(M - m0, tokens).to(tl.int32)
    m = tl.arange(0, BM)
    grad_tile = grad_ptr + m0 * grad_stride_m
    grad_tile += (n.to(tl.int64) * grad_stride_n)[None, :] + (m.to(tl.int64) * grad_stride_m)[
        :, None
    ]
    place = m0 * N + (m.to(tl.int64) * N)[:, None] + n[None, :]
    total = tl.zeros((BM, BN), acc_dtype)
    for done in range(0, left, BM):
        inside = (m < left - done)[:, None] & (n < N)[None, :]
        grad = tl.load(grad_tile, mask=inside, other=0.0).to(acc_dtype)
        if ACTIVATION != 0:
            z = tl.load(z_ptr + place, mask=inside, other=0.0).to(acc_dtype)
            grad = grad * derivative(z, ACTIVATION, SHORT)
            tl.store(out_ptr + place, grad.to(out_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            total += grad
        grad_tile += tl.cast(BM, tl.int64) * grad_stride_m
        place += tl.cast(BM, tl.int64) * N
    if SUMS:
        sums = tl.sum(total, axis=0)
        tl.store(
            sums_ptr + strip.to(tl.int64) * N + n, sums.to(sums_ptr.dtype.element_ty), mask=n < N
        )


# What is given and what comes out: the gradient, z -> the gradient of z (the same without an activation), the sums.
Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@lru_cache(maxsize=4096)
def prepare(
    device_index: int,
    dtype: torch.dtype,
    activation: str,
    width: int,
    strides: tuple[int, int],
    aligned: tuple[bool, bool],
    needs_sums: bool,
) -> Run:
    """All of a pass but its tensors.

    Args:
        device_index: of the CUDA device.
        dtype: of the gradient and of z.
        activation: a name of the table.
        width: N.
        strides: of the gradient along tokens and features.
        aligned: whether the gradient and z start at a multiple of 16 bytes, as Triton makes wide loads of that. (What
            is compiled for one of them serves no other.)
        needs_sums: whether the gradient of the bias is asked for.

    Returns:
        A function of the gradient `(..., N)` and of z, contiguous in its shape, or None. It returns the gradient of z,
        contiguous, and that of the bias, `(N,)`, or None.
    """
    N, activates = width, activation != "none"
    processors = device_at(device_index).processors
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def kernel(strides: tuple[int, int], code: int, sums: bool, tile: tuple[int, int]) -> Kernel:
        constants: dict[str, Any] = {
            "ACTIVATION": code,
            "SUMS": sums,
            "FLOAT64": dtype == torch.float64,
            "SHORT": dtype.itemsize == 2,
            "BM": tile[0],
            "BN": tile[1],
        }
        return Kernel(
            activation_gradient_kernel, constants, (N, *strides), num_warps=4, num_stages=2
        )

    one_strip, strip = (
        kernel(strides, CODES[activation], needs_sums, _TILE) for _ in range(2)
    )  # they write sums of different dtypes
    add = kernel((N, 1), 0, True, _SUMS_TILE)
    columns = -(-N // _TILE[1])

    def run(grad: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = grad.numel() // N
        strips = max(1, min(_PROGRAMS * processors // columns, M // (_STEPS * _TILE[0])))
        tokens = -(-M // (strips * _TILE[0])) * _TILE[0]
        strips = -(-M // tokens)
        out, sums, bias_grad = grad, grad, None
        if activates:
            assert z is not None
            out = Kernel.empty(tuple(z.shape), z.stride(), dtype)
        if needs_sums:
            sums = bias_grad = Kernel.empty((N,), (1,), dtype)
            if strips > 1:
                sums = Kernel.empty((strips, N), (N, 1), sum_dtype)
        tensors = (grad, grad if z is None else z, out, sums)
        first = one_strip if strips == 1 else strip
        first((columns, strips, 1), device_index, tensors, M, tokens)
        if needs_sums and strips > 1:
            grid = (-(-N // _SUMS_TILE[1]), 1, 1)
            add(grid, device_index, (sums, sums, sums, bias_grad), strips, strips)
        return out, bias_grad

    return run
