"""A cell of the judge is one training run (or one pruning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.cells import question
from benchmarks.cells.question import Row, Tick

__all__ = ["DENSE", "FLOOR", "Cell", "Question", "Row", "Tick", "sweep"]

DENSE, FLOOR = "dense", "floor"


@dataclass(frozen=True)
class Cell:
    """What one result belongs to.

    Attributes:
        setting: what is the same for all methods compared, e.g. `"gpu, 1200 steps"`.
        method: name of the way to find the mask.
        block: edge of the square blocks; 0 for the dense model.
        sparsity: fraction of blocks pruned; 0 for the dense model.
        seed: of initialisation, data order and masks, or the draw of the calibration data.
    """

    setting: str
    method: str
    block: int
    sparsity: float
    seed: int

    def __str__(self) -> str:
        where = f" block {self.block} at {self.sparsity:g}" if self.block else ""
        return f"{self.setting}: {self.method}{where}, seed {self.seed}"


class Question(question.Question, Protocol):
    """What the judge asks. The row of a cell holds `pruned`, the fraction of blocks, beside the metric.

    Attributes:
        decimals: that a score is shown with.
        higher_is_better: of the score.
    """

    decimals: int
    higher_is_better: bool


def sweep(
    settings: Sequence[str],
    methods: Sequence[str],
    points: Sequence[tuple[int, float]],
    seeds: int,
) -> list[Cell]:
    """The cells of a full grid: all of seed 0 first, so that an early stop leaves a whole picture.

    Args:
        settings: see :class:`Cell`.
        methods: `dense` is run once for each setting and seed.
        points: pairs of block size and sparsity.
        seeds: how many.
    """
    cells = []
    for seed in range(seeds):
        for setting in settings:
            if DENSE in methods:
                cells.append(Cell(setting, DENSE, 0, 0.0, seed))
            cells += [
                Cell(setting, method, block, sparsity, seed)
                for block, sparsity in points
                for method in methods
                if method != DENSE
            ]
    return list(dict.fromkeys(cells))
