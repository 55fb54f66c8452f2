"""Soft top-k: which blocks stay is a soft function of their norms that hardens while the model trains.

Method: Spartan (Tai, Tian and Lim 2022, https://arxiv.org/abs/2205.14107) over blocks. With v the
norms of the blocks over their mean in the layer, a sharpness beta and a threshold tau,

    m = sigmoid(beta (v - tau)),  tau such that  sum m = n_kept

the weight is multiplied by m, of which the forward sees the `n_kept` largest blocks only and the
gradient all of them: through m a block that is not kept may still grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.ops.block_mask import is_transformed, mask_weight, mask_weight_backward
from torchao_superblock.pruning.masks.base import BlockMask, refuse_nan, scale_local_blocks_
from torchao_superblock.pruning.masks.settings import Check, check_count, check_sharpness
from torchao_superblock.pruning.ramp import Progress
from torchao_superblock.pruning.sparsifier import BlockSparsifier

_BISECTIONS = 40


class _SoftTopK(torch.autograd.Function):
    """`weight * hard * soft(norms(weight)) * factor`, the gradient straight through `hard`.

    With z = beta v, m = sigmoid(z - mu), d = m (1 - m) and dm the gradient of m,
        dz = d * dm - d / sum(d) * sum(d * dm)          (mu follows so that sum m stays)
        grad_weight = grad * m * factor + weight * (beta / mean(norm) * dz / norm)
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        hard: Tensor,
        soft: Tensor,
        slope: Tensor,
        factor: Tensor,
        live: Tensor,
        blocksize: tuple[int, int],
    ) -> Tensor:
        ctx.blocksize = blocksize
        ctx.save_for_backward(weight, soft, slope, factor)
        return mask_weight(weight, hard * soft * factor, blocksize, live)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _soft_backward(ctx, grad)


