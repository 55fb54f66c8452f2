"""Can this be swapped? The one answer for the report of a swap and for the summary of a sparsifier.

Which module type becomes which is written down in `bsr/layers.py`; it fills this table, and so do the integrations.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

# What a block size read off the zeros of a weight is looked for among, for rows and for columns.
CANDIDATE_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Twin:
    """What becomes of a module type at the swap.

    Attributes:
        cls: the module type, exactly.
        bsr: the type it becomes.
        tensors: names of the tensors that are stored as blocks, those of children with the child's name in front.
        obstacle: says of a single module why it stays as it is whatever its tensors hold, or None; it is given modules
            that are still under their masks, too.
    """

    cls: type[nn.Module]
    bsr: type[nn.Module]
    tensors: tuple[str, ...]
    obstacle: Callable[[nn.Module], str | None] | None = None


TWINS: dict[type[nn.Module], Twin] = {}
"""By exact module type."""


def register_twin(
    cls: type[nn.Module],
    bsr: type[nn.Module],
    *tensors: str,
    obstacle: Callable[[nn.Module], str | None] | None = None,
) -> None:
    """Says that modules of exactly this type become `bsr`, which stores the named tensors as blocks.

    Args:
        cls: the module type.
        bsr: the type it becomes.
        tensors: as in :class:`Twin`.
        obstacle: as in :class:`Twin`.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):  # computes x @ weight.T + bias in a way of its own
        ...         return nn.functional.linear(x, self.weight, self.bias)
        >>> register_twin(Scaled, BSRLinear, "weight")  # doctest: +SKIP
    """
    TWINS[cls] = Twin(cls, bsr, tensors, obstacle)


INTEGRATIONS: dict[str, str] = {
    # save_pretrained of a model that was prepared or swapped
    "transformers": "torchao_superblock.integrations.transformers",
}
"""Root package of an outside library -> the module that makes us known to it; imported when a class of it is met."""


def twin_of(cls: type[nn.Module]) -> Twin | None:
    """What modules of this type become, or None if they stay as they are.

    That goes by the exact type. A subclass of `nn.Linear` that brings no method of its own counts as one.
    """
    if cls not in TWINS:
        meet(cls)
    if cls not in TWINS and issubclass(cls, nn.Linear) and not own_methods(cls):
        return TWINS.get(nn.Linear)
    return TWINS.get(cls)


_WITHOUT_EFFECT = {
    # on what a layer computes once it is made
    *("__init__", "reset_parameters", "extra_repr", "__repr__"),
    # what Python itself puts into a class
    *("__dict__", "__weakref__", "__annotate__", "__annotate_func__"),
}


def own_methods(cls: type[nn.Linear]) -> list[str]:
    """Names of the methods and properties that a subclass of `nn.Linear` has or overrides.

    A layer in its place would not have them: neither a forward of its own, nor what a model calls by name. How it is
    initialised and printed does not count.
    """
    names = {
        name
        for owner in set(cls.__mro__) - set(nn.Linear.__mro__)
        for name, value in vars(owner).items()
        if callable(value) or hasattr(value, "__get__")
    }
    return sorted(names - _WITHOUT_EFFECT)


def meet(cls: type[nn.Module]) -> None:
    """Imports the integration with the library that a module type is from, if there is one."""
    root = cls.__module__.partition(".")[0]
    if root not in INTEGRATIONS:
        return
    try:
        importlib.import_module(INTEGRATIONS[root])
    except (
        ImportError
    ) as error:  # a release that it does not work with: the layers of torch are what they are
        message = f"{root} and this package do not know each other: {error}"
        warnings.warn(message, stacklevel=4)


def tensor_owners(module: nn.Module) -> set[str]:
    """Names of the children whose tensors the twin of this module stores as blocks."""
    twin = TWINS.get(type(module))
    names = {tensor.rpartition(".")[0] for tensor in twin.tensors} if twin is not None else set()
    return names - {""}


def type_obstacle(cls: type[nn.Module], tensor_name: str) -> str | None:
    """Why no swap can store this tensor of such modules as blocks: a sentence, or None."""
    twin = twin_of(cls)
    if twin is None:
        return f"{cls.__name__} has no block-sparse twin"
    if tensor_name not in twin.tensors:
        return f"the swap leaves the {tensor_name} of {cls.__name__} dense"
    return None


def module_obstacle(module: nn.Module, cls: type[nn.Module], tensor_name: str) -> str | None:
    """Why no swap can store this tensor of this module as blocks: a sentence, or None.

    Args:
        module: what the tensor belongs to.
        cls: its type, before masks or other parametrizations gave it another.
        tensor_name: its name there.
    """
    reason, twin = type_obstacle(cls, tensor_name), twin_of(cls)
    if reason is None and twin is not None and twin.obstacle is not None:
        return twin.obstacle(module)
    return reason


def shape_obstacle(shape: tuple[int, ...], blocksize: tuple[int, int] | None = None) -> str | None:
    """Why no swap can cut this shape into whole blocks: a sentence, or None.

    Args:
        shape: `(N, K)` of the weight.
        blocksize: `(rows, cols)`; None if it is to be read off the zeros.
    """
    if blocksize is None:
        if all(any(size % c == 0 for c in CANDIDATE_SIZES) for size in shape):
            return None
        return f"its shape {tuple(shape)} is not a multiple of any block size from 8 to 256"
    if any(size % block for size, block in zip(shape, blocksize, strict=True)):
        return (
            f"its shape ({', '.join(map(str, shape))}) is not a multiple of the block size "
            f"{blocksize[0]}x{blocksize[1]}"
        )
    return None
