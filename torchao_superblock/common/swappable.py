"""Can this be swapped? The one answer for the report of a swap and for the summary of a sparsifier.

Which module type becomes which is written down in `bsr/layers.py`; it fills this table, and so do the integrations.
"""

from __future__ import annotations

import importlib
import warnings
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
        tensors: names of the tensors that are stored as blocks.
    """

    cls: type[nn.Module]
    bsr: type[nn.Module]
    tensors: tuple[str, ...]


TWINS: dict[type[nn.Module], Twin] = {}
"""By exact module type."""


def register_twin(cls: type[nn.Module], bsr: type[nn.Module], *tensors: str) -> None:
    """Says that modules of exactly this type become `bsr`, which stores the named tensors as blocks."""
    TWINS[cls] = Twin(cls, bsr, tensors)


INTEGRATIONS: dict[str, str] = {
    # save_pretrained of a model that was prepared or swapped
    "transformers": "torchao_superblock.integrations.transformers",
}
"""Root package of an outside library -> the module that makes us known to it; imported when a class of it is met."""


def twin_of(cls: type[nn.Module]) -> Twin | None:
    """What modules of exactly this type become, or None if they stay as they are."""
    if cls not in TWINS:
        meet(cls)
    return TWINS.get(cls)


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


def type_obstacle(cls: type[nn.Module], tensor_name: str) -> str | None:
    """Why no swap can store this tensor of such a module as blocks: a sentence, or None."""
    twin = TWINS.get(cls)
    if twin is None:
        return f"{cls.__name__} has no block-sparse twin"
    if tensor_name not in twin.tensors:
        return f"the swap leaves the {tensor_name} of {cls.__name__} dense"
    return None


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
