"""Which kernel serves a problem, with which tile: the only place that decides it.

:func:`choose` takes a :class:`~torchao_superblock.ops.cuda.problem.Problem` and returns a :class:`Choice`: what tuning
found on this machine, or else what the rules below say. A tile is a cut of the work and a schedule; stages, registers
and shared memory follow from it. `TORCHAO_SUPERBLOCK_PRINT_CHOICE=1` prints each new problem and its choice.

The rules come from runs on an H200 and, for slower memory, on an H100; those for clusters, for tables of more than 256
entries and for activations in long rows from an H100 alone.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM x BN x BK the tile.
"""

import itertools
import os
import sys
import warnings
from typing import Any, NamedTuple

import torch

from torchao_superblock.ops.cuda import found
from torchao_superblock.ops.cuda.problem import TF32, TF32X3, Problem
from torchao_superblock.ops.cuda.tiles import (
    CLUSTER_THREE,
    CLUSTER_TWO,
    COPIED,
    FLAT_THREE,
    FLAT_TWO,
    SHORT_THREE,
    SHORT_TWO,
    TF32_THREE,
    TF32X3_ONE,
    THREE,
    THREE_HALVES,
    TWO,
    TWO_DYNAMIC,
    TWO_GROUPED,
    TWO_PROGRAMS,
    BlocksTile,
    HopperTile,
    LinesTile,
    MatmulTile,
    table_entries,
)
from torchao_superblock.ops.plan import STRIP

PRINT_VARIABLE = "TORCHAO_SUPERBLOCK_PRINT_CHOICE"
# A program that keeps making new shapes must not grow what is remembered for ever.
_MOST_PROBLEMS = 4096
# What offsets within a tile must stay below for 32-bit arithmetic.
_INT32_LIMIT = 2**31
# The tallest tile: what a tile's last row may be away from its first.
_TALLEST = 256


class Choice(NamedTuple):
    """What serves a problem.

    Attributes:
        kernel: `"matmul"` (plain Triton) or `"hopper"` (Gluon) for products, `"blocks"`, `"lines"` or `"dense"` for the
            gradient of the values.
        tile: that kernel's; a dense product has none.
        packed: whether a pass of its own prepares the blocks, for plain Triton: split in TF32 parts, and for the
            gradient of x transposed.
        int64: whether offsets within a tile of plain Triton need 64 bits.
    """

    kernel: str
    tile: MatmulTile | HopperTile | BlocksTile | LinesTile | None
    packed: bool = False
    int64: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# The decision.

_chosen: dict[Problem, Choice] = {}


def forget() -> None:
    """Decide anew (after tuning)."""
    _chosen.clear()


def choose(problem: Problem) -> Choice:
    """What serves a problem, decided once.

    Args:
        problem: of any kind.

    Returns:
        What tuning found for it on this machine, or what the rules say.
    """
    choice = _chosen.get(problem)
    if choice is None:
        choice = found.entries(problem.device) and tuned(problem)
        choice = choice or by_rule(problem)
        if os.environ.get(PRINT_VARIABLE) == "1":
            print(f"torchao_superblock: {problem} -> {choice}", file=sys.stderr, flush=True)
        if len(_chosen) >= _MOST_PROBLEMS:
            _chosen.clear()
        _chosen[problem] = choice
    return choice


def by_rule(problem: Problem) -> Choice:
    """What the shipped rules say."""
    if problem.kind == "grad_values":
        return _grad_values(problem)
    if gluon_serves(problem) and not _plain_is_faster(problem):
        return Choice("hopper", hopper_tile(problem))
    return plain(problem)


