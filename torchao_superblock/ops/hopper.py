"""The Hopper backend's policy: which calls the Gluon kernel serves, and with which tile.

`hopper_kernels.py` holds the device code. It needs Triton's experimental Gluon language and an sm_90 GPU; where
either is missing :func:`supports` answers False and the plain Triton kernels serve the call.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.plan import STRIP, is_mixed, split_plan
from torchao_superblock.ops.precision import allows_tf32

__all__ = [
    "Strips",
    "boxes",
    "candidates",
    "choose",
    "constants",
    "forward",
    "layouts",
    "shared_bytes",
    "supports",
    "unavailable_reason",
]

try:
    import triton.testing
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from torchao_superblock.ops import hopper_kernels as kernels
    from torchao_superblock.ops.launch import OVERLAP, Kernel, can_overlap

    _import_error: str | None = None
    _CLUSTERS = kernels.CLUSTERS
except Exception as error:  # an experimental module may fail in any way
    _CLUSTERS = False
    _import_error = f"Triton's Gluon cannot be used here: {error}"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Fewer tokens than this leave multiprocessors without a tile; the plain kernels split finer.
_MIN_TOKENS = 2048
# Launching this kernel takes the host about twice as long as the plain one (three TMA descriptors are made anew). That
# hides behind the GPU's work only where reading x and writing y takes its memory so many microseconds; or half of them
# for 16 x 16 blocks, for which the plain kernel takes about twice as long.
_MIN_MICROSECONDS = 18.5


class Strips(NamedTuple):
    """How `bsr_linear_strips` cuts the work.

    Attributes:
        tokens: tokens of a tile (256 or 128).
        part: tokens of one accumulator and of one store (`tokens` or half of it).
        group: strips of 64 outputs in a tile, one consumer warpgroup each (2 or 3; 1 for float32 accuracy).
        x_slots: slices of x in flight.
        w_slots: blocks in flight for each strip.
        y_slots: output buffers of each strip (1, or 2 where `part` is half of `tokens`).
        registers: registers a thread of every warpgroup but the first, which gets what is left: consumers, or with
            float32 accuracy the warpgroup that splits x.
        programs: programs that share a multiprocessor (1 or 2).
        packed: whether blocks narrower than 64 columns travel as contiguous memory and reach the tensor cores through
            registers.
        copied: whether blocks narrower than 64 columns are copied by the threads of a warp instead of TMA.
        grouped: whether the plan chooses the strips of a tile, so that they share slices of x.
        dynamic: whether programs draw their tiles from a counter, one after the other, instead of every so manieth.
        halves: whether the tiles of a last round that would leave half of the programs idle or more are cut in halves
            (where `part` is half of `tokens`; not for float32 accuracy). Dealt out, groups that need most then take
            turns with those that need least.
        pair: whether two programs, each with `tokens` of its own, share a cluster and copy the blocks once for both
            (where `part` is `tokens`; 16-bit numbers, blocks at least 64 wide and high).
    """

    tokens: int
    part: int
    group: int
    x_slots: int
    w_slots: int
    y_slots: int
    registers: int
    programs: int = 1
    packed: bool = False
    copied: bool = False
    grouped: bool = False
    dynamic: bool = False
    halves: bool = False
    pair: bool = False


# The rules, from runs on an H200 and, for slow memory, on an H100; those for pairs, for tables of more than 256 entries
# and for activations in long rows from an H100 alone. "Three strips" use a slice of x for the most outputs
# and win once blocks are dense enough to keep the tensor cores busy; "two programs" overlap one tile's epilogue with
# another's products, which is what an activation is for 16-bit numbers.
THREE_STRIPS = Strips(256, 128, 3, 4, 2, 1, 160, grouped=True)
TWO_STRIPS = Strips(256, 128, 2, 4, 3, 1, 216)
TWO_PROGRAMS = Strips(128, 64, 2, 3, 2, 1, 104, programs=2)
# Long tiles of different lengths: dealt out, some programs get up to a third more than others. Drawing costs one launch
# more, which zeroes the counter.
THREE_STRIPS_DYNAMIC = THREE_STRIPS._replace(dynamic=True)
TWO_STRIPS_DYNAMIC = Strips(256, 128, 2, 3, 3, 2, 216, dynamic=True)
TWO_DRAWN = TWO_STRIPS._replace(grouped=True, dynamic=True)
# For a few rounds of such tiles: programs that are dealt theirs stay in step and find x in the L2 cache. Where the last
# round is for half of them or less, its tiles are cut; half a tile takes 0.6 of its time.
THREE_STRIPS_HALVES = THREE_STRIPS._replace(halves=True)
# With few products a tile is mostly output: small tiles and deep rings overlap one strip's output with another's loads.
SHORT_TILES = Strips(128, 64, 3, 5, 2, 2, 160)
# For slow memory. Drawn tiles are worked on in order, while programs that are dealt theirs drift apart; on an H100 that
# saves a tenth of the time of short rows where the output is at least twice the input, and up to a fifth for TF32.
TWO_SHORT = Strips(128, 128, 2, 6, 3, 1, 216)
TWO_SHORT_DYNAMIC = TWO_SHORT._replace(dynamic=True)
TWO_PROGRAMS_DYNAMIC = TWO_PROGRAMS._replace(dynamic=True)
# For x that L2 does not hold, as long rows make it. With tiles of half the tokens, programs work on half as much of x
# at a time, and pairs of them still read a block once for 256 tokens.
PAIRS = Strips(128, 128, 3, 6, 3, 1, 160, grouped=True, dynamic=True, pair=True)
PAIRS_TALL = Strips(128, 128, 2, 7, 4, 1, 216, dynamic=True, pair=True)
STACKED = Strips(256, 128, 3, 4, 3, 1, 160, grouped=True)
# TMA takes as long for a row of 32 bytes as for one of 128, and an absent block still is a box: for 16 x 16 blocks, the
# boxes of a stack take longer than its products. Masks of long rows leave room for fewer slots.
COPIED_16 = Strips(256, 128, 3, 4, 8, 1, 160, copied=True, grouped=True)
COPIED_16_LONG = Strips(256, 128, 3, 4, 6, 1, 160, copied=True, grouped=True)
COPIED_32 = Strips(256, 128, 3, 4, 3, 1, 160, copied=True, grouped=True)
COPIED_32_DYNAMIC = COPIED_32._replace(dynamic=True)
# For slow memory and few blocks.
COPIED_32_SHORT = Strips(128, 128, 3, 5, 3, 1, 160, copied=True, grouped=True)
PACKED = Strips(256, 128, 3, 4, 3, 1, 160, packed=True)
PACKED_TWO = Strips(256, 128, 2, 4, 4, 1, 216, packed=True)
PACKED_TWO_DRAWN = PACKED_TWO._replace(grouped=True, dynamic=True)
PACKED_SHORT = Strips(128, 64, 3, 5, 3, 2, 160, packed=True)
TF32 = Strips(128, 128, 2, 5, 3, 1, 216)
TF32_DYNAMIC = TF32._replace(dynamic=True)
TF32_DRAWN = TF32._replace(grouped=True, dynamic=True)
# With many products, or long rows, three strips again use a slice of x for more of them.
TF32_THREE = Strips(128, 128, 3, 5, 2, 1, 160, grouped=True)
TF32_THREE_DYNAMIC = TF32_THREE._replace(dynamic=True)
# A strip at a time is a chain of loading, splitting, products and output with little to overlap in itself; two programs
# overlap each other's. In the plan's order, neighbours in time still share slices of x in the L2 cache. Drawing tiles
# gained 4 % where rows are short, nothing where they are long.
EXACT = Strips(128, 64, 1, 2, 1, 2, 32, programs=2, grouped=True, dynamic=True)

# What tuning tries.
_WIDE = (
    THREE_STRIPS,
    THREE_STRIPS_DYNAMIC,
    THREE_STRIPS_HALVES,
    TWO_STRIPS,
    TWO_STRIPS_DYNAMIC,
    TWO_DRAWN,
    TWO_PROGRAMS,
    TWO_PROGRAMS_DYNAMIC,
    SHORT_TILES,
    SHORT_TILES._replace(dynamic=True),
    TWO_SHORT,
    TWO_SHORT_DYNAMIC,
    Strips(128, 128, 3, 5, 2, 1, 160),
)
_PAIRS = (PAIRS, PAIRS_TALL)
_PACKED = (PACKED, PACKED_TWO, PACKED_TWO_DRAWN, PACKED_SHORT)
_TF32 = (TF32, TF32_DYNAMIC, TF32_DRAWN, TF32_THREE, TF32_THREE_DYNAMIC)
_EXACT = (EXACT, EXACT._replace(dynamic=False), EXACT._replace(grouped=False))

# Bytes of shared memory that a multiprocessor gives its programs, and what it keeps of them for each.
_SHARED_BYTES = 233472
_SHARED_RESERVED = 1024
# Drawn last, and together: so many tokens, and of them no more (but for one tile) than about half of the L2 cache.
_LAST_TOKENS = 1024
_LAST_BYTES = 30e6
# Of x, what single programs work on at a time; from here on pairs are faster.
_HELD_BYTES = 20e6
# Gigabytes a second below which memory counts as slow: an H100 has 3350, an H200 4800.
_SLOW_MEMORY = 4100


def _table_size(rows: int, columns: int) -> int:
    """Entries of the table of column masks, 64 columns a mask: a power of two, to compile rarely."""
    return max(128, 1 << (rows * -(-columns // 64) - 1).bit_length())


def _partners(tile: Strips) -> int:
    """Programs that work on a tile together, each on a multiprocessor of its own."""
    return 2 if tile.pair else 1


def _tiles(M: int, N: int, tile: Strips) -> int:
    return -(-M // (_partners(tile) * tile.tokens)) * -(-N // (STRIP * tile.group))


def _split_last(tiles: int, tile: Strips, processors: int) -> tuple[int, int]:
    """Tiles, and how many of them are halves: two for each of a last round that half of the programs would sit out."""
    left = tiles % (tile.programs * processors) if tile.halves else 0
    if 2 * left > tile.programs * processors:
        left = 0
    return tiles + left, 2 * left


def _turn(tile: Strips, programs: int, groups: int, token_bytes: int) -> int:
    """The number of token tiles that the order of the tiles turns on.

    Dealt out: after so many, the groups that programs take are shifted by one. After each; where the groups divide the
    programs, whenever these have taken a tile each, or a program would come back to every second or third group.

    Drawn: so many come last, and together, because what they read of x fits in the L2 cache.
    """
    if tile.dynamic:
        tokens = _partners(tile) * tile.tokens
        return max(1, int(min(_LAST_TOKENS, _LAST_BYTES / token_bytes)) // tokens)
    return programs // groups if programs % groups == 0 else 1


def _busy(M: int, N: int, tile: Strips, processors: int) -> float:
    """Share of the multiprocessors that have work, averaged over the run."""
    waves = _tiles(M, N, tile) / processors
    return waves / -(-waves // 1)


def _small_tiles_pay(N: int, K: int, r: int, share: float, much: bool) -> bool:
    """Whether two programs gain more by overlapping an activation with products than their small tiles cost.

    Always in short rows; in long ones, where an activation is little of a tile, where there is little to do in all.
    """
    if r < STRIP or K < 4096 or N < 2048:  # below 64 rows nothing else was tried
        return True
    if r == STRIP:
        return N >= 2 * K and not (much or share > 0.15)
    if N >= 2 * K:
        return not (much and share > 0.15)
    return N < 4096 and share <= 0.15


def _serves(rows: int, columns: int, r: int, c: int, dtype: torch.dtype) -> bool:
    # A strip is whole block rows or a part of one; a slice of x is whole block columns or a part of one.
    fits = (STRIP % r == 0 or r % STRIP == 0) and (64 % c == 0 or c % 64 == 0)
    narrowest = 32 if dtype == torch.float32 else 16
    return (
        dtype in _DTYPES
        and fits
        and r >= 16
        and c >= narrowest
        and _table_size(rows, columns) <= 2048
    )


def shared_bytes(tile: Strips, rows: int, columns: int, r: int, c: int, bytes_: int) -> int:
    """Shared memory of a program at most: slots of both rings, output buffers, table of masks, barriers."""
    x_box, w_box, _ = boxes(tile, r, c, bytes_)
    # Only float32 accuracy has single strips; it keeps a second half of x beside each slice.
    elements = (2 if tile.group == 1 else 1) * tile.x_slots * tile.tokens * x_box[1]
    elements += tile.group * tile.w_slots * max(1, STRIP // r) * w_box[0] * w_box[1]
    elements += tile.group * tile.y_slots * tile.part * STRIP
    # Three for each slot of x, two for each slot of blocks, 12 for drawn tiles, and what a pair shares. The compiler
    # adds up to 300 bytes.
    more = _partners(tile) - 1
    barriers = 8 * (3 * tile.x_slots + (2 + more) * tile.group * tile.w_slots + 12 + 4 * more)
    return elements * bytes_ + 8 * _table_size(rows, columns) + barriers + 320


def candidates(
    rows: int, columns: int, r: int, c: int, dtype: torch.dtype, *, exact: bool = False
) -> list[Strips]:
    """Tiles that can serve a problem and are worth timing: those of the rules, and a few more.

    Args:
        rows: R.
        columns: C.
        r: rows of a block.
        c: columns of a block.
        dtype: of x and the blocks.
        exact: ask for float32 accuracy of float32.

    Returns:
        Tiles, in no order; none where the kernel does not serve the problem.
    """
    if not _serves(rows, columns, r, c, dtype):
        return []
    if dtype == torch.float32:
        tiles = _EXACT if exact else _TF32
    elif c % 64 == 0:
        tiles = _WIDE
        if r >= STRIP and _CLUSTERS:
            tiles += _PAIRS
    elif r >= STRIP:
        tiles = _PACKED
    else:
        tiles = (STACKED, *_PACKED)
        if r == c == 16:
            tiles += (COPIED_16, COPIED_16_LONG)
        if r == c == 32:
            tiles += (COPIED_32, COPIED_32_DYNAMIC, COPIED_32_SHORT)
    return [
        tile
        for tile in tiles
        if tile.programs
        * (shared_bytes(tile, rows, columns, r, c, dtype.itemsize) + _SHARED_RESERVED)
        <= _SHARED_BYTES
    ]


def choose(
    M: int,
    rows: int,
    columns: int,
    r: int,
    c: int,
    nnz: int,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    activation: str = "none",
    processors: int = 132,
    slow_memory: bool = False,
    pairs: bool = False,
) -> Strips | None:
    """The tile for a problem, or None where the kernel does not serve it.

    Args:
        M: tokens.
        rows: R.
        columns: C.
        r: rows of a block.
        c: columns of a block.
        nnz: stored blocks.
        dtype: of x and the blocks.
        exact: ask for float32 accuracy of float32 (three TF32 products instead of one).
        activation: name of the fused activation.
        processors: multiprocessors of the device.
        slow_memory: whether the device's memory is an H100's rather than an H200's.
        pairs: whether programs can be paired, which takes a Triton that has :data:`hopper_kernels.CLUSTERS`.

    Returns:
        The tile or None.
    """
    if not _serves(rows, columns, r, c, dtype):
        return None
    entries = _table_size(rows, columns)
    N, K, share = rows * r, columns * c, nnz / (rows * columns)

    def rounds(tile: Strips) -> float:
        return _partners(tile) * _tiles(M, N, tile) / processors

    if dtype == torch.float32:
        if exact:
            return EXACT if entries <= 1024 else None
        if slow_memory and share <= 0.25 and (K <= 1024 or (c >= 64 and K < 4096)):
            return TF32_DYNAMIC
        if entries > 256 and r == STRIP and c >= 64 and K >= 4096 and rounds(TF32) >= 4:
            return TF32_DRAWN
        if entries > 256 or not (c < 64 or K >= 4096 or share > 0.25):
            return TF32
        # Where rows of tall blocks are long and few, slow memory cannot keep up with programs that are not in step.
        apart = slow_memory and r > STRIP and K > N
        drawn = K >= 4096 and rounds(TF32_THREE) >= 4 and not apart
        return TF32_THREE_DYNAMIC if drawn else TF32_THREE
    if c % 64:
        if r >= STRIP:
            if slow_memory and r > STRIP and c == 32 and share <= 0.15 and entries <= 256:
                return PACKED_SHORT
            return PACKED if entries <= 1024 else PACKED_TWO
        if r == c == 16 and entries <= 1024:
            return COPIED_16 if entries <= 256 else COPIED_16_LONG
        # With more blocks in short rows, TMA measured faster.
        if r == c == 32 and entries <= 1024 and (columns > 64 or share <= 0.25):
            if slow_memory and share <= 0.08 and min(N, K) <= 1024:
                return COPIED_32_SHORT
            drawn = K >= 4096 and rounds(COPIED_32) >= 4
            return COPIED_32_DYNAMIC if drawn else COPIED_32
        if entries > 1024 and r == c == 32 and K >= 4096:
            return PACKED_TWO_DRAWN
        if entries > 1024 or (r == 16 and columns > 64):
            return PACKED_TWO
        return STACKED
    # Long tiles that differ in length: with few blocks in a row they do so by much; with more of them, drawing needs
    # more work to pay. In a few rounds what is dealt out stays in step, in many it drifts apart.
    much = nnz * r * c * M >= 2**35
    uneven = K >= 4096 and (much or share <= 0.15)
    smooth = activation in ("gelu", "gelu_tanh", "silu")
    if smooth and entries <= 1024 and _small_tiles_pay(N, K, r, share, much):
        return TWO_PROGRAMS_DYNAMIC if slow_memory and 3 * N >= 5 * K else TWO_PROGRAMS
    if pairs and K >= 8192 and r > STRIP and share <= 0.32 and entries <= 1024:
        # What programs work on at a time must be too much for L2, and the rounds enough.
        tokens = processors * TWO_STRIPS_DYNAMIC.tokens * STRIP * TWO_STRIPS_DYNAMIC.group / N
        if tokens * K * dtype.itemsize >= _HELD_BYTES and rounds(PAIRS_TALL) >= 3:
            return PAIRS_TALL
    if not slow_memory and r > STRIP and entries <= 1024:
        # Drawing pays where the output is most of the traffic. Of few groups of outputs each program meets all anyway
        # (measured with 8192 to 50432 tokens).
        if N >= 2 * K and K <= 1024 and share <= 0.5:
            return TWO_SHORT_DYNAMIC if share <= 0.12 else TWO_STRIPS_DYNAMIC
        if N <= 2048:
            return TWO_SHORT if share <= 0.15 else TWO_STRIPS
    if slow_memory and r > STRIP and K < 4096 and entries <= 1024:
        # Rows of a few tall blocks differ the most. What drawing gains in a few rounds, zeroing the counter takes.
        if N >= 2 * K and share <= 0.5:
            return TWO_SHORT_DYNAMIC if share <= 0.25 else TWO_STRIPS_DYNAMIC
        if K >= 2 * N and 0.15 < share <= 0.32 and rounds(TWO_SHORT) >= 12:
            return TWO_SHORT_DYNAMIC
        if share <= 0.25:
            return TWO_SHORT
    if slow_memory and r == STRIP and share <= 0.25 and K < 4096 and entries <= 1024:
        if share <= 0.15 and N >= 2 * K:
            return TWO_SHORT_DYNAMIC
        if share <= 0.15:
            return TWO_SHORT if K <= 1024 else SHORT_TILES
        if min(N, K) <= 1024:
            return TWO_SHORT
    # A strip of low blocks needs slices of x like one with more blocks of 64 rows. Slow memory hides that.
    most = 0.15 if slow_memory else 0.15 * min(r, STRIP) / STRIP
    if K <= 1024 and share <= most and entries <= 1024:
        return SHORT_TILES
    if r > STRIP:
        drawn = uneven and (much or rounds(TWO_STRIPS) >= 4)
        return TWO_STRIPS_DYNAMIC if drawn else TWO_STRIPS
    if r == STRIP and uneven and share <= 0.5 and entries > 256:
        # Besides so large a table, three strips fit only in pairs. What is dealt out drifts apart, the farther the more
        # tiles there are, until L2 holds hardly any x: drawn tiles take down to half the time.
        return PAIRS if pairs and entries <= 1024 and rounds(PAIRS) >= 3 else TWO_DRAWN
    if entries > 256 or 1.1 * _busy(M, N, THREE_STRIPS, processors) < _busy(
        M, N, TWO_STRIPS, processors
    ):
        return TWO_STRIPS
    cut = _split_last(_tiles(M, N, THREE_STRIPS), THREE_STRIPS_HALVES, processors)[1] > 0
    if uneven and rounds(THREE_STRIPS) < 6 and (cut or share <= 0.15):
        return THREE_STRIPS_HALVES
    if uneven and rounds(THREE_STRIPS) >= 2:
        return THREE_STRIPS_DYNAMIC
    return THREE_STRIPS


@cache
def _layout(row_bytes: int, element_bits: int, programs: int, halved: bool) -> Any:
    """`halved` says that each program of a pair has half of the rows; otherwise both have all."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, row_bytes),
        element_bitwidth=element_bits,
        rank=2,
        cga_layout=[[int(halved), 0]] * (programs - 1),
    )


