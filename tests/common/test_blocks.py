"""Block sizes and grids: the two rules, side by side."""

import pytest

from torchao_superblock.common.blocks import (
    block_grid,
    check_blocksize,
    parse_blocksize,
    whole_block_grid,
)


@pytest.mark.parametrize(
    ("blocksize", "expected"), [(3, (3, 3)), ((3, 4), (3, 4)), ([5, 6], (5, 6))]
)
def test_parse_blocksize(blocksize, expected):
    assert parse_blocksize(blocksize) == expected


@pytest.mark.parametrize(
    ("blocksize", "error"),
    [
        (0, ValueError),
        ((4, -1), ValueError),
        (1.5, TypeError),
        ("64", TypeError),
        ((1,), TypeError),
        (True, TypeError),
        ((4, 2.0), TypeError),
    ],
)
def test_parse_blocksize_says_what_it_wants(blocksize, error):
    with pytest.raises(error, match="blocksize must be.*got"):
        parse_blocksize(blocksize)


@pytest.mark.parametrize("value", [1.5, "64", (1,), True, (4, 2.0)])
def test_check_blocksize_begins_with_where(value):
    assert check_blocksize([3, 4]) == (3, 4) and check_blocksize(8) == (8, 8)
    with pytest.raises(TypeError, match="^config: blocksize=.*must be an int"):
        check_blocksize(value, "config: ")
    with pytest.raises(ValueError, match="^config: blocksize=0 must be at least 1"):
        check_blocksize(0, "config: ")


def test_a_mask_rounds_the_grid_up_and_a_bsr_weight_refuses():
    assert block_grid((50, 33), (16, 16)) == (4, 3)
    assert whole_block_grid((48, 32), (16, 16)) == (3, 2)
    with pytest.raises(ValueError, match=r"\(50, 33\) is not a multiple of the block size 16x16"):
        whole_block_grid((50, 33), (16, 16))
