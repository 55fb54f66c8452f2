"""SpartanSparsifier: the soft factors and their gradient against float64 autograd, and what is squashed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchao_superblock.pruning import SpartanSparsifier
from torchao_superblock.pruning.masks.spartan import SpartanMask


def blocks(weight: Tensor) -> Tensor:
    return weight.view(8, 8, 4, 8)


def reference(weight: Tensor, n_kept: int, beta: float) -> Tensor:
    """What the forward computes, differentiable: soft factors of the norms, straight through the hard top-k."""
    norms = blocks(weight).square().sum((1, 3)).sqrt()
    z = beta * norms / norms.mean().detach()
    low, high = z.min().detach() - 30, z.max().detach() + 30
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(z - middle).sum() > n_kept else (low, middle)
    d = torch.sigmoid(z - low) * (1 - torch.sigmoid(z - low))
    d = (d / d.sum()).detach()
    mu = low + (d * (z - z.detach())).sum()  # moves with z so that the sum stays
    soft = torch.sigmoid(z - mu)
    hard = torch.zeros(soft.numel(), dtype=soft.dtype)
    hard[norms.flatten().topk(n_kept).indices] = 1
    out = (blocks(weight) * soft[:, None, :, None]).view(weight.shape)
    kept = (blocks(out.detach()) * hard.view(8, 1, 4, 1)).view(weight.shape)
    return out + (kept - out).detach()


@pytest.mark.parametrize("beta", [1.0, 5.0, 20.0])
def test_forward_and_gradient_against_float64(beta: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64).double()
    sparsifier = SpartanSparsifier(
        0.75, 8, freeze_step=10, final_sharpness=beta, update_every=1, gain=0.0
    )
    sparsifier.prepare(linear)
    for _ in range(10 - 1):
        sparsifier.step()
    mask, weight = linear.parametrizations.weight[0], linear.parametrizations.weight.original
    assert float(mask.soft.sum()) == pytest.approx(8, rel=1e-4)
    grad = torch.randn(64, 32, dtype=torch.float64)
    (linear.weight * grad).sum().backward()
    other = weight.detach().clone().requires_grad_()
    expected = reference(other, 8, float(mask.sharpness))
    (expected * grad).sum().backward()
    torch.testing.assert_close(linear.weight, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-4)
    pruned = ~mask.block_mask()
    assert (
        blocks(weight.grad).transpose(1, 2)[pruned].any()
    )  # a block that is not kept may still grow


def test_sharpness_rises_to_the_freeze_and_the_factors_go_into_the_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    sparsifier = SpartanSparsifier(
        0.75, 8, ramp_steps=4, freeze_step=8, final_sharpness=9.0, update_every=1
    )
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), lr=1e-2)
    masks = [m for m in model.modules() if isinstance(m, SpartanMask)]
    x = torch.randn(8, 32)
    for i in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if i == 7:
            break
        sparsifier.step()
        assert float(masks[0].sharpness) == pytest.approx(1 + 8 * (i + 1) / 8)
    sparsifier.step()
    assert all(mask.is_frozen and not mask.slope.any() for mask in masks)
    assert all(torch.equal(mask.soft, mask.block_mask().float()) for mask in masks)
    out = model(x)
    weight = model[0].weight.detach().clone()
    sparsifier.squash_mask()
    assert torch.equal(model(x), out) and torch.equal(model[0].weight, weight)


def test_squashed_before_the_freeze_the_weights_are_the_last_forwards() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    sparsifier = SpartanSparsifier(0.75, 8, freeze_step=10, final_sharpness=9.0, update_every=1)
    sparsifier.prepare(linear)
    for _ in range(3):
        sparsifier.step()
    weight = linear.weight.detach().clone()
    assert weight.any()
    sparsifier.squash_mask()
    torch.testing.assert_close(linear.weight, weight, rtol=1e-6, atol=0)
    assert int(blocks(linear.weight.detach()).any(3).any(1).sum()) == 8
