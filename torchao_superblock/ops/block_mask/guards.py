"""Guards of a mask's state: they tell whether something averaged it, and what it was.

Tools that average models (EMA, SWA) average integer buffers too, and truncate: of 102 blocks to keep
they make 101, of a frozen mask one that is not. No plain encoding survives that. So beside the values
stand a checksum of each, which an average destroys, and moments in floating point, which it leaves
exact while all that was averaged agrees:

* the checksum is right: the value was copied, or never touched;
* else `mean(n^2) - mean(n)^2` is 0, and a flag's mean is 0 or 1: all agree, the mean is the value;
* else values were mixed and there is none: the mask is broken.

An average that forgets (EMA) comes round: a share of old values below :data:`TOLERANCE` is outvoted.

Everything here is integer or elementwise arithmetic without overflow, so that Python, PyTorch,
`torch.compile` and the Triton kernels get the same numbers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

TOLERANCE = 0.1
"""Below this variance at least nine tenths of what was averaged agree, and rounding finds it."""

Integers = TypeVar("Integers", int, Tensor)

_LOW = 0x7FFFFFFF


class Guards(NamedTuple):
    """What stands beside `n_kept`, `frozen` and `held_mask`.

    Attributes:
        checksums: int64 `(2,)`, of `n_kept`, and of `frozen` together with `held_mask`.
        moments: float64 `(3,)`: `n_kept`, its square, `frozen`.
        held_mean: float32 `(R, C)`: `held_mask`.
    """

    checksums: Tensor
    moments: Tensor
    held_mean: Tensor


def level_checksum(n_kept: Integers) -> Integers:
    """Of the number of kept blocks; an int or an int64 tensor."""
    return _mix(n_kept * 0x1E3779B97F + 0x1F83D9ABFB)


def pattern_checksum(frozen: Integers, held_sum: Integers) -> Integers:
    """Of the held mask; while nothing is held a constant, whatever `held_sum` is."""
    return _mix(frozen * (held_sum + 0x13C6EF372F) + 0x1A54FF53A5)


def held_sum(held_mask: Tensor) -> Tensor:
    """What :func:`pattern_checksum` needs of a held mask: an int64, 0-dim."""
    return (held_mask.reshape(-1) * _weights(held_mask.numel(), held_mask.device)).sum()


def settle(
    n_kept: Tensor, held_mask: Tensor, frozen: Tensor, guards: Guards
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state of a mask as it was before an average, if that can be told.

    Args:
        n_kept: int64, 0-dim.
        held_mask: int8 `(R, C)`.
        frozen: int8, 0-dim.
        guards: of these three.

    Returns:
        `n_kept`, and as bool `held_mask`, `frozen`, and whether the mask is sound. Of one that is
        not, no block is kept.
    """
    # The same in Triton: `_settle` in kernels.py.
    mean, square, frozen_mean = guards.moments.unbind()
    level_copied = level_checksum(n_kept) == guards.checksums[0]
    rounded = mean.round().to(torch.int64)
    level_sound = level_copied | (((square - mean * mean).abs() < TOLERANCE) & (rounded >= 1))

    checksum = pattern_checksum(frozen.to(torch.int64), held_sum(held_mask))
    copied = checksum == guards.checksums[1]
    is_frozen = torch.where(copied, frozen != 0, frozen_mean > 0.5)
    agreed = guards.held_mean > 0.5
    held = torch.where(copied, held_mask != 0, agreed)
    unanimous = ((guards.held_mean - agreed.to(torch.float32)).abs() < TOLERANCE).all()
    flag_agrees = (frozen_mean - is_frozen.to(frozen_mean.dtype)).abs() < TOLERANCE
    pattern_sound = copied | (flag_agrees & (unanimous | is_frozen.logical_not()))

    # While the mask is held, nothing depends on the level.
    sound = pattern_sound & (level_sound | is_frozen)
    n_kept = torch.where(sound, torch.where(level_copied, n_kept, rounded), 0)
    return n_kept, held & sound, is_frozen, sound


def read_sound(
    n_kept: Tensor, held_mask: Tensor, frozen: Tensor, guards: Guards | None
) -> tuple[int, int] | None:
    """`n_kept` and `frozen` where the host knows them and both checksums are right, else None.

    A few microseconds on the CPU, where :func:`settle` would take as long as the ranking does.
    Nowhere does the host wait for it.
    """
    values = read(n_kept, frozen, *(() if guards is None else guards[:1]))
    if values is None:
        return None
    n, flag, *checksums = values
    if not checksums:
        return n, flag
    level, pattern = checksums[0]
    if _cached_level_checksum(n) != level:
        return None
    if flag == 0:
        return (n, flag) if pattern == NOTHING_HELD else None
    weights = _cached_weights(held_mask.numel())
    total = torch.dot(held_mask.reshape(-1).to(torch.int64), weights)
    return (n, flag) if pattern_checksum(flag, int(total)) == pattern else None


def read(*tensors: Tensor) -> list | None:
    """Their values; None where they are not on the CPU, or are being traced or transformed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    for tensor in tensors:
        if not tensor.is_cpu or type(tensor) is not Tensor:
            return None
    try:
        return [tensor.tolist() for tensor in tensors]
    except RuntimeError:  # of torch.func: a tensor that stands for several has no one value
        return None


def _mix(x: Integers) -> Integers:
    # Not linear: a linear checksum of an average would be the average of the checksums.
    x = (x & _LOW) * 0x2545F491 + ((x >> 31) & _LOW) * 0x5BD1E995
    return ((x & _LOW) * 0x1B873593) ^ (x >> 31)


def _weights(n: int, device: torch.device) -> Tensor:
    i = torch.arange(n, device=device)
    # The low 31 bits of i * 0x9E3779B1. Inductor may compute what derives from an `arange` in 32 bits, where that
    # factor does not fit; this one does, and an overflow leaves the low bits as they are.
    w = (i * (0x9E3779B1 & _LOW)) & _LOW
    return (((w * w) >> 20) & _LOW) | 1


NOTHING_HELD = pattern_checksum(0, 0)
"""The checksum of every mask that is not frozen."""

_cached_level_checksum = functools.lru_cache(maxsize=4096)(level_checksum)


@functools.lru_cache(maxsize=256)
def _cached_weights(n: int) -> Tensor:
    return _weights(n, torch.device("cpu"))
