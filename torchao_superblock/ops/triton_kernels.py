"""Plain Triton kernels: one block-sparse matrix product, its weight gradient in two forms, and a few small helpers.

They run on every NVIDIA GPU that Triton supports, can be traced into an exported program, and run in Triton's
interpreter, which is how they are tested on machines without a GPU. `cuda.py` decides how they are launched.

What limits them: an x tile that was loaded for one stored block feeds only `r` outputs, so the product re-reads x
from the L2 cache, about `nnz * M * c` elements in all. Everything here serves to keep those reads wide, in flight and
few: asynchronous copies several steps ahead, tall tiles of tokens (each re-reads `values` once), programs that run
together share their tokens, and small blocks are gathered into one wide step.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM x BN the output tile of a program, BK how far it steps along the nonzeros of its block row.

Integers stand for names in the launch parameters (`ACTIVATION`, `PRECISION`): they survive every compiler.
"""

import triton
import triton.language as tl

# How two tiles are multiplied.
NATIVE = (
    0  # float16 and bfloat16 on tensor cores, accumulated in float32; float64 in its own precision
)
TF32 = 1  # float32 rounded to TF32: one product
TF32X3 = 2  # float32 as a high and a low TF32 part: three products, float32-level error
FMA = 3  # float32 without tensor cores, for GPUs that have no TF32

# A compiled kernel serves every value of these: batch sizes differ from call to call, and the parts of a plan start
# anywhere. Strides and the addresses of x and values are left to Triton, which makes wide loads of them.
_NUMBERS = (
    *("M", "numel", "n_splits", "n_block_rows", "n_block_cols", "n_lines", "n_others", "nnz"),
    *("tokens_per_split", "height", "width"),
)
_INDICES = (
    *("start_ptr", "block_ptr", "perm_ptr", "order_ptr", "row_ptr", "crow_ptr", "col_ptr"),
    "bias_ptr",
)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
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
    return z


@triton.jit
def _tf32_high(x):
    """The TF32 number nearest to x. `x - _tf32_high(x)` is exact and holds the other 12 bits."""
    bits = x.to(tl.uint32, bitcast=True)
    high = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # Rounded, a GPU's own NaN (0x7fffffff) would carry into its sign and become -0.
    return tl.where(x == x, high, x)


@triton.jit
def _tf32_low(x, high):
    # An infinite x leaves no rest (not inf - inf), so that an overflow stays an overflow.
    return tl.where(x == high, 0.0, x - high)


@triton.jit
def _three_products(a, b, b_low, acc, acc_low, B_IS_HIGH: tl.constexpr):
    """One step of a float32 product out of TF32 ones. The small products are summed apart (see _add_low)."""
    a_high = _tf32_high(a)
    a_low = _tf32_low(a, a_high)
    if B_IS_HIGH:
        b_high = b
    else:
        b_high = _tf32_high(b)
        b_low = _tf32_low(b, b_high)
    acc_low = tl.dot(a_low, b_high, acc_low, input_precision="tf32")
    acc_low = tl.dot(a_high, b_low, acc_low, input_precision="tf32")
    # Tensor cores cut off what they add to a running sum, always towards zero: over hundreds of steps that alone is an
    # error of 1e-6. So they sum one step, and ordinary additions, which round to nearest, sum the steps.
    step = tl.dot(a_high, b_high, input_precision="tf32", max_num_imprecise_acc=1)
    return acc + step, acc_low


@triton.jit
def _add_low(acc, acc_low):
    """The full sum. What an infinite input made of the small products (inf * 0) is dropped."""
    return acc + tl.where(acc_low == acc_low, acc_low, 0.0)


