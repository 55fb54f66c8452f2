"""Which blocks of a weight a mask kept, remembered beside the weight from the squash to the swap.

A weight says by its zeros which blocks are pruned; where a kept block happens to be zero (a projection
that starts at zero, say), only this tells the two apart. Training on goes on with such a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class KeptBlocks:
    """A block mask with its block size.

    Attributes:
        mask: `(R, C)` bool.
        blocksize: `(rows, cols)`.
        gain: what the weights were multiplied by when the mask was folded in.
    """

    mask: Tensor
    blocksize: tuple[int, int]
    gain: float = 1.0

    def __deepcopy__(self, memo: dict) -> KeptBlocks:
        return self  # nobody writes to it


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_kept(
    weight: Tensor, mask: Tensor, blocksize: tuple[int, int], gain: float = 1.0
) -> None:
    """Notes the blocks that a mask kept of a weight, for as long as this very tensor lives.

    Args:
        weight: `(N, K)`; a copy of it, or one that is loaded from a file, does not know.
        mask: `(R, C)` bool, over its block grid.
        blocksize: `(rows, cols)`.
        gain: what the weights were multiplied by beside it.
    """
    mask = mask.detach().to("cpu", torch.bool, copy=True)
    _KEPT[weight] = KeptBlocks(mask, tuple(blocksize), gain)


def remembered_kept(weight: Tensor) -> KeptBlocks | None:
    """What the last mask that was squashed into this tensor kept, or None if nobody knows."""
    return _KEPT.get(weight)
