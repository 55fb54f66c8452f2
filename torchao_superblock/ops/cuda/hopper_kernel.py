"""Gluon kernels for Hopper: y = act(x @ W.T + b) with W in BSR.

Dimension legend: M tokens, N out, K in; r x c block size, R x C block grid; BM tokens of a tile, BN of an accumulator;
BK columns of a block in a slice of x. A row is a block row and a column a block column where nothing else is said.

One persistent, warp-specialised kernel. What limits it is, in this order, memory traffic for x and y, L2-to-SM traffic
(every stored block needs its slice of x again), and shared-memory bandwidth for the operands of wgmma. So:

* A program owns a tile of BM tokens x a group of "strips" of 64 outputs. A slice of x is copied once for all strips of
  the tile that have a block in that column, so x crosses the L2-SM link less often. Which strips those are the plan may
  choose: block rows that share columns share slices.
* The product is computed transposed, y.T = W @ x.T: 64 outputs are the M side of wgmma and up to 256 tokens its N side.
  Such an instruction reads far less shared memory for the same arithmetic than 64 tokens x 64 outputs would.
* Each strip has its own consumer warpgroup. One warp streams x and one warp for each strip streams the strip's blocks,
  by TMA, through rings of shared memory that run ahead across tile borders: the loads of the next tile overlap with the
  output of this one.
* Blocks with fewer than 64 rows are stacked: a strip then holds several block rows, and its column set is their union.
  An absent block is an out-of-bounds TMA box, which the hardware fills with zeros without touching memory (or, where
  blocks travel flat, zeros in registers).
* Where the last blocks are padded, so are the boxes of x and y that belong to them: TMA reads zeros and writes nothing
  there. Only the bias is masked, by the PADDING of the last block row, which is a constant.
* TMA copies rows of up to 128 bytes at a rate that hardly depends on their width, so slices of x are always 128 bytes
  wide, whatever the block. Narrow blocks would be many short rows: they travel as contiguous memory (LOAD "flat_tma",
  through registers), or the strip's warp copies them itself, 16 bytes a thread ("cp_async").
* Where x is more than the L2 cache holds, two programs form a cluster: each has tokens of its own, and the first copies
  every block into the shared memory of both (multicast). To Triton a cluster is one program, whose x, accumulators and
  y its two halves share out.
* float32 accuracy takes three TF32 products: of x as the tensor cores read it (they ignore the lower bits), of what
  they ignore of it, which one more warpgroup writes beside it, and of a block in two parts, made in registers.

All warps derive the same sequence of columns from one table of bit masks (64 columns each) in shared memory, so nothing
but the rings' barriers passes between them (and, with a dynamic schedule, the tiles: where these differ too much for a
static one, they come from a counter). Indices are never trusted with an address: row pointers are clamped to the stored
blocks, columns outside the grid are dropped, and TMA clips whatever is left.
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
from triton.language import core

__all__ = ["CLUSTERS", "CLUSTER_NUMBERS", "activate", "bsr_linear_strips", "tile_at"]

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


def _aggregate(cls):
    """A type of values that are handed on together, made of all its fields, in order or by name."""
    if hasattr(gluon, "aggregate"):
        return gluon.aggregate(cls)
    names = tuple(cls.__annotations__)

    # Before Triton 3.8 aggregates have no such constructor.
    def init(self, *values, **named):
        for name, value in (*zip(names, values, strict=False), *named.items()):
            constant = not isinstance(value, core.base_value)
            setattr(self, name, gl.constexpr(value) if constant else value)

    init.__triton_builtin__ = True
    cls.__init__ = init
    return core._aggregate(cls)


# How many tiles warps may be apart in a dynamic schedule.
_TILE_STAGES = gl.constexpr(4)
# Where a cluster's numbers are in the counter's memory: eight for each, after the counter and what shares its sector.
CLUSTER_NUMBERS = gl.constexpr(8)

_Memory = gl.shared_memory_descriptor
_Number = gl.tensor | gl.constexpr  # Triton makes a constant of a parameter that is 1


@gluon.constexpr_function
def _line_layout(warps, programs):
    """Of a vector, one element a thread. Each program of a cluster has all of it."""
    return gl.BlockedLayout([1], [32], [warps], [0], cga_layout=[[0]] * (programs - 1))


@gluon.constexpr_function
def _product_layout(tokens, step, programs):
    """Of an accumulator: 64 outputs of `tokens` tokens, of which each program of a cluster has half."""
    shares = [[0, 1]] * (programs - 1)
    shape = [16, tokens // programs, step]
    return gl.NVMMADistributedLayout([3, 0], [4, 1], shape, cga_layout=shares)


@gluon.constexpr_function
def _barrier_layout(programs, own):
    """Of barriers: each program of a cluster has its own, or one is for both, who arrive at it, and the first waits.

    Of other memory the latter is a copy for each program.
    """
    return mbarrier.MBarrierLayout([[int(own)]] * (programs - 1))


@_aggregate
class _Stage:
    """Where a warp is in a ring: a stage, and the phase of its barriers, which turns with every round."""

    number: gl.tensor
    phase: gl.tensor
    FIRST: gl.constexpr  # the ring's first stage in memory, which holds the rings of all strips
    STAGES: gl.constexpr

    @gluon.jit
    def index(self):
        return self.FIRST + self.number

    @gluon.jit
    def next(self):
        number = self.number + 1
        around = number == self.STAGES
        number = gl.where(around, 0, number)
        phase = gl.where(around, self.phase ^ 1, self.phase)
        return _Stage(number, phase, self.FIRST, self.STAGES)


@gluon.jit
def _first_stage(ring, g: gl.constexpr, RINGS: gl.constexpr):
    """The start of ring number g of those that lie in a memory together."""
    STAGES: gl.constexpr = ring.memory.shape[0] // RINGS
    return _Stage(gl.to_tensor(0), gl.to_tensor(0), g * STAGES, STAGES)


@_aggregate
class _Ring:
    """Stages of shared memory, with barriers between the warp that fills them and those that read them."""

    memory: _Memory
    full: _Memory
    empty: _Memory
    empty_in_both: _Memory  # where one program of a cluster fills them for both
    FOR_BOTH: gl.constexpr

    @gluon.jit
    def wait_empty(self, stage):
        mbarrier.wait(self.empty.index(stage.index()), stage.phase ^ 1)
        if self.FOR_BOTH:
            mbarrier.wait(self.empty_in_both.index(stage.index()), stage.phase ^ 1)

    @gluon.jit
    def wait_full(self, stage):
        mbarrier.wait(self.full.index(stage.index()), stage.phase)

    @gluon.jit
    def give_back(self, stage):
        mbarrier.arrive(self.empty.index(stage.index()), count=1)
        if self.FOR_BOTH:
            mbarrier.arrive(self.empty_in_both.index(stage.index()), count=1)


@gluon.jit
def _make_ring(memory, WRITERS: gl.constexpr, READERS: gl.constexpr, FOR_BOTH: gl.constexpr):
    """A ring of a memory's stages: so many arrivals fill one, so many give it back.

    No READERS: the stages are given back with those of another ring.
    """
    STAGES: gl.constexpr = memory.shape[0]
    PROGRAMS: gl.constexpr = gl.num_ctas()
    own: gl.constexpr = _barrier_layout(PROGRAMS, True)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, PROGRAMS], own)
    empty = full
    if READERS:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, PROGRAMS], own)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=WRITERS)
        if READERS:
            mbarrier.init(empty.index(i), count=READERS)
    empty_in_both = empty
    if FOR_BOTH:
        both: gl.constexpr = _barrier_layout(PROGRAMS, False)
        empty_in_both = gl.allocate_shared_memory(gl.int64, [STAGES, 1], both)
        for i in gl.static_range(STAGES):
            mbarrier.init(empty_in_both.index(i), count=READERS)
    return _Ring(memory, full, empty, empty_in_both, FOR_BOTH)


@_aggregate
class _Program:
    """What all warps of a program know: operands, shared memory, sizes, and how the work is cut."""

    x_desc: tma.tensor_descriptor
    w_desc: tma.tensor_descriptor
    y_desc: tma.tensor_descriptor
    w_ptr: gl.tensor
    bias_ptr: gl.tensor
    crow_ptr: gl.tensor
    order_ptr: gl.tensor
    counter_ptr: gl.tensor
    table: _Memory  # the column masks of the block rows
    x: _Ring  # slices, (BM, 128 bytes)
    x_low: _Ring  # with TF32X3, what TF32 leaves out of each slice
    w: _Ring  # blocks, a ring for each strip
    y: _Memory  # output buffers, some for each strip
    schedule: _Ring  # with DYNAMIC, tiles
    tiles: _Number
    halves: _Number
    groups: _Number
    turn: _Number
    rows: _Number
    windows: _Number
    nnz: _Number
    STRIPS_PER_TILE: gl.constexpr
    ROWS_PER_STRIP: gl.constexpr
    STRIPS_PER_ROW: gl.constexpr
    SLICES_PER_COLUMN: gl.constexpr
    COLUMNS_PER_SLICE: gl.constexpr
    LOAD: gl.constexpr
    HAS_ORDER: gl.constexpr
    HAS_BIAS: gl.constexpr
    PADDING: gl.constexpr
    ACTIVATION: gl.constexpr
    DYNAMIC: gl.constexpr
    HALVES: gl.constexpr


@gluon.jit
def _popcount(bits):
    return gl.inline_asm_elementwise(
        "popc.b64 $0, $1;", "=r,l", [bits], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _row_of(p, strip, s: gl.constexpr):
    """The place of block row number s of a strip, which holds several or is a part of one."""
    if p.ROWS_PER_STRIP > 1:
        row = strip * p.ROWS_PER_STRIP + s
    else:
        row = strip // p.STRIPS_PER_ROW
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
def _row_bits(p, row, window):
    """The mask of one block row; 0 for a row past the end."""
    bits = _number(p.table.index(gl.minimum(row, p.rows - 1) * p.windows + window))
    return gl.where(row < p.rows, bits, 0)


@gluon.jit
def _strip_bits(p, strip, window):
    """The columns of a window in which any block row of the strip has a block."""
    bits = _row_bits(p, _row_of(p, strip, 0), window)
    for s in gl.static_range(1, p.ROWS_PER_STRIP):
        bits |= _row_bits(p, _row_of(p, strip, s), window)
    return bits


@gluon.jit
def _group_slices(p, group, window):
    """The slices of x that a group of strips needs; one of several columns has the bit of the lowest."""
    bits = _strip_bits(p, group * p.STRIPS_PER_TILE, window)
    for g in gl.static_range(1, p.STRIPS_PER_TILE):
        bits |= _strip_bits(p, group * p.STRIPS_PER_TILE + g, window)
    if p.COLUMNS_PER_SLICE == 2:
        bits = (bits | (bits >> 1)) & 0x5555555555555555
    if p.COLUMNS_PER_SLICE == 4:
        bits = bits | (bits >> 1)
        bits = (bits | (bits >> 2)) & 0x1111111111111111
    return bits


@gluon.jit
def _first_block(p, place, window):
    """Where the row's first block of a window is stored: row start + blocks of earlier windows."""
    row = _row_at(p.order_ptr, gl.minimum(place, p.rows - 1), p.rows, p.HAS_ORDER)
    position = gl.load(p.crow_ptr + row)
    position = gl.minimum(gl.maximum(position, 0), p.nnz)
    for earlier in range(window):
        position += _popcount(_row_bits(p, place, earlier))
    return position


