"""The CPU backend: the compiled kernel of `csrc/` where there is one (`compiled.py`), else plain PyTorch.

The four functions are those of :class:`torchao_superblock.ops.backends.BackendModule`; an index that lies outside of
the matrix raises a ValueError in each.

Dimension letters: M tokens, N out_features, K in_features, R and C block rows and columns, r and c
rows and columns of a block.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, get_num_threads

from torchao_superblock.ops import pytorch
from torchao_superblock.ops.activations import CODES, activation_backward
from torchao_superblock.ops.cpu import compiled
from torchao_superblock.ops.cpu.compiled import backend_info
from torchao_superblock.ops.plan import plan_fits

__all__ = ["backend_info", "call", "forward", "grad_values", "grad_x", "repeat", "repeat_backward"]

# The order of `enum sb_dtype` in csrc/superblock.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _empty_through_dispatcher(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


# As torch.compile's code allocates, past the dispatcher, where this torch can: half of the time.
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty_through_dispatcher)


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    out_features: int | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias)`."""
    kernel = compiled.kernel
    if kernel is None:
        return pytorch.forward(x, crow, col, values, bias, activation, plan, out_features)
    M, K = x.shape
    nnz, r, c = values.shape
    N = (crow.shape[0] - 1) * r if out_features is None else out_features
    y = _empty((M, N), (N, 1), x.dtype)
    weight = (crow.data_ptr(), col.data_ptr(), 0, values.data_ptr())
    results = (0 if bias is None else bias.data_ptr(), y.data_ptr())
    sizes = (M, N, K, r, c, nnz)
    codes = (_DTYPES[x.dtype], CODES[activation])
    kernel.product(x.data_ptr(), *x.stride(), *weight, *results, *sizes, *codes, get_num_threads())
    return y


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
    """The op on CPU tensors: the plain case at once, all others (and all errors) by `general`.

    At M = 1 the kernel takes about as long as the general way of checking its arguments, so the
    case that needs no copy and no message is recognised here with as few questions as will do.
    """
    kernel = compiled.kernel
    shape, block, rows = x.shape, values.shape, crow.shape
    if kernel is not None and len(block) == 3 and len(rows) == 1 and len(shape) >= 2:
        nnz, r, c = block
        R, K = rows[0] - 1, shape[-1]
        N = R * r if out_features is None else out_features
        code = _DTYPES.get(x.dtype)
        act = CODES.get(activation)
        if (
            c > 0
            and r > 0
            and (R - 1) * r < N <= R * r
            and N > 0
            and code is not None
            and act is not None
            and values.dtype is x.dtype
            and crow.dtype is torch.int32
            and col.dtype is torch.int32
            and col.shape == (nnz,)
            and x.is_cpu
            and crow.is_cpu
            and col.is_cpu
            and values.is_cpu
            and crow.is_contiguous()
            and col.is_contiguous()
            and values.is_contiguous()
            and (
                bias is None
                or (
                    bias.dtype is x.dtype
                    and bias.shape == (N,)
                    and bias.is_cpu
                    and bias.is_contiguous()
                )
            )
            and (plan is None or _fits(plan, R, -(-K // c), nnz))
        ):
            if len(shape) == 2:
                M, strides = shape[0], x.stride()
            else:
                M, strides = (x.numel() // K if K else 0), ((K, 1) if x.is_contiguous() else None)
            if M > 0 and strides is not None:
                # (sizes one by one: a tuple takes torch a microsecond longer to read)
                y = x.new_empty(M, N) if len(shape) == 2 else x.new_empty(*shape[:-1], N)
                kernel.product(
                    x.data_ptr(),
                    *strides,
                    crow.data_ptr(),
                    col.data_ptr(),
                    0,
                    values.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    y.data_ptr(),
                    M,
                    N,
                    K,
                    r,
                    c,
                    nnz,
                    code,
                    act,
                    get_num_threads(),
                )
                return y
    return general(x, crow, col, values, bias, out_features, activation, plan)


def repeat(
    general: Callable[..., Tensor],
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> Callable[..., Tensor | None]:
    """What serves calls like one that was served: all that :func:`call` asks of its tensors is known of these.

    Args:
        general: as :func:`call` has it, as have the others.
    """
    kernel = compiled.kernel
    nnz, r, c = values.shape
    shape = x.shape
    N, K = (crow.shape[0] - 1) * r, shape[-1] if shape else 0
    if out_features is not None:
        N = out_features
    if (
        kernel is None
        or len(shape) < 2
        or x.numel() * N == 0
        or not (len(shape) == 2 or x.is_contiguous())
        or not (crow.is_contiguous() and col.is_contiguous() and values.is_contiguous())
        or not (bias is None or bias.is_contiguous())
    ):
        return partial(call, general)
    M = x.numel() // K
    # Of a single row any stride is meant.
    strides = x.stride() if len(shape) == 2 and M > 1 else (K, x.stride(-1))
    out = torch.empty((*shape[:-1], N), device="meta")
    y_shape, y_strides, dtype = tuple(out.shape), out.stride(), x.dtype
    sizes = (M, N, K, r, c, nnz, _DTYPES[dtype], CODES[activation])

    def run(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        out_features: int | None,
        activation: str,
        plan: Tensor | None,
    ) -> Tensor | None:
        if compiled.kernel is not kernel:
            return None
        y = _empty(y_shape, y_strides, dtype)
        kernel.product(
            x.data_ptr(),
            *strides,
            crow.data_ptr(),
            col.data_ptr(),
            0,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            *sizes,
            get_num_threads(),
        )
        return y

    return run


def _fits(plan: Tensor, R: int, C: int, nnz: int) -> bool:
    return plan.dtype is torch.int32 and plan.is_cpu and plan_fits(plan.numel(), R, C, nnz)


def grad_x(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, plan: Tensor | None, in_features: int
) -> Tensor:
    """`grad @ W`; the kernel transposes the index itself, in no time beside the product."""
    kernel = compiled.kernel
    if kernel is None:
        return pytorch.grad_x(grad, crow, col, values, plan, in_features)
    M, N = grad.shape
    nnz, r, c = values.shape
    out = grad.new_empty((M, in_features))
    weight = (crow.data_ptr(), col.data_ptr(), 1, values.data_ptr())
    sizes = (M, in_features, N, c, r, nnz)
    codes = (_DTYPES[grad.dtype], CODES["none"])
    threads = get_num_threads()
    kernel.product(
        grad.data_ptr(), *grad.stride(), *weight, 0, out.data_ptr(), *sizes, *codes, threads
    )
    return out


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    plan: Tensor | None,
    block_rows: int,
    block_cols: int,
) -> Tensor:
    """The stored blocks of `grad.T @ x`."""
    kernel = compiled.kernel
    if kernel is None:
        return pytorch.grad_values(grad, x, crow, col, plan, block_rows, block_cols)
    (M, K), nnz = x.shape, col.shape[0]
    out = x.new_empty((nnz, block_rows, block_cols))
    operands = (grad.data_ptr(), *grad.stride(), x.data_ptr(), *x.stride())
    index = (crow.data_ptr(), col.data_ptr(), out.data_ptr())
    sizes = (M, grad.shape[1], K, block_rows, block_cols, nnz)
    kernel.grad_values(*operands, *index, *sizes, _DTYPES[x.dtype], get_num_threads())
    return out


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
    """What serves all gradients of calls like one that was served, with nothing left to ask of their tensors.

    Args:
        grad: as :func:`torchao_superblock.ops.gradients.linear_backward` had it, as have the others.
    """
    kernel = compiled.kernel
    (nnz, r, c), N, K = values.shape, grad.shape[-1], x.shape[-1]
    plain = [t for t in (crow, col, values, bias, z) if t is not None]
    if kernel is None or x.numel() * N == 0 or nnz == 0:
        return None
    if not all(tensor.is_contiguous() for tensor in plain):
        return None
    if not (x.is_contiguous() and grad.is_contiguous()):
        if x.dim() != 2 or activation != "none":
            return None
    M = x.numel() // K
    # Of a single row any stride is meant.
    flat = x.dim() == 2 and M > 1
    x_strides = x.stride() if flat else (K, x.stride(-1))
    grad_strides = grad.stride() if flat else (N, grad.stride(-1))
    dtype, code, none = x.dtype, _DTYPES[x.dtype], CODES["none"]
    x_like = torch.empty(x.shape, device="meta")
    z_like = torch.empty(grad.shape, device="meta")
    x_out, z_out = (tuple(t.shape) for t in (x_like, z_like))
    x_out_strides, z_out_strides = x_like.stride(), z_like.stride()
    sizes, sizes_t = (M, N, K, r, c, nnz), (M, K, N, c, r, nnz)
    lead = tuple(range(grad.dim() - 1))
    needs_x, needs_values, needs_bias = needs
    computes_z = activation != "none" and z is None

    def run(
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        plan: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        if compiled.kernel is not kernel:
            return None
        threads = get_num_threads()
        crow_at, col_at, values_at = crow.data_ptr(), col.data_ptr(), values.data_ptr()
        if computes_z:
            z = _empty(z_out, z_out_strides, dtype)
            results = (0 if bias is None else bias.data_ptr(), z.data_ptr())
            weight = (crow_at, col_at, 0, values_at)
            kernel.product(x.data_ptr(), *x_strides, *weight, *results, *sizes, code, none, threads)
        if z is not None:
            grad = activation_backward(activation, grad, z)
        grad_at = grad.data_ptr()
        grad_x = grad_values = grad_bias = None
        if needs_x:
            grad_x = _empty(x_out, x_out_strides, dtype)
            weight = (crow_at, col_at, 1, values_at)
            results = (0, grad_x.data_ptr())
            kernel.product(grad_at, *grad_strides, *weight, *results, *sizes_t, code, none, threads)
        if needs_values:
            grad_values = _empty((nnz, r, c), (r * c, c, 1), dtype)
            index = (crow_at, col_at, grad_values.data_ptr())
            operands = (grad_at, *grad_strides, x.data_ptr(), *x_strides)
            kernel.grad_values(*operands, *index, *sizes, code, threads)
        if needs_bias:
            grad_bias = grad.sum(lead) if lead else grad.clone()
        return grad_x, grad_values, grad_bias

    return run
