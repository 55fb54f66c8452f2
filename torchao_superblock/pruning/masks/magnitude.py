"""Magnitude: the blocks with the largest norms stay.

Method: gradual magnitude pruning (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878) over blocks;
weighted by gradients it ranks blocks by how much the loss would feel of their loss (a diagonal
Fisher information, Theis et al. 2018, https://arxiv.org/abs/1801.05787).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.pruning.masks.base import BlockMask, refuse_nan
from torchao_superblock.pruning.masks.settings import Check, check_count, check_flag
from torchao_superblock.pruning.ramp import Progress
from torchao_superblock.pruning.sparsifier import BlockSparsifier

_MEMORY = 0.98  # of the running mean of squared gradients, a step


class MagnitudeMask(BlockMask):
    """Parametrization that keeps the blocks of the largest norm, looked at every `update_every` steps.

    Args:
        weight: the `(N, K)` floating weight to be masked.
        blocksize: int for square blocks or `(rows, cols)`.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        gain: see :class:`BlockMask`.
        update_every: calls of `step()` between two looks at the norms.
        gradient_weighted: multiply norms by the root of a running mean of squared gradients.

    Attributes:
        scores: float32 buffer, the norms last looked at; on a ramp -1 for a block that is gone.
        mean_square: float32 buffer of the grid's shape, the running mean; None unless weighted.
    """

    SETTINGS: ClassVar[Mapping[str, Check]] = {
        "update_every": check_count,
        "gradient_weighted": check_flag,
    }

    statistic = True
    mean_square: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        gain: float = 0.0,
        update_every: int = 10,
        gradient_weighted: bool = False,
    ) -> None:
        object.__setattr__(self, "gradient_weighted", gradient_weighted)
        object.__setattr__(self, "update_every", update_every)
        super().__init__(weight, blocksize, sparsity_level, gain)

    @classmethod
    def check_weight(cls, weight: Tensor, settings: Mapping[str, Any], where: str) -> None:
        refuse_nan(weight, where)

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        super().make_scores(grid, device)
        self.register_buffer("mean_square", None)
        if self.gradient_weighted:
            self.mean_square = torch.zeros(grid, dtype=torch.float32, device=device)
            self.register_carrier()

    def reset_scores(self, weight: Tensor | None) -> None:
        if self.mean_square is not None:
            self.mean_square.zero_()
        if weight is not None and not weight.is_meta and not self.scores.is_meta:
            self.scores.copy_(self.block_norms(weight))

    def update(self, weight: Tensor, progress: Progress) -> None:
        square = progress.carried.get(self)
        if square is not None:
            self.mean_square.lerp_(square, 1 - _MEMORY)
        if progress.step % self.update_every or self.known_frozen:
            return
        gone = self.block_mask().logical_not()
        scores = self.block_norms(weight)
        if self.mean_square is not None:
            scores *= self.mean_square.sqrt()
        if progress.one_way:
            scores.masked_fill_(gone, -1)
        self.write_unless_frozen({"scores": scores})


class MagnitudeSparsifier(BlockSparsifier):
    """Prunes the blocks of the smallest norms, more and more of them, while the model trains.

    The recipe: `ramp_steps` at 40 % of the training. A block that is pruned on the ramp stays pruned.
    Needs nothing of gradients or the optimizer unless `gradient_weighted`, which has to be able to
    read them: call `step()` before `optimizer.zero_grad()` then.

    Without `ramp_steps` the masks follow the norms at the level as it is, given by hand or by a
    scheduler of `torch.ao.pruning`, and blocks may come back with the weights they had.

    Args:
        sparsity_level: fraction of blocks pruned, in `[0, 1)`; exactly
            `max(1, round(n_blocks * (1 - sparsity_level)))` blocks are kept.
        blocksize: int for square blocks or `(rows, cols)` = (out_features, in_features).
        ramp_steps: calls of `step()` over which the level rises from 0, see
            :class:`BlockSparsifier`.
        freeze_step: the call of `step()` from which on the masks stay.
        gain: exponent of what kept blocks are multiplied by, see :class:`BlockMask`; None is 0.5 on
            a ramp and 0 without one.
        update_every: calls of `step()` between two looks at the norms.
        gradient_weighted: multiply norms by the root of a running mean of squared gradients.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, a ramp that outlasts the
            freeze.
        TypeError: for arguments of the wrong type.

    Example:
        >>> sparsifier = MagnitudeSparsifier(0.9, 32, ramp_steps=4_000, freeze_step=7_000)
        >>> sparsifier.prepare(model)
    """

    mask_type = MagnitudeMask

    def __init__(
        self,
        sparsity_level: float = 0.8,
        blocksize: BlockSize = 64,
        *,
        ramp_steps: int | None = None,
        freeze_step: int | None = None,
        gain: float | None = None,
        update_every: int = 10,
        gradient_weighted: bool = False,
    ) -> None:
        super().__init__(
            sparsity_level,
            blocksize,
            ramp_steps=ramp_steps,
            freeze_step=freeze_step,
            gain=gain,
            update_every=update_every,
            gradient_weighted=gradient_weighted,
        )
