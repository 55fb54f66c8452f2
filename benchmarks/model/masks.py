"""Random block masks on the weights of a model."""

from __future__ import annotations

import re

import torch
from torch import nn


@torch.no_grad()
def zero_random_blocks(weight: torch.Tensor, blocksize: int, sparsity: float, seed: int) -> None:
    """Zeroes all but `max(1, round(n_blocks * (1 - sparsity)))` random blocks, in place.

    Args:
        weight: contiguous, `(N, K)`, multiples of the block size.
        blocksize: edge of the square blocks.
        sparsity: fraction of blocks that become zero.
        seed: of the mask, which does not depend on the device.
    """
    rows, columns = (size // blocksize for size in weight.shape)
    kept = max(1, round(rows * columns * (1 - sparsity)))
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[order[:kept]] = True
    mask = mask.view(rows, 1, columns, 1).to(weight.device)
    weight.view(rows, blocksize, columns, blocksize).mul_(mask)


def zero_blocks_of(
    model: nn.Module, pattern: str, blocksize: int, sparsity: float
) -> dict[str, nn.Parameter]:
    """Zeroes random blocks of every matrix whose name holds `pattern`, in place.

    Args:
        model: dense.
        pattern: regular expression that is searched in the name of the parameter.
        blocksize: edge of the square blocks.
        sparsity: of each matrix.

    Returns:
        The matrices by name.

    Raises:
        ValueError: there is none, or one does not consist of whole blocks.
    """
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and re.search(pattern, n)}
    if not weights:
        raise ValueError(f"no matrix of {type(model).__name__} has a name like {pattern!r}")
    for seed, (name, weight) in enumerate(weights.items()):
        if any(size % blocksize for size in weight.shape):
            raise ValueError(
                f"{name} is {tuple(weight.shape)}, no multiple of blocks of {blocksize}"
            )
        zero_random_blocks(weight, blocksize, sparsity, seed)
    return weights
