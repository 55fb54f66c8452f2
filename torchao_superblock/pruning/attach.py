"""How a Supermask sits on a module: attaching, reading the weight once a forward, folding it away.

`torch.nn.utils.parametrize` supplies the mechanism. What is added to it here:

* One evaluation a forward. A parametrized weight is recomputed at every read, and
  `nn.MultiheadAttention` reads its projection three times. Forward hooks would be the obvious place
  to share it, but they turn `nn.TransformerEncoderLayer`'s fast path off; so the classes of the
  modules that read masked weights get a forward that opens a scope, and the property looks there.
* `reset_parameters()` that reaches the weight under the mask and the scores.
* Pickling, which parametrize refuses.
* Removal from one copy: deep copies share their parametrized class, so parametrize's own removal
  takes the property away from all of them.
* An error for a dense checkpoint before any tensor is overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning.supermask import Supermask

_RAW = object()
_UNREAD = object()
_reads = threading.local()

_RESETS = ("reset_parameters", "_reset_parameters")


# -------------------------------------------------------------------------------------------------
# What is attached where
# -------------------------------------------------------------------------------------------------


def find_supermask(module: nn.Module, tensor_name: str) -> Supermask | None:
    """The Supermask on a tensor of this module, or None."""
    if not parametrize.is_parametrized(module, tensor_name):
        return None
    for parametrization in module.parametrizations[tensor_name]:
        if isinstance(parametrization, Supermask):
            return parametrization
    return None


def supermasks_of(module: nn.Module) -> dict[str, Supermask]:
    """Supermasks on the tensors of this very module, by tensor name."""
    if not parametrize.is_parametrized(module):
        return {}
    masks = {name: find_supermask(module, name) for name in module.parametrizations}
    return {name: mask for name, mask in masks.items() if mask is not None}


def named_supermasks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Supermask]]:
    """Every Supermask in a model.

    Yields:
        The FQN of the masked tensor, the module that owns it, the tensor's name there, and the mask.
    """
    for path, module in model.named_modules():
        for name, mask in supermasks_of(module).items():
            yield (f"{path}.{name}" if path else name), module, name, mask


def attach(module: nn.Module, tensor_name: str, supermask: Supermask) -> None:
    """Registers the mask on `module.<tensor_name>`; the Parameter stays the same object."""
    if type(module).forward is not nn.Linear.forward:  # nn.Linear reads its weight just once
        read_once(module)
    supermask.followers = _names_after(module, tensor_name)
    # `unsafe` skips a trial forward; there is nothing to find out, and a meta weight has no values.
    parametrize.register_parametrization(module, tensor_name, supermask, unsafe=True)
    _equip_class(module, [tensor_name])


def detach(module: nn.Module, tensor_name: str) -> None:
    """Removes the mask; the weight under it becomes `module.<tensor_name>` again, unmasked."""
    supermask = find_supermask(module, tensor_name)
    wrapper = _step_out_of_wrapper(module, tensor_name)
    cls = type(module)
    # Deep copies share this class, and the property is about to be deleted from it.
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    _move_before(module, tensor_name, supermask.followers if supermask is not None else ())
    if parametrize.is_parametrized(module) and not supermasks_of(module):
        for name in type(module).__dict__.get("_equipped", ()):
            delattr(type(module), name)
    _step_into_wrapper(module, wrapper)


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
    equipment: dict[str, Any] = {"__reduce_ex__": _reduce_masked}
    for name in _RESETS:
        if hasattr(base, name):
            equipment[name] = _resetting(getattr(base, name))
    for name, value in equipment.items():
        setattr(cls, name, value)
    cls._equipped = (*equipment, "_equipped")


# -------------------------------------------------------------------------------------------------
# One evaluation a forward
# -------------------------------------------------------------------------------------------------


def read_once(module: nn.Module) -> None:
    """Gives the module a class whose forward evaluates each masked weight it reads only once.

    A module that somebody else has parametrized keeps its class: there the weight is evaluated at
    every read, which is slower and just as right.
    """
    cls = type(module)
    if getattr(cls, "_reads_once", False) or parametrize.is_parametrized(module):
        return
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduce_reader,
        "forward": _sharing_forward(cls.forward),
        "_reads_once": True,
    }
    module.__class__ = type(cls.__name__, (cls,), namespace)


def read_masked_children_once(model: nn.Module) -> None:
    """Does so for the modules of torch.nn that read weights of their children."""
    for module in model.modules():
        if isinstance(module, _READERS) and any(True for _ in _masked_reads(module, True)):
            read_once(module)


def undo_read_once(model: nn.Module) -> None:
    """Gives the modules without a mask below them their own class back."""
    for module in model.modules():
        if not getattr(type(module), "_reads_once", False) or _has_mask(module):
            continue
        wrapper = _step_out_of_wrapper(module, "_reads_once")
        if "_reads_once" in type(module).__dict__:
            module.__class__ = type(module).__bases__[0]
        _step_into_wrapper(module, wrapper)


_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def _masked_reads(module: nn.Module, all_modes: bool) -> Iterator[tuple[nn.Module, str]]:
    """The masked tensors that this module's forward reads itself."""
    for name in supermasks_of(module):
        yield module, name
    children: tuple[str, ...] = ()
    if isinstance(module, nn.MultiheadAttention):
        children = ("out_proj",)
    elif all_modes or not torch.is_grad_enabled():
        # These look at their children's weights to choose the fast path, which exists without
        # gradients only. With gradients a weight must be evaluated inside the child that uses it:
        # activation checkpointing may start there, and replays what it saw.
        if isinstance(module, nn.TransformerEncoderLayer):
            children = ("self_attn", "linear1", "linear2")
        elif isinstance(module, nn.TransformerEncoder) and len(module.layers):
            yield from _masked_reads(module.layers[0], all_modes)
    for name in children:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            yield from _masked_reads(child, all_modes)


