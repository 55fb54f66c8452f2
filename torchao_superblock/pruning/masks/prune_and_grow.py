"""Prune and grow: now and then the smallest blocks make room for those whose gradients are largest.

Method: RigL (Evci et al. 2020, https://arxiv.org/abs/1911.11134) over blocks, as in BLaST
(https://arxiv.org/abs/2507.03117). The cost of a step is that of the level from the first one on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.ops.block_mask import BROKEN
from torchao_superblock.pruning.masks.base import BlockMask, scale_local_blocks_
from torchao_superblock.pruning.masks.settings import Check, check_count, check_fraction
from torchao_superblock.pruning.ramp import Progress
from torchao_superblock.pruning.sparsifier import BlockSparsifier

_LISTENING = 10  # steps before an update whose gradients count


class PruneAndGrowMask(BlockMask):
    """Parametrization whose mask is moved block by block, from random blocks on.

    Args:
        weight: the `(N, K)` floating weight to be masked.
        blocksize: int for square blocks or `(rows, cols)`.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        gain: see :class:`BlockMask`.
        update_every: calls of `step()` between two updates.
        drop_fraction: of the kept blocks, how many the first update may replace; falls to 0 along a
            cosine until the freeze.

    Attributes:
        scores: float32 buffer: 1 and more for a kept block (the larger its norm the more), below 1
            for one that is not.
        gradient_norms: float32 buffer, squared norms of the blocks of the dense gradient, summed
            since listening began.
        listening: int8 0-dim buffer; while 1, gradients of pruned blocks are looked at.
    """

    SETTINGS: ClassVar[Mapping[str, Check]] = {
        "update_every": check_count,
        "drop_fraction": check_fraction,
    }

    statistic = True
    gradient_norms: Tensor
    listening: Tensor

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        gain: float = 0.0,
        update_every: int = 100,
        drop_fraction: float = 0.1,
    ) -> None:
        object.__setattr__(self, "update_every", update_every)
        object.__setattr__(self, "drop_fraction", drop_fraction)
        super().__init__(weight, blocksize, sparsity_level, gain)

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        super().make_scores(grid, device)
        self.register_buffer("gradient_norms", torch.zeros(grid, device=device))
        self.register_buffer("listening", torch.zeros((), dtype=torch.int8, device=device))
        self.register_carrier()

    def reset_scores(self, weight: Tensor | None) -> None:
        """Draws the blocks to begin with, evenly: no row and no column is left without if it can be helped."""
        self.gradient_norms.zero_()
        self.listening.zero_()
        if not self.scores.is_meta:
            self.scores.copy_(evenly_spread(self.scores))

    def _factors_and_live(self) -> tuple[Tensor, Tensor]:
        factors, live = super()._factors_and_live()
        deaf = self.listening.logical_not() & (live != BROKEN)
        return factors, live.masked_fill(deaf, 0)

    def update(self, weight: Tensor, progress: Progress) -> None:
        norms = progress.carried.get(self)
        if norms is not None:
            self.gradient_norms.add_(norms)
        due = progress.step % self.update_every == 0
        if due and not self.is_frozen:
            self._prune_and_grow(weight, progress)
        if due:
            self.gradient_norms.zero_()
        to_go = -progress.step % self.update_every
        self.listening.fill_(to_go <= min(_LISTENING, self.update_every))

    def _prune_and_grow(self, weight: Tensor, progress: Progress) -> None:
        mask = self.block_mask()
        end = progress.ramp.freeze_step
        share = self.drop_fraction / 2 * (1 + math.cos(math.pi * min(1.0, progress.step / end)))
        n_blocks, n_kept = mask.numel(), int(self.n_kept)
        n_moved = min(round(share * n_kept), n_blocks - n_kept, n_kept - 1)
        norms = self.block_norms(weight)
        ranks = norms / norms.amax().clamp_min(torch.finfo(norms.dtype).tiny)
        if n_moved > 0 and bool(self.gradient_norms.any()):
            dropped = _largest(ranks.masked_fill(~mask, -torch.inf).neg(), n_moved, among=mask)
            grown = _largest(self.gradient_norms, n_moved, among=~mask)
            mask = (mask & ~dropped) | grown
            scale_local_blocks_(weight, ~grown, self.blocksize)
        self.scores.copy_(torch.where(mask, 1 + ranks, torch.zeros_like(ranks)))


class RigLSparsifier(BlockSparsifier):
    """Trains at the level from the first step on, and moves blocks to where gradients ask for them.

    Every `update_every` steps the kept blocks of the smallest norm make room for those pruned ones
    whose gradient has been largest over the last few steps; these start at zero. How many move falls
    to none at `freeze_step`. Call `step()` before `optimizer.zero_grad()`: it reads gradients.

    The kept blocks of a fresh layer are scaled up by `gain`, so that its outputs keep their size
    although most of its inputs are gone. For a model that is trained already, use another sparsifier.

    Args:
        sparsity_level: fraction of blocks pruned, in `[0, 1)`; exactly
            `max(1, round(n_blocks * (1 - sparsity_level)))` blocks are kept.
        blocksize: int for square blocks or `(rows, cols)` = (out_features, in_features).
        freeze_step: the call of `step()` from which on the masks stay; required. The recipe: 75 % of
            the training.
        ramp_steps: calls of `step()` over which the level rises from 0, see
            :class:`BlockSparsifier`; None is the method as published.
        gain: exponent of what kept blocks are multiplied by, see :class:`BlockMask`.
        update_every: calls of `step()` between two updates.
        drop_fraction: of the kept blocks, how many the first update may replace.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, no `freeze_step` or one
            before the end of the ramp.
        TypeError: for arguments of the wrong type.

    Example:
        >>> sparsifier = RigLSparsifier(0.9, 32, freeze_step=7_500)
        >>> sparsifier.prepare(model)
    """

    mask_type = PruneAndGrowMask

    def __init__(
        self,
        sparsity_level: float = 0.8,
        blocksize: BlockSize = 64,
        *,
        freeze_step: int | None = None,
        ramp_steps: int | None = None,
        gain: float = 0.5,
        update_every: int = 100,
        drop_fraction: float = 0.1,
    ) -> None:
        self.require_freeze_step(freeze_step, "moves blocks until then, fewer and fewer")
        super().__init__(
            sparsity_level,
            blocksize,
            ramp_steps=ramp_steps,
            freeze_step=freeze_step,
            gain=gain,
            update_every=update_every,
            drop_fraction=drop_fraction,
        )


def evenly_spread(like: Tensor) -> Tensor:
    """Random scores over a grid whose best `k`, for every k, lie evenly over its rows and columns.

    Args:
        like: of the grid's shape.

    Returns:
        `(R, C)` of the same dtype on the same device, a permutation of `1/n .. 1`.
    """
    R, C = like.shape
    n = R * C
    # Along wrapped diagonals each block of a row and of a column comes up as often as any other;
    # after lcm(R, C) blocks one is full and the next begins a column further.
    i = torch.arange(n, device="cpu")
    rows, cols = i % R, (i + i // math.lcm(R, C)) % C
    order = torch.empty(R, C, dtype=torch.int64, device="cpu")
    order[torch.randperm(R, device="cpu")[rows], torch.randperm(C, device="cpu")[cols]] = i
    return (1 - order / n).to(like)


def _largest(values: Tensor, count: int, among: Tensor) -> Tensor:
    """Bool like `values`: the `count` largest where `among` is True."""
    picked = values.masked_fill(~among, -torch.inf).flatten().topk(count).indices
    found = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    return found.scatter_(0, picked, True).view(values.shape)
