"""The plan: everything a kernel wants to know about the indices, worked out once.

A BSR index answers "which blocks are in this block row". The forward also wants to start with the longest rows
and to work on rows together that need the same columns of x, and the backward asks the transposed question, "which
blocks are in this block column". The answers depend on the indices alone, so they are computed once, packed in one
int32 tensor, and passed to the op beside the indices.

Legend: R block rows, C block columns, nnz stored blocks.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Views of a packed plan, in the order in which they are stored.

    Attributes:
        row_order: `(R,)` block rows, those with most blocks first (stable).
        col_order: `(C,)` block columns, those with most blocks first (stable).
        row_indices: `(nnz,)` block row of each stored block.
        crow_t: `(C + 1,)` for each block column, where its blocks start in `row_t` and `perm_t`.
        row_t: `(nnz,)` block row of each stored block, block column after block column.
        perm_t: `(nnz,)` position in `values` of each stored block, block column after block column.
        row_groups: `(R,)` block rows, strip after strip of STRIP outputs, each STRIPS_PER_GROUP consecutive strips
            chosen to share slices of x, groups that need most first; in the natural order if the plan was built without
            groups. The block rows of a strip are neighbours, or (:func:`is_mixed`) chosen to share columns.
    """

    row_order: Tensor
    col_order: Tensor
    row_indices: Tensor
    crow_t: Tensor
    row_t: Tensor
    perm_t: Tensor
    row_groups: Tensor


# What shares a slice of x where a kernel can make use of that (cuda/hopper.py): so many strips of so many outputs. A
# slice is as wide as a strip is high.
STRIPS_PER_GROUP = 3
STRIP = 64
# So many inputs a block row of 32 outputs needs on average before any two of them make a strip.
_MIXED_INPUTS = 128
# What a block column that a strip needs costs, compared with a slice that a group needs: a product and its blocks,
# compared with a copy of the slice.
_COLUMN_COST = 0.25
# Exchanges that improve the groups: so many at most, of two of so many strips or block rows. All pairs are looked at.
_EXCHANGES = 48
_EXCHANGED = 1024


class _Level(NamedTuple):
    """What strips, or block rows, may need together.

    Attributes:
        needs: one row for each of them, with ones for what it needs.
        size: how many of them share that, one after the other in their order.
        cost: of one need.
    """

    needs: Tensor
    size: int
    cost: float


def plan_length(n_block_rows: int, n_block_cols: int, nnz: int) -> int:
    """Number of int32 entries of a plan; a mixed one (:func:`is_mixed`) has one more.

    Args:
        n_block_rows: R.
        n_block_cols: C.
        nnz: number of stored blocks.
    """
    return 2 * n_block_rows + 2 * n_block_cols + 1 + 3 * nnz


def plan_fits(length: int, n_block_rows: int, n_block_cols: int, nnz: int) -> bool:
    """Whether a plan of `length` entries can be one of such an index.

    Args:
        length: number of int32 entries of the plan.
        n_block_rows: R.
        n_block_cols: C.
        nnz: number of stored blocks.
    """
    return length - plan_length(n_block_rows, n_block_cols, nnz) in (0, 1)


def is_mixed(plan: Tensor, n_block_rows: int, n_block_cols: int, nnz: int) -> bool:
    """Whether any two block rows may make a strip in a plan, rather than neighbours.

    A kernel must know it, and it is known without asking the device: by an entry more at the end.

    Args:
        plan: int32, from :func:`build_plan`.
        n_block_rows: R.
        n_block_cols: C.
        nnz: number of stored blocks.
    """
    return plan.shape[0] > plan_length(n_block_rows, n_block_cols, nnz)


def _mixes_rows(n_block_rows: int, nnz: int, blocksize: tuple[int, int]) -> bool:
    """Whether a strip may be made of block rows that are no neighbours.

    They then need fewer slices and columns (a tenth of the time of 14336 x 4096, 90 % pruned), but y is written in
    pieces of a block's height. Of 32 outputs these cost more than that saves where a block row has few blocks
    (3072 x 768, 90 %: 138 us became 147), and of 16 outputs always.
    """
    r, c = blocksize
    return 2 * r == STRIP and nnz * c >= _MIXED_INPUTS * n_block_rows