@gluon.jit
def tile_at(p, t, BM: gl.constexpr):
    """Tile t: its first token, its group, and whether it is half a tile.

    Groups fastest, so that programs find x in the L2 cache. The last `halves` are halves of tiles.
    """
    tiles = p.tiles
    half = False
    second = 0
    if p.HALVES:
        v = t - (tiles - p.halves)
        half = v >= 0
        t = gl.where(half, tiles - p.halves + v // 2, t)
        second = gl.where(half, v % 2, 0)
        tiles -= p.halves // 2
    m = t // p.groups
    if p.DYNAMIC:
        # The last `turn` token tiles group by group: in the plan's order, what comes last takes least.
        m_tiles = tiles // p.groups
        tail = gl.minimum(m_tiles, p.turn)
        u = t - (m_tiles - tail) * p.groups
        last = u >= 0
        m = gl.where(last, m_tiles - tail + u % tail, m)
        group = gl.where(last, u // tail, t % p.groups)
    else:
        # Shifted after every `turn` token tiles, so that each program meets all.
        group = (t + m // p.turn) % p.groups
        if p.HALVES:
            # Few tiles a program. Where groups divide the programs these are of groups that follow each other: a long
            # one, then a short one.
            group = gl.where(group % 2 == 0, group // 2, p.groups - 1 - group // 2)
    return m * BM + second * (BM // 2), group, half


@gluon.jit
def _request_tile(p, n):
    """Take the number of this program's next tile from the counter, in a dynamic schedule.

    For a warp alone: lane 0 gets it, and nobody waits for it yet.

    The launch may overlap the zeroing of the counter (hopper.py). Every program waits for that here, before it reads x;
    later waits take no time.

    For a cluster the first program takes its `n`-th number and leaves it where both find it, plus 1 because 0 was
    there. It waits for the number, while the slices of x on their way keep the tensor cores busy.
    """
    number = 0
    if p.DYNAMIC and gl.num_ctas() == 1:
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
            [p.counter_ptr],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    elif p.DYNAMIC:
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
            [p.counter_ptr, _number_of_cluster(p, n)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    return number


@gluon.jit
def _number_of_cluster(p, n):
    """Where the first program of a cluster leaves its n-th number.

    Before it takes one it has published the one before, for which both programs must have read the one _TILE_STAGES
    earlier. So the other program may still have to read _TILE_STAGES numbers, and the next one goes elsewhere.
    """
    gl.static_assert(CLUSTER_NUMBERS > _TILE_STAGES)
    return p.counter_ptr + CLUSTER_NUMBERS * (1 + gl.program_id(0)) + n % CLUSTER_NUMBERS


@gluon.jit
def _publish_tile(p, t, number, last, n, stage):
    """The program's tile after t: by a static schedule, or the requested one, told to the other warps.

    Returns it and, for a cluster, what `last` is next time: the number it left, higher than all before.
    """
    following = t + gl.num_programs(0)
    if p.DYNAMIC:
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
                [_number_of_cluster(p, n), last],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )
            number = last - 1
        following = gl.num_programs(0) + number
        p.schedule.wait_empty(stage)
        entry = p.schedule.memory.index(stage.index())
        entry.store(gl.full([1], 0, gl.int64, layout) + following)
        mbarrier.arrive(p.schedule.full.index(stage.index()), count=1)
    return following, last


@gluon.jit
def _next_tile(p, t, stage):
    """The tile after t, as _publish_tile told."""
    following = t + gl.num_programs(0)
    if p.DYNAMIC:
        p.schedule.wait_full(stage)
        following = _number(p.schedule.memory.index(stage.index())).to(gl.int32)
        p.schedule.give_back(stage)
    return following


@gluon.jit
def _stream_x(p):
    """Copy the slices of x that the program's tiles need, and say which tiles these are."""
    BM: gl.constexpr = p.x.memory.shape[1]
    BK: gl.constexpr = p.x.memory.shape[2]
    stage = _first_stage(p.x, 0, 1)
    t = gl.program_id(0)
    t_stage = _first_stage(p.schedule, 0, 1)
    n = 0
    last = 0
    while t < p.tiles:
        m, group, half = tile_at(p, t, BM)
        number = _request_tile(p, n)
        for window in range(p.windows):
            slices = _group_slices(p, group, window)
            for h in range(p.SLICES_PER_COLUMN):
                todo = slices
                for _ in range(_popcount(slices)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    column = window * 64 + _popcount(low - 1)
                    p.x.wait_empty(stage)
                    full = p.x.full.index(stage.index())
                    x = p.x.memory.index(stage.index())
                    k = (column // p.COLUMNS_PER_SLICE * p.SLICES_PER_COLUMN + h) * BK
                    if p.HALVES:
                        if half:
                            mbarrier.expect(full, p.x_desc.block_type.nbytes)
                        else:
                            mbarrier.expect(full, 2 * p.x_desc.block_type.nbytes)
                            second = x.slice(BM // 2, BM // 2, dim=0)
                            _tma_load(p.x_desc, [m + BM // 2, k], full, second)
                        _tma_load(p.x_desc, [m, k], full, x.slice(0, BM // 2, dim=0))
                    else:
                        mbarrier.expect(full, p.x_desc.block_type.nbytes // gl.num_ctas())
                        _tma_load(p.x_desc, [m, k], full, x)
                    stage = stage.next()
        t, last = _publish_tile(p, t, number, last, n, t_stage)
        t_stage = t_stage.next()
        n += 1


@gluon.jit
def _copy_block(p, inner, bits, low, first, part, h, full, w):
    """Copy the part of a block row's block in column `low` that lies in the strip."""
    BOX: gl.constexpr = p.w_desc.block_type.shape[0]
    BK: gl.constexpr = p.w_desc.block_type.shape[1]
    position = first + _popcount(bits & (low - 1))
    present = (bits & low) != 0
    if p.LOAD == "cp_async":
        # Zeros for an absent block, which is not read. The caller arrives at the barrier.
        box = position.to(gl.int64) * p.STRIPS_PER_ROW + part
        start = box * (BOX * BK * p.SLICES_PER_COLUMN) + h * BK
        _async_load(w, p.w_ptr + start + inner, mask=present)
    elif p.LOAD == "flat_tma":
        # One arrival for each block row of the strip, with or without data.
        if present:
            mbarrier.expect(full, p.w_desc.block_type.nbytes)
            _tma_load(p.w_desc, [(position * p.STRIPS_PER_ROW + part) * BOX, 0], full, w)
        else:
            mbarrier.arrive(full, count=1)
    else:
        # An absent block is a box past the end of the values: TMA writes zeros.
        position = gl.where(present, position, p.nnz)
        mbarrier.expect(full, p.w_desc.block_type.nbytes)
        start = (position * p.STRIPS_PER_ROW + part) * BOX
        if gl.num_ctas() == 2:
            # The first program copies for both; each has said what it expects.
            _tma_load(p.w_desc, [start, h * BK], full, w, multicast=True)
        else:
            _tma_load(p.w_desc, [start, h * BK], full, w)


@gluon.jit
def _stream_blocks(p, g: gl.constexpr):
    """Copy the blocks of strip g of the program's tiles."""
    BOX: gl.constexpr = p.w_desc.block_type.shape[0]
    BK: gl.constexpr = p.w_desc.block_type.shape[1]
    inner = 0
    if p.LOAD == "cp_async":
        # Where each thread's 16 bytes lie in a block.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [1, 1], [1, 0])
        i = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout))
        k = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
        inner = i[:, None] * (BK * p.SLICES_PER_COLUMN) + k[None, :]
    stage = _first_stage(p.w, g, p.STRIPS_PER_TILE)
    t = gl.program_id(0)
    t_stage = _first_stage(p.schedule, 0, 1)
    while t < p.tiles:
        # Blocks are the same for all tokens, whatever their number.
        _m, group, _half = tile_at(p, t, 0)
        strip = group * p.STRIPS_PER_TILE + g
        part = strip % p.STRIPS_PER_ROW
        for window in range(p.windows):
            row = _row_of(p, strip, 0)
            mine = _row_bits(p, row, window)
            bits = (mine,)
            firsts = (_first_block(p, row, window),)
            for s in gl.static_range(1, p.ROWS_PER_STRIP):
                more = _row_bits(p, row + s, window)
                bits += (more,)
                firsts += (_first_block(p, row + s, window),)
                mine = mine | more
            for h in range(p.SLICES_PER_COLUMN):
                todo = mine
                for _ in range(_popcount(mine)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    p.w.wait_empty(stage)
                    full = p.w.full.index(stage.index())
                    w = p.w.memory.index(stage.index())
                    for s in gl.static_range(p.ROWS_PER_STRIP):
                        box = w.slice(s * BOX, BOX, dim=0)
                        _copy_block(p, inner, bits[s], low, firsts[s], part, h, full, box)
                    if p.LOAD == "cp_async":
                        async_copy.mbarrier_arrive(full, increment_count=False)
                    stage = stage.next()
        t = _next_tile(p, t, t_stage)
        t_stage = t_stage.next()


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
def activate(z, FLOAT32: gl.constexpr, ACTIVATION: gl.constexpr):
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
    elif ACTIVATION == "quick_gelu":  # z / (1 + 2^(-1.702 log2(e) z))
        z = z * _reciprocal(1.0 + _exp2(-2.4554669595930157 * z))
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
        part.store(activate(part.load(layout), True, ACTIVATION))
    fence_async_shared()
    _barrier()


@gluon.jit
def _store(p, acc, bias, buffer, row, features, BUFFERS: gl.constexpr):
    """Send act(acc + bias) to y by way of a buffer, once BUFFERS - 1 others at most are being read.

    They go to y as one piece of 64 outputs, or as two of 32 that lie apart.
    """
    FLOAT32: gl.constexpr = p.y_desc.dtype.primitive_bitwidth == 32
    BN: gl.constexpr = acc.shape[1]
    WIDTH: gl.constexpr = buffer.shape[1]
    PIECES: gl.constexpr = 64 // WIDTH
    gl.static_assert(PIECES <= 2)
    LATER: gl.constexpr = FLOAT32 and p.ACTIVATION != "none" and p.ACTIVATION != "relu"
    out = acc + bias[:, None]
    if not LATER:
        out = activate(out, FLOAT32, p.ACTIVATION).to(p.y_desc.dtype)
    tma.store_wait((BUFFERS - 1) * PIECES)
    if PIECES == 1:
        buffer.permute((1, 0)).store(out)
    else:
        pieces = out.reshape([PIECES, WIDTH, BN]).permute((0, 2, 1))
        buffer.store(pieces.reshape([PIECES * BN, WIDTH]))
    if LATER:
        _activate_in_place(buffer, p.ACTIVATION)
    else:
        fence_async_shared()
    if PIECES == 1:
        _tma_store(p.y_desc, [row, features[0]], buffer)
    else:
        _tma_store(p.y_desc, [row, features[0]], buffer.slice(0, BN, dim=0))
        _tma_store(p.y_desc, [row, features[1]], buffer.slice(BN, BN, dim=0))


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
def _write_low_parts(p):
    """Write the low part of every slice of x beside it; as it is, it serves as the high part."""
    BM: gl.constexpr = p.x.memory.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    stage = _first_stage(p.x, 0, 1)
    t = gl.program_id(0)
    t_stage = _first_stage(p.schedule, 0, 1)
    while t < p.tiles:
        _m, group, _half = tile_at(p, t, BM)
        for window in range(p.windows):
            slices = _group_slices(p, group, window)
            for _ in range(_popcount(slices) * p.SLICES_PER_COLUMN):
                # A full stage has a free low part: the consumer gives both back together.
                p.x.wait_full(stage)
                for part in gl.static_range(BM // 64):
                    x = p.x.memory.index(stage.index()).slice(part * 64, 64, dim=0)
                    low = p.x_low.memory.index(stage.index()).slice(part * 64, 64, dim=0)
                    low.store(_tf32_rest(x.load(layout)))
                fence_async_shared()
                mbarrier.arrive(p.x_low.full.index(stage.index()), count=1)
                stage = stage.next()
        t = _next_tile(p, t, t_stage)
        t_stage = t_stage.next()


@gluon.jit
def _features(p, strip, lanes: gl.constexpr):
    """Where the one or two pieces of a strip start among the outputs, and the bias of its 64 outputs."""
    PIECES: gl.constexpr = 64 // p.y.shape[2]
    HEIGHT: gl.constexpr = 64 * p.STRIPS_PER_ROW // p.ROWS_PER_STRIP  # of a block
    place = _row_of(p, strip, 0)
    first = _row_at(p.order_ptr, place, p.rows, p.HAS_ORDER) * HEIGHT
    first += strip % p.STRIPS_PER_ROW * 64
    second = first
    if PIECES == 2:
        second = _row_at(p.order_ptr, place + 1, p.rows, p.HAS_ORDER) * HEIGHT
    bias = gl.zeros([64], gl.float32, lanes)
    if p.HAS_BIAS:
        i = gl.arange(0, 64, layout=lanes)
        feature = first + i
        if PIECES == 2:
            feature = gl.where(i < 32, feature, second - 32 + i)
        there = feature < p.rows * HEIGHT - p.PADDING
        bias = gl.load(p.bias_ptr + feature, mask=there, other=0)
        bias = bias.to(gl.float32)
    return (first, second), bias


@gluon.jit
def _consume_tf32x3(p):
    """The products of one strip in float32 accuracy: three TF32 products a slice, the smallest first.

    The tensor cores truncate when they accumulate, so they sum one slice only; the slices are added
    in registers, with rounding.
    """
    BM: gl.constexpr = p.x.memory.shape[1]
    BN: gl.constexpr = BM // 2
    BUFFERS: gl.constexpr = p.y.shape[0]
    gl.static_assert(BN * 64 == p.y.shape[1] * p.y.shape[2])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 8])
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 1)
    x_stage = _first_stage(p.x, 0, 1)
    w_stage = _first_stage(p.w, 0, 1)
    t = gl.program_id(0)
    t_stage = _first_stage(p.schedule, 0, 1)
    while t < p.tiles:
        m, strip, _half = tile_at(p, t, BM)
        features, bias = _features(p, strip, lanes)
        count = 0
        for window in range(p.windows):
            count += _popcount(_strip_bits(p, strip, window))
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        zeros = acc0
        for _ in range(count * p.SLICES_PER_COLUMN):
            p.w.wait_full(w_stage)
            w_high, w_low = _tf32_parts(p.w.memory.index(w_stage.index()).load(w_layout))
            fence_async_shared()
            p.w.give_back(w_stage)
            w_stage = w_stage.next()
            x = p.x.memory.index(x_stage.index())
            x0 = x.slice(0, BN, dim=0).permute((1, 0))
            x1 = x.slice(BN, BN, dim=0).permute((1, 0))
            p.x.wait_full(x_stage)
            part0 = warpgroup_mma(w_low, x0, zeros, use_acc=False, is_async=True)
            p.x_low.wait_full(x_stage)
            x_low = p.x_low.memory.index(x_stage.index())
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
            p.x.give_back(x_stage)
            acc1 += part1
            x_stage = x_stage.next()
        # One copy of the code for both halves: unrolled, instructions arrive slower than they run.
        for half in range(2):
            acc = gl.where(half == 0, acc0, acc1)
            y = p.y.index(half % BUFFERS)
            _store(p, acc, bias, y, m + half * BN, features, BUFFERS)
        t = _next_tile(p, t, t_stage)
        t_stage = t_stage.next()
    tma.store_wait(0)


@gluon.jit
def _consume(p, g: gl.constexpr):
    """The products of strip g of the program's tiles, and their output."""
    BM: gl.constexpr = p.x.memory.shape[1]
    BK: gl.constexpr = p.x.memory.shape[2] // p.COLUMNS_PER_SLICE
    BN: gl.constexpr = p.y.shape[1] * p.y.shape[2] // 64
    PARTS: gl.constexpr = BM // BN
    BUFFERS: gl.constexpr = p.y.shape[0] // p.STRIPS_PER_TILE
    # A half tile fills one buffer alone: two would get out of turn.
    gl.static_assert(not p.HALVES or BUFFERS == 1)
    # A cluster's tokens are half the first program's and half the second's, and its blocks are both's.
    PROGRAMS: gl.constexpr = gl.num_ctas()
    gl.static_assert(PROGRAMS == 1 or (PARTS == 1 and p.ROWS_PER_STRIP == 1 and p.LOAD == "tma"))
    BITS: gl.constexpr = p.x.memory.dtype.primitive_bitwidth
    layout: gl.constexpr = _product_layout(BN, 256 // BITS, PROGRAMS)
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 32 // BITS)
    member = gl.arange(0, 64, layout=gl.SliceLayout(1, w_layout)) // (64 // p.ROWS_PER_STRIP)
    x_stage = _first_stage(p.x, 0, 1)
    w_stage = _first_stage(p.w, g, p.STRIPS_PER_TILE)
    strips = (p.rows * p.STRIPS_PER_ROW + p.ROWS_PER_STRIP - 1) // p.ROWS_PER_STRIP
    t = gl.program_id(0)
    t_stage = _first_stage(p.schedule, 0, 1)
    while t < p.tiles:
        m, group, half = tile_at(p, t, BM)
        strip = group * p.STRIPS_PER_TILE + g
        active = strip < strips
        features, bias = _features(p, strip, lanes)
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        for window in range(p.windows):
            row = _row_of(p, strip, 0)
            mine = _row_bits(p, row, window)
            bits = (mine,)
            for s in gl.static_range(1, p.ROWS_PER_STRIP):
                more = _row_bits(p, row + s, window)
                bits += (more,)
                mine = mine | more
            slices = _group_slices(p, group, window)
            for _h in range(p.SLICES_PER_COLUMN):
                todo = slices
                for _ in range(_popcount(slices)):
                    low = todo & (0 - todo)
                    todo = todo ^ low
                    p.x.wait_full(x_stage)
                    for q in gl.static_range(p.COLUMNS_PER_SLICE):
                        column = _popcount(low - 1) + q
                        if ((mine >> column) & 1) != 0:
                            p.w.wait_full(w_stage)
                            w = p.w.memory.index(w_stage.index())
                            x = p.x.memory.index(x_stage.index())
                            if p.COLUMNS_PER_SLICE > 1:
                                x = x.slice(q * BK, BK, dim=1)
                            if p.LOAD == "flat_tma":
                                # The block as it is stored, and zeros for the absent ones.
                                w = w.reshape([64, BK]).load(w_layout)
                                if p.ROWS_PER_STRIP > 1:
                                    stored = (bits[0] >> column) & 1
                                    for s in gl.static_range(1, p.ROWS_PER_STRIP):
                                        stored |= ((bits[s] >> column) & 1) << s
                                    keep = ((stored.to(gl.int32) >> member) & 1) != 0
                                    w = gl.where(keep[:, None], w, gl.zeros_like(w))
                                fence_async_shared()
                                p.w.give_back(w_stage)
                                acc0, acc1 = _product(w, x, acc0, acc1, half, BN, PARTS)
                            else:
                                # After cp.async there is no proxy fence, as in what Triton makes of a pipelined
                                # tl.dot: cp.async, its completion, wgmma. A fence for each product costs 16 x 16
                                # blocks 6 %.
                                acc0, acc1 = _product(w, x, acc0, acc1, half, BN, PARTS)
                                p.w.give_back(w_stage)
                            w_stage = w_stage.next()
                    p.x.give_back(x_stage)
                    x_stage = x_stage.next()
        # A strip past the end leaves the buffers alone: it sends nothing that the next wait could count.
        if active:
            if p.LOAD == "cp_async" and p.ROWS_PER_STRIP == 4 and PARTS == 2 and not p.HALVES:
                # One copy of the code for both parts: there is so much of it that unrolled, instructions arrive slower
                # than they run. For other blocks, choosing the part takes longer.
                for part in range(2):
                    acc = gl.where(part == 0, acc0, acc1)
                    y = p.y.index(g * BUFFERS + part % BUFFERS)
                    _store(p, acc, bias, y, m + part * BN, features, BUFFERS)
            else:
                y = p.y.index(g * BUFFERS)
                _store(p, acc0, bias, y, m, features, BUFFERS)
                if PARTS == 2:
                    if not half:
                        y = p.y.index(g * BUFFERS + BUFFERS - 1)
                        _store(p, acc1, bias, y, m + BN, features, BUFFERS)
        t = _next_tile(p, t, t_stage)
        t_stage = t_stage.next()
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
    STRIPS_PER_TILE: gl.constexpr,
    ROWS_PER_STRIP: gl.constexpr,
    STRIPS_PER_ROW: gl.constexpr,
    SLICES_PER_COLUMN: gl.constexpr,
    COLUMNS_PER_SLICE: gl.constexpr,
    LOAD: gl.constexpr,
    TF32X3: gl.constexpr,
    TABLE: gl.constexpr,
    X_STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
    Y_STAGES: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PADDING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DYNAMIC: gl.constexpr,
    HALVES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """y = act(x @ W.T + bias) for strips of 64 outputs; see the module's docstring.

    x_desc [BM, COLUMNS_PER_SLICE * BK] boxes of x (M, K); w_desc [64 / ROWS_PER_STRIP, BK] boxes of the values as an
    (nnz * r, c) matrix; y_desc [BN, 64] boxes of y (M, N), or 32 outputs wide where the block rows of a strip lie
    apart; w_ptr the values.
    """
    BM: gl.constexpr = x_desc.block_type.shape[0] * (2 if HALVES else 1)
    XK: gl.constexpr = x_desc.block_type.shape[1]
    BN: gl.constexpr = y_desc.block_type.shape[0]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    BOX: gl.constexpr = w_desc.block_type.shape
    w_shape: gl.constexpr = [STRIPS_PER_TILE * W_STAGES, ROWS_PER_STRIP * BOX[0], BOX[1]]
    w_s = gl.allocate_shared_memory(w_desc.dtype, w_shape, w_desc.layout)
    WIDTH: gl.constexpr = y_desc.block_type.shape[1]
    y_shape: gl.constexpr = [STRIPS_PER_TILE * Y_STAGES, 64 // WIDTH * BN, WIDTH]
    y_s = gl.allocate_shared_memory(y_desc.dtype, y_shape, y_desc.layout)
    CLUSTER: gl.constexpr = gl.num_ctas() == 2
    both: gl.constexpr = _barrier_layout(gl.num_ctas(), False)
    table = gl.allocate_shared_memory(gl.int64, [TABLE, 1], both)
    x = _make_ring(x_s, 1, STRIPS_PER_TILE, False)
    # Every thread of a copying warp arrives, or every box.
    w = _make_ring(w_s, 32 if LOAD == "cp_async" else ROWS_PER_STRIP, 1, CLUSTER)
    fence_async_shared()
    windows = (columns + 63) // 64
    _fill_table(table, order_ptr, crow_ptr, col_ptr, rows, columns, nnz, windows, HAS_ORDER)
    x_low = x
    if TF32X3:
        low_s = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
        x_low = _make_ring(low_s, 1, 0, False)
        fence_async_shared()
    schedule = x
    if DYNAMIC:
        t_s = gl.allocate_shared_memory(gl.int64, [_TILE_STAGES, 1], both)
        schedule = _make_ring(t_s, 1, 3 if TF32X3 else 2 * STRIPS_PER_TILE, CLUSTER)
        fence_async_shared()
    p = _Program(
        x_desc=x_desc,
        w_desc=w_desc,
        y_desc=y_desc,
        w_ptr=w_ptr,
        bias_ptr=bias_ptr,
        crow_ptr=crow_ptr,
        order_ptr=order_ptr,
        counter_ptr=counter_ptr,
        table=table,
        x=x,
        x_low=x_low,
        w=w,
        y=y_s,
        schedule=schedule,
        tiles=tiles,
        halves=halves,
        groups=groups,
        turn=turn,
        rows=rows,
        windows=windows,
        nnz=nnz,
        STRIPS_PER_TILE=STRIPS_PER_TILE,
        ROWS_PER_STRIP=ROWS_PER_STRIP,
        STRIPS_PER_ROW=STRIPS_PER_ROW,
        SLICES_PER_COLUMN=SLICES_PER_COLUMN,
        COLUMNS_PER_SLICE=COLUMNS_PER_SLICE,
        LOAD=LOAD,
        HAS_ORDER=HAS_ORDER,
        HAS_BIAS=HAS_BIAS,
        PADDING=PADDING,
        ACTIVATION=ACTIVATION,
        DYNAMIC=DYNAMIC,
        HALVES=HALVES,
    )
    # Before either program of a cluster arrives at the other's barriers, both must have made theirs: Triton sees to
    # that. One warpgroup consumes each strip, one warp streams x and one the blocks of each strip.
    if TF32X3:
        gl.static_assert(STRIPS_PER_TILE == 1 and not HALVES and not CLUSTER)
        gl.warp_specialize(
            [
                (_consume_tf32x3, (p,)),
                (_write_low_parts, (p,)),
                (_stream_x, (p,)),
                (_stream_blocks, (p, 0)),
            ],
            [4, 1, 1],
            [REGISTERS, 24, 24],
        )
    elif STRIPS_PER_TILE == 2:
        gl.warp_specialize(
            [
                (_consume, (p, 0)),
                (_consume, (p, 1)),
                (_stream_x, (p,)),
                (_stream_blocks, (p, 0)),
                (_stream_blocks, (p, 1)),
            ],
            [4, 1, 1, 1],
            [REGISTERS, 32, 32, 32],
        )
    else:
        gl.static_assert(STRIPS_PER_TILE == 3)
        gl.warp_specialize(
            [
                (_consume, (p, 0)),
                (_consume, (p, 1)),
                (_consume, (p, 2)),
                (_stream_x, (p,)),
                (_stream_blocks, (p, 0)),
                (_stream_blocks, (p, 1)),
                (_stream_blocks, (p, 2)),
            ],
            [4, 4, 1, 1, 1, 1],
            [REGISTERS, REGISTERS, 32, 32, 32, 32],
        )
    if CLUSTER:
        # Neither leaves while the other may still arrive at its barriers. (Triton 3.9 sees to that too, 3.8 does not.)
        _cluster_barrier()
