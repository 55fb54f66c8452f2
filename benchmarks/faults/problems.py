"""Random block-sparse products and their float64 references.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchao_superblock.ops import build_plan

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}
# Relative errors of norms that rounding explains, where sums are kept in at least float32. An activation that runs in
# the dtype itself, in training, rounds its input once more.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


@dataclass
class Problem:
    """Arguments of the op, with a valid index."""

    x: Tensor
    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None
    out_features: int | None
    activation: str
    plan: Tensor | None

    @property
    def n_block_cols(self) -> int:
        return -(-self.x.shape[-1] // self.values.shape[2])

    def arguments(self) -> list[object]:
        """In the op's order."""
        operands = [self.x, self.crow, self.col, self.values, self.bias]
        return [*operands, self.out_features, self.activation, self.plan]


def random_problem(source: random.Random, *, largest: int = 6) -> Problem:
    """A valid problem: ragged or not, any strides, any leading dimensions, possibly empty.

    Args:
        source: of all choices; the numbers come from torch's generator.
        largest: block rows and columns at most.
    """
    dtype = source.choice(
        [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
    )
    r, c = (source.choice([1, 2, 3, 4, 5, 7, 8, 8, 16, 16, 17, 32]) for _ in "rc")
    R, C = source.randint(1, largest), source.randint(1, largest)
    kept = torch.rand(R, C) < source.choice([0.0, 0.2, 0.5, 0.5, 1.0])
    crow = torch.zeros(R + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    col = kept.nonzero()[:, 1].to(torch.int32)
    N, K = R * r, C * c
    if source.random() < 0.25:
        N -= source.randrange(r)
    if source.random() < 0.25:
        K -= source.randrange(c)
    lead = source.choice(
        [(), (1,), (2,), (3,), (13,), (29,), (64,), (2, 3), (2, 1, 5), (0,), (2, 0)]
    )
    x = strided(torch.randn(*lead, K).to(dtype), source)
    values = (torch.randn(len(col), r, c) / max(1, K) ** 0.5).to(dtype)
    bias = torch.randn(N).to(dtype) if source.random() < 0.6 else None
    plan = build_plan(crow, col, C) if source.random() < 0.5 else None
    explicit = N != R * r or source.random() < 0.3
    activation = source.choice(list(ACTIVATIONS))
    return Problem(x, crow, col, values, bias, N if explicit else None, activation, plan)


def strided(tensor: Tensor, source: random.Random) -> Tensor:
    """The same numbers in another layout, now and then."""
    style = source.choice(["as it is", "as it is", "transposed", "sliced", "offset"])
    if style == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if style == "sliced" and tensor.dim() >= 1:
        wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        view = wide[..., 1::2]
        view.copy_(tensor)
        return view
    if style == "offset":
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.copy_(tensor.reshape(-1)).view(tensor.shape)
    return tensor


def dense(problem: Problem, values: Tensor | None = None) -> Tensor:
    """The `(N, K)` weight in float64, differentiable in `values`."""
    values = problem.values.double() if values is None else values
    _, r, c = problem.values.shape
    R, C = problem.crow.shape[0] - 1, problem.n_block_cols
    row = torch.repeat_interleave(torch.arange(R), problem.crow.long().diff())
    blocks = torch.zeros(R, C, r, c, dtype=torch.float64)
    blocks = blocks.index_put((row, problem.col.long()), values)
    weight = blocks.transpose(1, 2).reshape(R * r, C * c)
    N = R * r if problem.out_features is None else problem.out_features
    return weight[:N, : problem.x.shape[-1]]


def reference(problem: Problem, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """The op's output from float64 operands, by dense products."""
    return ACTIVATIONS[problem.activation](F.linear(x, dense(problem, values), bias))


def doubled(tensor: Tensor | None) -> Tensor | None:
    """A float64 leaf with the same numbers."""
    return None if tensor is None else tensor.detach().double().requires_grad_()


def error_of(out: Tensor, expected: Tensor) -> float:
    """`||out - expected|| / (1 + ||expected||)` in float64; NaN if either has one."""
    out, expected = out.detach().double(), expected.detach().double()
    if out.shape != expected.shape:
        return float("nan")
    return float((out - expected).norm() / (1 + expected.norm()))
