"""Which module type becomes which at the swap: the only place that says so.

A line of :func:`register_twin` makes a type known; why a single module of it cannot be converted all
the same is its twin's own rule. The table itself lies in `common/`, where the summary of a sparsifier
can ask it without importing this half.
"""

from torch import nn

from torchao_superblock.bsr.attention import TENSORS, BSRMultiheadAttention
from torchao_superblock.bsr.conv1x1 import BSRConv1x1, conv_obstacle
from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear
from torchao_superblock.common.swappable import INTEGRATIONS, register_twin, twin_of

__all__ = ["INTEGRATIONS", "register_twin", "twin_of"]

for _cls in LINEAR_TYPES:
    register_twin(_cls, BSRLinear, "weight")
register_twin(nn.MultiheadAttention, BSRMultiheadAttention, *TENSORS)
for _cls in (nn.Conv2d, nn.LazyConv2d):  # the latter becomes the former at its first call
    register_twin(_cls, BSRConv1x1, "weight", obstacle=conv_obstacle)
