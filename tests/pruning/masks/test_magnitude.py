"""MagnitudeSparsifier: which blocks it keeps, against norms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchao_superblock.pruning import MagnitudeSparsifier


def norms(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    r, c = blocksize
    n, k = weight.shape
    padded = torch.zeros(-(-n // r) * r, -(-k // c) * c, dtype=torch.float64)
    padded[:n, :k] = weight.detach()
    return padded.view(-1, r, padded.shape[1] // c, c).square().sum((1, 3)).sqrt()


@pytest.mark.parametrize(("shape", "blocksize"), [((64, 48), (8, 8)), ((50, 40), (16, 12))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_norms_are_kept(
    shape: tuple[int, int], blocksize: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).to(dtype)
    sparsifier = MagnitudeSparsifier(0.7, blocksize, update_every=3)
    sparsifier.prepare(linear)
    weight, mask = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    for step in range(1, 7):
        seen = mask.block_mask()
        with torch.no_grad():
            weight.copy_(torch.randn_like(weight))
        sparsifier.step()
        if step % 3:
            assert torch.equal(mask.block_mask(), seen)  # not looked at yet
        else:
            expected = norms(weight, blocksize)
            kept = int(mask.block_mask().sum())
            chosen = torch.zeros(expected.numel(), dtype=torch.bool)
            chosen[expected.flatten().topk(kept).indices] = True
            assert torch.equal(mask.block_mask(), chosen.view(expected.shape))


def test_norms_are_weighted_by_a_running_mean_of_squared_gradients() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    sparsifier = MagnitudeSparsifier(0.5, 8, update_every=3, gradient_weighted=True)
    sparsifier.prepare(linear)
    weight, mask = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    mean = torch.zeros(8, 4, dtype=torch.float64)
    for i in range(3):
        linear.zero_grad()
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(i))
        target = torch.randn(5, 64, generator=torch.Generator().manual_seed(100 + i))
        out = linear(x)
        (out * target).sum().backward()
        dense = target.double().T @ x.double()  # of pruned blocks too
        square = dense.view(8, 8, 4, 8).square().sum((1, 3))
        mean += 0.02 * (square / square.square().mean().sqrt() - mean)
        sparsifier.step()
    torch.testing.assert_close(mask.mean_square.double(), mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        mask.scores.double(), norms(weight, (8, 8)) * mean.sqrt(), rtol=1e-4, atol=0
    )


def test_statistics_are_invisible_to_gradient_clipping() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    sparsifier = MagnitudeSparsifier(0.5, 8, gradient_weighted=True)
    sparsifier.prepare(linear)
    (1e3 * linear(torch.randn(5, 32)).square().sum()).backward()
    carrier = linear.parametrizations.weight[0].carrier
    assert carrier.grad.any()
    rest = [p for p in linear.parameters() if p is not carrier]
    assert torch.equal(
        torch.nn.utils.get_total_norm([p.grad for p in linear.parameters()]),
        torch.nn.utils.get_total_norm([p.grad for p in rest]),
    )


def test_without_a_ramp_a_block_may_come_back() -> None:
    linear = nn.Linear(32, 32)
    sparsifier = MagnitudeSparsifier(0.5, 8, update_every=1)
    sparsifier.prepare(linear)
    mask, weight = linear.parametrizations.weight[0], linear.parametrizations.weight.original
    gone = mask.block_mask().logical_not()
    with torch.no_grad():
        weight[gone.repeat_interleave(8, 0).repeat_interleave(8, 1)] = 10.0
    sparsifier.step()
    assert torch.equal(mask.block_mask(), gone)


def test_nan_weights_are_refused() -> None:
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'weight' contains NaN"):
        MagnitudeSparsifier(0.5, 8).prepare(linear)
    assert type(linear) is nn.Linear
