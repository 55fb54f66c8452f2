"""The block masks of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from torchao_superblock.pruning import BlockMask


def masks_of(model: nn.Module) -> Iterator[tuple[str, BlockMask]]:
    """FQN and mask of each masked weight."""
    for fqn, module in model.named_modules():
        if isinstance(module, BlockMask):
            yield re.sub(r"(^|\.)parametrizations\.([^.]+)\.\d+$", r"\1\2", fqn), module
