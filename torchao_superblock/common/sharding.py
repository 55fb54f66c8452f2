"""Whether a tensor or a module is sharded, without importing what shards."""

from __future__ import annotations

import sys

import torch
from torch import nn

GATHER_FIRST = (
    "Gather the state dict instead (torch.distributed.checkpoint.state_dict.get_model_state_dict "
    "with full_state_dict=True), load it into a prepared copy of the model that is not sharded, and "
    "squash that copy"
)
"""The public way from a sharded model to a squashed one."""


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor."""
    # Importing DTensor takes longer than the rest of this package; without it there is none.
    if type(value) in (torch.Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def sharding_wrapper(model: nn.Module, module: nn.Module) -> str | None:
    """What shards the parameters of a module: `"fully_shard"`, `"FullyShardedDataParallel"` or None.

    Args:
        model: the model, or the part of it, to look at.
        module: a module in it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    for parent in model.modules():
        if isinstance(parent, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) and any(
            child is module for child in parent.modules()
        ):
            kind = isinstance(parent, fsdp.FSDPModule)
            return "fully_shard" if kind else "FullyShardedDataParallel"
    return None
