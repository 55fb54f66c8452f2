"""Whether a tensor or a module is sharded, without importing what shards."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

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


def refuse_released(tensor: Tensor, shape: tuple[int, ...], where: str, way_out: str = "") -> None:
    """Raises if the values of a tensor are elsewhere at the moment; reading them would be a read of no memory.

    Between forwards, `FullyShardedDataParallel` and DeepSpeed's ZeRO-3 leave a tensor without memory, or one of
    another shape, in the place of a parameter.

    Args:
        tensor: is not read.
        shape: what it has when it is there.
        where: what the error begins with.
        way_out: how the error ends; by default with the public ways to have the values here for a while.

    Raises:
        RuntimeError: if its values are not here.
    """
    if is_dtensor(tensor) or tensor.is_meta:
        return
    needed = tensor.numel() * tensor.element_size()
    if tuple(tensor.shape) == shape and tensor.untyped_storage().nbytes() >= needed:
        return
    raise RuntimeError(
        f"{where} is sharded and released from memory (FullyShardedDataParallel, DeepSpeed ZeRO-3). "
        + (
            way_out
            or "Call this on every rank inside FullyShardedDataParallel.summon_full_params(model), or "
            "deepspeed.zero.GatheredParameters(model.parameters())"
        )
    )


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
