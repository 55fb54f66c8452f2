"""CUDA backend: which kernel serves a call, with which tile sizes, and how it is launched with little host time.

Two kernels can serve the product, forward or transposed: the Gluon one in `hopper.py` where it exists, supports the
case and is the faster, and the plain Triton one (`triton_kernels.py`), which serves every case on every GPU. The
gradient of the values has two plain Triton kernels, and takes a dense product where that beats them.

A call at small M takes the GPU a few microseconds, so the host must not take twenty. What is decided once is
therefore kept: a :class:`_Product` or :class:`_BlockGradient` holds the compiled kernel and its constants, and is found
again by a key made of what the decision rests on. M enters that key as a bucket (powers of two), so serving many batch
sizes neither compiles nor decides again. A forward of exactly the same kind as an earlier one does not even look there:
:func:`call` leaves a closure with `fast_path.py`, which recognises such a call.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM x BN x BK the tile.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from torchao_superblock.ops import fast_path as direct
from torchao_superblock.ops import triton_kernels as kernels
from torchao_superblock.ops.activations import CODES
from torchao_superblock.ops.launch import OVERLAP, Kernel, can_overlap, watched
from torchao_superblock.ops.plan import Plan, build_plan, split_plan
from torchao_superblock.ops.precision import allows_tf32
from torchao_superblock.ops.triton_kernels import FMA, NATIVE, TF32, TF32X3

# Read when a kernel is decorated, so it cannot change later: kernels then run on CPU tensors.
INTERPRET: bool = triton.knobs.runtime.interpret
# Nonzero columns from which a block row keeps a program busy for longer than it takes to start and finish.
LONG_ROW = 160
# What offsets within a tile must stay below for 32-bit arithmetic.
INT32_LIMIT = 2**31


class _Device(NamedTuple):
    capability: int  # 90 for sm_90
    n_processors: int
    can_overlap: bool = False  # see launch.py


_devices: dict[int, _Device] = {}


def _device(index: int) -> _Device:
    device = _devices.get(index)
    if device is None:
        if INTERPRET:
            device = _Device(90, 132)
        else:
            properties = torch.cuda.get_device_properties(index)
            device = _Device(
                properties.major * 10 + properties.minor,
                properties.multi_processor_count,
                can_overlap(index),
            )
        _devices[index] = device
    return device


def _precision(dtype: torch.dtype, index: int) -> int:
    if dtype != torch.float32:
        return NATIVE
    if _device(index).capability < 80:
        return FMA
    return TF32 if allows_tf32() else TF32X3


# ---------------------------------------------------------------------------------------------------------------------
# Rules: tile sizes for a problem.


class Problem(NamedTuple):
    """What the choice of tile sizes rests on. For the gradient of x, the block grid is the transposed one."""

    kind: str  # "forward", "grad_x" or "grad_values"
    M: int  # bucket: a power of two, at least 16
    R: int
    C: int
    r: int
    c: int
    nnz: int
    itemsize: int  # bytes
    precision: int
    capability: int
    n_processors: int
    activation: str = "none"


class Tile(NamedTuple):
    """Launch parameters of `bsr_matmul_kernel`."""

    BM: int
    BN: int
    BK: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    splits: int = 1
    ordered: bool = (
        True  # longest block rows first: worth a load per program where programs are few
    )
    even: bool = False  # processors start with a long block row each, then get a short one, and so on by turns


class GradTile(NamedTuple):
    """Launch parameters of `grad_values_kernel`."""

    BM: int
    BR: int
    BC: int
    num_warps: int
    num_stages: int
    waves: int = 4  # programs per processor to aim at, by splitting the tokens


class LineTile(NamedTuple):
    """Launch parameters of `grad_values_lines_kernel`."""

    BM: int
    BG: int
    num_warps: int
    num_stages: int
    transposed: bool  # lines are block columns, not block rows
    waves: int = 8


def m_bucket(M: int) -> int:
    """The power of two at or above M, between 16 and 65536."""
    return min(1 << max(M - 1, 15).bit_length(), 65536)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _even(tile: Tile, problem: Problem) -> Tile:
    """`tile`, with the work of processors evened out where they get one or two programs.

    In bfloat16 with 64 outputs in a tile, that saved an H200 up to 8 % of the time; with fewer it did not.
    """
    programs = -(-problem.M // tile.BM) * problem.R * -(-problem.r // tile.BN)
    one_or_two = problem.n_processors < programs <= 2 * problem.n_processors
    measured = problem.itemsize == 2 and tile.BN >= 64 and tile.splits == 1
    return tile._replace(even=measured and one_or_two)


def matmul_tile(problem: Problem) -> Tile:
    """The shipped rule for `bsr_matmul_kernel`.

    Measured on an H200; the same shapes suit an Ampere GPU, with less shared memory taken care of at launch. Small
    tiles and few stages win again and again: a block row holds few blocks, so a program spends much of its time
    starting and finishing, and only other programs on the same processor can hide that.
    """
    M, r, c = problem.M, problem.r, problem.c
    BN = min(max(_power_of_two(r), 16), 128)
    if problem.itemsize == 8:
        return Tile(min(M, 32), min(BN, 32), 16, 8, 4, 2)
    widest = 64 if problem.itemsize == 2 else 32
    run = c & -c
    BK = run if 16 <= run < widest else widest  # within a block where that is possible at all
    row_length = problem.nnz * c // max(problem.R, 1)  # nonzero columns of an average block row
    if M <= 64:
        # Few tokens: the time is that of streaming the values once. Deep pipelines keep most of a block row in flight;
        # programs that share a long one keep more, and their sums are added up afterwards. Where there are programs
        # enough, wide ones do with fewer instructions.
        half, few = problem.itemsize == 2, M <= 16
        num_stages = 5 if half else 3
        if half and few:
            if c % 128 == 0:
                BK, num_stages = 128, 3
            if r % 64 == 0 and problem.R * (r // 64) >= 1.5 * problem.n_processors:
                return _even(Tile(16, 64, BK, 1, 4, num_stages), problem)
            rows_fit = problem.n_processors <= 5 * problem.R <= 5 * problem.n_processors
            if r == c == 64 and row_length >= 800 and rows_fit:
                # For 2048 x 8192 to 8192 x 28672, 90 % pruned, 2 to 14 % faster than what follows.
                return Tile(16, 64, 64, 1, 2, 4, 5, even=True)
        BN = min(BN, 32 if half and few else 64)
        programs = problem.R * -(-r // BN)
        per_processor = 3 if half and few else 2
        splits = min(
            per_processor * problem.n_processors // max(programs, 1),
            row_length // min(4 * BK, 256),
            8,
        )
        num_warps = 2 if half and few else 4
        return _even(Tile(min(M, 64), BN, BK, 1, num_warps, num_stages, max(splits, 1)), problem)
    short = row_length < LONG_ROW
    BM = min(M, 128)
    num_stages = 2 if short else 3
    if problem.precision == TF32X3:
        BM, BN = min(M, 64), min(BN, 64)
    elif problem.itemsize == 2 and BN == 128:
        BM, num_stages = (min(M, 64), 2) if short else (BM, 3)
    elif problem.itemsize == 2 and BN == 64:
        num_stages = 2
    programs = -(-M // BM) * problem.R * -(-r // BN)
    # Up to 512 tokens, four of their tiles read a block together; mostly there are no more.
    GROUP_M = 2 if BN == 128 and M > 512 else 4
    if (
        not short
        and problem.itemsize == 2
        and BN >= 64
        and problem.capability >= 90
        and programs <= 2 * problem.n_processors
    ):
        # One or two programs a processor have its shared memory to themselves, and nobody else to hide latency. Of wide
        # blocks, tiles of 128 tokens would be few and differ much: twice as many of 64, eight of which share a block.
        num_stages = 4
        if BN == 128:
            BM, GROUP_M = min(M, 64), 8
    ordered = programs <= 16 * problem.n_processors
    return _even(Tile(BM, BN, BK, GROUP_M, 4, num_stages, 1, ordered), problem)


# From which share of stored blocks a dense product, of which most is thrown away, is the faster gradient of 16-bit
# values, by the smaller side of a block: a small block costs as many reads as a large one and is less arithmetic.
# Measured on an H200 for 16 and 32 (a line through two sparsities, for 32 through one and the cost without blocks).
_DENSE_GRADIENT = {1: 0.01, 8: 0.03, 16: 0.065, 32: 0.2}
# Below this many tokens a dense gradient is mostly writing it.
_DENSE_GRADIENT_TOKENS = 4096


def grad_values_tile(problem: Problem) -> GradTile | LineTile | None:
    """The shipped rule for the gradient of the values: which of the two kernels, or None for a dense product."""
    if problem.itemsize == 2 and problem.r * problem.c <= 1024 and max(problem.r, problem.c) <= 64:
        side = min(problem.r, problem.c)
        dense_from = max(share for least, share in _DENSE_GRADIENT.items() if least <= side)
        if problem.M >= _DENSE_GRADIENT_TOKENS and problem.nnz > dense_from * problem.R * problem.C:
            return None
        # Long lines in wide tiles for the smallest blocks, short lines in narrower ones for the others.
        if side <= 16:
            return LineTile(64, 256, 4, 4, problem.R > problem.C)
        return LineTile(64, 128, 4, 4, problem.C > problem.R)
    BR = min(max(_power_of_two(problem.r), 16), 128)
    BC = min(max(_power_of_two(problem.c), 16), 128)
    if problem.itemsize == 8:
        return GradTile(16, min(BR, 32), min(BC, 32), 4, 2)
    if problem.itemsize == 4:
        # Two warps: with four, the compiler takes the warpgroup product, whose TF32 operands must be transposed first.
        if problem.precision == TF32X3:
            return GradTile(32, min(BR, 32), min(BC, 64), 2, 3)
        return GradTile(32, min(BR, 64), min(BC, 64), 2, 4)
    return GradTile(64, BR, BC, 8 if BR * BC >= 128 * 128 else 4, 4, 2)


class Found(NamedTuple):
    """What tuning.py found for a problem on this machine."""

    tile: Tile  # of the plain Triton kernel
    plain: bool = False  # whether plain Triton serves it even where the Gluon kernel could
    strips: Any = None  # the Gluon kernel's tile, where that kernel is the faster one


_tuned: dict[Problem, Found] = {}
_tuned_devices: set[int] = set()
# While a model is being tuned, called with the arguments of every forward.
_recorder: Callable[..., None] | None = None


def _load_tuned(index: int) -> None:
    if index not in _tuned_devices:
        _tuned_devices.add(index)
        from torchao_superblock.ops import tuning

        tuning.load(index)


def _tile(problem: Problem, rule: Callable[[Problem], Any], index: int) -> Any:
    _load_tuned(index)
    found = _tuned.get(problem)
    return rule(problem) if found is None else found.tile


# ---------------------------------------------------------------------------------------------------------------------
# Launching.


class _TracedKernel(Kernel):
    """A kernel whose launch is recorded in the graph that is being traced, for compilers to take over."""

    def __call__(
        self, grid: tuple[int, int, int], index: int, tensors: tuple[Tensor, ...], *numbers: int
    ) -> None:
        names = [name for name in self.function.arg_names if name not in self.constants_by_name]
        arguments = dict(zip(names, (*tensors, *numbers), strict=True))
        torch.library.wrap_triton(self.function)[grid](
            **arguments, **self.constants_by_name, **self.options
        )


def _smaller(tile: Any) -> Any:
    """A tile that needs less shared memory, for GPUs that have less of it than those the rules were made on."""
    if tile.num_stages > 2:
        return tile._replace(num_stages=tile.num_stages - 1)
    if tile.BM > 16:
        return tile._replace(BM=tile.BM // 2)
    if tile.num_stages > 1:
        return tile._replace(num_stages=1)
    raise RuntimeError(
        f"torchao_superblock: this GPU has too little shared memory for the smallest tile, {tile}"
    )


def _watched() -> bool:
    """Whether somebody wants to see launches (a profiler) or calls (tuning)."""
    return watched() or _recorder is not None


def _conditions(x: Tensor, values: Tensor, index: int) -> Callable[[int, int], bool]:
    """A question about a later call with other addresses of x and values: is all as it is now?

    All that a launch rests on and fast_path.py does not compare.
    """
    current_device = torch._C._cuda_getDevice
    x_offset, values_offset = x.data_ptr() % 16, values.data_ptr() % 16
    tf32 = allows_tf32() if x.dtype == torch.float32 else None

    def unchanged(x_at: int, values_at: int) -> bool:
        return (
            x_at % 16 == x_offset
            and values_at % 16 == values_offset
            and current_device() == index
            and (tf32 is None or allows_tf32() is tf32)
            and not _watched()
        )

    return unchanged


class _Product:
    """A prepared `bsr_matmul_kernel` launch: everything but the tensors and M."""

    def __init__(
        self,
        problem: Problem,
        index: int,
        *,
        transposed: bool,
        has_perm: bool,
        has_order: bool,
        has_bias: bool,
        has_low: bool,
        activation: str,
        wide: bool,
        kernel_type: type[Kernel] = Kernel,
    ) -> None:
        self.problem = problem
        self.kernel_type = kernel_type
        self.N = problem.R * problem.r
        self.activation = CODES[activation]
        self.has_low = has_low
        self.has_bias = has_bias
        self.constants = {
            "r": problem.r,
            "c": problem.c,
            "STRIDE_N": 1 if transposed else problem.c,
            "STRIDE_K": problem.r if transposed else 1,
            "HAS_PERM": has_perm,
            "HAS_LOW": has_low,
            "PRECISION": problem.precision,
            "FLOAT64": problem.itemsize == 8,
            "WIDE": wide,
        }
        self.accumulator = torch.float64 if problem.itemsize == 8 else torch.float32
        # A traced kernel is launched by the compiler, without OVERLAP.
        self.overlaps = kernel_type is Kernel and _device(index).can_overlap
        self.sizes = (problem.R, problem.C, problem.nnz)
        self.has_order = has_order
        self.set_tile(_tile(problem, matmul_tile, index))

    def set_tile(self, tile: Tile) -> None:
        self.tile = tile
        self.splits = tile.splits
        self.n_columns = self.problem.R * -(-self.problem.r // tile.BN)
        split = tile.splits > 1
        overlap = OVERLAP if self.overlaps else {}
        constants = self.constants | {
            "HAS_BIAS": self.has_bias and not split,
            "ACTIVATION": 0 if split else self.activation,
            "SPLIT": split,
            "HAS_ORDER": self.has_order and tile.ordered,
            "BM": tile.BM,
            "BN": tile.BN,
            "BK": tile.BK,
            "GROUP_M": tile.GROUP_M,
            "ROUND": self.problem.n_processors if tile.even else 0,
            "OVERLAPS": self.overlaps,
        }
        self.kernel = self.kernel_type(
            kernels.bsr_matmul_kernel,
            constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **overlap,
        )
        self.reduce = self.kernel_type(
            kernels.sum_splits_kernel,
            {
                "HAS_BIAS": self.has_bias,
                "ACTIVATION": self.activation,
                "BLOCK": 256,
                "OVERLAPS": self.overlaps,
            },
            num_warps=4,
            num_stages=2,
            **overlap,
        )

    def __call__(
        self,
        index: int,
        x: Tensor,
        start: Tensor,
        block: Tensor,
        perm: Tensor,
        order: Tensor,
        values: Tensor,
        low: Tensor,
        bias: Tensor | None,
        M: int,
        stride_m: int,
        stride_k: int,
    ) -> Tensor:
        N, splits = self.N, self.splits
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        out = y
        if splits > 1:
            out = torch.empty((splits, M, N), dtype=self.accumulator, device=x.device)
        if bias is None:
            bias = x
        tensors = (x, start, block, perm, order, values, low, bias, out)
        while True:
            grid = (-(-M // self.tile.BM) * self.n_columns, splits, 1)
            try:
                self.kernel(grid, index, tensors, M, stride_m, stride_k, N, *self.sizes)
                break
            except OutOfResources:
                self.set_tile(_smaller(self.tile))
        if splits > 1:
            self.reduce((-(-M * N // 256), 1, 1), index, (out, bias, y), M * N, N, splits)
        return y

    def bind(
        self,
        x: Tensor,
        values: Tensor,
        y: Tensor,
        index: int,
        M: int,
        stride_m: int,
        stride_k: int,
    ) -> direct.Run | None:
        """The forward that went from x and values to y, with nothing left to decide; None if it cannot be had."""
        N, splits = self.N, self.splits
        grid = (-(-M // self.tile.BM) * self.n_columns, splits, 1)
        launch = self.kernel.bind(grid, index, M, stride_m, stride_k, N, *self.sizes)
        grid = (-(-M * N // 256), 1, 1)
        reduce = self.reduce.bind(grid, index, M * N, N, splits) if splits > 1 else None
        if (
            not direct.USABLE
            or launch is None
            or self.has_low
            or (splits > 1 and reduce is None)
            or _watched()
        ):
            return None
        empty = direct.empty_strided_cuda if x.is_cuda else direct.empty_strided_cpu
        shape, strides, dtype, accumulator = tuple(y.shape), y.stride(), y.dtype, self.accumulator
        unchanged = _conditions(x, values, index)

        def forward(
            x: Tensor,
            crow: Tensor,
            col: Tensor,
            values: Tensor,
            bias: Tensor | None,
            out_features: int | None,
            activation: str,
            plan: Tensor | None,
        ) -> Tensor | None:
            x_at, values_at = x.data_ptr(), values.data_ptr()
            if not unchanged(x_at, values_at):
                return None
            y = empty(shape, strides, dtype)
            at, col_at, y_at = crow.data_ptr(), col.data_ptr(), y.data_ptr()
            order_at = at if plan is None else plan.data_ptr()
            bias_at = x_at if bias is None else bias.data_ptr()
            if splits == 1:
                launch(x_at, at, col_at, col_at, order_at, values_at, values_at, bias_at, y_at)
                return y
            out = empty((splits, M, N), (M * N, N, 1), accumulator)
            out_at = out.data_ptr()
            launch(x_at, at, col_at, col_at, order_at, values_at, values_at, bias_at, out_at)
            reduce(out_at, bias_at, y_at)
            return y

        return forward


class _BlockGradient:
    """A prepared `grad_values_kernel` launch: everything but the tensors and M."""

    walks_columns = False  # whether it uses the plan's transposed index

    def __init__(self, problem: Problem, tile: Any, wide: bool) -> None:
        self.problem = problem
        self.wide = wide
        self.accumulator = torch.float64 if problem.itemsize == 8 else torch.float32
        self.reduce = Kernel(
            kernels.sum_splits_kernel,
            {"HAS_BIAS": False, "ACTIVATION": 0, "BLOCK": 256, "OVERLAPS": False},
            num_warps=4,
            num_stages=2,
        )
        self.set_tile(tile)

    def set_tile(self, tile: Any) -> None:
        self.tile = tile
        problem = self.problem
        self.n_tiles = problem.nnz * -(-problem.r // tile.BR) * -(-problem.c // tile.BC)
        constants = {
            "r": problem.r,
            "c": problem.c,
            "PRECISION": problem.precision,
            "FLOAT64": problem.itemsize == 8,
            "WIDE": self.wide,
            "BM": tile.BM,
            "BR": tile.BR,
            "BC": tile.BC,
        }
        self._set_kernels(kernels.grad_values_kernel, constants)

    def _set_kernels(self, function: Any, constants: dict[str, Any]) -> None:
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        self.kernels = [
            Kernel(function, constants | {"SPLIT": split}, **options) for split in (False, True)
        ]

    def _operands(
        self,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        parts: Plan,
        strides: tuple[int, int, int, int],
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int, int], tuple[int, int]]:
        """The kernel's tensors, strides and grid sizes, in its order."""
        return (grad, x, parts.row_indices, col), strides, (self.problem.R, self.problem.C)

    def __call__(
        self,
        index: int,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        parts: Plan,
        strides: tuple[int, int, int, int],
    ) -> Tensor:
        """Launch over as many ranges of tokens as keep the processors busy, and add up their sums in order."""
        problem, M = self.problem, x.shape[0]
        tensors, strides, sizes = self._operands(grad, x, crow, col, parts, strides)
        numel = problem.nnz * problem.r * problem.c
        shape = (problem.nnz, problem.r, problem.c)
        out = torch.empty(shape, dtype=grad.dtype, device=grad.device)
        while True:
            tile = self.tile
            # At least 8 steps a program: below that, adding up the parts costs more than the parallelism brings.
            splits = -(-tile.waves * problem.n_processors // self.n_tiles)
            splits = max(1, min(splits, M // (8 * tile.BM)))
            tokens = -(-M // (splits * tile.BM)) * tile.BM
            splits = -(-M // tokens)
            target = out
            if splits > 1:
                target = torch.empty((splits, numel), dtype=self.accumulator, device=grad.device)
            try:
                self.kernels[splits > 1](
                    (self.n_tiles * splits, 1, 1),
                    index,
                    (*tensors, target),
                    M,
                    *strides,
                    *sizes,
                    problem.nnz,
                    tokens,
                )
                break
            except OutOfResources:
                self.set_tile(_smaller(tile))
        if splits > 1:
            self.reduce((-(-numel // 256), 1, 1), index, (target, out, out), numel, 1, splits)
        return out


class _LineGradient(_BlockGradient):
    """A prepared `grad_values_lines_kernel` launch: everything but the tensors and M."""

    def set_tile(self, tile: LineTile) -> None:
        self.tile = tile
        self.walks_columns = tile.transposed
        problem = self.problem
        f, g = (problem.c, problem.r) if tile.transposed else (problem.r, problem.c)
        self.n_tiles = problem.C if tile.transposed else problem.R
        constants = {
            "f": f,
            "g": g,
            "STRIDE_F": 1 if tile.transposed else problem.c,
            "STRIDE_G": problem.c if tile.transposed else 1,
            "HAS_PERM": tile.transposed,
            "WIDE": self.wide,
            "BM": tile.BM,
            "BF": max(_power_of_two(f), 16),
            "BG": tile.BG,
        }
        self._set_kernels(kernels.grad_values_lines_kernel, constants)

    def _operands(
        self,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        parts: Plan,
        strides: tuple[int, int, int, int],
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int, int], tuple[int, int]]:
        problem = self.problem
        if self.tile.transposed:
            tensors = (x, grad, parts.crow_t, parts.row_t, parts.perm_t, parts.col_order)
            return tensors, (*strides[2:], *strides[:2]), (problem.C, problem.R)
        return (grad, x, crow, col, col, parts.row_order), strides, (problem.R, problem.C)


class _DenseGradient:
    """The gradient of the values out of a dense product, where the stored blocks are many or tiny."""

    walks_columns = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(
        self,
        index: int,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        parts: Plan,
        strides: tuple[int, int, int, int],
    ) -> Tensor:
        problem = self.problem
        R, C, r, c = problem.R, problem.C, problem.r, problem.c
        blocks = (grad.t() @ x).view(R, r, C, c).transpose(1, 2)
        # Clamped, as the kernels do: a bad index gives wrong numbers, and no assertion on the device.
        rows, columns = parts.row_indices.clamp(0, R - 1), col.clamp(0, C - 1)
        return blocks[rows.long(), columns.long()].contiguous()


# Prepared launches by what the choice of tile rests on.
_launches: dict[tuple, Any] = {}
# What the last forward did: addresses of x and y, the size of y, and how to do it again at once.
_latest: tuple[int, int, int, Callable[[Tensor, Tensor, Tensor], direct.Run | None]] | None = None
# A program that keeps making new shapes must not grow these for ever; rebuilding an entry is cheap, because Triton
# keeps the compiled kernels.
_MOST_ENTRIES = 4096


def _remember(entries: dict[tuple, Any], key: tuple, entry: Any) -> Any:
    if len(entries) >= _MOST_ENTRIES:
        entries.clear()
    entries[key] = entry
    return entry


def forget_launches() -> None:
    """Decide anew at the next call (after tuning)."""
    _launches.clear()
    direct.forget()


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of x; a single row's own stride means nothing, so it is given the usual one."""
    stride_m, stride_k = x.stride()
    if x.shape[0] == 1:
        stride_m = x.shape[1]
    if x.shape[1] == 1:
        stride_k = 1
    return stride_m, stride_k


def _problem(
    kind: str,
    bucket: int,
    x: Tensor,
    R: int,
    C: int,
    r: int,
    c: int,
    nnz: int,
    precision: int,
    index: int,
    activation: str = "none",
) -> Problem:
    device = _device(index)
    return Problem(
        kind,
        bucket,
        R,
        C,
        r,
        c,
        nnz,
        x.element_size(),
        precision,
        device.capability,
        device.n_processors,
        activation,
    )


def _needs_64_bits(*extents: int) -> bool:
    return max(extents) >= INT32_LIMIT


# The tallest tile: what a tile's last row may be away from its first.
_TALLEST = 256


def _plain_forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    index: int,
) -> Tensor:
    global _latest
    M, K = x.shape
    stride_m, stride_k = _strides(x)
    bucket = m_bucket(M)
    key = (
        "forward",
        index,
        bucket,
        K,
        crow.shape,
        values.shape,
        stride_m,
        stride_k,
        x.dtype,
        x.dtype == torch.float32 and allows_tf32(),
        activation,
        bias is None,
        plan is None,
        x.data_ptr() % 16,
        values.data_ptr() % 16,
    )
    launch = _launches.get(key)
    if launch is None:
        strides = (stride_m, stride_k)
        launch = _forward_product(x, crow, values, bias, activation, plan, bucket, strides, index)
        _remember(_launches, key, launch)
    low = values
    if launch.has_low:
        values, low = _split_tf32(values, None, False, index)
    # The plan starts with row_order; without one crow stands in and is not read as an order.
    order = crow if plan is None else plan
    y = launch(index, x, crow, col, col, order, values, low, bias, M, stride_m, stride_k)
    bind = partial(launch.bind, index=index, M=M, stride_m=stride_m, stride_k=stride_k)
    _latest = (x.data_ptr(), y.data_ptr(), y.numel(), bind)
    return y


def _forward_problem(
    x: Tensor, crow: Tensor, values: Tensor, activation: str, bucket: int, index: int
) -> Problem:
    nnz, r, c = values.shape
    precision = _precision(x.dtype, index)
    R, C = crow.shape[0] - 1, x.shape[1] // c
    return _problem("forward", bucket, x, R, C, r, c, nnz, precision, index, activation)


def _forward_product(
    x: Tensor,
    crow: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    bucket: int,
    strides: tuple[int, int],
    index: int,
    kernel_type: type[Kernel] = Kernel,
) -> _Product:
    K = x.shape[1]
    problem = _forward_problem(x, crow, values, activation, bucket, index)
    R, r, c, nnz = problem.R, problem.r, problem.c, problem.nnz
    return _Product(
        problem,
        index,
        transposed=False,
        has_perm=False,
        has_order=plan is not None,
        has_bias=bias is not None,
        # Splitting the values beforehand pays where many tiles of tokens read them.
        has_low=problem.precision == TF32X3 and bucket > 512,
        activation=activation,
        wide=_needs_64_bits(
            _TALLEST * strides[0] + K * strides[1], _TALLEST * R * r, (nnz + 1) * r * c
        ),
        kernel_type=kernel_type,
    )


_pack_kernels: dict[tuple, Kernel] = {}


def _pack_kernel(
    r: int,
    c: int,
    has_perm: bool,
    transpose: bool,
    split: bool,
    kernel_type: type[Kernel] = Kernel,
) -> Kernel:
    constants = {
        "n": c if transpose else r,
        "k": r if transpose else c,
        "STRIDE_N": 1 if transpose else c,
        "STRIDE_K": c if transpose else 1,
        "HAS_PERM": has_perm,
        "SPLIT": split,
        "BLOCK": 1024,
    }
    return kernel_type(kernels.pack_blocks_kernel, constants, num_warps=4, num_stages=2)


def _pack(
    values: Tensor,
    perm: Tensor | None,
    transpose: bool,
    out: Tensor,
    split: bool,
    index: int,
    kernel: Kernel | None = None,
) -> None:
    """Write the stored blocks to `out`, permuted, transposed and split in TF32 parts as asked."""
    nnz, r, c = values.shape
    if nnz == 0:
        return
    if kernel is None:
        aligned = values.data_ptr() & 15 == 0
        key = (index, r, c, transpose, perm is None, split, values.dtype, aligned)
        kernel = _pack_kernels.get(key)
        if kernel is None:
            kernel = _pack_kernel(r, c, perm is not None, transpose, split)
            _pack_kernels[key] = kernel
    tensors = (values, values if perm is None else perm, out)
    kernel((-(-nnz * r * c // 1024), 1, 1), index, tensors, nnz)


def _split_tf32(
    values: Tensor,
    perm: Tensor | None,
    transpose: bool,
    index: int,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """High and low TF32 parts of the stored blocks, permuted and transposed as asked."""
    nnz, r, c = values.shape
    parts = torch.empty((2, nnz, r * c), dtype=torch.float32, device=values.device)
    _pack(values, perm, transpose, parts, True, index, kernel)
    return parts[0], parts[1]


_check_kernels: dict[tuple[int, torch.dtype, bool], Kernel] = {}


def _check_plan(
    out: Tensor, crow: Tensor, col: Tensor, parts: Plan, transposed: bool, index: int
) -> Tensor:
    """A gradient, made NaN if its plan is not of its index.

    Nothing else can tell without waiting for the device: what a layer knows of its plan says nothing while compiling,
    under DistributedDataParallel's broadcasts and for inference tensors. The launch is the price, a few microseconds.
    """
    key = (index, out.dtype, transposed)
    kernel = _check_kernels.get(key)
    if kernel is None:
        constants = {"TRANSPOSED": transposed, "BLOCK": 128}
        kernel = Kernel(kernels.check_plan_kernel, constants, num_warps=1, num_stages=1)
        _check_kernels[key] = kernel
    R, C, nnz = len(parts.row_order), len(parts.col_order), len(parts.row_indices)
    if transposed:
        tensors = (parts.crow_t, parts.row_t, parts.perm_t, parts.col_order, crow, col, out)
    else:
        tensors = (crow, parts.row_indices, parts.row_indices, parts.row_order, crow, col, out)
    lines, others = (C, R) if transposed else (R, C)
    height = out.shape[0]
    kernel((lines, 1, 1), index, tensors, lines, others, nnz, height, out.numel() // height)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The Hopper kernel, if there is one.

# Below this many tokens the plain kernel is as fast, with less to set up.
HOPPER_TOKENS = 1024
_hopper: ModuleType | None = None
_hopper_reason: str | None = None  # None: not looked for yet


def _load_hopper() -> ModuleType | None:
    """`hopper.py`, or None with the reason in `_hopper_reason`. It rests on an experimental part of Triton."""
    global _hopper, _hopper_reason
    if _hopper_reason is None:
        if INTERPRET:
            _hopper_reason = "kernels run in Triton's interpreter"
            return None
        try:
            from torchao_superblock.ops import hopper

            _hopper, _hopper_reason = hopper, "available"
        except Exception as error:
            _hopper_reason = f"not usable with triton {triton.__version__}: {error}"
    return _hopper


def hopper_kernel(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    index: int,
    *,
    tuned: bool = True,
) -> Callable[..., Tensor] | None:
    """The Gluon kernel, called like :func:`forward`, if it serves this call, and faster as far as is known.

    `tuned` lets what tuning found for forward products decide.
    """
    if INTERPRET or _device(index).capability != 90:
        return None
    hopper = _load_hopper()
    if hopper is None or not hopper.supports(x, crow, col, values, bias, activation, plan):
        return None
    _load_tuned(index)
    if tuned and _tuned:
        problem = _forward_problem(x, crow, values, activation, m_bucket(x.shape[0]), index)
        found = _tuned.get(problem)
        if found is not None and found.plain:
            return None
        if found is not None and found.strips is not None:
            return partial(hopper.forward, tile=found.strips)
    nnz, _, c = values.shape
    if x.dtype == torch.float32 and c < 64:
        # Measured: with few blocks in long rows the plain kernel is the faster one, by a tenth.
        K = x.shape[1]
        if K > 1024 and nnz * c <= 0.25 * (crow.shape[0] - 1) * K:
            return None
    return hopper.forward


def _bind_strips(
    run: Callable[..., Tensor], x: Tensor, values: Tensor, y: Tensor, *, index: int
) -> direct.Run | None:
    """The same for the Gluon kernel as :meth:`_Product.bind` for the plain one."""
    if not direct.USABLE or _watched():
        return None
    unchanged = _conditions(x, values, index)
    shape = tuple(y.shape)

    def forward(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        out_features: int | None,
        activation: str,
        plan: Tensor | None,
    ) -> Tensor | None:
        if not unchanged(x.data_ptr(), values.data_ptr()):
            return None
        return run(x, crow, col, values, bias, plan, shape)

    return forward


# ---------------------------------------------------------------------------------------------------------------------
# What ops/op.py calls.


def _index(x: Tensor) -> int:
    return -1 if INTERPRET else x.device.index


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor:
    """`activation(x @ W.T + bias)` for a BSR weight W.

    Args:
        x: `(M, K)`, M >= 1, any strides.
        crow: `(R + 1,)` int32.
        col: `(nnz,)` int32.
        values: `(nnz, r, c)` contiguous.
        bias: `(R * r,)` contiguous or None.
        activation: name of an activation.
        plan: packed plan or None.

    Returns:
        `(M, R * r)` contiguous.
    """
    global _latest
    index = _index(x)
    if not INTERPRET and index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return forward(x, crow, col, values, bias, activation, plan)
    if _recorder is not None:
        _recorder(x, crow, col, values, bias, activation, plan)
    if x.shape[0] >= HOPPER_TOKENS:
        kernel = hopper_kernel(x, crow, col, values, bias, activation, plan, index)
        if kernel is not None:
            hopper = _load_hopper()
            assert hopper is not None
            # What the kernel does first, kept for the next call like this one.
            tile = getattr(kernel, "keywords", {})
            run = hopper.launcher(x, crow, values, bias, activation, plan, **tile)
            N = (crow.shape[0] - 1) * values.shape[1]
            y = run(x, crow, col, values, bias, plan, (x.shape[0], N))
            bind = partial(_bind_strips, run, index=index)
            _latest = (x.data_ptr(), y.data_ptr(), y.numel(), bind)
            return y
    return _plain_forward(x, crow, col, values, bias, activation, plan, index)


def call(
    general: Callable[..., Tensor],
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    plan: Tensor | None = None,
) -> Tensor:
    """The op on CUDA tensors. A call like an earlier one skips what that one checked and decided.

    Checking arguments, choosing a kernel and preparing its launch take the host several times as long as a kernel at
    small M takes the GPU.

    Args:
        general: the op's general implementation over this backend, with the arguments that follow.
        x: as the op has it, as have all others.
        crow: crow_indices.
        col: col_indices.
        values: values.
        bias: bias.
        out_features: out_features.
        activation: activation.
        plan: plan.

    Returns:
        The op's output.
    """
    args = (x, crow, col, values, bias, out_features, activation, plan)
    y = direct.again(*args)
    if y is not None:
        return y
    global _latest
    _latest = None
    y = general(*args)
    latest = _latest
    if (
        latest is not None
        and _recorder is None
        # The kernel read and wrote these very tensors: nothing was copied, padded or cropped on the way.
        and latest[:2] == (x.data_ptr(), y.data_ptr())
        and y.numel() == latest[2]
        and crow.is_contiguous()
        and col.is_contiguous()
        and values.is_contiguous()
        and (bias is None or bias.is_contiguous())
        and (plan is None or plan.is_contiguous())
        and x.get_device() == torch._C._cuda_getDevice()
    ):
        run = latest[3](x, values, y)
        if run is not None:
            direct.remember(run, None, *args)
    return y


class aot_twin:
    """A backend whose forward can be traced into a graph: plain Triton launches that compilers see.

    `torch.export` keeps the op whole, which is right for a program that Python runs. A compiled package has no
    Python, so an ahead-of-time compiler is given this instead; see `aot.py`.
    """

    @staticmethod
    def forward(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        activation: str,
        plan: Tensor | None,
    ) -> Tensor:
        """As :func:`forward`, for tensors without data. A dynamic M takes the tile that suits its example value."""
        M = x.shape[0]
        example = M
        if isinstance(M, torch.SymInt):
            example = M.node.hint if M.node.has_hint() else 4096
        index = x.device.index or 0
        strides = (x.stride(0), x.stride(1))
        launch = _forward_product(
            x,
            crow,
            values,
            bias,
            activation,
            plan,
            m_bucket(example),
            strides,
            index,
            _TracedKernel,
        )
        low = values
        if launch.has_low:
            r, c = values.shape[1:]
            split = _pack_kernel(r, c, False, False, True, _TracedKernel)
            values, low = _split_tf32(values, None, False, index, split)
        order = crow if plan is None else plan
        return launch(index, x, crow, col, col, order, values, low, bias, M, strides[0], strides[1])


def grad_x(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, plan: Tensor | None, n_block_cols: int
) -> Tensor:
    """`grad @ W`: the same product as the forward, over the transposed index.

    Args:
        grad: `(M, R * r)`, M >= 1, any strides.
        crow: `(R + 1,)` int32.
        col: `(nnz,)` int32.
        values: `(nnz, r, c)` contiguous.
        plan: packed plan; None builds one.
        n_block_cols: C.

    Returns:
        `(M, C * c)` contiguous.
    """
    index = _index(grad)
    if not INTERPRET and index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return grad_x(grad, crow, col, values, plan, n_block_cols)
    M = grad.shape[0]
    nnz, r, c = values.shape
    R = crow.shape[0] - 1
    if plan is None:
        plan = build_plan(crow, col, n_block_cols)
    parts = split_plan(plan, R, n_block_cols, nnz)
    if M >= HOPPER_TOKENS and _device(index).capability == 90:
        # A forward over the transposed index, once the blocks are transposed: a pass of a few microseconds.
        blocks = values.new_empty((nnz, c, r))
        index_t = (parts.crow_t, parts.row_t)
        hopper = hopper_kernel(grad, *index_t, blocks, None, "none", None, index, tuned=False)
        if hopper is not None:
            _pack(values, parts.perm_t, True, blocks, False, index)
            out = hopper(grad, *index_t, blocks, None, "none", None)
            return _check_plan(out, crow, col, parts, True, index)
    stride_m, stride_n = _strides(grad)
    precision = _precision(grad.dtype, index)
    # TF32 tensor cores take no transposed operand, so float32 blocks are transposed beforehand.
    packed = precision in (TF32, TF32X3)
    key = (
        "grad_x",
        index,
        m_bucket(M),
        R,
        n_block_cols,
        nnz,
        r,
        c,
        stride_m,
        stride_n,
        grad.dtype,
        precision,
        grad.data_ptr() & 15 == 0,
        values.data_ptr() & 15 == 0,
    )
    launch = _launches.get(key)
    if launch is None:
        # The roles of rows and columns change places.
        problem = _problem(
            "grad_x", m_bucket(M), grad, n_block_cols, R, c, r, nnz, precision, index
        )
        launch = _Product(
            problem,
            index,
            transposed=not packed,
            has_perm=not packed,
            has_order=True,
            has_bias=False,
            has_low=precision == TF32X3,
            activation="none",
            wide=_needs_64_bits(
                _TALLEST * stride_m + R * r * stride_n,
                _TALLEST * n_block_cols * c,
                (nnz + 1) * r * c,
            ),
        )
        _remember(_launches, key, launch)
    low = values
    if packed:
        values, low = _split_tf32(values, parts.perm_t, True, index)
    out = launch(
        index,
        grad,
        parts.crow_t,
        parts.row_t,
        parts.perm_t,
        parts.col_order,
        values,
        low,
        None,
        M,
        stride_m,
        stride_n,
    )
    return _check_plan(out, crow, col, parts, True, index)


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    plan: Tensor | None,
    block_rows: int,
    block_cols: int,
) -> Tensor:
    """The stored blocks of `grad.T @ x`.

    Args:
        grad: `(M, R * r)`, M >= 1, any strides.
        x: `(M, C * c)`, any strides.
        crow: `(R + 1,)` int32.
        col: `(nnz,)` int32.
        plan: packed plan; None builds one.
        block_rows: r.
        block_cols: c.

    Returns:
        `(nnz, r, c)` contiguous.
    """
    index = _index(grad)
    if not INTERPRET and index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return grad_values(grad, x, crow, col, plan, block_rows, block_cols)
    nnz, r, c = col.shape[0], block_rows, block_cols
    if nnz == 0:
        return grad.new_empty((0, r, c))
    R, C = crow.shape[0] - 1, x.shape[1] // c
    if plan is None:
        plan = build_plan(crow, col, C)
    parts = split_plan(plan, R, C, nnz)
    strides = (*_strides(grad), *_strides(x))
    precision = _precision(grad.dtype, index)
    key = (
        "grad_values",
        index,
        m_bucket(x.shape[0]),
        R,
        C,
        nnz,
        r,
        c,
        strides,
        grad.dtype,
        precision,
        grad.data_ptr() & 15 == 0,
        x.data_ptr() & 15 == 0,
    )
    launch = _launches.get(key)
    if launch is None:
        bucket = m_bucket(x.shape[0])
        problem = _problem("grad_values", bucket, x, R, C, r, c, nnz, precision, index)
        tile = _tile(problem, grad_values_tile, index)
        if tile is None:
            launch = _DenseGradient(problem)
        else:
            gathers = isinstance(tile, LineTile)  # then a tile spans an operand's whole width
            wide = _needs_64_bits(
                _TALLEST * strides[0] + (R if gathers else 1) * r * strides[1],
                _TALLEST * strides[2] + (C if gathers else 1) * c * strides[3],
                r * c,
            )
            launch = (_LineGradient if gathers else _BlockGradient)(problem, tile, wide)
        _remember(_launches, key, launch)
    out = launch(index, grad, x, crow, col, parts, strides)
    return _check_plan(out, crow, col, parts, launch.walks_columns, index)


def backend_info() -> dict[str, object]:
    """What serves CUDA tensors here.

    Returns:
        `name` (`"triton"` or `"triton+gluon"`), `reason` (a sentence) and the versions and device behind it.
    """
    info: dict[str, object] = {"name": "triton", "triton": triton.__version__}
    if INTERPRET or not torch.cuda.is_available():
        info["reason"] = "Triton's interpreter" if INTERPRET else "no GPU is available"
        return info
    capability = torch.cuda.get_device_capability()
    info["device"] = torch.cuda.get_device_name()
    if capability != (9, 0):
        info["reason"] = (
            f"this GPU is sm_{capability[0]}{capability[1]}; the Gluon kernel is for sm_90"
        )
    elif _load_hopper() is None:
        info["reason"] = f"the Gluon kernel is {_hopper_reason}"
    else:
        info["name"] = "triton+gluon"
        info["reason"] = "Hopper: Gluon kernels where they are faster, plain Triton elsewhere"
    return info
