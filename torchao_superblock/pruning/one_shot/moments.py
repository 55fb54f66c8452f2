"""What least squares needs to know of a layer's inputs: their means and second moments.

Dimensions: T tokens, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Moments of the inputs of a layer in the pruned and in the dense model, per token.

    Attributes:
        count: number of tokens.
        pruned_mean, dense_mean: `(K,)`; zero where the layer has no bias that could take them up.
        pruned: `(K, K)`, mean of x_pruned x_pruned^T, around the mean.
        cross: `(K, K)`, mean of x_dense x_pruned^T, around the means.
        dense: `(K, K)`, mean of x_dense x_dense^T, around the mean.
    """

    count: int
    pruned_mean: Tensor
    dense_mean: Tensor
    pruned: Tensor
    cross: Tensor
    dense: Tensor


class Moments:
    """Sums over batches.

    Taken around the mean of the first batch: features of a trained network may have means far
    larger than their spread, and the difference of two large sums would lose it.

    Args:
        dtype: of the sums.

    Attributes:
        paired: whether the tokens of both streams have corresponded in every batch. They do not
            where a router sends other tokens to a layer once the model is pruned.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.count = 0
        self.paired = True

    def add(self, pruned: Tensor, dense: Tensor) -> None:
        """Adds the inputs of one call, `(T, K)` each; of other numbers of tokens if not paired."""
        if pruned.shape != dense.shape:
            self.paired = False
        if not self.paired:
            dense = pruned
        pruned, dense = pruned.to(self.dtype), dense.to(self.dtype)
        if len(pruned) == 0:
            return
        if self.count == 0:
            features = pruned.shape[1]
            self._pruned_shift, self._dense_shift = pruned.mean(0), dense.mean(0)
            self._pruned_sum, self._dense_sum = pruned.new_zeros(2, features)
            self._pruned, self._cross, self._dense = pruned.new_zeros(3, features, features)
        pruned = pruned - self._pruned_shift
        dense = dense - self._dense_shift
        self.count += len(pruned)
        self._pruned_sum += pruned.sum(0)
        self._dense_sum += dense.sum(0)
        self._pruned.addmm_(pruned.T, pruned)
        self._cross.addmm_(dense.T, pruned)
        self._dense.addmm_(dense.T, dense)

    def statistics(self, centered: bool) -> Statistics:
        """The moments per token.

        Args:
            centered: around the means; a layer without bias needs them around zero.
        """
        pruned_mean = self._pruned_sum / self.count  # around the shift
        dense_mean = self._dense_sum / self.count
        pruned = self._pruned / self.count - pruned_mean.outer(pruned_mean)
        cross = self._cross / self.count - dense_mean.outer(pruned_mean)
        dense = self._dense / self.count - dense_mean.outer(dense_mean)
        pruned_mean = pruned_mean + self._pruned_shift
        dense_mean = dense_mean + self._dense_shift
        if not self.paired:
            dense_mean, cross, dense = pruned_mean, pruned, pruned
        if not centered:
            pruned = pruned + pruned_mean.outer(pruned_mean)
            cross = cross + dense_mean.outer(pruned_mean)
            dense = dense + dense_mean.outer(dense_mean)
            pruned_mean = dense_mean = torch.zeros_like(pruned_mean)
        return Statistics(self.count, pruned_mean, dense_mean, pruned, cross, dense)
