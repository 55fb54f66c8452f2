"""Random block-sparse weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockSparse:
    """A random block-sparse weight in both forms.

    Attributes:
        dense: `(N, K)` with zero blocks.
        crow: int32 `(R + 1,)`.
        col: int32 `(nnz,)`, sorted within a block row.
        values: `(nnz, r, c)`.
    """

    dense: torch.Tensor
    crow: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor

    @property
    def stored(self) -> int:
        """Elements in the stored blocks."""
        return self.values.numel()


def random_block_sparse(
    out_features: int,
    in_features: int,
    blocksize: int | tuple[int, int],
    sparsity: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> BlockSparse:
    """A weight with `max(1, round(n_blocks * (1 - sparsity)))` randomly placed blocks.

    Args:
        out_features: N, a multiple of the block's rows.
        in_features: K, a multiple of the block's columns.
        blocksize: int for square blocks or `(rows, cols)`.
        sparsity: fraction of blocks that are zero.
        dtype: of the weight; scaled by `K ** -0.5` as a layer's weight is.
        device: where it lives; the mask itself does not depend on it.
        seed: of the mask and the values.
    """
    rows, cols = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    if out_features % rows or in_features % cols:
        raise ValueError(f"{out_features} x {in_features} is no multiple of {rows} x {cols}")
    grid = (out_features // rows, in_features // cols)
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, round(grid[0] * grid[1] * (1 - sparsity)))
    chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:kept].sort().values
    row_of, col_of = chosen // grid[1], chosen % grid[1]
    crow = torch.zeros(grid[0] + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(row_of, minlength=grid[0]).cumsum(0)
    values = torch.randn(kept, rows, cols, generator=generator) * in_features**-0.5
    values = values.to(device=device, dtype=dtype)
    blocks = torch.zeros(grid[0], grid[1], rows, cols, dtype=dtype, device=device)
    blocks[row_of.to(device), col_of.to(device)] = values
    dense = blocks.transpose(1, 2).reshape(out_features, in_features).contiguous()
    crow, col = crow.to(device, torch.int32), col_of.to(device, torch.int32)
    return BlockSparse(dense, crow, col, values)


def gather_blocks(dense: torch.Tensor, weight: BlockSparse) -> torch.Tensor:
    """The stored blocks of a dense (N, K) tensor, (nnz, r, c)."""
    _, r, c = weight.values.shape
    n, k = dense.shape
    blocks = dense.reshape(n // r, r, k // c, c).transpose(1, 2)
    counts = weight.crow.diff().long()
    rows = torch.repeat_interleave(torch.arange(n // r, device=dense.device), counts)
    return blocks[rows, weight.col.long()]