@cache
def _processors(index: int) -> int:
    """Multiprocessors of a Hopper GPU; 0 for any other."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if (properties.major, properties.minor) == (9, 0) else 0


@cache
def _memory_speed(index: int) -> float:
    """Gigabytes a second between a GPU and its memory."""
    return triton.testing.get_dram_gbps(index)


def _slow_memory(index: int) -> bool:
    """Whether a GPU's memory is more like an H100's than an H200's."""
    return _memory_speed(index) < _SLOW_MEMORY


def _exact(dtype: torch.dtype) -> bool:
    """Whether products must keep float32 accuracy, as torch's own switch says."""
    return dtype == torch.float32 and not allows_tf32()


def unavailable_reason(index: int = 0) -> str | None:
    """Why the Gluon kernel cannot run on CUDA device `index`; None when it can."""
    if _import_error is not None:
        return _import_error
    if _processors(index) == 0:
        return "the Gluon kernel needs a Hopper GPU (sm_90)"
    return None


def _choose(x: Tensor, crow: Tensor, values: Tensor, activation: str) -> Strips | None:
    nnz, r, c = values.shape
    return choose(
        x.shape[0],
        crow.shape[0] - 1,
        x.shape[1] // c,
        r,
        c,
        nnz,
        x.dtype,
        exact=_exact(x.dtype),
        activation=activation,
        processors=_processors(x.device.index),
        slow_memory=_slow_memory(x.device.index),
        pairs=_CLUSTERS,
    )


