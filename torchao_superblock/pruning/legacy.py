"""Names that pickles of version 0.1 contain, wherever their objects live now. Nothing else uses them."""

from __future__ import annotations

import sys

from torchao_superblock.pruning import sparsifier
from torchao_superblock.pruning.masks import supermask


def install() -> None:
    """Makes the old names importable."""
    sys.modules.setdefault("torchao_superblock.pruning.supermask", supermask)
    sparsifier.SupermaskSparsifier = supermask.SupermaskSparsifier
