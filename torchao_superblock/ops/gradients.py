"""`torch.ops.torchao_superblock.bsr_linear_backward`: all gradients of the op at once, below autograd.

A training step of layers that a GPU is done with in microseconds waits for the host. One op for all that a backward
computes is one trip through the dispatcher and one set of checks, and a call that repeats an earlier one skips even
these: it is recognised as a forward is (`fast_path.py`), and served by what the backend prepared for it.

Compilers are shown less of it: an activation's gradient and the sum for the bias stay operations of torch, which they
fuse with what is around them.

Legend: M tokens (all leading dimensions of x together), N out features, K in features, R x C the block grid,
r x c the block size, nnz stored blocks.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchao_superblock.ops import fast_path
from torchao_superblock.ops.activations import activation_backward
from torchao_superblock.ops.backends import Backend, backend_of, on_each_backend
from torchao_superblock.ops.checks import check_backward
from torchao_superblock.ops.flops import register_formulas
from torchao_superblock.ops.plan import build_plan

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_library = torch.library.Library("torchao_superblock", "FRAGMENT")
_library.define(
    "bsr_linear_backward(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, "
    "Tensor? bias, str activation, Tensor? z, Tensor? plan, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_ops = torch.ops.torchao_superblock  # `op.py` defines those of the three contractions
OP = _ops.bsr_linear_backward.default
register_formulas()

# Asked at each call.
_profiler = torch.autograd.profiler
_function_mode_is_active = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: True)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    z: Tensor | None,
    plan: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of `activation(x @ weight.T + bias)`, where autograd is through with the call.

    Args:
        grad: of the output, `(..., N)`, any strides.
        x: as :func:`torchao_superblock.ops.bsr_linear` had it, as had the indices, `values` and `plan`.
        crow_indices: crow_indices.
        col_indices: col_indices.
        values: values.
        bias: only needed to compute z again.
        activation: what the forward applied.
        z: what the activation was applied to, in the shape of `grad`; None computes it again, from x.
        plan: plan.
        needs: whether the gradients of x, the values and the bias are asked for.

    Returns:
        Those gradients, `(..., K)`, `(nnz, r, c)` and `(N,)`; None for what is not asked for.
    """
    if type(grad) is not Tensor:
        return _traced(grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs)
    # As in `op.py`: somebody may want to see the op go by.
    if not (_profiler._is_profiler_enabled or _function_mode_is_active()):
        grads = _again(
            _entries, grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs
        )
        if grads is not None:
            return grads
    args = (grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs)
    with torch._C._AutoDispatchBelowAutograd():
        grads = OP(*args)
    _remember(_entries, *args)
    return grads


def _traced(grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs):
    with torch._C._AutoDispatchBelowAutograd():
        if activation != "none":
            if z is None:
                z = _ops.bsr_linear.default(
                    x, crow_indices, col_indices, values, bias, grad.shape[-1], "none", plan
                )
            grad = activation_backward(activation, grad, z)
        grad_x = grad_values = None
        if needs[0] or needs[1]:
            products = (needs[0], needs[1], False)
            grad_x, grad_values, _ = OP(
                *(grad, x, crow_indices, col_indices, values, None, "none", None, plan, products)
            )
    return grad_x, grad_values, sum_over_tokens(grad) if needs[2] else None


def sum_over_tokens(grad: Tensor) -> Tensor:
    """The gradient of the bias.

    Args:
        grad: of what the bias was added to, `(..., N)`.
    """
    # Not -1, which is ambiguous where there are no features.
    return grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Calls that repeat an earlier one.

# By the two shapes that differ most between layers: (check, activation, needs, run), the newest first. Of calls that
# come from autograd, and of those that reach a backend through the dispatcher, as compiled code has it.
_entries, _entries_of_op = fast_path.Entries(), fast_path.Entries()
_NO_BIAS, _NO_PLAN, _NO_Z = fast_path.STAND_INS


def _again(table, grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs):
    entries = table.get((grad.shape, values.shape))
    if not entries or fast_path.modes_are_active():
        return None
    b = _NO_BIAS if bias is None else bias
    p = _NO_PLAN if plan is None else plan
    before = _NO_Z if z is None else z
    for same, fixed_activation, fixed_needs, run in entries:
        if (
            needs == fixed_needs
            and activation == fixed_activation
            and same(grad, x, crow_indices, col_indices, values, b, p, before)
        ):
            grads = run(grad, x, crow_indices, col_indices, values, bias, z, plan)
            if grads is not None:
                return grads
    return None


def _remember(table: fast_path.Entries, *args: Any) -> None:
    """Serve calls like this one, which went the long way, by what the backend makes of it."""
    grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs = args
    key = (grad.shape, values.shape)
    # Shapes that are seen for the first time are only noted: they may never come back.
    if not fast_path.USABLE or not table.noted(key):
        return
    repeat = getattr(backend_of(grad.device.type).module, "repeat_backward", None)
    run = None if repeat is None else repeat(*args)
    if run is None:
        return
    b = _NO_BIAS if bias is None else bias
    p = _NO_PLAN if plan is None else plan
    before = _NO_Z if z is None else z
    same = fast_path.recognise(grad, x, crow_indices, col_indices, values, b, p, before)
    if same is not None:
        table.keep(key, (same, activation, needs, run))


# ---------------------------------------------------------------------------------------------------------------------
# The op.


def _call(backend: Backend, *args: Any) -> Gradients:
    """The op on a device."""
    grads = _again(_entries_of_op, *args) if type(args[0]) is Tensor else None
    if grads is None:
        grads = _backward(backend, *args)
        _remember(_entries_of_op, *args)
    return grads


def _backward(
    backend: Backend,
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    z: Tensor | None,
    plan: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """The general case, for every device: of the ops of the three contractions."""
    index = (crow_indices, col_indices)
    check_backward(grad, x, *index, values, bias, activation, z, plan)
    grad_bias = None
    if activation != "none" and z is None:
        z = _ops.bsr_linear.default(x, *index, values, bias, grad.shape[-1], "none", plan)
    fused = getattr(backend.module, "activation_gradient", None)
    if fused is not None and grad.numel() and (activation != "none" or needs[2]):
        grad, grad_bias = fused(grad, z, activation, needs[2])
    else:
        if activation != "none":
            grad = activation_backward(activation, grad, z)
        if needs[2]:
            grad_bias = sum_over_tokens(grad)
    # One plan for both, where gradients need one at all.
    if plan is None and needs[0] and needs[1] and backend.gradients_use_plan:
        plan = build_plan(*index, -(-x.shape[-1] // values.shape[2]))
    grad_x = grad_values = None
    if needs[0]:
        grad_x = _ops.bsr_linear_grad_x.default(grad, *index, values, x.shape[-1], plan)
    if needs[1]:
        grad_values = _ops.bsr_linear_grad_values.default(
            grad, x, *index, values.shape[1], values.shape[2], plan
        )
    return grad_x, grad_values, grad_bias


@torch.library.register_fake("torchao_superblock::bsr_linear_backward", lib=_library)
def _backward_fake(
    grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs
) -> Gradients:
    check_backward(grad, x, crow_indices, col_indices, values, bias, activation, z, plan)
    return (
        grad.new_empty(x.shape) if needs[0] else None,
        grad.new_empty(values.shape) if needs[1] else None,
        grad.new_empty(grad.shape[-1]) if needs[2] else None,
    )


def _register(backend: Backend) -> None:
    _library.impl("bsr_linear_backward", partial(_call, backend), backend.dispatch_key)


on_each_backend(_register)
