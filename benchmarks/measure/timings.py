"""What a measurement says: seconds of each candidate, and ratios of them within a round."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one sample a round.

    Attributes:
        samples: seconds per call, in the order of the rounds.
        note: how it was measured, if not as asked for (for example when a CUDA graph could not be
            captured).
    """

    samples: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """Seconds of the fastest call."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a fraction of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True)
class Failure:
    """A candidate that raised, and what it said."""

    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The type of an error and the first line of what it says."""
        lines = str(error).strip().splitlines()
        text = re.sub(r"\s+", " ", lines[0] if lines else "")
        return cls(f"{type(error).__name__}: {text}"[:160])


@dataclass(frozen=True)
class Ratio:
    """Baseline time / candidate time (above 1: the candidate is faster), with its quartiles."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x"


class Measurements(dict[str, "Timing | Failure"]):
    """What :func:`measure` returns: a timing or a failure for each candidate, by name."""

    def timing(self, name: str) -> Timing | None:
        """The timing of `name`; None if it failed or was not measured."""
        entry = self.get(name)
        return entry if isinstance(entry, Timing) else None

    def failure(self, name: str) -> str:
        """Why `name` failed; empty if it did not."""
        entry = self.get(name)
        return entry.reason if isinstance(entry, Failure) else ""

    def milliseconds(self, name: str) -> float | None:
        """Median milliseconds per call, or None."""
        timing = self.timing(name)
        return None if timing is None else timing.median * 1e3

    def microseconds(self, name: str) -> float | None:
        """Median microseconds per call, or None."""
        timing = self.timing(name)
        return None if timing is None else timing.median * 1e6

    def speedup(self, baseline: str, name: str) -> Ratio | None:
        """How much faster `name` is than `baseline`: median of the ratios within a round."""
        base, other = self.timing(baseline), self.timing(name)
        if base is None or other is None:
            return None
        ratios = [b / o for b, o in zip(base.samples, other.samples, strict=False)]
        if len(ratios) < 2:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(middle, low, high)

    def speedup_value(self, baseline: str, name: str) -> float | None:
        """The number of :meth:`speedup`, or None."""
        ratio = self.speedup(baseline, name)
        return None if ratio is None else ratio.value
