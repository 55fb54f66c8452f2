"""Random weights are the same in both forms, and the same every time."""

import pytest
import torch

from benchmarks.measure.weights import gather_blocks, random_block_sparse


@pytest.mark.parametrize("blocksize", [16, (8, 32)])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_random_block_sparse_matches_its_dense_form(blocksize, sparsity):
    weight = random_block_sparse(64, 96, blocksize, sparsity, dtype=torch.float64)
    expected = max(1, round(weight.dense.numel() / weight.values[0].numel() * (1 - sparsity)))
    assert len(weight.col) == len(weight.values) == expected
    size = tuple(weight.values.shape[1:])
    sparse = torch.sparse_bsr_tensor(weight.crow, weight.col, weight.values, (64, 96))
    assert torch.equal(sparse.to_dense(), weight.dense)
    assert size == ((16, 16) if blocksize == 16 else (8, 32))
    again = random_block_sparse(64, 96, blocksize, sparsity, dtype=torch.float64)
    assert torch.equal(again.dense, weight.dense)


def test_random_block_sparse_refuses_a_shape_of_broken_blocks():
    with pytest.raises(ValueError, match="no multiple"):
        random_block_sparse(60, 64, 16, 0.5)


def test_gather_blocks_reads_the_stored_blocks():
    weight = random_block_sparse(32, 64, (8, 16), 0.5)
    assert torch.equal(gather_blocks(weight.dense, weight), weight.values)
