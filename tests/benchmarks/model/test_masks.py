"""Random blocks: exactly as many as asked for, the same on every device, in every matrix that is named."""

import pytest
import torch
from torch import nn

from benchmarks.measure.weights import random_block_sparse
from benchmarks.model.masks import zero_blocks_of, zero_random_blocks


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 12), (0.9, 2), (0.99, 1)])
def test_blocks_are_kept_whole(sparsity, kept):
    weight = torch.ones(64, 96)
    zero_random_blocks(weight, 16, sparsity, seed=3)
    blocks = weight.view(4, 16, 6, 16).sum((1, 3))
    assert sorted(blocks.flatten().tolist()) == [0.0] * (24 - kept) + [256.0] * kept
    # The blocks of one layer's benchmark.
    assert torch.equal(weight != 0, random_block_sparse(64, 96, 16, sparsity, seed=3).dense != 0)


def test_matrices_are_picked_by_name():
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 40))
    assert list(zero_blocks_of(model, r"^0\.", 16, 0.75)) == ["0.weight"]
    assert (model[0].weight == 0).float().mean() == 0.75 and (model[2].weight != 0).all()
    with pytest.raises(ValueError, match=r"2.weight is \(40, 32\), no multiple of blocks of 16"):
        zero_blocks_of(model, r"^2\.", 16, 0.75)
    with pytest.raises(ValueError, match="no matrix of Sequential has a name like '9'"):
        zero_blocks_of(model, "9", 16, 0.75)
