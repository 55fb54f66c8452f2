"""`torch.ops.torchao_superblock.bsr_linear`: schema, checks, fake, autograd, autocast and dispatch.

The op is registered with `torch.library.Library` rather than `torch.library.custom_op`: at small M the kernel takes
a few microseconds, and the decorator's wrappers alone would cost more than that. For the same reason a call that
repeats an earlier one skips most of what is here: see `direct.py`.

What a backend (`cpu.py`, `cuda.py`) sees is always the simple case: 2-D operands of one dtype on one device, whole
blocks, M >= 1. Everything else (leading dimensions, ragged edges, empty batches) is dealt with here, once.

Legend: M tokens (all leading dimensions of x together), N out features, K in features, R x C the block grid,
r x c the block size, nnz stored blocks.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from torchao_superblock.ops import direct
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.aot import register_decomposition
from torchao_superblock.ops.flops import register_formulas
from torchao_superblock.ops.forks import watch_forks
from torchao_superblock.ops.plan import build_plan, plan_fits, plan_length

NAMESPACE = "torchao_superblock"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_library = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "bsr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias=None, "
    'SymInt? out_features=None, str activation="none", Tensor? plan=None) -> Tensor',
    tags=_TAGS,
)
_library.define(
    "bsr_linear_grad_x(Tensor grad, Tensor crow_indices, Tensor col_indices, Tensor values, "
    "SymInt in_features, Tensor? plan=None) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "bsr_linear_grad_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, "
    "SymInt block_rows, SymInt block_cols, Tensor? plan=None) -> Tensor",
    tags=_TAGS,
)
register_formulas()
watch_forks()
_forward_op = torch.ops.torchao_superblock.bsr_linear.default
_grad_x_op = torch.ops.torchao_superblock.bsr_linear_grad_x.default
_grad_values_op = torch.ops.torchao_superblock.bsr_linear_grad_values.default

# Asked at each call.
_profiler = torch.autograd.profiler
_forward_ad = torch.autograd.forward_ad
_function_mode_is_active = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: True)
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    plan: Tensor | None = None,
    *,
    in_features: int | None = None,
) -> Tensor:
    """Linear layer with a weight in BSR (block compressed sparse row) format: `activation(x @ weight.T + bias)`.

    The same as `torch.ops.torchao_superblock.bsr_linear`, which exported programs contain; the transforms of
    `torch.func` need this function. Differentiable, twice and in forward mode, in `x`, `values` (the gradient of
    the stored blocks only) and `bias`. float16 and bfloat16 accumulate in float32.

    The contents of the indices are trusted to be a valid BSR index (:func:`torchao_superblock.bsr.format.check_bsr`
    checks them): kernels never read out of bounds because of a bad index, but what they then compute is not specified.

    Args:
        x: `(..., K)`, any strides.
        crow_indices: `(R + 1,)` int32, where each block row starts in `col_indices` and `values`.
        col_indices: `(nnz,)` int32, block column of each stored block, sorted and unique in each row.
        values: `(nnz, r, c)`, the stored blocks, dtype and device of `x`.
        bias: `(N,)` or None.
        out_features: N, if the last block row is ragged; None means `R * r`. K may be ragged as well: what a block
            holds beyond column K is ignored.
        activation: one of `"none"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"`.
        plan: from :func:`torchao_superblock.ops.build_plan`; None builds what a backward needs at each call. A plan of
            another index slows a forward down; gradients are right on a CPU, which uses none, and NaN on a GPU.
        in_features: K, to have x checked. A stored weight does not say how wide it is (its last block columns may hold
            no block), so without this and without a plan, columns of x beyond it count as multiplied with zeros.

    Returns:
        `(..., N)`, contiguous, dtype of `x`.

    Raises:
        ValueError: a shape does not fit, or the activation is unknown.
        TypeError: a dtype does not fit.
        RuntimeError: the tensors are on different devices.

    Example:
        >>> w = torch.tensor([[1.0, 2.0, 0, 0], [3.0, 4.0, 0, 0]])
        >>> crow, col = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
        >>> bsr_linear(torch.ones(1, 4), crow, col, w[None, :, :2])
        tensor([[3., 7.]])
    """
    if in_features is not None and (x.dim() < 1 or x.shape[-1] != in_features):
        raise ValueError(
            f"bsr_linear: x must have in_features={in_features} features in its last dimension, got shape "
            f"{tuple(x.shape)}"
        )
    args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    if torch.compiler.is_compiling():
        return _forward_op(*args)
    # A call like an earlier one need not go through the dispatcher, unless somebody watches the ops go by.
    if not (
        _profiler._is_profiler_enabled
        or _forward_ad._current_level >= 0
        or _function_mode_is_active()
    ):
        y = direct.again(*args)
        if y is not None:
            return y
    if _transformed():
        y = _TransformableFunction.apply(*args[:6], "none", plan)
        return ACTIVATIONS[activation](y)
    y = _forward_op(*args)
    if torch.is_inference_mode_enabled():  # elsewhere the kernel of the Autograd key has done it
        _remember(*args)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Checks: shape, dtype and device on every call; what the indices hold is checked where they enter (construction,
# loading).


def _check_index(
    crow_indices: Tensor, col_indices: Tensor, nnz: int, plan: Tensor | None, C: int
) -> None:
    if crow_indices.dtype != torch.int32 or col_indices.dtype != torch.int32:
        raise TypeError(
            "bsr_linear: crow_indices and col_indices must be int32, got "
            f"{crow_indices.dtype} and {col_indices.dtype}; convert them with .to(torch.int32)"
        )
    if crow_indices.dim() != 1 or crow_indices.shape[0] < 1:
        raise ValueError(
            f"bsr_linear: crow_indices must have shape (block_rows + 1,), got {tuple(crow_indices.shape)}"
        )
    if col_indices.dim() != 1 or col_indices.shape[0] != nnz:
        raise ValueError(
            f"bsr_linear: col_indices must have shape (nnz,) = ({nnz},) to match values, got {tuple(col_indices.shape)}"
        )
    if plan is not None and (
        plan.dtype != torch.int32
        or plan.dim() != 1
        or not plan_fits(plan.shape[0], crow_indices.shape[0] - 1, C, nnz)
    ):
        raise ValueError(
            f"bsr_linear: plan must be int32 of shape ({plan_length(crow_indices.shape[0] - 1, C, nnz)},) or one more, "
            f"got {plan.dtype} of shape {tuple(plan.shape)}; make it with build_plan, or pass None"
        )


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    device = x.device
    for other in others:
        if other is not None and other.device != device:
            raise RuntimeError(
                f"bsr_linear: all tensors must be on one device, got {device} and {other.device}; "
                "move the model and its input with .to(device)"
            )


def _check_forward(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> tuple[int, int]:
    """Check all that can be checked without reading data; return (N, C)."""
    nnz, r, c = _check_blocks(values)
    if x.dim() < 1:
        raise ValueError("bsr_linear: x must have shape (..., in_features), got a 0-dim tensor")
    K = x.shape[-1]
    C = -(-K // c)
    _check_index(crow_indices, col_indices, nnz, plan, C)
    whole = (crow_indices.shape[0] - 1) * r
    N = whole if out_features is None else out_features
    if out_features is not None and not (whole - r < N <= whole):
        raise ValueError(
            f"bsr_linear: out_features={out_features} does not fit {crow_indices.shape[0] - 1} block rows of {r}: "
            f"it must lie in [{max(0, whole - r + 1)}, {whole}]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"bsr_linear: x must be float32, float64, float16 or bfloat16, got {x.dtype}"
        )
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"bsr_linear: x, values and bias must have one dtype, got x {x.dtype}, values {values.dtype}"
            + (f", bias {bias.dtype}" if bias is not None else "")
            + "; convert the input with x.to(dtype), the model with model.to(dtype), or use torch.autocast"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bsr_linear: bias must have shape ({N},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"bsr_linear: unknown activation {activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    _check_devices(x, crow_indices, col_indices, values, bias, plan)
    return N, C


def _check_blocks(values: Tensor) -> tuple[int, int, int]:
    """Check that there are blocks of at least one element; return (nnz, r, c)."""
    if values.dim() != 3 or values.shape[1] < 1 or values.shape[2] < 1:
        raise ValueError(
            "bsr_linear: values must have shape (nnz, block_rows, block_cols) with blocks of at least 1x1, got "
            f"{tuple(values.shape)}"
        )
    return values.shape


def _check_grad(grad: Tensor, other: Tensor, name: str, R: int, r: int) -> None:
    if grad.dim() < 1:
        raise ValueError(
            "bsr_linear backward: grad must have shape (..., out_features), got a 0-dim tensor"
        )
    if other.dtype not in DTYPES:
        raise TypeError(
            f"bsr_linear backward: {name} must be float32, float64, float16 or bfloat16, got {other.dtype}"
        )
    if not ((R - 1) * r < grad.shape[-1] <= R * r):
        raise ValueError(
            f"bsr_linear backward: grad of shape {tuple(grad.shape)} does not fit {R} block rows of {r}"
        )
    if grad.dtype != other.dtype:
        raise TypeError(f"bsr_linear backward: grad is {grad.dtype} but {name} is {other.dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# From the general case to what backends see.


def _flatten(x: Tensor, width: int) -> Tensor:
    """`(..., K)` -> `(M, width)`, padded with zeros up to a whole number of blocks."""
    K = x.shape[-1]
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), K)
    if K != width:
        x = torch.nn.functional.pad(x, (0, width - K))
    return x


def _crop(y: Tensor, lead: torch.Size, width: int) -> Tensor:
    """`(M, padded)` -> contiguous `(*lead, width)`."""
    if y.shape[1] != width:
        y = y[:, :width].contiguous()
    return y if len(lead) == 1 else y.view(*lead, width)


def _forward(
    backend: ModuleType,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    plan: Tensor | None = None,
) -> Tensor:
    N, C = _check_forward(
        x, crow_indices, col_indices, values, bias, out_features, activation, plan
    )
    lead = x.shape[:-1]
    if N == 0 or math.prod(lead) == 0:
        return x.new_empty((*lead, N))
    R, r, c = crow_indices.shape[0] - 1, values.shape[1], values.shape[2]
    if bias is not None:
        if N != R * r:
            bias = torch.nn.functional.pad(bias, (0, R * r - N))
        bias = bias.contiguous()
    y = backend.forward(
        _flatten(x, C * c),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        values.contiguous(),
        bias,
        activation,
        plan if plan is None else plan.contiguous(),
    )
    return _crop(y, lead, N)


def _grad_x(
    backend: ModuleType,
    grad: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    in_features: int,
    plan: Tensor | None = None,
) -> Tensor:
    nnz, r, c = _check_blocks(values)
    if in_features < 0:
        raise ValueError(f"bsr_linear backward: in_features={in_features} must not be negative")
    C = -(-in_features // c)
    _check_index(crow_indices, col_indices, nnz, plan, C)
    R = crow_indices.shape[0] - 1
    _check_grad(grad, values, "values", R, r)
    _check_devices(grad, crow_indices, col_indices, values, plan)
    lead = grad.shape[:-1]
    if math.prod(lead) == 0 or in_features == 0:
        return grad.new_empty((*lead, in_features))
    grad_x = backend.grad_x(
        _flatten(grad, R * r),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        values.contiguous(),
        plan if plan is None else plan.contiguous(),
        C,
    )
    return _crop(grad_x, lead, in_features)


def _grad_values(
    backend: ModuleType,
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_rows: int,
    block_cols: int,
    plan: Tensor | None = None,
) -> Tensor:
    if block_rows < 1 or block_cols < 1:
        raise ValueError(
            f"bsr_linear backward: blocks must be at least 1x1, got {block_rows}x{block_cols}"
        )
    if x.dim() < 1:
        raise ValueError(
            "bsr_linear backward: x must have shape (..., in_features), got a 0-dim tensor"
        )
    C, nnz = -(-x.shape[-1] // block_cols), col_indices.numel()
    _check_index(crow_indices, col_indices, nnz, plan, C)
    R = crow_indices.shape[0] - 1
    _check_grad(grad, x, "x", R, block_rows)
    _check_devices(grad, x, crow_indices, col_indices, plan)
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"bsr_linear backward: grad {tuple(grad.shape)} and x {tuple(x.shape)} differ in their leading dimensions"
        )
    if nnz == 0 or math.prod(x.shape[:-1]) == 0:
        return grad.new_zeros((nnz, block_rows, block_cols))
    return backend.grad_values(
        _flatten(grad, R * block_rows),
        _flatten(x, C * block_cols),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        plan if plan is None else plan.contiguous(),
        block_rows,
        block_cols,
    )


@cache
def cpu_backend() -> ModuleType:
    """The module that runs the op on CPU tensors."""
    from torchao_superblock.ops import cpu

    return cpu


@cache
def cuda_backend() -> ModuleType:
    """The module that runs the op on CUDA tensors: the Triton kernels, or plain PyTorch where Triton is absent."""
    try:
        import triton  # noqa: F401
    except ImportError:
        from torchao_superblock.ops import gather_gemm

        return gather_gemm
    from torchao_superblock.ops import cuda

    return cuda


# What runs the op on CPU tensors, once it has run: it recognises a call that needs no preparation by itself, fast.
_run_on_cpu: Callable[..., Tensor] | None = None


def _remember(x: Tensor, *others) -> None:
    """Let calls like this one, which went the long way, go directly from the caller to the kernel."""
    if type(x) is not Tensor:
        return
    run = _run_on_cpu
    if not x.is_cpu:
        with torch._C._AutoDispatchBelowAutograd():
            run = direct.find(x, *others)  # what the backend has remembered for calls that reach it
    if run is not None and direct.find(x, *others) is not run:
        direct.remember(run, _BSRLinearFunction.apply, x, *others)


def _register_backend(dispatch_key: str, load_backend: Callable[[], ModuleType]) -> None:
    """Register the three ops for one device; the backend itself is imported at the first call."""
    run = None

    def forward(*args, **kwargs) -> Tensor:
        nonlocal run
        if run is None:
            general = partial(_forward, load_backend())
            # A backend may know how to repeat a call without checking and deciding everything again.
            call = getattr(load_backend(), "call", None)
            run = general if call is None else partial(call, general)
            if dispatch_key == "CPU":
                global _run_on_cpu
                _run_on_cpu = run
        return run(*args, **kwargs)

    _library.impl("bsr_linear", forward, dispatch_key)
    _library.impl(
        "bsr_linear_grad_x",
        lambda *args, **kwargs: _grad_x(load_backend(), *args, **kwargs),
        dispatch_key,
    )
    _library.impl(
        "bsr_linear_grad_values",
        lambda *args, **kwargs: _grad_values(load_backend(), *args, **kwargs),
        dispatch_key,
    )


_register_backend("CPU", cpu_backend)
_register_backend("CUDA", cuda_backend)


# ---------------------------------------------------------------------------------------------------------------------
# Fake implementations: shapes and errors without data, for torch.compile, torch.export and the meta device.


@torch.library.register_fake(f"{NAMESPACE}::bsr_linear", lib=_library)
def _forward_fake(
    x, crow_indices, col_indices, values, bias=None, out_features=None, activation="none", plan=None
):
    N, _ = _check_forward(
        x, crow_indices, col_indices, values, bias, out_features, activation, plan
    )
    return x.new_empty((*x.shape[:-1], N))


@torch.library.register_fake(f"{NAMESPACE}::bsr_linear_grad_x", lib=_library)
def _grad_x_fake(grad, crow_indices, col_indices, values, in_features, plan=None):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake(f"{NAMESPACE}::bsr_linear_grad_values", lib=_library)
def _grad_values_fake(grad, x, crow_indices, col_indices, block_rows, block_cols, plan=None):
    return grad.new_empty((col_indices.shape[0], block_rows, block_cols))


register_decomposition(_library, f"{NAMESPACE}::bsr_linear", _forward)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd. The three ops are the three contractions of one trilinear form
#     L(x, V)  = x @ W.T      (bsr_linear without bias)
#     T(g, V)  = g @ W        (grad_x)
#     S(g, x)  = the stored blocks of g.T @ x    (grad_values)
# so each one's derivatives are the other two, and the backward can be differentiated again.


def _activation_backward(activation: str, grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of `activation(z)` with respect to `z`."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "silu":
        if torch.is_grad_enabled():  # aten's silu_backward cannot be differentiated again
            sigmoid = torch.sigmoid(z)
            return grad * sigmoid * (1 + z * (1 - sigmoid))
        return torch.ops.aten.silu_backward(grad, z)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, z, approximate=approximate)


def _transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is active."""
    return _functorch_interpreter() is not None or _forward_ad._current_level >= 0