def _group_rows(
    row_indices: Tensor,
    col_indices: Tensor,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    mixed: bool,
) -> Tensor:
    """Put strips together that need the same slices of STRIP inputs, and in strips block rows of the same columns.

    The best of three orders, improved: the natural one, and greedy ones of strips and, if any two block rows may make a
    strip, of block rows. Up to _EXCHANGES times two change places where that makes groups smaller or more
    alike. Groups that need most come first. For random masks, 90 % pruned, a group then needs 13.5 slices instead of
    17.5 (224 x 64 blocks of 64 x 64), or 34 instead of 45, and its strips 22.6 columns instead of 24.4 (448 x 128
    blocks of 32 x 32, of which any two make a strip).
    """
    n_rows, n_cols = shape
    stack, width = (max(1, STRIP // side) for side in blocksize)
    device = row_indices.device
    n_slices = -(-n_cols // width)
    blocks = torch.zeros(n_rows, n_slices * width, device=device, dtype=torch.float32)
    # Clamped: a bad index may give a bad order, but no assertion on the device.
    blocks[row_indices.clamp(0, n_rows - 1), col_indices.clamp(0, n_cols - 1)] = 1
    slices = blocks.view(n_rows, n_slices, width).amax(2)
    of_strips = [_Level(slices.view(-1, stack, n_slices).amax(1), STRIPS_PER_GROUP, 1)]
    inside = torch.arange(stack, device=device)
    if mixed:
        levels = [_Level(slices, STRIPS_PER_GROUP * stack, 1), _Level(blocks, stack, _COLUMN_COST)]
        of_rows = (_greedy(of_strips)[:, None] * stack + inside).flatten()
        starts = [torch.arange(n_rows, device=device), of_rows, _greedy(levels)]
        height = 1  # block rows that stay together
    else:
        levels, height = of_strips, stack
        starts = [torch.arange(n_rows // stack, device=device), _greedy(of_strips)]
    groups = starts[0]
    for start in starts[1:]:
        groups = torch.where(_cost(levels, start) < _cost(levels, groups), start, groups)
    if groups.numel() <= _EXCHANGED:
        groups = _exchange(levels, groups)
    # A last one that is not full stays the last.
    size = levels[0].size
    full = groups[: groups.numel() // size * size].view(-1, size)
    n_needed = levels[0].needs[full].amax(1).sum(1)
    longest_first = full[torch.argsort(n_needed, descending=True, stable=True)].flatten()
    groups = torch.cat([longest_first, groups[full.numel() :]])
    return (groups[:, None] * height + inside[:height]).flatten()


def _cost(levels: list[_Level], order: Tensor) -> Tensor:
    """The sums of squares of what is needed together.

    Squares, because slices cost time, and so do groups that need more than others.
    """
    cost = torch.zeros((), device=order.device, dtype=torch.float32)
    for level in levels:
        needed = level.needs[order]
        padded = torch.nn.functional.pad(needed, (0, 0, 0, -len(needed) % level.size))
        together = padded.view(-1, level.size, needed.shape[1]).amax(1)
        cost = cost + level.cost * together.sum(1).square().sum()
    return cost


def _greedy(levels: list[_Level]) -> Tensor:
    """An order that fills one group after the other.

    A group starts with the one that needs most of those left and takes, one after the other, the one that adds least to
    what is needed together, of equals the one that needs most.
    """
    needs = levels[-1].needs
    tie = needs.sum(1) / (4 * needs.shape[1])
    taken = torch.zeros_like(tie)  # infinity for one that has its place
    shared = [torch.zeros_like(level.needs[0]) for level in levels]
    order = []
    for place in range(len(needs)):
        score = taken - tie
        for number, level in enumerate(levels):
            if place % level.size == 0:
                shared[number] = torch.zeros_like(shared[number])
            else:
                score = score + level.cost * (level.needs @ (1 - shared[number]))
        # One element, not none: indexing with a number would ask the device for it.
        chosen = torch.argmin(score, dim=0, keepdim=True)
        order.append(chosen)
        taken.index_fill_(0, chosen, torch.inf)
        for number, level in enumerate(levels):
            shared[number] = torch.maximum(shared[number], level.needs.index_select(0, chosen)[0])
    return torch.cat(order)


def _exchange(levels: list[_Level], order: Tensor) -> Tensor:
    """`order` after exchanges of two, each the one that lowers its cost most."""
    n = order.numel()
    place = torch.arange(n, device=order.device)
    for _ in range(min(_EXCHANGES, n)):
        # Of the cost, where i and j change places.
        rise = torch.zeros(n, n, device=order.device, dtype=torch.float32)
        for level in levels:
            needed = level.needs[order]
            group = place // level.size
            together = (group[:, None] == group).to(needed.dtype)
            others = (together @ needed - needed).clamp(max=1)  # what the others of its group need
            cost = (others.sum(1, keepdim=True) + needed.sum(1) - others @ needed.T).square()
            # Of what i's group costs, with j in place of i.
            change = level.cost * (cost - cost.diagonal()[:, None])
            rise += (change + change.T) * (1 - together)
        # Without asking the device which it is, so one element instead of a number.
        best = torch.argmin(rise.flatten(), dim=0, keepdim=True)
        i, j = best // n, best % n
        # Where nothing is gained, one changes places with itself.
        j = torch.where(rise.flatten()[best] < 0, j, i)
        source = torch.where(place == j, i, place)
        order = order[torch.where(place == i, j, source)]
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
        crow_indices: `(R + 1,)` int32.
        col_indices: `(nnz,)` int32.
        n_block_cols: C, the number of block columns.
        blocksize: `(r, c)` of the blocks that the index is of, to work out as well which block rows a kernel had
            better take together, where that is of use: a few small operations for each strip of STRIP outputs or each
            block row of 32, and, where these are at most 1024, up to 48 times a comparison of all of them with each
            other (20 ms on a CPU for 3072 x 768, 0.15 s for 14336 x 4096, about a second at most). None leaves it out.

    Returns:
        int32 tensor of `plan_length(R, C, nnz)` entries, or one more; see :class:`Plan` for its parts.

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
        mixed = _mixes_rows(n_block_rows, nnz, blocksize)
        shape = (n_block_rows, n_block_cols)
        row_groups = _group_rows(row_indices, col_indices, shape, blocksize, mixed)
        if mixed:
            row_groups = torch.nn.functional.pad(row_groups, (0, 1))
    parts = (row_order, col_order, row_indices, crow_t, row_t, perm_t, row_groups)
    plan = torch.cat([part.to(torch.int32) for part in parts])
    assert plan_fits(plan.numel(), n_block_rows, n_block_cols, nnz)
    return plan


def split_plan(plan: Tensor, n_block_rows: int, n_block_cols: int, nnz: int) -> Plan:
    """Name the parts of a packed plan.

    Args:
        plan: int32, from :func:`build_plan`.
        n_block_rows: R.
        n_block_cols: C.
        nnz: number of stored blocks.

    Returns:
        A :class:`Plan` of views of `plan`; nothing is copied.
    """
    sizes = [n_block_rows, n_block_cols, nnz, n_block_cols + 1, nnz, nnz, n_block_rows]
    if is_mixed(plan, n_block_rows, n_block_cols, nnz):
        sizes.append(1)
    return Plan(*plan.split(sizes)[: len(Plan._fields)])


# By the plan's identity: who it is, where it lies, what it was taken for, and its parts.
_plans: dict[int, tuple[weakref.ref, int, tuple[int, int, int], Plan]] = {}


def parts_of(plan: Tensor, n_block_rows: int, n_block_cols: int, nnz: int) -> Plan:
    """As :func:`split_plan`, kept as long as the plan lives: views take 10 us to make.

    Args:
        plan: as there, as are the others. What is written into it is seen in its parts.
    """
    key, sizes = id(plan), (n_block_rows, n_block_cols, nnz)
    known = _plans.get(key)
    if (
        known is not None
        and known[0]() is plan
        and known[1] == plan.data_ptr()
        and known[2] == sizes
    ):
        return known[3]
    # Detached: a view would keep the very tensor alive whose end is waited for.
    parts = split_plan(plan.detach(), *sizes)
    gone = weakref.ref(plan, lambda _: _plans.pop(key, None))
    _plans[key] = (gone, plan.data_ptr(), sizes, parts)
    return parts
