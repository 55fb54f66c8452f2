"""Folding block masks into the weights they mask."""

from __future__ import annotations

from torch import nn

from torchao_superblock.common.sharding import GATHER_FIRST, is_dtensor, sharding_wrapper
from torchao_superblock.pruning.attach import detach
from torchao_superblock.pruning.checkpoints import accept_dense_checkpoints
from torchao_superblock.pruning.masks.base import BlockMask, named_masks


def squash(model: nn.Module) -> nn.Module:
    """Folds every block mask of a model into its weight and removes the parametrizations.

    Works from the module alone: on the trained model, on a deep copy or an EMA of it
    (`torch.optim.swa_utils.AveragedModel`), on a model into which a prepared state dict was loaded.
    Afterwards each masked module has its former class, its `weight` is the same `Parameter` as
    before, and the pruned blocks are exactly 0.0.

    An optimizer that goes on training the model afterwards regrows the pruned blocks at its very
    next step, from momentum and new gradients: squash last, or swap to `BSRLinear` to fine-tune.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        RuntimeError: if the model carries no block mask, a weight carries another parametrization
            on top of its mask, or a masked weight is sharded: gather the full state dict, load it
            into a prepared copy that is not, and squash that.
        ValueError: if scores are NaN. The model is unchanged after an error.

    Example:
        >>> ema = torch.optim.swa_utils.AveragedModel(model)
        >>> ...
        >>> squash(ema)
    """
    found = list(named_masks(model))
    if not found:
        raise RuntimeError(
            "squash: the model carries no block mask. It was never prepared, was squashed already, "
            "or is a copy made before prepare()"
        )
    squash_tensors(model, found)
    return model


def squash_tensors(model: nn.Module, found: list[tuple[str, nn.Module, str, BlockMask]]) -> None:
    """Folds some of a model's masks; what can go wrong is found out before the first one.

    Args:
        model: the model that `found` is part of.
        found: FQN, owner, tensor name and mask, as :func:`named_masks` yields them.

    Raises:
        RuntimeError: see :func:`squash`.
        ValueError: see :func:`squash`.
    """
    for fqn, module, name, mask in found:
        parametrizations = module.parametrizations[name]
        if len(parametrizations) > 1:
            others = [type(p).__name__ for p in parametrizations if p is not mask]
            raise RuntimeError(
                f"squash: {fqn!r} carries {', '.join(others)} besides its block mask; remove the "
                "other parametrizations first"
            )
        if parametrizations.original.is_meta:
            raise RuntimeError(
                f"squash: {fqn!r} is on the meta device and has no values; materialise the model "
                "with to_empty(device=...) and load its state dict first"
            )
        wrapper = sharding_wrapper(model, module)
        if wrapper is not None or is_dtensor(parametrizations.original):
            raise RuntimeError(
                f"squash: {fqn!r} is sharded by {wrapper or 'DTensor'}, so no rank holds all of its "
                f"blocks. {GATHER_FIRST}. Nothing was folded"
            )
        mask.check_foldable(fqn)
    for _fqn, module, name, mask in found:
        mask.fold_(module.parametrizations[name].original)
        detach(module, name)
    accept_dense_checkpoints(model)
