"""Pruning a pretrained model from a few batches: choose blocks, repair the rest.

capture.py sees the layers, forwards.py and calibration.py bring them their inputs, moments.py and
solve.py do the arithmetic, refine.py trains parts; prune.py puts it together. sensitivity.py
measures what a layer's sparsity costs and levels.py spends a budget by it.
"""

from torchao_superblock.pruning.one_shot.prune import prune_one_shot
from torchao_superblock.pruning.one_shot.report import OneShotReport, PrunedTensor, RefinedPart
from torchao_superblock.pruning.one_shot.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    sensitivity,
)

__all__ = [
    "LayerSensitivity",
    "OneShotReport",
    "PrunedTensor",
    "RefinedPart",
    "Sensitivity",
    "prune_one_shot",
    "sensitivity",
]
