import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import block_mask, expand_mask, random_bsr
from torchao_superblock.bsr.format import (
    bsr_to_dense,
    check_bsr,
    dense_to_bsr,
    infer_blocksize,
    nonzero_blocks,
)


@settings(max_examples=60, deadline=None)
@given(
    R=st.integers(1, 6),
    C=st.integers(1, 6),
    r=st.integers(1, 9),
    c=st.integers(1, 9),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact_and_agrees_with_torch(R, C, r, c, sparsity, seed):
    dense, crow, col, values = random_bsr(R * r, C * c, (r, c), sparsity, seed=seed)
    found = dense_to_bsr(dense, (r, c))
    for ours, expected in zip(found, (crow, col, values), strict=True):
        assert torch.equal(ours, expected)
        assert ours.dtype == expected.dtype
        assert ours.is_contiguous()
    theirs = dense.to_sparse_bsr((r, c))
    assert torch.equal(found[0], theirs.crow_indices().int())
    assert torch.equal(found[1], theirs.col_indices().int())
    assert torch.equal(found[2], theirs.values())
    check_bsr(*found, dense.shape, (r, c))
    assert torch.equal(bsr_to_dense(*found, dense.shape), dense)


def test_negative_zeros_are_no_content_and_nan_is():
    weight = torch.zeros(4, 4)
    weight[:2, :2] = -0.0
    weight[2, 3] = float("nan")
    assert nonzero_blocks(weight, (2, 2)).tolist() == [[False, False], [False, True]]


def test_non_contiguous_weights_are_read_as_they_look():
    dense, *_ = random_bsr(16, 32, (4, 4), 0.5)
    crow, col, values = dense_to_bsr(dense.t(), (4, 4))
    assert torch.equal(bsr_to_dense(crow, col, values, (32, 16)), dense.t())


def test_to_dense_is_differentiable_in_values():
    dense, crow, col, values = random_bsr(12, 8, (3, 4), 0.5, torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: bsr_to_dense(crow, col, v, dense.shape), values)


class TestCheckBSR:
    """Every invariant, one by one."""

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (
                {"crow": torch.tensor([0, 1, 3])},
                TypeError,
                "crow_indices must be int32, got torch.int64",
            ),
            ({"col": torch.tensor([0, 0, 2])}, TypeError, "col_indices must be int32"),
            ({"crow": torch.tensor([[0, 1, 3]]).int()}, ValueError, "crow_indices must be 1-D"),
            ({"col": torch.tensor([[0, 0, 2]]).int()}, ValueError, "col_indices must be 1-D"),
            ({"values": torch.ones(3, 2, 2).int()}, TypeError, "values must be floating point"),
            ({"values": torch.ones(2, 2, 2)}, ValueError, r"\(3, 2, 2\).*got \(2, 2, 2\)"),
            ({"values": torch.ones(3, 2, 1)}, ValueError, r"got \(3, 2, 1\)"),
            ({"crow": torch.tensor([0, 1, 2, 3]).int()}, ValueError, "must have 3 entries.*got 4"),
            ({"crow": torch.tensor([1, 1, 3]).int()}, ValueError, "must start with 0, got 1"),
            ({"crow": torch.tensor([0, 1, 2]).int()}, ValueError, "must end with nnz = 3.*got 2"),
            (
                {"crow": torch.tensor([0, 4, 3]).int()},
                ValueError,
                "must not decrease, got 4 then 3 at block row 1",
            ),
            (
                {"crow": torch.tensor([0, -1, 3]).int()},
                ValueError,
                "must not decrease, got 0 then -1 at block row 0",
            ),
            ({"col": torch.tensor([0, 0, 3]).int()}, ValueError, r"must lie in \[0, 3\).*got 3"),
            ({"col": torch.tensor([-1, 0, 2]).int()}, ValueError, r"must lie in \[0, 3\).*got -1"),
            (
                {"col": torch.tensor([0, 2, 0]).int()},
                ValueError,
                "sorted and unique.*got 2 then 0 in block row 1",
            ),
            (
                {"col": torch.tensor([0, 2, 2]).int()},
                ValueError,
                "sorted and unique.*got 2 then 2 in block row 1",
            ),
            ({"shape": (5, 6)}, ValueError, r"4 entries.*3 block rows of shape \(5, 6\)"),
            (
                {
                    "shape": (3, 6),
                    "values": torch.tensor([1.0, 1, 1, float("nan")]).expand(3, 4).view(3, 2, 2),
                },
                ValueError,
                r"beyond the shape \(3, 6\) must be finite",
            ),
            (
                {
                    "shape": (4, 5),
                    "values": torch.tensor([1.0, float("inf"), 1, 1]).expand(3, 4).view(3, 2, 2),
                },
                ValueError,
                r"beyond the shape \(4, 5\) must be finite",
            ),
            ({"col": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "one device"),
        ],
    )
    def test_names_the_broken_invariant(self, change, error, words):
        good = {
            "crow": torch.tensor([0, 1, 3]).int(),
            "col": torch.tensor([0, 0, 2]).int(),
            "values": torch.ones(3, 2, 2),
            "shape": (4, 6),
            "blocksize": (2, 2),
        }
        check_bsr(*good.values())
        with pytest.raises(error, match=words) as caught:
            check_bsr(*(good | change).values(), name="encoder.0.mlp")
        assert "one device" in words or "encoder.0.mlp" in str(caught.value)

    def test_a_column_may_repeat_in_another_row(self):
        check_bsr(
            torch.tensor([0, 1, 2]).int(),
            torch.tensor([2, 0]).int(),
            torch.ones(2, 2, 2),
            (4, 6),
            (2, 2),
        )


@pytest.mark.parametrize(
    "blocksize", [(8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 8)]
)
def test_infer_blocksize_finds_the_block_size_of_the_mask(blocksize):
    r, c = blocksize
    torch.manual_seed(1)
    mask = block_mask(512 // r, 768 // c, 0.7)
    weight = torch.randn(512, 768) * expand_mask(mask, blocksize)
    assert infer_blocksize(weight) == blocksize


def test_infer_blocksize_forgives_a_few_dead_elements_and_blocks():
    torch.manual_seed(0)
    mask = block_mask(12, 12, 0.7)
    weight = torch.randn(768, 768) * expand_mask(mask, (64, 64))
    weight[torch.rand_like(weight) < 0.3] = 0.0
    row, col = mask.nonzero()[5].tolist()
    weight[row * 64 : row * 64 + 8, col * 64 : col * 64 + 8] = 0.0
    assert infer_blocksize(weight) == (64, 64)


def test_infer_blocksize_where_there_is_nothing_to_find():
    assert infer_blocksize(torch.randn(12, 64)) is None
    assert infer_blocksize(torch.randn(64, 100)) is None
    assert infer_blocksize(torch.randn(64, 96)) == (64, 32)
    assert infer_blocksize(torch.zeros(512, 512)) == (256, 256)
