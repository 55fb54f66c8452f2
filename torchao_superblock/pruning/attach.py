"""How a block mask sits on a module.

`torch.nn.utils.parametrize` supplies the mechanism. What is added to it here:

* `reset_parameters()` that reaches the weight under the mask, and the scores.
* Pickling, which parametrize refuses.
* Removal from one copy: deep copies share their parametrized class, so parametrize's own removal
  takes the property away from all of them.
* A property that evaluates the mask once a forward (see `reading.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning.masks.base import BlockMask, find_mask, masks_of
from torchao_superblock.pruning.reading import RAW, read_once, reader, rebuild_reader, scope

_RESETS = ("reset_parameters", "_reset_parameters")


def attach(module: nn.Module, tensor_name: str, mask: BlockMask) -> None:
    """Registers the mask on `module.<tensor_name>`; the Parameter stays the same object."""
    if type(module).forward is not nn.Linear.forward:  # nn.Linear reads its weight just once
        read_once(module)
    mask.followers = _names_after(module, tensor_name)
    # `unsafe` skips a trial forward; there is nothing to find out, and a meta weight has no values.
    parametrize.register_parametrization(module, tensor_name, mask, unsafe=True)
    _equip_class(module, [tensor_name])


def detach(module: nn.Module, tensor_name: str) -> None:
    """Removes the mask; the weight under it becomes `module.<tensor_name>` again, unmasked."""
    mask = find_mask(module, tensor_name)
    cls = type(module)
    # Deep copies share this class, and the property is about to be deleted from it.
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    _move_before(module, tensor_name, mask.followers if mask is not None else ())
    if parametrize.is_parametrized(module) and not masks_of(module):
        for name in type(module).__dict__.get("_equipped", ()):
            delattr(type(module), name)


def _names_after(module: nn.Module, tensor_name: str) -> tuple[str, ...]:
    names = list(module._parameters)
    return tuple(names[names.index(tensor_name) + 1 :])


def _move_before(module: nn.Module, tensor_name: str, followers: tuple[str, ...]) -> None:
    """Restores a parameter's place: the order of `parameters()` is what optimizer states go by."""
    parameters = module._parameters
    later = [name for name in parameters if name != tensor_name]
    while later and later[0] not in followers:
        later.pop(0)
    for name in later:
        parameters[name] = parameters.pop(name)


def _equip_class(module: nn.Module, tensor_names: list[str]) -> None:
    """Adds to the class that parametrize made for this module what it lacks."""
    cls = type(module)
    base = cls.__bases__[0]
    for name in tensor_names:
        evaluate = cls.__dict__[name]
        setattr(cls, name, property(reader(name, evaluate.fget), evaluate.fset))
    equipment: dict[str, Any] = {
        "__reduce_ex__": _reduce_masked,
        "register_parameter": _assigning(base.register_parameter),
    }
    for name in _RESETS:
        if hasattr(base, name):
            equipment[name] = _resetting(getattr(base, name))
    for name, value in equipment.items():
        setattr(cls, name, value)
    cls._equipped = (*equipment, "_equipped")


def _assigning(register: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(register)
    def assign_or_register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # What `module.weight = nn.Parameter(...)` ends in: its values become the weight under the mask.
        if param is not None and name in masks_of(self):
            setattr(self, name, param.detach())
        else:
            register(self, name, param)

    return assign_or_register


def _resetting(reset: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reset)
    def reset_weight_then_scores(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        masks = masks_of(self)
        # Initialisers write in place: they have to see the weight itself, not a masked copy.
        with scope(((self, name) for name in masks), RAW):
            result = reset(self, *args, **kwargs)
        for name, mask in masks.items():
            mask.reset_parameters(self.parametrizations[name].original)
        return result

    return reset_weight_then_scores


def _reduce_masked(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    reads = "_reads_once" in base.__dict__
    names, masked = list(self.parametrizations), list(masks_of(self))
    return _rebuild, (base.__bases__[0] if reads else base, reads, names, masked), self.__dict__


def _rebuild(base: type[nn.Module], reads: bool, names: list[str], masked: list[str]) -> nn.Module:
    """What pickle calls to make an empty module whose state it then fills in."""
    module = rebuild_reader(base) if reads else base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _equip_class(module, masked)
    return module
