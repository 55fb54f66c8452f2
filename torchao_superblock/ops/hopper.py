"""The Hopper backend's policy: which calls the Gluon kernel serves, and with which tile.

``hopper_kernels.py`` holds the device code. It needs Triton's experimental Gluon language and an sm_90 GPU; where
either is missing :func:`supports` answers False and the plain Triton kernels serve the call.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Strips", "choose", "forward", "supports", "unavailable_reason"]

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from torchao_superblock.ops import hopper_kernels as kernels

    _import_error: str | None = None
except Exception as error:  # an experimental module may fail in any way
    _import_error = f"Triton's Gluon cannot be used here: {error}"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_STRIP = 64  # outputs of one consumer warpgroup


class Strips(NamedTuple):
    """How ``bsr_linear_strips`` cuts the work.

    Attributes:
        tokens: tokens of a tile (256 or 128).
        part: tokens of one accumulator and of one store (``tokens`` or half of it).
        group: strips of 64 outputs in a tile, one consumer warpgroup each (2 or 3).
        x_slots: slices of x in flight.
        w_slots: blocks in flight for each strip.
        y_slots: output buffers of each strip (1, or 2 where ``part`` is half of ``tokens``).
        registers: registers a thread of a consumer warpgroup.
    """

    tokens: int
    part: int
    group: int
    x_slots: int
    w_slots: int
    y_slots: int
    registers: int


def _table_size(rows: int, columns: int) -> int:
    """Entries of the table of column masks, 64 columns a mask: a power of two, to compile rarely."""
    return max(128, 1 << (rows * -(-columns // 64) - 1).bit_length())


def choose(
    rows: int, columns: int, r: int, c: int, dtype: torch.dtype, exact: bool = False
) -> Strips | None:
    """The tile for a block grid, block size and dtype, or None where the kernel does not serve them.

    ``exact`` asks for float32 accuracy of float32 (three TF32 products instead of one).
    """
    entries = _table_size(rows, columns)
    if entries > 2048:
        return None
    if dtype not in _DTYPES or r % 16 or c % 16 or (r < 64 and 64 % r) or (r > 64 and r % 64):
        return None
    if dtype == torch.float32:
        if c % 32:
            return None
        return Strips(128, 128, 2, 3, 3, 1, 176) if exact else Strips(128, 128, 2, 5, 3, 1, 216)
    # Three strips use every byte of x best; a large table of column masks leaves room for two.
    if entries <= (256 if c >= 64 else 1024):
        return Strips(256, 128, 3, 4, 2 if c >= 64 else 3, 1, 160)
    return Strips(256, 128, 2, 4, 3, 1, 216)


@cache
def _layout(row_bytes: int, element_bits: int) -> Any:
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, row_bytes), element_bitwidth=element_bits, rank=2
    )


@cache
def _processors(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if (properties.major, properties.minor) == (9, 0) else 0


def _exact(dtype: torch.dtype) -> bool:
    """Whether products must keep float32 accuracy, as torch's own switch says."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


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
    M, K = x.shape
    tile = choose(crow.shape[0] - 1, K // c, r, c, x.dtype, _exact(x.dtype))
    if tile is None or nnz == 0 or M < 2048 or K < 64:
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
    tile: Strips | None = None,
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
    rows = crow.shape[0] - 1
    N = rows * r
    exact = _exact(x.dtype)
    if tile is None:
        tile = choose(rows, K // c, r, c, x.dtype, exact)
        assert tile is not None
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    bytes_ = x.element_size()
    bits = 8 * bytes_
    chunk = min(c, 128 // bytes_)
    # Rows of 128 bytes are what TMA copies fastest: narrow blocks share a slice of x.
    wide = _STRIP // chunk if bytes_ == 2 else 1
    packed = wide > 1
    if packed:
        # For the same reason a narrow block travels as the contiguous memory that it is.
        block = min(r, _STRIP) * c
        width = 64 if block >= 512 else 32
        w_shape, w_box = [nnz * r * c // width, width], [block // width, width]
    else:
        w_shape, w_box = [nnz * r, c], [min(r, _STRIP), chunk]
    strips = N // _STRIP
    groups = -(-strips // tile.group)
    tiles = -(-M // tile.tokens) * groups
    kernels.bsr_linear_strips[(min(tiles, _processors(x.device.index)),)](
        TensorDescriptor(
            x, [M, K], [x.stride(0), 1], [tile.tokens, chunk * wide], _layout(128, bits)
        ),
        TensorDescriptor(values, w_shape, [w_shape[1], 1], w_box, _layout(w_box[1] * bytes_, bits)),
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
        WIDE=wide,
        PACKED=packed,
        EXACT=exact,
        TABLE=_table_size(rows, K // c),
        X_SLOTS=tile.x_slots,
        W_SLOTS=tile.w_slots,
        Y_SLOTS=tile.y_slots,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        REGISTERS=tile.registers,
        num_warps=4,
    )
    return y
