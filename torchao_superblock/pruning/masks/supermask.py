"""Learned scores: the optimizer trains them straight through the hard choice of blocks.

Method: supermasks (Ramanujan et al. 2020, https://arxiv.org/abs/1911.13299) over blocks, as in
https://arxiv.org/abs/2207.00670: one trainable score for each block of a weight, the best `n_kept`
blocks stay, and the gradient passes straight through the hard decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.pruning.masks.base import BlockMask, Check
from torchao_superblock.pruning.sparsifier import BlockSparsifier

SCORES_INITS = ("kaiming_uniform", "weight_norm")


def check_scores_init(value: object, where: str = "") -> str:
    """Returns the name of the init, or raises with `where` in front."""
    if value not in SCORES_INITS:
        raise ValueError(
            f"{where}scores_init={value!r} is unknown; use 'kaiming_uniform' to train from scratch "
            "or 'weight_norm' to fine-tune"
        )
    return str(value)


class Supermask(BlockMask):
    """Parametrization of a 2-D weight that keeps its `n_kept` blocks with the highest scores.

    The mask is computed in every forward from the module's own tensors and nothing else: a
    `state_dict` reproduces the output, a copy is independent, and a changed `n_kept` recompiles
    nothing. The number of kept blocks is exact; of equal scores the one that comes first in
    row-major order wins.

    `scores` stay float32 under `.half()`, `.to(torch.bfloat16)` and FSDP2's mixed precision: in
    bfloat16 a few hundred blocks share a dozen values, and a step of a usual size changes none.

    Args:
        weight: the `(N, K)` floating weight to be masked; only its shape, device and, for
            `"weight_norm"`, its values are used.
        blocksize: int for square blocks or `(rows, cols)`. Where N or K is no multiple, the last
            row or column of blocks is smaller.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        scores_init: `"kaiming_uniform"` (random, to train from scratch) or `"weight_norm"` (the norm
            of each block, to fine-tune).

    Attributes:
        scores: float32 Parameter `(ceil(N / rows), ceil(K / cols))`.
        n_kept: int64 0-dim buffer, the number of blocks to keep.
        frozen: int8 0-dim buffer; while 1, `held_mask` is the mask and the gradient of the scores
            is zero.
        held_mask: int8 buffer of the grid's shape, 1 = kept.
        blocksize: `(rows, cols)`.

    Raises:
        ValueError: for a bad shape, block size, level or init.
        TypeError: for arguments of the wrong type.

    Example:
        >>> linear = nn.Linear(768, 3072)
        >>> mask = Supermask(linear.weight, blocksize=64, sparsity_level=0.9)
        >>> mask(linear.weight).shape
        torch.Size([3072, 768])
    """

    SETTINGS: ClassVar[Mapping[str, Check]] = {"scores_init": check_scores_init}

    _sharded_scores: Tensor | None = None

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        scores_init: str = "kaiming_uniform",
    ) -> None:
        # Before nn.Module's own constructor: the first scores depend on it.
        object.__setattr__(self, "scores_init", check_scores_init(scores_init))
        super().__init__(weight, blocksize, sparsity_level)

    @classmethod
    def check_weight(cls, weight: Tensor, settings: Mapping[str, Any], where: str) -> None:
        if settings["scores_init"] == "weight_norm" and not weight.is_meta:
            if bool(weight.isnan().any()):
                raise ValueError(
                    f"{where}contains NaN, so its blocks have no norm to be ranked by "
                    "(scores_init='weight_norm')"
                )

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        self.scores = nn.Parameter(torch.empty(grid, dtype=torch.float32, device=device))

    def reset_scores(self, weight: Tensor | None) -> None:
        """Draws the scores, or measures them: without a weight those of norms stay as they are."""
        if self.scores_init == "kaiming_uniform":
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        elif weight is not None:
            if weight.is_meta or self.scores.is_meta:
                return
            self.scores.copy_(self.block_norms(weight))

    def full_scores(self) -> Tensor:
        """The float32 scores of all blocks, without gradient, gathered where they are sharded.

        Raises:
            RuntimeError: if something else cast the scores to another dtype.
        """
        scores = self.scores.detach()
        if is_dtensor(scores):
            return scores.full_tensor()
        if scores.dtype == torch.float32:
            return scores
        # FSDP2's mixed precision hands the forward a rounded copy. The float32 shards are still
        # there; gathering these few numbers keeps the forward's mask the one that is squashed.
        if self._sharded_scores is not None:
            return self._sharded_scores.detach().full_tensor()
        raise RuntimeError(
            f"the scores of a block mask are {scores.dtype} and must be float32: rounded scores "
            "tie and stop learning. `.half()` and `.to()` leave them alone; a loop that casts "
            "`parameter.data` must skip them (`sparsifier.param_groups(model)` lists them last)"
        )

    def __setattr__(self, name: str, value: object) -> None:
        # FSDP2 swaps the sharded parameter for the gathered one by plain assignment; the float32
        # shards would otherwise be out of reach during a forward in mixed precision.
        if name == "scores" and "_parameters" in self.__dict__:
            present = self._parameters.get("scores")
            swapped_in = is_dtensor(present) and not is_dtensor(value)
            if swapped_in or is_dtensor(value):
                object.__setattr__(self, "_sharded_scores", present if swapped_in else None)
        super().__setattr__(name, value)


class SupermaskSparsifier(BlockSparsifier):
    """Learns which blocks of a model's weights to keep, while the model trains.

    Every masked weight gets one trainable score a block; each forward keeps the blocks with the
    highest scores. The scores are parameters of the model: build the optimizer after `prepare`,
    best from :meth:`param_groups`, which keeps them out of weight decay.

    Wrap the model in DDP, fully_shard or torch.compile after `prepare`. The schedulers of
    `torch.ao.pruning` change a group's level; it takes effect at the next :meth:`step`, which also
    applies levels written by hand into `sparsifier.groups[i]["sparsity_level"]`.

    To resume a run: `prepare`, build the optimizer and the scheduler (building one resets levels),
    then load the state dicts of the model, the optimizer, the scheduler and the sparsifier, in that
    order.

    Once squashed, a weight is an ordinary one. An optimizer that goes on training it regrows the
    pruned blocks at its next step, from momentum and new gradients.

    Args:
        sparsity_level: fraction of blocks pruned, in `[0, 1)`; exactly
            `max(1, round(n_blocks * (1 - sparsity_level)))` blocks are kept.
        blocksize: int for square blocks or `(rows, cols)` = (out_features, in_features).
        scores_init: `"kaiming_uniform"` (random, to train from scratch) or `"weight_norm"` (the norm
            of each block, to fine-tune: at first the blocks of the largest norm are kept).

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, an unknown init.
        TypeError: for arguments of the wrong type.

    Example:
        >>> sparsifier = SupermaskSparsifier(sparsity_level=0.8, blocksize=64)
        >>> sparsifier.prepare(model, config=[{"tensor_fqn": "encoder.layers.*.mlp.*.weight"}])
        >>> optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.05))
        >>> for batch in loader:
        ...     loss(model(batch)).backward()
        ...     optimizer.step()
        ...     sparsifier.step()
        ...     optimizer.zero_grad()
        >>> sparsifier.squash_mask()
    """

    mask_type = Supermask

    def __init__(
        self,
        sparsity_level: float = 0.8,
        blocksize: BlockSize = 64,
        *,
        scores_init: str = "kaiming_uniform",
    ) -> None:
        super().__init__(sparsity_level, blocksize, scores_init=scores_init)
