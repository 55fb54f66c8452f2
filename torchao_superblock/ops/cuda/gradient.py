"""The gradient of the values in plain Triton: the stored blocks of grad.T @ x, a block or a line of them at a time.

Where stored blocks are many or tiny, a dense product and a gather beat both. Also here: what proves that the plan a
gradient was computed with is of its index.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM tokens a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.launch import Kernel, known_divisor
from torchao_superblock.ops.cuda.matmul import extent, multiple, sum_of_splits
from torchao_superblock.ops.cuda.problem import Problem
from torchao_superblock.ops.cuda.tf32 import add_low, three_products
from torchao_superblock.ops.plan import Plan

# A compiled kernel serves every value of these, and parts of a plan that start anywhere.
_NUMBERS = (
    *("M", "n_block_rows", "n_block_cols", "n_lines", "n_others", "nnz", "tokens_per_split"),
    *("height", "width"),
)
_INDICES = (
    *("start_ptr", "block_ptr", "perm_ptr", "order_ptr"),
    *("row_ptr", "crow_ptr", "col_ptr"),
)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def grad_values_kernel(
    grad_ptr,  # (M, R * r - R_PADDING), any strides
    x_ptr,  # (M, C * c - C_PADDING), any strides
    row_ptr,  # (nnz,) block row of each stored block
    col_ptr,  # (nnz,) block column
    out_ptr,  # (nnz, r, c), or with SPLIT_M a float workspace (splits, nnz, r, c)
    M,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    n_block_rows,
    n_block_cols,
    nnz,
    tokens_per_split,  # a multiple of BM
    r: tl.constexpr,
    c: tl.constexpr,
    R_PADDING: tl.constexpr,
    C_PADDING: tl.constexpr,
    GRAD_DIVISOR: tl.constexpr,  # known_divisor of grad_stride_m, and of x_stride_m
    X_DIVISOR: tl.constexpr,
    SPLIT_M: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT64: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The stored blocks of grad.T @ x: one program per block (or tile of one) and range of tokens.

    Bound by L2 reads: each block reads its r columns of grad and its c columns of x. Programs that run together work on
    the same range of tokens, so device memory is read about once.
    """
    R_TILES: tl.constexpr = (r + BR - 1) // BR
    C_TILES: tl.constexpr = (c + BC - 1) // BC
    TILES: tl.constexpr = R_TILES * C_TILES
    acc_dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    index_dtype: tl.constexpr = tl.int64 if INT64 else tl.int32
    grad_stride_m = multiple(grad_stride_m, GRAD_DIVISOR)
    x_stride_m = multiple(x_stride_m, X_DIVISOR)

    pid = tl.program_id(0)
    n_tiles = nnz * TILES
    split = pid // n_tiles
    tile = pid % n_tiles
    block = tile // TILES
    row = tl.minimum(tl.maximum(tl.load(row_ptr + block), 0), n_block_rows - 1)
    column = tl.minimum(tl.maximum(tl.load(col_ptr + block), 0), n_block_cols - 1)
    i = ((tile % TILES) // C_TILES) * BR + tl.arange(0, BR)
    k = (tile % C_TILES) * BC + tl.arange(0, BC)
    i_in = i.to(index_dtype)
    if r % BR != 0:
        i_in = tl.minimum(i, r - 1).to(index_dtype)
    k_in = k.to(index_dtype)
    if c % BC != 0:
        k_in = tl.minimum(k, c - 1).to(index_dtype)
    m = tl.arange(0, BM).to(index_dtype)

    m0 = split.to(tl.int64) * tokens_per_split
    m_end = tl.minimum(m0 + tokens_per_split, M)
    grad_tile = (
        grad_ptr
        + row.to(tl.int64) * r * grad_stride_n
        + m0 * grad_stride_m
        + (i_in * grad_stride_n)[None, :]
        + (m * grad_stride_m)[:, None]
    )
    x_tile = (
        x_ptr
        + column.to(tl.int64) * c * x_stride_k
        + m0 * x_stride_m
        + (k_in * x_stride_k)[None, :]
        + (m * x_stride_m)[:, None]
    )
    acc = tl.zeros((BR, BC), acc_dtype)
    if PRECISION == 2:
        acc_low = tl.zeros((BR, BC), tl.float32)
    left = (m_end - m0).to(tl.int32)
    for done in range(0, left, BM):
        inside = (m < left - done)[:, None]
        grad_inside = inside
        if R_PADDING > 0:
            grad_inside &= (i < extent(row, n_block_rows - 1, r, R_PADDING))[None, :]
        x_inside = inside
        if C_PADDING > 0:
            x_inside &= (k < extent(column, n_block_cols - 1, c, C_PADDING))[None, :]
        grad = tl.load(grad_tile, mask=grad_inside, other=0.0)
        x = tl.load(x_tile, mask=x_inside, other=0.0)
        grad_tile += tl.cast(BM, tl.int64) * grad_stride_m
        x_tile += tl.cast(BM, tl.int64) * x_stride_m
        grad_t = tl.trans(grad)
        if PRECISION == 2:
            acc, acc_low = three_products(grad_t, x, x, acc, acc_low, False)
        elif PRECISION == 1:
            acc = tl.dot(grad_t, x, acc, input_precision="tf32")
        else:
            acc = tl.dot(grad_t, x, acc, input_precision="ieee", out_dtype=acc_dtype)
    if PRECISION == 2:
        acc = add_low(acc, acc_low)
    out = out_ptr + block.to(tl.int64) * (r * c)
    if SPLIT_M:
        out += split.to(tl.int64) * nnz * (r * c)
    stored = (i[:, None] < r) & (k[None, :] < c)
    tl.store(out + (i * c)[:, None] + k[None, :], acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def grad_values_lines_kernel(
    fixed_ptr,  # (M, n_lines * f - F_PADDING), any strides: grad, or x with the transposed index
    gathered_ptr,  # (M, n_others * g - G_PADDING), any strides: x, or grad with the transposed index
    start_ptr,  # (n_lines + 1,) where the blocks of each line start in block_ptr
    block_ptr,  # (nnz,) where each block lies along its line
    perm_ptr,  # (nnz,) where in the output that block is stored, if HAS_PERM
    order_ptr,  # (n_lines,) lines in the order in which they are worked on
    out_ptr,  # (nnz, r, c), or with SPLIT_M a float workspace (splits, nnz, r, c)
    M,
    fixed_stride_m,
    fixed_stride_n,
    gathered_stride_m,
    gathered_stride_n,
    n_lines,
    n_others,
    nnz,
    tokens_per_split,  # a multiple of BM
    f: tl.constexpr,  # columns of fixed that a block spans: r, or c with the transposed index
    g: tl.constexpr,  # columns of gathered that it spans: the other one
    F_PADDING: tl.constexpr,
    G_PADDING: tl.constexpr,
    FIXED_DIVISOR: tl.constexpr,  # known_divisor of fixed_stride_m, and of gathered_stride_m
    GATHERED_DIVISOR: tl.constexpr,
    STRIDE_F: tl.constexpr,  # strides inside a stored block: (c, 1), or (1, c) with the transposed index
    STRIDE_G: tl.constexpr,
    HAS_PERM: tl.constexpr,
    SPLIT_M: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BG: tl.constexpr,
):
    """The stored blocks of grad.T @ x for small blocks of 16-bit numbers, several blocks of a line at a time.

    A line is a block row, or a block column with the transposed index: its blocks share their columns of one operand.
    Those are loaded once for BG // g blocks, whose columns of the other operand lie side by side in one wide tile; a
    block of its own would read both, and feed the tensor cores scraps. Bound by L2 reads of the gathered operand,
    about nnz * M * g elements.
    """
    BLOCKS: tl.constexpr = BG // g
    RUN: tl.constexpr = g & -g  # gathered columns come in aligned runs of this many, at least
    index_dtype: tl.constexpr = tl.int64 if INT64 else tl.int32
    fixed_stride_m = multiple(fixed_stride_m, FIXED_DIVISOR)
    gathered_stride_m = multiple(gathered_stride_m, GATHERED_DIVISOR)

    pid = tl.program_id(0)
    split = pid // n_lines
    # Clamped, here and below: a bad index may give wrong numbers, never a wild access.
    line = tl.minimum(tl.maximum(tl.load(order_ptr + pid % n_lines), 0), n_lines - 1)
    begin = tl.minimum(tl.maximum(tl.load(start_ptr + line), 0), nnz)
    end = tl.minimum(tl.maximum(tl.load(start_ptr + line + 1), begin), nnz)

    m0 = split.to(tl.int64) * tokens_per_split
    left = (tl.minimum(m0 + tokens_per_split, M) - m0).to(tl.int32)
    m = tl.arange(0, BM).to(index_dtype)
    i = tl.arange(0, BF)
    i_in = i.to(index_dtype)
    if f % BF != 0:
        i_in = tl.minimum(i, f - 1).to(index_dtype)
    k = tl.arange(0, BG)
    fixed_base = (
        fixed_ptr
        + line.to(tl.int64) * f * fixed_stride_n
        + m0 * fixed_stride_m
        + (i_in * fixed_stride_n)[None, :]
        + (m * fixed_stride_m)[:, None]
    )
    gathered_base = gathered_ptr + m0 * gathered_stride_m + (m * gathered_stride_m)[:, None]
    out = out_ptr
    if SPLIT_M:
        out += split.to(tl.int64) * nnz * (f * g)

    for first in range(begin, end, BLOCKS):
        j = first + k // g
        present = (j < end) & (k < BLOCKS * g)
        other = tl.load(block_ptr + j, mask=present, other=0)
        other = tl.minimum(tl.maximum(other, 0), n_others - 1)
        columns = other.to(index_dtype) * g + k % g
        columns = tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)
        fixed_tile = fixed_base
        gathered_tile = gathered_base + (columns * gathered_stride_n)[None, :]
        there = present
        if G_PADDING > 0:
            there &= columns < n_others * g - G_PADDING
        acc = tl.zeros((BG, BF), tl.float32)
        for done in range(0, left, BM):
            inside = (m < left - done)[:, None]
            fixed_inside = inside
            if F_PADDING > 0:
                fixed_inside &= (i < extent(line, n_lines - 1, f, F_PADDING))[None, :]
            fixed = tl.load(fixed_tile, mask=fixed_inside, other=0.0)
            gathered = tl.load(gathered_tile, mask=inside & there[None, :], other=0.0)
            fixed_tile += tl.cast(BM, tl.int64) * fixed_stride_m
            gathered_tile += tl.cast(BM, tl.int64) * gathered_stride_m
            # The wide side first: that is the side tensor cores want long.
            acc = tl.dot(tl.trans(gathered), fixed, acc)
        place = j
        if HAS_PERM:
            place = tl.load(perm_ptr + j, mask=present, other=0)
            place = tl.minimum(tl.maximum(place, 0), nnz - 1)
        element = place.to(tl.int64) * (f * g) + (k % g) * STRIDE_G
        out_tile = out + element[:, None] + (i * STRIDE_F)[None, :]
        stored = present[:, None] & (i < f)[None, :]
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def check_plan_kernel(
    start_ptr,  # (n_lines + 1,) where the blocks of each line start: crow, or of the plan with TRANSPOSED
    row_ptr,  # (nnz,) block row of each block, of the plan; with TRANSPOSED line after line
    perm_ptr,  # (nnz,) position of each block, line after line, of the plan; if TRANSPOSED
    order_ptr,  # (n_lines,) lines, those with most blocks first, of the plan
    crow_ptr,  # (n_others + 1,) the index itself, if TRANSPOSED
    col_ptr,  # (nnz,)
    out_ptr,  # (height, width) what was computed with the plan
    n_lines,
    n_others,
    nnz,
    height,
    width,
    TRANSPOSED: tl.constexpr,  # lines are block columns, not block rows
    BLOCK: tl.constexpr,
):
    """Overwrites a gradient with NaN if the plan that it was computed with is not of its index.

    One program a line; what it takes is a few dependent reads of L2. Together they prove the plan: each block of a line
    lies in it, positions ascend, so that none is there twice, and the lines hold nnz blocks in all, so that none is
    missing. Lines strictly ordered by (blocks, number) are all different, so that each was worked on.
    """
    line = tl.program_id(0)
    begin = tl.load(start_ptr + line)
    end = tl.load(start_ptr + line + 1)
    fits = (begin >= 0) & (begin <= end) & (end <= nnz)
    if TRANSPOSED:
        fits &= (tl.load(start_ptr) == 0) & (tl.load(start_ptr + n_lines) == nnz)
    begin = tl.where(fits, begin, 0)
    end = tl.where(fits, end, 0)
    fits = fits.to(tl.int32)
    for first in range(begin, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < end
        row = tl.load(row_ptr + j, mask=inside, other=0)
        if TRANSPOSED:
            place = tl.load(perm_ptr + j, mask=inside, other=0)
            before = tl.load(perm_ptr + j - 1, mask=inside & (j > begin), other=-1)
            good = (place > before) & (place < nnz) & (row >= 0) & (row < n_others)
            looked_at = inside & good & (place >= 0)
            column = tl.load(col_ptr + place, mask=looked_at, other=-1)
            good &= column == line
            good &= tl.load(crow_ptr + row, mask=looked_at, other=nnz) <= place
            good &= tl.load(crow_ptr + row + 1, mask=looked_at, other=0) > place
        else:
            good = row == line
        fits = tl.minimum(fits, tl.min((good | (inside == 0)).to(tl.int32), axis=0))

    this = tl.load(order_ptr + line)
    following = tl.load(order_ptr + tl.minimum(line + 1, n_lines - 1))
    in_range = (this >= 0) & (this < n_lines) & (following >= 0) & (following < n_lines)
    this = tl.where(in_range, this, 0)
    following = tl.where(in_range, following, 0)
    blocks = tl.load(start_ptr + this + 1) - tl.load(start_ptr + this)
    fewer = tl.load(start_ptr + following + 1) - tl.load(start_ptr + following)
    in_order = (blocks > fewer) | ((blocks == fewer) & (this < following))
    fits = tl.minimum(fits, (in_range & (in_order | (line == n_lines - 1))).to(tl.int32))

    # No turn at all where it fits.
    row_of_out = out_ptr
    for _ in range(0, height * (1 - fits)):
        for k0 in range(0, width, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            nan = tl.full((BLOCK,), float("nan"), out_ptr.dtype.element_ty)
            tl.store(row_of_out + k, nan, mask=k < width)
        row_of_out += width


def _dense(problem: Problem) -> Callable[..., Tensor]:
    R, C, r, c = problem.R, problem.C, problem.r, problem.c
    padding = (0, problem.col_padding, 0, problem.row_padding)

    def run(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, parts: Plan) -> Tensor:
        product = grad.view(-1, problem.N).t() @ x.view(-1, problem.K)
        if any(padding):
            product = torch.nn.functional.pad(product, padding)
        blocks = product.view(R, r, C, c).transpose(1, 2)
        # Clamped, as the kernels do: a bad index gives wrong numbers, and no assertion on the device.
        rows, columns = parts.row_indices.clamp(0, R - 1), col.clamp(0, C - 1)
        return blocks[rows.long(), columns.long()].contiguous()

    return run


def prepare(
    problem: Problem, choice: Choice, kernel_type: type[Kernel] = Kernel
) -> Callable[..., Tensor]:
    """All of a gradient of the values but its tensors.

    Args:
        problem: of kind `"grad_values"`; what is prepared serves all numbers of tokens in its bucket.
        choice: of kernel `"blocks"`, `"lines"` or `"dense"`.
        kernel_type: launches it.

    Returns:
        A function of the gradient, x, crow, col and the parts of a plan, which returns `(nnz, r, c)`. The first two may
        have leading dimensions, where they lie in memory as the strides of the problem say.
    """
    if choice.kernel == "dense":
        return _dense(problem)
    tile: Any = choice.tile
    R, C, r, c, nnz, K, device = *problem[2:7], problem.K, problem.device
    by_lines, strides, sizes = choice.kernel == "lines", problem.strides, (R, C, nnz)
    padding = problem.row_padding, problem.col_padding
    transposed = by_lines and tile.transposed
    constants: dict[str, Any] = {"BM": tile.BM, "INT64": choice.int64}
    if by_lines:
        f, g = (c, r) if transposed else (r, c)
        if transposed:
            strides, sizes, padding = (*strides[2:], *strides[:2]), (C, R, nnz), padding[::-1]
        function, n_tiles = grad_values_lines_kernel, sizes[0]
        constants |= {
            "f": f,
            "g": g,
            "F_PADDING": padding[0],
            "G_PADDING": padding[1],
            "FIXED_DIVISOR": known_divisor(strides[0]),
            "GATHERED_DIVISOR": known_divisor(strides[2]),
            "STRIDE_F": 1 if transposed else c,
            "STRIDE_G": c if transposed else 1,
            "HAS_PERM": transposed,
            "BF": max(1 << (f - 1).bit_length(), 16),
            "BG": tile.BG,
        }
    else:
        function, n_tiles = grad_values_kernel, nnz * -(-r // tile.BR) * -(-c // tile.BC)
        constants |= {
            "r": r,
            "c": c,
            "R_PADDING": padding[0],
            "C_PADDING": padding[1],
            "GRAD_DIVISOR": known_divisor(strides[0]),
            "X_DIVISOR": known_divisor(strides[2]),
            "PRECISION": problem.precision,
            "FLOAT64": problem.dtype == torch.float64,
            "BR": tile.BR,
            "BC": tile.BC,
        }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    whole, split = (
        kernel_type(function, constants | {"SPLIT_M": split_m}, **options)
        for split_m in (False, True)
    )
    reduce = sum_of_splits(kernel_type)
    numel, empty = nnz * r * c, kernel_type.empty
    accumulator = torch.float64 if problem.dtype == torch.float64 else torch.float32

    def run(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, parts: Plan) -> Tensor:
        if transposed:
            tensors = (x, grad, parts.crow_t, parts.row_t, parts.perm_t, parts.col_order)
        elif by_lines:
            tensors = (grad, x, crow, col, col, parts.row_order)
        else:
            tensors = (grad, x, parts.row_indices, col)
        M = x.numel() // K
        # As many ranges of tokens as keep the processors busy, but at least 8 steps a program: below that, adding up
        # the parts costs more than the parallelism brings.
        splits = -(-tile.waves * device.processors // n_tiles)
        splits = max(1, min(splits, M // (8 * tile.BM)))
        tokens = -(-M // (splits * tile.BM)) * tile.BM
        splits = -(-M // tokens)
        out = target = empty((nnz, r, c), (r * c, c, 1), problem.dtype)
        if splits > 1:
            target = empty((splits, numel), (numel, 1), accumulator)
        kernel = whole if splits == 1 else split
        grid = (n_tiles * splits, 1, 1)
        kernel(grid, device.index, (*tensors, target), M, *strides, *sizes, tokens)
        if splits > 1:
            reduce((-(-numel // 256), 1, 1), device.index, (target, out, out), numel, 1, splits)
        return out

    return run


def prepare_check(
    problem: Problem, choice: Choice, kernel_type: type[Kernel] = Kernel
) -> Callable[..., Tensor]:
    """What makes a gradient NaN if its plan is not of its index.

    Nothing else can tell without waiting for the device: what a layer knows of its plan says nothing while compiling,
    under DistributedDataParallel's broadcasts and for inference tensors. The launch is the price, a few microseconds.

    Args:
        problem: of either gradient.
        choice: what computes it, and so which half of the plan it uses.
        kernel_type: launches it.

    Returns:
        A function of the gradient, crow, col and the parts of the plan, which returns the gradient.
    """
    by_columns = problem.kind == "grad_x" or (choice.kernel == "lines" and choice.tile.transposed)
    constants = {"TRANSPOSED": by_columns, "BLOCK": 128}
    kernel = kernel_type(check_plan_kernel, constants, num_warps=1, num_stages=1)
    device_index = problem.device.index

    def check(out: Tensor, crow: Tensor, col: Tensor, parts: Plan) -> Tensor:
        if by_columns:
            tensors = (parts.crow_t, parts.row_t, parts.perm_t, parts.col_order, crow, col, out)
        else:
            tensors = (crow, parts.row_indices, parts.row_indices, parts.row_order, crow, col, out)
        rows, columns = parts.row_order.shape[0], parts.col_order.shape[0]
        lines, others = (columns, rows) if by_columns else (rows, columns)
        height = out.shape[0]
        sizes = (lines, others, parts.row_indices.shape[0], height, out.numel() // height)
        kernel((lines, 1, 1), device_index, tensors, *sizes)
        return out

    return check
