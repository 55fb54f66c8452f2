"""Gluon kernels for Hopper: y = act(x @ W.T + b) with W in BSR.

Dimension legend: M tokens, N out, K in; r x c block size, R x C block grid.

One persistent, warp-specialised kernel. What limits a block-sparse linear on this chip is, in this
order, memory traffic for x and y, L2-to-SM traffic (every stored block needs its slice of x again),
and shared-memory bandwidth for the operands of wgmma. The kernel deals with them like this:

* A program owns a tile of BM tokens x GROUP "strips" of 64 outputs. A slice of x is copied once for
  all strips of the tile that have a block in that column, so x crosses the L2-SM link less often.
  Which strips those are the plan may choose: block rows that share columns share slices.
* The product is computed transposed, y.T = W @ x.T: 64 outputs are the M side of wgmma and up to
  256 tokens its N side. Such an instruction reads far less shared memory for the same arithmetic
  than 64 tokens x 64 outputs would.
* Each strip has its own consumer warpgroup. One warp streams x and one warp for each strip streams
  the strip's blocks, by TMA, through rings of shared memory that run ahead across tile borders: the
  loads of the next tile overlap with the output of this one.
* Blocks with fewer than 64 rows are stacked: a strip then holds several block rows, and its column
  set is their union. An absent block is an out-of-bounds TMA box, which the hardware fills with zeros
  without touching memory (or, where blocks travel packed, zeros in registers).
* TMA copies rows of up to 128 bytes at a rate that hardly depends on their width, so slices of x are
  always 128 bytes wide, whatever the block. Narrow blocks would be many short rows: they travel as
  contiguous memory ("packed", through registers), or the strip's warp copies them itself, 16 bytes a
  thread, with cp.async ("copied").
* Where x is more than the L2 cache holds, two programs form a cluster: each has tokens of its own,
  and the first copies every block into the shared memory of both (multicast). To Triton a pair is one
  program, whose x, accumulators and y both halves of the cluster share out.
* float32 is three TF32 products: x as the tensor cores read it (they ignore the lower bits), what
  they ignore of it, which one more warpgroup writes beside it, and a block split in registers.

All warps derive the same sequence of columns from one table of bit masks (64 columns each) in shared
memory, so nothing but the rings' barriers passes between them (and the tiles, where those are drawn
from a counter because they differ too much to be dealt out). Indices are never trusted with an
address: row pointers are clamped to the stored blocks, columns outside the grid are dropped, and
TMA clips whatever is left.
"""

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["CLUSTERS", "bsr_linear_strips"]

# Names that changed on the way from Triton 3.6 to 3.9.
_tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_async_load = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)
_tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_cluster_barrier = getattr(getattr(hopper, "cluster", None), "barrier", None)
# Whether two programs can share what they copy: since Triton 3.8.
CLUSTERS = _cluster_barrier is not None and "multicast" in inspect.signature(_tma_load).parameters
_REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


# Drawn tiles that warps may be apart.
T_SLOTS = gl.constexpr(4)
# Where a pair's numbers are in the counter's memory: eight for each pair, after the counter and what shares its sector.
PAIR_NUMBERS = gl.constexpr(8)


@gluon.constexpr_function
def _line_layout(warps, programs):
    """Of a vector, one element a thread. Each program of a pair has all of it."""
    return gl.BlockedLayout([1], [32], [warps], [0], cga_layout=[[0]] * (programs - 1))


