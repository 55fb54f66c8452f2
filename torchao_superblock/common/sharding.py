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


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient; gathers a DTensor (call it on every rank then)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, without gradient; writing into it writes the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_rows_and_columns(weight: Tensor) -> tuple[range, range]:
    """Which rows and columns of a 2-D weight this rank holds.

    Raises:
        RuntimeError: for a DTensor placed otherwise than by plain sharding and replication.
    """
    return _local_range(weight, 0), _local_range(weight, 1)


def _local_range(weight: Tensor, dim: int) -> range:
    start, stop = 0, weight.shape[dim]
    if not is_dtensor(weight):
        return range(start, stop)
    from torch.distributed.tensor import Replicate, Shard

    for mesh_dim, placement in enumerate(weight.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise RuntimeError(
                f"cannot tell which blocks of a weight placed as {placement} are here"
            )
        if placement.dim % weight.ndim == dim:
            # DTensor shards as torch.chunk does: even pieces, the last ones shorter or empty.
            mesh = weight.device_mesh
            piece = -(-(stop - start) // mesh.size(mesh_dim))
            first = min(start + piece * mesh.get_local_rank(mesh_dim), stop)
            start, stop = first, min(first + piece, stop)
    return range(start, stop)


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
