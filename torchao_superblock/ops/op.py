"""`torch.ops.torchao_superblock.bsr_linear`: schema, dispatch, autocast, and what compilers see of it.

The op is registered with `torch.library.Library` rather than `torch.library.custom_op`: at small M the kernel takes
a few microseconds, and the decorator's wrappers alone would cost more than that. For the same reason a call that
repeats an earlier one skips most of what is here: see `fast_path.py`.

What a backend (`backends.py`) sees is always the simple case: 2-D operands of one dtype on one device, M >= 1.
Everything else (leading dimensions, empty batches) is dealt with here, once.

Legend: M tokens (all leading dimensions of x together), N out features, K in features, R x C the block grid,
r x c the block size, nnz stored blocks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchao_superblock.ops import autograd, fast_path, gradients
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.aot import register_decomposition
from torchao_superblock.ops.backends import Backend, on_each_backend
from torchao_superblock.ops.checks import check_forward, check_grad_values, check_grad_x
from torchao_superblock.ops.flops import register_formulas
from torchao_superblock.ops.forks import watch_forks

_library = torch.library.Library("torchao_superblock", "DEF")
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
autograd.register(_library)
_forward_op = torch.ops.torchao_superblock.bsr_linear.default
_grad_x_op = torch.ops.torchao_superblock.bsr_linear_grad_x.default
_grad_values_op = torch.ops.torchao_superblock.bsr_linear_grad_values.default

# Asked at each call.
_profiler = torch.autograd.profiler
_forward_ad = torch.autograd.forward_ad
_function_mode_is_active = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: True)
_autocasts = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


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
        out_features: N, if the last block row is ragged; None means `R * r`. K may be ragged as well. What blocks hold
            beyond row N or column K is ignored, as long as it is finite, and its gradient is zero.
        activation: one of `"none"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"`, `"quick_gelu"`.
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
    if torch.compiler.is_compiling():
        return _forward_op(
            x, crow_indices, col_indices, values, bias, out_features, activation, plan
        )
    # A call like an earlier one need not go through the dispatcher, unless somebody watches the ops go by.
    unwatched = not (
        _profiler._is_profiler_enabled
        or _forward_ad._current_level >= 0
        or _function_mode_is_active()
    )
    args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    if unwatched:
        casts = _casts_of(x) if _autocasts() else None
        if casts is not None:
            return casts(autograd.known_or_op, *args)
        y = fast_path.again(
            x, crow_indices, col_indices, values, bias, out_features, activation, plan
        )
        if y is not None:
            return y
    if autograd.transformed():
        y = autograd.TransformableFunction.apply(*args[:6], "none", plan)
        return ACTIVATIONS[activation](y)
    y = _forward_op(*args)
    if torch.is_inference_mode_enabled():  # elsewhere the kernel of the Autograd key has done it
        autograd.remember(*args)
    return y


def trainable_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor:
    """:func:`bsr_linear` as a layer in training calls it: what comes before the activation is kept for the backward.

    Args:
        x: as :func:`bsr_linear` has it, as have the others.
    """
    if activation == "none":
        return bsr_linear(x, crow_indices, col_indices, values, bias, out_features, "none", plan)
    y = None
    if not torch.compiler.is_compiling():
        args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
        casts = _casts_of(x) if _autocasts() else None
        y = autograd.keeping(*args) if casts is None else casts(autograd.keeping, *args)
    if y is None:
        z = bsr_linear(x, crow_indices, col_indices, values, bias, out_features, "none", plan)
        y = ACTIVATIONS[activation](z)
    return y


# What serves a call in an autocast region, by device type; its first argument is what is called with cast operands.
_autocast: dict[str, Callable[..., Any]] = {}


def _casts_of(x: Tensor) -> Callable[..., Any] | None:
    """What casts the operands of a call in autocast first; None where transforms are to see the casts."""
    if autograd.transformed():
        return None
    device_type = x.device.type
    casts = _autocast.get(device_type)
    return casts if casts is not None and torch.is_autocast_enabled(device_type) else None


# ---------------------------------------------------------------------------------------------------------------------
# From the general case to what backends (a BackendModule each) see.


def _flatten(x: Tensor) -> Tensor:
    """`(..., K)` -> `(M, K)`."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _unflatten(y: Tensor, lead: torch.Size) -> Tensor:
    """`(M, N)` -> `(*lead, N)`."""
    return y if len(lead) == 1 else y.view(*lead, y.shape[1])


def _forward(
    backend,
    x,
    crow_indices,
    col_indices,
    values,
    bias=None,
    out_features=None,
    activation="none",
    plan=None,
):
    args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    N = check_forward(*args)
    lead = x.shape[:-1]
    if N == 0 or math.prod(lead) == 0:
        return x.new_empty((*lead, N))
    y = backend.forward(
        _flatten(x),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        values.contiguous(),
        bias if bias is None else bias.contiguous(),
        activation,
        plan if plan is None else plan.contiguous(),
        N,
    )
    return _unflatten(y, lead)


def _grad_x(backend, grad, crow_indices, col_indices, values, in_features, plan=None):
    check_grad_x(grad, crow_indices, col_indices, values, in_features, plan)
    lead = grad.shape[:-1]
    if math.prod(lead) == 0 or in_features == 0:
        return grad.new_empty((*lead, in_features))
    grad_x = backend.grad_x(
        _flatten(grad),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        values.contiguous(),
        plan if plan is None else plan.contiguous(),
        in_features,
    )
    return _unflatten(grad_x, lead)


