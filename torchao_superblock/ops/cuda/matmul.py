"""The plain Triton product, forward or transposed: every case on every GPU that Triton supports.

Its kernels can be traced into an exported program, and run in Triton's interpreter, which is how they are tested on
machines without a GPU.

What limits it: an x tile that was loaded for one stored block feeds only `r` outputs, so the product re-reads x
from the L2 cache, about `nnz * M * c` elements in all. Everything here serves to keep those reads wide, in flight and
few: asynchronous copies several steps ahead, tall tiles of tokens (each re-reads `values` once), programs that run
together share their tokens, and small blocks are gathered into one wide step.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM x BN the output tile of a program, BK how far it steps along the nonzeros of its block row.

Integers stand for names in the launch parameters (`ACTIVATION`, `PRECISION`): they survive every compiler.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS, CODES
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.launch import OVERLAP, Kernel, known_divisor
from torchao_superblock.ops.cuda.problem import TF32X3, Problem
from torchao_superblock.ops.cuda.tf32 import add_low, prepare_pack, three_products

# A compiled kernel serves every value of these: batch sizes differ from call to call, and the parts of a plan start
# anywhere. Strides and the addresses of x and values are left to Triton, which makes wide loads of them.
_NUMBERS = ("M", "numel", "n_splits", "n_block_rows", "n_block_cols", "nnz")
INDICES = ("start_ptr", "block_ptr", "perm_ptr", "order_ptr")
_INDICES = (*INDICES, "bias_ptr")


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        # Not maximum(): that would turn NaN into 0.
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u), without the cancellation
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        z = z / (1 + tl.exp(-u))
    elif ACTIVATION == 4:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == 5:
        z = z / (1 + tl.exp(-1.702 * z))
    return z


@triton.jit
def alternated(number, total, ROUND: tl.constexpr):
    """The place of a program in the order of work: every second round of ROUND of them in reverse.

    Programs start one on each processor. With long block rows first, who got the longest of the first round gets the
    shortest of the second. (Of several splits each has its own order; five of them still gained 2 to 4 %.)
    """
    first = number // ROUND * ROUND
    last = tl.minimum(first + ROUND, total) - 1
    return tl.where(number // ROUND % 2 == 1, first + last - number, number)


@triton.jit
def extent(number, last, size: tl.constexpr, PADDING: tl.constexpr):
    """How much of a block is there: all, or of the last one what is not padding.

    Of two constants, the compiler still knows what divides them, and so how wide its masked accesses may be.
    """
    return tl.where(number == last, size - PADDING, size)


@triton.jit
def multiple(stride, DIVISOR: tl.constexpr):
    """A stride, as the multiple that it is."""
    if DIVISOR > 1:
        stride = stride // DIVISOR * DIVISOR
    return stride


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def bsr_matmul_kernel(
    x_ptr,  # (M, K), any strides; K = C * c - C_PADDING
    start_ptr,  # (R + 1,) where each block row starts in block_ptr
    block_ptr,  # (nnz,) block column of each nonzero of a row
    perm_ptr,  # (nnz,) where in values that block is stored, if HAS_PERM
    order_ptr,  # (R,) block rows in the order in which they are worked on, if HAS_ORDER
    values_ptr,  # (nnz, ...) stored blocks
    low_ptr,  # their low parts, if HAS_LOW
    bias_ptr,  # (N,), if HAS_BIAS
    y_ptr,  # (M, N), or with SPLIT_K a float workspace (splits, M, N); N = R * r - R_PADDING
    M,
    x_stride_m,
    x_stride_k,
    N,
    n_block_rows,
    n_block_cols,
    nnz,
    r: tl.constexpr,
    c: tl.constexpr,
    STRIDE_N: tl.constexpr,  # strides inside a stored block: (c, 1) as stored, (1, c) for its transpose
    STRIDE_K: tl.constexpr,
    R_PADDING: tl.constexpr,  # rows of the last block row, and columns of the last block column, that x and y lack
    C_PADDING: tl.constexpr,
    X_DIVISOR: tl.constexpr,  # known_divisor of x_stride_m, and of N
    Y_DIVISOR: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT64: tl.constexpr,
    INT64: tl.constexpr,  # offsets within a tile need 64 bits
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    ROUND: tl.constexpr,  # programs in a round, one for each processor; 0: no rounds
    OVERLAPS: tl.constexpr,  # launched while the kernel before it may still run
):
    """y = act(x @ W.T + b), W in BSR; with the transposed index it is grad @ W.

    Bound by L2 reads of x (see the top of the file). Programs that run together work on GROUP_M tiles of tokens and all
    block rows, so the tokens are in L2 after the first of them; the block rows with most nonzeros go first, so that the
    last ones to finish are short.
    """
    N_TILES: tl.constexpr = (r + BN - 1) // BN  # tall blocks are cut into several output tiles
    acc_dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    index_dtype: tl.constexpr = tl.int64 if INT64 else tl.int32
    x_stride_m = multiple(x_stride_m, X_DIVISOR)
    N = multiple(N, Y_DIVISOR)

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if ROUND > 0:
        n_pids = tl.num_programs(0)
        number = alternated(split * n_pids + pid, n_pids * tl.num_programs(1), ROUND)
        pid = number % n_pids
        split = number // n_pids
    n_m_tiles = tl.cdiv(M, BM)
    group_size = GROUP_M * n_block_rows * N_TILES
    first_m = (pid // group_size) * GROUP_M
    rows_in_group = tl.minimum(n_m_tiles - first_m, GROUP_M)
    within = pid % group_size
    m_tile = first_m + within % rows_in_group
    place = within // rows_in_group
    n_tile = place % N_TILES
    row = place // N_TILES
    if HAS_ORDER:
        row = tl.load(order_ptr + row)
        # Where the row starts and its columns are read next, one after the other. Meanwhile every program fetches a
        # line of both into L2, which is all there is of them, or most: worth 1 to 6 % of a call with few tokens.
        line = (split.to(tl.int64) * tl.num_programs(0) + pid) * 32
        any_start = tl.load(start_ptr + line, mask=line < n_block_rows, other=0)
        any_column = tl.load(block_ptr + line, mask=line < nnz, other=0)
        # Adds 0, for no index is that; but the loads are needed.
        row += ((any_start == -(2**31)) | (any_column == -(2**31))).to(tl.int32)
        # Clamped: a bad index may give wrong numbers, never a wild access.
        row = tl.minimum(tl.maximum(row, 0), n_block_rows - 1)

    begin = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), nnz)
    end = tl.minimum(tl.maximum(tl.load(start_ptr + row + 1), begin), nnz)
    if SPLIT_K:
        n_splits = tl.num_programs(1)
        count = end - begin
        end = begin + (count * (split + 1)) // n_splits
        begin = begin + (count * split) // n_splits

    m0 = m_tile * BM
    m = tl.arange(0, BM)
    n = n_tile * BN + tl.arange(0, BN)
    # Rows beyond M or r read a valid one again and are not stored: cheaper than a mask on every load. (Only where it
    # can happen: the compiler no longer sees that clamped indices are contiguous.)
    m_in = tl.minimum(m, M - 1 - m0).to(index_dtype)
    n_in = n
    if r % BN != 0:
        n_in = tl.minimum(n, r - 1)
    x_rows = x_ptr + m0.to(tl.int64) * x_stride_m + (m_in * x_stride_m)[:, None]

    acc = tl.zeros((BM, BN), acc_dtype)
    if PRECISION == 2:
        acc_low = tl.zeros((BM, BN), tl.float32)

    if c % BK == 0:
        # A step stays within one block: its column and its place in values are numbers, fetched a step ahead.
        STEPS: tl.constexpr = c // BK
        k = tl.arange(0, BK)
        x_tile = x_rows + (k.to(index_dtype) * x_stride_k)[None, :]
        w_tile = (n_in * STRIDE_N)[None, :] + (k * STRIDE_K)[:, None]
        column = tl.load(block_ptr + begin, mask=begin < end, other=0)
        block = begin
        if HAS_PERM:
            block = tl.load(perm_ptr + begin, mask=begin < end, other=0)
        for step in range(0, (end - begin) * STEPS):
            offset = (step % STEPS) * BK
            column = tl.minimum(tl.maximum(column, 0), n_block_cols - 1)
            if HAS_PERM:
                block = tl.minimum(tl.maximum(block, 0), nnz - 1)
            x_step = x_tile + (column.to(tl.int64) * c + offset) * x_stride_k
            if C_PADDING > 0:
                there = offset + k < extent(column, n_block_cols - 1, c, C_PADDING)
                x = tl.load(x_step, mask=there[None, :], other=0.0)
            else:
                x = tl.load(x_step)
            w_base = block.to(tl.int64) * (r * c) + offset * STRIDE_K
            w = tl.load(values_ptr + w_base + w_tile)
            following = tl.minimum(begin + (step + 1) // STEPS, nnz - 1)
            column = tl.load(block_ptr + following)
            if HAS_PERM:
                block = tl.load(perm_ptr + following)
            else:
                block = following
            if PRECISION == 2:
                w_low = w
                if HAS_LOW:
                    w_low = tl.load(low_ptr + w_base + w_tile)
                acc, acc_low = three_products(x, w, w_low, acc, acc_low, HAS_LOW)
            elif PRECISION == 1:
                acc = tl.dot(x, w, acc, input_precision="tf32")
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=acc_dtype)
    else:
        # A step gathers columns of several blocks (or of a block whose width is no multiple of 16).
        RUN: tl.constexpr = c & -c  # columns come in aligned runs of this many, at least
        total = (end - begin) * c
        for k0 in range(0, total, BK):
            k = k0 + tl.arange(0, BK)
            inside = k < total
            j = begin + k // c
            offset = k % c
            column = tl.load(block_ptr + j, mask=inside, other=0)
            column = tl.minimum(tl.maximum(column, 0), n_block_cols - 1)
            block = j
            if HAS_PERM:
                block = tl.load(perm_ptr + j, mask=inside, other=0)
                block = tl.minimum(tl.maximum(block, 0), nnz - 1)
            x_columns = column.to(index_dtype) * c + offset
            x_columns = tl.max_contiguous(tl.multiple_of(x_columns, RUN), RUN)
            there = inside
            if C_PADDING > 0:
                there &= x_columns < n_block_cols * c - C_PADDING
            x = tl.load(x_rows + (x_columns * x_stride_k)[None, :], mask=there[None, :], other=0.0)
            # The block's own offset may need 64 bits even where the tile's does not: it is at most nnz * r * c.
            w_columns = block.to(index_dtype) * (r * c) + offset * STRIDE_K
            if STRIDE_K == 1:
                w_columns = tl.max_contiguous(tl.multiple_of(w_columns, RUN), RUN)
            w_tile = (n_in * STRIDE_N)[None, :] + w_columns[:, None]
            w = tl.load(values_ptr + w_tile, mask=inside[:, None], other=0.0)
            if PRECISION == 2:
                w_low = w
                if HAS_LOW:
                    w_low = tl.load(low_ptr + w_tile, mask=inside[:, None], other=0.0)
                acc, acc_low = three_products(x, w, w_low, acc, acc_low, HAS_LOW)
            elif PRECISION == 1:
                acc = tl.dot(x, w, acc, input_precision="tf32")
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=acc_dtype)

    if PRECISION == 2:
        acc = add_low(acc, acc_low)
    y_n = row.to(tl.int64) * r + n
    height = r
    if R_PADDING > 0:
        height = extent(row, n_block_rows - 1, r, R_PADDING)
    stored = (m[:, None] < M - m0) & (n[None, :] < height)
    y_base = y_ptr + m0.to(tl.int64) * N
    if SPLIT_K:
        y_base += split.to(tl.int64) * M * N
    else:
        if HAS_BIAS:
            if R_PADDING > 0:
                bias = tl.load(bias_ptr + row.to(tl.int64) * r + n_in, mask=n < height, other=0.0)
            else:
                bias = tl.load(bias_ptr + row.to(tl.int64) * r + n_in)
            acc += bias.to(acc_dtype)[None, :]
        acc = activate(acc, ACTIVATION)
    y_tile = y_base + (m.to(index_dtype) * N)[:, None] + y_n[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def sum_splits_kernel(
    partial_ptr,  # (splits, numel)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (numel,)
    numel,
    N,
    n_splits,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out = act(partial.sum(0) + b), always added in the same order. Bound by reading the partial sums, once."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    total = tl.load(partial_ptr + i, mask=inside, other=0.0)
    for split in range(1, n_splits):
        total += tl.load(partial_ptr + split * numel.to(tl.int64) + i, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(total.dtype)
    total = activate(total, ACTIVATION)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_of_splits(
    kernel_type: type[Kernel],
    activation: int = 0,
    *,
    has_bias: bool = False,
    overlaps: bool = False,
) -> Kernel:
    """A :func:`sum_splits_kernel` with its constants, for programs of 256 elements."""
    constants = {
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "BLOCK": 256,
        "OVERLAPS": overlaps,
    }
    options = OVERLAP if overlaps else {}
    return kernel_type(sum_splits_kernel, constants, num_warps=4, num_stages=2, **options)


def prepare(
    problem: Problem, choice: Choice, kernel_type: type[Kernel] = Kernel
) -> Callable[..., Tensor]:
    """All of a product but its tensors.

    Args:
        problem: a product; what is prepared serves all numbers of tokens in its bucket.
        choice: of kernel `"matmul"`.
        kernel_type: launches it.

    Returns:
        A function of x, crow, col, values, bias, plan and the shape of y, which returns y. Its x and y may have leading
        dimensions, where x lies in memory as the strides of the problem say. A forward takes a packed plan or None, a
        gradient of x the parts of one.
    """
    tile: Any = choice.tile
    forward, packed = problem.kind == "forward", choice.packed
    r, c, N, dtype = problem.r, problem.c, problem.N, problem.dtype
    splits, BM, device = tile.splits, tile.BM, problem.device
    activation = CODES[problem.activation]
    in_place = not forward and not packed  # the blocks are read as they are stored
    overlaps = kernel_type.overlaps and device.overlaps
    constants = {
        "r": r,
        "c": c,
        "STRIDE_N": 1 if in_place else c,
        "STRIDE_K": r if in_place else 1,
        "R_PADDING": problem.row_padding,
        "C_PADDING": problem.col_padding,
        "X_DIVISOR": known_divisor(problem.strides[0]),
        "Y_DIVISOR": known_divisor(N),
        "HAS_PERM": in_place,
        "HAS_ORDER": tile.ordered and (not forward or problem.plan_entries > 0),
        "HAS_BIAS": problem.has_bias and splits == 1,
        "HAS_LOW": packed and problem.precision == TF32X3,
        "SPLIT_K": splits > 1,
        "ACTIVATION": activation if splits == 1 else 0,
        "PRECISION": problem.precision,
        "FLOAT64": dtype == torch.float64,
        "INT64": choice.int64,
        "BM": BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "GROUP_M": tile.GROUP_M,
        "ROUND": device.processors if tile.even else 0,
        "OVERLAPS": overlaps,
    }
    kernel = kernel_type(
        bsr_matmul_kernel,
        constants,
        (*problem.strides, N, problem.R, problem.C, problem.nnz),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **(OVERLAP if overlaps else {}),
    )
    reduce = pack = None
    if splits > 1 and kernel_type.adds_splits:
        reduce = sum_of_splits(
            kernel_type, activation, has_bias=problem.has_bias, overlaps=overlaps
        )
    if packed:
        pack = prepare_pack(problem, parts=True, kernel_type=kernel_type)
    columns = problem.R * -(-r // tile.BN)
    empty, device_index = kernel_type.empty, device.index
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32

    def run(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        plan: Any,
        shape: tuple[int, ...],
    ) -> Tensor:
        if forward:
            # A plan starts with row_order; without one crow stands in and is not read as an order.
            start, block, perm, order = crow, col, col, crow if plan is None else plan
        else:
            start, block, perm, order = plan.crow_t, plan.row_t, plan.perm_t, plan.col_order
        low = values
        if pack is not None:
            values, low = pack(values, perm)
        M, strides = shape[0], (N, 1)
        if len(shape) != 2:
            M, strides = math.prod(shape[:-1]), (N, 1)[-len(shape) :]
            for size in shape[-2:0:-1]:
                strides = (size * strides[0], *strides)
        if splits > 1:
            out = empty((splits, M, N), (M * N, N, 1), accumulator)
        else:
            out = empty(shape, strides, dtype)
        tensors = (x, start, block, perm, order, values, low, x if bias is None else bias, out)
        kernel((-(-M // BM) * columns, splits, 1), device_index, tensors, M)
        if splits == 1:
            return out
        if reduce is None:
            total = out.sum(0) if bias is None else out.sum(0) + bias
            return ACTIVATIONS[problem.activation](total).to(dtype).view(shape)
        y = empty(shape, strides, dtype)
        tensors = (out, y if bias is None else bias, y)
        reduce((-(-M * N // 256), 1, 1), device_index, tensors, M * N, N, splits)
        return y

    return run
