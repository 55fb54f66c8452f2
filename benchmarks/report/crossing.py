"""Where a curve of speedups crosses 1."""

from __future__ import annotations

from collections.abc import Sequence


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Sparsity from which a curve of (sparsity, speedup) stays above 1, linearly interpolated.

    Returns:
        0.0 if it is above 1 everywhere, None if it ends below 1.
    """
    points = sorted(points)
    if not points or points[-1][1] < 1:
        return None
    for (low, below), (high, above) in zip(points[-2::-1], points[:0:-1], strict=True):
        if below < 1:
            return low + (1 - below) / (above - below) * (high - low)
    return 0.0


def break_even_text(points: Sequence[tuple[float, float]]) -> str:
    """The same for a table: `"0.63"`, `"below 0.5"` where the curve begins at 0.5, or `"never"`."""
    value = break_even(points)
    if value is None:
        return "never"
    return f"{value:.2f}" if value else f"below {min(points)[0]:g}"
