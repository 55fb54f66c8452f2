"""torchao: code written for its block sparsity goes on, and `quantize_` knows our layers.

torchao had `sparsify_(model, block_sparse_weight(blocksize=64))` until August 2026. The same call works
from here. `quantize_(model, BlockSparseWeightConfig(...))` works as well once this module is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.weak import WeakIdRef

from torchao_superblock.bsr import SwapReport, swap_to_bsr, to_bsr_linear

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError(
        f"torchao_superblock.integrations.torchao needs torchao ({error}): "
        "pip install 'torchao_superblock[torchao]'"
    ) from error

__all__ = ["BlockSparseWeightConfig", "block_sparse_weight", "sparsify_"]

# What a swap decides against because dense is faster, or because there is nothing to gain.
_NOT_WORTH_IT = {"slower_than_dense", "too_few_zero_blocks", "filtered_out"}


@dataclass
class BlockSparseWeightConfig(AOBaseConfig):
    """Store linear weights as blocks (BSR), and multiply only those that are not zero.

    Args:
        blocksize: int or `(rows, cols)`, as in torchao 64 if not given; None reads each layer's off its zeros.
        min_sparsity: a layer with a smaller fraction of zero blocks stays dense; None asks the table of measured
            break-even points, as :func:`torchao_superblock.swap_to_bsr` does.
        pad: take layers whose shape is not a multiple of the block size, too, as it does.
    """

    blocksize: int | tuple[int, int] | None = 64
    min_sparsity: float | None = None
    pad: bool = False


def block_sparse_weight(
    blocksize: int | tuple[int, int] | None = 64,
    min_sparsity: float | None = None,
    *,
    pad: bool = False,
) -> BlockSparseWeightConfig:
    """The config under the name that torchao had for it; see :class:`BlockSparseWeightConfig`."""
    return BlockSparseWeightConfig(blocksize, min_sparsity, pad)


def sparsify_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Swaps the linear layers of a model for block-sparse ones, under torchao's name and in its form.

    Sees the whole model, so tied weights stay as they are. If anything fails, the model is as it was.

    Args:
        model: changed in place, unless it is itself an `nn.Linear`.
        config: a :class:`BlockSparseWeightConfig`; any other goes to torchao's own `sparsify_`.
        filter_fn: `filter_fn(module, fqn) -> bool`; None takes every linear layer.

    Returns:
        The model; for an `nn.Linear` the new layer.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`torchao_superblock.swap_to_bsr`.

    Example:
        >>> model = sparsify_(model, block_sparse_weight(blocksize=64))  # doctest: +SKIP
    """
    if not isinstance(config, BlockSparseWeightConfig):
        from torchao.sparsity import sparsify_ as torchao_sparsify_

        return torchao_sparsify_(model, config, filter_fn)
    if isinstance(model, nn.Linear):
        return to_bsr_linear(model, config.blocksize, pad=config.pad)
    report = swap_to_bsr(
        model,
        config.blocksize,
        min_sparsity=config.min_sparsity,
        filter_fn=filter_fn,
        pad=config.pad,
    )
    _tell_skipped(report)
    return model


def _tell_skipped(report: SwapReport) -> None:
    """Says which of the layers that were asked for stay dense; torchao's call returns no report."""
    skipped = [e for e in report.skipped if e.code not in ("filtered_out", "no_twin")]
    if skipped:
        warnings.warn(
            "sparsify_: these stay dense: "
            + "; ".join(f"{entry.fqn}: {entry.reason}" for entry in skipped),
            stacklevel=3,
        )


_converted: dict[WeakIdRef, str] = {}
"""Weights that `quantize_` converted: a second layer with one of them is tied to it."""


def _forget(reference: WeakIdRef) -> None:
    _converted.pop(reference, None)


@register_quantize_module_handler(BlockSparseWeightConfig)
def _quantize_module(module: nn.Module, config: BlockSparseWeightConfig) -> nn.Module:
    """One layer of `quantize_`, which shows its handler nothing of the model around.

    Raises:
        ValueError: the layer cannot be stored as blocks, its parent reads the weight, or it is tied to a layer that
            was converted before.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            "BlockSparseWeightConfig: this layer is the output projection of an nn.MultiheadAttention, which reads its "
            "weight itself, so quantize_ must not replace it alone: leave it out by filter_fn, or use "
            "sparsify_(model, block_sparse_weight(...)), which sees the attention around it"
        )
    weight = module._parameters.get("weight")
    if isinstance(weight, Tensor) and WeakIdRef(weight) in _converted:
        raise ValueError(
            f"BlockSparseWeightConfig: the weight of this {tuple(weight.shape)} layer is shared with one that was "
            "converted already, and would be shared no more: leave both out by filter_fn, or use "
            "sparsify_(model, block_sparse_weight(...)), which leaves tied weights alone"
        )
    around = nn.Sequential(module)
    report = swap_to_bsr(around, config.blocksize, min_sparsity=config.min_sparsity, pad=config.pad)
    if report.swapped:
        if weight is not None:
            _converted[WeakIdRef(weight, _forget)] = report.swapped[0].fqn
        return around[0]
    (entry,) = (entry for entry in report.skipped if entry.fqn == "0")
    if entry.code not in _NOT_WORTH_IT:
        raise ValueError(
            f"BlockSparseWeightConfig: a layer of shape {entry.shape} cannot be stored as blocks: {entry.reason}; "
            "leave it out by filter_fn"
        )
    warnings.warn(
        f"quantize_: a layer of shape {entry.shape} stays dense: {entry.reason}", stacklevel=2
    )
    return module
