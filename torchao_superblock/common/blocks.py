"""Block sizes, and the grid that they cut a weight into.

A mask takes any block size and rounds the grid up. A BSR weight does so where its last blocks are padded; else it is
made of whole blocks.
"""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from torchao_superblock.ops.block_mask import block_grid

__all__ = [
    "BlockSize",
    "block_grid",
    "check_blocksize",
    "padded_shape",
    "parse_blocksize",
    "whole_block_grid",
]

BlockSize = int | tuple[int, int]


def whole_block_grid(
    weight: Tensor | tuple[int, ...], blocksize: tuple[int, int]
) -> tuple[int, int]:
    """`(N / r, K / c)`, the grid of a weight that is made of whole blocks.

    Args:
        weight: `(N, K)`, or its shape.
        blocksize: `(r, c)`.

    Raises:
        ValueError: if the shape is not a multiple of the block size.
    """
    N, K = weight.shape if isinstance(weight, Tensor) else weight
    r, c = blocksize
    if r < 1 or c < 1:
        raise ValueError(f"blocksize must be at least 1, got {blocksize!r}")
    if N % r or K % c:
        raise ValueError(f"shape ({N}, {K}) is not a multiple of the block size {r}x{c}")
    return N // r, K // c


def padded_shape(shape: tuple[int, int], blocksize: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the whole blocks that cover a weight; None where that is its very shape.

    Args:
        shape: `(N, K)`.
        blocksize: `(r, c)`.
    """
    R, C = block_grid(shape, blocksize)
    padded = R * blocksize[0], C * blocksize[1]
    return None if padded == tuple(shape) else padded


def parse_blocksize(blocksize: BlockSize) -> tuple[int, int]:
    """`64` -> `(64, 64)`, for a BSR weight.

    Args:
        blocksize: int for a square block, or `(rows, cols)` = (out, in).

    Raises:
        TypeError: not an int or a pair of ints.
        ValueError: a size below 1.
    """
    sizes = _pair(blocksize)
    if sizes is None:
        raise TypeError(
            f"blocksize must be an int or a pair (rows, cols) of ints, got {blocksize!r}; "
            "for example blocksize=64 or blocksize=(64, 32)"
        )
    if min(sizes) < 1:
        raise ValueError(f"blocksize must be at least 1, got {blocksize!r}")
    return sizes


def check_blocksize(value: object, where: str = "") -> tuple[int, int]:
    """`64` -> `(64, 64)`, for a mask.

    Args:
        value: int for a square block, or `(rows, cols)` = (out, in).
        where: what an error begins with, for example the entry of a config.

    Raises:
        TypeError: not an int or a pair of ints.
        ValueError: a size below 1.
    """
    sizes = _pair(value)
    if sizes is None:
        raise TypeError(
            f"{where}blocksize={value!r} must be an int, or a pair of ints (rows, cols) = "
            "(out_features, in_features)"
        )
    if min(sizes) < 1:
        raise ValueError(f"{where}blocksize={value!r} must be at least 1; usual are 16, 32 and 64")
    return sizes


def _pair(value: object) -> tuple[int, int] | None:
    sizes = (value, value) if isinstance(value, Integral) else value
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        return None
    if any(isinstance(size, bool) or not isinstance(size, Integral) for size in sizes):
        return None
    return int(sizes[0]), int(sizes[1])