def plain(problem: Problem, tile: MatmulTile | None = None) -> Choice:
    """The plain Triton kernel for a product.

    Args:
        problem: a product.
        tile: to use; None asks the rule.
    """
    R, C, r, c, nnz = problem.R, problem.C, problem.r, problem.c, problem.nnz
    stride_m, stride_k = problem.strides
    # TF32 tensor cores take no transposed operand, so float32 blocks are transposed beforehand. Splitting them
    # beforehand pays in a forward where many tiles of tokens read them.
    if problem.kind == "forward":
        packed = problem.precision == TF32X3 and problem.M > 512
    else:
        packed = problem.precision in (TF32, TF32X3)
    if tile is None:
        if problem.M >= GLUON_TOKENS:  # where tokens may be counted
            problem = problem.bucketed()
        tile, processors = _matmul_tile(problem), problem.device.processors
        programs = -(-problem.M // tile.BM) * R * -(-r // tile.BN)
        # The work of processors is evened out where they get one or two programs. In bfloat16 with 64 outputs in a
        # tile, that saved an H200 up to 8 % of the time; with fewer it did not.
        if (
            problem.dtype.itemsize == 2
            and tile.BN >= 64
            and tile.splits == 1
            and processors < programs <= 2 * processors
        ):
            tile = tile._replace(even=True)
    furthest = _TALLEST * stride_m + C * c * stride_k
    int64 = max(furthest, _TALLEST * R * r, (nnz + 1) * r * c) >= _INT32_LIMIT
    return Choice("matmul", tile, packed, int64)


def smaller(choice: Choice) -> Choice:
    """A choice that needs less shared memory, for GPUs that have less of it than those the rules were made on.

    Args:
        choice: of a plain Triton kernel.

    Raises:
        RuntimeError: there is none.
    """
    tile: Any = choice.tile
    if tile.num_stages > 2:
        tile = tile._replace(num_stages=tile.num_stages - 1)
    elif tile.BM > 16:
        tile = tile._replace(BM=tile.BM // 2)
    elif tile.num_stages > 1:
        tile = tile._replace(num_stages=1)
    else:
        raise RuntimeError(
            f"torchao_superblock: this GPU has too little shared memory for the smallest tile, {tile}"
        )
    return choice._replace(tile=tile)


# ---------------------------------------------------------------------------------------------------------------------
# What tuning found.


def tuning_key(problem: Problem) -> dict[str, Any]:
    """What a tuned choice is good for: a kind of problem, without what differs from call to call."""
    return {
        "kind": problem.kind,
        "M": problem.bucketed().M,
        "R": problem.R,
        "C": problem.C,
        "r": problem.r,
        "c": problem.c,
        "nnz": problem.nnz,
        "itemsize": problem.dtype.itemsize,
        "precision": problem.precision,
        "activation": problem.activation,
        "gluon": gluon_serves(problem),
    }


def tuned(problem: Problem) -> Choice | None:
    """What tuning found for such a problem, if it can be used.

    Args:
        problem: of any kind; only forward products are tuned.
    """
    if problem.kind != "forward":
        return None
    key = tuning_key(problem)
    entry = found.lookup(problem.device, key)
    if entry is None:
        return None
    try:
        return from_json(entry, problem)
    except (KeyError, TypeError, ValueError) as error:
        found.adopt(problem.device, key, None)
        warnings.warn(
            f"torchao_superblock: what was tuned for {key} is passed over, because {error}; run "
            "torchao_superblock.tune again",
            stacklevel=2,
        )
        return None


def to_json(choice: Choice) -> dict[str, Any]:
    """A tuned choice as it is kept."""
    return {"kernel": choice.kernel, "tile": choice.tile._asdict()}


def from_json(entry: Any, problem: Problem) -> Choice:
    """A kept choice, for a problem.

    Args:
        entry: from :func:`to_json`.
        problem: a product.

    Raises:
        KeyError, TypeError, ValueError: it is not a choice of this version that can be launched for the problem.
    """
    if entry["kernel"] == "hopper":
        tile = HopperTile(**entry["tile"])
        if tile not in hopper_candidates(problem):
            raise ValueError(f"{tile} is not a tile of this version")
        return Choice("hopper", tile)
    tile = MatmulTile(**entry["tile"])
    sizes = (tile.BM, tile.BN, tile.BK)
    in_range = (
        entry["kernel"] == "matmul"
        and all(type(n) is int and n & (n - 1) == 0 and 16 <= n <= 256 for n in sizes)
        and tile.num_warps in (1, 2, 4, 8)
        and tile.GROUP_M in range(1, 1025)
        and tile.num_stages in range(1, 9)
        and tile.splits in range(1, 65)
        and isinstance(tile.ordered, bool)
        and isinstance(tile.even, bool)
    )
    if not in_range:
        raise ValueError(f"{tile} is not a tile that can be launched")
    return plain(problem, tile)


def candidates(problem: Problem) -> list[Choice]:
    """Choices worth timing for a forward product: the plain kernel's rule first, the Gluon kernel's last."""
    choices = [plain(problem, tile) for tile in _matmul_candidates(problem.bucketed())]
    if gluon_serves(problem):
        choices += [Choice("hopper", tile) for tile in hopper_candidates(problem)]
    return choices


# ---------------------------------------------------------------------------------------------------------------------
# The plain Triton product.

# Nonzero columns from which a block row keeps a program busy for longer than it takes to start and finish.
_LONG_ROW = 160


def _matmul_tile(problem: Problem) -> MatmulTile:
    """Measured on an H200; the same shapes suit an Ampere GPU, with less shared memory taken care of at launch.

    Small tiles and few stages win again and again: a block row holds few blocks, so a program spends much of its time
    starting and finishing, and only other programs on the same processor can hide that.
    """
    M, R, r, c = problem.M, problem.R, problem.r, problem.c
    itemsize, processors = problem.dtype.itemsize, problem.device.processors
    half = itemsize == 2
    BN = min(max(1 << (r - 1).bit_length(), 16), 128)  # the power of two at or above r
    if itemsize == 8:
        return MatmulTile(min(M, 32), min(BN, 32), 16, 8, 4, 2)
    widest = 64 if half else 32
    run = c & -c
    BK = run if 16 <= run < widest else widest  # within a block where that is possible at all
    row_length = problem.nnz * c // max(R, 1)  # nonzero columns of an average block row
    if M <= 64:
        # Few tokens: the time is that of streaming the values once. Deep pipelines keep most of a block row in flight;
        # programs that share a long one keep more, and their sums are added up afterwards. Where there are programs
        # enough, wide ones do with fewer instructions.
        few = half and M <= 16
        num_stages = 5 if half else 3
        if few:
            if c % 128 == 0:
                BK, num_stages = 128, 3
            if r % 64 == 0 and R * (r // 64) >= 1.5 * processors:
                return MatmulTile(16, 64, BK, 1, 4, num_stages)
            rows_fit = processors <= 5 * R <= 5 * processors
            if r == c == 64 and row_length >= 800 and rows_fit:
                # For 2048 x 8192 to 8192 x 28672, 90 % pruned, 2 to 14 % faster than what follows.
                return MatmulTile(16, 64, 64, 1, 2, 4, 5, even=True)
        BN = min(BN, 32 if few else 64)
        programs = R * -(-r // BN)
        splits = min(
            (3 if few else 2) * processors // max(programs, 1), row_length // min(4 * BK, 256), 8
        )
        return MatmulTile(min(M, 64), BN, BK, 1, 2 if few else 4, num_stages, max(splits, 1))
    short = row_length < _LONG_ROW
    BM = min(M, 128)
    num_stages = 2 if short else 3
    if problem.precision == TF32X3:
        BM, BN = min(M, 64), min(BN, 64)
    elif half and BN == 128:
        BM, num_stages = (min(M, 64), 2) if short else (BM, 3)
    elif half and BN == 64:
        num_stages = 2
    programs = -(-M // BM) * R * -(-r // BN)
    # Up to 512 tokens, four of their tiles read a block together; mostly there are no more.
    GROUP_M = 2 if BN == 128 and M > 512 else 4
    if (
        not short
        and half
        and BN >= 64
        and problem.device.capability >= 90
        and programs <= 2 * processors
    ):
        # One or two programs a processor have its shared memory to themselves, and nobody else to hide latency. Of wide
        # blocks, tiles of 128 tokens would be few and differ much: twice as many of 64, eight of which share a block.
        num_stages = 4
        if BN == 128:
            BM, GROUP_M = min(M, 64), 8
    return MatmulTile(BM, BN, BK, GROUP_M, 4, num_stages, 1, ordered=programs <= 16 * processors)


def _matmul_candidates(problem: Problem) -> list[MatmulTile]:
    rule = plain(problem).tile
    few_tokens = problem.M <= 64
    heights = [
        BM
        for BM in (16, 32, 64, 128, 256)
        if BM <= max(16, problem.M) and BM * 4 >= min(problem.M, 256)
    ]
    run = problem.c & -problem.c
    steps = sorted({rule.BK, *(BK for BK in (32, 64, 128) if BK <= max(run, rule.BK))})
    tiles = [rule]
    for BM, BK, num_warps, num_stages in itertools.product(heights, steps, (4, 8), (2, 3, 4)):
        accumulators = BM * rule.BN // (num_warps * 32) * (1 + (problem.precision == TF32X3))
        shared = num_stages * (BM + rule.BN) * BK * problem.dtype.itemsize
        if accumulators > 128 or shared > 200_000 or (num_warps == 8 and accumulators < 16):
            continue
        tiles += [
            MatmulTile(BM, rule.BN, BK, rule.GROUP_M, num_warps, num_stages, splits, rule.ordered)
            for splits in ({1, rule.splits, 2 * rule.splits} if few_tokens else (1,))
        ]
    tiles.append(rule._replace(even=not rule.even))
    if not few_tokens:
        tiles += [rule._replace(GROUP_M=group) for group in (1, 2, 4, 32)]
        tiles.append(rule._replace(ordered=not rule.ordered))
    return list(dict.fromkeys(tiles))


# ---------------------------------------------------------------------------------------------------------------------
# The gradient of the values.

# From which share of stored blocks a dense product, of which most is thrown away, is the faster gradient of 16-bit
# values, by the smaller side of a block: a small block costs as many reads as a large one and is less arithmetic.
# Measured on an H200 for 16 and 32 (a line through two sparsities, for 32 through one and the cost without blocks).
_DENSE_GRADIENT = {1: 0.01, 8: 0.03, 16: 0.065, 32: 0.2}
# Below this many tokens a dense gradient is mostly writing it.
_DENSE_GRADIENT_TOKENS = 4096


def _grad_values(problem: Problem) -> Choice:
    R, C, r, c, itemsize = problem.R, problem.C, problem.r, problem.c, problem.dtype.itemsize
    if itemsize == 2 and r * c <= 1024 and max(r, c) <= 64:
        side = min(r, c)
        dense_from = max(share for least, share in _DENSE_GRADIENT.items() if least <= side)
        if problem.M >= _DENSE_GRADIENT_TOKENS and problem.nnz > dense_from * R * C:
            return Choice("dense", None)
        # Long lines in wide tiles for the smallest blocks, short lines in narrower ones for the others.
        tile = LinesTile(64, 256, 4, 4, R > C) if side <= 16 else LinesTile(64, 128, 4, 4, C > R)
        return gradient(problem, tile)
    BR = min(max(1 << (r - 1).bit_length(), 16), 128)
    BC = min(max(1 << (c - 1).bit_length(), 16), 128)
    if itemsize == 8:
        return gradient(problem, BlocksTile(16, min(BR, 32), min(BC, 32), 4, 2))
    if itemsize == 4:
        # Two warps: with four, the compiler takes the warpgroup product, whose TF32 operands must be transposed first.
        if problem.precision == TF32X3:
            return gradient(problem, BlocksTile(32, min(BR, 32), min(BC, 64), 2, 3))
        return gradient(problem, BlocksTile(32, min(BR, 64), min(BC, 64), 2, 4))
    return gradient(problem, BlocksTile(64, BR, BC, 8 if BR * BC >= 128 * 128 else 4, 4, 2))


def gradient(problem: Problem, tile: BlocksTile | LinesTile) -> Choice:
    """A Triton kernel for the gradient of the values.

    Args:
        problem: of kind `"grad_values"`.
        tile: says which of the two.
    """
    grad_m, grad_n, x_m, x_k = problem.strides
    # A tile of lines spans an operand's whole width.
    R, C = (problem.R, problem.C) if isinstance(tile, LinesTile) else (1, 1)
    furthest = (
        _TALLEST * grad_m + R * problem.r * grad_n,
        _TALLEST * x_m + C * problem.c * x_k,
        problem.r * problem.c,
    )
    kernel = "lines" if isinstance(tile, LinesTile) else "blocks"
    return Choice(kernel, tile, int64=max(furthest) >= _INT32_LIMIT)


# ---------------------------------------------------------------------------------------------------------------------
# The Gluon product.

# Fewer tokens than this leave multiprocessors without a tile; the plain kernel splits finer.
GLUON_TOKENS = 2048
# Launching this kernel takes the host about twice as long as the plain one, where three TMA descriptors are made anew
# (with Triton 3.6 `launch.py` keeps them). That hides behind the GPU's work only where reading x and writing y takes
# its memory so many microseconds; or half of them for 16 x 16 blocks, for which the plain kernel takes twice as long.
_LEAST_MICROSECONDS = 18.5
# Gigabytes a second below which memory counts as slow: an H100 has 3350, an H200 4800.
_SLOW_MEMORY = 4100
# Of x, what single programs work on at a time; from here on clusters are faster.
_HELD_BYTES = 20e6
_GLUON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gluon_serves(problem: Problem) -> bool:
    """Whether the Gluon kernel can serve a problem on its device and is worth its launch."""
    R, r, c, M, itemsize = problem.R, problem.r, problem.c, problem.M, problem.dtype.itemsize
    N, K = problem.N, problem.K
    least = _LEAST_MICROSECONDS / 2 if r == c == 16 else _LEAST_MICROSECONDS
    return (
        problem.device.gluon
        and M >= GLUON_TOKENS
        and problem.kind != "grad_values"
        and M * (K + N) * itemsize >= least * 1e3 * problem.device.memory_rate
        and K >= 64
        and problem.nnz > 0
        # What TMA can read and write, padding of the last blocks left alone. The blocks of a gradient are a copy.
        and problem.strides[1] == 1
        and problem.strides[0] >= K
        and problem.strides[0] * itemsize % 16 == 0
        and N * itemsize % 16 == 0
        and problem.aligned[0]
        and (problem.aligned[1] or problem.kind == "grad_x")
        and R * r % STRIP == 0
        and max(M, problem.nnz * r) < 2**31 - 512
        and hopper_tile(problem) is not None
    )


def _plain_is_faster(problem: Problem) -> bool:
    """Measured for float32: with few narrow blocks in long rows, by a tenth."""
    K = problem.C * problem.c
    return (
        problem.dtype == torch.float32
        and problem.c < 64
        and K > 1024
        and problem.nnz * problem.c <= 0.25 * problem.R * K
    )


def _cuts(problem: Problem) -> bool:
    """Whether strips are whole block rows or parts of one, and slices of x whole block columns or parts of one."""
    r, c = problem.r, problem.c
    return (
        problem.dtype in _GLUON_DTYPES
        and (STRIP % r == 0 or r % STRIP == 0)
        and (64 % c == 0 or c % 64 == 0)
        and r >= 16
        and c >= (32 if problem.dtype == torch.float32 else 16)
        and table_entries(problem.R, problem.C) <= 2048
    )


def hopper_candidates(problem: Problem) -> list[HopperTile]:
    """Tiles of the Gluon kernel that can serve a problem and are worth timing: those of the rules, and a few more.

    Args:
        problem: a product.

    Returns:
        Tiles, in no order; none where the kernel does not serve the problem.
    """
    if not _cuts(problem):
        return []
    R, C, r, c, itemsize = *problem[2:6], problem.dtype.itemsize
    tf32x3 = problem.precision == TF32X3
    if tf32x3:
        tiles = [TF32X3_ONE, TF32X3_ONE._replace(schedule="static")]
        tiles.append(TF32X3_ONE._replace(grouped=False))
    elif itemsize == 4:
        grouped = SHORT_TWO._replace(grouped=True).dynamic()
        tiles = [SHORT_TWO, SHORT_TWO.dynamic(), grouped, TF32_THREE, TF32_THREE.dynamic()]
    elif c % 64 == 0:
        singles = (THREE, TWO_PROGRAMS, SHORT_THREE, SHORT_TWO)
        tiles = [*singles, *(tile.dynamic() for tile in singles)]
        tiles += [TWO, TWO_DYNAMIC, TWO_GROUPED.dynamic(), THREE_HALVES, HopperTile(128, 3)]
        if r >= STRIP and problem.device.clusters:
            tiles += [CLUSTER_THREE, CLUSTER_TWO]
    else:
        flat_grouped = FLAT_TWO._replace(grouped=True).dynamic()
        tiles = [THREE] if r < STRIP else []
        tiles += [FLAT_THREE, FLAT_TWO, flat_grouped]
        if r == c:
            tiles.append(COPIED)
        if r == c == 32:
            tiles.append(COPIED.dynamic())
    return [tile for tile in tiles if tile.stages(R, C, c, itemsize, tf32x3) is not None]


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


def hopper_tile(problem: Problem) -> HopperTile | None:
    """The Gluon kernel's tile for a problem, or None where that kernel cannot cut it.

    Args:
        problem: a product.
    """
    if not _cuts(problem):
        return None
    if problem.dtype == torch.float32:
        return _float32_tile(problem)
    if problem.c % 64:
        return _narrow_tile(problem)
    return _wide_tile(problem)


def _rounds(problem: Problem, tile: HopperTile) -> float:
    """Tiles that each multiprocessor gets."""
    tiles = tile.count(problem.M, problem.R * problem.r)
    return tile.partners * tiles / problem.device.processors


def _busy(problem: Problem, tile: HopperTile) -> float:
    """Share of the multiprocessors that have work, averaged over the run."""
    waves = _rounds(problem, tile)
    return waves / -(-waves // 1)


def _float32_tile(problem: Problem) -> HopperTile | None:
    R, C, r, c = problem[2:6]
    N, K, share, entries = R * r, C * c, problem.nnz / (R * C), table_entries(R, C)
    slow_memory = problem.device.memory_rate < _SLOW_MEMORY
    if problem.precision == TF32X3:
        return TF32X3_ONE if entries <= 1024 else None
    if slow_memory and share <= 0.25 and (K <= 1024 or (c >= 64 and K < 4096)):
        return SHORT_TWO.dynamic()
    many = K >= 4096 and _rounds(problem, SHORT_TWO) >= 4
    if entries > 256 and r == STRIP and c >= 64 and many:
        return SHORT_TWO._replace(grouped=True).dynamic()
    if entries > 256 or not (c < 64 or K >= 4096 or share > 0.25):
        return SHORT_TWO
    # Where rows of tall blocks are long and few, slow memory cannot keep up with programs that are not in step.
    apart = slow_memory and r > STRIP and K > N
    many = K >= 4096 and _rounds(problem, TF32_THREE) >= 4
    return TF32_THREE.dynamic() if many and not apart else TF32_THREE


def _narrow_tile(problem: Problem) -> HopperTile:
    """For 16-bit blocks of 16 or 32 columns."""
    R, C, r, c = problem[2:6]
    K, share, entries = C * c, problem.nnz / (R * C), table_entries(R, C)
    if r >= STRIP:
        return FLAT_THREE if entries <= 1024 else FLAT_TWO
    if r == c == 16 and entries <= 1024:
        return COPIED
    # With more blocks in short rows, TMA measured faster.
    if r == c == 32 and entries <= 1024 and (C > 64 or share <= 0.25):
        return COPIED.dynamic() if K >= 4096 and _rounds(problem, COPIED) >= 4 else COPIED
    if entries > 1024 and r == c == 32 and K >= 4096:
        return FLAT_TWO._replace(grouped=True).dynamic()
    return FLAT_TWO if entries > 1024 or (r == 16 and C > 64) else THREE


def _wide_tile(problem: Problem) -> HopperTile:
    """For 16-bit blocks at least 64 wide."""
    R, C, r, c, nnz, M = *problem[2:7], problem.M
    N, K, share, entries = R * r, C * c, nnz / (R * C), table_entries(R, C)
    slow_memory = problem.device.memory_rate < _SLOW_MEMORY
    # Long tiles that differ in length: with few blocks in a row they do so by much; with more of them, a dynamic
    # schedule needs more work to pay. In a few rounds a static one stays in step, in many it drifts apart.
    much = nnz * r * c * M >= 2**35
    uneven = K >= 4096 and (much or share <= 0.15)
    smooth = problem.activation in ("gelu", "gelu_tanh", "silu", "quick_gelu")
    roomy = entries <= 1024
    if smooth and roomy and _small_tiles_pay(N, K, r, share, much):
        return TWO_PROGRAMS.dynamic() if slow_memory and 3 * N >= 5 * K else TWO_PROGRAMS
    if problem.device.clusters and K >= 8192 and r > STRIP and share <= 0.32 and roomy:
        # What programs work on at a time must be too much for L2, and the rounds enough.
        tokens = problem.device.processors * TWO.tokens * STRIP * TWO.strips / N
        if tokens * K * 2 >= _HELD_BYTES and _rounds(problem, CLUSTER_TWO) >= 3:
            return CLUSTER_TWO
    if not slow_memory and r > STRIP and roomy:
        # A dynamic schedule pays where the output is most of the traffic. Of few groups of outputs each program meets
        # all anyway (measured with 8192 to 50432 tokens).
        if N >= 2 * K and K <= 1024 and share <= 0.5:
            return SHORT_TWO.dynamic() if share <= 0.12 else TWO_DYNAMIC
        if N <= 2048:
            return SHORT_TWO if share <= 0.15 else TWO
    if slow_memory and r > STRIP and K < 4096 and roomy:
        # Rows of a few tall blocks differ the most. What a dynamic schedule gains in a few rounds, zeroing the counter
        # takes.
        if N >= 2 * K and share <= 0.5:
            return SHORT_TWO.dynamic() if share <= 0.25 else TWO_DYNAMIC
        if K >= 2 * N and 0.15 < share <= 0.32 and _rounds(problem, SHORT_TWO) >= 12:
            return SHORT_TWO.dynamic()
        if share <= 0.25:
            return SHORT_TWO
    if slow_memory and r == STRIP and share <= 0.25 and K < 4096 and roomy:
        if share <= 0.15 and N >= 2 * K:
            return SHORT_TWO.dynamic()
        if share <= 0.15:
            return SHORT_TWO if K <= 1024 else SHORT_THREE
        if min(N, K) <= 1024:
            return SHORT_TWO
    # A strip of low blocks needs slices of x like one with more blocks of 64 rows. Slow memory hides that.
    most = 0.15 if slow_memory else 0.15 * min(r, STRIP) / STRIP
    if K <= 1024 and share <= most and roomy:
        return SHORT_THREE
    if r > STRIP:
        return TWO_DYNAMIC if uneven and (much or _rounds(problem, TWO) >= 4) else TWO
    if r == STRIP and uneven and share <= 0.5 and entries > 256:
        # Besides so large a table, three strips fit only in clusters. With a static schedule programs drift apart, the
        # farther the more tiles there are, until L2 holds hardly any x: a dynamic one takes down to half the time.
        pays = problem.device.clusters and roomy and _rounds(problem, CLUSTER_THREE) >= 3
        return CLUSTER_THREE if pays else TWO_GROUPED.dynamic()
    if entries > 256 or 1.1 * _busy(problem, THREE) < _busy(problem, TWO):
        return TWO
    cut = THREE_HALVES.cut_last(THREE.count(M, N), problem.device.processors)[1] > 0
    if uneven and _rounds(problem, THREE) < 6 and (cut or share <= 0.15):
        return THREE_HALVES
    return THREE.dynamic() if uneven and _rounds(problem, THREE) >= 2 else THREE
