"""The operands of a cell, and our op on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.layer.cells import Cell
from benchmarks.measure.error import relative_error
from benchmarks.measure.weights import BlockSparse, random_block_sparse


@dataclass(frozen=True)
class Operands:
    """Inputs of one cell. `plan` is the layer's precomputed schedule, as BSRLinear passes it."""

    x: torch.Tensor
    weight: BlockSparse
    bias: torch.Tensor
    plan: torch.Tensor


def make_operands(cell: Cell, device: torch.device) -> Operands:
    """Random operands of one cell on `device`."""
    from torchao_superblock.ops import build_plan

    n, k = cell.shape
    generator = torch.Generator(device).manual_seed(1)
    weight = random_block_sparse(
        n, k, cell.block, cell.sparsity, dtype=cell.dtype, device=device, seed=2
    )
    x = torch.randn(cell.M, k, device=device, generator=generator).to(cell.dtype)
    bias = torch.randn(n, device=device, generator=generator).to(cell.dtype)
    blocksize = tuple(weight.values.shape[1:])
    plan = build_plan(weight.crow, weight.col, k // blocksize[1], blocksize)
    return Operands(x, weight, bias, plan)


def bsr_linear(
    operands: Operands,
    weight: BlockSparse | None = None,
    activation: str = "none",
    function: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Our op, or the function in front of it, with the arguments that BSRLinear passes."""
    weight = weight or operands.weight
    function = function or torch.ops.torchao_superblock.bsr_linear
    return function(
        operands.x,
        weight.crow,
        weight.col,
        weight.values,
        operands.bias,
        weight.dense.shape[0],
        activation,
        operands.plan,
    )


def forward_error(operands: Operands, rows: int = 128) -> float:
    """Relative error of our output on the first and last rows of x, against float64."""
    out = bsr_linear(operands)
    chosen = torch.arange(out.shape[0], device=out.device)
    chosen = torch.cat([chosen[:rows], chosen[rows:][-rows:]])
    x, dense, bias = operands.x[chosen], operands.weight.dense, operands.bias
    return relative_error(out[chosen], F.linear(x.double(), dense.double(), bias.double()))
