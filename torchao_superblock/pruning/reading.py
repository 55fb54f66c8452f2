"""One evaluation of a masked weight a forward.

A parametrized weight is recomputed at every read, and `nn.MultiheadAttention` reads its projection
three times and more (without this, a masked ViT-B/16 at batch 128 in bfloat16 takes 9 to 17 % longer
to evaluate on an H200). Forward hooks would be the obvious place to share it, but they turn
`nn.TransformerEncoderLayer`'s fast path off. So the modules that read masked weights get a class
whose forward opens a scope, and the property of the weight looks there. Nothing outlives the
forward: a copy or a pickle finds no weight, and gradient checkpointing replays what it saw.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning.finding import has_mask, masks_of

RAW = object()
"""Marks a tensor whose reads return the weight under the mask."""

_UNREAD = object()
_reads = threading.local()


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
        "__reduce_ex__": _reduce,
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
        if not getattr(type(module), "_reads_once", False) or has_mask(module):
            continue
        if "_reads_once" in type(module).__dict__:
            module.__class__ = type(module).__bases__[0]


_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def _masked_reads(module: nn.Module, all_modes: bool) -> Iterator[tuple[nn.Module, str]]:
    """The masked tensors that this module's forward reads itself."""
    for name in masks_of(module):
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
        with scope(_masked_reads(self, False), _UNREAD):
            return forward(self, *args, **kwargs)

    return sharing_forward


@contextlib.contextmanager
def scope(tensors: Iterable[tuple[nn.Module, str]], value: object) -> Iterator[None]:
    """Marks tensors for :func:`reader` until the block is left, by an exception too."""
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


def reader(tensor_name: str, evaluate: Callable[[nn.Module], Tensor]) -> Callable[..., Tensor]:
    def read(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():
            return evaluate(self)
        memo = getattr(_reads, "memo", None)
        key = (id(self), tensor_name)
        if not memo or key not in memo:
            return evaluate(self)
        found = memo[key]
        if found is RAW:
            return self.parametrizations[tensor_name].original
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if found is not _UNREAD and found[0] == mode:
            return found[1]
        weight = evaluate(self)
        memo[key] = (mode, weight)
        return weight

    return read


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = type(self).__bases__[0]
    return rebuild_reader, (base,), base.__getstate__(self)


def rebuild_reader(base: type[nn.Module]) -> nn.Module:
    """What pickle calls to make an empty module whose state it then fills in."""
    module = base.__new__(base)
    read_once(module)
    return module
