"""The grid on which the plain Triton kernels are checked, wherever they run.

On a GPU the cases are ordinary tests (`test_backend.py`). Without one they run in Triton's interpreter, which must be
switched on before a kernel is defined: `test_interpreted.py` runs this file in a process of its own,
`TRITON_INTERPRET=1 python -m tests.ops.cuda.triton_cases GROUP`.

Legend: M tokens, R x C the block grid, r x c the block size.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from tests.reference import EXTREMES, TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.cuda import backend, choose, gradient, matmul
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.device import INTERPRET
from torchao_superblock.ops.cuda.launch import Kernel
from torchao_superblock.ops.cuda.matmul import alternated
from torchao_superblock.ops.cuda.problem import FMA, Problem
from torchao_superblock.ops.cuda.tiles import BlocksTile, LinesTile, MatmulTile
from torchao_superblock.ops.plan import build_plan, split_plan

DEVICE = "cpu" if INTERPRET else "cuda"
if INTERPRET and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    # Older interpreters make an index of a one-element array, which newer NumPy refuses: no loop to a loaded bound.
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: type, *rest: Any) -> None:
        _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_tensor_and_index

BLOCK_SIZES = [
    (16, 16),
    (32, 32),
    (64, 64),
    (1, 1),
    (3, 5),
    (8, 8),
    (64, 16),
    (16, 64),
    (128, 32),
    (48, 24),
    (40, 80),
    (130, 10),
]
DTYPES = [torch.float32, torch.float16, torch.float64]
if DEVICE == "cuda":
    BLOCK_SIZES += [(128, 128), (256, 64), (64, 256), (1, 64), (64, 1)]
    DTYPES.append(torch.bfloat16)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """torch's own switch."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# What changes a problem or its choice.
Change = Callable[[Any], Any]


def same(unchanged: Any) -> Any:
    return unchanged


def plain_forward(
    x,
    crow,
    col,
    values,
    bias=None,
    activation="none",
    plan=None,
    *,
    problem_change=same,
    change=same,
):
    """The plain Triton forward, also where the Gluon kernel would be chosen."""
    problem = problem_change(backend.forward_problem(x, crow, values, bias, activation, plan))
    choice = change(choose.plain(problem))
    shape = (x.shape[0], problem.N)
    return backend.run(problem, choice, x, crow, col, values, bias, plan, shape)


def plain_grad_x(grad, crow, col, values, plan, K, *, problem_change=same, change=same):
    """The plain Triton gradient of x, also where the Gluon kernel would be chosen."""
    problem = problem_change(backend.grad_x_problem(grad, crow, values, K))
    parts = split_plan(plan, crow.numel() - 1, problem.R, col.numel())
    shape = (grad.shape[0], problem.N)
    choice = change(choose.plain(problem))
    return backend.run(problem, choice, grad, crow, col, values, None, parts, shape)


def grad_values(grad, x, crow, col, plan, r, c, *, problem_change=same, change=same):
    """The gradient of the values."""
    problem = problem_change(backend.grad_values_problem(grad, x, crow, col, r, c))
    parts = split_plan(plan, problem.R, problem.C, problem.nnz)
    choice = change(choose.by_rule(problem))
    return backend.run(problem, choice, grad, x, crow, col, parts)


