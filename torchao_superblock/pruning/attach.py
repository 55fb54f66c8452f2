"""How a block mask sits on a module.

`torch.nn.utils.parametrize` supplies the mechanism. What is added to it here:

* `reset_parameters()` that reaches the weight under the mask, and the scores.
* Pickling, which parametrize refuses.
* Removal from one copy: deep copies share their parametrized class, so parametrize's own removal
  takes the property away from all of them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning.masks.base import BlockMask, find_mask, masks_of

_RESETS = ("reset_parameters", "_reset_parameters")


def attach(module: nn.Module, tensor_name: str, mask: BlockMask) -> None:
    """Registers the mask on `module.<tensor_name>`; the Parameter stays the same object."""
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
        setattr(cls, name, property(_reader(name, evaluate.fget), evaluate.fset))
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


_raw = threading.local()
"""Whose reads return the weight under the mask, by thread: `(id of the module, tensor name)`."""


@contextlib.contextmanager
def _reading_raw(module: nn.Module, tensor_names: Iterable[str]) -> Iterator[None]:
    """Within the block, reads of these tensors return the weight under the mask."""
    keys = _raw.__dict__.setdefault("keys", set())
    opened = {(id(module), name) for name in tensor_names} - keys
    keys |= opened
    try:
        yield
    finally:
        keys -= opened


def _reader(tensor_name: str, evaluate: Callable[[nn.Module], Tensor]) -> Callable[..., Tensor]:
    def read(self: nn.Module) -> Tensor:
        keys = getattr(_raw, "keys", None)
        if keys and (id(self), tensor_name) in keys:
            return self.parametrizations[tensor_name].original
        return evaluate(self)

    return read


def _resetting(reset: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reset)
    def reset_weight_then_scores(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        masks = masks_of(self)
        # Initialisers write in place: they have to see the weight itself, not a masked copy.
        with _reading_raw(self, masks):
            result = reset(self, *args, **kwargs)
        for name, mask in masks.items():
            mask.reset_parameters(self.parametrizations[name].original)
        return result

    return reset_weight_then_scores


def _reduce_masked(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    return _rebuild_masked, (base, list(self.parametrizations), list(masks_of(self))), self.__dict__


def _rebuild_masked(base: type[nn.Module], names: list[str], masked: list[str]) -> nn.Module:
    """What pickle calls to make an empty module whose state it then fills in."""
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _equip_class(module, masked)
    return module
