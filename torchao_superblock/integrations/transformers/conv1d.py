"""`BSRConv1D`: the linear layer of GPT-2, whose weight lies transposed, in BSR format."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchao_superblock.bsr import BSRLinear
from torchao_superblock.common.swappable import register_twin


class BSRConv1D(BSRLinear):
    """A `transformers` `Conv1D`, `y = x @ weight + bias` with `weight` `(in, out)`, in blocks.

    What is stored, here and in files, are the blocks of the transposed weight, as a :class:`BSRLinear` stores them:
    `blocksize` is `(rows, cols)` = (out, in), the other way round than for a mask on the `Conv1D`.
    :func:`swap_to_dense` gives the `Conv1D` back. All else is as in :class:`BSRLinear`.

    Attributes:
        nf: out features.
        nx: in features.
    """

    DENSE = "transformers Conv1D"

    @staticmethod
    def features_of(module: nn.Module) -> tuple[int, int]:
        return module.nf, module.nx

    @staticmethod
    def matrix_of(weight: Tensor) -> Tensor:
        return weight.t()

    @staticmethod
    def weight_of(matrix: Tensor) -> Tensor:
        return matrix.t()

    def dense_module(self, matrix: Tensor, bias: nn.Parameter | None) -> nn.Module:
        with torch.device("meta"):
            conv = Conv1D(*matrix.shape)
        weight = self.weight_of(matrix).contiguous()
        conv.weight = nn.Parameter(weight, self.values.requires_grad)
        conv.bias = bias
        return conv.train(self.training)

    @property
    def nf(self) -> int:
        return self.out_features

    @property
    def nx(self) -> int:
        return self.in_features

    def to_dense(self) -> Tensor:
        """The dense `(in_features, out_features)` weight; differentiable in `values`."""
        return self.weight_of(super().to_dense())


register_twin(Conv1D, BSRConv1D, "weight")