def stored_blocks(dense, crow, col, blocksize):
    """The stored blocks of a dense matrix, in stored order."""
    r, c = blocksize
    blocks = dense.view(dense.shape[0] // r, r, dense.shape[1] // c, c).transpose(1, 2)
    rows = torch.repeat_interleave(
        torch.arange(crow.numel() - 1, device=crow.device), crow.diff().long()
    )
    return blocks[rows, col.long()]


def check(
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    M: int,
    *,
    R: int = 3,
    C: int = 5,
    sparsity: float = 0.5,
    mask: torch.Tensor | None = None,
    activation: str = "none",
    tolerance: float | None = None,
    make_x: Callable[[int, int], torch.Tensor] | None = None,
    problem_change: Change = same,
    product: Change = same,
    gradient: Change = same,
) -> None:
    """All three kernels against dense float64, on fresh random inputs.

    The last three change each problem, and the choices for the two products and for the gradient of the values.
    """
    r, c = blocksize
    N, K = R * r, C * c
    dense, crow, col, values = random_bsr(
        N, K, blocksize, sparsity, dtype, DEVICE, seed=M, mask=mask
    )
    plan = build_plan(crow, col, C)
    if make_x is None:
        x = torch.randn(M, K, dtype=dtype, device=DEVICE)
        grad = torch.randn(M, N, dtype=dtype, device=DEVICE)
    else:
        x, grad = make_x(M, K).to(dtype), make_x(M, N).to(dtype)
    bias = torch.randn(N, dtype=dtype, device=DEVICE)
    tolerance = tolerance or TOLERANCE[dtype]
    where = f"block {blocksize}, {dtype}, M {M}, activation {activation}"

    def compare(name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
        error = relative_error(out, ref)
        assert math.isfinite(error) and error <= tolerance, f"{name}: error {error:.1e} at {where}"
        assert out.is_contiguous() and out.dtype == dtype, f"{name} at {where}"

    act = ACTIVATIONS[activation]
    changes = {"problem_change": problem_change, "change": product}
    y = plain_forward(x, crow, col, values, bias, activation, plan, **changes)
    compare("forward", y, act(x.double() @ dense.double().T + bias.double()))
    y = plain_forward(x, crow, col, values, **changes)
    compare("forward without bias and plan", y, x.double() @ dense.double().T)
    y = plain_grad_x(grad, crow, col, values, plan, K, **changes)
    compare("grad_x", y, grad.double() @ dense.double())
    if col.numel() > 0:
        changes["change"] = gradient
        y = grad_values(grad, x, crow, col, plan, r, c, **changes)
        compare("grad_values", y, stored_blocks(grad.double().T @ x.double(), crow, col, blocksize))


def check_block_sizes() -> None:
    for blocksize in BLOCK_SIZES:
        for M in (1, 37) if INTERPRET else (1, 37, 130, 1000):
            check(blocksize, torch.float32, M)


def check_dtypes() -> None:
    for dtype in DTYPES:
        for blocksize in ((16, 16), (64, 64), (3, 5), (40, 80)):
            for M in (35,) if INTERPRET else (1, 35, 300, 3000):
                check(blocksize, dtype, M)


def check_activations() -> None:
    for activation in ACTIVATIONS:
        for dtype in DTYPES:
            check((16, 32), dtype, 19, activation=activation)
    # NaN, infinity and what is nearly that pass as they do in torch.
    x = torch.tensor(EXTREMES, device=DEVICE)[:, None]
    _, crow, col, values = random_bsr(1, 1, 1, 0.0, torch.float32, DEVICE)
    values = torch.ones_like(values)
    for activation in ACTIVATIONS:
        y = plain_forward(x, crow, col, values, None, activation)
        expected = ACTIVATIONS[activation](x.double()).float()
        torch.testing.assert_close(
            y, expected, equal_nan=True, msg=lambda m, a=activation: f"{a}: {m}"
        )


def check_indices() -> None:
    """Empty rows and columns, one long row, no blocks at all; and bad indices stay within bounds."""
    long_row = torch.zeros(6, 40, dtype=torch.bool)
    long_row[2] = True
    long_row[4, 1:3] = True
    for mask in (torch.zeros(3, 4, dtype=torch.bool), long_row):
        for blocksize in ((16, 16), (5, 3), (64, 64)):
            check(blocksize, torch.float32, 20, R=mask.shape[0], C=mask.shape[1], mask=mask)
    _, crow, col, values = random_bsr(48, 64, 16, 0.5, torch.float32, DEVICE)
    x, grad = torch.randn(20, 64, device=DEVICE), torch.randn(20, 48, device=DEVICE)
    for sign, row, column in ((1, 2, 3), (-1, 0, 0)):
        bad = torch.full_like(col, sign * (2**31 - 1))
        plan = build_plan(crow, col, 4) * 0 + sign * 2**30
        # What is out of range counts as the nearest index in range: every program works on one block row and every
        # block is in one column. The other rows of y are not written, so what they hold is nobody's.
        y = plain_forward(x, crow, bad, values, None, "none", plan)[:, row * 16 : row * 16 + 16]
        weight = values[crow[row] : crow[row + 1]].double().sum(0)
        reference = x[:, column * 16 : column * 16 + 16].double() @ weight.T
        torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
        # No block lies between two equal ends.
        y = plain_forward(x, torch.full_like(crow, sign * 2**30), bad, values)
        torch.testing.assert_close(y, torch.zeros_like(y))
        assert backend.grad_x(grad, crow, bad, values, plan, 64).shape == x.shape
        assert backend.grad_values(grad, x, crow, bad, plan, 16, 16).shape == values.shape
    # A bad column spoils its own block row only.
    plan = build_plan(crow, col, 4)
    good = plain_forward(x, crow, col, values, None, "none", plan)
    for column in (-5, 2**31 - 1):
        bad = col.clone()
        bad[0] = column
        y = plain_forward(x, crow, bad, values, None, "none", plan)
        assert torch.equal(y[:, 16:], good[:, 16:])


def check_stale_plans() -> None:
    """A plan of another index, or a damaged one: a forward uses its order only, gradients are NaN, all of them."""
    crow = torch.tensor([0, 2, 3, 6], dtype=torch.int32, device=DEVICE)
    col = torch.tensor([0, 2, 1, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    other = torch.tensor([1, 2, 1, 0, 2, 3], dtype=torch.int32, device=DEVICE)
    other_rows = torch.tensor([0, 1, 3, 6], dtype=torch.int32, device=DEVICE)
    own = build_plan(crow, col, 4)

    def damaged(part: str, at: int, value: int) -> torch.Tensor:
        plan = own.clone()
        getattr(split_plan(plan, 3, 4, 6), part)[at] = value
        return plan

    of_columns = {
        "other columns": build_plan(crow, other, 4),
        "other rows": build_plan(other_rows, torch.tensor([0, 0, 2, 0, 1, 3]).int().to(col), 4),
        "another row of a block": damaged("row_t", 0, 1),
        "a row far outside": damaged("row_t", 0, 2**30),
        "a block twice": damaged("perm_t", 1, 0),
        "a position far outside": damaged("perm_t", 1, -(2**30)),
        "no block at all": damaged("crow_t", -1, 0),
        "blocks from 1 on": damaged("crow_t", 0, 1),
        "falling starts": damaged("crow_t", 1, 6),
        "a column twice in the order": damaged("col_order", 1, 0),
        "a column outside": damaged("col_order", 0, 4),
    }
    of_rows = {
        "other rows": build_plan(other_rows, col, 4),
        "another row of a block": damaged("row_indices", 5, 0),
        "a row twice in the order": damaged("row_order", 1, 2),
        "a row outside": damaged("row_order", 2, -1),
    }
    for dtype in (torch.float32, torch.float16):
        values = torch.randn(6, 16, 16, device=DEVICE).to(dtype)
        x = torch.randn(20, 64, device=DEVICE).to(dtype)
        grad = torch.randn(20, 48, device=DEVICE).to(dtype)

        def gradient(plan, choice, grad=grad, x=x):
            return backend.grad_values(grad, x, crow, col, plan, 16, 16, choice=choice)

        choices = [(Choice("blocks", BlocksTile(16, 16, 16, 4, 2)), of_rows)]
        if dtype == torch.float16:
            choices.append((Choice("dense", None), of_rows))
            choices.append((Choice("lines", LinesTile(16, 64, 4, 2, False)), of_rows))
            choices.append((Choice("lines", LinesTile(16, 64, 4, 2, True)), of_columns))
        for choice, plans in choices:
            # No plan and the right one give the same, without a NaN.
            assert torch.equal(gradient(None, choice), gradient(own, choice))
            for name, plan in plans.items():
                assert gradient(plan, choice).isnan().all(), (dtype, choice, name)
        right = backend.grad_x(grad, crow, col, values, own, 64)
        assert torch.equal(right, backend.grad_x(grad, crow, col, values, None, 64))
        for name, plan in of_columns.items():
            wrong = backend.grad_x(grad, crow, col, values, plan, 64)
            assert wrong.isnan().all(), (dtype, name)
        y = plain_forward(x, crow, col, values, None, "none", own)
        for name in ("other columns", "other rows"):
            same = plain_forward(x, crow, col, values, None, "none", of_columns[name])
            assert torch.equal(same, y), (dtype, name)


@triton.jit
def _order_kernel(out_ptr, total, ROUND: tl.constexpr):
    number = tl.program_id(0)
    tl.store(out_ptr + number, alternated(number, total, ROUND))


def check_strides() -> None:
    layouts = {
        "transposed": lambda M, K: torch.randn(K, M, device=DEVICE).T,
        "every second column": lambda M, K: torch.randn(M, 2 * K, device=DEVICE)[:, ::2],
        "expanded row": lambda M, K: torch.randn(1, K, device=DEVICE).expand(M, K),
        "expanded column": lambda M, K: torch.randn(M, 1, device=DEVICE).expand(M, K),
        "odd offset": lambda M, K: torch.randn(M * K + 1, device=DEVICE)[1:].view(M, K),
        "padded rows": lambda M, K: torch.randn(M, K + 3, device=DEVICE)[:, :K],
    }
    for make_x in layouts.values():
        for blocksize in ((16, 16), (64, 64), (3, 5)):
            check(blocksize, torch.float32, 21, make_x=make_x, tolerance=3e-6)


def _tile(tile: MatmulTile, choice: Choice) -> Choice:
    return choice._replace(tile=tile)


def _int64(choice: Choice) -> Choice:
    return choice._replace(int64=True)


def check_tiles() -> None:
    """What the rules reach only for large problems: gathered or not, split, 64-bit offsets."""
    blocks = Choice("blocks", BlocksTile(16, 16, 16, 4, 2))
    for blocksize in ((16, 16), (64, 32)):
        check(blocksize, torch.float32, 20, R=2, C=3, product=_int64, gradient=_int64)
        for tile in (
            MatmulTile(16, 16, 16, 1, 4, 2),
            MatmulTile(32, 32, 32, 3, 4, 2),
            MatmulTile(32, 16, 64, 1, 4, 2),
            MatmulTile(16, 16, 16, 1, 4, 2, splits=3),
            MatmulTile(32, 64, 64, 2, 4, 2, splits=2),
        ):
            product = partial(_tile, tile)
            check(blocksize, torch.float32, 50, R=2, C=3, activation="silu", product=product)
        check(blocksize, torch.float32, 300, R=2, C=2, gradient=lambda choice: blocks)

    # Sums that torch adds, as in compiled code.
    class Summed(Kernel):
        adds_splits = False

    dense, crow, col, values = random_bsr(32, 64, 16, 0.5, device=DEVICE)
    x, bias = torch.randn(20, 64, device=DEVICE), torch.randn(32, device=DEVICE)
    for b in (None, bias):
        problem = backend.forward_problem(x, crow, values, b, "silu", None)
        choice = choose.plain(problem, MatmulTile(16, 16, 16, 1, 4, 2, splits=3))
        out = matmul.prepare(problem, choice, Summed)(x, crow, col, values, b, None, (4, 5, 32))
        reference = torch.nn.functional.silu(torch.nn.functional.linear(x, dense, b))
        assert relative_error(out.view(20, 32), reference) <= 1e-5
    # Rounds of five programs, of which every second one is turned round: ends that are full, cut short or empty.
    for total, order in (
        (3, [0, 1, 2]),
        (8, [0, 1, 2, 3, 4, 7, 6, 5]),
        (12, [0, 1, 2, 3, 4, 9, 8, 7, 6, 5, 10, 11]),
    ):
        out = torch.full((total,), -1, dtype=torch.int32, device=DEVICE)
        _order_kernel[(total,)](out, total, 5)
        assert out.tolist() == order

    def five_processors(problem: Problem) -> Problem:
        return problem._replace(device=problem.device._replace(processors=5))

    for R, splits in ((1, 1), (5, 1), (7, 1), (10, 1), (13, 1), (4, 3), (9, 2)):
        product = partial(_tile, MatmulTile(16, 16, 16, 1, 4, 2, splits, even=True))
        check(
            *((16, 16), torch.float32, 16 if splits > 1 else 30),
            R=R,
            C=3,
            sparsity=0.6,
            problem_change=five_processors,
            product=product,
        )


def check_gradients_of_small_blocks() -> None:
    """Several blocks of a line at once, from either side, and out of a dense product."""
    long_row = torch.zeros(4, 9, dtype=torch.bool)
    long_row[1] = True  # several groups, the last one not full; other rows and a column are empty
    long_row[3, 2:8] = True
    for choice in (
        Choice("lines", LinesTile(16, 64, 4, 2, False)),
        Choice("lines", LinesTile(16, 64, 4, 2, True)),
        Choice("lines", LinesTile(32, 32, 4, 2, True, waves=64)),
        Choice("dense", None),
    ):
        small = partial(check, gradient=lambda _, choice=choice: choice)
        for blocksize in ((16, 16), (32, 16), (8, 24), (3, 5)):
            small(blocksize, torch.float16, 300, R=4, C=9, mask=long_row)
        wide = choice._replace(int64=True)
        check((16, 32), torch.float16, 20, product=_int64, gradient=lambda _, wide=wide: wide)
        for make_x in (
            lambda M, K: torch.randn(K, M, device=DEVICE).T,
            lambda M, K: torch.randn(M, K + 3, device=DEVICE)[:, 3:],
        ):
            small((16, 16), torch.float16, 70, make_x=make_x)
        _, crow, col, _ = random_bsr(48, 64, 16, 0.5, torch.float16, DEVICE)
        grad = torch.randn(20, 48, dtype=torch.float16, device=DEVICE)
        x = torch.randn(20, 64, dtype=torch.float16, device=DEVICE)
        wild = torch.full_like(col, 2**31 - 1)
        for bad in (wild, -wild):
            plan = build_plan(crow, col, 4).clamp_(min=2**30) * bad.sign()[0]
            backend.grad_values(grad, x, crow, bad, plan, 16, 16, choice=choice)
    none = col.new_empty(0)
    nothing = backend.grad_values(grad, x, torch.zeros_like(crow), none, None, 16, 16)
    assert nothing.shape == (0, 16, 16)
    # The rules' own choices, where lines and ranges of tokens are many enough to be split.
    _, crow, col, _ = random_bsr(64, 128, 16, 0.5, torch.float16, DEVICE)
    plan = build_plan(crow, col, 8)
    grad = torch.randn(1100, 64, dtype=torch.float16, device=DEVICE)
    x = torch.randn(1100, 128, dtype=torch.float16, device=DEVICE)
    first = backend.grad_values(grad, x, crow, col, plan, 16, 16)
    assert torch.equal(first, backend.grad_values(grad, x, crow, col, plan, 16, 16))
    blocks = stored_blocks(grad.double().T @ x.double(), crow, col, (16, 16))
    assert relative_error(first, blocks) < TOLERANCE[torch.float16]


def among_nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers; the memory around each row of them holds NaN."""
    wide = torch.full((*(n + 2 for n in shape[:-1]), shape[-1] + 7), math.nan, device=DEVICE)
    view = wide.to(dtype)[(*(slice(1, -1) for _ in shape[:-1]), slice(3, -4))]
    return view.copy_(torch.randn(shape))


def before_a_hole(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers at the end of the process's memory there: whoever reads or writes behind them ends the program.

    On a GPU they have NaN around them.
    """
    numel = math.prod(shape)
    if DEVICE == "cuda" or sys.platform != "linux":
        around = torch.full((numel + 64,), math.nan, dtype=dtype, device=DEVICE)
        return around[32:-32].view(shape).copy_(torch.randn(shape))
    end = -(-numel * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, end + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0) == 0
    offset = end - numel * dtype.itemsize
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel, offset=offset)
    return tensor.view(shape).copy_(torch.randn(shape))


class Guarded(Kernel):
    """A kernel whose outputs have memory around them, in which it must not write."""

    buffers: ClassVar[list[tuple[torch.Tensor, int, int]]] = []

    @staticmethod
    def empty(shape: tuple, strides: tuple, dtype: torch.dtype) -> torch.Tensor:
        numel, guard = math.prod(shape), 512
        buffer = torch.full((numel + 2 * guard,), -77.0, dtype=dtype, device=DEVICE)
        Guarded.buffers.append((buffer, guard, guard + numel))
        return buffer[guard : guard + numel].as_strided(shape, strides)

    @classmethod
    def check(cls) -> None:
        for buffer, start, end in cls.buffers:
            assert (buffer[:start] == -77.0).all() and (buffer[end:] == -77.0).all()
        cls.buffers.clear()


def compare_padded(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    M: int,
    *,
    make_x: Callable[..., torch.Tensor] = among_nans,
    product: Change = same,
    gradients: tuple[Change, ...] = (same,),
    problem_change: Change = same,
    tolerance: float | None = None,
) -> None:
    """All kernels for a weight whose last blocks are padded, with numbers that must not count."""
    (N, K), (r, c) = shape, blocksize
    R, C = -(-N // r), -(-K // c)
    mask = torch.rand(R, C, generator=torch.Generator().manual_seed(M)) < 0.5
    mask[-1, -1] = mask[0, -1] = mask[-1, 0] = True
    dense, crow, col, values = random_bsr(
        R * r, C * c, blocksize, dtype=dtype, device=DEVICE, mask=mask
    )
    dense, plan = dense[:N, :K].double(), build_plan(crow, col, C)
    x, grad = make_x(M, K, dtype=dtype), make_x(M, N, dtype=dtype)
    bias = make_x(1, N, dtype=dtype)[0]
    tolerance, where = tolerance or TOLERANCE[dtype], (shape, blocksize, dtype, M)
    z = x.double() @ dense.T
    for b, p, activation in ((bias, plan, "silu"), (None, None, "none")):
        asked = backend.forward_problem(x, crow, values, b, activation, p, N)
        asked = problem_change(asked)
        run = matmul.prepare(asked, product(choose.plain(asked)), Guarded)
        y = run(x, crow, col, values, b, p, (M, N))
        expected = ACTIVATIONS[activation](z if b is None else z + b.double())
        assert relative_error(y, expected) <= tolerance, ("forward", *where)
    asked = problem_change(backend.grad_x_problem(grad, crow, values, K))
    run = matmul.prepare(asked, product(choose.plain(asked)), Guarded)
    y = run(grad, crow, col, values, None, split_plan(plan, R, C, col.numel()), (M, K))
    assert relative_error(y, grad.double() @ dense) <= tolerance, ("grad_x", *where)
    full = torch.zeros(R * r, C * c, dtype=torch.float64, device=DEVICE)
    full[:N, :K] = grad.double().T @ x.double()
    inside = torch.zeros(R * r, C * c, device=DEVICE)
    inside[:N, :K] = 1
    padding = stored_blocks(inside, crow, col, blocksize) == 0
    for change in gradients:
        asked = problem_change(backend.grad_values_problem(grad, x, crow, col, r, c))
        run = gradient.prepare(asked, change(choose.by_rule(asked)), Guarded)
        out = run(grad, x, crow, col, split_plan(plan, R, C, col.numel()))
        blocks = stored_blocks(full, crow, col, blocksize)
        assert relative_error(out, blocks) <= tolerance, ("grad_values", *where)
        assert not out[padding].any(), ("grad_values of padding", *where)
    Guarded.check()


def check_padding() -> None:
    """Nothing beyond x, grad, bias and the outputs is read or written, and no number there counts."""

    shapes = {
        (37, 53): ((16, 16), (64, 64), (3, 5)),
        (104, 72): ((32, 32), (64, 16)),  # 8 of 32, 40 of 64
    }
    if not INTERPRET:
        shapes |= {(37, 53): BLOCK_SIZES, (1000, 64): ((32, 32), (64, 64))}
        shapes |= {(2730, 1024): ((64, 64),), (1024, 2730): ((64, 64),), (50257, 64): ((64, 64),)}
    of_blocks = lambda _: Choice("blocks", BlocksTile(16, 16, 16, 4, 2))
    by_rows = lambda _: Choice("lines", LinesTile(16, 64, 4, 2, False))
    by_columns = lambda _: Choice("lines", LinesTile(16, 64, 4, 2, True))
    of_lines = [by_rows, by_columns]
    dense = lambda _: Choice("dense", None)
    for shape, blocksizes in shapes.items():
        for blocksize in blocksizes:
            for dtype in DTYPES:
                small = dtype.itemsize == 2 and max(blocksize) <= 64
                gradients = (same, *of_lines * small, dense)
                for M in (19,) if INTERPRET else (1, 19, 3000):
                    compare_padded(shape, blocksize, dtype, M, gradients=gradients)
    whole_rows = partial(compare_padded, (64, 53), (32, 32), torch.float32)
    whole_columns = partial(compare_padded, (37, 64), (32, 32), torch.float32)
    for check_one in (whole_rows, whole_columns):
        check_one(200, make_x=before_a_hole, gradients=(of_blocks,))
    for blocksize in ((16, 16), (64, 64), (3, 5)):
        small_blocks = partial(compare_padded, (37, 53), blocksize, make_x=before_a_hole)
        small_blocks(torch.float16, 20, gradients=(of_blocks, *of_lines))
    for tile in (
        MatmulTile(16, 16, 16, 1, 4, 2),
        MatmulTile(32, 16, 64, 1, 4, 2),
        MatmulTile(16, 32, 16, 1, 4, 2, splits=3),
        MatmulTile(32, 64, 64, 2, 4, 2, splits=2),
    ):
        for blocksize in ((32, 32), (16, 64)):
            product = partial(_tile, tile)
            compare_padded((37, 90), blocksize, torch.float32, 50, product=product)
    compare_padded((37, 53), (16, 16), torch.float32, 20, product=_int64, gradients=(_int64,))
    with tf32_allowed():
        compare_padded((37, 53), (32, 32), torch.float32, 20, tolerance=4e-3)
    without_tensor_cores = lambda problem: problem._replace(precision=FMA)
    compare_padded((37, 53), (32, 32), torch.float32, 20, problem_change=without_tensor_cores)
    # Splits of tokens, and a plan that is of another index.
    compare_padded((20, 30), (16, 16), torch.float16, 600, gradients=(same, *of_lines))
    _, crow, col, values = random_bsr(48, 64, 16, 0.5, torch.float32, DEVICE)
    _, other_crow, other_col, _ = random_bsr(48, 64, 16, 0.5, torch.float32, DEVICE, seed=1)
    x, grad = among_nans(20, 53), among_nans(20, 37)
    plan = build_plan(other_crow, other_col, 4)
    assert backend.grad_x(grad, crow, col, values, plan, 53).isnan().all()
    assert backend.grad_values(grad, x, crow, col, plan, 16, 16).isnan().all()
    # A third call of a kind skips checks and choices.
    general_calls = []

    def general(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        general_calls.append(1)
        return backend.forward(x, *rest[:4], *rest[5:], rest[4])

    backend.forget()
    for was_known in (False, False, True, True):
        general_calls.clear()
        with torch._C._AutoDispatchBelowAutograd():
            y = backend.call(general, among_nans(20, 53), crow, col, values, None, 37, "none", None)
        assert y.shape == (20, 37) and y.isfinite().all() and len(general_calls) != was_known
    # Bad indices stay within bounds, that of the last column too.
    for column in (3, 2**31 - 1):
        bad = torch.full_like(col, column)
        weight = torch.zeros(48, 16, dtype=torch.float64, device=DEVICE)
        for row in range(3):
            blocks = values[crow[row] : crow[row + 1]].double()
            weight[16 * row : 16 * row + 16] = blocks.sum(0)
        y = backend.forward(x, crow, bad, values, None, "none", None, 37)
        expected = x[:, 48:].double() @ weight[:37, :5].T
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def check_token_counts() -> None:
    """What was prepared for one number of tokens serves every other in its bucket."""
    dense, crow, col, values = random_bsr(64, 96, 32, 0.5, torch.float32, DEVICE)
    plan = build_plan(crow, col, 3)
    for counts in ((16, 1, 15, 2), (128, 65, 127, 100)):
        for M in counts:
            x, grad = torch.randn(M, 96, device=DEVICE), torch.randn(M, 64, device=DEVICE)
            y = plain_forward(x, crow, col, values, None, "none", plan)
            assert relative_error(y, x.double() @ dense.double().T) < 1e-6, M
            grad_x = backend.grad_x(grad, crow, col, values, plan, 96)
            assert relative_error(grad_x, grad.double() @ dense.double()) < 1e-6, M
            reference = stored_blocks(grad.double().T @ x.double(), crow, col, (32, 32))
            out = backend.grad_values(grad, x, crow, col, plan, 32, 32)
            assert relative_error(out, reference) < 1e-6, M


def check_determinism() -> None:
    """The same inputs give the same bits, split sums included."""
    _, crow, col, values = random_bsr(64, 128, 32, 0.5, torch.float32, DEVICE)
    plan = build_plan(crow, col, 4)
    x, grad = torch.randn(700, 128, device=DEVICE), torch.randn(700, 64, device=DEVICE)
    change = partial(_tile, MatmulTile(64, 32, 32, 1, 4, 2, splits=2))
    for function in (
        lambda: plain_forward(x, crow, col, values, None, "none", plan, change=change),
        lambda: plain_grad_x(grad, crow, col, values, plan, 128, change=change),
        lambda: backend.grad_values(grad, x, crow, col, plan, 32, 32),
    ):
        first = function()
        assert all(torch.equal(first, function()) for _ in range(2))


def check_repeated_calls() -> None:
    """From the third on they skip checks and choices, and still see all that a launch rests on."""
    dense, crow, col, values = random_bsr(64, 96, 16, 0.5, torch.float32, DEVICE)
    bias, plan = torch.randn(64, device=DEVICE), build_plan(crow, col, 6)
    general_calls = []

    def general(*arguments: Any) -> torch.Tensor:
        general_calls.append(1)
        x = arguments[0]
        rest = (*arguments[1:5], arguments[6], arguments[7], arguments[5])
        y = backend.forward(x.reshape(-1, x.shape[-1]), *rest)
        return y.view(*x.shape[:-1], y.shape[-1])

    def call(x: torch.Tensor, was_known: bool, tolerance: float = 1e-6) -> torch.Tensor:
        general_calls.clear()
        with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls a backend
            y = backend.call(general, x, crow, col, values, bias, None, "relu", plan)
        assert len(general_calls) == (not was_known), (x.shape, x.stride())
        expected = (x.double() @ dense.double().T + bias.double()).relu()
        assert relative_error(y, expected) <= tolerance
        assert y.shape == (*x.shape[:-1], 64) and y.is_contiguous()
        return y

    def fresh(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    backend.forget()
    x = fresh(2, 96)
    call(x, False), call(x, False), call(x, True)  # a new shape is only noted at first
    call(fresh(2, 96), True)
    for shape in ((96,), (3, 96), (1, 2, 96), (4, 5, 96), (2, 1, 3, 96)):
        call(fresh(*shape), False), call(fresh(*shape), False), call(fresh(*shape), True)
    with torch.inference_mode():
        call(fresh(2, 96), False), call(fresh(2, 96), True)
        assert call(fresh(2, 96), True).is_inference()
    shifted = fresh(1 + 2 * 96)[1:].view(2, 96)
    call(shifted, False), call(shifted, True), call(x, True)
    values = values.clone()
    call(x, True)
    wide = fresh(2, 200)[:, :96]
    call(wide, False), call(wide, True)
    scattered = fresh(96, 5, 4).permute(2, 1, 0)  # copied on its way
    call(scattered, False), call(scattered, False), call(scattered, False)
    # What no tensor shows.
    with tf32_allowed():
        call(x, False, 2e-3), call(x, True, 2e-3)
    call(x, True)
    seen = []
    with backend.observed(lambda *arguments: seen.append(arguments[0].shape)):
        call(x, False)
    assert seen == [(2, 96)]
    call(x, False), call(x, False), call(x, True)
    backend.forget()
    call(x, False), call(x, False), call(x, True)


def check_precision() -> None:
    """float32-level error from three TF32 products, and what the other two ways promise."""
    check((32, 32), torch.float32, 600, R=2, C=2, tolerance=3e-7)
    check((64, 64), torch.float32, 40, tolerance=3e-7)
    for blocksize in ((16, 16), (64, 64)):
        without_tensor_cores = lambda problem: problem._replace(precision=FMA)
        check(blocksize, torch.float32, 40, tolerance=3e-7, problem_change=without_tensor_cores)
        with tf32_allowed():
            check(blocksize, torch.float32, 40, tolerance=2e-3)
    # Three TF32 products keep what one float32 product would have kept: infinities and tiny rests.
    _, crow, col, values = random_bsr(16, 16, 16, 0.0, torch.float32, DEVICE)
    values = torch.eye(16, device=DEVICE)[None] * 1.0000001
    for extreme in (float("inf"), -float("inf")):
        x = torch.full((16, 16), 1.0, device=DEVICE)
        x[0, 0] = extreme
        y = plain_forward(x, crow, col, values)
        assert y[0, 0] == extreme or torch.isnan(y[0, 0])
        assert torch.equal(y[1:], torch.full_like(y[1:], 1.0000001))
    # A GPU's own NaN has every bit of the mantissa set: rounding it must not carry into its sign.
    for bits in (0x7FFFFFFF, 0x7FC00000, -1):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(DEVICE)
        for bad in ("x", "values"):
            x = torch.ones(16, 16, device=DEVICE)
            w = torch.ones(1, 16, 16, device=DEVICE)
            (x if bad == "x" else w[0])[3, 5] = nan
            y = plain_forward(x, crow, col, w)
            lost = ~torch.isnan(y[3] if bad == "x" else y[:, 3])
            assert not lost.any(), (bad, hex(bits))
            assert torch.isnan(y).sum() == 16, (bad, hex(bits))
            grad = backend.grad_values(x, x, crow, col, build_plan(crow, col, 1, (16, 16)), 16, 16)
            assert torch.isnan(grad).sum() == (31 if bad == "x" else 0)


GROUPS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for group in sys.argv[1:]:
        GROUPS[group]()
        print(f"{group} passed")
