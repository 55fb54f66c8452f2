"""Folding block masks into the weights they mask."""

from __future__ import annotations

from torch import nn

from torchao_superblock.pruning import fsdp
from torchao_superblock.pruning.attach import detach
from torchao_superblock.pruning.checkpoints import accept_dense_checkpoints
from torchao_superblock.pruning.reading import undo_read_once
from torchao_superblock.pruning.supermask import Supermask, named_supermasks


def squash(model: nn.Module) -> nn.Module:
    """Folds every block mask of a model into its weight and removes the parametrizations.

    Works from the module alone: on the trained model, on a deep copy or an EMA of it
    (`torch.optim.swa_utils.AveragedModel`), on a model into which a prepared state dict was loaded.
    Afterwards each masked module has its former class, its `weight` is the same `Parameter` as
    before, and the pruned blocks are exactly 0.0.

    An optimizer that goes on training the model afterwards regrows the pruned blocks at its very
    next step, from momentum and new gradients: squash last, or swap to `BSRLinear` to fine-tune.

    Args:
        model: changed in place. Under FSDP2 call it on every rank.

    Returns:
        The model.

    Raises:
        RuntimeError: if the model carries no block mask, or a weight carries another
            parametrization on top of its mask.
        ValueError: if scores are NaN. The model is unchanged after an error.

    Example:
        >>> ema = torch.optim.swa_utils.AveragedModel(model)
        >>> ...
        >>> squash(ema)
    """
    found = list(named_supermasks(model))
    if not found:
        raise RuntimeError(
            "squash: the model carries no block mask. It was never prepared, was squashed already, "
            "or is a copy made before prepare()"
        )
    squash_tensors(model, found)
    return model


def squash_tensors(model: nn.Module, found: list[tuple[str, nn.Module, str, Supermask]]) -> None:
    """Folds some of a model's masks; what can go wrong is found out before the first one.

    Args:
        model: the model that `found` is part of.
        found: FQN, owner, tensor name and mask, as :func:`named_supermasks` yields them.

    Raises:
        RuntimeError: see :func:`squash`.
        ValueError: see :func:`squash`.
    """
    fsdp.reshard(model)
    records = fsdp.sharded_parameters(model)
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
        if bool(mask.full_scores().isnan().any()):
            raise ValueError(
                f"squash: the scores of {fqn!r} contain NaN, so its mask means nothing: training "
                "diverged. Go back to an earlier checkpoint, or call reset_parameters() on the "
                "module to start over"
            )
        if fsdp.is_sharded(parametrizations.original):
            if records is not None and (id(parametrizations), "original") not in records:
                raise RuntimeError(f"squash: fully_shard does not know {fqn!r}. {fsdp.WAY_OUT}")
            for dim in (0, 1):
                fsdp.local_range(parametrizations.original, dim)
    for _fqn, module, name, mask in found:
        parametrizations = module.parametrizations[name]
        mask.fold_(parametrizations.original)
        detach(module, name)
        record = (records or {}).get((id(parametrizations), "original"))
        if record is not None:
            fsdp.move_parameter(record, module, name)
    undo_read_once(model)
    accept_dense_checkpoints(model)
