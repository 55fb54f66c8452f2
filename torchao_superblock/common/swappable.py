"""Can this be swapped? The one answer for the report of a swap and for the summary of a sparsifier.

Which module type becomes which is written down in `bsr/layers.py`; it fills this table.
"""

from __future__ import annotations

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
    """

    cls: type[nn.Module]
    bsr: type[nn.Module]
    tensors: tuple[str, ...]


TWINS: dict[type[nn.Module], Twin] = {}
"""By exact module type."""


def register_twin(cls: type[nn.Module], bsr: type[nn.Module], *tensors: str) -> None:
    """Says that modules of exactly this type become `bsr`, which stores the named tensors as blocks."""
    TWINS[cls] = Twin(cls, bsr, tensors)


def tensor_owners(module: nn.Module) -> set[str]:
    """Names of the children whose tensors the twin of this module stores as blocks."""
    twin = TWINS.get(type(module))
    names = {tensor.rpartition(".")[0] for tensor in twin.tensors} if twin is not None else set()
    return names - {""}


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
