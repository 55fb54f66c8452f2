"""Derivatives of the op: twice, in forward mode, and under the transforms of `torch.func`.

The three ops are the three contractions of one trilinear form

    L(x, V)  = x @ W.T      (bsr_linear without bias)
    T(g, V)  = g @ W        (grad_x)
    S(g, x)  = the stored blocks of g.T @ x    (grad_values)

so each one's derivatives are the other two, and the backward can be differentiated again.
"""

import torch
from torch import Tensor

from torchao_superblock.ops import fast_path
from torchao_superblock.ops.activations import ACTIVATIONS, activation_backward
from torchao_superblock.ops.backends import backend_of
from torchao_superblock.ops.gradients import linear_backward, sum_over_tokens
from torchao_superblock.ops.plan import build_plan

# `op.py` defines the three before it calls :func:`register`.
_ops = torch.ops.torchao_superblock
_forward_ad = torch.autograd.forward_ad  # asked at each call, as is the next
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is active."""
    return _functorch_interpreter() is not None or _forward_ad._current_level >= 0


def remember(*args) -> None:
    """Let calls of the op with arguments like these skip what this one, which went the long way, had to do."""
    fast_path.remember_above(_apply, *args)


def known_or_op(*args) -> Tensor:
    """The op by what is remembered of calls like this one, or else by the dispatcher."""
    y = fast_path.again(*args)
    return _ops.bsr_linear.default(*args) if y is None else y


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _nothing(*args: object) -> None:
    """Nobody remembers this call."""


def _use_plan(x: Tensor) -> bool:
    backend = backend_of(x.device.type)
    return backend is not None and backend.gradients_use_plan


# How the derivatives call the three contractions. torch.func can only see an autograd.Function that is applied in front
# of the dispatcher; everything else goes through the ops, which compilers keep whole.


def _contract(x, crow_indices, col_indices, values, bias, out_features, plan):
    args = (x, crow_indices, col_indices, values, bias, out_features, "none", plan)
    return _derivative(TransformableFunction, _ops.bsr_linear.default, args)


def _contract_grad_x(*args):
    return _derivative(_GradXFunction, _ops.bsr_linear_grad_x.default, args)


def _contract_grad_values(*args):
    return _derivative(_GradValuesFunction, _ops.bsr_linear_grad_values.default, args)


def _derivative(function, op, args):
    if transformed():
        return function.apply(*args)
    return op(*args) if torch.is_grad_enabled() else _below(op, *args)


def _below(op, *args):
    """An op where autograd is through with the call."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms of a product rule; None stands for zero."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _save(ctx, y, args):
    x, crow_indices, col_indices, values, bias, _, activation, plan = args
    ctx.n_outputs, ctx.activation, ctx.has_bias = y.shape[-1], activation, bias is not None
    # What came before the activation is computed again in the backward: that costs one sparse forward and saves
    # keeping an (M, N) tensor. The bias is needed for that alone.
    saved = (x, crow_indices, col_indices, values, None if activation == "none" else bias, plan)
    ctx.save_for_backward(*saved)
    return saved


def _backward(ctx, grad):
    x, crow_indices, col_indices, values, bias, plan, *kept = ctx.saved_tensors
    needs_input = ctx.needs_input_grad
    needs = (needs_input[0], needs_input[3], ctx.has_bias and needs_input[4])
    args, rest = (grad, x, crow_indices, col_indices, values, bias, ctx.activation), (plan, needs)
    if torch.is_grad_enabled() or transformed():
        # What was kept is a number to autograd, and is computed again.
        grad_x, grad_values, grad_bias = _differentiable_backward(*args, None, *rest)
    else:
        grad_x, grad_values, grad_bias = linear_backward(*args, kept[0] if kept else None, *rest)
    return grad_x, None, None, grad_values, grad_bias, None, None, None, None


