"""Which module type becomes which at the swap: the only place that says so.

A line of :func:`register_twin` makes a type known; why a single module of it cannot be converted all
the same is its twin's own rule. The table itself lies in `common/`, where the summary of a sparsifier
can ask it without importing this half.
"""

from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear
from torchao_superblock.common.swappable import INTEGRATIONS, register_twin, twin_of

__all__ = ["INTEGRATIONS", "register_twin", "twin_of"]

for _cls in LINEAR_TYPES:
    register_twin(_cls, BSRLinear, "weight")
