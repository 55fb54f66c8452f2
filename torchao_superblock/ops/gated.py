"""`activation(x @ G.T + b) * (x @ U.T + c)`: the two products of a gated MLP as one op, with one output.

There is an op for each activation, `torchao_superblock::bsr_gated_linear_silu` and so on, so that its schema holds
nothing but tensors. Autograd sees the two products that it stands for, and so do all devices but those that compute
both at once: the activation is in the first product's kernel then, and the second is multiplied into it in place.

Legend: M tokens, N out features, K in features, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.bsr_linear import (
    DTYPES,
    NAMESPACE,
    _check_blocks,
    _check_devices,
    _check_index,
    _transformed,
    bsr_linear,
)
from torchao_superblock.ops.flops import register_formulas


class Operands(NamedTuple):
    """The weight of one of the two layers, as :func:`torchao_superblock.ops.bsr_linear` takes it, in whole blocks.

    Attributes:
        crow_indices: `(N / r + 1,)` int32.
        col_indices: `(nnz,)` int32.
        values: `(nnz, r, c)`.
        bias: `(N,)` or None.
        plan: from :func:`torchao_superblock.ops.build_plan`, or None.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None = None
    plan: Tensor | None = None


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
    # In a compiled program the op decides when it runs.
    compiled = x.is_cuda and torch.compiler.is_compiling()
    if at_once is None and (compiled or computes_both(x, gate, up)):
        return OPS[activation](x, *rest)
    if not at_once:
        return _composed(activation, x, *rest, with_gradients=torch.is_grad_enabled())
    if not x.is_cuda or not cuda_backend().can_compute(x, gate, up):
        raise ValueError(
            f"bsr_gated_linear: no kernel computes both products of x {tuple(x.shape)} ({x.dtype}, {x.device}) and "
            f"blocks {tuple(gate.values.shape[1:])} at once; leave at_once out"
        )
    return _both(activation, x, *rest)


def computes_both(x: Tensor, gate: Operands, up: Operands) -> bool:
    """Whether a kernel computes both products of such a call at once, in eager mode.

    Its operands may be rows of larger weights: `crow_indices` need not start at 0.

    Args:
        x: as :func:`bsr_gated_linear` has it, as have the others.
        gate: gate.
        up: up.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or _transformed():
        return False
    return cuda_backend().serves(x, gate, up)


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
        nnz, r, c = _check_blocks(operands.values)
        _check_index(
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
        _check_devices(x, *operands)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"bsr_gated_linear: gate and up must have the same features and block size, got {sizes[0]} and {sizes[1]} "
            "(out_features, block rows and columns)"
        )
    return sizes[0][0]


# ---------------------------------------------------------------------------------------------------------------------
# The ops.

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPERANDS = "Tensor {0}_crow_indices, Tensor {0}_col_indices, Tensor {0}_values, Tensor? {0}_bias"
_SCHEMA = (
    f"(Tensor x, {_OPERANDS.format('gate')}, {_OPERANDS.format('up')}, Tensor? gate_plan=None, Tensor? up_plan=None) "
    "-> Tensor"
)


@cache
def cuda_backend() -> Any:
    """What computes both at once on CUDA tensors, or says that it does not."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return _NoBackend
    from torchao_superblock.ops import cuda_gated

    return cuda_gated


class _NoBackend:
    @staticmethod
    def can_compute(x: Tensor, gate: Operands, up: Operands) -> bool:
        return False

    serves = can_compute


def _fake(x: Tensor, *rest: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, *_operands(*rest))))


def _on_cpu(activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    _check(x, *_operands(*rest))
    return _composed(activation, x, *rest)


def _on_cuda(activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    gate, up = _operands(*rest)
    _check(x, gate, up)
    at_once = cuda_backend().serves(x, gate, up)
    return (_both if at_once else _composed)(activation, x, *rest)


def _both(activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    """Both products in one kernel."""
    gate, up = _operands(*rest)
    N = _check(x, gate, up)
    y = cuda_backend().forward(x.reshape(-1, x.shape[-1]), gate, up, activation)
    return y.view(*x.shape[:-1], N)


def _autograd(activation: str, x: Tensor, *rest: Tensor | None) -> Tensor:
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *rest)
    )
    if needs_gradients or torch.autograd.forward_ad._current_level >= 0:
        return _composed(activation, x, *rest, with_gradients=True)
    with torch._C._AutoDispatchBelowAutograd():
        return OPS[activation](x, *rest)


def _autocast(
    device_type: str, below: torch._C.DispatchKeySet, activation: str, *tensors: Tensor | None
) -> Tensor:
    dtype = torch.get_autocast_dtype(device_type)
    with torch._C._ExcludeDispatchKeyGuard(below):
        return OPS[activation](
            *(
                tensor.to(dtype)
                if tensor is not None
                and tensor.device.type == device_type
                and tensor.is_floating_point()
                and tensor.dtype != torch.float64
                else tensor
                for tensor in tensors
            )
        )


def _define(activation: str) -> Callable[..., Tensor]:
    name = f"bsr_gated_linear_{activation}"
    _library.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_library)
    _library.impl(name, partial(_on_cpu, activation), "CPU")
    _library.impl(name, partial(_on_cuda, activation), "CUDA")
    _library.impl(name, partial(_autograd, activation), "Autograd")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        _library.impl(name, partial(_autocast, device_type, below, activation), key)
    return getattr(torch.ops.torchao_superblock, name).default


OPS: dict[str, Callable[..., Tensor]] = {
    activation: _define(activation) for activation in ACTIVATIONS if activation != "none"
}
"""Activation -> the op."""

register_formulas()
