"""How a block mask sits on a module.

`torch.nn.utils.parametrize` supplies the mechanism. What is added to it here:

* `reset_parameters()` that reaches the weight under the mask, and the scores.
* Reads that notice what is written into their results.
* Pickling, which parametrize refuses, and copies of modules that keep what they read.
* Removal from one copy: deep copies share their parametrized class, so parametrize's own removal
  takes the property away from all of them.
* A property that evaluates the mask once a forward (see `reading.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning.finding import find_mask, masks_of
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.reading import RAW, read_once, reader, rebuild_reader, scope
from torchao_superblock.pruning.written import forget_lost_write, read_watched

_RESETS = ("reset_parameters", "_reset_parameters")


class MaskedTensors(parametrize.ParametrizationList):
    """Evaluates a mask that has no other parametrization beside it with a quarter of the host's time."""

    def forward(self) -> Tensor:
        """The masked weight."""
        if len(self._modules) != 1:
            return super().forward()
        return self._modules["0"](self.original)

    def _get_name(self) -> str:
        return parametrize.ParametrizationList.__name__


def attach(module: nn.Module, tensor_name: str, mask: BlockMask) -> None:
    """Registers the mask on `module.<tensor_name>`; the Parameter stays the same object."""
    if type(module).forward is not nn.Linear.forward:  # nn.Linear reads its weight just once
        read_once(module)
    mask.followers = _names_after(module, tensor_name)
    if parametrize.is_parametrized(module):
        _own_class(module)
    # `unsafe` skips a trial forward; there is nothing to find out, and a meta weight has no values.
    parametrize.register_parametrization(module, tensor_name, mask, unsafe=True)
    equip(module)


def equip(module: nn.Module) -> None:
    """Gives the class of a masked module what parametrize alone leaves out; again is allowed."""
    masked = list(masks_of(module))
    for name in masked:
        parametrizations = module.parametrizations[name]
        if type(parametrizations) is parametrize.ParametrizationList and parametrizations.is_tensor:
            parametrizations.__class__ = MaskedTensors
    _equip_class(module, masked)


def detach(module: nn.Module, tensor_name: str) -> None:
    """Removes the mask; the weight under it becomes `module.<tensor_name>` again, unmasked."""
    mask = find_mask(module, tensor_name)
    _own_class(module)
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    _move_before(module, tensor_name, mask.followers if mask is not None else ())
    forget_lost_write(module, tensor_name)
    if parametrize.is_parametrized(module) and not masks_of(module):
        for name, before in type(module).__dict__.get("_equipped", {}).items():
            if before is None:
                delattr(type(module), name)
            else:
                setattr(type(module), name, before)


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module a copy of its class, to which properties can be added or not.

    Deep copies share the class; and as it stays as it was, going back to it undoes everything.
    """
    cls = type(module)
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)


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
        if not hasattr(evaluate.fget, "_reads_mask"):
            read = reader(name, _watching(name, evaluate.fget))
            read._reads_mask = True
            setattr(cls, name, property(read, _writer(name, evaluate.fset)))
    equipment: dict[str, Any] = {
        "__reduce_ex__": _reduce_masked,
        "register_parameter": _assigning(base.register_parameter),
    }
    for name in _RESETS:
        if hasattr(base, name):
            equipment[name] = _resetting(getattr(base, name))
    if "__deepcopy__" in cls.__dict__:  # parametrize's; a class that has its own keeps it
        equipment["__deepcopy__"] = _copy_masked
    before = {name: cls.__dict__.get(name) for name in (*equipment, "_equipped")}
    for name, value in equipment.items():
        setattr(cls, name, value)
    if "_equipped" not in cls.__dict__:
        cls._equipped = before


def _assigning(register: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(register)
    def assign_or_register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # What `module.weight = nn.Parameter(...)` ends in: its values become the weight under the mask.
        if param is not None and name in masks_of(self):
            setattr(self, name, param.detach())
        else:
            register(self, name, param)

    return assign_or_register


def _watching(
    tensor_name: str, evaluate: Callable[[nn.Module], Tensor]
) -> Callable[[nn.Module], Tensor]:
    return lambda module: read_watched(module, tensor_name, evaluate)


def _writer(
    tensor_name: str, assign: Callable[[nn.Module, Tensor], None]
) -> Callable[[nn.Module, Tensor], None]:
    def write(self: nn.Module, value: Tensor) -> None:
        assign(self, value)
        forget_lost_write(self, tensor_name)

    return write


def _resetting(reset: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reset)
    def reset_weight_then_scores(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        masks = masks_of(self)
        # Initialisers write in place: they have to see the weight itself, not a masked copy.
        with scope(((self, name) for name in masks), RAW):
            result = reset(self, *args, **kwargs)
        for name, mask in masks.items():
            mask.reset_parameters(self.parametrizations[name].original)
            forget_lost_write(self, name)
        return result

    return reset_weight_then_scores


def _reduce_masked(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    reads = "_reads_once" in base.__dict__
    names, masked = list(self.parametrizations), list(masks_of(self))
    state = base.__getstate__(self)  # parametrize's own refuses
    if isinstance(state, dict):
        state = {name: _without_history(value) for name, value in state.items()}
    return _rebuild, (base.__bases__[0] if reads else base, reads, names, masked), state


def _without_history(value: Any) -> Any:
    """Weights that a module read and keeps, as recurrent ones do, without the graph that made them."""
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach()
    if type(value) is list and any(isinstance(v, Tensor) and not v.is_leaf for v in value):
        return [_without_history(item) for item in value]
    return value


def _copy_masked(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    rebuild, arguments, state = self.__reduce_ex__(4)
    copied = memo[id(self)] = rebuild(*arguments)
    copied.__setstate__(copy.deepcopy(state, memo))
    return copied


def _rebuild(base: type[nn.Module], reads: bool, names: list[str], masked: list[str]) -> nn.Module:
    """What pickle calls to make an empty module whose state it then fills in."""
    module = rebuild_reader(base) if reads else base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _equip_class(module, masked)
    return module
