"""Tiles: how each kernel cuts its work, in which order programs take it, and what follows from that.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size; BM x BN x BK the tile.
"""

from typing import NamedTuple

from torchao_superblock.ops.plan import STRIP

# Bytes of shared memory that a multiprocessor gives its programs, and what it keeps of them for each.
_SHARED_BYTES = 233472
_SHARED_RESERVED = 1024
# Registers a thread, by the strips of a tile and the programs of a multiprocessor.
_REGISTERS = {(1, 2): 32, (2, 2): 104, (2, 1): 216, (3, 1): 160}


def table_entries(R: int, C: int) -> int:
    """Entries of the Gluon kernel's table of column masks, 64 columns a mask: a power of two, to compile rarely."""
    return max(128, 1 << (R * -(-C // 64) - 1).bit_length())


class MatmulTile(NamedTuple):
    """Launch parameters of `matmul.bsr_matmul_kernel`."""

    BM: int
    BN: int
    BK: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    splits: int = 1
    # Longest block rows first: worth a load per program where programs are few.
    ordered: bool = True
    # Processors start with a long block row each, then get a short one, and so on by turns.
    even: bool = False


class BlocksTile(NamedTuple):
    """Launch parameters of `gradient.grad_values_kernel`."""

    BM: int
    BR: int
    BC: int
    num_warps: int
    num_stages: int
    waves: int = 4  # programs per processor to aim at, by splitting the tokens


class LinesTile(NamedTuple):
    """Launch parameters of `gradient.grad_values_lines_kernel`."""

    BM: int
    BG: int
    num_warps: int
    num_stages: int
    transposed: bool  # lines are block columns, not block rows
    waves: int = 8


class Stages(NamedTuple):
    """What follows from a tile of the Gluon kernel and a problem.

    Attributes:
        x: slices of x in flight.
        w: blocks in flight for each strip.
        registers: registers a thread of every warpgroup but the first, which gets what is left: consumers, or with
            float32 accuracy the warpgroup that splits x.
        shared_bytes: shared memory of a program at most.
    """

    x: int
    w: int
    registers: int
    shared_bytes: int


class HopperTile(NamedTuple):
    """How the Gluon kernel cuts the work, and in which order programs take it.

    Attributes:
        tokens: tokens of a tile (256 or 128).
        strips: strips of 64 outputs in a tile, one consumer warpgroup each (2 or 3; 1 for float32 accuracy).
        parts: accumulators that share a strip's tokens, stored one after the other (1 or 2).
        y_stages: output buffers of each strip (1, or 2 where there are two parts).
        programs: programs that share a multiprocessor (1 or 2).
        load: how blocks narrower than 64 columns travel: `"tma"`, row by row; `"flat_tma"`, as contiguous memory that
            reaches the tensor cores through registers; `"cp_async"`, copied by the threads of a warp.
        grouped: whether the plan chooses the strips of a tile, so that they share slices of x.
        schedule: `"static"`, every so manieth tile is a program's, or `"dynamic"`, programs draw theirs from a counter.
        halves: whether the tiles of a last round that would leave half of the programs idle or more are cut in halves
            (of two parts; not for float32 accuracy). Static, groups that need most then take turns with those that need
            least.
        cluster: whether two programs, each with `tokens` of its own, share a cluster and copy the blocks once for both
            (of one part; 16-bit numbers, blocks at least 64 wide and high).
    """

    tokens: int
    strips: int
    parts: int = 1
    y_stages: int = 1
    programs: int = 1
    load: str = "tma"
    grouped: bool = False
    schedule: str = "static"
    halves: bool = False
    cluster: bool = False

    def dynamic(self) -> "HopperTile":
        """The same cut with a dynamic schedule."""
        return self._replace(schedule="dynamic")

    @property
    def partners(self) -> int:
        """Programs that work on a tile together, each on a multiprocessor of its own."""
        return 2 if self.cluster else 1

    def count(self, M: int, N: int) -> int:
        """Tiles of a product."""
        return -(-M // (self.partners * self.tokens)) * -(-N // (STRIP * self.strips))

    def cut_last(self, tiles: int, processors: int) -> tuple[int, int]:
        """Tiles, and how many are halves: two for each of a last round that half of the programs would sit out."""
        left = tiles % (self.programs * processors) if self.halves else 0
        if 2 * left > self.programs * processors:
            left = 0
        return tiles + left, 2 * left

    def stages(self, R: int, C: int, c: int, itemsize: int, tf32x3: bool) -> Stages | None:
        """What shared memory has room for, or None if the tile does not fit.

        Args:
            R: block rows.
            C: block columns.
            c: columns of a block.
            itemsize: bytes of a number.
            tf32x3: whether a second half of x stands beside each slice.
        """
        row_bytes = min(c * itemsize, 128)  # of a block in flight; rows of x are always 128
        table = table_entries(R, C)
        if self.programs == 2:
            w = self.strips
        elif self.load == "cp_async" and c == 16:
            w = 8 if table <= 256 else 6
        else:
            w = 5 - self.strips + (self.cluster or row_bytes < 128)
        # More than so many slices of x in flight brought nothing.
        most = 4 if self.tokens == 256 else 5 if itemsize == 4 else 8 - self.strips + self.cluster
        fixed = self.strips * w * STRIP * row_bytes
        fixed += self.strips * self.y_stages * self.tokens // self.parts * STRIP * itemsize
        # Two barriers for each stage of blocks, 12 for a dynamic schedule, and what a cluster shares; the compiler adds
        # up to 300 bytes.
        more = self.cluster
        fixed += 8 * table + 8 * ((2 + more) * self.strips * w + 12 + 4 * more) + 320
        slice_bytes = 128 * self.tokens * (1 + tf32x3) + 3 * 8
        x = min(most, (_SHARED_BYTES // self.programs - _SHARED_RESERVED - fixed) // slice_bytes)
        if x < 2:
            return None
        registers = _REGISTERS[self.strips, self.programs]
        return Stages(x, w, registers, fixed + x * slice_bytes)


# "Three" strips use a slice of x for the most outputs and win once blocks are dense enough to keep the tensor cores
# busy; "two programs" overlap one tile's epilogue with another's products, which is what an activation is for 16-bit
# numbers.
THREE = HopperTile(256, 3, parts=2, grouped=True)
TWO = HopperTile(256, 2, parts=2)
TWO_PROGRAMS = HopperTile(128, 2, parts=2, programs=2)
# With few products a tile is mostly output: small tiles and deep rings overlap one strip's output with another's loads.
SHORT_THREE = HopperTile(128, 3, parts=2, y_stages=2)
# For slower memory. Dynamic tiles are worked on in order, while programs with a static schedule drift apart; on an H100
# that saves a tenth of the time of short rows where the output is at least twice the input, and up to a fifth for TF32.
SHORT_TWO = HopperTile(128, 2)
# Long tiles of different lengths: with a static schedule, some programs get up to a third more than others. A dynamic
# one costs one launch more, which zeroes the counter.
TWO_DYNAMIC = TWO._replace(y_stages=2).dynamic()
TWO_GROUPED = TWO._replace(grouped=True)
# For a few rounds of such tiles: programs with a static schedule stay in step and find x in the L2 cache. Where the
# last round is for half of them or less, its tiles are cut; half a tile takes 0.6 of its time.
THREE_HALVES = THREE._replace(halves=True)
# For x that L2 does not hold, as long rows make it. With tiles of half the tokens, programs work on half as much of x
# at a time, and pairs of them still read a block once for 256 tokens.
CLUSTER_THREE = HopperTile(128, 3, grouped=True, cluster=True).dynamic()
CLUSTER_TWO = HopperTile(128, 2, cluster=True).dynamic()
# TMA takes as long for a row of 32 bytes as for one of 128, and an absent block still is a box: for 16 x 16 blocks, the
# boxes of a strip take longer than its products.
COPIED = THREE._replace(load="cp_async")
FLAT_THREE = HopperTile(256, 3, parts=2, load="flat_tma")
FLAT_TWO = TWO._replace(load="flat_tma")
# For TF32 with many products, or long rows, three strips again use a slice of x for more of them.
TF32_THREE = HopperTile(128, 3, grouped=True)
# For float32 accuracy, a strip at a time is a chain of loading, splitting, products and output with little to overlap
# in itself; two programs overlap each other's. In the plan's order, neighbours in time still share slices of x in the
# L2 cache. A dynamic schedule gained 4 % where rows are short, nothing where they are long.
TF32X3_ONE = HopperTile(128, 1, parts=2, y_stages=2, programs=2, grouped=True).dynamic()