def _sharing_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def sharing_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler merges equal evaluations by itself
            return forward(self, *args, **kwargs)
        with _scope(_masked_reads(self, False), _UNREAD):
            return forward(self, *args, **kwargs)

    return sharing_forward


@contextlib.contextmanager
def _scope(tensors: Iterator[tuple[nn.Module, str]], value: object) -> Iterator[None]:
    """Marks tensors for :func:`_reader` until the block is left, by an exception too."""
    memo = _reads.__dict__.setdefault("memo", {})
    opened = []
    try:
        for module, name in tensors:
            key = (id(module), name)
            if key not in memo:  # else an enclosing scope shares it already
                memo[key] = value
                opened.append(key)
        yield
    finally:
        for key in opened:
            del memo[key]


def _reader(tensor_name: str, evaluate: Callable[[nn.Module], Tensor]) -> Callable[..., Tensor]:
    def read(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():
            return evaluate(self)
        memo = getattr(_reads, "memo", None)
        key = (id(self), tensor_name)
        if not memo or key not in memo:
            return evaluate(self)
        found = memo[key]
        if found is _RAW:
            return self.parametrizations[tensor_name].original
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if found is not _UNREAD and found[0] == mode:
            return found[1]
        weight = evaluate(self)
        memo[key] = (mode, weight)
        return weight

    return read


# -------------------------------------------------------------------------------------------------
# Reset and pickling
# -------------------------------------------------------------------------------------------------


def _resetting(reset: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reset)
    def reset_weight_then_scores(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        masks = supermasks_of(self)
        # Initialisers write in place: they have to see the weight itself, not a masked copy.
        with _scope(((self, name) for name in masks), _RAW):
            result = reset(self, *args, **kwargs)
        for name, mask in masks.items():
            mask.reset_parameters(self.parametrizations[name].original)
        return result

    return reset_weight_then_scores


def _reduce_masked(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    reads = bool(getattr(base, "_reads_once", False))
    names = list(self.parametrizations)
    masked = list(supermasks_of(self))
    return _rebuild, (base.__bases__[0] if reads else base, reads, names, masked), self.__dict__


def _reduce_reader(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuild, (type(self).__bases__[0], True, [], []), self.__dict__


def _rebuild(base: type[nn.Module], reads: bool, names: list[str], masked: list[str]) -> nn.Module:
    """What pickle calls to make an empty module whose state it then fills in."""
    module = base.__new__(base)
    if reads:
        read_once(module)
    if names:
        parametrize._inject_new_class(module)
        for name in names:
            parametrize._inject_property(module, name)
        _equip_class(module, masked)
    return module


# -------------------------------------------------------------------------------------------------
# Wrappers that put a class of their own in front (FSDP2)
# -------------------------------------------------------------------------------------------------


def _step_out_of_wrapper(module: nn.Module, attribute: str) -> type | None:
    """Takes `class Wrapper(Mixin, Cls)` off, where `Cls` is the class that defines `attribute`."""
    cls = type(module)
    if attribute in cls.__dict__ or attribute not in cls.__bases__[-1].__dict__:
        return None
    module.__class__ = cls.__bases__[-1]
    return cls


def _step_into_wrapper(module: nn.Module, wrapper: type | None) -> None:
    """Puts it back around the class that the module has by now."""
    if wrapper is None:
        return
    own = {k: v for k, v in wrapper.__dict__.items() if k not in ("__dict__", "__weakref__")}
    name = wrapper.__name__.replace(wrapper.__bases__[-1].__name__, type(module).__name__)
    module.__class__ = type(name, (*wrapper.__bases__[:-1], type(module)), own)


# -------------------------------------------------------------------------------------------------
# Dense checkpoints
# -------------------------------------------------------------------------------------------------


def refuse_dense_checkpoints(model: nn.Module) -> None:
    """Makes `load_state_dict` raise for a checkpoint of the unmasked model, before it writes.

    Every module above a mask is given the check: a load may start at any of them, and reaches the
    mask only after it has overwritten what comes before.
    """
    for module in model.modules():
        if _has_mask(module) and not any(True for _ in _checks(module)):
            module.register_load_state_dict_pre_hook(_check_checkpoint)


def accept_dense_checkpoints(model: nn.Module) -> None:
    """Removes the check where no mask is left."""
    for module in model.modules():
        if not _has_mask(module):
            for key in list(_checks(module)):
                del module._load_state_dict_pre_hooks[key]


def _checks(module: nn.Module) -> Iterator[int]:
    for key, hook in module._load_state_dict_pre_hooks.items():
        if getattr(hook, "hook", hook) is _check_checkpoint:
            yield key


def _check_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    dense = []
    for fqn, _owner, name, _mask in named_supermasks(module):
        path = (prefix + fqn).removesuffix(name)
        if (
            path + name in state_dict
            and f"{path}parametrizations.{name}.original" not in state_dict
        ):
            dense.append(path + name)
    if dense:
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        raise RuntimeError(
            f"the checkpoint holds a dense {dense[0]!r}{more}, but this model is prepared: its "
            f"weights are stored as 'parametrizations.<name>.original' beside their scores. Load "
            "the dense checkpoint into the model before prepare(), or fold the masks first with "
            "squash(model). Nothing was loaded."
        )


def _has_mask(module: nn.Module) -> bool:
    return any(isinstance(child, Supermask) for child in module.modules())