@triton.jit
def _alternated(number, total, ROUND: tl.constexpr):
    """The place of a program in the order of work: every second round of ROUND of them in reverse.

    Programs start one on each processor. With long block rows first, who got the longest of the first round gets the
    shortest of the second. (Of several splits each has its own order; five of them still gained 2 to 4 %.)
    """
    first = number // ROUND * ROUND
    last = tl.minimum(first + ROUND, total) - 1
    return tl.where(number // ROUND % 2 == 1, first + last - number, number)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def bsr_matmul_kernel(
    x_ptr,  # (M, C * c), any strides
    start_ptr,  # (R + 1,) where each block row starts in block_ptr
    block_ptr,  # (nnz,) block column of each nonzero of a row
    perm_ptr,  # (nnz,) where in values that block is stored, if HAS_PERM
    order_ptr,  # (R,) block rows in the order in which they are worked on, if HAS_ORDER
    values_ptr,  # (nnz, ...) stored blocks
    low_ptr,  # their low parts, if HAS_LOW
    bias_ptr,  # (N,), if HAS_BIAS
    y_ptr,  # (M, N), or with SPLIT a float workspace (splits, M, N)
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
    HAS_PERM: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT64: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
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
    CHUNKS: tl.constexpr = (r + BN - 1) // BN  # tall blocks are cut into several output tiles
    acc_dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    index_dtype: tl.constexpr = tl.int64 if WIDE else tl.int32

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if ROUND > 0:
        n_pids = tl.num_programs(0)
        number = _alternated(split * n_pids + pid, n_pids * tl.num_programs(1), ROUND)
        pid = number % n_pids
        split = number // n_pids
    n_m_tiles = tl.cdiv(M, BM)
    group_size = GROUP_M * n_block_rows * CHUNKS
    first_m = (pid // group_size) * GROUP_M
    rows_in_group = tl.minimum(n_m_tiles - first_m, GROUP_M)
    within = pid % group_size
    m_tile = first_m + within % rows_in_group
    slot = within // rows_in_group
    chunk = slot % CHUNKS
    row = slot // CHUNKS
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
    if SPLIT:
        n_splits = tl.num_programs(1)
        count = end - begin
        end = begin + (count * (split + 1)) // n_splits
        begin = begin + (count * split) // n_splits

    m0 = m_tile * BM
    m = tl.arange(0, BM)
    n = chunk * BN + tl.arange(0, BN)
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
            x = tl.load(x_tile + (column.to(tl.int64) * c + offset) * x_stride_k)
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
                acc, acc_low = _three_products(x, w, w_low, acc, acc_low, HAS_LOW)
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
            x = tl.load(x_rows + (x_columns * x_stride_k)[None, :], mask=inside[None, :], other=0.0)
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
                acc, acc_low = _three_products(x, w, w_low, acc, acc_low, HAS_LOW)
            elif PRECISION == 1:
                acc = tl.dot(x, w, acc, input_precision="tf32")
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=acc_dtype)

    if PRECISION == 2:
        acc = _add_low(acc, acc_low)
    y_n = row.to(tl.int64) * r + n
    stored = (m[:, None] < M - m0) & (n[None, :] < r)
    y_base = y_ptr + m0.to(tl.int64) * N
    if SPLIT:
        y_base += split.to(tl.int64) * M * N
    else:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row.to(tl.int64) * r + n_in)
            acc += bias.to(acc_dtype)[None, :]
        acc = _activate(acc, ACTIVATION)
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
    total = _activate(total, ACTIVATION)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def pack_blocks_kernel(
    values_ptr,  # (nnz, r, c)
    perm_ptr,  # (nnz,), if HAS_PERM
    out_ptr,  # (nnz, n, k), or with SPLIT (2, nnz, n, k): the high parts, then the low parts
    nnz,
    n: tl.constexpr,  # output block: (r, c) as stored, (c, r) transposed
    k: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    HAS_PERM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stored blocks, permuted and transposed if asked for, as they are or as high and low TF32 parts.

    One pass over the nonzeros, a fraction of one tile's work in the product, which then needs neither the arithmetic of
    splitting nor a transposed operand (TF32 tensor cores and the Gluon kernel take none).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = nnz.to(tl.int64) * (n * k)
    inside = i < numel
    j = i // (n * k)
    within = (i % (n * k)).to(tl.int32)
    block = j
    if HAS_PERM:
        block = tl.load(perm_ptr + j, mask=inside, other=0)
        block = tl.minimum(tl.maximum(block, 0), nnz - 1).to(tl.int64)
    source = block * (n * k) + (within // k) * STRIDE_N + (within % k) * STRIDE_K
    value = tl.load(values_ptr + source, mask=inside, other=0.0)
    if SPLIT:
        high = _tf32_high(value)
        tl.store(out_ptr + i, high, mask=inside)
        tl.store(out_ptr + numel + i, _tf32_low(value, high), mask=inside)
    else:
        tl.store(out_ptr + i, value, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def grad_values_kernel(
    grad_ptr,  # (M, R * r), any strides
    x_ptr,  # (M, C * c), any strides
    row_ptr,  # (nnz,) block row of each stored block
    col_ptr,  # (nnz,) block column
    out_ptr,  # (nnz, r, c), or with SPLIT a float workspace (splits, nnz, r, c)
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT64: tl.constexpr,
    WIDE: tl.constexpr,
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
    index_dtype: tl.constexpr = tl.int64 if WIDE else tl.int32

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
        grad = tl.load(grad_tile, mask=inside, other=0.0)
        x = tl.load(x_tile, mask=inside, other=0.0)
        grad_tile += tl.cast(BM, tl.int64) * grad_stride_m
        x_tile += tl.cast(BM, tl.int64) * x_stride_m
        grad_t = tl.trans(grad)
        if PRECISION == 2:
            acc, acc_low = _three_products(grad_t, x, x, acc, acc_low, False)
        elif PRECISION == 1:
            acc = tl.dot(grad_t, x, acc, input_precision="tf32")
        else:
            acc = tl.dot(grad_t, x, acc, input_precision="ieee", out_dtype=acc_dtype)
    if PRECISION == 2:
        acc = _add_low(acc, acc_low)
    out = out_ptr + block.to(tl.int64) * (r * c)
    if SPLIT:
        out += split.to(tl.int64) * nnz * (r * c)
    stored = (i[:, None] < r) & (k[None, :] < c)
    tl.store(out + (i * c)[:, None] + k[None, :], acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INDICES)
def grad_values_lines_kernel(
    fixed_ptr,  # (M, n_lines * f), any strides: grad, or x with the transposed index
    gathered_ptr,  # (M, n_others * g), any strides: x, or grad with the transposed index
    start_ptr,  # (n_lines + 1,) where the blocks of each line start in block_ptr
    block_ptr,  # (nnz,) where each block lies along its line
    perm_ptr,  # (nnz,) where in the output that block is stored, if HAS_PERM
    order_ptr,  # (n_lines,) lines in the order in which they are worked on
    out_ptr,  # (nnz, r, c), or with SPLIT a float workspace (splits, nnz, r, c)
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
    STRIDE_F: tl.constexpr,  # strides inside a stored block: (c, 1), or (1, c) with the transposed index
    STRIDE_G: tl.constexpr,
    HAS_PERM: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
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
    GROUP: tl.constexpr = BG // g
    RUN: tl.constexpr = g & -g  # gathered columns come in aligned runs of this many, at least
    index_dtype: tl.constexpr = tl.int64 if WIDE else tl.int32

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
    if SPLIT:
        out += split.to(tl.int64) * nnz * (f * g)

    for first in range(begin, end, GROUP):
        j = first + k // g
        present = (j < end) & (k < GROUP * g)
        other = tl.load(block_ptr + j, mask=present, other=0)
        other = tl.minimum(tl.maximum(other, 0), n_others - 1)
        columns = other.to(index_dtype) * g + k % g
        columns = tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)
        fixed_tile = fixed_base
        gathered_tile = gathered_base + (columns * gathered_stride_n)[None, :]
        acc = tl.zeros((BG, BF), tl.float32)
        for done in range(0, left, BM):
            inside = (m < left - done)[:, None]
            fixed = tl.load(fixed_tile, mask=inside, other=0.0)
            gathered = tl.load(gathered_tile, mask=inside & present[None, :], other=0.0)
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
