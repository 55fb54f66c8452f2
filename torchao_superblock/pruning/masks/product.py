"""The masked weight as a differentiable product of a weight with the factors of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao_superblock.ops.block_mask import mask_weight, mask_weight_backward

STATISTIC_SCALE = 2.0**-60
"""Statistics travel as gradients; this small they move no norm that gradients are clipped by."""


def at_unit_scale(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of carriers, each divided by its root mean square: new tensors.

    Args:
        gradients: of any shapes, on one device. Where one is not finite (a scaled loss that overflowed) it
            counts as 0.
    """
    # In float64, since statistics travel small. A norm of 0, infinity or NaN scales all to 0.
    double = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    scales = list(torch._foreach_norm(gradients, 2, dtype=double))
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [gradient.numel() ** 0.5 for gradient in gradients])
    scales = torch.stack(scales).nan_to_num_(0.0, 0.0, 0.0).unbind()
    scaled = torch._foreach_mul(gradients, scales)
    return [gradient.nan_to_num_(0.0, 0.0, 0.0) for gradient in scaled]


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
