"""Block masks on CUDA in three kernels: the mask, the masked weight, both gradients.

What costs here is not the arithmetic but the number of launches: spelled out in PyTorch a mask is
about fifteen small kernels for every layer in every step. Nor is Triton's own way to a launch taken
more than once: of a small model's step it would be the largest part. The masked weight and the gradients are
bound by memory; they read and write each element once and skip the blocks they need not read.

Dimensions: N out_features, K in_features; R, C rows and columns of the block grid; r, c rows and
columns of a block.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.block_mask.guards import TOLERANCE, Guards
from torchao_superblock.ops.cuda.launch import Kernel

MAX_PAIRWISE_BLOCKS = 16384
"""Above this many blocks, comparing all pairs costs more than sorting does."""

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASK_DTYPES = (torch.bool, torch.float32)


@triton.jit
def _places(scores, index, n):
    """One int64 for each block that is larger the earlier the block stands in the ranking."""
    # Reading a float's bits as an integer keeps its order, once negative numbers are turned round
    # and both zeros are made one; NaN goes below all of them, and the index settles ties.
    scores = tl.where(scores == 0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = tl.where(scores != scores, -2147483648, keys)
    return tl.where(index < n, keys * 4294967296 + (n - index), -9223372036854775807)


@triton.jit
def _mix(x):
    # As in guards.py.
    x = (x & 0x7FFFFFFF) * 0x2545F491 + ((x >> 31) & 0x7FFFFFFF) * 0x5BD1E995
    return ((x & 0x7FFFFFFF) * 0x1B873593) ^ (x >> 31)


@triton.jit
def _settle(
    n_kept_ptr,  # () int64
    held_ptr,  # (n,) int8
    frozen_ptr,  # () int8
    checksums_ptr,  # (2,) int64
    moments_ptr,  # (3,) float64
    held_mean_ptr,  # (n,) float32
    n,
    TOLERANCE: tl.constexpr,
    J_TILE: tl.constexpr,
    J_TILES: tl.constexpr,
):
    """`n_kept`, `frozen`, whether `held_mean` stands for `held`, `live`: see guards.settle."""
    n_kept = tl.load(n_kept_ptr)
    frozen = tl.load(frozen_ptr).to(tl.int64)
    mean = tl.load(moments_ptr)
    spread = tl.abs(tl.load(moments_ptr + 1) - mean * mean)
    frozen_mean = tl.load(moments_ptr + 2)
    level_copied = _mix(n_kept * 0x1E3779B97F + 0x1F83D9ABFB) == tl.load(checksums_ptr)
    rounded = tl.where(mean < 2147483648.0, mean + 0.5, 0.0).to(tl.int64)
    level_sound = level_copied | ((spread < TOLERANCE) & (rounded >= 1))

    sums = tl.zeros((J_TILE,), dtype=tl.int64)
    apart = tl.zeros((J_TILE,), dtype=tl.int32)
    nothing_held = (frozen == 0) & (_mix(frozen + 0x1A54FF53A5) == tl.load(checksums_ptr + 1))
    if nothing_held == 0:
        for tile in range(0, J_TILES):
            j = tile * J_TILE + tl.arange(0, J_TILE)
            weight = (j.to(tl.int64) * 0x9E3779B1) & 0x7FFFFFFF
            weight = (((weight * weight) >> 20) & 0x7FFFFFFF) | 1
            sums += tl.load(held_ptr + j, mask=j < n, other=0).to(tl.int64) * weight
            share = tl.load(held_mean_ptr + j, mask=j < n, other=0.0)
            distance = tl.abs(share - tl.where(share > 0.5, 1.0, 0.0))
            apart += tl.where(distance < TOLERANCE, 0, 1)
    checksum = _mix(frozen * (tl.sum(sums, axis=0) + 0x13C6EF372F) + 0x1A54FF53A5)
    copied = checksum == tl.load(checksums_ptr + 1)
    agreed = frozen_mean > 0.5
    is_frozen = tl.where(copied, frozen != 0, agreed)
    flag_agrees = tl.abs(frozen_mean - tl.where(agreed, 1.0, 0.0)) < TOLERANCE
    unanimous = tl.sum(apart, axis=0) == 0
    pattern_sound = copied | (flag_agrees & (unanimous | (is_frozen == 0)))

    sound = pattern_sound & (level_sound | is_frozen)
    n_kept = tl.where(level_copied, n_kept, rounded)
    live = tl.where(sound, tl.where(is_frozen, 0, 1), 2)
    return n_kept, is_frozen, copied == 0, live


@triton.jit
def _block_mask_kernel(
    ranked_ptr,  # (n,) float32 scores, or int64 blocks by descending score
    n_kept_ptr,
    held_ptr,
    frozen_ptr,
    checksums_ptr,
    moments_ptr,
    held_mean_ptr,
    out_ptr,  # (n + 1,) uint8: the mask, then `live`
    n,
    SORTED: tl.constexpr,
    GUARDED: tl.constexpr,
    TOLERANCE: tl.constexpr,
    I_TILE: tl.constexpr,
    J_TILE: tl.constexpr,
    J_TILES: tl.constexpr,  # a constant, for the interpreters that cannot loop to an argument
):
    place = tl.program_id(0) * I_TILE + tl.arange(0, I_TILE)
    in_range = place < n
    i = place
    if SORTED:
        i = tl.load(ranked_ptr + place, mask=in_range, other=0)
    else:
        # The place of i is the number of blocks ahead of it. All pairs are compared: for the few hundred to few
        # thousand blocks of a layer that is one short kernel, where a sort is several.
        key_i = _places(tl.load(ranked_ptr + i, mask=in_range, other=0.0), i, n)
        place = tl.zeros((I_TILE,), dtype=tl.int32)
        for tile in range(0, J_TILES):
            j = tile * J_TILE + tl.arange(0, J_TILE)
            key_j = _places(tl.load(ranked_ptr + j, mask=j < n, other=0.0), j, n)
            place += tl.sum((key_j[None, :] > key_i[:, None]).to(tl.int32), axis=1)
    # Every program reads the whole state again, which costs less than a launch of its own would.
    if GUARDED:
        n_kept, frozen, by_mean, live = _settle(
            n_kept_ptr,
            held_ptr,
            frozen_ptr,
            checksums_ptr,
            moments_ptr,
            held_mean_ptr,
            n,
            TOLERANCE,
            J_TILE,
            J_TILES,
        )
    else:
        n_kept = tl.load(n_kept_ptr)
        frozen = tl.load(frozen_ptr) != 0
        live = tl.where(frozen, 0, 1)
    keep = (place < n_kept).to(tl.uint8)
    if frozen:
        keep = (tl.load(held_ptr + i, mask=in_range, other=0) != 0).to(tl.uint8)
        if GUARDED:
            if by_mean:
                keep = (tl.load(held_mean_ptr + i, mask=in_range, other=0.0) > 0.5).to(tl.uint8)
    keep = tl.where(live == 2, tl.zeros_like(keep), keep)
    tl.store(out_ptr + i, keep, mask=in_range)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + n, live.to(tl.uint8))


@triton.jit
def _times(weight, factor):
    """The product as PyTorch has it: the factor is rounded to the weight's dtype, the product once more."""
    dtype = weight.dtype
    if dtype == tl.float16 or dtype == tl.bfloat16:
        weight = (weight.to(tl.float32) * factor.to(dtype).to(tl.float32)).to(dtype)
    else:
        weight = weight * factor.to(dtype)
    return weight