def _differentiable_backward(
    grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs
):
    """The same of operations that can be differentiated again, and that the transforms of torch.func see."""
    index = (crow_indices, col_indices)
    if activation != "none":
        if z is None:
            z = _contract(x, *index, values, bias, grad.shape[-1], plan)
        grad = activation_backward(activation, grad, z)
    grad_x = grad_values = None
    # One plan for both, where gradients need one at all.
    if plan is None and needs[0] and needs[1] and _use_plan(x):
        plan = build_plan(*index, -(-x.shape[-1] // values.shape[2]))
    if needs[0]:
        grad_x = _contract_grad_x(grad, *index, values, x.shape[-1], plan)
    if needs[1]:
        grad_values = _contract_grad_values(grad, x, *index, values.shape[1], values.shape[2], plan)
    return grad_x, grad_values, sum_over_tokens(grad) if needs[2] else None


class TransformableFunction(torch.autograd.Function):
    """For the transforms of torch.func and for forward-mode AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _below(_ops.bsr_linear.default, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*_save(ctx, output, inputs))

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)[:8]

    @staticmethod
    def jvp(ctx, x_t, crow_t, col_t, values_t, bias_t, *_):
        # Only ever called for activation "none": the callers below apply an activation on their own.
        x, crow, col, values, _, plan = ctx.saved_tensors
        N = ctx.n_outputs
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
        ctx, x, crow_indices, col_indices, values, bias, out_features, activation, plan, run
    ):
        args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
        y = run(x, crow_indices, col_indices, values, bias, out_features, activation, plan)
        if y is None:
            y = _below(_ops.bsr_linear.default, *args)
        _save(ctx, y, args)
        return y

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)


# Where a call is known, so is that no transform is active and no wrapper of one left, which is all that the method of
# the class would look for.
_apply = super(torch.autograd.Function, _BSRLinearFunction).apply


class _KeepingFunction(torch.autograd.Function):
    """The same with an activation, whose backward finds what came before it instead of computing that again."""

    @staticmethod
    def forward(ctx, x, crow_indices, col_indices, values, bias, out_features, activation, plan, _):
        index = (crow_indices, col_indices)
        # relu's gradient is told by what comes after it as well, which the next layer keeps anyway.
        applied = activation if activation == "relu" else "none"
        args = (x, *index, values, bias, out_features, applied, plan)
        kept = fast_path.again(*args)
        if kept is None:
            kept = _below(_ops.bsr_linear.default, *args)
            remember(*args)
        ctx.activation, ctx.has_bias = activation, bias is not None
        ctx.save_for_backward(x, *index, values, bias, plan, kept)
        return kept if applied == activation else ACTIVATIONS[activation](kept)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)


def keeping(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor | None:
    """The op with an activation, for training: what comes before the activation is kept for the backward.

    That costs `(M, N)` numbers, as an activation of its own does. Where computing it again is faster, it is not kept.

    Args:
        x: as :func:`torchao_superblock.ops.bsr_linear` has it, as have the others; not in an autocast region.

    Returns:
        `(..., N)`; None where tracers or transforms are to see a product and an activation.
    """
    # Modes of dispatch change nothing: a checkpoint may run its forward in one and not what it computes again, and
    # compares what the two keep.
    args = (x, crow_indices, col_indices, values, bias, out_features, activation, plan)
    if (
        type(x) is not Tensor
        or type(values) not in (Tensor, torch.nn.Parameter)
        or transformed()
        or torch._C._get_tracing_state() is not None
        or not _differentiates(x, values, bias)
    ):
        return None
    if activation != "relu" and _recomputes(x.device.type, crow_indices, values):
        return known_or_op(*args)
    return _KeepingFunction.apply(*args, _nothing)


def _recomputes(device_type: str, crow_indices: Tensor, values: Tensor) -> bool:
    """Whether a product takes less time than an activation that is applied to its output in a pass of its own."""
    if values.dtype.itemsize != 2:
        return False
    backend, (nnz, _, c) = backend_of(device_type), values.shape
    return backend is not None and nnz * c <= backend.recomputed_row * (len(crow_indices) - 1)


class _GradXFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _below(_ops.bsr_linear_grad_x.default, *args)

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
    def forward(*args):
        return _below(_ops.bsr_linear_grad_values.default, *args)

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
    is_transformed = transformed()
    if not is_transformed:
        y = fast_path.again(*args)
        if y is not None:
            return y
    if _forward_ad._current_level >= 0:
        y = ACTIVATIONS[activation](TransformableFunction.apply(*args[:6], "none", plan))
    elif not _differentiates(x, values, bias):
        y = _below(_ops.bsr_linear.default, *args)
    elif is_transformed:
        y = TransformableFunction.apply(*args)
    else:
        y = _BSRLinearFunction.apply(*args, _nothing)
    if not is_transformed:
        remember(*args)
    return y


def _grad_x_autograd(grad, crow_indices, col_indices, values, in_features, plan=None):
    args = (grad, crow_indices, col_indices, values, in_features, plan)
    if _forward_ad._current_level >= 0 or _differentiates(grad, values):
        return _GradXFunction.apply(*args)
    return _below(_ops.bsr_linear_grad_x.default, *args)


def _grad_values_autograd(grad, x, crow_indices, col_indices, block_rows, block_cols, plan=None):
    args = (grad, x, crow_indices, col_indices, block_rows, block_cols, plan)
    if _forward_ad._current_level >= 0 or _differentiates(grad, x):
        return _GradValuesFunction.apply(*args)
    return _below(_ops.bsr_linear_grad_values.default, *args)


def _backward_autograd(
    grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs
):
    args = (grad, x, crow_indices, col_indices, values, bias, activation, z, plan, needs)
    if _forward_ad._current_level >= 0 or _differentiates(grad, x, values, bias, z):
        return _differentiable_backward(*args)
    return _below(_ops.bsr_linear_backward.default, *args)


def register(library: torch.library.Library) -> None:
    """Register the derivatives of the ops, for all devices.

    Args:
        library: has defined the ops.
    """
    library.impl("bsr_linear", _forward_autograd, "Autograd")
    library.impl("bsr_linear_grad_x", _grad_x_autograd, "Autograd")
    library.impl("bsr_linear_grad_values", _grad_values_autograd, "Autograd")
    library.impl("bsr_linear_backward", _backward_autograd, "Autograd")
