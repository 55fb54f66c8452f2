"""Finding a block mask in training: the sparsifier, its parametrization, and the way out of it.

What leaves this folder is an ordinary dense weight whose pruned blocks are exactly zero.
"""

from torchao_superblock.pruning.one_shot import (
    OneShotReport,
    PrunedTensor,
    Sensitivity,
    prune_one_shot,
    sensitivity,
)
from torchao_superblock.pruning.sparsifier import CubicSL, LambdaSL, SupermaskSparsifier
from torchao_superblock.pruning.squash import squash
from torchao_superblock.pruning.summary import MaskedTensor, MaskSummary
from torchao_superblock.pruning.supermask import Supermask
from torchao_superblock.pruning.targets import SkippedTensor

__all__ = [
    "CubicSL",
    "LambdaSL",
    "MaskSummary",
    "MaskedTensor",
    "OneShotReport",
    "PrunedTensor",
    "Sensitivity",
    "SkippedTensor",
    "Supermask",
    "SupermaskSparsifier",
    "prune_one_shot",
    "sensitivity",
    "squash",
]
