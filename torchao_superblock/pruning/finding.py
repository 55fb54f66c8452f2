"""Finding the masks in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torchao_superblock.common.modules import block_masks_of
from torchao_superblock.pruning.masks.base import BlockMask


def find_mask(module: nn.Module, tensor_name: str) -> BlockMask | None:
    """The mask on a tensor of this module, or None."""
    return masks_of(module).get(tensor_name)


def masks_of(module: nn.Module) -> dict[str, BlockMask]:
    """Masks on the tensors of this very module, by tensor name."""
    return {name: mask for name, mask in block_masks_of(module) if isinstance(mask, BlockMask)}


def named_masks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, BlockMask]]:
    """Every mask in a model.

    Yields:
        The FQN of the masked tensor, the module that owns it, the tensor's name there, and the mask.
    """
    for path, module in model.named_modules():
        for name, mask in masks_of(module).items():
            yield (f"{path}.{name}" if path else name), module, name, mask


def has_mask(module: nn.Module) -> bool:
    """Whether there is a mask anywhere in a module."""
    return any(isinstance(child, BlockMask) for child in module.modules())
