"""Use the mask: block-sparse weights in BSR format and the layers that multiply only their stored blocks."""

from torchao_superblock.bsr import legacy
from torchao_superblock.bsr.attention import BSRMultiheadAttention
from torchao_superblock.bsr.conv1x1 import BSRConv1x1
from torchao_superblock.bsr.dataflow import register_mlp
from torchao_superblock.bsr.folded_activation import register_activation
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.bsr.load import load_bsr
from torchao_superblock.bsr.save import save_bsr
from torchao_superblock.bsr.swap import SwapEntry, SwapReport, swap_to_bsr, to_bsr_linear
from torchao_superblock.bsr.unswap import swap_to_dense
from torchao_superblock.bsr.weight import BSRWeight

__all__ = [
    "BSRConv1x1",
    "BSRLinear",
    "BSRMultiheadAttention",
    "BSRWeight",
    "SwapEntry",
    "SwapReport",
    "load_bsr",
    "register_activation",
    "register_mlp",
    "save_bsr",
    "swap_to_bsr",
    "swap_to_dense",
    "to_bsr_linear",
]

legacy.install()
