"""The plan: everything a kernel wants to know about the indices, worked out once.

A BSR index answers "which blocks are in this block row". The forward also wants to start with the longest rows
and to work on rows together that need the same columns of x, and the backward asks the transposed question, "which
blocks are in this block column". The answers depend on the indices alone, so they are computed once, packed in one
int32 tensor, and passed to the op beside the indices.

Legend: R block rows, C block columns, nnz stored blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Views of a packed plan, in the order in which they are stored.

    Attributes:
        row_order: ``(R,)`` block rows, those with most blocks first (stable).
        col_order: ``(C,)`` block columns, those with most blocks first (stable).
        row_indices: ``(nnz,)`` block row of each stored block.
        crow_t: ``(C + 1,)`` for each block column, where its blocks start in ``row_t`` and ``perm_t``.
        row_t: ``(nnz,)`` block row of each stored block, block column after block column.
        perm_t: ``(nnz,)`` position in ``values`` of each stored block, block column after block column.
        row_groups: ``(R,)`` block rows, strip after strip of STRIP outputs, each GROUP consecutive strips chosen to
            share slices of x, groups that need most of them first; in the natural order if the plan was built without
            groups.
    """

    row_order: Tensor
    col_order: Tensor
    row_indices: Tensor
    crow_t: Tensor
    row_t: Tensor
    perm_t: Tensor
    row_groups: Tensor


# What shares a slice of x where a kernel can make use of that (hopper.py): so many strips of so many outputs. A slice
# is as wide as a strip is high.
GROUP = 3
STRIP = 64
# Swaps that improve the groups: so many at most, of so many strips at most (all pairs of them are looked at).
_SWAPS = 32
_SWAPPED_STRIPS = 1024


def plan_length(n_block_rows: int, n_block_cols: int, nnz: int) -> int:
    """Number of int32 entries of a plan."""
    return 2 * n_block_rows + 2 * n_block_cols + 1 + 3 * nnz


