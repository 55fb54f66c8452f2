"""BSR products in plain PyTorch: gather the blocks a product needs, then one batched GEMM.

This path serves wherever a compiled kernel does not: no compiler, a stale build, a platform nobody
tried. Its speed is limited by the copies the gather makes, so block rows with the same number of
stored blocks share one `torch.bmm` (no padding, few calls) and the copies are kept small enough to
stay in a core's cache. It runs on any device, but reads the indices back to check them.

The four functions are those of :class:`torchao_superblock.ops.backends.BackendModule`; an index that lies outside of
the matrix raises a ValueError in each.

Dimension letters: M tokens, N out_features, K in_features, R and C block rows and columns, r and c
rows and columns of a block, B block rows in one batch, n stored blocks in each of them. A name that ends in CcM or RrM
is of whole blocks: what a matrix lacks is zero there.
"""

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.plan import build_plan, split_plan

# Elements gathered for one bmm. Larger batches save calls, smaller ones keep the copy in the cache.
_MAX_GATHER = 1 << 20
# Rows of x up to which blocks are multiplied one by one, where they lie.
_FEW_ROWS = 128


def backend_info() -> dict[str, object]:
    """Describe this path for :func:`torchao_superblock.backends`.

    Returns:
        `name` and `reason`.

    Example:
        >>> backend_info()["name"]
        'pytorch'
    """
    return {"name": "pytorch", "reason": "plain PyTorch: gather and batched GEMM, any device"}


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_indices(crow: Tensor, col: Tensor, n_block_cols: int) -> None:
    """Refuse index contents that would reach outside of the tensors.

    Args:
        crow: block row pointers, integer, `(R + 1,)`.
        col: block column of each stored block, integer, `(nnz,)`.
        n_block_cols: number of block columns C.

    Raises:
        ValueError: if the pointers do not rise from 0 to nnz or a column lies outside of `[0, C)`.
    """
    nnz = col.numel()
    if int(crow[0]) != 0 or int(crow[-1]) != nnz or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(
            f"crow_indices must start at 0, never decrease and end at nnz = {nnz}; "
            f"got {crow[:3].tolist()} ... {crow[-3:].tolist()}"
        )
    if nnz:
        low, high = (int(v) for v in torch.aminmax(col))
        if low < 0 or high >= n_block_cols:
            raise ValueError(
                f"col_indices must lie in [0, {n_block_cols}) for {n_block_cols} block "
                f"columns; got {low if low < 0 else high}"
            )


def _in_blocks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`(M, K)` -> `(C, c, M)`: a copy, in which a block of features is one contiguous slab."""
    M, K = x.shape
    C = -(-K // size)
    if K == C * size:
        return x.t().to(dtype).contiguous().view(C, size, M)
    blocks = torch.empty(C * size, M, dtype=dtype, device=x.device)
    blocks[:K] = x.t()
    blocks[K:] = 0
    return blocks.view(C, size, M)


def _product(x: Tensor, crow: Tensor, col: Tensor, blocks: Tensor, perm: Tensor | None) -> Tensor:
    """The product of x `(M, K)` and the transpose of a BSR matrix with int64 indices, as `(R * r, M)`.

    `blocks` is `(nnz, r, c)`; with `perm`, stored block j of row i is `blocks[perm[j]]`.
    """
    M = x.shape[0]
    R = crow.numel() - 1
    _, r, c = blocks.shape
    dtype = _accumulation_dtype(x.dtype)
    x_CcM = _in_blocks(x, c, dtype)  # so that the gather below is a few long copies
    y_RrM = x_CcM.new_zeros(R, r, M)
    counts = crow.diff()
    if M <= _FEW_ROWS:
        # Copying the weights would take longer than using them: one small product for each block.
        w_Jrc = (blocks if perm is None else blocks.index_select(0, perm)).to(dtype)
        row_J = torch.repeat_interleave(counts, output_size=col.numel())
        y_RrM.index_add_(0, row_J, torch.bmm(w_Jrc, x_CcM.index_select(0, col)))
        return y_RrM.view(R * r, M)
    for n in torch.unique(counts).tolist():
        if n == 0:
            continue
        rows = (counts == n).nonzero().squeeze(1)
        for rows_B in rows.split(max(1, _MAX_GATHER // (n * c * (M + r)))):
            stored_Bn = (crow[rows_B, None] + torch.arange(n, device=x.device)).flatten()
            x_BkM = x_CcM.index_select(0, col[stored_Bn]).view(-1, n * c, M)
            w = blocks.index_select(0, stored_Bn if perm is None else perm[stored_Bn])
            w_Brk = w.to(dtype).view(-1, n, r, c).transpose(1, 2).reshape(-1, r, n * c)
            y_RrM.index_copy_(0, rows_B, torch.bmm(w_Brk, x_BkM))
    return y_RrM.view(R * r, M)


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
    crow, col = crow.long(), col.long()  # copies: what is checked is what is used
    check_indices(crow, col, -(-x.shape[1] // values.shape[2]))
    y = _product(x, crow, col, values, None)[:out_features].t().contiguous()
    if bias is not None:
        y += bias
    return ACTIVATIONS[activation](y).to(x.dtype)


def grad_x(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, plan: Tensor | None, in_features: int
) -> Tensor:
    """`grad @ W`; the index is transposed anew, so that it cannot be of another one, as a plan can."""
    crow, col, n_block_cols = crow.clone(), col.clone(), -(-in_features // values.shape[2])
    check_indices(crow, col, n_block_cols)
    plan = build_plan(crow, col, n_block_cols)
    p = split_plan(plan, crow.numel() - 1, n_block_cols, col.numel())
    blocks = values.transpose(1, 2)
    return (
        _product(grad, p.crow_t.long(), p.row_t.long(), blocks, p.perm_t.long())[:in_features]
        .t()
        .to(grad.dtype)
        .contiguous()
    )


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
    M, K = x.shape
    nnz, r, c = col.numel(), block_rows, block_cols
    crow, col = crow.long(), col.long()
    check_indices(crow, col, -(-K // c))
    row = torch.repeat_interleave(crow.diff(), output_size=nnz)
    dtype = _accumulation_dtype(x.dtype)
    grad_RrM, x_CcM = _in_blocks(grad, r, dtype), _in_blocks(x, c, dtype)
    out = x.new_empty(nnz, r, c)
    step = max(1, _MAX_GATHER // ((r + c) * M))
    for j in range(0, nnz, step):
        g_jrM = grad_RrM.index_select(0, row[j : j + step])
        x_jcM = x_CcM.index_select(0, col[j : j + step])
        out[j : j + step] = torch.bmm(g_jrM, x_jcM.transpose(1, 2))
    return out
