"""A block-sparse layer while a model is loaded: empty at first, then filled tensor by tensor, then finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import BSRLinear
from torchao_superblock.common.swappable import twin_of
from torchao_superblock.integrations.transformers.conv1d import BSRConv1D


def bsr_type(module: nn.Module) -> type[BSRLinear] | None:
    """What this module becomes, if a folder can describe that; else None."""
    twin = twin_of(type(module))
    return twin.bsr if twin is not None and twin.bsr in (BSRLinear, BSRConv1D) else None


class UnfinishedLinear(BSRLinear):
    """A layer that is being filled; transformers asks the weights of its modules whether they still need a start."""

    @property
    def weight(self) -> Tensor:
        weight = super().weight
        weight._is_hf_initialized = True
        return weight


class UnfinishedConv1D(UnfinishedLinear, BSRConv1D):
    """The same for a layer that stands for a `Conv1D`."""


_UNFINISHED = {BSRLinear: UnfinishedLinear, BSRConv1D: UnfinishedConv1D}


def unfinished(layer: BSRLinear) -> None:
    """Makes an unfinished layer of an ordinary one."""
    layer.__class__ = _UNFINISHED[type(layer)]


def empty_layer(linear: nn.Module, layer: dict[str, Any]) -> UnfinishedLinear:
    """A block-sparse layer without content on the meta device, like a linear one that is there."""
    cls = _UNFINISHED[bsr_type(linear)]
    (N, K), (r, c), nnz = layer["shape"], layer["blocksize"], layer["stored_blocks"]
    dtype = linear.weight.dtype
    with torch.device("cpu"):  # from_pretrained has made meta the default one
        bias = torch.zeros(N, dtype=dtype) if layer["bias"] else None
        index, col = (
            torch.zeros(-(-N // r) + 1, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int32),
        )
        layer = cls(K, N, (r, c), index, col, torch.zeros(0, r, c, dtype=dtype), bias)
    layer = layer.to("meta")
    layer.values = nn.Parameter(torch.empty(nnz, r, c, dtype=dtype, device="meta"))
    layer.col_indices = torch.empty(nnz, dtype=torch.int32, device="meta")
    return layer.train(linear.training)


def finish(layer: BSRLinear) -> None:
    """Makes an ordinary layer of one that has all its tensors.

    Raises:
        RuntimeError: they are not what a layer can hold.
    """
    with present(layer):  # its own checks of what it holds, and its plan
        layer.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
    layer.__class__ = BSRConv1D if isinstance(layer, BSRConv1D) else BSRLinear


@contextlib.contextmanager
def present(layer: nn.Module) -> Iterator[None]:
    """With the tensors of a layer there, although accelerate keeps them elsewhere between calls."""
    if not hasattr(layer, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield
