"""The arithmetic of a block mask: scores -> mask, masked weight, and the gradients of both.

No full-size mask is ever built: a `(N, K)` weight is seen as `(R, r, C, c)` and multiplied by a
`(R, 1, C, 1)` mask. On CUDA, in eager mode, each function here is one Triton kernel; everywhere
else, and under `torch.compile` (which fuses them by itself), it is a few PyTorch operations.

Dimensions: N out_features, K in_features; R, C rows and columns of the block grid; r, c rows and
columns of a block. The last block row and column are smaller where N or K is no multiple.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from torchao_superblock.ops.backends import backend_of
from torchao_superblock.ops.block_mask import guards as mask_guards
from torchao_superblock.ops.block_mask.guards import Guards

BROKEN = 2
"""`live` of a mask whose state was averaged beyond repair."""

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Whoever imports this may be in inference mode, or have another default device. Never written.
with torch.inference_mode(False), torch.device("cpu"):
    _LIVE = {flag: torch.tensor(flag, dtype=torch.uint8) for flag in (0, 1)}
_unsafe_view = torch.ops.aten._unsafe_view.default
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack


def block_grid(shape: tuple[int, int], blocksize: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the block grid: `(ceil(N / r), ceil(K / c))`."""
    return -(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1])


def is_transformed() -> bool:
    """Whether a transform of torch.func may be at work: one tensor may stand for several then.

    True while compiling, where it cannot be told and costs nothing.
    """
    return torch.compiler.is_compiling() or _functorch_interpreter() is not None


def block_mask(
    scores: Tensor,
    n_kept: Tensor,
    held_mask: Tensor,
    frozen: Tensor,
    guards: Guards | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the `n_kept` blocks with the highest scores; on equal scores the earlier block.

    The number of kept blocks is exact whatever the ties. NaN ranks below every number, so that one
    broken score cannot displace a sound one. Nothing is read back to the host.

    Args:
        scores: float32 `(R, C)`.
        n_kept: int64, 0-dim, on the same device.
        held_mask: bool or int8 `(R, C)`, the mask returned while frozen.
        frozen: bool or int8, 0-dim.
        guards: of the three; what an average did to them is undone, or the mask is broken.

    Returns:
        The bool mask `(R, C)`, True = kept, and `live`, uint8, 0-dim: 1 where the mask follows the
        scores, 0 while frozen, :data:`BROKEN` (then no block is kept). The mask is a new tensor, and
        `live` is not to be written: a later write to the arguments does not reach them.
    """
    kernels = _kernels_for(scores, n_kept, held_mask, frozen, *(guards or ()))
    if kernels is not None:
        is_sorted = scores.numel() > kernels.MAX_PAIRWISE_BLOCKS
        ranked = _ranking(scores) if is_sorted else scores
        return kernels.block_mask(ranked, n_kept, held_mask, frozen, guards, is_sorted)
    known = None
    if not is_transformed() and scores.is_cpu and type(scores) in _PLAIN_TENSORS:
        known = mask_guards.read_sound(n_kept, held_mask, frozen, guards)
    if known is not None:
        return _known_block_mask(scores, held_mask, *known)
    sound = None
    if guards is not None:
        n_kept, held_mask, frozen, sound = mask_guards.settle(n_kept, held_mask, frozen, guards)
    ahead = torch.arange(scores.numel(), device=scores.device) < n_kept
    mask = torch.zeros_like(ahead).scatter(0, _ranking(scores), ahead).view(scores.shape)
    mask = torch.where(frozen.bool(), held_mask.bool(), mask)
    live = frozen.logical_not().to(torch.uint8)
    return mask, live if sound is None else torch.where(sound, live, BROKEN)


def _known_block_mask(
    scores: Tensor, held_mask: Tensor, n_kept: int, frozen: int
) -> tuple[Tensor, Tensor]:
    """The same where the host knows the level and whether the mask is held: a held one is no longer ranked."""
    if frozen:
        return held_mask.to(torch.bool, copy=True), _LIVE[0]
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask.index_fill_(0, _ranking(scores)[: max(n_kept, 0)], True)
    return mask.view(scores.shape), _LIVE[1]


def _known_live(live: Tensor) -> int | None:
    """Its value; None where the host does not know it."""
    if torch.compiler.is_compiling():
        return None
    for flag, constant in _LIVE.items():
        if live is constant:
            return flag
    values = mask_guards.read(live)
    return None if values is None else values[0]


def _ranking(scores: Tensor) -> Tensor:
    """Blocks by descending score."""
    # Sorting the negated scores upwards is what puts NaN last; stable is what breaks ties by index.
    return scores.detach().reshape(-1).neg().argsort(stable=True)


def mask_weight(
    weight: Tensor, mask: Tensor, blocksize: tuple[int, int], live: Tensor | None = None
) -> Tensor:
    """The weight with pruned blocks at zero.

    Floating factors are rounded to the weight's dtype first. Pruned blocks must be finite: outside
    the Triton kernels this is a product (four times as fast as a selection on a CPU), which makes
    NaN of infinity and NaN.

    Args:
        weight: `(N, K)`, floating.
        mask: `(R, C)`, bool, or floating factors.
        blocksize: `(r, c)`.
        live: as :func:`block_mask` returns it; where it is :data:`BROKEN`, every element is NaN.

    Returns:
        A new `(N, K)` tensor of the weight's dtype.
    """
    kernels = _kernels_for(weight, mask, *(() if live is None else (live,)))
    if kernels is not None and kernels.can_mask_weight(weight, mask):
        return kernels.mask_weight(weight, mask, blocksize, live)
    if live is not None and _known_live(live) not in (0, 1):
        factors = mask.to(weight.dtype)
        mask = torch.where(live == BROKEN, torch.full_like(factors, float("nan")), factors)
    if is_whole(weight.shape, blocksize):
        return _mask_blocks(weight, mask, blocksize)
    parts = []
    for rows, cols, block_rows, block_cols, block in regions(weight.shape, blocksize):
        part = _mask_blocks(weight[rows, cols], mask[block_rows, block_cols], block)
        parts.append((rows.start, part))
    return _put_together(parts)


def mask_weight_backward(
    grad: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    live: Tensor,
    blocksize: tuple[int, int],
    need_grad_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`mask_weight`, straight through the mask for the scores.

        grad_weight = grad * mask
        grad_scores[R, C] = sum over the block of grad * weight, or 0 while frozen

    Args:
        grad: `(N, K)`, the gradient of the masked weight.
        weight: `(N, K)`, the weight that was masked; None if no gradient of the scores is needed.
        mask: `(R, C)`, bool, or floating factors.
        live: bool or uint8, 0-dim: 0 makes the gradient of the scores zero.
        blocksize: `(r, c)`.
        need_grad_weight: whether to compute the gradient of the weight.

    Returns:
        `(grad_weight, grad_scores)`: of the weight's dtype and float32 (float64 for float64).
    """
    kernels = _kernels_for(grad, mask, live, *(() if weight is None else (weight,)))
    if (
        kernels is not None
        and not torch.is_grad_enabled()  # a kernel cannot be differentiated a second time
        and kernels.can_mask_weight_backward(grad, weight, mask, blocksize)
    ):
        return kernels.mask_weight_backward(grad, weight, mask, live, blocksize, need_grad_weight)
    grad_weight = mask_weight(grad, mask, blocksize) if need_grad_weight else None
    grad_scores = None
    if weight is not None:
        known = _known_live(live)
        if known == 0:  # a frozen mask on a CPU
            dtype = _sum_dtype(grad, weight)
            grad_scores = torch.zeros(mask.shape, dtype=dtype, device=grad.device)
        else:
            grad_scores = block_sum(grad, weight, blocksize)
            if known is None:
                zeros = torch.zeros_like(grad_scores)
                grad_scores = torch.where(live != 0, grad_scores, zeros)
    return grad_weight, grad_scores


def block_sum(a: Tensor, b: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Sum of `a * b` over each block.

    Args:
        a: `(N, K)`.
        b: `(N, K)`.
        blocksize: `(r, c)`.

    Returns:
        `(R, C)`, float64 for float64 arguments and float32 otherwise: a block of bfloat16 products
        summed in bfloat16 would lose most of its digits.
    """
    dtype = _sum_dtype(a, b)
    if is_whole(a.shape, blocksize):
        return _sum_blocks(a, b, blocksize, dtype)
    parts = []
    for rows, cols, _, _, block in regions(a.shape, blocksize):
        parts.append((rows.start, _sum_blocks(a[rows, cols], b[rows, cols], block, dtype)))
    return _put_together(parts)


def block_norm(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Euclidean norm of each block, `(R, C)`.

    Computed in float64 where the device has it, so that blocks are told apart as far as float32
    scores can tell them apart, whatever the weight's dtype.
    """
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    weight = weight.to(dtype)
    return block_sum(weight, weight, blocksize).sqrt()


def nonzero_blocks(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Bool `(R, C)`: which blocks of a `(N, K)` weight hold anything but zeros, smaller ones at the edges too."""
    (r, c), (n, k) = blocksize, weight.shape
    padded = torch.nn.functional.pad(weight.detach() != 0, (0, -k % c, 0, -n % r))
    return _as_blocks(padded, blocksize).any(dim=3).any(dim=1)


def scale_blocks_(weight: Tensor, factors: Tensor, blocksize: tuple[int, int]) -> None:
    """Multiplies each block of a weight in place; a factor of 0 writes 0.0 (a product leaves -0.0).

    Args:
        weight: `(N, K)`, floating, any strides.
        factors: `(R, C)`; bool ones only clear, floating ones are applied in the weight's dtype.
        blocksize: `(r, c)`.
    """
    cleared = factors.logical_not()
    for rows, cols, block_rows, block_cols, block in regions(weight.shape, blocksize):
        blocks = _as_blocks(weight[rows, cols], block)
        if factors.dtype != torch.bool:
            blocks.mul_(factors[block_rows, block_cols].to(weight.dtype)[:, None, :, None])
        blocks.masked_fill_(cleared[block_rows, block_cols][:, None, :, None], 0.0)


def is_whole(shape: tuple[int, ...], blocksize: tuple[int, int]) -> bool:
    """Whether the shape is a multiple of the block size."""
    return shape[0] % blocksize[0] == 0 and shape[1] % blocksize[1] == 0


def regions(
    shape: tuple[int, ...], blocksize: tuple[int, int]
) -> Iterator[tuple[slice, slice, slice, slice, tuple[int, int]]]:
    """Cuts a weight into at most four parts whose blocks all have one size.

    Yields:
        Rows and columns of the part in the weight, rows and columns of its blocks in the grid, and
        the size of its blocks.
    """
    for rows, block_rows, r in _spans(shape[0], blocksize[0]):
        for cols, block_cols, c in _spans(shape[1], blocksize[1]):
            yield rows, cols, block_rows, block_cols, (r, c)


def _put_together(parts: list[tuple[int, Tensor]]) -> Tensor:
    """One matrix of its parts, each with the row where it begins; without a write, for `vmap`'s sake."""
    rows: dict[int, list[Tensor]] = {}
    for start, part in parts:
        rows.setdefault(start, []).append(part)
    return torch.cat([torch.cat(row, dim=1) for row in rows.values()])


def _spans(length: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    count, rest = divmod(length, size)
    if count:
        yield slice(0, count * size), slice(0, count), size
    if rest:
        yield slice(count * size, length), slice(count, count + 1), rest


def _as_blocks(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """`(N, K)` -> `(R, r, C, c)`, a view whatever the strides."""
    (r, c), (n, k) = blocksize, weight.shape
    return weight.view(n // r, r, k // c, c)


def _spread(mask: Tensor) -> Tensor:
    """`(R, C)` -> `(R, 1, C, 1)`, a view."""
    R, C = mask.shape
    return mask.view(R, 1, C, 1)


def _mask_blocks(weight: Tensor, mask: Tensor, blocksize: tuple[int, int]) -> Tensor:
    blocks = _as_blocks(weight, blocksize) * _spread(mask.to(weight.dtype))
    if not blocks.is_contiguous():
        return blocks.reshape(weight.shape)
    # Nobody has the blocks but this function: the result is a tensor of its own, no view of them, so
    # that autograd lets it be written and its own views keep it alive.
    return _unsafe_view(blocks, weight.shape)


def _sum_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _sum_blocks(a: Tensor, b: Tensor, blocksize: tuple[int, int], dtype: torch.dtype) -> Tensor:
    products = _as_blocks(a, blocksize).to(dtype) * _as_blocks(b, blocksize).to(dtype)
    # One dimension at a time: contiguous runs first is faster on CPUs than both at once.
    return products.sum(dim=3).sum(dim=1)


def _kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The device's kernels of masks, where these tensors can be given to them, else None."""
    if torch.compiler.is_compiling():
        return None
    backend = backend_of(tensors[0].device.type)
    if backend is None or backend.mask_source is None:
        return None
    if any(type(tensor) not in _PLAIN_TENSORS for tensor in tensors) or _functorch_interpreter():
        return None  # inside torch.func's transforms there is no memory to give to a kernel
    return backend.mask_kernels
