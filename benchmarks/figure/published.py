"""What others have published, to be put beside a figure with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of ViT-B/16 on ImageNet with block-sparse weights.

    Attributes:
        source: who published it.
        block: edge of the blocks; 0 for the dense model.
        sparsity: fraction of blocks pruned.
        top1: percent.
    """

    source: str
    block: int
    sparsity: float
    top1: float


README = "reference README"
LOG = "torchao log (its dense model is another training)"
IMAGENET = (
    Accuracy(README, 0, 0.0, 78.39),
    Accuracy(README, 32, 0.8, 77.64),
    Accuracy(README, 32, 0.9, 76.09),
    Accuracy(LOG, 0, 0.0, 81.98),
    Accuracy(LOG, 64, 0.80, 77.14),
    Accuracy(LOG, 64, 0.84, 76.15),
    Accuracy(LOG, 64, 0.90, 63.00),
)

VIT_B_SPEEDUP = {16: 1.24, 32: 1.37, 64: 1.65}
"""Of ViT-B/16 at 0.9, batch 256, MLPs, by block size: A100, float32; speeding-up-vits."""
VIT_B_BREAK_EVEN = {16: 0.86, 32: 0.82, 64: 0.70}
"""The sparsity from which that is faster than dense."""
VIT_H_MS = {0.0: 489.6, 0.8: 361.6, 0.9: 315.4}
"""Milliseconds of ViT-H/14, batch 256, bfloat16, block 64, by sparsity: A100, torchao's table."""