# How the derivatives call the three contractions. torch.func can only see an autograd.Function that is applied in front
# of the dispatcher; everything else goes through the ops, which compilers keep whole.


def _contract(x, crow_indices, col_indices, values, bias, out_features, plan):
    args = (x, crow_indices, col_indices, values, bias, out_features, "none", plan)
    return _derivative(_TransformableFunction, _forward_op, args)


def _contract_grad_x(*args):
    return _derivative(_GradXFunction, _grad_x_op, args)


def _contract_grad_values(*args):
    return _derivative(_GradValuesFunction, _grad_values_op, args)


def _derivative(function, op, args):
    if _transformed():
        return function.apply(*args)
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():  # saves a trip through the dispatcher
        return op(*args)


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms of a product rule; None stands for zero."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _save(ctx, N, x, crow_indices, col_indices, values, bias, activation, plan):
    ctx.out_features, ctx.activation, ctx.has_bias = N, activation, bias is not None
    # What came before the activation is computed again in the backward: that costs one sparse forward and saves
    # keeping an (M, N) tensor. The bias is needed for that alone.
    saved = (x, crow_indices, col_indices, values, None if activation == "none" else bias, plan)
    ctx.save_for_backward(*saved)
    return saved


def _backward(ctx, grad):
    x, crow_indices, col_indices, values, bias, plan = ctx.saved_tensors
    if ctx.activation != "none":
        z = _contract(x, crow_indices, col_indices, values, bias, ctx.out_features, plan)
        grad = _activation_backward(ctx.activation, grad, z)
    grad_x = grad_values = grad_bias = None
    # One plan for both, where gradients need one at all.
    if plan is None and x.is_cuda and ctx.needs_input_grad[0] and ctx.needs_input_grad[3]:
        plan = build_plan(crow_indices, col_indices, -(-x.shape[-1] // values.shape[2]))
    if ctx.needs_input_grad[0]:
        grad_x = _contract_grad_x(grad, crow_indices, col_indices, values, x.shape[-1], plan)
    if ctx.needs_input_grad[3]:
        grad_values = _contract_grad_values(
            grad, x, crow_indices, col_indices, values.shape[1], values.shape[2], plan
        )
    if ctx.has_bias and ctx.needs_input_grad[4]:
        # Not -1, which is ambiguous where there are no features.
        grad_bias = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_values, grad_bias, None, None, None


class _TransformableFunction(torch.autograd.Function):
    """For the transforms of torch.func and for forward-mode AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, crow_indices, col_indices, values, bias, out_features, activation, plan):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(
                x, crow_indices, col_indices, values, bias, out_features, activation, plan
            )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, crow_indices, col_indices, values, bias, _, activation, plan = inputs
        N = output.shape[-1]
        saved = _save(ctx, N, x, crow_indices, col_indices, values, bias, activation, plan)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)

    @staticmethod
    def jvp(ctx, x_t, crow_t, col_t, values_t, bias_t, *_):
        # Only ever called for activation "none": the callers below apply an activation on their own.
        x, crow, col, values, _, plan = ctx.saved_tensors
        N = ctx.out_features
        y_t = _sum_of(
            None if x_t is None else _contract(x_t, crow, col, values, None, N, plan),
            None if values_t is None else _contract(x, crow, col, values_t, None, N, plan),
        )
        if bias_t is None:
            return y_t
        return bias_t.expand(*x.shape[:-1], N) if y_t is None else y_t + bias_t


class _BSRLinearFunction(torch.autograd.Function):
    """The same where no transform is active. A `setup_context` makes torch bind the arguments to the signature at
    each call, which takes the host several times as long as all the rest."""

    @staticmethod
    def forward(
        ctx, x, crow_indices, col_indices, values, bias, out_features, activation, plan, run=None
    ):
        y = None
        if run is not None:
            y = run(x, crow_indices, col_indices, values, bias, out_features, activation, plan)
        if y is None:
            with torch._C._AutoDispatchBelowAutograd():
                y = _forward_op(
                    x, crow_indices, col_indices, values, bias, out_features, activation, plan
                )
        _save(ctx, y.shape[-1], x, crow_indices, col_indices, values, bias, activation, plan)
        return y

    @staticmethod
    def backward(ctx, grad):
        return (*_backward(ctx, grad), None)


class _GradXFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, crow_indices, col_indices, values, in_features, plan):
        with torch._C._AutoDispatchBelowAutograd():
            return _grad_x_op(grad, crow_indices, col_indices, values, in_features, plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, crow_indices, col_indices, values, ctx.in_features, plan = inputs
        saved = (grad, crow_indices, col_indices, values, plan)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, gg):
        grad, crow_indices, col_indices, values, plan = ctx.saved_tensors
        grad_grad = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_grad = _contract(gg, crow_indices, col_indices, values, None, grad.shape[-1], plan)
        if ctx.needs_input_grad[3]:
            grad_values = _contract_grad_values(
                grad, gg, crow_indices, col_indices, values.shape[1], values.shape[2], plan
            )
        return grad_grad, None, None, grad_values, None, None

    @staticmethod
    def jvp(ctx, grad_t, crow_t, col_t, values_t, *_):
        grad, crow, col, values, plan = ctx.saved_tensors
        K = ctx.in_features
        return _sum_of(
            None if grad_t is None else _contract_grad_x(grad_t, crow, col, values, K, plan),
            None if values_t is None else _contract_grad_x(grad, crow, col, values_t, K, plan),
        )


class _GradValuesFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, crow_indices, col_indices, block_rows, block_cols, plan):
        with torch._C._AutoDispatchBelowAutograd():
            return _grad_values_op(grad, x, crow_indices, col_indices, block_rows, block_cols, plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, crow_indices, col_indices, block_rows, block_cols, plan = inputs
        ctx.blocksize = (block_rows, block_cols)
        saved = (grad, x, crow_indices, col_indices, plan)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, gg):
        grad, x, crow_indices, col_indices, plan = ctx.saved_tensors
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = _contract(x, crow_indices, col_indices, gg, None, grad.shape[-1], plan)
        if ctx.needs_input_grad[1]:
            grad_x = _contract_grad_x(grad, crow_indices, col_indices, gg, x.shape[-1], plan)
        return grad_grad, grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_t, x_t, *_):
        grad, x, crow, col, plan = ctx.saved_tensors
        r, c = ctx.blocksize
        return _sum_of(
            None if grad_t is None else _contract_grad_values(grad_t, x, crow, col, r, c, plan),
            None if x_t is None else _contract_grad_values(grad, x_t, crow, col, r, c, plan),
        )


def _forward_autograd(
    x, crow_indices, col_indices, values, bias=None, out_features=None, activation="none", plan=None
):
    args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    transformed = _transformed()
    if not transformed:
        y = direct.again(*args)
        if y is not None:
            return y
    forward_mode = _forward_ad._current_level >= 0
    if forward_mode or (
        torch.is_grad_enabled()
        and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))
    ):
        function = _TransformableFunction if transformed else _BSRLinearFunction
        fused = "none" if forward_mode else activation
        y = function.apply(*args[:6], fused, plan)
        y = ACTIVATIONS[activation](y) if forward_mode else y
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = _forward_op(*args)
    if not transformed:
        _remember(*args)
    return y


def _grad_x_autograd(grad, crow_indices, col_indices, values, in_features, plan=None):
    if _forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and (grad.requires_grad or values.requires_grad)
    ):
        return _GradXFunction.apply(grad, crow_indices, col_indices, values, in_features, plan)
    with torch._C._AutoDispatchBelowAutograd():
        return _grad_x_op(grad, crow_indices, col_indices, values, in_features, plan)


def _grad_values_autograd(grad, x, crow_indices, col_indices, block_rows, block_cols, plan=None):
    if _forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad)
    ):
        return _GradValuesFunction.apply(
            grad, x, crow_indices, col_indices, block_rows, block_cols, plan
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _grad_values_op(grad, x, crow_indices, col_indices, block_rows, block_cols, plan)


_library.impl("bsr_linear", _forward_autograd, "Autograd")
_library.impl("bsr_linear_grad_x", _grad_x_autograd, "Autograd")
_library.impl("bsr_linear_grad_values", _grad_values_autograd, "Autograd")


# ---------------------------------------------------------------------------------------------------------------------
# Autocast: as F.linear, x, values and bias go to the region's own dtype; float64 is left alone.
# torch.library.register_autocast would fix one dtype for good and refuse keyword arguments.


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if (
            tensor is None
            or tensor.device.type != device_type
            or tensor.dtype == torch.float64
            or not tensor.is_floating_point()
        ):
            return tensor
        return tensor.to(dtype)

    def autocast(
        x,
        crow_indices,
        col_indices,
        values,
        bias=None,
        out_features=None,
        activation="none",
        plan=None,
    ):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return _forward_op(
                cast(x, dtype),
                crow_indices,
                col_indices,
                cast(values, dtype),
                cast(bias, dtype),
                out_features,
                activation,
                plan,
            )

    def as_it_is(op):
        # A backward inside an autocast region: its operands have the forward's dtype already, and nothing that a
        # backend does with them may be cast.
        def call(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(below):
                return op(*args, **kwargs)

        return call

    _library.impl("bsr_linear", autocast, dispatch_key)
    _library.impl("bsr_linear_grad_x", as_it_is(_grad_x_op), dispatch_key)
    _library.impl("bsr_linear_grad_values", as_it_is(_grad_values_op), dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
