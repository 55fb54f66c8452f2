"""Replaces squashed modules by ones of another type: what `convert` of a sparsifier does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping

from torch import nn

from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.modules import hand_over_hooks
from torchao_superblock.common.names import without_wrapper_prefixes


def replace_squashed(
    module: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]],
    squashed: Mapping[str, weakref.ref[nn.Module]],
    inplace: bool,
) -> nn.Module:
    """Replaces squashed modules of the types in `mapping` by `mapping[type].from_dense(module)`.

    Args:
        module: the squashed model, a part of it, or a copy.
        mapping: from module type to replacement.
        squashed: FQN of each folded tensor -> the module that it was folded in.
        inplace: change `module` rather than a deep copy of it.

    Returns:
        The converted model; a new module if `module` itself is replaced.

    Raises:
        ValueError: if no squashed module in `module` has a type in `mapping`, or what `from_dense`
            raises. `module` is unchanged after an error.
    """
    names = {fqn.rpartition(".")[0] for fqn in squashed}
    known = {id(ref()) for ref in squashed.values() if ref() is not None}
    convertible = [
        (path, child)
        for path, child in module.named_modules(remove_duplicate=False)
        if type(child) in mapping
    ]
    # The very modules; in a copy those of the same name; in a wrapped copy but for the prefix.
    targets = (
        [(path, child) for path, child in convertible if id(child) in known]
        or [(path, child) for path, child in convertible if path in names]
        or [(path, child) for path, child in convertible if without_wrapper_prefixes(path) in names]
    )
    if not targets:
        kinds = ", ".join(kind.__name__ for kind in mapping)
        raise ValueError(
            f"convert: no module among {sorted(names)} in this {type(module).__name__} is of a "
            f"type in mapping ({kinds})"
        )
    converted: dict[int, nn.Module] = {}
    for path, child in targets:
        if id(child) not in converted:
            source = child if inplace else copy.deepcopy(child)
            try:
                new = mapping[type(child)].from_dense(source)  # type: ignore[attr-defined]
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"convert: {path!r}: {error}") from error
            _carry_over(source, new)
            converted[id(child)] = new
    if id(module) in converted:
        return converted[id(module)]
    # Copying with the converted modules already in the memo neither copies the dense weights
    # nor loses the sharing between modules.
    result = module if inplace else copy.deepcopy(module, dict(converted))
    with all_or_nothing(result):
        for path, child in targets:
            parent, _, name = path.rpartition(".")
            result.get_submodule(parent)._modules[name] = converted[id(child)]
    return result


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks, settings that were left on the module, and mode."""
    hand_over_hooks(old, new)
    if hasattr(old, "sparse_params"):
        new.sparse_params = old.sparse_params
    new.train(old.training)