def _grad_values(backend, grad, x, crow_indices, col_indices, block_rows, block_cols, plan=None):
    check_grad_values(grad, x, crow_indices, col_indices, block_rows, block_cols, plan)
    nnz = col_indices.shape[0]
    if nnz == 0 or math.prod(x.shape[:-1]) == 0:
        return grad.new_zeros((nnz, block_rows, block_cols))
    return backend.grad_values(
        _flatten(grad),
        _flatten(x),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        plan if plan is None else plan.contiguous(),
        block_rows,
        block_cols,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Fake implementations: shapes and errors without data, for torch.compile, torch.export and the meta device.


@torch.library.register_fake("torchao_superblock::bsr_linear", lib=_library)
def _forward_fake(
    x, crow_indices, col_indices, values, bias=None, out_features=None, activation="none", plan=None
):
    N = check_forward(x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    return x.new_empty((*x.shape[:-1], N))


@torch.library.register_fake("torchao_superblock::bsr_linear_grad_x", lib=_library)
def _grad_x_fake(grad, crow_indices, col_indices, values, in_features, plan=None):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("torchao_superblock::bsr_linear_grad_values", lib=_library)
def _grad_values_fake(grad, x, crow_indices, col_indices, block_rows, block_cols, plan=None):
    return grad.new_empty((col_indices.shape[0], block_rows, block_cols))


register_decomposition(_library, "torchao_superblock::bsr_linear", _forward)


# ---------------------------------------------------------------------------------------------------------------------
# Devices.


def _register_dispatch(backend: Backend) -> None:
    """Register the three ops for a device; what computes is imported at the first call."""
    run = None

    def forward(*args, **kwargs) -> Tensor:
        nonlocal run
        if run is None:
            general = partial(_forward, backend.module)
            # A backend may know how to repeat a call without checking and deciding everything again.
            call = getattr(backend.module, "call", None)
            run = general if call is None else partial(call, general)
            if not backend.leaves_closures:
                repeat = getattr(backend.module, "repeat", None)
                fast_path.serve(
                    backend.device_type,
                    (lambda *_: run) if repeat is None else partial(repeat, general),
                )
        return run(*args, **kwargs)

    def grad_x(*args, **kwargs) -> Tensor:
        return _grad_x(backend.module, *args, **kwargs)

    def grad_values(*args, **kwargs) -> Tensor:
        return _grad_values(backend.module, *args, **kwargs)

    _library.impl("bsr_linear", forward, backend.dispatch_key)
    _library.impl("bsr_linear_grad_x", grad_x, backend.dispatch_key)
    _library.impl("bsr_linear_grad_values", grad_values, backend.dispatch_key)
    fast_path.admit(backend.dispatch_key)


def autocast_key(backend: Backend) -> str | None:
    """The dispatch key of a device's autocast; None where this torch has none for it."""
    key = f"Autocast{backend.dispatch_key}"
    return key if hasattr(torch._C.DispatchKey, key) else None


def cast_to(dtype: torch.dtype, tensor: Tensor | None, device_type: str) -> Tensor | None:
    """An operand in the dtype of an autocast region: not an index, nor float64, nor what is elsewhere."""
    if (
        tensor is None
        or tensor.device.type != device_type
        or tensor.dtype == torch.float64
        or not tensor.is_floating_point()
    ):
        return tensor
    return tensor.to(dtype)


def _register_autocast(backend: Backend) -> None:
    """As F.linear: x, values and bias go to the region's own dtype; float64 is left alone.

    torch.library.register_autocast would fix one dtype for good and refuse keyword arguments.
    """
    device_type, dispatch_key = backend.device_type, autocast_key(backend)
    if dispatch_key is None:
        return
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def autocast(x, crow_indices, col_indices, values, bias=None, *others, **named):
        dtype = torch.get_autocast_dtype(device_type)
        x, values, bias = (cast_to(dtype, tensor, device_type) for tensor in (x, values, bias))
        with torch._C._ExcludeDispatchKeyGuard(below):
            return _forward_op(x, crow_indices, col_indices, values, bias, *others, **named)

    def cast_call(function, x, crow_indices, col_indices, values, bias, *others):
        # The same without the dispatcher, where nobody watches the ops.
        dtype = torch.get_autocast_dtype(device_type)
        if x.dtype is not dtype:
            x = cast_to(dtype, x, device_type)
        if values.dtype is not dtype:
            values = cast_to(dtype, values, device_type)
        if bias is not None and bias.dtype is not dtype:
            bias = cast_to(dtype, bias, device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return function(x, crow_indices, col_indices, values, bias, *others)

    def as_it_is(op):
        # A backward inside an autocast region: its operands have the forward's dtype already, and nothing that a
        # backend does with them may be cast.
        def call(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(below):
                return op(*args, **kwargs)

        return call

    _autocast[device_type] = cast_call
    _library.impl("bsr_linear", autocast, dispatch_key)
    _library.impl("bsr_linear_grad_x", as_it_is(_grad_x_op), dispatch_key)
    _library.impl("bsr_linear_grad_values", as_it_is(_grad_values_op), dispatch_key)
    _library.impl("bsr_linear_backward", as_it_is(gradients.OP), dispatch_key)


on_each_backend(_register_dispatch)
on_each_backend(_register_autocast)
