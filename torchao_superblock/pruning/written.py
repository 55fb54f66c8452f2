"""Writes into a weight that a mask computed: they are lost, so they are noticed.

`model.apply(init)` and `module.weight.copy_(...)` write into what a read returned, and the next read
computes the weight anew. Every tensor that a read returns is watched by a detached alias, which
shares its version counter; when the tensor is gone, the counter tells whether it was written.
Writes through `.data` have a counter of their own and pass unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

_LOST = "_lost_writes"
"""Attribute of a module: the names of its tensors that were written; absent where there are none."""


class _Watch(weakref.ref):
    __slots__ = ("alias", "module", "tensor_name", "version")

    alias: Tensor
    module: weakref.ref[nn.Module]
    tensor_name: str
    version: int


_watches: dict[int, _Watch] = {}
"""Keeps the watches of living tensors alive. By identity: weak references compare what they refer to."""


def read_watched(
    module: nn.Module, tensor_name: str, evaluate: Callable[[nn.Module], Tensor]
) -> Tensor:
    """Evaluates a mask and watches the result; costs about 3 us where it has to.

    Not while compiling or tracing, where there is no tensor to watch, nor in inference mode, where
    tensors have no version. Recurrent layers move their weights into one buffer by writing them.

    Raises:
        RuntimeError: if an earlier result was written in place.
    """
    if torch.compiler.is_compiling():
        return evaluate(module)
    if tensor_name in module.__dict__.get(_LOST, ()):
        refuse_lost_write(module, tensor_name)
    weight = evaluate(module)
    if type(weight) is Tensor and not torch.is_inference(weight) and not torch.jit.is_tracing():
        if not isinstance(module, nn.RNNBase):
            watch = _Watch(weight, _check)
            watch.alias = weight.detach()
            watch.version = weight._version
            watch.module = weakref.ref(module)
            watch.tensor_name = tensor_name
            _watches[id(watch)] = watch
    return weight


def _check(watch: _Watch) -> None:
    del _watches[id(watch)]
    module = watch.module()
    if module is not None and watch.alias._version != watch.version:
        module.__dict__.setdefault(_LOST, set()).add(watch.tensor_name)


def forget_lost_write(module: nn.Module, tensor_name: str) -> None:
    """Called where the weight under the mask was set in a way that lasts."""
    lost = module.__dict__.get(_LOST, set())
    lost.discard(tensor_name)
    if not lost:
        module.__dict__.pop(_LOST, None)


def refuse_lost_write(module: nn.Module, tensor_name: str, where: str = "") -> None:
    """Raises if a weight that was read has been written in place since.

    Args:
        module: the masked module.
        tensor_name: of its masked tensor.
        where: what the error begins with.

    Raises:
        RuntimeError: with the ways to write that last.
    """
    if tensor_name in module.__dict__.get(_LOST, ()):
        raise RuntimeError(
            f"{where}the {tensor_name!r} of a {type(module).__bases__[0].__name__} was written in "
            "place, and the write is lost: a masked weight is computed at each read. Initialise "
            f"before prepare(), or assign (module.{tensor_name} = tensor), or call "
            f"module.reset_parameters(). To go on without the write, assign module.parametrizations."
            f"{tensor_name}.original"
        )
