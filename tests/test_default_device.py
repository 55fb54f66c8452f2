"""What is made on the way is made where it belongs, whatever `torch.set_default_device` says."""

import copy

import pytest
import torch
from torch import Tensor, nn

from torchao_superblock import (
    allocate,
    load_bsr,
    prune_one_shot,
    save_bsr,
    sensitivity,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.visualize import plot_block_masks, plot_sensitivity


def loss(output: Tensor, _: Tensor) -> Tensor:
    return output.square().mean()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(8, 64) for _ in range(2)]


def test_sensitivities_and_levels(model, batches):
    with torch.device("meta"):
        found = sensitivity(model, batches, loss, [0.5, 0.8], 16, progress=False)
        plot_sensitivity(found)
        allocate(found, sparsity_level=0.6)


def test_pruned_swapped_saved_loaded_and_drawn(model, batches, tmp_path):
    with torch.device("meta"):
        prune_one_shot(model, batches, sparsity_level=0.5, blocksize=16, refine_steps=2)
        dense = copy.deepcopy(model)
        swap_to_bsr(model, 16, min_sparsity=0.0)
        plot_block_masks(model)
        save_bsr(model, tmp_path / "model.safetensors")
        loaded = copy.deepcopy(dense)
        load_bsr(loaded, tmp_path / "model.safetensors")
        swap_to_dense(model)
        swap_to_bsr(copy.deepcopy(dense), 16, measure=batches[0])
    expected = dense(batches[0])
    for other in (model, loaded):
        torch.testing.assert_close(other(batches[0]), expected)