def _group_rows(
    row_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], blocksize: tuple[int, int]
) -> Tensor:
    """Put strips of STRIP outputs together that need the same slices of STRIP inputs.

    Greedily at first: a group starts with the strip that needs most of those left and takes, one after the other, the
    strip that adds the fewest slices to it, the one that needs most of equals. Then up to _SWAPS pairs of strips change
    places where that makes groups smaller or more alike. Groups that need most come first. For a random mask of
    224 x 64 blocks of 64 x 64, 90 % pruned, threes then need 13.4 slices instead of 17.2; for a mask with structure,
    less.
    """
    n_rows, n_cols = shape
    stack, width = (max(1, STRIP // side) for side in blocksize)
    n_strips, n_slices = n_rows // stack, -(-n_cols // width)
    device = row_indices.device
    needs = torch.zeros(n_strips, n_slices, device=device, dtype=torch.float32)
    # Clamped: a bad index may give a bad order, but no assertion on the device.
    rows, cols = row_indices.clamp(0, n_rows - 1), col_indices.clamp(0, n_cols - 1)
    needs[rows // stack, cols // width] = 1
    n_needed = needs.sum(1)
    taken = torch.zeros_like(n_needed)  # infinity for a strip that has its place
    order = []
    for place in range(n_strips):
        if place % GROUP == 0:
            score, slices = taken - n_needed, torch.zeros_like(needs[0])
        else:
            score = taken + (n_needed - needs @ slices) - n_needed / (4 * n_slices)
        # One element, not none: indexing with a number would ask the device for it.
        strip = torch.argmin(score, dim=0, keepdim=True)
        order.append(strip)
        taken.index_fill_(0, strip, torch.inf)
        slices = torch.maximum(slices, needs.index_select(0, strip)[0])
    groups = torch.cat(order)
    if n_strips <= _SWAPPED_STRIPS:
        groups = _swap_strips(needs, groups)
    # A last one that is not full stays the last.
    full = groups[: n_strips // GROUP * GROUP].view(-1, GROUP)
    n_needed = needs[full].amax(1).sum(1)
    longest_first = full[torch.argsort(n_needed, descending=True, stable=True)].flatten()
    groups = torch.cat([longest_first, groups[full.numel() :]])
    return (groups[:, None] * stack + torch.arange(stack, device=device)).flatten()


def _swap_strips(needs: Tensor, order: Tensor) -> Tensor:
    """``order`` after swaps of two strips, each the one that most lowers the sum of squares of what groups need.

    Squares, because slices cost time, and so do groups that need more than others.
    """
    n_strips = order.numel()
    place = torch.arange(n_strips, device=order.device)
    group = place // GROUP
    together = (group[:, None] == group).to(needs.dtype)
    for _ in range(min(_SWAPS, n_strips)):
        needed = needs[order]
        # What the other strips of a strip's group need, and what the group needs with strip j in place of strip i.
        others = (together @ needed - needed).clamp(max=1)
        cost = (others.sum(1, keepdim=True) + needed.sum(1) - others @ needed.T).square()
        now = cost.diagonal()
        gain = ((now[:, None] + now - cost - cost.T) * (1 - together)).flatten()
        # Without asking the device which it is; where nothing is gained, a strip changes places with itself.
        best = torch.argmax(gain, dim=0, keepdim=True)
        i = best // n_strips
        j = torch.where(gain[best] > 0, best % n_strips, i)
        order = order[torch.where(place == i, j, torch.where(place == j, i, place))]
    return order


def build_plan(
    crow_indices: Tensor,
    col_indices: Tensor,
    n_block_cols: int,
    blocksize: tuple[int, int] | None = None,
) -> Tensor:
    """Pack the plan of a BSR index into one int32 tensor.

    Runs on the device of the indices without a host synchronisation, so it may be called inside a CUDA graph capture.

    Args:
        crow_indices: ``(R + 1,)`` int32.
        col_indices: ``(nnz,)`` int32.
        n_block_cols: C, the number of block columns.
        blocksize: ``(r, c)`` of the blocks that the index is of, to work out as well which block rows a kernel had
            better take together, where that is of use: a few small operations for each strip of STRIP outputs, and
            up to 32 times a comparison of all strips with each other (3 ms on a CPU for 3072 x 768, 20 ms for 14336 x
            4096, up to a second for 65536 outputs). None leaves that out.

    Returns:
        int32 tensor of ``plan_length(R, C, nnz)`` entries; see :class:`Plan` for its parts.

    Example:
        >>> crow, col = torch.tensor([0, 1, 3]).int(), torch.tensor([1, 0, 1]).int()
        >>> split_plan(build_plan(crow, col, 2), 2, 2, 3).row_order.tolist()
        [1, 0]
    """
    n_block_rows, nnz = crow_indices.numel() - 1, col_indices.numel()
    device = crow_indices.device
    position = torch.arange(nnz, device=device, dtype=torch.int32)
    row_indices = torch.searchsorted(crow_indices, position, right=True, out_int32=True) - 1
    row_order = torch.argsort(crow_indices.diff(), descending=True, stable=True)
    col_sorted, perm_t = torch.sort(col_indices, stable=True)
    boundaries = torch.arange(n_block_cols + 1, device=device, dtype=torch.int32)
    crow_t = torch.searchsorted(col_sorted, boundaries, out_int32=True)
    col_order = torch.argsort(crow_t.diff(), descending=True, stable=True)
    row_t = row_indices[perm_t]
    row_groups = torch.arange(n_block_rows, device=device)
    # A taller block is several strips by itself, and they share all of their columns.
    if (
        blocksize is not None
        and n_block_rows > 0
        and n_block_cols > 0
        and STRIP % blocksize[0] == 0
        and n_block_rows * blocksize[0] % STRIP == 0
    ):
        row_groups = _group_rows(row_indices, col_indices, (n_block_rows, n_block_cols), blocksize)
    parts = (row_order, col_order, row_indices, crow_t, row_t, perm_t, row_groups)
    plan = torch.cat([part.to(torch.int32) for part in parts])
    assert plan.numel() == plan_length(n_block_rows, n_block_cols, nnz)
    return plan


def split_plan(plan: Tensor, n_block_rows: int, n_block_cols: int, nnz: int) -> Plan:
    """Name the parts of a packed plan (views, no copy)."""
    sizes = (n_block_rows, n_block_cols, nnz, n_block_cols + 1, nnz, nnz, n_block_rows)
    return Plan(*plan.split(sizes))
