"""From dense to the level, and when the pattern freezes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Ramp:
    """How the level rises: cubically, fast at first (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878).

    Attributes:
        ramp_steps: calls of `step()` until the level is reached; None for a constant one.
        freeze_step: the call of `step()` from which on the pattern stays; None leaves it to the user.
    """

    ramp_steps: int | None = None
    freeze_step: int | None = None

    def fraction(self, step: int) -> float:
        """How much of the level applies after `step` calls, in `[0, 1]`."""
        if self.ramp_steps is None or step >= self.ramp_steps:
            return 1.0
        return 1.0 - (1.0 - step / self.ramp_steps) ** 3


def check_ramp(ramp_steps: object, freeze_step: object, where: str) -> Ramp:
    """Validates both numbers.

    Args:
        ramp_steps: an int of at least 1, or None.
        freeze_step: an int of at least 1 and at least `ramp_steps`, or None.
        where: what an error begins with.

    Raises:
        TypeError: neither an int nor None.
        ValueError: too small, or the pattern would freeze before the level is reached.
    """
    for name, value in (("ramp_steps", ramp_steps), ("freeze_step", freeze_step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"{where}{name}={value!r} must be a number of calls of step(), or None")
        if value is not None and value < 1:
            raise ValueError(f"{where}{name}={value} must be at least 1, or None")
    if ramp_steps is not None and freeze_step is not None and freeze_step < ramp_steps:
        raise ValueError(
            f"{where}freeze_step={freeze_step} comes before ramp_steps={ramp_steps}: the pattern would freeze "
            "below its level; let freeze_step be at least ramp_steps"
        )
    return Ramp(
        None if ramp_steps is None else int(ramp_steps),
        None if freeze_step is None else int(freeze_step),
    )


@dataclass(frozen=True)
class Progress:
    """Where a sparsifier stands when it asks its masks to renew themselves.

    Attributes:
        step: calls of `step()`, this one included.
        ramp: how the level rises.
        carried: mask -> `(R, C)`, what the last backwards left in its carrier, divided by its root mean
            square; nothing for a mask whose carrier has no gradient.
    """

    step: int
    ramp: Ramp
    carried: Mapping[Any, Tensor] = field(default_factory=dict)

    @property
    def one_way(self) -> bool:
        """Whether a pruned block stays pruned. It does on a ramp: one that comes back is stale and costs more."""
        return self.ramp.ramp_steps is not None