@triton.jit
def _mask_weight_kernel(
    weight_ptr,  # (N, K)
    mask_ptr,  # (R, C) uint8, or float32 factors
    live_ptr,  # () uint8
    out_ptr,  # (N, K)
    N,
    K,
    C,
    R_SIZE: tl.constexpr,
    C_SIZE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    TILE_IN_BLOCK: tl.constexpr,
    FACTORS: tl.constexpr,
    GUARDED: tl.constexpr,
):
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    k = tl.program_id(0) * K_TILE + tl.arange(0, K_TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    if TILE_IN_BLOCK:
        block_row = tl.program_id(1) * N_TILE // R_SIZE
        block_col = tl.program_id(0) * K_TILE // C_SIZE
        # The same decision for the whole tile: a pruned tile is written without being read.
        factor = tl.load(mask_ptr + block_row * C + block_col)
        keep = factor != 0
        # Not `inside & keep`: Triton 3.9's interpreter makes no bool of a bool that it widens.
        inside_kept = tl.where(keep, inside, False)
    else:
        # `inside` guards the load: past the edge there is no block.
        blocks = (n // R_SIZE)[:, None] * C + (k // C_SIZE)[None, :]
        factor = tl.load(mask_ptr + blocks, mask=inside, other=0)
        inside_kept = inside & (factor != 0)
    offsets = n.to(tl.int64)[:, None] * K + k[None, :]
    weight = tl.load(weight_ptr + offsets, mask=inside_kept, other=0.0)
    if FACTORS:
        weight = _times(weight, factor)
    if GUARDED:
        if tl.load(live_ptr) == 2:
            weight = tl.full((N_TILE, K_TILE), float("nan"), weight.dtype)
    tl.store(out_ptr + offsets, weight, mask=inside)


@triton.jit
def _mask_weight_backward_kernel(
    grad_ptr,  # (N, K), any strides
    weight_ptr,  # (N, K)
    mask_ptr,  # (R, C) uint8, or float32 factors
    live_ptr,  # () uint8
    grad_weight_ptr,  # (N, K)
    grad_scores_ptr,  # (R, C)
    N,
    K,
    C,
    grad_stride_n,
    grad_stride_k,
    R_SIZE: tl.constexpr,
    C_SIZE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    NEED_GRAD_WEIGHT: tl.constexpr,
    NEED_GRAD_SCORES: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    # One program a block, so that its sum needs no second pass and no atomics.
    block_row = tl.program_id(1)
    block_col = tl.program_id(0)
    block = block_row * C + block_col
    factor = tl.load(mask_ptr + block)
    keep = factor != 0
    total = tl.zeros((N_TILE, K_TILE), dtype=ACC_DTYPE)
    for n_start in range(0, R_SIZE, N_TILE):
        for k_start in range(0, C_SIZE, K_TILE):
            n_in = n_start + tl.arange(0, N_TILE)
            k_in = k_start + tl.arange(0, K_TILE)
            n = block_row * R_SIZE + n_in
            k = block_col * C_SIZE + k_in
            inside = ((n_in < R_SIZE) & (n < N))[:, None] & ((k_in < C_SIZE) & (k < K))[None, :]
            grad_offsets = (
                n.to(tl.int64)[:, None] * grad_stride_n + k.to(tl.int64)[None, :] * grad_stride_k
            )
            offsets = n.to(tl.int64)[:, None] * K + k[None, :]
            if NEED_GRAD_SCORES:
                grad = tl.load(grad_ptr + grad_offsets, mask=inside, other=0.0)
                weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
                # grad_scores = sum over the block of grad * weight
                total += grad.to(ACC_DTYPE) * weight.to(ACC_DTYPE)
                grad = tl.where(keep, grad, tl.zeros_like(grad))
            else:
                grad = tl.load(
                    grad_ptr + grad_offsets, mask=tl.where(keep, inside, False), other=0.0
                )
            if FACTORS:
                grad = _times(grad, factor)
            if NEED_GRAD_WEIGHT:
                # grad_weight = grad * mask
                tl.store(grad_weight_ptr + offsets, grad, mask=inside)
    if NEED_GRAD_SCORES:
        live = tl.load(live_ptr) != 0
        block_total = tl.sum(tl.sum(total, axis=1), axis=0)
        tl.store(grad_scores_ptr + block, tl.where(live, block_total, 0.0))


def block_mask(
    ranked: Tensor,
    n_kept: Tensor,
    held_mask: Tensor,
    frozen: Tensor,
    guards: Guards | None = None,
    is_sorted: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchao_superblock.ops.block_mask.block_mask`.

    Args:
        ranked: float32, the scores; or int64 `(n,)`, the blocks by descending score.
        n_kept: int64, 0-dim.
        held_mask: bool or int8 `(R, C)`.
        frozen: bool or int8, 0-dim.
        guards: of the three.
        is_sorted: which of the two `ranked` is.
    """
    n = held_mask.numel()
    i_tile, j_tile = (1024, 4096) if is_sorted else (32, 128)
    out = torch.empty(n + 1, dtype=torch.uint8, device=n_kept.device)
    held = _as(torch.int8, held_mask.contiguous())
    with _on_device(n_kept):
        _launch_block_mask(
            (triton.cdiv(n, i_tile), 1, 1),
            (
                ranked.contiguous(),
                n_kept,
                held,
                _as(torch.int8, frozen),
                # Without guards nothing is read from the last three.
                *(guards if guards is not None else (n_kept, n_kept, held)),
                out,
            ),
            (n,),
            SORTED=is_sorted,
            GUARDED=guards is not None,
            TOLERANCE=TOLERANCE,
            I_TILE=i_tile,
            J_TILE=j_tile,
            J_TILES=triton.cdiv(n, j_tile),
        )
    return out[:n].view(torch.bool).view(held_mask.shape), out[n]


def can_mask_weight(weight: Tensor, mask: Tensor) -> bool:
    """Whether :func:`mask_weight` serves these."""
    dtypes = mask.dtype in _MASK_DTYPES and weight.dtype in _KERNEL_DTYPES
    return dtypes and weight.is_contiguous() and weight.numel() > 0


def mask_weight(
    weight: Tensor, mask: Tensor, blocksize: tuple[int, int], live: Tensor | None = None
) -> Tensor:
    """See :func:`torchao_superblock.ops.block_mask.mask_weight`."""
    r, c = blocksize
    N, K = weight.shape
    # A tile within one block saves the pruned reads; smaller blocks are looked up by element.
    n_tile, k_tile = _power_of_two_divisor(r, 32), _power_of_two_divisor(c, 128)
    tile_in_block = n_tile * k_tile >= 1024
    if not tile_in_block:
        n_tile, k_tile = 16, 128
    out = torch.empty_like(weight)
    argument = _mask_argument(mask)
    with _on_device(weight):
        _launch_mask_weight(
            (triton.cdiv(K, k_tile), triton.cdiv(N, n_tile), 1),
            (weight, argument, argument if live is None else live, out),
            (N, K, mask.shape[1]),
            R_SIZE=r,
            C_SIZE=c,
            N_TILE=n_tile,
            K_TILE=k_tile,
            TILE_IN_BLOCK=tile_in_block,
            FACTORS=mask.dtype != torch.bool,
            GUARDED=live is not None,
        )
    return out


def can_mask_weight_backward(
    grad: Tensor, weight: Tensor | None, mask: Tensor, blocksize: tuple[int, int]
) -> bool:
    """Whether :func:`mask_weight_backward` serves these: one program a block must be a fair share.

    Tiny blocks would be millions of programs, a handful of huge ones would leave the device idle.
    """
    r, c = blocksize
    fair = r * c >= 256 and r <= 512 and c <= 1024 and mask.numel() >= 64
    dtypes = grad.dtype in _KERNEL_DTYPES and (weight is None or weight.dtype == grad.dtype)
    dtypes = dtypes and mask.dtype in _MASK_DTYPES
    return fair and dtypes and (weight is None or weight.is_contiguous())


def mask_weight_backward(
    grad: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    live: Tensor,
    blocksize: tuple[int, int],
    need_grad_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`torchao_superblock.ops.block_mask.mask_weight_backward`."""
    r, c = blocksize
    R, C = mask.shape
    accumulator = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_weight = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    grad_scores = torch.empty((R, C), dtype=accumulator, device=grad.device)
    if not (need_grad_weight or weight is not None):
        return None, None
    with _on_device(grad):
        _launch_mask_weight_backward(
            (C, R, 1),
            (
                grad,
                grad if weight is None else weight,
                _mask_argument(mask),
                _as(torch.uint8, live),
                grad_weight,
                grad_scores,
            ),
            (*grad.shape, C, *grad.stride()),
            R_SIZE=r,
            C_SIZE=c,
            N_TILE=min(32, triton.next_power_of_2(r)),
            K_TILE=min(64, triton.next_power_of_2(c)),
            NEED_GRAD_WEIGHT=need_grad_weight,
            NEED_GRAD_SCORES=weight is not None,
            ACC_DTYPE=tl.float64 if accumulator == torch.float64 else tl.float32,
            FACTORS=mask.dtype != torch.bool,
        )
    return (grad_weight if need_grad_weight else None), (None if weight is None else grad_scores)


class _Launcher:
    """Launches one kernel; what Triton would compile once is kept as one :class:`Kernel`."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._kernels: dict[tuple, Kernel] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        **constants: Any,
    ) -> None:
        device = tensors[0].device.index
        # All that Triton compiles for. It asks of an address no more than whether 16 divides it.
        key = (
            device,
            numbers,
            *constants.values(),
            *[(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors],
        )
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = Kernel(self._function, constants, num_warps=4)
        kernel(grid, device, tensors, *numbers)


_launch_block_mask = _Launcher(_block_mask_kernel)
_launch_mask_weight = _Launcher(_mask_weight_kernel)
_launch_mask_weight_backward = _Launcher(_mask_weight_backward_kernel)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _mask_argument(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    return _as(torch.uint8, mask) if mask.dtype == torch.bool else mask


def _power_of_two_divisor(value: int, limit: int) -> int:
    divisor = 1
    while divisor < limit and value % (2 * divisor) == 0:
        divisor *= 2
    return divisor


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
