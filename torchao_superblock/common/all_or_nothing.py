"""All or nothing: what changes a model either succeeds or leaves it as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(model: nn.Module, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put a model back as it was if the block raises, and let the error through.

    Args:
        model: its modules' attributes, children, parameters and buffers are remembered, not copied.
        tensors: those whose contents the block overwrites; they are copied.
    """
    modules = [
        (module, dict(vars(module)), [(d, dict(d)) for d in _registries(module)])
        for module in model.modules()
    ]
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for module, attributes, registries in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)
        raise


def _registries(module: nn.Module) -> tuple[dict, dict, dict]:
    return module._parameters, module._buffers, module._modules
