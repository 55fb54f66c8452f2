"""The Gluon product for Hopper: how `hopper_kernel.py`, which holds the device code, is launched.

It needs Triton's experimental Gluon language; where that is missing this file cannot be imported.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torchao_superblock.ops.cuda import hopper_kernel as kernels
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.launch import OVERLAP, Described, Kernel, row_major
from torchao_superblock.ops.cuda.problem import TF32X3, Problem
from torchao_superblock.ops.cuda.tf32 import prepare_pack
from torchao_superblock.ops.cuda.tiles import HopperTile, table_entries
from torchao_superblock.ops.plan import STRIP, parts_of, plan_length

# What a dynamic schedule takes last, and together: so many tokens, and of them no more (but for one tile) than about
# half of the L2 cache.
_LAST_TOKENS = 1024
_LAST_BYTES = 30e6


def _turn(tile: HopperTile, programs: int, groups: int, token_bytes: int) -> int:
    """The number of token tiles that the order of the tiles turns on.

    Static: after so many, the groups that programs take are shifted by one. After each; where the groups divide the
    programs, whenever these have taken a tile each, or a program would come back to every second or third group.

    Dynamic: so many come last, and together, because what they read of x fits in the L2 cache.
    """
    if tile.schedule == "dynamic":
        tokens = tile.partners * tile.tokens
        return max(1, int(min(_LAST_TOKENS, _LAST_BYTES / token_bytes)) // tokens)
    return programs // groups if programs % groups == 0 else 1


@cache
def _layout(row_bytes: int, element_bits: int, programs: int, halved: bool) -> Any:
    """`halved` says that each program of a cluster has half of the rows; otherwise both have all."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, row_bytes),
        element_bitwidth=element_bits,
        rank=2,
        cga_layout=[[int(halved), 0]] * (programs - 1),
    )


