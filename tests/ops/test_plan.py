import pytest
import torch

from tests.reference import block_mask, random_bsr
from torchao_superblock.ops import build_plan, split_plan
from torchao_superblock.ops.plan import GROUP, plan_length


@pytest.mark.parametrize(
    ("R", "C", "sparsity"), [(5, 7, 0.5), (1, 9, 0.3), (8, 1, 0.9), (6, 6, 0.0)]
)
def test_plan_agrees_with_the_block_mask(R, C, sparsity):
    mask = block_mask(R, C, sparsity)
    _, crow, col, _ = random_bsr(R * 2, C * 3, (2, 3), mask=mask)
    nnz = col.numel()
    plan = split_plan(build_plan(crow, col, C), R, C, nnz)

    row, column = mask.nonzero(as_tuple=True)
    assert plan.row_indices.tolist() == row.tolist()
    column_t, row_t = mask.t().nonzero(as_tuple=True)
    assert plan.row_t.tolist() == row_t.tolist()
    assert plan.crow_t.tolist() == [0, *mask.sum(0).cumsum(0).tolist()]
    position = torch.full(mask.shape, -1)
    position[row, column] = torch.arange(nnz)
    assert plan.perm_t.tolist() == position[row_t, column_t].tolist()
    for order, lengths in ((plan.row_order, mask.sum(1)), (plan.col_order, mask.sum(0))):
        assert sorted(order.tolist()) == list(range(len(lengths)))
        assert lengths[order.long()].diff().le(0).all(), "longest first"


def test_plan_of_a_weight_without_blocks():
    crow, col = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    packed = build_plan(crow, col, 5)
    assert packed.dtype == torch.int32
    assert packed.numel() == plan_length(3, 5, 0)
    plan = split_plan(packed, 3, 5, 0)
    assert plan.row_order.tolist() == [0, 1, 2]
    assert plan.crow_t.tolist() == [0] * 6
    assert plan.row_groups.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("R", "C"), [(24, 12), (7, 5), (2, 9), (1, 1)])
def test_row_groups_are_every_row_once_and_share_more_columns_than_neighbours_do(R, C):
    mask = block_mask(R, C, 0.75)
    _, crow, col, _ = random_bsr(R * 2, C * 2, 2, mask=mask)
    order = split_plan(build_plan(crow, col, C, group_rows=True), R, C, col.numel()).row_groups
    assert sorted(order.tolist()) == list(range(R))

    def columns(rows):
        return sum(int(group.any(0).sum()) for group in rows.split(GROUP))

    assert columns(mask[order.long()]) <= columns(mask)


def test_rows_that_repeat_a_pattern_are_grouped_by_it():
    mask = torch.eye(4, dtype=torch.bool).repeat(3, 1)  # rows i, i + 4 and i + 8 are the same
    _, crow, col, _ = random_bsr(24, 8, 2, mask=mask)
    order = split_plan(build_plan(crow, col, 4, group_rows=True), 12, 4, col.numel()).row_groups
    assert [len({row % 4 for row in group.tolist()}) for group in order.split(3)] == [1] * 4
