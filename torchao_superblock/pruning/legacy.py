"""Names that pickles of version 0.1 contain, wherever their objects live now.

A pickled model says from which module each class and function comes. Nothing else uses these names.
"""

from __future__ import annotations

import sys
import types

from torch import nn

from torchao_superblock.pruning import attach, sparsifier
from torchao_superblock.pruning.masks import supermask


def _rebuild(base: type[nn.Module], reads: bool, names: list[str], masked: list[str]) -> nn.Module:
    """A masked module; `reads` said that its class evaluated each mask once a forward."""
    return attach._rebuild_masked(base, names, masked)


def _rebuild_reader(base: type[nn.Module]) -> nn.Module:
    """A module whose class evaluated the masks of its children once a forward."""
    return base.__new__(base)


def install() -> None:
    """Makes the old names importable."""
    reading = types.ModuleType("torchao_superblock.pruning.reading", _rebuild_reader.__doc__)
    reading.rebuild_reader = _rebuild_reader
    sys.modules.setdefault(reading.__name__, reading)
    sys.modules.setdefault("torchao_superblock.pruning.supermask", supermask)
    attach._rebuild = _rebuild
    sparsifier.SupermaskSparsifier = supermask.SupermaskSparsifier