class _TransformableSoftTopK(torch.autograd.Function):
    """The same for the transforms of torch.func; see :class:`TransformableMaskWeight`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        hard: Tensor,
        soft: Tensor,
        slope: Tensor,
        factor: Tensor,
        live: Tensor,
        blocksize: tuple[int, int],
    ) -> Tensor:
        return mask_weight(weight, hard * soft * factor, blocksize, live)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, _hard, soft, slope, factor, _live, blocksize = inputs
        ctx.blocksize = blocksize
        ctx.save_for_backward(weight, soft, slope, factor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _soft_backward(ctx, grad)


def _soft_backward(ctx, grad: Tensor):
    weight, soft, slope, factor = ctx.saved_tensors
    live = torch.ones((), dtype=torch.bool, device=grad.device)
    grad_weight, sums = mask_weight_backward(grad, weight, soft * factor, live, ctx.blocksize, True)
    d = soft * (1 - soft)
    dm = sums.to(d.dtype) * factor
    dz = d * dm - d / d.sum().clamp_min(1e-12) * (d * dm).sum()
    grad_weight = grad_weight + mask_weight(weight, dz * slope, ctx.blocksize)
    return grad_weight, None, None, None, None, None, None


class SpartanMask(BlockMask):
    """Parametrization by a soft top-k of block norms, hard once it is frozen.

    Norms are looked at by `step()`, so that a forward depends on the mask's own tensors only.

    Args:
        weight: the `(N, K)` floating weight to be masked.
        blocksize: int for square blocks or `(rows, cols)`.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        gain: see :class:`BlockMask`.
        final_sharpness: what beta reaches at the freeze, from 1 on.
        update_every: calls of `step()` between two looks at the norms.

    Attributes:
        scores: float32 buffer, v: norms of the blocks over their mean.
        soft: float32 buffer of the grid's shape, m. Frozen, it is the mask.
        slope: float32 buffer of the grid's shape, beta / (mean norm * norm). Frozen, it is 0.
        sharpness: float32 0-dim buffer, beta.
    """

    SETTINGS: ClassVar[Mapping[str, Check]] = {
        "final_sharpness": check_sharpness,
        "update_every": check_count,
    }

    soft: Tensor
    slope: Tensor
    sharpness: Tensor

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        gain: float = 0.0,
        final_sharpness: float = 160.0,
        update_every: int = 10,
    ) -> None:
        object.__setattr__(self, "final_sharpness", final_sharpness)
        object.__setattr__(self, "update_every", update_every)
        super().__init__(weight, blocksize, sparsity_level, gain)

    @classmethod
    def check_weight(cls, weight: Tensor, settings: Mapping[str, Any], where: str) -> None:
        refuse_nan(weight, where)

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        super().make_scores(grid, device)
        self.register_buffer("soft", torch.ones(grid, device=device))
        self.register_buffer("slope", torch.zeros(grid, device=device))
        self.register_buffer("sharpness", torch.ones((), device=device))

    def reset_scores(self, weight: Tensor | None) -> None:
        self.sharpness.fill_(1.0)
        self.soft.fill_(1.0)
        self.slope.zero_()
        if weight is not None and not weight.is_meta and not self.scores.is_meta:
            self._look(weight, self.sharpness)

    def factors(self) -> Tensor:
        return super().factors() * self.soft

    def forward(self, weight: Tensor) -> Tensor:
        self.refuse_sharded(weight)
        hard, live = self._mask_and_live()
        factor = torch.ones_like(self.sharpness) if self.factor is None else self.factor
        # Copies: `step()` may write into the buffers between a forward and its backward.
        soft, slope = self.soft.clone(), self.slope.clone()
        function = _TransformableSoftTopK if is_transformed() else _SoftTopK
        return function.apply(weight, hard, soft, slope, factor.clone(), live, self.blocksize)

    def update(self, weight: Tensor, progress: Progress) -> None:
        if progress.step % self.update_every or self.known_frozen:
            return
        share = min(1.0, progress.step / progress.ramp.freeze_step)
        sharpness = torch.full_like(self.sharpness, 1 + (self.final_sharpness - 1) * share)
        self._look(weight, sharpness)

    def _look(self, weight: Tensor, sharpness: Tensor) -> None:
        norms = self.block_norms(weight).float()
        mean = norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
        scores = (norms / mean).to(self.scores.dtype)
        z = sharpness * scores
        soft = torch.sigmoid(z - _threshold(z, self.n_kept))
        everything = self.n_kept >= z.numel()  # no threshold keeps all but minus infinity
        soft.masked_fill_(everything, 1.0)
        slope = sharpness / (mean * norms.clamp_min(torch.finfo(norms.dtype).tiny))
        slope.masked_fill_(everything | (norms == 0), 0.0)
        self.write_unless_frozen(
            {"scores": scores, "soft": soft, "slope": slope, "sharpness": sharpness}
        )

    @torch.no_grad()
    def freeze(self, weight: Tensor | None = None) -> None:
        """Holds the present mask; its soft factors go into the weight, and it is hard from then on.

        Args:
            weight: `(N, K)` under the mask. Without it the soft factors stay where they are.
        """
        held = self.is_frozen
        super().freeze(weight)
        self.slope.zero_()
        if weight is not None and not held:
            kept = self.held_mask.bool()
            scale_local_blocks_(weight, self.soft.where(kept, 1.0), self.blocksize)
            self.soft.copy_(kept)


class SpartanSparsifier(BlockSparsifier):
    """Lets blocks compete softly for their places, ever harder, until the masks freeze.

    The recipe: `ramp_steps` at 40 % of the training, `freeze_step` at 45 %. What is squashed is what
    the last forward used: kept blocks times their soft factors.

    Args:
        sparsity_level: fraction of blocks pruned, in `[0, 1)`; exactly
            `max(1, round(n_blocks * (1 - sparsity_level)))` blocks are kept.
        blocksize: int for square blocks or `(rows, cols)` = (out_features, in_features).
        ramp_steps: calls of `step()` over which the level rises from 0, see
            :class:`BlockSparsifier`.
        freeze_step: the call of `step()` from which on the masks stay; required, since sharpness
            rises until then.
        gain: exponent of what kept blocks are multiplied by, see :class:`BlockMask`; None is 0.5 on
            a ramp and 0 without one.
        final_sharpness: beta at the freeze. The larger, the harder the choice is already before.
        update_every: calls of `step()` between two looks at the norms.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, no `freeze_step` or one
            before the end of the ramp.
        TypeError: for arguments of the wrong type.

    Example:
        >>> sparsifier = SpartanSparsifier(0.8, 16, ramp_steps=4_000, freeze_step=4_500)
        >>> sparsifier.prepare(model)
    """

    mask_type = SpartanMask

    def __init__(
        self,
        sparsity_level: float = 0.8,
        blocksize: BlockSize = 64,
        *,
        freeze_step: int | None = None,
        ramp_steps: int | None = None,
        gain: float | None = None,
        final_sharpness: float = 160.0,
        update_every: int = 10,
    ) -> None:
        self.require_freeze_step(freeze_step, "grows sharper until then")
        super().__init__(
            sparsity_level,
            blocksize,
            ramp_steps=ramp_steps,
            freeze_step=freeze_step,
            gain=gain,
            final_sharpness=final_sharpness,
            update_every=update_every,
        )


def _threshold(z: Tensor, n_kept: Tensor) -> Tensor:
    """mu such that `sum sigmoid(z - mu) = n_kept`, by bisection; 0-dim."""
    low, high = z.amin() - 30, z.amax() + 30
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = torch.sigmoid(z - middle).sum() > n_kept
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (low + high) / 2
