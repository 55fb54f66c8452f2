"""Learned block sparsity for PyTorch: find a block mask in training, use it at inference.

sparsifier.prepare(model, config)  ->  train as before  ->  sparsifier.squash_mask()  ->  swap_to_bsr(model)
"""

from torchao_superblock.allocation import allocate
from torchao_superblock.bsr import (
    BSRConv1x1,
    BSRLinear,
    BSRMultiheadAttention,
    BSRWeight,
    SwapReport,
    load_bsr,
    save_bsr,
    swap_to_bsr,
    swap_to_dense,
    to_bsr_linear,
)
from torchao_superblock.ops import backends, tune
from torchao_superblock.pruning import (
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
    prune_one_shot,
    sensitivity,
    squash,
)

__all__ = [
    "BSRConv1x1",
    "BSRLinear",
    "BSRMultiheadAttention",
    "BSRWeight",
    "MagnitudeSparsifier",
    "RigLSparsifier",
    "SpartanSparsifier",
    "SupermaskSparsifier",
    "SwapReport",
    "allocate",
    "backends",
    "load_bsr",
    "prune_one_shot",
    "save_bsr",
    "sensitivity",
    "squash",
    "swap_to_bsr",
    "swap_to_dense",
    "to_bsr_linear",
    "tune",
]