def supports(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
) -> bool:
    """Whether :func:`forward` serves this call."""
    if unavailable_reason(x.device.index) is not None or activation not in ACTIVATIONS:
        return False
    nnz, r, c = values.shape
    M, K = x.shape
    bytes_ = x.element_size()
    least = _MIN_MICROSECONDS / 2 if r == c == 16 else _MIN_MICROSECONDS
    return (
        M >= _MIN_TOKENS
        and M * (K + (crow.shape[0] - 1) * r) * bytes_
        >= least * 1e3 * _memory_speed(x.device.index)
        and K >= 64
        and nnz > 0
        and x.stride(1) == 1
        and x.stride(0) >= K
        and (x.stride(0) * bytes_) % 16 == 0
        and x.data_ptr() % 16 == 0
        and values.data_ptr() % 16 == 0
        and ((crow.shape[0] - 1) * r) % STRIP == 0
        and max(M, nnz * r) < 2**31 - 512
        and _choose(x, crow, values, activation) is not None
    )


def boxes(
    tile: Strips, r: int, c: int, bytes_: int, mixed: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the TMA boxes of x, of the values and of y, in elements of `bytes_` bytes.

    Those of x and y hold the tokens of both programs of a pair. `mixed` says that the block rows of a strip need not
    be neighbours.
    """
    chunk = min(c, 128 // bytes_)
    # Rows of 128 bytes are what TMA copies fastest: narrow blocks share a slice of x.
    x_width = 64 if bytes_ == 2 else chunk
    w_box = [min(r, STRIP), chunk]
    if tile.packed:
        block = min(r, STRIP) * c
        width = 64 if block >= 512 else 32  # a box has at least 8 rows
        w_box = [block // width, width]
    x_tokens = _partners(tile) * (tile.part if tile.halves else tile.tokens)
    return [x_tokens, x_width], w_box, [_partners(tile) * tile.part, r if mixed else STRIP]


def layouts(tile: Strips, r: int, c: int, bytes_: int, mixed: bool = False) -> tuple[Any, Any, Any]:
    """Gluon's layouts of :func:`boxes` in shared memory."""
    halved = (True, False, True)  # the tokens
    return tuple(
        _layout(box[1] * bytes_, 8 * bytes_, _partners(tile), half)
        for box, half in zip(boxes(tile, r, c, bytes_, mixed), halved, strict=True)
    )


def constants(
    tile: Strips,
    rows: int,
    columns: int,
    r: int,
    c: int,
    bytes_: int,
    exact: bool,
    has_order: bool,
    has_bias: bool,
    activation: str,
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    chunk = min(c, 128 // bytes_)
    return {
        "GROUP": tile.group,
        "STACK": max(1, STRIP // r),
        "SPLIT": max(1, r // STRIP),
        "CHUNKS": c // chunk,
        "WIDE": STRIP // chunk if bytes_ == 2 else 1,
        "PACKED": tile.packed,
        "COPIED": tile.copied,
        "EXACT": exact,
        "TABLE": _table_size(rows, columns),
        "X_SLOTS": tile.x_slots,
        "W_SLOTS": tile.w_slots,
        "Y_SLOTS": tile.y_slots,
        "HAS_ORDER": has_order,
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "DYNAMIC": tile.dynamic,
        "HALVES": tile.halves,
        "REGISTERS": tile.registers,
    }


def options(tile: Strips, overlap: bool = False) -> dict[str, Any]:
    """The kernel's compiler options; `overlap` says whether its launch overlaps the zeroing of the counter."""
    registers = {} if tile.programs == 1 else {"maxnreg": 80}
    return {"num_warps": 4, "num_ctas": _partners(tile)} | registers | (OVERLAP if overlap else {})


@lru_cache(maxsize=4096)
def _kernel(
    index: int,
    dtype: torch.dtype,
    tile: Strips,
    rows: int,
    columns: int,
    r: int,
    c: int,
    exact: bool,
    has_order: bool,
    has_bias: bool,
    activation: str,
    mixed: bool,
    turns: bool,
) -> "Kernel":
    """The kernel for launches that Triton compiles alike.

    Boxes are a part of what it compiles, and those of y depend on `mixed`. It makes a constant of `turn` where that
    is 1.
    """
    settings = (rows, columns, r, c, dtype.itemsize, exact, has_order, has_bias, activation)
    overlap = tile.dynamic and can_overlap(index)
    return Kernel(kernels.bsr_linear_strips, constants(tile, *settings), **options(tile, overlap))


@lru_cache(maxsize=4096)  # one for each number of tokens
def _launcher(
    index: int,
    dtype: torch.dtype,
    M: int,
    K: int,
    stride: int,
    rows: int,
    r: int,
    c: int,
    nnz: int,
    has_bias: bool,
    activation: str,
    has_plan: bool,
    mixed: bool,
    exact: bool,
    tile: Strips,
) -> Callable[..., Tensor]:
    """What :func:`launcher` returns, from all that it depends on."""
    columns, N = K // c, rows * r
    # Drawn, the longest rows of tall blocks come first; dealt out, sorted ones would come to the same programs.
    has_order = (tile.dynamic if r > STRIP else tile.grouped) and has_plan
    bytes_ = dtype.itemsize
    mixed = has_order and mixed
    x_box, w_box, y_box = boxes(tile, r, c, bytes_, mixed)
    w_width = w_box[1] if tile.packed else c
    w_shape = [nnz * r * c // w_width, w_width]
    layout, w_layout, y_layout = layouts(tile, r, c, bytes_, mixed)
    processors = _processors(index)
    tiles, halves = _split_last(_tiles(M, N, tile), tile, processors)
    groups = -(-N // (STRIP * tile.group))
    # Or pairs of them, which Triton takes for one.
    programs = min(tiles, max(1, tile.programs * processors // _partners(tile)))
    # Each pair keeps what it drew where both find it.
    counters = kernels.PAIR_NUMBERS.value * (1 + programs) if tile.pair else 1
    turn = _turn(tile, programs, groups, K * bytes_)
    settings = (rows, columns, r, c, exact, has_order, has_bias, activation)
    kernel = _kernel(index, dtype, tile, *settings, mixed, turn > 1)
    numbers = (tiles, halves if tile.halves else 1, groups, turn, rows, columns, nnz)

    def run(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        plan: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        y = torch.empty(shape, dtype=dtype, device=x.device)
        order = counter = crow
        if has_order:
            parts = split_plan(plan, rows, columns, nnz)
            order = parts.row_groups if r <= STRIP else parts.row_order
        if tile.dynamic:
            # An ordinary launch, which all earlier work precedes: the kernel has nothing else to wait for.
            counter = torch.zeros(counters, dtype=torch.int32, device=x.device)
        kernel(
            (programs, 1, 1),
            index,
            (values, y if bias is None else bias, crow, col, order, counter),
            *numbers,
            descriptors=(
                TensorDescriptor(x, [M, K], [stride, 1], x_box, layout),
                TensorDescriptor(values, w_shape, [w_width, 1], w_box, w_layout),
                TensorDescriptor(y, [M, N], [N, 1], y_box, y_layout),
            ),
        )
        return y

    return run


def launcher(
    x: Tensor,
    crow: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    *,
    tile: Strips | None = None,
) -> Callable[..., Tensor]:
    """All of :func:`forward` that is the same for other tensors like these.

    Returns:
        A function of x, crow, col, values, bias, plan and the shape of y, which returns y. Its x and y may have leading
        dimensions, where x lies in memory as the one here does.
    """
    nnz, r, c = values.shape
    if tile is None:
        tile = _choose(x, crow, values, activation)
        assert tile is not None
    return _launcher(
        x.device.index,
        x.dtype,
        *x.shape,
        x.stride(0),
        crow.shape[0] - 1,
        r,
        c,
        nnz,
        bias is not None,
        activation,
        plan is not None,
        plan is not None and is_mixed(plan, crow.shape[0] - 1, x.shape[1] // c, nnz),
        _exact(x.dtype),
        tile,
    )


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    *,
    tile: Strips | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias)` for a BSR weight W, where :func:`supports` says so.

    Args:
        x: `(M, K)`.
        crow: `(R + 1,)` int32.
        col: `(nnz,)` int32.
        values: `(nnz, r, c)` contiguous.
        bias: `(R * r,)` contiguous or None.
        activation: name of an activation.
        plan: packed plan or None; its groups of block rows share what they read of x.
        tile: overrides the choice by rule (for tuning and tests).

    Returns:
        `(M, R * r)` contiguous.
    """
    run = launcher(x, crow, values, bias, activation, plan, tile=tile)
    return run(
        x, crow, col, values, bias, plan, (x.shape[0], (crow.shape[0] - 1) * values.shape[1])
    )
