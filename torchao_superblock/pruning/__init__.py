"""Finding a block mask in training: the sparsifiers, their parametrizations, and the way out of them.

What leaves this folder is an ordinary dense weight whose pruned blocks are exactly zero.
"""

from torchao_superblock.pruning import legacy
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.masks.magnitude import MagnitudeSparsifier
from torchao_superblock.pruning.masks.prune_and_grow import RigLSparsifier
from torchao_superblock.pruning.masks.spartan import SpartanSparsifier
from torchao_superblock.pruning.masks.supermask import Supermask, SupermaskSparsifier
from torchao_superblock.pruning.one_shot import (
    OneShotReport,
    PrunedTensor,
    Sensitivity,
    prune_one_shot,
    sensitivity,
)
from torchao_superblock.pruning.ramp import Progress
from torchao_superblock.pruning.sparsifier import BlockSparsifier, CubicSL, LambdaSL
from torchao_superblock.pruning.squash import squash
from torchao_superblock.pruning.summary import MaskedTensor, MaskSummary
from torchao_superblock.pruning.targets import SkippedTensor

__all__ = [
    "BlockMask",
    "BlockSparsifier",
    "CubicSL",
    "LambdaSL",
    "MagnitudeSparsifier",
    "MaskSummary",
    "MaskedTensor",
    "OneShotReport",
    "Progress",
    "PrunedTensor",
    "RigLSparsifier",
    "Sensitivity",
    "SkippedTensor",
    "SpartanSparsifier",
    "Supermask",
    "SupermaskSparsifier",
    "prune_one_shot",
    "sensitivity",
    "squash",
]

legacy.install()