def _boxes(
    tile: HopperTile, r: int, c: int, bytes_: int, mixed: bool
) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the TMA boxes of x, of the values and of y, in elements of `bytes_` bytes.

    Those of x and y hold the tokens of both programs of a cluster. `mixed` says that the block rows of a strip need not
    be neighbours.
    """
    chunk = min(c, 128 // bytes_)
    # Rows of 128 bytes are what TMA copies fastest: narrow blocks share a slice of x.
    x_width = 64 if bytes_ == 2 else chunk
    w_box = [min(r, STRIP), chunk]
    if tile.load == "flat_tma":
        block = min(r, STRIP) * c
        width = 64 if block >= 512 else 32  # a box has at least 8 rows
        w_box = [block // width, width]
    x_tokens = tile.partners * (tile.tokens // tile.parts if tile.halves else tile.tokens)
    return (
        [x_tokens, x_width],
        w_box,
        [tile.partners * tile.tokens // tile.parts, r if mixed else STRIP],
    )


class Launch(NamedTuple):
    """What the kernel is launched with, besides tensors.

    Attributes:
        programs: programs, or clusters of them, which Triton takes for one.
        counters: int32 numbers, zero at first, from which a dynamic schedule takes tiles; 0 with a static one.
        order: the part of the plan by whose order block rows are worked on, or None.
        descriptors: of x, the values and y: the shape, the strides, the TMA box and its layout in shared memory.
        numbers: the kernel's numbers, in its order.
        constants: the kernel's compile-time arguments.
        options: the compiler's options.
    """

    programs: int
    counters: int
    order: str | None
    descriptors: tuple[tuple[list[int], list[int], list[int], Any], ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def compiled_for(self) -> tuple[Any, ...]:
        """What Triton compiles the kernel for, besides its dtypes: launches that agree in it can share what comes out.

        Boxes are a part of it, and which numbers are 1: Triton makes constants of these.
        """
        boxes = tuple(tuple(box) for _shape, _strides, box, _layout in self.descriptors)
        ones = tuple(number == 1 for number in self.numbers)
        return boxes, ones, tuple(self.constants.items()), tuple(self.options.items())


def constants(problem: Problem, tile: HopperTile, has_order: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments; `has_order` says whether the plan orders the block rows."""
    R, C, r, c, itemsize = *problem[2:6], problem.dtype.itemsize
    tf32x3 = problem.precision == TF32X3
    stages = tile.stages(R, C, c, itemsize, tf32x3)
    assert stages is not None, (problem, tile)
    width = min(c, 128 // itemsize)  # of a block in a slice of x
    return {
        "STRIPS_PER_TILE": tile.strips,
        "ROWS_PER_STRIP": max(1, STRIP // r),
        "STRIPS_PER_ROW": max(1, r // STRIP),
        "SLICES_PER_COLUMN": c // width,
        "COLUMNS_PER_SLICE": STRIP // width if itemsize == 2 else 1,
        "LOAD": tile.load,
        "TF32X3": tf32x3,
        "TABLE": table_entries(R, C),
        "X_STAGES": stages.x,
        "W_STAGES": stages.w,
        "Y_STAGES": tile.y_stages,
        "HAS_ORDER": has_order,
        "HAS_BIAS": problem.has_bias,
        "PADDING": problem.row_padding,
        "ACTIVATION": problem.activation,
        "DYNAMIC": tile.schedule == "dynamic",
        "HALVES": tile.halves,
        "REGISTERS": stages.registers,
    }


def launch(problem: Problem, tile: HopperTile) -> Launch:
    """How a product is launched. Asks no device, so that any can be looked at from anywhere.

    Args:
        problem: what is asked for, with its very number of tokens.
        tile: one of :func:`~torchao_superblock.ops.cuda.choose.hopper_candidates`.
    """
    M, R, C, r, c, nnz = problem[1:7]
    N, K, bytes_, processors = (
        problem.N,
        problem.K,
        problem.dtype.itemsize,
        problem.device.processors,
    )
    outputs = R * r  # of the tiles, which are made of whole blocks
    dynamic, entries = tile.schedule == "dynamic", problem.plan_entries
    order = None
    # With a dynamic schedule, the longest rows of tall blocks come first; a static one would bring sorted ones to the
    # same programs.
    if entries and (dynamic if r > STRIP else tile.grouped):
        order = "row_groups" if r <= STRIP else "row_order"
    mixed = order is not None and entries > plan_length(R, C, nnz)  # see plan.is_mixed
    x_box, w_box, y_box = _boxes(tile, r, c, bytes_, mixed)
    x_layout, w_layout, y_layout = (
        _layout(box[1] * bytes_, 8 * bytes_, tile.partners, halved)
        for box, halved in ((x_box, True), (w_box, False), (y_box, True))
    )
    w_width = w_box[1] if tile.load == "flat_tma" else c
    tiles, halves = tile.cut_last(tile.count(M, outputs), processors)
    groups = -(-outputs // (STRIP * tile.strips))
    programs = min(tiles, max(1, tile.programs * processors // tile.partners))
    counters = int(dynamic)
    if dynamic and tile.cluster:
        # Each cluster keeps what it took where both of its programs find it.
        counters = kernels.CLUSTER_NUMBERS.value * (1 + programs)
    turn = _turn(tile, programs, groups, K * bytes_)
    registers = {} if tile.programs == 1 else {"maxnreg": 80}
    # A launch may overlap the zeroing of its counter.
    overlap = OVERLAP if dynamic and problem.device.overlaps else {}
    return Launch(
        programs=programs,
        counters=counters,
        order=order,
        descriptors=(
            ([M, K], [problem.strides[0], 1], x_box, x_layout),
            ([nnz * r * c // w_width, w_width], [w_width, 1], w_box, w_layout),
            ([M, N], [N, 1], y_box, y_layout),
        ),
        numbers=(tiles, halves if tile.halves else 1, groups, turn, R, C, nnz),
        constants=constants(problem, tile, order is not None),
        options={"num_warps": 4, "num_ctas": tile.partners} | registers | overlap,
    )


def runner(problem: Problem, launch: Launch, kernel: Kernel) -> Callable[..., Tensor]:
    """A function that launches `kernel`, as :func:`prepare` returns it for a forward.

    Args:
        problem: what is asked for.
        launch: how it is launched.
        kernel: what is launched.

    Returns:
        A function of x, crow, col, values, bias, plan and the shape of y, which returns y.
    """
    programs, counters, order, (of_x, of_values, of_y), numbers, *_ = launch
    dtype, grid, device_index = problem.dtype, (programs, 1, 1), problem.device.index
    rows, columns, nnz, empty = problem.R, problem.C, problem.nnz, kernel.empty

    def describe(x: Tensor, values: Tensor, y: Tensor) -> tuple[TensorDescriptor, ...]:
        return (
            TensorDescriptor(x, *of_x),
            TensorDescriptor(values, *of_values),
            TensorDescriptor(y, *of_y),
        )

    described = Described(describe)

    def run(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        plan: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        y = empty(shape, row_major(shape), dtype)
        place = counter = crow
        if order is not None:
            place = getattr(parts_of(plan, rows, columns, nnz), order)
        if counters:
            # An ordinary launch, which all earlier work precedes: the kernel has nothing else to wait for.
            counter = torch.zeros(counters, dtype=torch.int32, device=x.device)
        kernel(
            grid,
            device_index,
            (values, y if bias is None else bias, crow, col, place, counter),
            *numbers,
            described=described,
            of=(x, values, y),
        )
        return y

    return run


@lru_cache(maxsize=4096)
def _kernel(device_index: int, dtype: torch.dtype, compiled_for: tuple[Any, ...]) -> Kernel:
    """The kernel for launches that Triton compiles alike."""
    *_, constants, options = compiled_for
    return Kernel(kernels.bsr_linear_strips, dict(constants), **dict(options))


def prepare(problem: Problem, choice: Choice) -> Callable[..., Tensor]:
    """All of a product but its tensors.

    Args:
        problem: a product, with its very number of tokens.
        choice: of kernel `"hopper"`.

    Returns:
        A function of x, crow, col, values, bias, plan and the shape of y, which returns y. Its x and y may have leading
        dimensions, where x lies in memory as the strides of the problem say. A forward takes a packed plan or None,
        whose groups of block rows share what they read of x; a gradient of x the parts of one.
    """
    how = launch(problem, choice.tile)
    kernel = _kernel(problem.device.index, problem.dtype, how.compiled_for)
    forward = runner(problem, how, kernel)
    if problem.kind == "forward":
        return forward
    # A forward over the transposed index, once the blocks are transposed: a pass of a few microseconds.
    pack = prepare_pack(problem, parts=False)

    def run(
        grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: None, plan: Any, shape: Any
    ) -> Tensor:
        blocks = pack(values, plan.perm_t)
        return forward(grad, plan.crow_t, plan.row_t, blocks, None, None, shape)

    return run
