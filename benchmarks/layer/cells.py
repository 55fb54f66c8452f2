"""What is measured of one linear layer: shapes, and a cell of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.measure.precision import dtype_of

Block = int | tuple[int, int]

UP, DOWN = (3072, 768), (768, 3072)  # N, K of the two MLP layers of ViT-B/16
VIT_TOKENS = 256 * 197


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        M: rows of x.
        shape: (N, K) of the weight.
        block: block size, int or (rows, cols).
        sparsity: fraction of blocks that are zero.
        mode: `"float32"`, `"tf32"`, `"bfloat16"`, `"float16"` or `"float64"`.
        peers: measure the peers too.
        graph: time replays of a CUDA graph with cold weights instead of single calls.
    """

    M: int
    shape: tuple[int, int]
    block: Block
    sparsity: float
    mode: str
    peers: bool = True
    graph: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands: float32 for the TF32 mode too."""
        return dtype_of(self.mode)

    @property
    def label(self) -> str:
        """What the progress line calls it."""
        n, k = self.shape
        return (
            f"M {self.M}, {n} x {k}, block {block_text(self.block)}, {self.sparsity}, {self.mode}"
        )


def block_text(block: Block) -> str:
    """`64` or `64x16`."""
    return str(block) if isinstance(block, int) else "x".join(map(str, block))
