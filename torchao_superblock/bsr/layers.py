"""Which module type becomes which at the swap: the only place that says so.

A line of :func:`register_twin` makes a type known; why a single module of it cannot be converted all
the same is its twin's own rule. The table itself lies in `common/`, where the summary of a sparsifier
can ask it without importing this half.
"""

import importlib

from torch import nn

from torchao_superblock.bsr.attention import TENSORS, BSRMultiheadAttention
from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear
from torchao_superblock.common.swappable import TWINS, Twin, register_twin

for _cls in LINEAR_TYPES:
    register_twin(_cls, BSRLinear, "weight")
register_twin(nn.MultiheadAttention, BSRMultiheadAttention, *TENSORS)

INTEGRATIONS: dict[str, str] = {}
"""Root package of an outside library -> the module that registers its types; imported when one is met."""


def twin_of(cls: type[nn.Module]) -> Twin | None:
    """What modules of exactly this type become, or None if they stay as they are."""
    root = cls.__module__.partition(".")[0]
    if cls not in TWINS and root in INTEGRATIONS:
        importlib.import_module(INTEGRATIONS[root])
    return TWINS.get(cls)
