"""Finding a block mask in training: the sparsifiers, their parametrizations, and the way out of them.

What leaves this folder is an ordinary dense weight whose pruned blocks are exactly zero.
"""

from torchao_superblock.pruning import legacy
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.masks.supermask import Supermask, SupermaskSparsifier
from torchao_superblock.pruning.sparsifier import BlockSparsifier, CubicSL, LambdaSL
from torchao_superblock.pruning.squash import squash
from torchao_superblock.pruning.summary import MaskedTensor, MaskSummary
from torchao_superblock.pruning.targets import SkippedTensor

__all__ = [
    "BlockMask",
    "BlockSparsifier",
    "CubicSL",
    "LambdaSL",
    "MaskSummary",
    "MaskedTensor",
    "SkippedTensor",
    "Supermask",
    "SupermaskSparsifier",
    "squash",
]

legacy.install()
