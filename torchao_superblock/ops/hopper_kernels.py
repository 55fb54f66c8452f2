"""Gluon kernels for Hopper: y = act(x @ W.T + b) with W in BSR.

Dimension legend: M tokens, N out, K in; r x c block size, R x C block grid.

One persistent, warp-specialised kernel. What limits a block-sparse linear on this chip is, in this
order, memory traffic for x and y, L2-to-SM traffic (every stored block needs its slice of x again),
and shared-memory bandwidth for the operands of wgmma. The kernel deals with them like this:

* A program owns a tile of BM tokens x GROUP "strips" of 64 outputs. A slice of x is copied once for
  all strips of the tile that have a block in that column, so x crosses the L2-SM link less often.
* The product is computed transposed, y.T = W @ x.T: 64 outputs are the M side of wgmma and up to
  256 tokens its N side. Such an instruction reads far less shared memory for the same arithmetic
  than 64 tokens x 64 outputs would.
* Each strip has its own consumer warpgroup. One warp streams x and one warp for each strip streams
  the strip's blocks, by TMA, through rings of shared memory that run ahead across tile borders: the
  loads of the next tile overlap with the output of this one.
* Blocks with fewer than 64 rows are stacked: a strip then holds several block rows, its column set
  is their union, and an absent block is an out-of-bounds TMA box, which the hardware fills with
  zeros without touching memory.

All warps derive the same sequence of columns from the same indices (64 columns at a time, as a bit
mask), so nothing but the rings' barriers passes between them. Indices are never trusted with an
address: row pointers are clamped to the stored blocks, columns outside the grid are dropped, and
TMA clips whatever is left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["bsr_linear_strips"]


@gluon.jit
def _popcount(bits):
    return gl.inline_asm_elementwise(
        "popc.b64 $0, $1;", "=r,l", [bits], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _block_row(strip, s: gl.constexpr, STACK: gl.constexpr, SPLIT: gl.constexpr):
    """Block row number s of a strip: STACK block rows a strip, or SPLIT strips a block row."""
    if STACK > 1:
        row = strip * STACK + s
    else:
        row = strip // SPLIT
    return row


@gluon.jit
def _row_run(crow_ptr, row, rows, nnz):
    """First and end position of a block row's stored blocks, clamped; empty past the last row."""
    inside = row < rows
    first = gl.load(crow_ptr + row, mask=inside, other=0)
    end = gl.load(crow_ptr + row + 1, mask=inside, other=0)
    first = gl.minimum(gl.maximum(first, 0), nnz)
    end = gl.minimum(gl.maximum(end, first), nnz)
    return first, end


@gluon.jit
def _column_bits(col_ptr, first, end, base, columns):
    """Bit j is set when col[first:end] holds block column base + j < columns, for j < 64."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    bits = gl.to_tensor(0).to(gl.int64)
    one = gl.full([64], 1, gl.int64, layout)
    for start in range(first, end, 64):
        position = start + gl.arange(0, 64, layout=layout)
        column = gl.load(col_ptr + position, mask=position < end, other=-1)
        inside = (column >= base) & (column < base + 64) & (column < columns)
        shift = gl.where(inside, column - base, 0).to(gl.int64)
        bits |= gl.reduce_or(gl.where(inside, one << shift, one - one), axis=0)
    return bits


@gluon.jit
def _blocks_before(col_ptr, first, end, base):
    """How many entries of col[first:end] lie in block columns below base."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    count = 0
    if base > 0:
        for start in range(first, end, 64):
            position = start + gl.arange(0, 64, layout=layout)
            column = gl.load(col_ptr + position, mask=position < end, other=base)
            count += gl.sum((column < base).to(gl.int32), axis=0)
    return count


@gluon.jit
def _strip_bits(
    crow_ptr, col_ptr, strip, base, rows, columns, nnz, STACK: gl.constexpr, SPLIT: gl.constexpr
):
    """Block columns base .. base + 63 in which any block row of the strip has a block."""
    bits = gl.to_tensor(0).to(gl.int64)
    for s in gl.static_range(STACK):
        first, end = _row_run(crow_ptr, _block_row(strip, s, STACK, SPLIT), rows, nnz)
        bits |= _column_bits(col_ptr, first, end, base, columns)
    return bits


