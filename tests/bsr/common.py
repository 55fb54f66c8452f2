"""Block-sparse layers for the tests, and a count of the op's calls."""

from unittest import mock

import torch
from torch import nn

from tests.reference import block_mask, expand_mask
from torchao_superblock.ops.bsr_linear import cpu_backend


def prune(linear: nn.Linear, blocksize: int | tuple[int, int], sparsity: float = 0.5) -> nn.Linear:
    """Zero random blocks of a linear layer in place, as a squashed mask would leave it."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    mask = block_mask(linear.out_features // r, linear.in_features // c, sparsity)
    with torch.no_grad():
        mask = expand_mask(mask, (r, c)).to(linear.weight.device)
        linear.weight.copy_(torch.where(mask, linear.weight, 0.0))
        if linear.bias is not None:
            linear.bias.normal_()
    return linear


def prune_all(model: nn.Module, blocksize: int, sparsity: float = 0.5) -> nn.Module:
    """:func:`prune` every linear layer whose shape allows it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not (
            module.out_features % blocksize or module.in_features % blocksize
        ):
            prune(module, blocksize, sparsity)
    return model


class CountCalls:
    """Counts the calls that reach the CPU kernel, so that nothing runs dense unnoticed."""

    def __enter__(self) -> "CountCalls":
        backend = cpu_backend()
        self._patch = mock.patch.object(backend, "forward", wraps=backend.forward)
        self._forward = self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    @property
    def count(self) -> int:
        return self._forward.call_count
