"""Modules of a model: who owns a parameter, which hooks a module wears, and putting another in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.common.names import without_compile_prefix

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Where `nn.Module` keeps what watches its calls; the last one is a flag."""


def has_hooks(module: nn.Module) -> bool:
    """Whether anything watches what goes into or comes out of a module."""
    # The other dicts say more of hooks that these hold. One by one: some modules ask at each call.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks of `old`: the dicts themselves, so that handles which callers hold keep working."""
    for name in HOOKS:
        setattr(new, name, getattr(old, name))


def copy_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks of `old`, which goes on being used by itself."""
    for name in HOOKS:
        setattr(new, name, copy.copy(getattr(old, name)))


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in place of old ones wherever these are registered, each with the hooks of the old one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    for old, new in replacements.items():
        hand_over_hooks(old, new)


def parameter_owners(
    model: nn.Module, clean: Callable[[str], str] = without_compile_prefix
) -> dict[tuple[object, int], list[str]]:
    """Storage address -> FQNs of the parameters that live there; a module registered twice counts once.

    Args:
        model: where to look.
        clean: makes the FQN that is reported of the one in the model.
    """
    owners: dict[tuple[object, int], list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fqn = f"{prefix}.{name}" if prefix else name
                owners.setdefault(storage_address(parameter), []).append(clean(fqn))
    return owners


def storage_address(parameter: Tensor) -> tuple[object, int]:
    """Where a Parameter lives; one without memory of its own (meta, sharded, empty) is known by its identity alone."""
    try:
        address = parameter.data_ptr()
    except (RuntimeError, ValueError):
        address = 0
    return (parameter.device, address) if address else ("identity", id(parameter))


def block_masks_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The block masks that the tensors of this module (children not counted) still wear: `(tensor name, mask)`.

    Known by the attribute `_is_block_mask`, so that whoever only has to notice them needs no mask's class.
    """
    if parametrize.is_parametrized(module):
        for name, parametrizations in module.parametrizations.items():
            for parametrization in parametrizations:
                if getattr(parametrization, "_is_block_mask", False):
                    yield name, parametrization
