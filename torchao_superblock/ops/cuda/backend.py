"""What the op asks of the CUDA backend: the product, its two gradients, and how to repeat a call.

A call at small M takes the GPU a few microseconds, so the host must not take twenty. What a problem's choice of kernel
has prepared is therefore kept, and found again by the problem. M enters it as a bucket (powers of two) where no rule
counts tokens, so serving many batch sizes neither compiles nor decides again. A forward of exactly the same kind as an
earlier one does not even look there: :func:`call` leaves a closure with `fast_path.py`, which recognises such a call.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from torchao_superblock.ops import fast_path
from torchao_superblock.ops.cuda import choose, gradient, matmul
from torchao_superblock.ops.cuda.choose import GLUON_TOKENS, Choice
from torchao_superblock.ops.cuda.device import INTERPRET, device_at, devices, gluon_problem
from torchao_superblock.ops.cuda.launch import SummedLaterKernel, TracedKernel
from torchao_superblock.ops.cuda.problem import (
    FMA,
    NATIVE,
    TF32,
    TF32X3,
    Device,
    Problem,
    bucket,
)
from torchao_superblock.ops.plan import Plan, build_plan, parts_of, split_plan
from torchao_superblock.ops.precision import allows_tf32

# What torch.cuda.current_device() asks. CPU tensors, which only Triton's interpreter serves, are on device -1.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
if INTERPRET or _current_device is None:
    _current_device = partial(int, -1)


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to a problem, and from a problem to what runs it.


def _float32_precision(device: Device) -> int:
    if device.capability < 80:
        return FMA
    return TF32 if allows_tf32() else TF32X3


def _problem(
    kind: str,
    x: Tensor,
    other: Tensor,
    grid: tuple[int, ...],
    padding: tuple[int, int],
    activation: str = "none",
    has_bias: bool = False,
    entries: int = 0,
) -> Problem:
    """A problem of x `(M, ...)`, the other operand that Triton reads wide, `(R, C, r, c, nnz)` and what only some have.

    One function for all, without helpers: a call at small M waits for it.
    """
    index, dtype = x.get_device(), x.dtype
    device = devices.get(index) or device_at(index)
    precision = NATIVE if dtype != torch.float32 else _float32_precision(device)
    M, width = x.shape
    strides = x.stride()
    if M == 1 or width == 1:  # the stride of a single row or column means nothing: the usual one
        strides = (width if M == 1 else strides[0], 1 if width == 1 else strides[1])
    if kind == "grad_values":
        strides = (*strides, *other.stride())
    if kind == "grad_values" or M < GLUON_TOKENS or not device.gluon:
        M = bucket(M)
    aligned = (x.data_ptr() % 16 == 0, other.data_ptr() % 16 == 0)
    rest = (activation, has_bias, entries, *padding)
    return Problem(kind, M, *grid, dtype, precision, strides, aligned, device, *rest)


def forward_problem(
    x: Tensor,
    crow: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    out_features: int | None = None,
) -> Problem:
    """What :func:`forward` is asked for, by the arguments that matter."""
    nnz, r, c = values.shape
    R, K = crow.shape[0] - 1, x.shape[1]
    C = -(-K // c)
    padding = (0 if out_features is None else R * r - out_features, C * c - K)
    entries = 0 if plan is None else plan.shape[0]
    grid = (R, C, r, c, nnz)
    return _problem("forward", x, values, grid, padding, activation, bias is not None, entries)


def grad_x_problem(grad: Tensor, crow: Tensor, values: Tensor, in_features: int) -> Problem:
    """What :func:`grad_x` is asked for: the roles of rows and columns change places."""
    nnz, r, c = values.shape
    R, C = crow.shape[0] - 1, -(-in_features // c)
    padding = (C * c - in_features, R * r - grad.shape[1])
    return _problem("grad_x", grad, values, (C, R, c, r, nnz), padding)


def grad_values_problem(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> Problem:
    """What :func:`grad_values` is asked for."""
    R, C = crow.shape[0] - 1, -(-x.shape[1] // block_cols)
    padding = (R * block_rows - grad.shape[1], C * block_cols - x.shape[1])
    grid = (R, C, block_rows, block_cols, col.shape[0])
    return _problem("grad_values", grad, x, grid, padding)


_KERNELS = {"matmul": matmul, "blocks": gradient, "lines": gradient, "dense": gradient}
# What was prepared: by a problem and the choice that overrides its own, if any, and by a problem for all tokens of its
# bucket and its choice.
_runs: dict[tuple[Problem, Choice | None], tuple[Choice, Callable[..., Tensor]]] = {}
# A program that keeps making new shapes must not grow these for ever; rebuilding an entry is cheap, because Triton
# keeps the compiled kernels.
_MOST_RUNS = 4096


def forget() -> None:
    """Decide anew at the next call (after tuning)."""
    _runs.clear()
    choose.forget()
    fast_path.forget()


def _prepare(problem: Problem, choice: Choice) -> Callable[..., Tensor]:
    if choice.kernel == "hopper":
        from torchao_superblock.ops.cuda import hopper

        run = hopper.prepare(problem, choice)
    else:
        run = _KERNELS[choice.kernel].prepare(problem, choice)
    if problem.kind == "forward":
        return run
    check = gradient.prepare_check(problem, choice)

    def checked(grad: Tensor, *others: Any) -> Tensor:
        # Of x, crow, col, parts or of crow, col, values, bias, parts and shape.
        crow, col, parts = (
            others[1:4] if problem.kind == "grad_values" else (*others[:2], others[4])
        )
        return check(run(grad, *others), crow, col, parts)

    return checked


def run(problem: Problem, choice: Choice | None, *arguments: Any) -> Tensor:
    """Serve a call.

    Args:
        problem: what it asks for.
        choice: overrides the problem's own.
        *arguments: what the chosen kernel's `prepare` says that its run takes.
    """
    known = _runs.get((problem, choice))
    if known is None:
        chosen = choice or choose.choose(problem)
        counted = chosen.kernel == "hopper" or problem.M < GLUON_TOKENS
        general = problem if counted else problem.bucketed()
        known = _runs.get((general, chosen)) or (chosen, _prepare(general, chosen))
        if len(_runs) >= _MOST_RUNS:
            _runs.clear()
        _runs[problem, choice] = _runs[general, chosen] = known
    try:
        return known[1](*arguments)
    except OutOfResources:
        if known[0].kernel == "hopper":  # its tiles fit, or were not chosen
            raise
        less = choose.smaller(known[0])
        _runs[problem, choice] = (less, _prepare(problem.bucketed(), less))
        return run(problem, choice, *arguments)


# Called with the arguments of every forward.
_observer: Callable[..., None] | None = None


@contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Show every forward of the block to a function, with its arguments."""
    global _observer
    previous, _observer = _observer, observer
    fast_path.forget()  # calls that are repeated at once are not seen here
    try:
        yield
    finally:
        _observer = previous


