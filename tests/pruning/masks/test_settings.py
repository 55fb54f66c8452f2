"""What a setting may be: the value, normalised, or an error that names it and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchao_superblock.pruning.masks.settings import (
    check_blocksize_setting,
    check_count,
    check_flag,
    check_fraction,
    check_gain,
    check_sharpness,
    check_sparsity_level,
)


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (check_sparsity_level, 0, 0.0),
        (check_sparsity_level, torch.tensor([0.5]), 0.5),
        (check_blocksize_setting, 16, 16),
        (check_blocksize_setting, [8, 16], (8, 16)),
        (check_gain, 1, 1.0),
        (check_count, 1, 1),
        (check_fraction, 0, 0.0),
        (check_sharpness, 1, 1.0),
        (check_flag, True, True),
    ],
)
def test_what_may_be(check: Callable[..., Any], value: object, expected: object) -> None:
    checked = check(value, "somewhere: ")
    assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "error"),
    [
        (check_sparsity_level, 1.0, ValueError),
        (check_sparsity_level, math.nan, ValueError),
        (check_sparsity_level, True, TypeError),
        (check_blocksize_setting, 0, ValueError),
        (check_blocksize_setting, "16", TypeError),
        (check_gain, 1.5, ValueError),
        (check_gain, None, TypeError),
        (check_count, 0, ValueError),
        (check_count, 1.0, TypeError),
        (check_fraction, 1, ValueError),
        (check_fraction, False, TypeError),
        (check_sharpness, math.inf, ValueError),
        (check_sharpness, math.nan, ValueError),
        (check_sharpness, "2", TypeError),
        (check_flag, 1, TypeError),
    ],
)
def test_what_may_not(check: Callable[..., Any], value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^somewhere: .*(=|is )") as caught:
        check(value, "somewhere: ")
    assert str(value) in str(caught.value)
