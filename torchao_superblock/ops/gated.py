"""`activation(x @ G.T + b) * (x @ U.T + c)`: the two products of a gated MLP as one op, with one output.

There is an op for each activation, `torchao_superblock::bsr_gated_linear_silu` and so on, so that its schema holds
nothing but tensors. Autograd sees the two products that it stands for, and so do all devices but those that compute
both at once: the activation is in the first product's kernel then, and the second is multiplied into it in place.

Legend: M tokens, N out features, K in features, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.aot import are_few, compiles_for_this_process, register_decomposition
from torchao_superblock.ops.autograd import transformed
from torchao_superblock.ops.backends import Backend, GatedKernels, backend_of, on_each_backend
from torchao_superblock.ops.checks import DTYPES, check_blocks, check_devices, check_index
from torchao_superblock.ops.flops import register_formulas
from torchao_superblock.ops.op import autocast_key, bsr_linear, cast_to
from torchao_superblock.ops.operands import Operands


def bsr_gated_linear(
    x: Tensor, gate: Operands, up: Operands, activation: str, *, at_once: bool | None = None
) -> Tensor:
    """Gated linear unit with both weights in BSR format: `activation(x @ gate.T) * (x @ up.T)`, with biases.

    See `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_. Differentiable like the two products,
    to which it is left with gradients, in the transforms of `torch.func`, and where no kernel computes both.

    Args:
        x: `(..., K)`, any strides.
        gate: the weight in front of the activation.
        up: the weight behind it, with the same numbers of features and the same block size.
        activation: as in :func:`torchao_superblock.ops.bsr_linear`.
        at_once: True computes both products in one kernel, False one after the other; None what is expected to be
            faster.

    Returns:
        `(..., N)`, contiguous, dtype of `x`.

    Raises:
        ValueError: a shape does not fit, the activation is unknown, or no kernel computes both products of such a call.
        TypeError: a dtype does not fit.
        RuntimeError: the tensors are on different devices.

    Example:
        >>> crow, col = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
        >>> one = Operands(crow, col, torch.ones(1, 2, 2))
        >>> bsr_gated_linear(torch.ones(1, 2), one, one, "relu")
        tensor([[4., 4.]])
    """
    if activation not in OPS:
        raise ValueError(
            f"bsr_gated_linear: unknown activation {activation!r}; choose one of {', '.join(map(repr, OPS))}"
        )
    rest = (*gate[:4], *up[:4], gate.plan, up.plan)
    if at_once is None:
        # In a compiled program the op decides when it runs.
        if torch.compiler.is_compiling():
            backend = backend_of(x.device.type)
            at_once = backend is not None and backend.gated_source is not None
        else:
            at_once = computes_both(x, gate, up)
        if at_once:
            return OPS[activation](x, *rest)
    if not at_once:
        return _composed(activation, x, *rest, with_gradients=torch.is_grad_enabled())
    kernels = _kernels(x)
    if kernels is None or not kernels.can_compute(x, gate, up):
        raise ValueError(
            f"bsr_gated_linear: no kernel computes both products of x {tuple(x.shape)} ({x.dtype}, {x.device}) and "
            f"blocks {tuple(gate.values.shape[1:])} at once; leave at_once out"
        )
    _check(x, gate, up)
    return _both(kernels, activation, x, gate, up)


def computes_both(x: Tensor, gate: Operands, up: Operands) -> bool:
    """Whether a kernel computes both products of such a call at once, in eager mode.

    Its operands may be rows of larger weights: `crow_indices` need not start at 0.

    Args:
        x: as :func:`bsr_gated_linear` has it, as have the others.
        gate: gate.
        up: up.
    """
    if torch.compiler.is_compiling() or transformed():
        return False
    kernels = _kernels(x)
    return kernels is not None and kernels.serves(x, gate, up)


def _kernels(x: Tensor) -> GatedKernels | None:
    backend = backend_of(x.device.type)
    return None if backend is None else backend.gated_kernels


def _operands(
    gate_crow, gate_col, gate_values, gate_bias, up_crow, up_col, up_values, up_bias, *plans
) -> tuple[Operands, Operands]:
    gate_plan, up_plan = (*plans, None, None)[:2]
    return (
        Operands(gate_crow, gate_col, gate_values, gate_bias, gate_plan),
        Operands(up_crow, up_col, up_values, up_bias, up_plan),
    )


def _composed(
    activation: str, x: Tensor, *rest: Tensor | None, with_gradients: bool = False
) -> Tensor:
    """The same of two products."""
    gate, up = _operands(*rest)
    # With gradients, keeping what the activation needs for its backward is faster than computing it again.
    fused = "none" if with_gradients else activation
    g = bsr_linear(x, *gate[:4], None, fused, gate.plan)
    u = bsr_linear(x, *up[:4], None, "none", up.plan)
    if with_gradients:
        return ACTIVATIONS[activation](g) * u
    return g.mul_(u)


def _check(x: Tensor, gate: Operands, up: Operands) -> int:
    """Check all that can be checked without reading data; return N."""
    if x.dim() < 1:
        raise ValueError(
            "bsr_gated_linear: x must have shape (..., in_features), got a 0-dim tensor"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"bsr_gated_linear: x must be float32, float64, float16 or bfloat16, got {x.dtype}"
        )
    sizes = []
    for name, operands in (("gate", gate), ("up", up)):
        nnz, r, c = check_blocks(operands.values)
        check_index(
            operands.crow_indices, operands.col_indices, nnz, operands.plan, -(-x.shape[-1] // c)
        )
        N = (operands.crow_indices.shape[0] - 1) * r
        sizes.append((N, r, c))
        bias = operands.bias
        if bias is not None and tuple(bias.shape) != (N,):
            raise ValueError(
                f"bsr_gated_linear: bias of {name} must have shape ({N},), got {tuple(bias.shape)}"
            )
        if operands.values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            raise TypeError(
                f"bsr_gated_linear: x and {name} must have one dtype, got {x.dtype} and {operands.values.dtype}"
            )
        check_devices(x, *operands)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"bsr_gated_linear: gate and up must have the same features and block size, got {sizes[0]} and {sizes[1]} "
            "(out_features, block rows and columns)"
        )
    return sizes[0][0]


# ---------------------------------------------------------------------------------------------------------------------
# The ops.

_library = torch.library.Library("torchao_superblock", "FRAGMENT")
_OPERANDS = "Tensor {0}_crow_indices, Tensor {0}_col_indices, Tensor {0}_values, Tensor? {0}_bias"
_SCHEMA = (
    f"(Tensor x, {_OPERANDS.format('gate')}, {_OPERANDS.format('up')}, Tensor? gate_plan=None, Tensor? up_plan=None) "
    "-> Tensor"
)


def _fake(x: Tensor, *rest: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, *_operands(*rest))))


def _forward(backend: Backend, activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    gate, up = _operands(*rest)
    _check(x, gate, up)
    kernels = backend.gated_kernels
    if kernels is not None and kernels.serves(x, gate, up):
        return _both(kernels, activation, x, gate, up)
    return _composed(activation, x, *rest)


def _both(
    kernels: GatedKernels, activation: str, x: Tensor, gate: Operands, up: Operands
) -> Tensor:
    """Both products in one kernel."""
    y = kernels.forward(x.reshape(-1, x.shape[-1]), gate, up, activation)
    return y.view(*x.shape[:-1], y.shape[-1])


def _autograd(activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *rest)
    )
    if needs_gradients or torch.autograd.forward_ad._current_level >= 0:
        return _composed(activation, x, *rest, with_gradients=True)
    with torch._C._AutoDispatchBelowAutograd():
        return OPS[activation](x, *rest)


def _composes(x: Tensor) -> bool | None:
    """Whether `torch.compile` had better see the two products: a kernel for both is for more tokens."""
    return (compiles_for_this_process() and are_few(x)) or None


def _two_products(activation: str, _: bool, x: Tensor, *rest: Tensor | None) -> Tensor:
    return _composed(activation, x, *rest)


def _define(activation: str) -> Callable[..., Tensor]:
    name = f"bsr_gated_linear_{activation}"
    _library.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"torchao_superblock::{name}", _fake, lib=_library)
    register_decomposition(
        _library, f"torchao_superblock::{name}", partial(_two_products, activation), _composes
    )
    _library.impl(name, partial(_autograd, activation), "Autograd")
    return getattr(torch.ops.torchao_superblock, name).default


def _autocast(backend: Backend, key: str, activation: str, *tensors: Tensor | None) -> Tensor:
    device_type = backend.device_type
    dtype = torch.get_autocast_dtype(device_type)
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with torch._C._ExcludeDispatchKeyGuard(below):
        return OPS[activation](*(cast_to(dtype, tensor, device_type) for tensor in tensors))


OPS: dict[str, Callable[..., Tensor]] = {
    activation: _define(activation) for activation in ACTIVATIONS if activation != "none"
}
"""Activation -> the op."""

register_formulas()


def _register(backend: Backend) -> None:
    """Serve the ops on a device, and let them follow its autocast."""
    key = autocast_key(backend)
    for activation in OPS:
        name = f"bsr_gated_linear_{activation}"
        _library.impl(name, partial(_forward, backend, activation), backend.dispatch_key)
        if key is not None:
            _library.impl(name, partial(_autocast, backend, key, activation), key)


on_each_backend(_register)
