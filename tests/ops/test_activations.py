"""The table of activations: its gradients, at extremes too."""

import pytest
import torch

from tests.reference import EXTREMES
from torchao_superblock.ops.activations import ACTIVATIONS, activation_backward


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_gradients_at_extremes_are_torch_s(activation, dtype, again):
    largest = torch.finfo(dtype).max
    z = torch.tensor([*EXTREMES, largest, -largest]).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    with torch.set_grad_enabled(
        again
    ):  # a gradient that is differentiated again has another formula
        found = activation_backward(activation, torch.ones_like(z), z)
    torch.testing.assert_close(found.detach(), expected, equal_nan=True)
