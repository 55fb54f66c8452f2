"""The forms of a model that are compared: swapped by us, and with the peers' tensors as weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.measure.quiet import quiet

if TYPE_CHECKING:
    from torchao_superblock import SwapReport


def swapped(
    model: nn.Module, blocksize: int, sparsity: float, *, narrow: bool
) -> tuple[nn.Module, SwapReport]:
    """A copy of `model` with block-sparse layers wherever this version has them, activations fused.

    Args:
        model: dense, with zero blocks.
        blocksize: of the blocks.
        sparsity: of the layers that have zeros; what has none, or few, stays dense.
        narrow: drop dead hidden features.
    """
    from torchao_superblock import swap_to_bsr

    model = copy.deepcopy(model)
    report = swap_to_bsr(
        model,
        blocksize,
        min_sparsity=sparsity / 2,
        fuse_activations=True,
        drop_dead_features=narrow,
    )
    return model, report


def counts(report: SwapReport, weights: Iterable[str]) -> dict[str, Any]:
    """What a swap did, for a row of a table.

    Args:
        report: of the swap.
        weights: names of the weights with zero blocks.

    Returns:
        How many weights have zero blocks and how many layers were swapped; those left dense by the reason's code;
        and how many remarks there are (fused activations and dropped features are among them).
    """
    left = Counter(entry.code for entry in report.skipped if entry.sparsity)
    return {
        "sparse weights": len(list(weights)),
        "swapped": len(report.swapped),
        "left dense": ", ".join(f"{code} {n}" for code, n in left.items()),
        "notes": len(report.notes),
    }


def with_weights(
    model: nn.Module, names: Iterable[str], convert: Callable[[torch.Tensor], torch.Tensor]
) -> nn.Module:
    """A copy of `model` in which some weights are tensors of another kind.

    Args:
        model: dense, with zero blocks.
        names: of the weights.
        convert: what becomes of each.
    """
    model = copy.deepcopy(model)
    with quiet():
        for name in names:
            owner, _, leaf = name.rpartition(".")
            weight = convert(model.get_parameter(name).detach())
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return model


def with_torch_bsr(model: nn.Module, names: Iterable[str], blocksize: int) -> nn.Module:
    """A copy of `model` with torch.sparse_bsr tensors as weights."""
    return with_weights(model, names, lambda weight: weight.to_sparse_bsr(blocksize))


def with_torchao(model: nn.Module, names: Iterable[str], blocksize: int) -> nn.Module:
    """A copy of `model` with torchao's BlockSparseTensor as weights."""
    from torchao.sparsity.blocksparse import BlockSparseTensor

    return with_weights(
        model, names, lambda weight: BlockSparseTensor.from_dense(weight, blocksize)
    )


PEERS = {"torch BSR": with_torch_bsr, "torchao": with_torchao}
