"""What the op and its gradients refuse: shape, dtype and device of every argument, on every call.

What the indices hold is not read here, which would make the host wait for a GPU: it is checked where it enters
(construction, loading), and kernels clamp or mask it.

Legend: N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.plan import plan_fits, plan_length

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_forward(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> int:
    """Check the op's arguments: all that can be checked without reading data.

    Returns:
        N.
    """
    nnz, r, c = check_blocks(values)
    if x.dim() < 1:
        raise ValueError("bsr_linear: x must have shape (..., in_features), got a 0-dim tensor")
    K = x.shape[-1]
    C = -(-K // c)
    check_index(crow_indices, col_indices, nnz, plan, C)
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
    check_devices(x, crow_indices, col_indices, values, bias, plan)
    return N


def check_grad_x(
    grad: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    in_features: int,
    plan: Tensor | None,
) -> None:
    """Check the arguments of the op's gradient with respect to x."""
    nnz, r, c = check_blocks(values)
    if in_features < 0:
        raise ValueError(f"bsr_linear backward: in_features={in_features} must not be negative")
    C = -(-in_features // c)
    check_index(crow_indices, col_indices, nnz, plan, C)
    R = crow_indices.shape[0] - 1
    _check_grad(grad, values, "values", R, r)
    check_devices(grad, crow_indices, col_indices, values, plan)


def check_grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_rows: int,
    block_cols: int,
    plan: Tensor | None,
) -> None:
    """Check the arguments of the op's gradient with respect to the stored blocks."""
    if block_rows < 1 or block_cols < 1:
        raise ValueError(
            f"bsr_linear backward: blocks must be at least 1x1, got {block_rows}x{block_cols}"
        )
    if x.dim() < 1:
        raise ValueError(
            "bsr_linear backward: x must have shape (..., in_features), got a 0-dim tensor"
        )
    C = -(-x.shape[-1] // block_cols)
    check_index(crow_indices, col_indices, col_indices.numel(), plan, C)
    R = crow_indices.shape[0] - 1
    _check_grad(grad, x, "x", R, block_rows)
    check_devices(grad, x, crow_indices, col_indices, plan)
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"bsr_linear backward: grad {tuple(grad.shape)} and x {tuple(x.shape)} differ in their leading dimensions"
        )


def check_backward(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    z: Tensor | None,
    plan: Tensor | None,
) -> None:
    """Check the arguments of all gradients at once."""
    if grad.dim() < 1:
        raise ValueError(
            "bsr_linear backward: grad must have shape (..., out_features), got a 0-dim tensor"
        )
    N = grad.shape[-1]
    check_forward(x, crow_indices, col_indices, values, bias, N, activation, plan)
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"bsr_linear backward: grad {tuple(grad.shape)} and x {tuple(x.shape)} differ in their leading dimensions"
        )
    if z is not None and z.shape != grad.shape:
        raise ValueError(
            f"bsr_linear backward: grad {tuple(grad.shape)} and z {tuple(z.shape)} differ in shape"
        )
    for name, tensor in (("grad", grad), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"bsr_linear backward: {name} is {tensor.dtype} but x is {x.dtype}")
    check_devices(x, grad, z)


def check_index(
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


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    device = x.device
    for other in others:
        if other is not None and other.device != device:
            raise RuntimeError(
                f"bsr_linear: all tensors must be on one device, got {device} and {other.device}; "
                "move the model and its input with .to(device)"
            )


def check_blocks(values: Tensor) -> tuple[int, int, int]:
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
