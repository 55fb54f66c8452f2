"""Block-sparse layers for the tests, and a count of the op's calls."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import block_mask, expand_mask


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


class CountCalls(TorchDispatchMode):
    """Counts the calls of the op, so that nothing runs dense unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.torchao_superblock.bsr_linear.default
        return func(*args, **(kwargs or {}))


def snapshot(model):
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        [type(module) for module in model.modules()],
        [id(module) for module in model.modules()],
    )


def assert_unchanged(model, before):
    state, types, identities = before
    assert [type(module) for module in model.modules()] == types
    assert [id(module) for module in model.modules()] == identities
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
