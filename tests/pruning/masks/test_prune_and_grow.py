"""RigLSparsifier: which blocks go, which come, and with what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchao_superblock.pruning import RigLSparsifier
from torchao_superblock.pruning.masks.prune_and_grow import evenly_spread


@pytest.mark.parametrize("grid", [(24, 6), (6, 24), (7, 7), (5, 3), (1, 9), (9, 1)])
def test_the_first_blocks_lie_evenly(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    scores = evenly_spread(torch.zeros(grid))
    n = scores.numel()
    assert len(scores.unique()) == n
    for kept in range(1, n + 1):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[scores.flatten().topk(kept).indices] = True
        rows, cols = mask.view(grid).sum(1), mask.view(grid).sum(0)
        assert rows.max() - rows.min() <= 1 and cols.max() - cols.min() <= 1
    assert not torch.equal(scores, evenly_spread(torch.zeros(grid))) or n < 12


def test_the_smallest_go_and_the_largest_gradients_come_in_at_zero() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    sparsifier = RigLSparsifier(
        0.75, 8, freeze_step=1000, update_every=2, drop_fraction=0.5, gain=0.0
    )
    sparsifier.prepare(linear)
    weight, mask = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    before = mask.block_mask()
    sums = torch.zeros(8, 8)
    for i in range(2):
        linear.zero_grad()
        x, target = torch.randn(5, 64), torch.randn(5, 64)
        (linear(x) * target).sum().backward()
        if i == 1:  # the first step has to pass before anybody listens
            sums += (target.T @ x).view(8, 8, 8, 8).square().sum((1, 3))
        sparsifier.step()
    after = mask.block_mask()
    assert int(before.sum()) == int(after.sum()) == 16
    n_moved = round(0.5 / 2 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 1000))).item() * 16)
    gone, come = before & ~after, after & ~before
    assert int(gone.sum()) == int(come.sum()) == n_moved == 8
    norms = weight.detach().view(8, 8, 8, 8).square().sum((1, 3)).sqrt()
    assert norms[gone].max() <= norms[before & after].min()
    assert sums[come].min() >= sums[~before & ~come].max()
    assert not weight.detach().view(8, 8, 8, 8).transpose(1, 2)[come].any()


def test_nothing_moves_after_the_freeze_and_fewer_and_fewer_before() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    sparsifier = RigLSparsifier(0.75, 8, freeze_step=12, update_every=2, drop_fraction=0.5)
    sparsifier.prepare(linear)
    mask, moved = linear.parametrizations.weight[0], []
    for i in range(16):
        before = mask.block_mask()
        linear.zero_grad()
        linear(torch.randn(5, 64)).square().sum().backward()
        sparsifier.step()
        if i % 2:
            moved.append(int((before & ~mask.block_mask()).sum()))
    assert moved[0] > 0 and moved[:6] == sorted(moved[:6], reverse=True) and moved[5:] == [0] * 3


def test_the_gain_keeps_the_size_of_a_fresh_layers_outputs() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1024, 256, bias=False)
    x = torch.randn(64, 1024)
    dense = linear(x).std()
    RigLSparsifier(0.75, 16, freeze_step=10).prepare(linear)  # 4 times fewer: a gain of 2
    assert 0.9 < linear(x).std() / dense < 1.1