@gluon.jit
def _group_bits(
    crow_ptr,
    col_ptr,
    group,
    base,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Block columns base .. base + 63 that any strip of the group needs."""
    bits = gl.to_tensor(0).to(gl.int64)
    for g in gl.static_range(GROUP):
        strip = group * GROUP + g
        bits |= _strip_bits(crow_ptr, col_ptr, strip, base, rows, columns, nnz, STACK, SPLIT)
    return bits


@gluon.jit
def _tile(t, groups):
    """Token tile and group of tile t: groups fastest, rotated so that each program meets all."""
    m = t // groups
    return m, (t + m) % groups


@gluon.jit
def _stream_x(
    x_desc,
    crow_ptr,
    col_ptr,
    x_s,
    x_full,
    x_empty,
    tiles,
    groups,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    SLOTS: gl.constexpr = x_s.shape[0]
    BM: gl.constexpr = x_s.shape[1]
    BK: gl.constexpr = x_s.shape[2]
    item = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, group = _tile(t, groups)
        for base in range(0, columns, 64):
            todo = _group_bits(
                crow_ptr, col_ptr, group, base, rows, columns, nnz, GROUP, STACK, SPLIT
            )
            for _ in range(_popcount(todo)):
                low = todo & (0 - todo)
                todo = todo ^ low
                column = base + _popcount(low - 1)
                for h in gl.static_range(CHUNKS):
                    slot = item % SLOTS
                    mbarrier.wait(x_empty.index(slot), ((item // SLOTS) & 1) ^ 1)
                    mbarrier.expect(x_full.index(slot), x_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [m * BM, (column * CHUNKS + h) * BK],
                        x_full.index(slot),
                        x_s.index(slot),
                    )
                    item += 1


@gluon.jit
def _stream_blocks(
    g: gl.constexpr,
    w_desc,
    crow_ptr,
    col_ptr,
    w_s,
    w_full,
    w_empty,
    tiles,
    groups,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    SLOTS: gl.constexpr = w_s.shape[0] // (GROUP * STACK)
    PART: gl.constexpr = w_s.shape[1]  # rows of a block that lie in one strip
    BK: gl.constexpr = w_s.shape[2]
    item = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, group = _tile(t, groups)
        strip = group * GROUP + g
        part = strip % SPLIT
        for base in range(0, columns, 64):
            first, end = _row_run(crow_ptr, _block_row(strip, 0, STACK, SPLIT), rows, nnz)
            bits0 = _column_bits(col_ptr, first, end, base, columns)
            next0 = first + _blocks_before(col_ptr, first, end, base)
            bits1 = bits0
            next1 = next0
            bits2 = bits0
            next2 = next0
            bits3 = bits0
            next3 = next0
            todo = bits0
            if STACK > 1:
                first, end = _row_run(crow_ptr, _block_row(strip, 1, STACK, SPLIT), rows, nnz)
                bits1 = _column_bits(col_ptr, first, end, base, columns)
                next1 = first + _blocks_before(col_ptr, first, end, base)
                todo = todo | bits1
            if STACK > 2:
                first, end = _row_run(crow_ptr, _block_row(strip, 2, STACK, SPLIT), rows, nnz)
                bits2 = _column_bits(col_ptr, first, end, base, columns)
                next2 = first + _blocks_before(col_ptr, first, end, base)
                first, end = _row_run(crow_ptr, _block_row(strip, 3, STACK, SPLIT), rows, nnz)
                bits3 = _column_bits(col_ptr, first, end, base, columns)
                next3 = first + _blocks_before(col_ptr, first, end, base)
                todo = todo | bits2 | bits3
            for _ in range(_popcount(todo)):
                low = todo & (0 - todo)
                todo = todo ^ low
                for h in gl.static_range(CHUNKS):
                    slot = item % SLOTS + g * SLOTS
                    mbarrier.wait(w_empty.index(slot), ((item // SLOTS) & 1) ^ 1)
                    mbarrier.expect(w_full.index(slot), w_desc.block_type.nbytes * STACK)
                    for s in gl.static_range(STACK):
                        bits = bits0
                        position = next0
                        if s == 1:
                            bits = bits1
                            position = next1
                        if s == 2:
                            bits = bits2
                            position = next2
                        if s == 3:
                            bits = bits3
                            position = next3
                        position += _popcount(bits & (low - 1))
                        # An absent block is a box past the end of the values: TMA writes zeros.
                        position = gl.where((bits & low) != 0, position, nnz)
                        tma.async_copy_global_to_shared(
                            w_desc,
                            [(position * SPLIT + part) * PART, h * BK],
                            w_full.index(slot),
                            w_s.index(slot * STACK + s),
                        )
                    item += 1


@gluon.jit
def _activate(z, ACTIVATION: gl.constexpr):
    if ACTIVATION == "relu":
        z = gl.maximum(z, 0.0)
    elif ACTIVATION == "gelu":
        # 0.5 z (1 + erf(z / sqrt(2)))
        z = 0.5 * z * (1.0 + gl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 z (1 + tanh(u)) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        u = 0.7978845608028654 * z * (1.0 + 0.044715 * z * z)
        z = z / (1.0 + gl.exp2(-2.8853900817779268 * u))
    elif ACTIVATION == "silu":
        z = z / (1.0 + gl.exp2(-1.4426950408889634 * z))
    return z


@gluon.jit
def _store(acc, bias, y_desc, y_s, row, column, active, ACTIVATION: gl.constexpr):
    out = _activate(acc + bias[:, None], ACTIVATION).to(y_desc.dtype)
    tma.store_wait(0)
    y_s.permute((1, 0)).store(out)
    fence_async_shared()
    if active:
        tma.async_copy_shared_to_global(y_desc, [row, column], y_s)


@gluon.jit
def _consume(
    g: gl.constexpr,
    y_desc,
    bias_ptr,
    crow_ptr,
    col_ptr,
    x_s,
    w_s,
    y_s,
    x_full,
    x_empty,
    w_full,
    w_empty,
    tiles,
    groups,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    X_SLOTS: gl.constexpr = x_s.shape[0]
    BM: gl.constexpr = x_s.shape[1]
    BK: gl.constexpr = x_s.shape[2]
    W_SLOTS: gl.constexpr = w_s.shape[0] // (GROUP * STACK)
    BN: gl.constexpr = y_s.shape[1]  # tokens of one accumulator
    PARTS: gl.constexpr = BM // BN
    STEP: gl.constexpr = 256 // x_s.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, STEP])
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    w_strips = w_s._reinterpret(w_s.dtype, [GROUP * W_SLOTS, 64, BK], w_s.layout)
    x_item = 0
    w_item = 0
    strips = (rows * SPLIT + STACK - 1) // STACK
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, group = _tile(t, groups)
        strip = group * GROUP + g
        active = strip < strips
        bias = gl.zeros([64], gl.float32, lanes)
        if HAS_BIAS:
            feature = strip * 64 + gl.arange(0, 64, layout=lanes)
            bias = gl.load(bias_ptr + feature, mask=feature < strips * 64, other=0).to(gl.float32)
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        for base in range(0, columns, 64):
            mine = _strip_bits(crow_ptr, col_ptr, strip, base, rows, columns, nnz, STACK, SPLIT)
            todo = _group_bits(
                crow_ptr, col_ptr, group, base, rows, columns, nnz, GROUP, STACK, SPLIT
            )
            for _ in range(_popcount(todo)):
                low = todo & (0 - todo)
                todo = todo ^ low
                for h in gl.static_range(CHUNKS):
                    x_slot = x_item % X_SLOTS
                    mbarrier.wait(x_full.index(x_slot), (x_item // X_SLOTS) & 1)
                    if (mine & low) != 0:
                        w_slot = w_item % W_SLOTS + g * W_SLOTS
                        mbarrier.wait(w_full.index(w_slot), (w_item // W_SLOTS) & 1)
                        w = w_strips.index(w_slot)
                        x = x_s.index(x_slot)
                        x0 = x.slice(0, BN, dim=0).permute((1, 0))
                        acc0 = warpgroup_mma(w, x0, acc0, is_async=True)
                        if PARTS == 2:
                            x1 = x.slice(BN, BN, dim=0).permute((1, 0))
                            acc1 = warpgroup_mma(w, x1, acc1, is_async=True)
                            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
                        else:
                            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
                        mbarrier.arrive(w_empty.index(w_slot), count=1)
                        w_item += 1
                    mbarrier.arrive(x_empty.index(x_slot), count=1)
                    x_item += 1
        _store(acc0, bias, y_desc, y_s.index(g), m * BM, strip * 64, active, ACTIVATION)
        if PARTS == 2:
            _store(acc1, bias, y_desc, y_s.index(g), m * BM + BN, strip * 64, active, ACTIVATION)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "groups", "rows", "columns", "nnz"])
def bsr_linear_strips(
    x_desc,
    w_desc,
    y_desc,
    bias_ptr,
    crow_ptr,
    col_ptr,
    tiles,
    groups,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    X_SLOTS: gl.constexpr,
    W_SLOTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """y = act(x @ W.T + bias) for strips of 64 outputs; see the module's docstring.

    x_desc [BM, BK] boxes of x (M, K); w_desc [64 / STACK, BK] boxes of the values as an
    (nnz * r, c) matrix; y_desc [tokens of one accumulator, 64] boxes of y (M, N).
    """
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BK: gl.constexpr = x_desc.block_type.shape[1]
    PART: gl.constexpr = w_desc.block_type.shape[0]
    BN: gl.constexpr = y_desc.block_type.shape[0]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [X_SLOTS, BM, BK], x_desc.layout)
    w_s = gl.allocate_shared_memory(
        w_desc.dtype, [GROUP * W_SLOTS * STACK, PART, BK], w_desc.layout
    )
    y_s = gl.allocate_shared_memory(y_desc.dtype, [GROUP, BN, 64], y_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], bar)
    x_empty = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], bar)
    w_full = gl.allocate_shared_memory(gl.int64, [GROUP * W_SLOTS, 1], bar)
    w_empty = gl.allocate_shared_memory(gl.int64, [GROUP * W_SLOTS, 1], bar)
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=GROUP)
    for i in gl.static_range(GROUP * W_SLOTS):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=1)
    fence_async_shared()

    if GROUP == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        y_desc,
                        bias_ptr,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        w_s,
                        y_s,
                        x_full,
                        x_empty,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                        HAS_BIAS,
                        ACTIVATION,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        y_desc,
                        bias_ptr,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        w_s,
                        y_s,
                        x_full,
                        x_empty,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                        HAS_BIAS,
                        ACTIVATION,
                    ),
                ),
                (
                    _stream_x,
                    (
                        x_desc,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        x_full,
                        x_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
                (
                    _stream_blocks,
                    (
                        0,
                        w_desc,
                        crow_ptr,
                        col_ptr,
                        w_s,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
                (
                    _stream_blocks,
                    (
                        1,
                        w_desc,
                        crow_ptr,
                        col_ptr,
                        w_s,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
            ],
            [4, 1, 1, 1],
            [REGISTERS, 32, 32, 32],
        )
    else:
        gl.static_assert(GROUP == 3)
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        y_desc,
                        bias_ptr,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        w_s,
                        y_s,
                        x_full,
                        x_empty,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                        HAS_BIAS,
                        ACTIVATION,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        y_desc,
                        bias_ptr,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        w_s,
                        y_s,
                        x_full,
                        x_empty,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                        HAS_BIAS,
                        ACTIVATION,
                    ),
                ),
                (
                    _consume,
                    (
                        2,
                        y_desc,
                        bias_ptr,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        w_s,
                        y_s,
                        x_full,
                        x_empty,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                        HAS_BIAS,
                        ACTIVATION,
                    ),
                ),
                (
                    _stream_x,
                    (
                        x_desc,
                        crow_ptr,
                        col_ptr,
                        x_s,
                        x_full,
                        x_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
                (
                    _stream_blocks,
                    (
                        0,
                        w_desc,
                        crow_ptr,
                        col_ptr,
                        w_s,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
                (
                    _stream_blocks,
                    (
                        1,
                        w_desc,
                        crow_ptr,
                        col_ptr,
                        w_s,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
                (
                    _stream_blocks,
                    (
                        2,
                        w_desc,
                        crow_ptr,
                        col_ptr,
                        w_s,
                        w_full,
                        w_empty,
                        tiles,
                        groups,
                        rows,
                        columns,
                        nnz,
                        GROUP,
                        STACK,
                        SPLIT,
                        CHUNKS,
                    ),
                ),
            ],
            [4, 4, 1, 1, 1, 1],
            [REGISTERS, REGISTERS, 32, 32, 32, 32],
        )
