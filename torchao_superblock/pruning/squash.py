"""Folding block masks into the weights they mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.kept_blocks import remember_kept
from torchao_superblock.common.names import find_fqn, nearest_names
from torchao_superblock.common.sharding import (
    GATHER_FIRST,
    is_dtensor,
    refuse_released,
    sharding_wrapper,
)
from torchao_superblock.pruning.attach import detach
from torchao_superblock.pruning.checkpoints import accept_dense_checkpoints
from torchao_superblock.pruning.finding import named_masks
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.reading import undo_read_once
from torchao_superblock.pruning.replaced import refuse_adapters
from torchao_superblock.pruning.written import refuse_lost_write

Found = tuple[str, nn.Module, str, BlockMask]


def squash(model: nn.Module, *, masks_from: nn.Module | None = None) -> nn.Module:
    """Folds every block mask of a model into its weight and removes the parametrizations.

    Works from the module alone: on the trained model, on a deep copy or an EMA of it
    (`torch.optim.swa_utils.AveragedModel`), on a model into which a prepared state dict was loaded.
    Afterwards each masked module has its former class, its `weight` is the same `Parameter` as
    before, and the pruned blocks are exactly 0.0.

    An optimizer that goes on training the model afterwards regrows the pruned blocks at its very
    next step, from momentum and new gradients: squash last, or swap to `BSRLinear` to fine-tune.

    An average of the buffers, too (`use_buffers=True`), has masks of its own once what it averaged
    agrees; before, it is refused, and `masks_from` gives it those of the trained model. An average of
    parameters only, or of floating tensors only, that does not copy integer buffers keeps the level,
    and the held masks, with which it began, and nothing can tell: give it `masks_from`.

    Interrupted at any point (no memory left, Ctrl-C) the model computes the same as before; call it
    again to go on.

    Args:
        model: changed in place.
        masks_from: fold the present masks of this model, prepared alike and not squashed yet, and
            not those of `model`.

    Returns:
        The model.

    Raises:
        RuntimeError: if the model carries no block mask, a weight carries another parametrization
            on top of its mask, is the base of an adapter or was written in place, or a masked weight
            is sharded: gather the full state dict, load it into a prepared copy that is not, and
            squash that.
        ValueError: if scores are NaN, an average has mixed masks beyond repair, or `masks_from`
            lacks a mask or has one of other blocks. The model is unchanged after an error.

    Example:
        >>> ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        >>> ...
        >>> squash(ema, masks_from=model)
    """
    found = list(named_masks(model))
    if not found:
        undo_read_once(model)
        if accept_dense_checkpoints(model):
            return model  # all that an interrupted squash had left to do
        raise RuntimeError(
            "squash: the model carries no block mask. It was never prepared, was squashed already, "
            "or is a copy made before prepare()"
        )
    if masks_from is not None:
        found = _with_masks_of(masks_from, found)
    check_foldable(model, found)
    fold(model, found)
    return model


def check_foldable(model: nn.Module, found: list[Found]) -> None:
    """Finds out what can go wrong before the first mask is folded.

    Args:
        model: the model that `found` is part of.
        found: FQN, owner, tensor name and the mask to fold, as :func:`named_masks` yields them.

    Raises:
        RuntimeError: see :func:`squash`.
        ValueError: see :func:`squash`.
    """
    refuse_adapters(model, {module: fqn for fqn, module, *_ in found}, "squash")
    for fqn, module, name, mask in found:
        refuse_lost_write(module, name, f"squash: {fqn!r}: ")
        parametrizations = module.parametrizations[name]
        if len(parametrizations) > 1:
            others = [type(p).__name__ for p in parametrizations if not isinstance(p, BlockMask)]
            raise RuntimeError(
                f"squash: {fqn!r} carries {', '.join(others)} besides its block mask; remove the "
                "other parametrizations first"
            )
        if parametrizations.original.is_meta:
            raise RuntimeError(
                f"squash: {fqn!r} is on the meta device and has no values; materialise the model "
                "with to_empty(device=...) and load its state dict first"
            )
        refuse_released(
            parametrizations.original,
            mask.tensor_shape or mask.weight_shape,
            f"squash: {fqn!r}",
            GATHER_FIRST,
        )
        mask.refuse_released(f"squash: {fqn!r}", GATHER_FIRST)
        wrapper = sharding_wrapper(model, module) or _flat_parameter(
            parametrizations.original, mask
        )
        if wrapper is not None or is_dtensor(parametrizations.original):
            raise RuntimeError(
                f"squash: {fqn!r} is sharded by {wrapper or 'DTensor'}, so no rank holds all of its "
                f"blocks. {GATHER_FIRST}. Nothing was folded"
            )
        mask.check_foldable(fqn)


def fold(model: nn.Module, found: list[Found]) -> None:
    """Folds some of a model's masks.

    Whatever interrupts it, the model computes the same as before, and what is left can be folded.

    Args:
        model: the model that `found` is part of.
        found: FQN, owner, tensor name and the mask to fold.
    """
    for _fqn, module, name, mask in found:
        weight = module.parametrizations[name].original
        # Clearing blocks twice changes nothing; multiplying them twice does.
        repeatable = mask.factors().dtype == torch.bool
        with all_or_nothing(module, () if repeatable else (weight,)):
            kept = mask.block_mask()
            gain = mask.gain_now
            mask.fold_(weight)
            detach(module, name)
        remember_kept(weight, kept, mask.blocksize, gain)
    undo_read_once(model)
    accept_dense_checkpoints(model)


def _with_masks_of(source: nn.Module, found: list[Found]) -> list[Found]:
    """The same tensors, each with the mask that its namesake has in another model."""
    others = {fqn: mask for fqn, *_, mask in named_masks(source)}
    result = []
    for fqn, module, name, mask in found:
        other = others.get(find_fqn(fqn, others))
        if other is None:
            raise ValueError(
                f"squash: masks_from has no mask on {fqn!r}"
                + (
                    nearest_names(fqn, list(others))
                    if others
                    else " and none at all: squash it last"
                )
            )
        if (other.weight_shape, other.blocksize) != (mask.weight_shape, mask.blocksize):
            raise ValueError(
                f"squash: {fqn!r} has shape {mask.weight_shape} in blocks of {mask.blocksize}, and in "
                f"masks_from {other.weight_shape} in blocks of {other.blocksize}"
            )
        result.append((fqn, module, name, other))
    return result


def _flat_parameter(weight: Tensor, mask: BlockMask) -> str | None:
    """What shards a weight that lies in one storage with its scores, as `summon_full_params` lays them out.

    Seen from a model inside the wrapper; only a wrapper that sees to several processes does so.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if is_dtensor(weight) or mask.scores.is_meta:
        return None
    same = weight.untyped_storage().data_ptr() == mask.scores.untyped_storage().data_ptr()
    return "a wrapper that lays parameters out in one tensor" if same else None
