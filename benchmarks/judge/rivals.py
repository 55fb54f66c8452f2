"""What the package is compared with: each in its plainest form, with `step` and `squash_mask`.

Dimensions: N out_features, K in_features; R, C rows and columns of the block grid; b edge of a block.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.pruning import CubicSL, WeightNormSparsifier

Config = list[dict[str, Any]]


def masked_weights(model: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """The weights of linears that the globs of `config` name, by FQN.

    Raises:
        ValueError: if an entry names none.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    chosen: dict[str, nn.Parameter] = {}
    for entry in config:
        found = fnmatch.filter(weights, entry["tensor_fqn"])
        if not found:
            raise ValueError(f"no linear weight is called {entry['tensor_fqn']!r}")
        chosen.update((fqn, weights[fqn]) for fqn in found)
    return chosen


def kept_blocks(n_blocks: int, sparsity_level: float) -> int:
    """How many of `n_blocks` stay."""
    return max(1, round(n_blocks * (1 - sparsity_level)))


def block_norms(weight_NK: Tensor, blocksize: int) -> Tensor:
    """Norm of each block, (R, C).

    Raises:
        ValueError: if the shape is no multiple of the block size.
    """
    if any(size % blocksize for size in weight_NK.shape):
        shape = tuple(weight_NK.shape)
        raise ValueError(f"a weight of shape {shape} is not made of whole blocks of {blocksize}")
    blocks_RbCb = weight_NK.detach().float().unflatten(1, (-1, blocksize))
    blocks_RbCb = blocks_RbCb.unflatten(0, (-1, blocksize))
    return torch.linalg.vector_norm(blocks_RbCb, dim=(1, 3))


def keep_largest(values_RC: Tensor, kept: int) -> Tensor:
    """A float mask, 1 at the `kept` largest values."""
    mask = torch.zeros(values_RC.numel(), device=values_RC.device)
    mask[values_RC.flatten().topk(kept).indices] = 1
    return mask.view_as(values_RC)


def expand(mask_RC: Tensor, blocksize: int) -> Tensor:
    """One element a weight from one element a block."""
    return mask_RC.repeat_interleave(blocksize, 0).repeat_interleave(blocksize, 1)


def ramp_steps(total_steps: int) -> int:
    """The ramps of all rivals end after 60 % of the steps."""
    return max(1, round(0.6 * total_steps))


def steps_between_updates(total_steps: int) -> int:
    """Rivals renew their masks every 50 steps, on short runs twenty times."""
    return max(1, min(50, total_steps // 20))


class FixedBlocks:
    """Blocks that are chosen once and stay.

    Pruned weights get zero gradients, so that with a zero start AdamW leaves them at zero.

    Args:
        weights: what is masked, by FQN; changed in place.
        masks: (R, C) for each, 1 = kept.
        blocksize: edge of a block.
    """

    def __init__(
        self, weights: dict[str, nn.Parameter], masks: dict[str, Tensor], blocksize: int
    ) -> None:
        self.hooks = []
        for fqn, weight in weights.items():
            mask = expand(masks[fqn], blocksize).to(weight.dtype)
            with torch.no_grad():
                weight.mul_(mask)
            self.hooks.append(weight.register_hook(lambda grad, mask=mask: grad * mask))

    @classmethod
    def at_random(
        cls, weights: dict[str, nn.Parameter], sparsity_level: float, blocksize: int
    ) -> FixedBlocks:
        """Keeps blocks drawn at random, the same number as every other method."""
        masks = {}
        for fqn, weight in weights.items():
            draw = torch.rand_like(block_norms(weight, blocksize))
            masks[fqn] = keep_largest(draw, kept_blocks(draw.numel(), sparsity_level))
        return cls(weights, masks, blocksize)

    @classmethod
    def nonzero(cls, weights: dict[str, nn.Parameter], blocksize: int) -> FixedBlocks:
        """Keeps the blocks that are not zero now."""
        masks = {fqn: (block_norms(w, blocksize) > 0).float() for fqn, w in weights.items()}
        return cls(weights, masks, blocksize)

    def step(self) -> None:
        """Nothing changes."""

    def squash_mask(self) -> None:
        """Lets go of the weights, whose pruned blocks are zero already."""
        for hook in self.hooks:
            hook.remove()


class GradualMagnitude:
    """Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878), on blocks.

    The level rises cubically; the mask keeps the blocks of the largest norm, is renewed now and
    then, and is multiplied into the weights after every optimizer step.

    Args:
        weights: what is masked, by FQN; changed in place.
        sparsity_level: at the end of the ramp.
        blocksize: edge of a block.
        total_steps: of the training.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        sparsity_level: float,
        blocksize: int,
        total_steps: int,
    ) -> None:
        self.weights, self.sparsity_level, self.blocksize = weights, sparsity_level, blocksize
        self.ramp_steps = ramp_steps(total_steps)
        self.every = steps_between_updates(total_steps)
        self.steps = 0
        self.masks: dict[str, Tensor] = {}

    def level(self) -> float:
        """The level of this step."""
        rest = 1 - min(1.0, self.steps / self.ramp_steps)
        return self.sparsity_level * (1 - rest**3)

    @torch.no_grad()
    def step(self) -> None:
        """Renews the masks if it is time, and applies them."""
        if self.steps % self.every == 0:
            self._choose(self.level())
        for fqn, weight in self.weights.items():
            weight.mul_(self.masks[fqn])
        self.steps += 1

    def _choose(self, level: float) -> None:
        for fqn, weight in self.weights.items():
            norms = block_norms(weight, self.blocksize)
            mask = keep_largest(norms, kept_blocks(norms.numel(), level))
            self.masks[fqn] = expand(mask, self.blocksize).to(weight.dtype)

    @torch.no_grad()
    def squash_mask(self) -> None:
        """Nothing to fold; the last steps of a short run may have come after the last update."""
        self._choose(self.sparsity_level)
        for fqn, weight in self.weights.items():
            weight.mul_(self.masks[fqn])


class TorchWeightNorm:
    """`WeightNormSparsifier` of `torch.ao.pruning` under its cubic scheduler, updated as the others.

    Args:
        model: prepared in place.
        fqns: names of the masked weights.
        sparsity_level: at the end of the ramp.
        blocksize: edge of a block.
        total_steps: of the training; 1 to prune at once.
    """

    def __init__(
        self,
        model: nn.Module,
        fqns: list[str],
        sparsity_level: float,
        blocksize: int,
        total_steps: int,
    ) -> None:
        self.sparsifier = WeightNormSparsifier(
            sparsity_level=sparsity_level, sparse_block_shape=(blocksize, blocksize)
        )
        self.sparsifier.prepare(model, [{"tensor_fqn": fqn} for fqn in fqns])
        for group in self.sparsifier.groups:  # its masks are made on the CPU
            group["module"].to(next(model.parameters()).device)
        self.sparsity_level = sparsity_level
        self.every = steps_between_updates(total_steps)
        updates = math.ceil(ramp_steps(total_steps) / self.every)
        self.scheduler = CubicSL(self.sparsifier, delta_t=1, total_t=updates)
        self.steps = 0

    def step(self) -> None:
        """Raises the level and renews the masks, if it is time."""
        if self.steps % self.every == 0:
            self.sparsifier.step()
            self.scheduler.step()
        self.steps += 1

    def squash_mask(self) -> None:
        """Prunes to the level, wherever the ramp was, and folds the masks into the weights."""
        for group in self.sparsifier.groups:
            group["sparsity_level"] = self.sparsity_level
        self.sparsifier.step()
        self.sparsifier.squash_mask()
