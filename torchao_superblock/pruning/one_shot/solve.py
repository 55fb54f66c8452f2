"""Which blocks to keep, and what their weights should be: second-order pruning with repair.

With H the second moment of the inputs of the pruned model and C that between the inputs of the
dense and the pruned one, the weights V of a layer are to minimise

    mean ||W x_dense - V x_pruned||^2 + lambda ||V - W||^2  =  tr((V - V*) (H + lambda I) (V - V*)^T) + const
    V* = (W C + lambda W) (H + lambda I)^-1

over those V that are zero in the pruned blocks. Removing block b costs tr(V*_b [H^-1]_bb^-1 V*_b^T)
(optimal brain surgeon, Hassibi and Stork 1993, for a block of columns at once); the kept weights of
each row of blocks are then the solution of a linear system of their own. Where both streams are the
same, V* is W.

Dimensions: N out_features, K in_features; R, C rows and columns of the block grid.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchao_superblock.ops.block_mask import block_grid, regions
from torchao_superblock.pruning.one_shot.moments import Statistics


class Problem:
    """The least-squares problem of all rows that see the same inputs.

    Args:
        statistics: of the inputs.
        damping: lambda as a fraction of the mean of H's diagonal.

    Attributes:
        hessian: H + lambda I.
    """

    def __init__(self, statistics: Statistics, damping: float) -> None:
        self.statistics = statistics
        scale = statistics.pruned.diagonal().mean()
        # Inputs that never vary say nothing about weights: any pull keeps them where they are.
        self._pull = damping * torch.where(scale > 0, scale, torch.ones_like(scale))
        self.hessian = statistics.pruned.clone()
        self.hessian.diagonal().add_(self._pull)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """`(K, K)`, of the damped second moment.

        Raises:
            ArithmeticError: if it is not positive definite.
        """
        return torch.cholesky_inverse(_cholesky(self.hessian)).to(self.hessian.dtype)

    def right_side(self, weight: Tensor) -> Tensor:
        """W C + lambda W for rows W of a weight, `(N, K)`."""
        return weight @ self.statistics.cross + self._pull * weight

    def error(self, dense: Tensor, weight: Tensor) -> tuple[float, float]:
        """Mean square of what is lost of the dense outputs, bias included, and of these outputs."""
        s = self.statistics
        power = ((dense @ s.dense) * dense).sum()
        both = ((dense @ s.cross) * weight).sum()
        return (power - 2 * both + ((weight @ s.pruned) * weight).sum()).item(), power.item()


def block_costs(weight: Tensor, inverse: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """What removing each block alone costs once the others make up for it: `(N, C)`, row by row.

    Args:
        weight: `(N, K)`.
        inverse: `(K, K)`, of the damped second moment.
        blocksize: `(rows, cols)`.
    """
    costs = []
    # Over one row of blocks as high as the weight, so that only columns are cut.
    for _, cols, _, _, (_, c) in regions(weight.shape, (weight.shape[0], blocksize[1])):
        part = inverse[cols, cols]
        diagonal = part.unflatten(1, (-1, c)).unflatten(0, (-1, c)).diagonal(dim1=0, dim2=2)
        diagonal = diagonal.permute(2, 0, 1)  # (C, c, c)
        blocks = weight[:, cols].unflatten(1, (-1, c)).transpose(0, 1)  # (C, N, c)
        costs.append((torch.linalg.solve(diagonal, blocks, left=False) * blocks).sum(-1).T)
    return torch.cat(costs, dim=1)


def choose_blocks(costs: Tensor, rows: int, n_kept: int) -> Tensor:
    """Keeps the most costly blocks; of equal ones the first.

    Args:
        costs: `(N, C)` from :func:`block_costs`.
        rows: of a block.
        n_kept: how many to keep.

    Returns:
        The bool mask `(R, C)`, True = kept.
    """
    n, columns = costs.shape
    grid = costs.new_zeros(block_grid((n, columns), (rows, 1)))
    grid.index_add_(0, torch.arange(n, device=costs.device) // rows, costs)
    order = grid.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(grid.numel(), dtype=torch.bool, device=costs.device)
    mask[order[:n_kept]] = True
    return mask.view(grid.shape)


def repair(
    problem: Problem, weight: Tensor, mask: Tensor, first_row: int, blocksize: tuple[int, int]
) -> Tensor:
    """The best weights that are zero in the pruned blocks, `(N, K)`.

    Args:
        problem: of these rows.
        weight: `(N, K)`, the dense rows.
        mask: bool `(R, C)`, of the whole weight.
        first_row: the row of the whole weight that the first of these rows is.
        blocksize: `(rows, cols)`.
    """
    rows, cols = blocksize
    n, k = weight.shape
    right = problem.right_side(weight)
    solution = torch.zeros_like(weight)
    kept_columns = mask.repeat_interleave(cols, 1)[:, :k]
    for block_row in range(first_row // rows, -(-(first_row + n) // rows)):
        begin = max(block_row * rows - first_row, 0)
        end = min((block_row + 1) * rows - first_row, n)
        kept = kept_columns[block_row].nonzero().squeeze(1)
        if len(kept):
            system = problem.hessian[kept[:, None], kept]
            solution[begin:end, kept] = _solve(system, right[begin:end, kept])
    return solution


def _solve(hessian: Tensor, right: Tensor) -> Tensor:
    """`right @ hessian^-1` for a positive definite matrix."""
    factor = _cholesky(hessian)
    return torch.cholesky_solve(right.T.to(factor.dtype), factor).T.to(right.dtype)


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed and matrix.device.type != "mps":
        factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if failed:
        raise ArithmeticError(
            "the second moments of its inputs are singular; a larger damping helps"
        )
    return factor
