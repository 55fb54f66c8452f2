"""The training loop of every question, and what all of them check afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.judge.cells import Tick
from benchmarks.judge.methods import Method
from benchmarks.judge.rivals import Config, block_norms, kept_blocks, masked_weights


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW and of its learning rate: a linear warm-up, then a cosine.

    Attributes:
        lr: the largest.
        weight_decay: of everything but scores.
        betas: of AdamW.
        warmup: steps until `lr` is reached.
        last: where the cosine ends, as a fraction of `lr`.
        clip: largest norm of the gradients.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 100
    last: float = 0.1
    clip: float = 1.0

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate of a step as a fraction of `lr`."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        return min(1.0, (step + 1) / self.warmup) * (self.last + (1 - self.last) * cosine)


def train(
    model: nn.Module,
    method: Method,
    config: Config,
    sparsity_level: float,
    blocksize: int,
    *,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    total_steps: int,
    optimization: Optimization,
    autocast: bool,
    tick: Tick,
) -> float:
    """Trains with masks and folds them into the weights.

    Args:
        model: on its device; changed in place.
        method: see :mod:`benchmarks.judge.methods`.
        config: which weights are masked.
        sparsity_level: fraction of blocks pruned.
        blocksize: edge of a block.
        batches: ends the training early if it ends first.
        loss_fn: the loss of the model on a batch.
        total_steps: of the optimizer.
        optimization: how.
        autocast: compute the loss in bfloat16 where it can be.
        tick: told where the training is, every 20 steps.

    Returns:
        The last training loss.

    Raises:
        RuntimeError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    sparsifier, groups = method(
        model, config, sparsity_level, blocksize, total_steps, optimization.weight_decay
    )
    groups = [{"lr": optimization.lr * group.pop("lr_scale", 1.0), **group} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=optimization.betas, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: optimization.factor(step, total_steps)
    )

    model.train()
    for step, batch in zip(range(total_steps), batches, strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimization.clip)
        optimizer.step()
        scheduler.step()
        if sparsifier is not None:
            sparsifier.step()
        if step % 20 == 0:
            tick(f"{step}/{total_steps}, loss {_finite(loss, step):.3f}")
    if sparsifier is not None:
        sparsifier.squash_mask()
    return _finite(loss, total_steps)


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value} at step {step}")
    return value


def pruned_blocks(model: nn.Module, config: Config, sparsity_level: float, blocksize: int) -> float:
    """Fraction of the masked weights' blocks that are zero.

    Args:
        model: after squashing.
        config: which weights were masked.
        sparsity_level: what was asked for.
        blocksize: 0 for a dense model.

    Raises:
        RuntimeError: if more blocks are left than the level allows (one more a weight is let pass:
            others round the other way), which no comparison would survive.
    """
    if not blocksize:
        return 0.0
    blocks = left = allowed = 0
    weights = masked_weights(model, config)
    for weight in weights.values():
        norms = block_norms(weight, blocksize)
        blocks += norms.numel()
        left += int((norms > 0).sum())
        allowed += kept_blocks(norms.numel(), sparsity_level)
    if left > allowed + len(weights):
        raise RuntimeError(
            f"{left} of {blocks} blocks are not zero, where {sparsity_level:g} leaves {allowed}"
        )
    return 1 - left / blocks
