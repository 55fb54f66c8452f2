"""Masks that a config gives, and convolutions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchao_superblock.pruning import MagnitudeSparsifier, SupermaskSparsifier
from torchao_superblock.pruning.masks.given import GivenMask


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def train(net: nn.Module, sparsifier: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(sparsifier.param_groups(net, weight_decay=0.1), lr=1e-2)
    for i in range(steps):
        optimizer.zero_grad()
        net(
            torch.randn(4, 32, generator=torch.Generator().manual_seed(i))
        ).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def test_a_given_mask_is_kept_from_the_start_through_ramps_and_unfreezing() -> None:
    net, mask = model(), torch.rand(8, 4) < 0.3
    sparsifier = MagnitudeSparsifier(0.5, 8, ramp_steps=2, update_every=1)
    sparsifier.prepare(net, [{"tensor_fqn": "*"}, {"tensor_fqn": "0.weight", "mask": mask}])
    assert isinstance(net[0].parametrizations.weight[0], GivenMask)
    train(net, sparsifier)
    sparsifier.unfreeze()
    train(net, sparsifier)
    assert torch.equal(sparsifier.state["0.weight"]["mask"], mask)
    entry = sparsifier.summary().groups[1]
    assert entry.frozen and entry.kept == int(mask.sum()) and entry.fqn == "0.weight"
    net[0].reset_parameters()
    assert torch.equal(sparsifier.state["0.weight"]["mask"], mask)
    sparsifier.squash_mask()
    assert torch.equal(net[0].weight.detach().view(8, 8, 4, 8).any(3).any(1), mask)


def test_a_squashed_model_trains_on_without_regrowing() -> None:
    net = model()
    sparsifier = SupermaskSparsifier(0.75, 8)
    sparsifier.prepare(net)
    sparsifier.squash_mask()
    zeros = [module.weight == 0 for module in (net[0], net[2])]
    before = copy.deepcopy(net)
    sparsifier.prepare(net, [{"tensor_fqn": "*", "mask": "weights"}])
    torch.testing.assert_close(net(torch.ones(2, 32)), before(torch.ones(2, 32)))
    train(net, sparsifier)
    sparsifier.squash_mask()
    for module, old, zero in zip((net[0], net[2]), (before[0], before[2]), zeros, strict=True):
        assert torch.equal(module.weight == 0, zero) and not torch.equal(module.weight, old.weight)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (
            {"mask": torch.ones(3, 4).bool()},
            ValueError,
            r"shape \(3, 4\), and its grid of 8x8 blocks is \(8, 4\)",
        ),
        ({"mask": torch.zeros(8, 4).bool()}, ValueError, "'0.weight': the mask keeps no block"),
        ({"mask": torch.ones(8, 4)}, TypeError, "must be a bool tensor.*float32"),
        ({"mask": "zeros"}, TypeError, "or 'weights'.*got 'zeros'"),
        ({"mask": "weights", "sparsity_level": 0.5}, ValueError, "a mask and sparsity_level=0.5"),
        (
            {"mask": torch.ones(8, 4).bool(), "tensor_fqn": "*"},
            ValueError,
            "a glob can name several",
        ),
        ({"types": "Conv2d"}, TypeError, "types='Conv2d' must be a tuple of module types"),
    ],
)
def test_bad_masks(entry: dict[str, Any], error: type[Exception], message: str) -> None:
    net = model()
    with pytest.raises(error, match=message):
        SupermaskSparsifier(0.5, 8).prepare(net, [{"tensor_fqn": "0.weight", **entry}])
    assert type(net[0]) is nn.Linear


def test_a_weight_of_zeros_only_has_no_mask() -> None:
    net = model()
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ValueError, match="keeps no block"):
        SupermaskSparsifier(0.5, 8).prepare(net, [{"tensor_fqn": "0.weight", "mask": "weights"}])


# -------------------------------------------------------------------------------------------------
# Convolutions
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [SupermaskSparsifier, MagnitudeSparsifier])
def test_convolutions_are_masked_as_matrices(kind: Any, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Flatten(), nn.Linear(32, 32)
    )
    net = net.to(memory_format=memory_format)
    sparsifier = kind(0.5, 8, ramp_steps=2)
    sparsifier.prepare(net, [{"tensor_fqn": "*", "types": (nn.Conv2d,)}])
    assert [group["tensor_fqn"] for group in sparsifier.groups] == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]
    optimizer = torch.optim.AdamW(sparsifier.param_groups(net), lr=1e-2)
    x = torch.randn(4, 8, 3, 3).to(memory_format=memory_format)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    masks = {fqn: entry["mask"] for fqn, entry in sparsifier.state.items()}
    assert masks["0.weight"].shape == (2, 9)
    out = net(x)
    assert "16x8x3x3" in str(sparsifier.summary())
    sparsifier.squash_mask()
    torch.testing.assert_close(net(x), out)
    matrix = net[0].weight.detach().flatten(1).view(2, 8, 9, 8)
    assert torch.equal(matrix.any(3).any(1), masks["0.weight"])


def test_grouped_convolutions_are_refused_by_name_and_skipped_by_globs() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1))
    with pytest.raises(ValueError, match=r"'0\.weight': it is a convolution of 16 groups"):
        SupermaskSparsifier(0.5, 8).prepare(net, [{"tensor_fqn": "0.weight"}])
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(net, [{"tensor_fqn": "*", "types": (nn.Conv2d,)}])
    assert [entry.code for entry in sparsifier.summary().skipped] == ["grouped"]
    without = SupermaskSparsifier(0.5, 8)
    with pytest.raises(ValueError, match="matches no weight"):
        without.prepare(nn.Sequential(nn.Conv2d(8, 8, 1)), [{"tensor_fqn": "*"}])