@gluon.constexpr_function
def _product_layout(tokens, step, programs):
    """Of an accumulator: 64 outputs of `tokens` tokens, of which each program of a pair has half."""
    shares = [[0, 1]] * (programs - 1)
    shape = [16, tokens // programs, step]
    return gl.NVMMADistributedLayout([3, 0], [4, 1], shape, cga_layout=shares)


@gluon.constexpr_function
def _barrier_layout(programs, own):
    """Of barriers: each program of a pair has its own, or one is for both, who arrive at it, and the first waits.

    Of other memory the latter is a copy for each program.
    """
    return mbarrier.MBarrierLayout([[int(own)]] * (programs - 1))


@gluon.jit
def _popcount(bits):
    return gl.inline_asm_elementwise(
        "popc.b64 $0, $1;", "=r,l", [bits], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _block_row(strip, s: gl.constexpr, STACK: gl.constexpr, SPLIT: gl.constexpr):
    """The place of block row number s of a strip: STACK block rows a strip, or SPLIT strips a block row."""
    if STACK > 1:
        row = strip * STACK + s
    else:
        row = strip // SPLIT
    return row


@gluon.jit
def _row_at(order_ptr, place, rows, HAS_ORDER: gl.constexpr):
    """The block row in a place of the order in which they are worked on."""
    row = place
    if HAS_ORDER:
        # Clamped: a bad order may give wrong numbers, never a wild access.
        row = gl.load(order_ptr + gl.minimum(place, rows - 1))
        row = gl.minimum(gl.maximum(row, 0), rows - 1)
    return row


@gluon.jit
def _reinterpreted(memory, dtype: gl.constexpr, shape: gl.constexpr):
    if _REINTERPRET_IS_PUBLIC:
        return memory.reinterpret(dtype, shape, memory.layout)
    else:
        return memory._reinterpret(dtype, shape, memory.layout)


@gluon.jit
def _fill_table(
    table, order_ptr, crow_ptr, col_ptr, rows, columns, nnz, windows, HAS_ORDER: gl.constexpr
):
    """Write the column masks of all block rows, 64 block columns a mask, to shared memory.

    Entry place * windows + w has bit j set when the block row in that place of the order has a block
    in block column 64 w + j. One thread makes one mask.
    """
    layout: gl.constexpr = _line_layout(4, gl.num_ctas())
    masks = _reinterpreted(table, gl.int64, [table.shape[0] // 128, 128])
    zero = gl.full([128], 0, gl.int64, layout)
    for start in range(0, rows * windows, 128):
        entry = start + gl.arange(0, 128, layout=layout)
        place = entry // windows
        base = (entry % windows) * 64
        row = _row_at(order_ptr, place, rows, HAS_ORDER)
        first = gl.load(crow_ptr + row, mask=place < rows, other=0)
        end = gl.load(crow_ptr + row + 1, mask=place < rows, other=0)
        first = gl.minimum(gl.maximum(first, 0), nnz)
        count = gl.minimum(gl.maximum(end, first), nnz) - first
        bits = zero
        for some in range(0, gl.max(count, axis=0), 8):
            # Eight loads in flight: every program waits for the table.
            for u in gl.static_range(8):
                i = some + u
                column = gl.load(col_ptr + first + i, mask=i < count, other=-1)
                inside = (column >= base) & (column < base + 64) & (column < columns)
                shift = gl.where(inside, column - base, 0).to(gl.int64)
                bits |= gl.where(inside, (zero + 1) << shift, zero)
        masks.index(start // 128).store(bits)


@gluon.jit
def _number(entry):
    """The number in one entry of shared memory."""
    layout: gl.constexpr = _line_layout(gl.num_warps(), gl.num_ctas())
    return gl.sum(entry.load(layout), axis=0)


@gluon.jit
def _row_bits(table, row, rows, window, windows):
    """The mask of one block row; 0 for a row past the end."""
    bits = _number(table.index(gl.minimum(row, rows - 1) * windows + window))
    return gl.where(row < rows, bits, 0)


@gluon.jit
def _strip_bits(table, strip, rows, window, windows, STACK: gl.constexpr, SPLIT: gl.constexpr):
    """The columns of a window in which any block row of the strip has a block."""
    bits = _row_bits(table, _block_row(strip, 0, STACK, SPLIT), rows, window, windows)
    for s in gl.static_range(1, STACK):
        bits |= _row_bits(table, _block_row(strip, s, STACK, SPLIT), rows, window, windows)
    return bits


@gluon.jit
def _group_slices(
    table,
    group,
    rows,
    window,
    windows,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    WIDE: gl.constexpr,
):
    """The slices of x that a group needs; a slice spans WIDE columns, its bit is the lowest's."""
    bits = _strip_bits(table, group * GROUP, rows, window, windows, STACK, SPLIT)
    for g in gl.static_range(1, GROUP):
        bits |= _strip_bits(table, group * GROUP + g, rows, window, windows, STACK, SPLIT)
    if WIDE == 2:
        bits = (bits | (bits >> 1)) & 0x5555555555555555
    if WIDE == 4:
        bits = bits | (bits >> 1)
        bits = (bits | (bits >> 2)) & 0x1111111111111111
    return bits


@gluon.jit
def _first_block(
    crow_ptr, order_ptr, table, place, rows, nnz, window, windows, HAS_ORDER: gl.constexpr
):
    """Where the row's first block of a window is stored: row start + blocks of earlier windows."""
    row = _row_at(order_ptr, gl.minimum(place, rows - 1), rows, HAS_ORDER)
    position = gl.load(crow_ptr + row)
    position = gl.minimum(gl.maximum(position, 0), nnz)
    for earlier in range(window):
        position += _popcount(_row_bits(table, place, rows, earlier, windows))
    return position


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot of a ring after this one and the phase of its barriers, which turns with every round."""
    slot += 1
    around = slot == SLOTS
    return gl.where(around, 0, slot), gl.where(around, phase ^ 1, phase)


@gluon.jit
def _tile(
    t, tiles, halves, groups, turn, BM: gl.constexpr, DYNAMIC: gl.constexpr, HALVES: gl.constexpr
):
    """Tile t: its first token, its group, and whether it is half a tile.

    Groups fastest, so that programs find x in the L2 cache. The last `halves` are halves of tiles.
    """
    half = False
    second = 0
    if HALVES:
        v = t - (tiles - halves)
        half = v >= 0
        t = gl.where(half, tiles - halves + v // 2, t)
        second = gl.where(half, v % 2, 0)
        tiles -= halves // 2
    m = t // groups
    if DYNAMIC:
        # The last `turn` token tiles group by group: in the plan's order, what is drawn last takes least.
        m_tiles = tiles // groups
        tail = gl.minimum(m_tiles, turn)
        u = t - (m_tiles - tail) * groups
        last = u >= 0
        m = gl.where(last, m_tiles - tail + u % tail, m)
        group = gl.where(last, u // tail, t % groups)
    else:
        # Shifted after every `turn` token tiles, so that each program meets all.
        group = (t + m // turn) % groups
        if HALVES:
            # Few tiles a program. Where groups divide the programs these are of groups that follow each other: a long
            # one, then a short one.
            group = gl.where(group % 2 == 0, group // 2, groups - 1 - group // 2)
    return m * BM + second * (BM // 2), group, half


@gluon.jit
def _draw(schedule, n, DYNAMIC: gl.constexpr):
    """Draw the number of this program's next tile. For a warp alone: lane 0 gets it, and nobody waits for it yet.

    The launch may overlap the zeroing of the counter (hopper.py). Every program waits for that here, before it reads x;
    later waits take no time.

    For a pair the first program draws its `n`-th number and leaves it where both find it, plus 1 because 0 was there.
    It waits for the number, while the slices of x on their way keep the tensor cores busy.
    """
    number = 0
    if DYNAMIC and gl.num_ctas() == 1:
        number = gl.inline_asm_elementwise(
            """{
                .reg .pred first;
                .reg .u32 lane;
                mov.u32 lane, %laneid;
                setp.eq.u32 first, lane, 0;
                mov.u32 $0, 0;
                griddepcontrol.wait;
                @first atom.global.add.u32 $0, [$1], 1;
            }""",
            "=r,l",
            [schedule[0]],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    elif DYNAMIC:
        number = gl.inline_asm_elementwise(
            """{
                .reg .pred first;
                .reg .u32 lane, rank;
                mov.u32 lane, %laneid;
                mov.u32 rank, %cluster_ctarank;
                or.b32 lane, lane, rank;
                setp.eq.u32 first, lane, 0;
                mov.u32 $0, 0;
                griddepcontrol.wait;
                @first atom.global.add.u32 $0, [$1], 1;
                add.u32 $0, $0, 1;
                @first st.relaxed.gpu.global.u32 [$2], $0;
            }""",
            "=&r,l,l",
            [schedule[0], _numbers_of_pair(schedule, n)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    return number


@gluon.jit
def _numbers_of_pair(schedule, n):
    """Where the first program of a pair leaves its n-th number.

    Before it draws one it has handed out the one before, for which both programs must have taken the one T_SLOTS
    earlier. So the other program may still have to read T_SLOTS numbers, and the next one goes elsewhere.
    """
    gl.static_assert(PAIR_NUMBERS > T_SLOTS)
    return schedule[0] + PAIR_NUMBERS * (1 + gl.program_id(0)) + n % PAIR_NUMBERS


@gluon.jit
def _hand_out(schedule, t, number, last, n, slot, phase, DYNAMIC: gl.constexpr):
    """The program's tile after t: the one that was drawn, told to the other warps, or a fixed one.

    Returns it and, for a pair, what `last` is next time: the number it left, higher than all before.
    """
    following = t + gl.num_programs(0)
    if DYNAMIC:
        _counter_ptr, t_s, t_full, t_empty, t_pair = schedule
        layout: gl.constexpr = _line_layout(gl.num_warps(), gl.num_ctas())
        if gl.num_ctas() == 1:
            number = gl.inline_asm_elementwise(
                "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
                "=r,r",
                [number],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            last = gl.inline_asm_elementwise(
                """{
                    .reg .pred more;
                    again:
                    ld.relaxed.gpu.global.u32 $0, [$1];
                    setp.le.s32 more, $0, $2;
                    @more bra again;
                }""",
                "=&r,l,r",
                [_numbers_of_pair(schedule, n), last],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )
            number = last - 1
            mbarrier.wait(t_pair.index(slot), phase ^ 1)
        following = gl.num_programs(0) + number
        mbarrier.wait(t_empty.index(slot), phase ^ 1)
        t_s.index(slot).store(gl.full([1], 0, gl.int64, layout) + following)
        mbarrier.arrive(t_full.index(slot), count=1)
    return following, last


@gluon.jit
def _take(schedule, t, slot, phase, DYNAMIC: gl.constexpr):
    """The tile after t, as _hand_out told."""
    following = t + gl.num_programs(0)
    if DYNAMIC:
        _counter_ptr, t_s, t_full, t_empty, t_pair = schedule
        mbarrier.wait(t_full.index(slot), phase)
        following = _number(t_s.index(slot)).to(gl.int32)
        mbarrier.arrive(t_empty.index(slot), count=1)
        if gl.num_ctas() == 2:
            mbarrier.arrive(t_pair.index(slot), count=1)
    return following


@gluon.jit
def _stream_x(
    x_desc,
    table,
    x_ring,
    sizes,
    schedule,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    WIDE: gl.constexpr,
    DYNAMIC: gl.constexpr,
    HALVES: gl.constexpr,
):
    x_s, x_full, x_empty, _low_s, _low_full = x_ring
    tiles, halves, groups, turn, rows, windows, _nnz = sizes
    SLOTS: gl.constexpr = x_s.shape[0]
    BM: gl.constexpr = x_s.shape[1]
    BK: gl.constexpr = x_s.shape[2]
    slot = 0
    phase = 0
    t = gl.program_id(0)
    t_slot = 0
    t_phase = 0
    n = 0
    last = 0
    while t < tiles:
        m, group, half = _tile(t, tiles, halves, groups, turn, BM, DYNAMIC, HALVES)
        number = _draw(schedule, n, DYNAMIC)
        for window in range(windows):
            slices = _group_slices(table, group, rows, window, windows, GROUP, STACK, SPLIT, WIDE)
            for h in range(CHUNKS):
                todo = slices
                for _ in range(_popcount(slices)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    column = window * 64 + _popcount(low - 1)
                    mbarrier.wait(x_empty.index(slot), phase ^ 1)
                    full = x_full.index(slot)
                    k = (column // WIDE * CHUNKS + h) * BK
                    if HALVES:
                        if half:
                            mbarrier.expect(full, x_desc.block_type.nbytes)
                        else:
                            mbarrier.expect(full, 2 * x_desc.block_type.nbytes)
                            x = x_s.index(slot).slice(BM // 2, BM // 2, dim=0)
                            _tma_load(x_desc, [m + BM // 2, k], full, x)
                        x = x_s.index(slot).slice(0, BM // 2, dim=0)
                        _tma_load(x_desc, [m, k], full, x)
                    else:
                        mbarrier.expect(full, x_desc.block_type.nbytes // gl.num_ctas())
                        _tma_load(x_desc, [m, k], full, x_s.index(slot))
                    slot, phase = _next(slot, phase, SLOTS)
        t, last = _hand_out(schedule, t, number, last, n, t_slot, t_phase, DYNAMIC)
        t_slot, t_phase = _next(t_slot, t_phase, T_SLOTS)
        n += 1


@gluon.jit
def _copy_block(
    w_desc,
    w_ptr,
    inner,
    bits,
    low,
    first,
    nnz,
    part,
    h,
    full,
    dst,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    PACKED: gl.constexpr,
    COPIED: gl.constexpr,
):
    """Copy the part of a block row's block in column `low` that lies in the strip."""
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    position = first + _popcount(bits & (low - 1))
    present = (bits & low) != 0
    if COPIED:
        # Zeros for an absent block, which is not read. The caller arrives at the barrier.
        start = (position.to(gl.int64) * SPLIT + part) * (BOX * BK * CHUNKS) + h * BK
        _async_load(dst, w_ptr + start + inner, mask=present)
    elif PACKED:
        # One arrival for each block row of the strip, with or without data.
        if present:
            mbarrier.expect(full, w_desc.block_type.nbytes)
            _tma_load(w_desc, [(position * SPLIT + part) * BOX, 0], full, dst)
        else:
            mbarrier.arrive(full, count=1)
    else:
        # An absent block is a box past the end of the values: TMA writes zeros.
        position = gl.where(present, position, nnz)
        mbarrier.expect(full, w_desc.block_type.nbytes)
        if gl.num_ctas() == 2:
            # The first program copies for both; each has said what it expects.
            _tma_load(w_desc, [(position * SPLIT + part) * BOX, h * BK], full, dst, multicast=True)
        else:
            _tma_load(w_desc, [(position * SPLIT + part) * BOX, h * BK], full, dst)


@gluon.jit
def _stream_blocks(
    g: gl.constexpr,
    w_desc,
    w_ptr,
    crow_ptr,
    order_ptr,
    table,
    w_ring,
    sizes,
    schedule,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    PACKED: gl.constexpr,
    COPIED: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    DYNAMIC: gl.constexpr,
    HALVES: gl.constexpr,
):
    w_s, w_full, w_empty, w_pair = w_ring
    tiles, halves, groups, turn, rows, windows, nnz = sizes
    SLOTS: gl.constexpr = w_s.shape[0] // GROUP
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    inner = 0
    if COPIED:
        # Where each thread's 16 bytes lie in a block.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [1, 1], [1, 0])
        i = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout))
        k = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
        inner = i[:, None] * (BK * CHUNKS) + k[None, :]
    slot = 0
    phase = 0
    t = gl.program_id(0)
    t_slot = 0
    t_phase = 0
    while t < tiles:
        # Blocks are the same for all tokens, whatever their number.
        _m, group, _half = _tile(t, tiles, halves, groups, turn, 0, DYNAMIC, HALVES)
        strip = group * GROUP + g
        part = strip % SPLIT
        for window in range(windows):
            row = _block_row(strip, 0, STACK, SPLIT)
            bits0 = _row_bits(table, row, rows, window, windows)
            next0 = _first_block(
                crow_ptr, order_ptr, table, row, rows, nnz, window, windows, HAS_ORDER
            )
            bits1 = bits0
            next1 = next0
            bits2 = bits0
            next2 = next0
            bits3 = bits0
            next3 = next0
            mine = bits0
            if STACK > 1:
                bits1 = _row_bits(table, row + 1, rows, window, windows)
                next1 = _first_block(
                    crow_ptr, order_ptr, table, row + 1, rows, nnz, window, windows, HAS_ORDER
                )
                mine = mine | bits1
            if STACK > 2:
                bits2 = _row_bits(table, row + 2, rows, window, windows)
                next2 = _first_block(
                    crow_ptr, order_ptr, table, row + 2, rows, nnz, window, windows, HAS_ORDER
                )
                bits3 = _row_bits(table, row + 3, rows, window, windows)
                next3 = _first_block(
                    crow_ptr, order_ptr, table, row + 3, rows, nnz, window, windows, HAS_ORDER
                )
                mine = mine | bits2 | bits3
            for h in range(CHUNKS):
                todo = mine
                for _ in range(_popcount(mine)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    mbarrier.wait(w_empty.index(g * SLOTS + slot), phase ^ 1)
                    if gl.num_ctas() == 2:
                        mbarrier.wait(w_pair.index(g * SLOTS + slot), phase ^ 1)
                    full = w_full.index(g * SLOTS + slot)
                    w = w_s.index(g * SLOTS + slot)
                    _copy_block(
                        w_desc,
                        w_ptr,
                        inner,
                        bits0,
                        low,
                        next0,
                        nnz,
                        part,
                        h,
                        full,
                        w.slice(0 * BOX, BOX, dim=0),
                        SPLIT,
                        CHUNKS,
                        PACKED,
                        COPIED,
                    )
                    if STACK > 1:
                        _copy_block(
                            w_desc,
                            w_ptr,
                            inner,
                            bits1,
                            low,
                            next1,
                            nnz,
                            part,
                            h,
                            full,
                            w.slice(1 * BOX, BOX, dim=0),
                            SPLIT,
                            CHUNKS,
                            PACKED,
                            COPIED,
                        )
                    if STACK > 2:
                        _copy_block(
                            w_desc,
                            w_ptr,
                            inner,
                            bits2,
                            low,
                            next2,
                            nnz,
                            part,
                            h,
                            full,
                            w.slice(2 * BOX, BOX, dim=0),
                            SPLIT,
                            CHUNKS,
                            PACKED,
                            COPIED,
                        )
                        _copy_block(
                            w_desc,
                            w_ptr,
                            inner,
                            bits3,
                            low,
                            next3,
                            nnz,
                            part,
                            h,
                            full,
                            w.slice(3 * BOX, BOX, dim=0),
                            SPLIT,
                            CHUNKS,
                            PACKED,
                            COPIED,
                        )
                    if COPIED:
                        async_copy.mbarrier_arrive(full, increment_count=False)
                    slot, phase = _next(slot, phase, SLOTS)
        t = _take(schedule, t, t_slot, t_phase, DYNAMIC)
        t_slot, t_phase = _next(t_slot, t_phase, T_SLOTS)


@gluon.jit
def _reciprocal(z):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _exp2(z):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _positive(z):
    """max(z, 0), and NaN for NaN."""
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _activate(z, FLOAT32: gl.constexpr, ACTIVATION: gl.constexpr):
    if ACTIVATION == "relu":
        z = _positive(z)
    elif ACTIVATION == "gelu":
        # z Phi(z) = max(z, 0) - |z| Phi(-|z|), and the tail Phi(-a) = 2^q(a) with q a minimax polynomial: one
        # special function and a dozen additions and multiplications, which is what limits this epilogue.
        a = gl.minimum(gl.abs(z), 16.0)  # infinity times a tail of 0 would be NaN
        if FLOAT32:
            # Relative error below 4e-7 down to z = -1, absolute error below 3e-7; the tail of 0 is 1 / 2 exactly.
            q = -0.00013710233907 + a * (
                -0.00018610797998 + a * (3.936191933e-05 + a * -2.833563258e-06)
            )
            q = -0.0524963065982 + a * (0.0070636225864 + a * q)
            q = -1.0 + a * (-1.15110516548 + a * (-0.459208160639 + a * q))
        else:
            # Relative error below 4e-4 down to z = -1, 3e-3 down to -4, absolute error below 6e-5: less than half a
            # unit in the last place of the result, or than what half a unit of z makes of it, in float16 as in
            # bfloat16. A term more costs 3072 x 768 in bfloat16 5 % of its time.
            q = -0.4779005317 + a * (-0.0376014026 + a * 0.0026371515)
            q = -1.0005491601 + a * (-1.1430988875 + a * q)
        if FLOAT32:
            # The positive part as z / 2 + |z| / 2: of minus infinity that is NaN, as torch has it. In 16 bits, where a
            # multiplication more may be seen in the time, minus infinity gives 0.
            positive = 0.5 * z
            positive += gl.abs(positive)
        else:
            positive = _positive(z)
        z = positive - a * _exp2(q)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 z (1 + tanh(u)) = z / (1 + 2^(-2 log2(e) u)), u = sqrt(2 / pi) (z + 0.044715 z^3)
        u = z * (-2.3022081985 - 0.10294323960 * (z * z))
        z = z * _reciprocal(1.0 + _exp2(u))
    elif ACTIVATION == "silu":
        z = z * _reciprocal(1.0 + _exp2(-1.4426950408889634 * z))
    return z


@gluon.jit
def _activate_in_place(y_s, ACTIVATION: gl.constexpr):
    """The activation of float32 in shared memory, in a loop over a few tokens at a time.

    Unrolled over an accumulator it is thousands of instructions that run once a tile, and measured
    several times as long as their arithmetic takes. The few of a loop run again and again.
    """
    ROWS: gl.constexpr = 64
    PARTS: gl.constexpr = y_s.shape[0] * y_s.shape[1] // (ROWS * 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    # 128 bytes are what a row of the layout is wide: the left halves of all tokens, then the right.
    parts = _reinterpreted(y_s, gl.float32, [PARTS, ROWS, 32])
    _barrier()
    for i in range(PARTS):
        part = parts.index(i)
        part.store(_activate(part.load(layout), True, ACTIVATION))
    fence_async_shared()
    _barrier()


@gluon.jit
def _store(acc, bias, y_desc, y_s, row, features, BUFFERS: gl.constexpr, ACTIVATION: gl.constexpr):
    """Send act(acc + bias) to y by way of y_s, once BUFFERS - 1 others at most are being read.

    They go to y as one piece of 64 outputs, or as two of 32 that lie apart.
    """
    FLOAT32: gl.constexpr = y_desc.dtype.primitive_bitwidth == 32
    BN: gl.constexpr = acc.shape[1]
    WIDTH: gl.constexpr = y_s.shape[1]
    PIECES: gl.constexpr = 64 // WIDTH
    gl.static_assert(PIECES <= 2)
    LATER: gl.constexpr = FLOAT32 and ACTIVATION != "none" and ACTIVATION != "relu"
    out = acc + bias[:, None]
    if not LATER:
        out = _activate(out, FLOAT32, ACTIVATION).to(y_desc.dtype)
    tma.store_wait((BUFFERS - 1) * PIECES)
    if PIECES == 1:
        y_s.permute((1, 0)).store(out)
    else:
        y_s.store(out.reshape([PIECES, WIDTH, BN]).permute((0, 2, 1)).reshape([PIECES * BN, WIDTH]))
    if LATER:
        _activate_in_place(y_s, ACTIVATION)
    else:
        fence_async_shared()
    if PIECES == 1:
        _tma_store(y_desc, [row, features[0]], y_s)
    else:
        _tma_store(y_desc, [row, features[0]], y_s.slice(0, BN, dim=0))
        _tma_store(y_desc, [row, features[1]], y_s.slice(BN, BN, dim=0))


@gluon.jit
def _product(w, x, acc0, acc1, half, BN: gl.constexpr, PARTS: gl.constexpr):
    """Add w @ x.T to the accumulators of a tile's tokens, or of its first half, and wait for it."""
    x0 = x
    if PARTS == 2:
        x0 = x.slice(0, BN, dim=0)
    x0 = x0.permute((1, 0))
    if half:
        acc0 = warpgroup_mma(w, x0, acc0, is_async=True)
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))
    else:
        acc0 = warpgroup_mma(w, x0, acc0, is_async=True)
        if PARTS == 2:
            x1 = x.slice(BN, BN, dim=0).permute((1, 0))
            acc1 = warpgroup_mma(w, x1, acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
    return acc0, acc1


@gluon.jit
def _round_tf32(z):
    """z rounded to the 11 significant bits that a TF32 product reads. Of NaN, NaN or -0 is left."""
    bits = (z.to(gl.int32, bitcast=True) + 0x1000) & -0x2000
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _tf32_parts(z):
    """z as the sum of two TF32 numbers, up to 2^-24 of it."""
    high = gl.where(z == z, _round_tf32(z), z)
    low = z - high
    # Infinities have no low part.
    low = gl.where(low == low, low, 0.0)
    return high, _round_tf32(low)


@gluon.jit
def _tf32_rest(z):
    """What a TF32 product of z leaves out, as a TF32 number: it reads 11 significant bits and ignores the others.

    0 for infinity and NaN: their difference is the NaN 0x7fffffff, which rounds to -0.
    """
    high = (z.to(gl.int32, bitcast=True) & -0x2000).to(gl.float32, bitcast=True)
    return _round_tf32(z - high)


@gluon.jit
def _split_x(
    table,
    x_ring,
    sizes,
    schedule,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    WIDE: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """Write the low part of every slice of x beside it; as it is, it serves as the high part."""
    x_s, x_full, _x_empty, low_s, low_full = x_ring
    tiles, halves, groups, turn, rows, windows, _nnz = sizes
    SLOTS: gl.constexpr = x_s.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    slot = 0
    phase = 0
    t = gl.program_id(0)
    t_slot = 0
    t_phase = 0
    while t < tiles:
        _m, group, _half = _tile(t, tiles, halves, groups, turn, x_s.shape[1], DYNAMIC, False)
        for window in range(windows):
            todo = _group_slices(table, group, rows, window, windows, GROUP, STACK, SPLIT, WIDE)
            for _ in range(_popcount(todo) * CHUNKS):
                # A full slot has a free low part: the consumer gives both back together.
                mbarrier.wait(x_full.index(slot), phase)
                for part in gl.static_range(x_s.shape[1] // 64):
                    x = x_s.index(slot).slice(part * 64, 64, dim=0)
                    low_s.index(slot).slice(part * 64, 64, dim=0).store(_tf32_rest(x.load(layout)))
                fence_async_shared()
                mbarrier.arrive(low_full.index(slot), count=1)
                slot, phase = _next(slot, phase, SLOTS)
        t = _take(schedule, t, t_slot, t_phase, DYNAMIC)
        t_slot, t_phase = _next(t_slot, t_phase, T_SLOTS)


@gluon.jit
def _features(
    strip,
    bias_ptr,
    order_ptr,
    rows,
    lanes: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    PIECES: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Where the one or two pieces of a strip start among the outputs, and the bias of its 64 outputs."""
    place = _block_row(strip, 0, STACK, SPLIT)
    HEIGHT: gl.constexpr = 64 * SPLIT // STACK  # of a block
    first = _row_at(order_ptr, place, rows, HAS_ORDER) * HEIGHT + strip % SPLIT * 64
    second = first
    if PIECES == 2:
        second = _row_at(order_ptr, place + 1, rows, HAS_ORDER) * HEIGHT
    bias = gl.zeros([64], gl.float32, lanes)
    if HAS_BIAS:
        i = gl.arange(0, 64, layout=lanes)
        feature = first + i
        if PIECES == 2:
            feature = gl.where(i < 32, feature, second - 32 + i)
        bias = gl.load(bias_ptr + feature, mask=feature < rows * HEIGHT, other=0)
        bias = bias.to(gl.float32)
    return (first, second), bias


@gluon.jit
def _consume_exact(
    y_desc,
    bias_ptr,
    order_ptr,
    table,
    x_ring,
    w_ring,
    y_s,
    sizes,
    schedule,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """The products of one strip in float32 accuracy: three TF32 products a slice, the smallest first.

    The tensor cores truncate when they accumulate, so they sum one slice only; the slices are added
    in registers, with rounding.
    """
    x_s, x_full, x_empty, low_s, low_full = x_ring
    w_s, w_full, w_empty, _w_pair = w_ring
    tiles, halves, strips, turn, rows, windows, _nnz = sizes
    X_SLOTS: gl.constexpr = x_s.shape[0]
    W_SLOTS: gl.constexpr = w_s.shape[0]
    BM: gl.constexpr = x_s.shape[1]
    BN: gl.constexpr = BM // 2  # tokens of one accumulator
    PIECES: gl.constexpr = 64 // y_s.shape[2]
    BUFFERS: gl.constexpr = y_s.shape[0]
    gl.static_assert(BN * 64 == y_s.shape[1] * y_s.shape[2])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 8])
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 1)
    x_slot = 0
    x_phase = 0
    w_slot = 0
    w_phase = 0
    t = gl.program_id(0)
    t_slot = 0
    t_phase = 0
    while t < tiles:
        m, strip, _half = _tile(t, tiles, halves, strips, turn, BM, DYNAMIC, False)
        features, bias = _features(
            strip, bias_ptr, order_ptr, rows, lanes, STACK, SPLIT, PIECES, HAS_ORDER, HAS_BIAS
        )
        count = 0
        for window in range(windows):
            count += _popcount(_strip_bits(table, strip, rows, window, windows, STACK, SPLIT))
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        zeros = acc0
        for _ in range(count * CHUNKS):
            mbarrier.wait(w_full.index(w_slot), w_phase)
            w_high, w_low = _tf32_parts(w_s.index(w_slot).load(w_layout))
            fence_async_shared()
            mbarrier.arrive(w_empty.index(w_slot), count=1)
            w_slot, w_phase = _next(w_slot, w_phase, W_SLOTS)
            x = x_s.index(x_slot)
            x0 = x.slice(0, BN, dim=0).permute((1, 0))
            x1 = x.slice(BN, BN, dim=0).permute((1, 0))
            mbarrier.wait(x_full.index(x_slot), x_phase)
            part0 = warpgroup_mma(w_low, x0, zeros, use_acc=False, is_async=True)
            mbarrier.wait(low_full.index(x_slot), x_phase)
            x_low = low_s.index(x_slot)
            l0 = x_low.slice(0, BN, dim=0).permute((1, 0))
            l1 = x_low.slice(BN, BN, dim=0).permute((1, 0))
            part0 = warpgroup_mma(w_high, l0, part0, is_async=True)
            part0 = warpgroup_mma(w_high, x0, part0, is_async=True)
            part1 = warpgroup_mma(w_low, x1, zeros, use_acc=False, is_async=True)
            part1 = warpgroup_mma(w_high, l1, part1, is_async=True)
            part1 = warpgroup_mma(w_high, x1, part1, is_async=True)
            part0 = warpgroup_mma_wait(3, deps=(part0,))
            acc0 += part0
            part1 = warpgroup_mma_wait(0, deps=(part1,))
            mbarrier.arrive(x_empty.index(x_slot), count=1)
            acc1 += part1
            x_slot, x_phase = _next(x_slot, x_phase, X_SLOTS)
        # One copy of the code for both halves: unrolled, instructions arrive slower than they run.
        for half in range(2):
            acc = gl.where(half == 0, acc0, acc1)
            y = y_s.index(half % BUFFERS)
            _store(acc, bias, y_desc, y, m + half * BN, features, BUFFERS, ACTIVATION)
        t = _take(schedule, t, t_slot, t_phase, DYNAMIC)
        t_slot, t_phase = _next(t_slot, t_phase, T_SLOTS)
    tma.store_wait(0)


@gluon.jit
def _consume(
    g: gl.constexpr,
    y_desc,
    bias_ptr,
    order_ptr,
    table,
    x_ring,
    w_ring,
    y_s,
    sizes,
    schedule,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    WIDE: gl.constexpr,
    PACKED: gl.constexpr,
    COPIED: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DYNAMIC: gl.constexpr,
    HALVES: gl.constexpr,
):
    x_s, x_full, x_empty, _low_s, _low_full = x_ring
    w_s, w_full, w_empty, w_pair = w_ring
    tiles, halves, groups, turn, rows, windows, _nnz = sizes
    X_SLOTS: gl.constexpr = x_s.shape[0]
    BM: gl.constexpr = x_s.shape[1]
    W_SLOTS: gl.constexpr = w_s.shape[0] // GROUP
    BK: gl.constexpr = x_s.shape[2] // WIDE
    BN: gl.constexpr = y_s.shape[1] * y_s.shape[2] // 64  # tokens of one accumulator
    PARTS: gl.constexpr = BM // BN
    PIECES: gl.constexpr = 64 // y_s.shape[2]
    BUFFERS: gl.constexpr = y_s.shape[0] // GROUP
    # A half tile fills one buffer alone: two would get out of turn.
    gl.static_assert(not HALVES or BUFFERS == 1)
    # A pair's tokens are half the first program's and half the second's, and its blocks are both's.
    PROGRAMS: gl.constexpr = gl.num_ctas()
    gl.static_assert(PROGRAMS == 1 or (PARTS == 1 and STACK == 1 and not PACKED and not COPIED))
    STEP: gl.constexpr = 256 // x_s.dtype.primitive_bitwidth
    layout: gl.constexpr = _product_layout(BN, STEP, PROGRAMS)
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 32 // x_s.dtype.primitive_bitwidth)
    member = gl.arange(0, 64, layout=gl.SliceLayout(1, w_layout)) // (64 // STACK)
    x_slot = 0
    x_phase = 0
    w_slot = 0
    w_phase = 0
    strips = (rows * SPLIT + STACK - 1) // STACK
    t = gl.program_id(0)
    t_slot = 0
    t_phase = 0
    while t < tiles:
        m, group, half = _tile(t, tiles, halves, groups, turn, BM, DYNAMIC, HALVES)
        strip = group * GROUP + g
        active = strip < strips
        features, bias = _features(
            strip, bias_ptr, order_ptr, rows, lanes, STACK, SPLIT, PIECES, HAS_ORDER, HAS_BIAS
        )
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        for window in range(windows):
            row = _block_row(strip, 0, STACK, SPLIT)
            bits0 = _row_bits(table, row, rows, window, windows)
            bits1 = bits0
            bits2 = bits0
            bits3 = bits0
            mine = bits0
            if STACK > 1:
                bits1 = _row_bits(table, row + 1, rows, window, windows)
                mine = mine | bits1
            if STACK > 2:
                bits2 = _row_bits(table, row + 2, rows, window, windows)
                bits3 = _row_bits(table, row + 3, rows, window, windows)
                mine = mine | bits2 | bits3
            slices = _group_slices(table, group, rows, window, windows, GROUP, STACK, SPLIT, WIDE)
            for _h in range(CHUNKS):
                todo = slices
                for _ in range(_popcount(slices)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    mbarrier.wait(x_full.index(x_slot), x_phase)
                    for q in gl.static_range(WIDE):
                        column = _popcount(low - 1) + q
                        if ((mine >> column) & 1) != 0:
                            full = w_full.index(g * W_SLOTS + w_slot)
                            empty = w_empty.index(g * W_SLOTS + w_slot)
                            mbarrier.wait(full, w_phase)
                            w = w_s.index(g * W_SLOTS + w_slot)
                            x = x_s.index(x_slot)
                            if WIDE > 1:
                                x = x.slice(q * BK, BK, dim=1)
                            if PACKED:
                                # The block as it is stored, and zeros for the absent ones.
                                w = w.reshape([64, BK]).load(w_layout)
                                if STACK > 1:
                                    stored = ((bits0 >> column) & 1) | (
                                        ((bits1 >> column) & 1) << 1
                                    )
                                    if STACK > 2:
                                        stored |= ((bits2 >> column) & 1) << 2
                                        stored |= ((bits3 >> column) & 1) << 3
                                    keep = ((stored.to(gl.int32) >> member) & 1) != 0
                                    w = gl.where(keep[:, None], w, gl.zeros_like(w))
                                fence_async_shared()
                                mbarrier.arrive(empty, count=1)
                                acc0, acc1 = _product(w, x, acc0, acc1, half, BN, PARTS)
                            else:
                                # Copied blocks get no proxy fence, as in what Triton makes of a
                                # pipelined tl.dot: cp.async, its completion, wgmma. A fence for
                                # each product costs 16 x 16 blocks 6 %.
                                acc0, acc1 = _product(w, x, acc0, acc1, half, BN, PARTS)
                                mbarrier.arrive(empty, count=1)
                                if PROGRAMS == 2:
                                    mbarrier.arrive(w_pair.index(g * W_SLOTS + w_slot), count=1)
                            w_slot, w_phase = _next(w_slot, w_phase, W_SLOTS)
                    mbarrier.arrive(x_empty.index(x_slot), count=1)
                    x_slot, x_phase = _next(x_slot, x_phase, X_SLOTS)
        # A strip past the end leaves the buffers alone: it sends nothing that the next wait could count.
        if active:
            if COPIED and STACK == 4 and PARTS == 2 and not HALVES:
                # One copy of the code for both parts: there is so much of it that unrolled, instructions arrive slower
                # than they run. For other blocks, choosing the part takes longer.
                for part in range(2):
                    acc = gl.where(part == 0, acc0, acc1)
                    y = y_s.index(g * BUFFERS + part % BUFFERS)
                    _store(acc, bias, y_desc, y, m + part * BN, features, BUFFERS, ACTIVATION)
            else:
                y0 = y_s.index(g * BUFFERS)
                _store(acc0, bias, y_desc, y0, m, features, BUFFERS, ACTIVATION)
                if PARTS == 2:
                    if not half:
                        y1 = y_s.index(g * BUFFERS + BUFFERS - 1)
                        _store(acc1, bias, y_desc, y1, m + BN, features, BUFFERS, ACTIVATION)
        t = _take(schedule, t, t_slot, t_phase, DYNAMIC)
        t_slot, t_phase = _next(t_slot, t_phase, T_SLOTS)
    tma.store_wait(0)


# The parts of a plan start anywhere: one compiled kernel serves them all. `halves` and `turn` are 1 where
# they say nothing, which Triton makes a constant of: each parameter more, and each division, costs small blocks time.
@gluon.jit(
    do_not_specialize=["tiles", "groups", "rows", "columns", "nnz"],
    do_not_specialize_on_alignment=[
        *("bias_ptr", "crow_ptr", "col_ptr", "order_ptr", "counter_ptr"),
        *("halves", "turn"),
    ],
)
def bsr_linear_strips(
    x_desc,
    w_desc,
    y_desc,
    w_ptr,
    bias_ptr,
    crow_ptr,
    col_ptr,
    order_ptr,
    counter_ptr,
    tiles,
    halves,
    groups,
    turn,
    rows,
    columns,
    nnz,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNKS: gl.constexpr,
    WIDE: gl.constexpr,
    PACKED: gl.constexpr,
    COPIED: gl.constexpr,
    EXACT: gl.constexpr,
    TABLE: gl.constexpr,
    X_SLOTS: gl.constexpr,
    W_SLOTS: gl.constexpr,
    Y_SLOTS: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DYNAMIC: gl.constexpr,
    HALVES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """y = act(x @ W.T + bias) for strips of 64 outputs; see the module's docstring.

    x_desc [BM, WIDE * BK] boxes of x (M, K); w_desc [64 / STACK, BK] boxes of the values as an
    (nnz * r, c) matrix; y_desc [tokens of one accumulator, 64] boxes of y (M, N), or 32 outputs
    wide where the block rows of a strip lie apart; w_ptr the values.
    """
    BM: gl.constexpr = x_desc.block_type.shape[0] * (2 if HALVES else 1)
    XK: gl.constexpr = x_desc.block_type.shape[1]
    BN: gl.constexpr = y_desc.block_type.shape[0]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [X_SLOTS, BM, XK], x_desc.layout)
    w_s = gl.allocate_shared_memory(
        w_desc.dtype,
        [GROUP * W_SLOTS, STACK * w_desc.block_type.shape[0], w_desc.block_type.shape[1]],
        w_desc.layout,
    )
    WIDTH: gl.constexpr = y_desc.block_type.shape[1]
    y_s = gl.allocate_shared_memory(
        y_desc.dtype, [GROUP * Y_SLOTS, 64 // WIDTH * BN, WIDTH], y_desc.layout
    )
    PROGRAMS: gl.constexpr = gl.num_ctas()
    own: gl.constexpr = _barrier_layout(PROGRAMS, True)
    both: gl.constexpr = _barrier_layout(PROGRAMS, False)
    table = gl.allocate_shared_memory(gl.int64, [TABLE, 1], both)
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, PROGRAMS], own)
    x_empty = gl.allocate_shared_memory(gl.int64, [X_SLOTS, PROGRAMS], own)
    w_full = gl.allocate_shared_memory(gl.int64, [GROUP * W_SLOTS, PROGRAMS], own)
    w_empty = gl.allocate_shared_memory(gl.int64, [GROUP * W_SLOTS, PROGRAMS], own)
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=GROUP)
    for i in gl.static_range(GROUP * W_SLOTS):
        # Every thread of the copying warp arrives, or every box.
        mbarrier.init(w_full.index(i), count=32 if COPIED else STACK)
        mbarrier.init(w_empty.index(i), count=1)
    w_pair = w_empty  # only a pair's is used
    if PROGRAMS == 2:
        w_pair = gl.allocate_shared_memory(gl.int64, [GROUP * W_SLOTS, 1], both)
        for i in gl.static_range(GROUP * W_SLOTS):
            mbarrier.init(w_pair.index(i), count=1)
    fence_async_shared()
    windows = (columns + 63) // 64
    _fill_table(table, order_ptr, crow_ptr, col_ptr, rows, columns, nnz, windows, HAS_ORDER)

    low_s = x_s
    low_full = x_full
    if EXACT:
        low_s = gl.allocate_shared_memory(x_desc.dtype, [X_SLOTS, BM, XK], x_desc.layout)
        low_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, PROGRAMS], own)
        for i in gl.static_range(X_SLOTS):
            mbarrier.init(low_full.index(i), count=1)
        fence_async_shared()
    x_ring = (x_s, x_full, x_empty, low_s, low_full)
    w_ring = (w_s, w_full, w_empty, w_pair)
    sizes = (tiles, halves, groups, turn, rows, windows, nnz)
    t_s = x_full
    t_full = x_full
    t_empty = x_full
    t_pair = x_full  # only a pair's is used
    if DYNAMIC:
        t_s = gl.allocate_shared_memory(gl.int64, [T_SLOTS, 1], both)
        t_full = gl.allocate_shared_memory(gl.int64, [T_SLOTS, PROGRAMS], own)
        t_empty = gl.allocate_shared_memory(gl.int64, [T_SLOTS, PROGRAMS], own)
        for i in gl.static_range(T_SLOTS):
            mbarrier.init(t_full.index(i), count=1)
            mbarrier.init(t_empty.index(i), count=3 if EXACT else 2 * GROUP)
        if PROGRAMS == 2:
            t_pair = gl.allocate_shared_memory(gl.int64, [T_SLOTS, 1], both)
            for i in gl.static_range(T_SLOTS):
                mbarrier.init(t_pair.index(i), count=2 * GROUP)
        fence_async_shared()
    schedule = (counter_ptr, t_s, t_full, t_empty, t_pair)
    # Before either program of a pair arrives at the other's barriers, both must have made theirs: Triton sees to that.
    # The lists of arguments are written out: a tuple that a variable holds makes tensors of its constexprs.
    # fmt: off
    if EXACT:
        gl.static_assert(GROUP == 1 and not HALVES and PROGRAMS == 1)
        gl.warp_specialize(
            [
                (_consume_exact, (y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, STACK,
                                  SPLIT, CHUNKS, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC)),
                (_split_x, (table, x_ring, sizes, schedule, GROUP, STACK, SPLIT, CHUNKS, WIDE, DYNAMIC)),
                (_stream_x, (x_desc, table, x_ring, sizes, schedule, GROUP, STACK, SPLIT, CHUNKS, WIDE, DYNAMIC,
                             HALVES)),
                (_stream_blocks, (0, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
            ],
            [4, 1, 1],
            [REGISTERS, 24, 24],
        )
    elif GROUP == 2:
        gl.warp_specialize(
            [
                (_consume, (0, y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, GROUP, STACK,
                            SPLIT, CHUNKS, WIDE, PACKED, COPIED, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC, HALVES)),
                (_consume, (1, y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, GROUP, STACK,
                            SPLIT, CHUNKS, WIDE, PACKED, COPIED, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC, HALVES)),
                (_stream_x, (x_desc, table, x_ring, sizes, schedule, GROUP, STACK, SPLIT, CHUNKS, WIDE, DYNAMIC,
                             HALVES)),
                (_stream_blocks, (0, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
                (_stream_blocks, (1, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
            ],
            [4, 1, 1, 1],
            [REGISTERS, 32, 32, 32],
        )
    else:
        gl.static_assert(GROUP == 3)
        gl.warp_specialize(
            [
                (_consume, (0, y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, GROUP, STACK,
                            SPLIT, CHUNKS, WIDE, PACKED, COPIED, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC, HALVES)),
                (_consume, (1, y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, GROUP, STACK,
                            SPLIT, CHUNKS, WIDE, PACKED, COPIED, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC, HALVES)),
                (_consume, (2, y_desc, bias_ptr, order_ptr, table, x_ring, w_ring, y_s, sizes, schedule, GROUP, STACK,
                            SPLIT, CHUNKS, WIDE, PACKED, COPIED, HAS_ORDER, HAS_BIAS, ACTIVATION, DYNAMIC, HALVES)),
                (_stream_x, (x_desc, table, x_ring, sizes, schedule, GROUP, STACK, SPLIT, CHUNKS, WIDE, DYNAMIC,
                             HALVES)),
                (_stream_blocks, (0, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
                (_stream_blocks, (1, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
                (_stream_blocks, (2, w_desc, w_ptr, crow_ptr, order_ptr, table, w_ring, sizes, schedule, GROUP, STACK,
                                  SPLIT, CHUNKS, PACKED, COPIED, HAS_ORDER, DYNAMIC, HALVES)),
            ],
            [4, 4, 1, 1, 1, 1],
            [REGISTERS, REGISTERS, 32, 32, 32, 32],
        )
    # fmt: on
    if PROGRAMS == 2:
        # Neither leaves while the other may still arrive at its barriers. (Triton 3.9 sees to that too, 3.8 does not.)
        _cluster_barrier()
