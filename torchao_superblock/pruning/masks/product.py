"""The masked weight as a differentiable product of a weight with the factors of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_superblock.ops.block_mask import mask_weight, mask_weight_backward

STATISTIC_SCALE = 2.0**-60
"""Statistics travel as gradients; this small they move no norm that gradients are clipped by."""


class MaskWeight(torch.autograd.Function):
    """`weight * factors`; what else is known of the blocks leaves as the gradient of `scores`.

    grad_weight = grad * factors
    grad_scores[R, C] = sum over the block of grad * weight   (straight through the hard choice)
                     or sum over the block of grad * grad, times STATISTIC_SCALE
                     or 0 unless live
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        scores: Tensor,
        factors: Tensor,
        live: Tensor,
        blocksize: tuple[int, int],
        statistic: bool = False,
    ) -> Tensor:
        _save(ctx, weight, scores, factors, live, blocksize, statistic)
        return mask_weight(weight, factors, blocksize, live)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _backward(ctx, grad)


class TransformableMaskWeight(torch.autograd.Function):
    """The same for the transforms of torch.func, which need a `setup_context`.

    For its sake torch binds the arguments to the signature at each call, which takes the host longer
    than all the rest of a masked read.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        scores: Tensor,
        factors: Tensor,
        live: Tensor,
        blocksize: tuple[int, int],
        statistic: bool = False,
    ) -> Tensor:
        return mask_weight(weight, factors, blocksize, live)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _backward(ctx, grad)


def _save(ctx, weight, scores, factors, live, blocksize, statistic=False) -> None:
    ctx.blocksize = blocksize
    ctx.scores_dtype = scores.dtype
    ctx.statistic = statistic
    needed = ctx.needs_input_grad[1] and not statistic
    ctx.save_for_backward(weight if needed else None, factors, live)


def _backward(ctx, grad: Tensor):
    weight, factors, live = ctx.saved_tensors
    if ctx.statistic and ctx.needs_input_grad[1]:
        weight = grad
    grad_weight, grad_scores = mask_weight_backward(
        grad, weight, factors, live, ctx.blocksize, ctx.needs_input_grad[0]
    )
    if grad_scores is not None:
        if ctx.statistic:
            grad_scores = grad_scores * STATISTIC_SCALE
        grad_scores = grad_scores.to(ctx.scores_dtype)
    return grad_weight, grad_scores, None, None, None, None
