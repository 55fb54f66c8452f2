"""Which tensors count as weights in a report."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchao_superblock.common.weights import is_hidden, other_weights


class Holder(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Holder(8, 8), ["tensor"]),
        (Holder(4, 8, 8), ["tensor"]),
        (Holder(8), []),
        (Holder(8, 7), []),  # narrower than any block
        (Holder(1, 8, 8), []),  # an embedding of positions
        (Holder(2, 2, 8, 8), []),
        (Holder(8, 8, dtype=torch.int64), []),
        (nn.Conv2d(1, 1, 1), ["weight"]),
        (nn.LazyConv2d(1, 1), []),
        (parametrizations.weight_norm(nn.Conv1d(8, 8, 3)), ["weight"]),
        (nn.MultiheadAttention(8, 2), ["in_proj_weight"]),
        (nn.Embedding(8, 8), ["weight"]),
        (nn.Linear(8, 8), []),
        (nn.LayerNorm(8), []),
    ],
)
def test_matrices_and_kernels_count(module: nn.Module, names: list[str]) -> None:
    assert [name for name, _ in other_weights(module)] == names


def test_parametrizations_hold_no_weight_of_their_own() -> None:
    linear = parametrizations.orthogonal(nn.Linear(8, 8))
    assert not [name for module in linear.modules() for name, _ in other_weights(module)]


def test_a_weight_computed_before_each_forward_is_hidden() -> None:
    linear = nn.Linear(8, 8)
    assert not is_hidden(linear)
    prune.l1_unstructured(linear, "weight", 0.5)
    assert is_hidden(linear)
    prune.remove(linear, "weight")
    assert not is_hidden(linear)
