"""The Gluon product for Hopper: how `hopper_kernels.py`, which holds the device code, is launched.

It needs Triton's experimental Gluon language and an sm_90 GPU; where either is missing this file cannot be imported, or
is not asked for.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torchao_superblock.ops import hopper_kernels as kernels
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.launch import OVERLAP, Kernel
from torchao_superblock.ops.cuda.problem import TF32X3, Problem
from torchao_superblock.ops.cuda.tf32 import prepare_pack
from torchao_superblock.ops.cuda.tiles import HopperTile, table_entries
from torchao_superblock.ops.plan import STRIP, plan_length, split_plan

__all__ = ["boxes", "constants", "layouts", "options", "prepare"]

# Dynamic tiles that come last, and together: so many tokens, and of them no more (but for one tile) than about half of
# the L2 cache.
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
    """`halved` says that each program of a pair has half of the rows; otherwise both have all."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, row_bytes),
        element_bitwidth=element_bits,
        rank=2,
        cga_layout=[[int(halved), 0]] * (programs - 1),
    )


def boxes(
    tile: HopperTile, r: int, c: int, bytes_: int, mixed: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the TMA boxes of x, of the values and of y, in elements of `bytes_` bytes.

    Those of x and y hold the tokens of both programs of a pair. `mixed` says that the block rows of a strip need not
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


def layouts(
    tile: HopperTile, r: int, c: int, bytes_: int, mixed: bool = False
) -> tuple[Any, Any, Any]:
    """Gluon's layouts of :func:`boxes` in shared memory."""
    halved = (True, False, True)  # the tokens
    return tuple(
        _layout(box[1] * bytes_, 8 * bytes_, tile.partners, half)
        for box, half in zip(boxes(tile, r, c, bytes_, mixed), halved, strict=True)
    )


def constants(
    tile: HopperTile,
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
    stages = tile.stages(rows, columns, c, bytes_, exact)
    assert stages is not None, (tile, rows, columns)
    return {
        "GROUP": tile.strips,
        "STACK": max(1, STRIP // r),
        "SPLIT": max(1, r // STRIP),
        "CHUNKS": c // chunk,
        "WIDE": STRIP // chunk if bytes_ == 2 else 1,
        "PACKED": tile.load == "flat_tma",
        "COPIED": tile.load == "cp_async",
        "EXACT": exact,
        "TABLE": table_entries(rows, columns),
        "X_SLOTS": stages.x,
        "W_SLOTS": stages.w,
        "Y_SLOTS": tile.y_stages,
        "HAS_ORDER": has_order,
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "DYNAMIC": tile.schedule == "dynamic",
        "HALVES": tile.halves,
        "REGISTERS": stages.registers,
    }


def options(tile: HopperTile, overlap: bool = False) -> dict[str, Any]:
    """The kernel's compiler options; `overlap` says whether its launch overlaps the zeroing of the counter."""
    registers = {} if tile.programs == 1 else {"maxnreg": 80}
    return {"num_warps": 4, "num_ctas": tile.partners} | registers | (OVERLAP if overlap else {})


@lru_cache(maxsize=4096)
def _kernel(problem: Problem, tile: HopperTile, mixed: bool, turns: bool) -> Kernel:
    """The kernel for launches that Triton compiles alike; `problem` is one for all of them.

    Boxes are a part of what it compiles, and those of y depend on `mixed`. It makes a constant of `turn` where that
    is 1.
    """
    overlap = tile.schedule == "dynamic" and problem.device.overlaps
    settings = (
        *problem[2:6],
        problem.dtype.itemsize,
        problem.precision == TF32X3,
        problem.plan_entries > 0,
        problem.has_bias,
        problem.activation,
    )
    return Kernel(kernels.bsr_linear_strips, constants(tile, *settings), **options(tile, overlap))


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
    forward = _prepare_forward(problem, choice.tile)
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


def _prepare_forward(problem: Problem, tile: HopperTile) -> Callable[..., Tensor]:
    M, rows, columns, r, c, nnz, dtype = problem[1:8]
    K, N, stride, bytes_ = columns * c, rows * r, problem.strides[0], dtype.itemsize
    device_index, processors = problem.device.index, problem.device.processors
    dynamic = tile.schedule == "dynamic"
    # Dynamic, the longest rows of tall blocks come first; static, sorted ones would come to the same programs.
    has_order = (dynamic if r > STRIP else tile.grouped) and problem.plan_entries > 0
    mixed = has_order and problem.plan_entries > plan_length(rows, columns, nnz)
    x_box, w_box, y_box = boxes(tile, r, c, bytes_, mixed)
    w_width = w_box[1] if tile.load == "flat_tma" else c
    w_shape = [nnz * r * c // w_width, w_width]
    layout, w_layout, y_layout = layouts(tile, r, c, bytes_, mixed)
    tiles, halves = tile.cut_last(tile.count(M, N), processors)
    groups = -(-N // (STRIP * tile.strips))
    # Or pairs of them, which Triton takes for one.
    programs = min(tiles, max(1, tile.programs * processors // tile.partners))
    # Each pair keeps what it drew where both find it.
    counters = kernels.PAIR_NUMBERS.value * (1 + programs) if tile.cluster else 1
    turn = _turn(tile, programs, groups, K * bytes_)
    alike = problem._replace(kind="", M=0, nnz=0, strides=(), plan_entries=int(has_order))
    kernel = _kernel(alike, tile, mixed, turn > 1)
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
        if dynamic:
            # An ordinary launch, which all earlier work precedes: the kernel has nothing else to wait for.
            counter = torch.zeros(counters, dtype=torch.int32, device=x.device)
        kernel(
            (programs, 1, 1),
            device_index,
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
