"""A dense checkpoint does not fit a prepared model: an error before any tensor is overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from torchao_superblock.pruning.masks.base import has_mask, named_masks


def refuse_dense_checkpoints(model: nn.Module) -> None:
    """Makes `load_state_dict` raise for a checkpoint of the unmasked model, before it writes.

    Every module above a mask is given the check: a load may start at any of them, and reaches the
    mask only after it has overwritten what comes before.
    """
    for module in model.modules():
        if has_mask(module) and not any(True for _ in _checks(module)):
            module.register_load_state_dict_pre_hook(_check_checkpoint)


def accept_dense_checkpoints(model: nn.Module) -> None:
    """Removes the check where no mask is left."""
    for module in model.modules():
        if not has_mask(module):
            for key in list(_checks(module)):
                del module._load_state_dict_pre_hooks[key]


def _checks(module: nn.Module) -> Iterator[int]:
    for key, hook in module._load_state_dict_pre_hooks.items():
        if getattr(hook, "hook", hook) is _check_checkpoint:
            yield key


def _check_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    dense = []
    for fqn, _owner, name, _mask in named_masks(module):
        path = (prefix + fqn).removesuffix(name)
        if (
            path + name in state_dict
            and f"{path}parametrizations.{name}.original" not in state_dict
        ):
            dense.append(path + name)
    if dense:
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        raise RuntimeError(
            f"the checkpoint holds a dense {dense[0]!r}{more}, but this model is prepared: its "
            f"weights are stored as 'parametrizations.<name>.original' beside their scores. Load "
            "the dense checkpoint into the model before prepare(), or fold the masks first with "
            "squash(model). Nothing was loaded."
        )
