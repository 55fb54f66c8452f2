"""The weight of one layer, in the arguments that an op of several weights takes."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The weight of one of the two layers, as :func:`torchao_superblock.ops.bsr_linear` takes it, in whole blocks.

    Attributes:
        crow_indices: `(N / r + 1,)` int32.
        col_indices: `(nnz,)` int32.
        values: `(nnz, r, c)`.
        bias: `(N,)` or None.
        plan: from :func:`torchao_superblock.ops.build_plan`, or None.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None = None
    plan: Tensor | None = None