# ---------------------------------------------------------------------------------------------------------------------
# What the op calls, with the operands that `backends.BackendModule` describes. `choice` overrides the problem's own,
# for tuning and tests.


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    out_features: int | None = None,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias)` for a BSR weight W."""
    if x.get_device() != _current_device():
        arguments = (x, crow, col, values, bias, activation, plan, out_features)
        with torch.cuda.device(x.get_device()):
            return forward(*arguments, choice=choice)
    if _observer is not None:
        _observer(x, crow, col, values, bias, activation, plan, out_features)
    problem = forward_problem(x, crow, values, bias, activation, plan, out_features)
    shape = (x.shape[0], problem.N)
    return run(problem, choice, x, crow, col, values, bias, plan, shape)


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
        general: the op's general implementation over this backend, with the arguments that follow, which are the op's.
    """
    y = fast_path.again(x, crow, col, values, bias, out_features, activation, plan)
    if y is None:
        arguments = (x, crow, col, values, bias, out_features, activation, plan)
        y = general(*arguments)
        # Shapes that may never come back are not worth an entry.
        if _observer is None and fast_path.seen(x, values):
            repeat = _repeat(*arguments)
            if repeat is not None:
                fast_path.remember(repeat, None, *arguments)
    return y


def _repeat(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> fast_path.Run | None:
    """A call that was served, with nothing left to decide; None if its kernel reads or writes other tensors."""
    N = (crow.shape[0] - 1) * values.shape[1] if out_features is None else out_features
    K = x.shape[-1]
    if (
        x.numel() * N == 0
        or not (crow.is_contiguous() and col.is_contiguous() and values.is_contiguous())
        or (bias is not None and not bias.is_contiguous())
        or (plan is not None and not plan.is_contiguous())
        or x.get_device() != _current_device()
    ):
        return None
    try:
        problem = forward_problem(x.view(-1, K), crow, values, bias, activation, plan, N)
    except RuntimeError:  # x was copied
        return None
    known = _runs.get((problem, None))
    if known is None:
        return None
    run, shape = known[1], (*x.shape[:-1], N)
    x_aligned, values_aligned = problem.aligned
    device_index = problem.device.index
    is_float32 = x.dtype == torch.float32
    tf32 = is_float32 and allows_tf32()

    def repeat(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        out_features: int | None,
        activation: str,
        plan: Tensor | None,
    ) -> Tensor | None:
        # All that a launch rests on and fast_path.py does not compare.
        if (
            (x.data_ptr() % 16 == 0) is x_aligned
            and (values.data_ptr() % 16 == 0) is values_aligned
            and _current_device() == device_index
            and (not is_float32 or allows_tf32() is tf32)
        ):
            return run(x, crow, col, values, bias, plan, shape)
        return None

    return repeat


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
        out_features: int,
        kernel_type: type[TracedKernel] = TracedKernel,
    ) -> Tensor:
        """As :func:`forward`, for tensors without data. A dynamic M takes the tile that suits its example value."""
        M = example = x.shape[0]
        if isinstance(M, torch.SymInt):
            example = M.node.hint if M.node.has_hint() else 4096
        device = device_at(x.device.index or 0)._replace(gluon=False)
        precision = NATIVE if x.dtype != torch.float32 else _float32_precision(device)
        nnz, r, c = values.shape
        R, C = crow.shape[0] - 1, -(-x.shape[1] // c)
        problem = Problem(
            *("forward", bucket(example), R, C, r, c, nnz, x.dtype),
            *(precision, x.stride(), (True, True), device, activation, bias is not None),
            *(0 if plan is None else plan.shape[0], R * r - out_features, C * c - x.shape[1]),
        )
        # Not remembered: sizes without a value have no hash.
        chosen = choose.tuned(problem) or choose.by_rule(problem)
        product = matmul.prepare(problem, chosen, kernel_type.on(x.device))
        return product(x, crow, col, values, bias, plan, (M, out_features))


class few_tokens_twin:
    """The same for `torch.compile`, whose code launches the kernel: the host takes no longer than for a dense layer.

    The sums of split rows are left to the compiler, which adds them where they are read.
    """

    forward = staticmethod(partial(aot_twin.forward, kernel_type=SummedLaterKernel))


def grad_x(
    grad: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    plan: Tensor | None,
    in_features: int,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """`grad @ W`: the same product as the forward, over the transposed index; NaN if the plan is of another one."""
    if grad.get_device() != _current_device():
        with torch.cuda.device(grad.get_device()):
            return grad_x(grad, crow, col, values, plan, in_features, choice=choice)
    problem = grad_x_problem(grad, crow, values, in_features)
    parts = _parts(plan, crow, col, problem.R)
    shape = (grad.shape[0], in_features)
    return run(problem, choice, grad, crow, col, values, None, parts, shape)


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    plan: Tensor | None,
    block_rows: int,
    block_cols: int,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """The stored blocks of `grad.T @ x`; NaN if the plan is of another index."""
    if grad.get_device() != _current_device():
        with torch.cuda.device(grad.get_device()):
            return grad_values(grad, x, crow, col, plan, block_rows, block_cols, choice=choice)
    if col.shape[0] == 0:
        return grad.new_empty((0, block_rows, block_cols))
    problem = grad_values_problem(grad, x, crow, col, block_rows, block_cols)
    parts = _parts(plan, crow, col, problem.C)
    return run(problem, choice, grad, x, crow, col, parts)


def prepared(problem: Problem) -> Callable[..., Tensor] | None:
    """What serves a problem, if it was served before with its own choice; see :func:`run` for its arguments."""
    known = _runs.get((problem, None))
    return None if known is None else known[1]


def _parts(plan: Tensor | None, crow: Tensor, col: Tensor, n_block_cols: int) -> Plan:
    R, nnz = crow.shape[0] - 1, col.shape[0]
    if plan is None:
        return split_plan(build_plan(crow, col, n_block_cols), R, n_block_cols, nnz)
    return parts_of(plan, R, n_block_cols, nnz)


def backend_info() -> dict[str, object]:
    """What serves CUDA tensors here.

    Returns:
        `name` (`"triton"` or `"triton+gluon"`), `reason` (a sentence) and the versions and device behind it.
    """
    info: dict[str, object] = {"name": "triton", "triton": triton.__version__}
    if INTERPRET or not torch.cuda.is_available():
        info["reason"] = "Triton's interpreter" if INTERPRET else "no GPU is available"
        return info
    major, minor = torch.cuda.get_device_capability()
    info["device"] = torch.cuda.get_device_name()
    if (major, minor) != (9, 0):
        info["reason"] = f"this GPU is sm_{major}{minor}; the Gluon kernel is for sm_90"
    elif gluon_problem() is not None:
        info["reason"] = f"the Gluon kernel is {gluon_problem()}"
    else:
        info["name"] = "triton+gluon"
        info["reason"] = "Hopper: Gluon kernels where they are faster, plain Triton elsewhere"
    return info
