"""The CPU backend: the compiled kernel of `csrc/` if it is there and current, else plain PyTorch.

Environment variables, read at import:

- `TORCHAO_SUPERBLOCK_CPU_BACKEND`: `c` or `pytorch`; unset takes the compiled kernel where it can.
- `TORCHAO_SUPERBLOCK_CPU_ISA`: `baseline`, `avx2` or `avx512`; unset takes the best of the processor.

Dimension letters: M tokens, N out_features, K in_features, R and C block rows and columns, r and c
rows and columns of a block.
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, get_num_threads

from torchao_superblock.ops import gather_gemm
from torchao_superblock.ops.forks import in_forked_child
from torchao_superblock.ops.plan import plan_fits
from torchao_superblock.ops.source_hash import source_hash

__all__ = ["backend_info", "call", "forward", "grad_values", "grad_x"]

BACKEND_VARIABLE = "TORCHAO_SUPERBLOCK_CPU_BACKEND"
ISA_VARIABLE = "TORCHAO_SUPERBLOCK_CPU_ISA"

# The order of the enums in csrc/superblock.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

_REBUILD = "rebuild it with `pip install -e .` (or `pip install .`) in the source directory"


def _load() -> tuple[ModuleType | None, dict[str, object]]:
    """The compiled kernel, or None, and what `backend_info` says about it."""
    sources = source_hash(Path(__file__).with_name("csrc"))
    pytorch = {"name": "pytorch", "source_hash": sources}
    wanted = os.environ.get(BACKEND_VARIABLE, "").lower()
    if wanted not in ("", "c", "pytorch"):
        raise ValueError(
            f"{BACKEND_VARIABLE}={wanted!r}: expected 'c' or 'pytorch', or leave it unset"
        )
    if wanted == "pytorch":
        return None, {**pytorch, "reason": f"{BACKEND_VARIABLE}=pytorch asks for it"}
    try:
        kernel = import_module("torchao_superblock.ops._cpu")
    except ImportError as error:
        return None, {
            **pytorch,
            "reason": f"the compiled kernel is not there ({error}); install a C compiler and {_REBUILD}",
        }
    built = {
        "built_from": kernel.source_hash,
        "matches_source": sources in (None, kernel.source_hash),
    }
    if not built["matches_source"]:
        return None, {
            **pytorch,
            **built,
            "reason": "the compiled kernel is stale: it was built from other sources than those in "
            f"ops/csrc; {_REBUILD}",
        }
    if in_forked_child():
        kernel.run_on_one_thread()
    isa = os.environ.get(ISA_VARIABLE, "").lower()
    if isa:
        if isa not in kernel.supported_isas():
            raise ValueError(
                f"{ISA_VARIABLE}={isa!r}: this processor has {', '.join(kernel.supported_isas())}"
            )
        kernel.select_isa(isa)
    reason = (
        "the compiled kernel is there, without its sources to compare with"
        if sources is None
        else "the compiled kernel is built from this very source"
    )
    if isa:
        reason += f"; {ISA_VARIABLE}={isa} chose the instruction set"
    return kernel, {
        "name": f"c-{kernel.isa()}",
        "reason": reason,
        "source_hash": kernel.source_hash,
        **built,
    }


_kernel, _info = _load()


def backend_info() -> dict[str, object]:
    """Say which kernel serves the CPU, and why.

    Returns:
        `name` (`c-avx512`, `c-avx2`, `c-baseline` or `pytorch`), `reason` (a sentence), `source_hash` (of the
        C sources next to this file), and for a compiled kernel `built_from`, `matches_source`, `isa`,
        `supported_isas` and `threading`.

    Example:
        >>> backend_info()["reason"]
        'the compiled kernel is built from this very source'
    """
    info = dict(_info)
    if _kernel is not None:
        info["name"] = f"c-{_kernel.isa()}"
        info["isa"] = _kernel.isa()
        info["supported_isas"] = _kernel.supported_isas()
        info["threading"] = _kernel.threading()
    return info


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor:
    """act(x @ W.T + bias) for a block-sparse W.

    Args:
        x: `(M, K)`, any strides.
        crow: int32 `(R + 1,)`, contiguous block row pointers.
        col: int32 `(nnz,)`, contiguous block columns.
        values: `(nnz, r, c)`, contiguous, the stored blocks of W `(N, K)`.
        bias: `(N,)`, contiguous, or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        plan: not needed here.

    Returns:
        `(M, N)`, contiguous, in the dtype of x; float16 and bfloat16 accumulate in float32.

    Raises:
        ValueError: if an index lies outside of the matrix.

    Example:
        >>> y = forward(x, crow, col, values, None, "gelu", None)
    """
    if _kernel is None:
        return gather_gemm.forward(x, crow, col, values, bias, activation, plan)
    M, K = x.shape
    nnz, r, c = values.shape
    R = crow.shape[0] - 1
    y = x.new_empty((M, R * r))
    _kernel.product(
        x.data_ptr(),
        *x.stride(),
        crow.data_ptr(),
        col.data_ptr(),
        0,
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        M,
        R,
        K // c,
        r,
        c,
        nnz,
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        get_num_threads(),
    )
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
    case that needs no padding, no copy and no message is recognised here with as few questions as
    will do.

    Args:
        general: the op's general implementation over this backend, with the arguments that follow.
        x: as the op has it, as have all others.
        crow: crow_indices.
        col: col_indices.
        values: values.
        bias: bias.
        out_features: out_features.
        activation: activation.
        plan: plan.

    Returns:
        The op's output.
    """
    shape, block, rows = x.shape, values.shape, crow.shape
    if _kernel is not None and len(block) == 3 and len(rows) == 1 and len(shape) >= 2:
        nnz, r, c = block
        R, K = rows[0] - 1, shape[-1]
        N = R * r
        code = _DTYPES.get(x.dtype)
        act = _ACTIVATIONS.get(activation)
        if (
            N > 0
            and c > 0
            and K % c == 0
            and code is not None
            and act is not None
            and (out_features is None or out_features == N)
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
            and (plan is None or _fits(plan, R, K // c, nnz))
        ):
            if len(shape) == 2:
                M, strides = shape[0], x.stride()
            else:
                M, strides = (x.numel() // K if K else 0), ((K, 1) if x.is_contiguous() else None)
            if M > 0 and strides is not None:
                # (sizes one by one: a tuple takes torch a microsecond longer to read)
                y = x.new_empty(M, N) if len(shape) == 2 else x.new_empty(*shape[:-1], N)
                _kernel.product(
                    x.data_ptr(),
                    *strides,
                    crow.data_ptr(),
                    col.data_ptr(),
                    0,
                    values.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    y.data_ptr(),
                    M,
                    R,
                    K // c,
                    r,
                    c,
                    nnz,
                    code,
                    act,
                    get_num_threads(),
                )
                return y
    return general(x, crow, col, values, bias, out_features, activation, plan)


def _fits(plan: Tensor, R: int, C: int, nnz: int) -> bool:
    return plan.dtype is torch.int32 and plan.is_cpu and plan_fits(plan.numel(), R, C, nnz)


def grad_x(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, plan: Tensor | None, n_block_cols: int
) -> Tensor:
    """grad @ W: the gradient with respect to x.

    Args:
        grad: `(M, N)`, any strides.
        crow: int32 `(R + 1,)`.
        col: int32 `(nnz,)`.
        values: `(nnz, r, c)`, contiguous.
        plan: not needed here: the kernel transposes the index itself, in no time beside the product.
        n_block_cols: number of block columns C.

    Returns:
        `(M, K = C * c)`, contiguous.

    Raises:
        ValueError: if an index lies outside of the matrix.

    Example:
        >>> gx = grad_x(grad, crow, col, values, None, 12)
    """
    if _kernel is None:
        return gather_gemm.grad_x(grad, crow, col, values, plan, n_block_cols)
    M = grad.shape[0]
    nnz, r, c = values.shape
    R = crow.shape[0] - 1
    out = grad.new_empty((M, n_block_cols * c))
    _kernel.product(
        grad.data_ptr(),
        *grad.stride(),
        crow.data_ptr(),
        col.data_ptr(),
        1,
        values.data_ptr(),
        0,
        out.data_ptr(),
        M,
        n_block_cols,
        R,
        c,
        r,
        nnz,
        _DTYPES[grad.dtype],
        0,
        get_num_threads(),
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
    """The stored blocks of grad.T @ x: the gradient with respect to `values`.

    Args:
        grad: `(M, N)`, any strides.
        x: `(M, K)`, any strides.
        crow: int32 `(R + 1,)`.
        col: int32 `(nnz,)`.
        plan: not needed here.
        block_rows: r.
        block_cols: c.

    Returns:
        `(nnz, r, c)`, contiguous.

    Raises:
        ValueError: if an index lies outside of the matrix.

    Example:
        >>> gv = grad_values(grad, x, crow, col, None, 64, 64)
    """
    if _kernel is None:
        return gather_gemm.grad_values(grad, x, crow, col, plan, block_rows, block_cols)
    M, K = x.shape
    nnz = col.shape[0]
    out = x.new_empty((nnz, block_rows, block_cols))
    _kernel.grad_values(
        grad.data_ptr(),
        *grad.stride(),
        x.data_ptr(),
        *x.stride(),
        crow.data_ptr(),
        col.data_ptr(),
        out.data_ptr(),
        M,
        crow.shape[0] - 1,
        K // block_cols,
        block_rows,
        block_cols,
        nnz,
        _DTYPES[x.dtype],
        get_num_threads(),
    )
    return out
