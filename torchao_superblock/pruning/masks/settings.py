"""What a setting of a mask may be: each check returns the value, normalised, or raises.

A check has the value and what an error begins with, for example the entry of a config it stands in.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchao_superblock.common.blocks import BlockSize, check_blocksize

Check = Callable[[object, str], Any]
"""`check(value, where)`: the setting, normalised, or an error that begins with `where`."""


def check_blocksize_setting(value: object, where: str = "") -> BlockSize:
    """Returns an int for square blocks or `(rows, cols)`, or raises with `where` in front."""
    rows, cols = check_blocksize(value, where)
    return (rows, cols) if isinstance(value, tuple | list) else rows


def check_gain(value: object, where: str = "") -> float:
    """Returns the exponent as a float, or raises with `where` in front."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}gain={value!r} must be a number in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(
            f"{where}gain={value} is outside [0, 1]: kept blocks are multiplied by density ** -gain, "
            "for example 0.5; 0 for no gain"
        )
    return float(value)


def check_count(value: object, where: str = "", name: str = "update_every") -> int:
    """Returns a number of steps, at least 1, or raises with `where` in front."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{where}{name}={value!r} must be a number of calls of step()")
    if value < 1:
        raise ValueError(f"{where}{name}={value} must be at least 1")
    return int(value)


def check_fraction(value: object, where: str = "", name: str = "drop_fraction") -> float:
    """Returns a number in `[0, 1)`, or raises with `where` in front."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}{name}={value!r} must be a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{where}{name}={value} is outside [0, 1)")
    return float(value)


def check_sharpness(value: object, where: str = "", name: str = "final_sharpness") -> float:
    """Returns a number of at least 1, or raises with `where` in front."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}{name}={value!r} must be a number of at least 1")
    if not 1 <= value < math.inf:
        raise ValueError(f"{where}{name}={value} must be at least 1, where it starts, and finite")
    return float(value)


def check_flag(value: object, where: str = "", name: str = "gradient_weighted") -> bool:
    """Returns True or False, or raises with `where` in front."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}{name}={value!r} must be True or False")
    return value


def check_sparsity_level(value: object, where: str = "") -> float:
    """Returns the level as a float, or raises with `where` in front."""
    # A float first: `step()` checks every level, and an abstract class takes several calls to ask.
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        else:
            raise TypeError(
                f"{where}sparsity_level={value!r} is a {type(value).__name__}; it must be a number "
                "in [0, 1), the fraction of blocks to prune"
            )
    level = float(value)
    if not 0 <= level < 1:
        raise ValueError(
            f"{where}sparsity_level={level} is outside [0, 1): it is the fraction of blocks to "
            "prune, for example 0.8; at 1 nothing would be left"
        )
    return level
