"""The ways of finding masks that are compared. A new one is a function of a few lines.

A method prepares the model and returns a sparsifier, whose `step()` is called after every optimizer
step and whose `squash_mask()` leaves zeros, and the parameter groups of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.judge.rivals import (
    Config,
    FixedBlocks,
    GradualMagnitude,
    TorchWeightNorm,
    block_norms,
    expand,
    keep_largest,
    kept_blocks,
    masked_weights,
)
from torchao_superblock import (
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
)

Groups = list[dict[str, Any]]
Method = Callable[[nn.Module, Config, float, int, int, float], tuple[Any, Groups]]
"""`(model, config, sparsity_level, blocksize, total_steps, weight_decay)` to a sparsifier (None for
the dense model) and parameter groups. A group may have an `lr_scale`, a factor on the learning rate."""

METHODS: dict[str, Method] = {}

OneShotMethod = Callable[[nn.Module, Config, float, int, list[dict[str, torch.Tensor]]], None]
"""`(model, config, sparsity_level, blocksize, batches)`; changes the model in place."""

ONE_SHOT: dict[str, OneShotMethod] = {}

RIVALS = ("dense", "floor", "random", "gradual", "block-norm", "torch-weight-norm")
"""Names of what is not ours, in either registry."""


def method(name: str) -> Callable[[Method], Method]:
    """Enters a function into :data:`METHODS`."""

    def enter(function: Method) -> Method:
        METHODS[name] = function
        return function

    return enter


def one_shot(name: str) -> Callable[[OneShotMethod], OneShotMethod]:
    """Enters a function into :data:`ONE_SHOT`."""

    def enter(function: OneShotMethod) -> OneShotMethod:
        ONE_SHOT[name] = function
        return function

    return enter


def at(total_steps: int, fraction: float) -> int:
    """A share of the training, in steps."""
    return max(1, round(total_steps * fraction))


# -------------------------------------------------------------------------------------------------
# While training: rivals
# -------------------------------------------------------------------------------------------------


@method("dense")
def dense(model, config, level, blocksize, total_steps, weight_decay):
    return None, [{"params": list(model.parameters()), "weight_decay": weight_decay}]


@method("random")
def random(model, config, level, blocksize, total_steps, weight_decay):
    sparsifier = FixedBlocks.at_random(masked_weights(model, config), level, blocksize)
    return sparsifier, [{"params": list(model.parameters()), "weight_decay": weight_decay}]


@method("gradual")
def gradual(model, config, level, blocksize, total_steps, weight_decay):
    sparsifier = GradualMagnitude(masked_weights(model, config), level, blocksize, total_steps)
    return sparsifier, [{"params": list(model.parameters()), "weight_decay": weight_decay}]


@method("torch-weight-norm")
def torch_weight_norm(model, config, level, blocksize, total_steps, weight_decay):
    fqns = list(masked_weights(model, config))
    sparsifier = TorchWeightNorm(model, fqns, level, blocksize, total_steps)
    return sparsifier, [{"params": list(model.parameters()), "weight_decay": weight_decay}]


# -------------------------------------------------------------------------------------------------
# While training: ours
# -------------------------------------------------------------------------------------------------


def prepared(sparsifier, model, config, weight_decay):
    sparsifier.prepare(model, config)
    return sparsifier, sparsifier.param_groups(model, weight_decay=weight_decay)


@method("supermask")
def supermask(model, config, level, blocksize, total_steps, weight_decay):
    ramp_steps, freeze_step = at(total_steps, 0.4), at(total_steps, 0.7)
    sparsifier = SupermaskSparsifier(
        level, blocksize, ramp_steps=ramp_steps, freeze_step=freeze_step
    )
    return prepared(sparsifier, model, config, weight_decay)


@method("magnitude")
def magnitude(model, config, level, blocksize, total_steps, weight_decay):
    ramp_steps, freeze_step = at(total_steps, 0.4), at(total_steps, 0.7)
    sparsifier = MagnitudeSparsifier(
        level, blocksize, ramp_steps=ramp_steps, freeze_step=freeze_step
    )
    return prepared(sparsifier, model, config, weight_decay)


@method("magnitude-weighted")
def magnitude_weighted(model, config, level, blocksize, total_steps, weight_decay):
    ramp_steps, freeze_step = at(total_steps, 0.4), at(total_steps, 0.7)
    sparsifier = MagnitudeSparsifier(
        level, blocksize, ramp_steps=ramp_steps, freeze_step=freeze_step, gradient_weighted=True
    )
    return prepared(sparsifier, model, config, weight_decay)


@method("rigl")
def rigl(model, config, level, blocksize, total_steps, weight_decay):
    sparsifier = RigLSparsifier(
        level,
        blocksize,
        freeze_step=at(total_steps, 0.75),
        update_every=at(total_steps, 0.04),
    )
    return prepared(sparsifier, model, config, weight_decay)


@method("spartan")
def spartan(model, config, level, blocksize, total_steps, weight_decay):
    ramp_steps, freeze_step = at(total_steps, 0.4), at(total_steps, 0.45)
    sparsifier = SpartanSparsifier(level, blocksize, ramp_steps=ramp_steps, freeze_step=freeze_step)
    return prepared(sparsifier, model, config, weight_decay)


@method("random-scaled")
def random_scaled(model, config, level, blocksize, total_steps, weight_decay):
    """RigL that moves nothing: random blocks, evenly spread, with the gain. What is left of ours is the choice."""
    sparsifier = RigLSparsifier(level, blocksize, freeze_step=total_steps, drop_fraction=0.0)
    return prepared(sparsifier, model, config, weight_decay)


@method("supermask-defaults")
def supermask_defaults(model, config, level, blocksize, total_steps, weight_decay):
    return prepared(SupermaskSparsifier(level, blocksize), model, config, weight_decay)


# -------------------------------------------------------------------------------------------------
# One shot
# -------------------------------------------------------------------------------------------------


@one_shot("dense")
def untouched(model, config, level, blocksize, batches):
    pass


@one_shot("floor")
@torch.no_grad()
def floor(model, config, level, blocksize, batches):
    for weight in masked_weights(model, config).values():
        weight.zero_()  # biases stay


@one_shot("random")
def random_blocks(model, config, level, blocksize, batches):
    FixedBlocks.at_random(masked_weights(model, config), level, blocksize).squash_mask()


@one_shot("block-norm")
@torch.no_grad()
def largest_norms(model, config, level, blocksize, batches):
    for weight in masked_weights(model, config).values():
        norms = block_norms(weight, blocksize)
        weight.mul_(expand(keep_largest(norms, kept_blocks(norms.numel(), level)), blocksize))


@one_shot("torch-weight-norm")
def torch_weight_norm_at_once(model, config, level, blocksize, batches):
    TorchWeightNorm(model, list(masked_weights(model, config)), level, blocksize, 1).squash_mask()


@one_shot("one-shot")
def repaired(model, config, level, blocksize, batches):
    from torchao_superblock import prune_one_shot

    prune_one_shot(
        model,
        batches,
        level,
        blocksize,
        config,
        mask_fn=lambda batch: batch["attention_mask"].bool(),
        progress=False,
    )
