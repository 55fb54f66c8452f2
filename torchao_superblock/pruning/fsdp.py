"""What folding masks has to know about FSDP2.

It shards the weights, it remembers where to register them (a weight under a mask is
`linear.parametrizations.weight.original` and afterwards `linear.weight`), and it puts a class of its
own in front of a module's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

WAY_OUT = (
    "Gather the state dict instead (torch.distributed.checkpoint.state_dict.get_model_state_dict "
    "with full_state_dict=True), load it into a prepared copy of the model that is not sharded, and "
    "squash that copy"
)


def local_range(weight: Any, dim: int) -> range:
    """Which rows (dim 0) or columns (dim 1) of a DTensor this rank holds.

    Raises:
        RuntimeError: for a placement other than plain sharding and replication.
    """
    from torch.distributed.tensor import Replicate, Shard

    start, stop = 0, weight.shape[dim]
    for mesh_dim, placement in enumerate(weight.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise RuntimeError(
                f"cannot fold a block mask into a weight placed as {placement}. {WAY_OUT}"
            )
        if placement.dim % weight.ndim == dim:
            # DTensor shards as torch.chunk does: even pieces, the last ones shorter or empty.
            mesh = weight.device_mesh
            piece = -(-(stop - start) // mesh.size(mesh_dim))
            first = min(start + piece * mesh.get_local_rank(mesh_dim), stop)
            start, stop = first, min(first + piece, stop)
    return range(start, stop)


def reshard(model: nn.Module) -> None:
    """Makes the sharded parameters, the ones that persist, the ones registered in the modules."""
    for module in _fsdp_modules(model):
        module.reshard()


def sharded_parameters(model: nn.Module) -> dict[tuple[int, str], Any] | None:
    """FSDP2's records of where its parameters are registered, by module id and name.

    Returns:
        None if FSDP2 is not used. A version that keeps its records elsewhere looks as if it had
        none of them, which :func:`torchao_superblock.pruning.squash` reports.
    """
    records = None
    for module in _fsdp_modules(model):
        records = records or {}
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)])
        for group in groups:
            for record in getattr(group, "fsdp_params", ()):
                info = getattr(record, "_module_info", None)
                if info is not None:
                    records[id(info.module), info.param_name] = record
    return records


def move_parameter(record: Any, module: nn.Module, name: str) -> None:
    """Tells FSDP2 that a parameter is registered in another module now."""
    record._module_info.module = module
    record._module_info.param_name = name
    record._post_load_hook_handle.remove()
    record._post_load_hook_handle = module.register_load_state_dict_post_hook(
        lambda *_: record.reset_sharded_param()
    )


def step_out_of_wrapper(module: nn.Module, attribute: str) -> type | None:
    """Takes `class Wrapper(Mixin, Cls)` off, where `Cls` is the class that defines `attribute`."""
    cls = type(module)
    if attribute in cls.__dict__ or attribute not in cls.__bases__[-1].__dict__:
        return None
    module.__class__ = cls.__bases__[-1]
    return cls


def step_into_wrapper(module: nn.Module, wrapper: type | None) -> None:
    """Puts it back around the class that the module has by now."""
    if wrapper is None:
        return
    own = {k: v for k, v in wrapper.__dict__.items() if k not in ("__dict__", "__weakref__")}
    name = wrapper.__name__.replace(wrapper.__bases__[-1].__name__, type(module).__name__)
    module.__class__ = type(name, (*wrapper.__bases__[:-1], type(module)), own)


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    fsdp_module = getattr(module, "FSDPModule", None)
    if fsdp_module is not None:
        for child in model.modules():
            if isinstance(child, fsdp_module):
                yield child
