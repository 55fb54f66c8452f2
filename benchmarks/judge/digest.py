"""From cells to a table: means over seeds, gaps to the dense model, and how they compare."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.judge.cells import DENSE, FLOOR, Cell, Question, Row

RANDOM, GRADUAL = "random", "gradual"


@dataclass(frozen=True)
class Point:
    """One method at one setting, block size and sparsity: its scores by seed."""

    setting: str
    method: str
    block: int
    sparsity: float
    scores: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values())

    @property
    def low(self) -> float:
        return min(self.scores.values())

    @property
    def high(self) -> float:
        return max(self.scores.values())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 of one seed."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else 0.0


def points(question: Question, rows: Mapping[Cell, Row]) -> list[Point]:
    """Finished cells, those of different seeds together."""
    scores: dict[tuple[str, str, int, float], dict[int, float]] = {}
    for cell, row in rows.items():
        key = (cell.setting, cell.method, cell.block, cell.sparsity)
        scores.setdefault(key, {})[cell.seed] = float(row[question.metric])
    return [Point(*key, by_seed) for key, by_seed in scores.items()]


def loss_against(question: Question, better: Point, worse: Point) -> float:
    """How much worse `worse` scores, in the mean over the seeds both have (or over all of each)."""
    common = better.scores.keys() & worse.scores.keys()
    sign = 1 if question.higher_is_better else -1
    if common and len(common) == len(worse.scores):
        return sign * statistics.fmean(better.scores[s] - worse.scores[s] for s in common)
    return sign * (better.mean - worse.mean)


def compare(question: Question, found: Sequence[Point], setting: str) -> list[Row]:
    """A table row for each point of a setting.

    Columns: the gap to the dense model (positive is worse); the gap as a share of random's and of gradual
    magnitude's; where there is a floor, the share of the way from it to the dense model; and whether the
    method beats random by more than both spreads, which takes two seeds.
    """
    here = [point for point in found if point.setting == setting]
    by_key = {(p.method, p.block, p.sparsity): p for p in here}
    dense = next((p for p in here if p.method == DENSE), None)
    floor = next((p for p in here if p.method == FLOOR), None)
    order = {p.method: i for i, p in reversed(list(enumerate(here)))}
    here.sort(
        key=lambda p: (
            p.block if p.method not in (DENSE, FLOOR) else 0,
            p.sparsity,
            order[p.method],
        )
    )
    rows = []
    for point in here:
        baseline = point.method in (DENSE, FLOOR)
        row: Row = {
            "block": None if baseline else point.block,
            "sparsity": None if baseline else point.sparsity,
            "method": point.method,
            question.unit: f"{point.mean:.{question.decimals}f}",
            "spread": f"{point.spread:.{question.decimals}f}" if len(point.scores) > 1 else None,
            "seeds": len(point.scores),
        }
        if dense is not None and not baseline:
            gap = loss_against(question, dense, point)
            row["gap to dense"] = f"{gap:+.{question.decimals}f}"
            for rival in (RANDOM, GRADUAL):
                other = by_key.get((rival, point.block, point.sparsity))
                if other is not None and (rivals_gap := loss_against(question, dense, other)) > 0:
                    row[f"of {rival}'s gap"] = f"{gap / rivals_gap:.2f}"
            if floor is not None:
                way = loss_against(question, dense, floor)
                row["floor to dense"] = f"{(1 - gap / way) * 100:.0f} %" if way else None
        other = by_key.get((RANDOM, point.block, point.sparsity))
        several = other is not None and min(len(point.scores), len(other.scores)) > 1
        if several and not baseline and point.method != RANDOM:
            won = loss_against(question, point, other)
            row["beats random"] = won > point.spread + other.spread
        rows.append(row)
    return rows
