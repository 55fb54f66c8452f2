"""Masks that are given, not found: from a config, or read off the zeros of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.pruning.masks.base import BlockMask


class GivenMask(BlockMask):
    """Parametrization by a block mask that never changes.

    Args:
        weight: the `(N, K)` floating weight to be masked.
        blocksize: int for square blocks or `(rows, cols)`.
        mask: bool `(R, C)`, True = kept, of which there is at least one.
    """

    update_reads_weight = False

    def __init__(self, weight: Tensor, blocksize: BlockSize, mask: Tensor) -> None:
        object.__setattr__(self, "_mask", mask.detach().clone())
        super().__init__(weight, blocksize, 1 - int(mask.sum()) / mask.numel())

    def reset_scores(self, weight: Tensor | None) -> None:
        self.scores.zero_()
        self.hold(self._mask)

    @torch.no_grad()
    def freeze(self, weight: Tensor | None = None) -> None:
        """Does nothing: the mask is held already."""

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Does nothing: there is nothing that the mask could follow."""

    def aim_at(self, sparsity_level: float) -> int:
        """Stays where it is: the mask says how many blocks are kept."""
        return self._target_n_kept
