"""Whether the masked modules still stand where `prepare` found them.

Quantization-aware training, a new head and adapters put other modules in their place. A sparsifier
that went on with the old ones would step and squash masks that the model no longer has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchao_superblock.pruning.attach import equip
from torchao_superblock.pruning.finding import find_mask
from torchao_superblock.pruning.targets import find_module

Links = tuple[tuple[nn.Module, str, nn.Module], ...]
"""`(parent, name, child)` of every step on the way from the model to a masked module, each once."""


def follow(
    model: nn.Module, groups: Sequence[dict[str, Any]], links: Links | None, method: str
) -> Links:
    """Makes the groups hold the modules that are in the model now.

    A module that something wraps is found by itself, one that was replaced by its FQN, if the new
    one wears a mask on the same tensor.

    Args:
        model: the prepared model.
        groups: changed where a module was replaced.
        links: from the last call; checking them takes 0.1 us each. None walks the whole model.
        method: what an error begins with.

    Returns:
        The links to check at the next call.

    Raises:
        RuntimeError: if a masked module is gone, or became the base of an adapter. The groups are
            unchanged then.
    """
    if links is not None and all(
        parent._modules.get(name) is child for parent, name, child in links
    ):
        return links
    paths = {id(module): path for path, module in model.named_modules()}
    masked: dict[nn.Module, str] = {}
    replacements: list[tuple[dict[str, Any], nn.Module]] = []
    for group in groups:
        if find_mask(group["module"], group["tensor_name"]) is None:
            continue  # squash(part) has folded it, and what became of the module since is not ours
        if id(group["module"]) not in paths:
            replacements.append((group, _replacement(model, group, method)))
        masked[group["module"]] = group["tensor_fqn"]
    refuse_adapters(model, masked, method)
    for group, module in replacements:
        group["module"] = module
        equip(module)
    found: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for group in groups:
        parent = model
        for name in filter(None, paths.get(id(group["module"]), "").split(".")):
            child = parent._modules[name]
            found[id(parent), name] = (parent, name, child)
            parent = child
    return tuple(found.values())


def _replacement(model: nn.Module, group: dict[str, Any], method: str) -> nn.Module:
    module = find_module(model, group["tensor_fqn"])
    if module is not None and find_mask(module, group["tensor_name"]) is not None:
        return module
    kind = "nothing" if module is None else f"a {type(module).__name__} without a block mask"
    raise RuntimeError(
        f"{method}: {group['tensor_fqn']!r} was prepared, and {kind} stands in its place now, so that "
        "its mask is no longer part of the model. Replace modules before prepare(), or fold the masks "
        "that are left with squash(model) and prepare the model again with a new sparsifier"
    )


def refuse_adapters(model: nn.Module, masked: Mapping[nn.Module, str], method: str) -> None:
    """Raises where a masked module is the `base_layer` of an adapter, as `peft` makes them.

    Merging adds to the weight that was read, which a mask computes anew at the next read.

    Args:
        model: is not changed.
        masked: masked modules, or those about to be, and the FQNs of their tensors.
        method: what the error begins with.

    Raises:
        RuntimeError: names the tensor and the adapter.
    """
    for adapter in model.modules():
        base = adapter._modules.get("base_layer")
        if base is None or not callable(getattr(adapter, "merge", None)):
            continue
        for module in base.modules():
            if module in masked:
                raise RuntimeError(
                    f"{method}: {masked[module]!r} is the base of an adapter "
                    f"({type(adapter).__name__}). Merged into a weight that a mask computes at each "
                    "read, the adapter would be lost. Fold the masks before adding adapters (peft: "
                    "unload() takes them off again), or merge them before prepare()"
                )
