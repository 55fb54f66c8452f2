"""The Hopper backend's policy: which calls the Gluon kernel serves, and with which tile.

``hopper_kernels.py`` holds the device code. It needs Triton's experimental Gluon language and an sm_90 GPU; where
either is missing :func:`supports` answers False and the plain Triton kernels serve the call.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Tile", "choose", "forward", "supports", "unavailable_reason"]

try:
    import triton
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from torchao_superblock.ops import hopper_kernels as kernels

    _import_error: str | None = None
except Exception as error:  # an experimental module may fail in any way
    _import_error = f"Triton's Gluon cannot be used here: {error}"

_GLUON_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_STRIP = 64  # outputs of one consumer warpgroup


class Tile(NamedTuple):
    """How the kernel cuts the work.

    Attributes:
        tokens: tokens of a tile (256 or 128).
        part: tokens of one accumulator and of one store (``tokens`` or half of it).
        group: strips of 64 outputs in a tile, one consumer warpgroup each (2 or 3).
        x_slots: slices of x in flight.
        w_slots: blocks in flight for each strip.
        registers: registers a thread of a consumer warpgroup.
    """

    tokens: int
    part: int
    group: int
    x_slots: int
    w_slots: int
    registers: int


def choose(r: int, c: int, dtype: torch.dtype) -> Tile | None:
    """The tile for a block size and dtype, or None where the kernel does not serve them."""
    if dtype not in _GLUON_DTYPES or r % 16 or c % 16 or (r < 64 and 64 % r) or (r > 64 and r % 64):
        return None
    if dtype == torch.float32:
        return Tile(128, 128, 3, 4, 2, 160)
    if c % 64 == 0:
        return Tile(256, 128, 3, 4, 2, 160)
    return Tile(256, 128, 3, 6, 4, 160)


@lru_cache(maxsize=None)
def _layout(row_bytes: int, element_bits: int) -> Any:
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, row_bytes), element_bitwidth=element_bits, rank=2
    )


@lru_cache(maxsize=None)
def _processors(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if (properties.major, properties.minor) == (9, 0) else 0


def unavailable_reason(index: int = 0) -> str | None:
    """Why the Gluon kernel cannot run on CUDA device ``index``; None when it can."""
    if _import_error is not None:
        return _import_error
    if _processors(index) == 0:
        return "the Gluon kernel needs a Hopper GPU (sm_90)"
    return None


def supports(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
) -> bool:
    """Whether :func:`forward` serves this call, and faster than the plain kernels do."""
    if unavailable_reason(x.device.index) is not None or activation not in _ACTIVATIONS:
        return False
    nnz, r, c = values.shape
    tile = choose(r, c, x.dtype)
    M, K = x.shape
    if tile is None or nnz == 0 or M < 2048 or c > K:
        return False
    bytes_ = x.element_size()
    return (
        x.stride(1) == 1
        and (x.stride(0) * bytes_) % 16 == 0
        and x.stride(0) >= K
        and x.data_ptr() % 16 == 0
        and values.data_ptr() % 16 == 0
        and ((crow.shape[0] - 1) * r) % _STRIP == 0
        and max(M, nnz * r) < 2**31 - 512
    )


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """``activation(x @ W.T + bias)`` for a BSR weight W, where :func:`supports` says so.

    Args:
        x: ``(M, K)``.
        crow: ``(R + 1,)`` int32.
        col: ``(nnz,)`` int32.
        values: ``(nnz, r, c)`` contiguous.
        bias: ``(R * r,)`` contiguous or None.
        activation: name of an activation.
        plan: not used; the kernel works in the natural order.
        tile: overrides the choice by rule (for tuning and tests).

    Returns:
        ``(M, R * r)`` contiguous.
    """
    M, K = x.shape
    nnz, r, c = values.shape
    if tile is None:
        tile = choose(r, c, x.dtype)
        assert tile is not None
    rows = crow.shape[0] - 1
    N = rows * r
    bytes_ = x.element_size()
    bits = 8 * bytes_
    chunk = min(c, 128 // bytes_)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    operand = _layout(chunk * bytes_, bits)
    strips = N // _STRIP
    groups = -(-strips // tile.group)
    tiles = -(-M // tile.tokens) * groups
    kernels.bsr_linear_strips[(min(tiles, _processors(x.device.index)),)](
        TensorDescriptor(x, [M, K], [x.stride(0), 1], [tile.tokens, chunk], operand),
        TensorDescriptor(values, [nnz * r, c], [c, 1], [min(r, _STRIP), chunk], operand),
        TensorDescriptor(y, [M, N], [N, 1], [tile.part, _STRIP], _layout(128, bits)),
        y if bias is None else bias,
        crow,
        col,
        tiles,
        groups,
        rows,
        K // c,
        nnz,
        GROUP=tile.group,
        STACK=max(1, _STRIP // r),
        SPLIT=max(1, r // _STRIP),
        CHUNKS=c // chunk,
        X_SLOTS=tile.x_slots,
        W_SLOTS=tile.w_slots,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        REGISTERS=tile.registers,
        num_warps=4,
    )
    return y
