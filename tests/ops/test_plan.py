import itertools

import pytest
import torch

import torchao_superblock.ops.plan as plan_module
from tests.reference import block_mask, random_bsr
from torchao_superblock.ops import build_plan, split_plan
from torchao_superblock.ops.plan import STRIPS_PER_GROUP, is_mixed, plan_fits, plan_length


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


def _plan(mask, blocksize):
    crow = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return build_plan(crow, mask.nonzero()[:, 1].int(), mask.shape[1], blocksize)


def _row_groups(mask, blocksize):
    return split_plan(_plan(mask, blocksize), *mask.shape, int(mask.sum())).row_groups.long()


def _is_mixed(mask, blocksize):
    return is_mixed(_plan(mask, blocksize), *mask.shape, int(mask.sum()))


@pytest.mark.parametrize("blocksize", [(64, 64), (32, 32), (16, 16), (64, 16), (16, 128)])
@pytest.mark.parametrize(("R", "C"), [(24, 12), (4, 9), (4, 1)])
def test_row_groups_are_whole_strips_that_share_more_slices_than_neighbours_do(R, C, blocksize):
    mask = block_mask(R, C, 0.9)
    order = _row_groups(mask, blocksize)
    assert sorted(order.tolist()) == list(range(R))
    stack, width = max(1, 64 // blocksize[0]), max(1, 64 // blocksize[1])
    strips = order.view(-1, stack)
    assert (strips[:, 0] % stack == 0).all() and (strips.diff(dim=1) == 1).all()

    def slices(rows):
        padded = torch.nn.functional.pad(rows, (0, -C % width))
        needs = padded.view(R // stack, stack, -1, width).any(3).any(1)
        return [int(group.any(0).sum()) for group in needs.split(STRIPS_PER_GROUP)]

    needed = slices(mask[order])
    assert sum(needed) <= sum(slices(mask))
    if (R, C) == (24, 12) and blocksize == (64, 64):
        assert sum(needed) < 0.8 * sum(slices(mask))
    full = needed[: R // stack // STRIPS_PER_GROUP]
    assert full == sorted(full, reverse=True), "groups that need most first"


def _needs(mask, order, blocksize):
    """The slices that each group needs and the block columns that each strip needs."""
    stack, width = (max(1, 64 // side) for side in blocksize)
    blocks = mask[order]
    slices = torch.nn.functional.pad(blocks, (0, -mask.shape[1] % width))
    slices = slices.unflatten(1, (-1, width)).any(2)
    of_groups = [int(group.any(0).sum()) for group in slices.split(STRIPS_PER_GROUP * stack)]
    return of_groups, [int(strip.any(0).sum()) for strip in blocks.split(stack)]


@pytest.mark.parametrize(("c", "R", "C"), [(32, 96, 24), (16, 48, 48), (64, 48, 24), (32, 10, 24)])
def test_two_block_rows_of_32_make_a_strip_where_they_need_the_same(c, R, C):
    mask = block_mask(R, C, 0.8)
    assert _is_mixed(mask, (32, c))
    order = _row_groups(mask, (32, c))
    assert sorted(order.tolist()) == list(range(R))
    slices, columns = _needs(mask, order, (32, c))
    natural_slices, natural_columns = _needs(mask, torch.arange(R), (32, c))
    assert sum(slices) <= sum(natural_slices) and sum(columns) < sum(natural_columns)
    full = slices[: R // (2 * STRIPS_PER_GROUP)]
    assert full == sorted(full, reverse=True), "groups that need most first"


def test_block_rows_of_one_pattern_make_strips():
    mask = torch.eye(8, dtype=torch.bool).repeat(6, 1).repeat_interleave(4, 1)  # rows i, i + 8, ...
    groups = _row_groups(mask, (32, 32)).split(6)
    assert [len({row % 8 for row in group.tolist()}) for group in groups] == [1] * 8


def test_block_rows_stay_neighbours_where_writing_apart_costs_more():
    mask = torch.zeros(96, 24, dtype=torch.bool)
    mask[:, :4] = True
    assert _is_mixed(mask, (32, 32)) and not _is_mixed(mask, None)
    assert not _is_mixed(mask, (16, 32)) and not _is_mixed(mask, (64, 32))
    mask[0, 0] = False
    assert not _is_mixed(mask, (32, 32))
    order = _row_groups(block_mask(96, 24, 0.9), (32, 32)).view(-1, 2)
    assert (order[:, 0] % 2 == 0).all() and (order.diff(dim=1) == 1).all()


def test_a_mixed_plan_says_so_by_its_length():
    mask = block_mask(96, 24, 0.5)
    shape = (*mask.shape, int(mask.sum()))
    plan, natural = _plan(mask, (32, 32)), _plan(mask, None)
    assert plan.numel() == natural.numel() + 1 == plan_length(*shape) + 1
    assert [plan_fits(plan.numel() + more, *shape) for more in (-2, -1, 0, 1)] == [0, 1, 1, 0]
    for part, same in zip(split_plan(plan, *shape)[:-1], split_plan(natural, *shape), strict=False):
        assert torch.equal(part, same)


def _band(R, C, sparsity):
    """Blocks near the diagonal."""
    distance = (torch.arange(R)[:, None] / R - torch.arange(C) / C).abs()
    return distance < distance.flatten().kthvalue(round(R * C * (1 - sparsity))).values


def _equal_neighbours(R, C, sparsity):
    return block_mask(R // 2, C, sparsity).repeat_interleave(2, 0)


@pytest.mark.parametrize("blocksize", [(64, 64), (32, 32), (16, 16)])
@pytest.mark.parametrize(("R", "C"), [(96, 24), (48, 120)])
@pytest.mark.parametrize("mask", [_band, _equal_neighbours])
def test_masks_with_structure_never_need_more_than_in_the_natural_order(mask, R, C, blocksize):
    mask = mask(R, C, 0.6)

    def cost(order):
        slices, columns = _needs(mask, order, blocksize)
        columns = sum(n**2 for n in columns) / 4 if _is_mixed(mask, blocksize) else 0
        return sum(n**2 for n in slices) + columns

    assert cost(_row_groups(mask, blocksize)) <= cost(torch.arange(R))


def test_no_exchange_of_two_block_rows_lowers_what_groups_and_strips_need():
    mask = block_mask(24, 24, 0.7)
    assert _is_mixed(mask, (32, 32))
    order = _row_groups(mask, (32, 32))

    def cost(order):
        slices, columns = _needs(mask, order, (32, 32))
        return sum(n**2 for n in slices) + sum(n**2 for n in columns) / 4

    least = cost(order)
    for i, j in itertools.combinations(range(24), 2):
        exchanged = order.clone()
        exchanged[[i, j]] = order[[j, i]]
        assert cost(exchanged) >= least - 1e-3, (i, j)


def _unevenness(mask, order):
    """What exchanges lower: the sum of squares of the slices that groups need (blocks of 64 x 64)."""
    return sum(int(group.any(0).sum()) ** 2 for group in mask[order].split(STRIPS_PER_GROUP))


@pytest.mark.parametrize(("R", "C", "sparsity"), [(24, 12, 0.9), (24, 12, 0.7), (13, 40, 0.9)])
def test_no_swap_of_two_rows_makes_the_groups_smaller_or_more_alike(R, C, sparsity):
    mask = block_mask(R, C, sparsity)
    order = _row_groups(mask, (64, 64))
    least = _unevenness(mask, order)
    for i, j in itertools.combinations(range(R), 2):
        swapped = order.clone()
        swapped[i], swapped[j] = order[j], order[i]
        assert _unevenness(mask, swapped) >= least, (i, j)


def test_rows_too_many_to_compare_with_each_other_are_grouped_without_exchanges(monkeypatch):
    mask = block_mask(96, 48, 0.9)
    swapped = _row_groups(mask, (64, 64))
    monkeypatch.setattr(plan_module, "_EXCHANGED", 95)
    greedy = _row_groups(mask, (64, 64))
    assert sorted(greedy.tolist()) == list(range(96))
    natural = torch.arange(96)
    assert _unevenness(mask, swapped) < _unevenness(mask, greedy) < _unevenness(mask, natural)


def test_rows_that_repeat_a_pattern_are_grouped_by_it():
    mask = torch.eye(4, dtype=torch.bool).repeat(3, 1)  # rows i, i + 4 and i + 8 are the same
    groups = _row_groups(mask, (64, 64)).split(3)
    assert [len({row % 4 for row in group.tolist()}) for group in groups] == [1] * 4


@pytest.mark.parametrize(("R", "blocksize"), [(5, (32, 32)), (6, (128, 128)), (6, (48, 48))])
def test_rows_that_make_no_whole_strips_keep_their_order(R, blocksize):
    assert _row_groups(block_mask(R, 8, 0.5), blocksize).tolist() == list(range(R))


@pytest.mark.parametrize("blocksize", [None, (64, 64), (32, 128)])
def test_building_a_plan_asks_nothing_of_the_device(blocksize):
    """A meta tensor has no answer to give, so whatever would wait for a GPU fails here."""
    crow, col = torch.empty(13, dtype=torch.int32), torch.empty(20, dtype=torch.int32)
    plan = build_plan(crow.to("meta"), col.to("meta"), 8, blocksize)
    assert plan.numel() == plan_length(12, 8, 20) + (blocksize == (32, 128))


def test_a_bad_index_makes_a_bad_plan_and_no_error():
    for sparsity, mixed in ((0.8, False), (0, True)):
        _, crow, col, _ = random_bsr(128, 128, 32, sparsity)
        for bad in (-3, 2**20):
            for rows in (crow, crow + bad, crow * 0 + bad):
                plan = build_plan(rows.int(), col * 0 + bad, 4, (32, 32))
                assert is_mixed(plan, 4, 4, len(col)) is mixed
                order = split_plan(plan, 4, 4, len(col)).row_groups
                assert sorted(order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("R", "C"), [(0, 4), (4, 0)])
def test_a_plan_of_nothing(R, C):
    crow, col = torch.zeros(R + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    assert build_plan(crow, col, C, (64, 64)).shape == (plan_length(R, C, 0),)
