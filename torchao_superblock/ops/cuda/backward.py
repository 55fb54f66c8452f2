"""All gradients of a call at once on CUDA tensors: what the op asks for, and how a backward is repeated.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchao_superblock.ops.cuda import activation_pass as passes
from torchao_superblock.ops.cuda import backend
from torchao_superblock.ops.plan import parts_of
from torchao_superblock.ops.precision import allows_tf32


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _prepare_pass(grad: Tensor, z: Tensor | None, activation: str, needs_sums: bool) -> passes.Run:
    """What serves a gradient `(M, N)` and z, contiguous, like these."""
    aligned = (_is_aligned(grad), z is None or _is_aligned(z))
    M, N = grad.shape
    # Of a single row or column, the stride means nothing.
    strides = (grad.stride(0) if M > 1 else N, grad.stride(1) if N > 1 else 1)
    return passes.prepare(
        grad.get_device(), grad.dtype, activation, N, strides, aligned, needs_sums
    )


def activation_gradient(
    grad: Tensor, z: Tensor | None, activation: str, needs_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what an activation was applied to, and its sums over tokens, in one pass.

    Args:
        grad: of the activation's output, `(..., N)`, any strides, not empty.
        z: what it was applied to, in the shape of `grad`; None without an activation.
        activation: a name of the table.
        needs_sums: whether the sums are asked for.

    Returns:
        The gradient of z, contiguous (without an activation, `grad` itself), and the gradient of the bias or None.
    """
    if grad.get_device() != backend._current_device():
        with torch.cuda.device(grad.get_device()):
            return activation_gradient(grad, z, activation, needs_sums)
    flat = grad.reshape(-1, grad.shape[-1])
    z = None if z is None else z.contiguous()
    out, sums = _prepare_pass(flat, z, activation, needs_sums)(flat, z)
    return (grad if z is None else out), sums


def repeat_backward(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    z: Tensor | None,
    plan: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """What serves all gradients of calls like one that was served, with nothing left to decide.

    Args:
        grad: as :func:`torchao_superblock.ops.gradients.linear_backward` had it, as have the others.

    Returns:
        None if its kernels read or write other tensors, or if it was given no plan.
    """
    (nnz, r, c), R, K = values.shape, crow.shape[0] - 1, x.shape[-1]
    N, C = grad.shape[-1], -(-K // c)
    contiguous = [t for t in (crow, col, values, bias, z, plan) if t is not None]
    if (
        plan is None
        or x.numel() * N * nnz == 0
        or backend._observer is not None
        or grad.get_device() != backend._current_device()
        or not all(tensor.is_contiguous() for tensor in contiguous)
    ):
        return None
    try:
        flat_x, flat = x.view(-1, K), grad.view(-1, N)
    except RuntimeError:  # one of them was copied
        return None
    needs_x, needs_values, needs_bias = needs
    activates = activation != "none"
    problems, one_pass = [], None
    if activates and z is None:
        problems.append(backend.forward_problem(flat_x, crow, values, bias, "none", plan, N))
    computes_z = bool(problems)
    if activates or needs_bias:
        z_like = flat.new_empty(flat.shape) if activates else None
        one_pass = _prepare_pass(flat, z_like if z is None else z, activation, needs_bias)
        flat = flat if z_like is None else z_like
    if needs_x:
        problems.append(backend.grad_x_problem(flat, crow, values, K))
    if needs_values:
        problems.append(backend.grad_values_problem(flat, flat_x, crow, col, r, c))
    prepared = [backend.prepared(problem) for problem in problems]
    if None in prepared:
        return None
    of_z = prepared.pop(0) if computes_z else None
    of_x = prepared.pop(0) if needs_x else None
    of_values = prepared.pop(0) if needs_values else None
    x_shape, grad_shape = tuple(x.shape), tuple(grad.shape)
    aligned = tuple(map(_is_aligned, (grad, x, values, z if z is not None else values)))
    device_index, is_float32 = grad.get_device(), grad.dtype == torch.float32
    tf32 = is_float32 and allows_tf32()

    def run(
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        plan: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        # All that a launch rests on and fast_path.py does not compare.
        if (
            (grad.data_ptr() % 16 == 0) is not aligned[0]
            or (x.data_ptr() % 16 == 0) is not aligned[1]
            or (values.data_ptr() % 16 == 0) is not aligned[2]
            or (z is not None and (z.data_ptr() % 16 == 0) is not aligned[3])
            or backend._current_device() != device_index
            or (is_float32 and allows_tf32() is not tf32)
        ):
            return None
        grad_x = grad_values = grad_bias = None
        if of_z is not None:
            z = of_z(x, crow, col, values, bias, plan, grad_shape)
        if one_pass is not None:
            grad, grad_bias = one_pass(grad, z)
        parts = parts_of(plan, R, C, nnz)
        if of_x is not None:
            grad_x = of_x(grad, crow, col, values, None, parts, x_shape)
        if of_values is not None:
            grad_values = of_values(grad, x, crow, col, parts)
        return grad_x, grad_values, grad_bias

    return run
