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
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.masks.settings import Check
from torchao_superblock.pruning.ramp import Progress
from torchao_superblock.pruning.sparsifier import BlockSparsifier

SCORES_INITS = ("kaiming_uniform", "weight_norm", "zeros")


def check_scores_init(value: object, where: str = "") -> str:
    """Returns the name of the init, or raises with `where` in front."""
    if value not in SCORES_INITS:
        raise ValueError(
            f"{where}scores_init={value!r} is unknown; use 'kaiming_uniform' to train from scratch, "
            "'weight_norm' to fine-tune, or 'zeros' to let step() sum the scores up on a ramp"
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
            of each block, to fine-tune), both trained by the optimizer; or `"zeros"`: scores that
            `step()` sums up from gradients scaled to a root mean square of 1, for a ramp.
        gain: see :class:`BlockMask`.

    Attributes:
        scores: float32 Parameter `(ceil(N / rows), ceil(K / cols))`; a buffer where it starts at
            zeros, beside a `carrier` that is given its gradient.
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

    update_reads_weight = False

    SETTINGS: ClassVar[Mapping[str, Check]] = {"scores_init": check_scores_init}

    _sharded_scores: Tensor | None = None

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        scores_init: str = "kaiming_uniform",
        gain: float = 0.0,
    ) -> None:
        # Before nn.Module's own constructor: the first scores depend on it.
        object.__setattr__(self, "scores_init", check_scores_init(scores_init))
        super().__init__(weight, blocksize, sparsity_level, gain)

    @classmethod
    def check_weight(cls, weight: Tensor, settings: Mapping[str, Any], where: str) -> None:
        if settings["scores_init"] == "weight_norm" and not weight.is_meta:
            if bool(weight.isnan().any()):
                raise ValueError(
                    f"{where}contains NaN, so its blocks have no norm to be ranked by "
                    "(scores_init='weight_norm')"
                )

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        if self.scores_init == "zeros":
            super().make_scores(grid, device)
            self.register_carrier()
        else:
            self.scores = nn.Parameter(torch.empty(grid, dtype=torch.float32, device=device))

    def reset_scores(self, weight: Tensor | None) -> None:
        """Draws the scores, or measures them: without a weight those of norms stay as they are."""
        if self.scores_init == "zeros":
            self.scores.zero_()
        elif self.scores_init == "kaiming_uniform":
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        elif weight is not None:
            if weight.is_meta or self.scores.is_meta:
                return
            self.scores.copy_(self.block_norms(weight))

    def update(self, weight: Tensor, progress: Progress) -> None:
        """Sums up scores that start at zeros: each layer's gradients count alike, whatever their size.

        Adam would move each score by its learning rate, however small the gradient, and so turn
        masks over to the end of training.
        """
        if self.scores_init != "zeros":
            return
        gone = self.block_mask().logical_not()
        gradient = progress.carried.get(self)
        if gradient is not None:
            self.scores.sub_(gradient)
        if progress.one_way:
            self.scores.masked_fill_(gone, -torch.inf)

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

    Every masked weight gets one score a block; each forward keeps the blocks with the highest
    scores.

    **On a ramp** (the recipe: `ramp_steps` at 40 % of the training, `freeze_step` at 70 %) the scores
    start at zero, `step()` adds up their gradients, scaled alike for every layer, and a block that
    is pruned stays pruned. The optimizer and its settings have no say in them. Call `step()` before
    `optimizer.zero_grad()`.

    **Without a ramp** scores are parameters that the optimizer trains, at a constant level: build it
    after `prepare`, best from :meth:`param_groups`, which keeps them out of weight decay. Measured,
    such masks lose to random ones where Adam trains them; the way is here for who has reasons.

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
        ramp_steps: calls of `step()` over which the level rises from 0, see
            :class:`BlockSparsifier`.
        freeze_step: the call of `step()` from which on the masks stay.
        scores_init: `"zeros"` (for a ramp), `"kaiming_uniform"` (random, to train from scratch) or
            `"weight_norm"` (the norm of each block, to fine-tune: at first the blocks of the largest
            norm are kept). `"auto"` is `"zeros"` on a ramp and `"kaiming_uniform"` without one.
        gain: exponent of what kept blocks are multiplied by, see :class:`BlockMask`; None is 0.5 on
            a ramp and 0 without one.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, an unknown init, a ramp that
            outlasts the freeze, zeros without a ramp.
        TypeError: for arguments of the wrong type.

    Example:
        >>> sparsifier = SupermaskSparsifier(0.8, 64, ramp_steps=4_000, freeze_step=7_000)
        >>> sparsifier.prepare(model, config=[{"tensor_fqn": "encoder.layers.*.mlp.*.weight"}])
        >>> optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.05))
        >>> for batch in loader:  # 10,000 of them
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
        ramp_steps: int | None = None,
        freeze_step: int | None = None,
        scores_init: str = "auto",
        gain: float | None = None,
    ) -> None:
        if scores_init == "auto":
            scores_init = "kaiming_uniform" if ramp_steps is None else "zeros"
        super().__init__(
            sparsity_level,
            blocksize,
            ramp_steps=ramp_steps,
            freeze_step=freeze_step,
            gain=gain,
            scores_init=scores_init,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        if group["scores_init"] == "zeros" and self.ramp.ramp_steps is None:
            raise ValueError(
                f"{where}scores_init='zeros' needs ramp_steps: at a constant level the first mask would be the "
                "first blocks of each weight. Use 'kaiming_uniform' or 'weight_norm' without a ramp"
            )
