"""A dense model is swapped weight by weight while it is loaded: its dense weights are never there all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from torchao_superblock.bsr import SwapEntry, SwapReport, swap_to_bsr
from torchao_superblock.integrations.transformers.config import BlockSparseConfig
from torchao_superblock.integrations.transformers.layer import (
    UnfinishedLinear,
    bsr_type,
    finish,
    unfinished,
)

logger = logging.get_logger(__name__)


class Swapping(ConversionOps):
    """What transformers calls with each weight that :meth:`wants` says yes to.

    Args:
        config: says what is to be swapped.
    """

    def __init__(self, config: BlockSparseConfig) -> None:
        self.config = config
        self.entries: dict[str, SwapEntry] = {}  # by FQN

    def wants(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a parameter is the weight of a linear layer that may become block-sparse."""
        fqn, _, tensor = name.rpartition(".")
        module, ties = model.get_submodule(fqn), model.all_tied_weights_keys
        return (
            tensor == "weight"
            and bsr_type(module) is not None
            and name not in {*ties, *ties.values()}
            and not self.config.keeps_dense(fqn)
        )

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Puts block-sparse layers in place and returns what stays dense."""
        dense = {}
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if not self.wants(model, name) or not self._swap(model, name, tensor):
                dense[name] = tensor
            elif missing_keys is not None:
                missing_keys.discard(name)
        return dense

    def _swap(self, model: PreTrainedModel, name: str, weight: Tensor) -> bool:
        fqn = name.rpartition(".")[0]
        linear = model.get_submodule(fqn)
        if weight.shape != linear.weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} in the file, and {tuple(linear.weight.shape)} in the model"
            )
        with torch.device("meta"):
            N, K = bsr_type(linear).features_of(linear)
            alone = Conv1D(N, K) if isinstance(linear, Conv1D) else nn.Linear(K, N)
        alone.bias = None  # perhaps not loaded yet
        alone.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        parent = nn.Sequential(alone)
        options = {"min_sparsity": self.config.min_sparsity, "pad": self.config.pad}
        report = swap_to_bsr(parent, self.config.blocksize, **options)
        (entry,) = (*report.swapped, *report.skipped)
        self.entries[fqn] = dataclasses.replace(entry, fqn=fqn)
        if not report.swapped:
            return False
        layer = parent[0].train(linear.training)
        unfinished(layer)
        if linear.bias is not None:
            layer.bias = linear.bias  # loaded, or yet to be
        model.set_submodule(fqn, layer)
        return True

    def finish(self, model: PreTrainedModel) -> SwapReport:
        """Finishes the layers and says what became of every weight."""
        for module in model.modules():
            if isinstance(module, UnfinishedLinear):
                finish(module)
        rest = swap_to_bsr(
            model,
            self.config.blocksize,
            min_sparsity=self.config.min_sparsity,
            pad=self.config.pad,
            filter_fn=lambda module, fqn: (
                bsr_type(module) is not None
                and fqn not in self.entries
                and not self.config.keeps_dense(fqn)
            ),
        )
        place = {fqn: i for i, (fqn, _) in enumerate(model.named_modules())}
        entries = [
            *self.entries.values(),
            *rest.swapped,
            *(entry for entry in rest.skipped if entry.fqn not in self.entries),
        ]
        entries.sort(key=lambda e: place.get(e.fqn, place.get(e.fqn.rpartition(".")[0], 0)))
        report = SwapReport(
            [entry for entry in entries if entry.code == "swapped"],
            [entry for entry in entries if entry.code != "swapped"],
            rest.notes,
        )
        _log(report)
        return report


def _log(report: SwapReport) -> None:
    """Says what stays dense although it has blocks of zeros, or that there were none."""
    lines = [f"{entry.fqn}: {entry.reason}" for entry in report.skipped if entry.sparsity]
    if not report.swapped:
        lines = lines or ["no weight has a block of zeros"]
        logger.warning(f"from_pretrained: BlockSparseConfig swapped no layer: {'; '.join(lines)}")
    elif lines:
        logger.warning(
            f"from_pretrained: {len(report.swapped)} layers are block-sparse now. These have blocks of zeros and stay "
            f"dense: {'; '.join(lines)}"
        )
