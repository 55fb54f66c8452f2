"""A cell is one training run (or one pruning) of a question; a file of cells is what a run resumes from."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

Row = dict[str, Any]
Tick = Callable[[str], None]
"""Called now and then while a cell runs, with a few words on how far it is."""

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


class Question(Protocol):
    """What a script asks; one class for each, pickled to the workers.

    Attributes:
        name: in the names of the result files.
        title: heading of the report.
        metric: CSV column of the score.
        unit: axis label of the score.
        decimals: that a score is shown with.
        higher_is_better: of the score.
    """

    name: str
    title: str
    metric: str
    unit: str
    decimals: int
    higher_is_better: bool

    def check(self) -> None:
        """Raises `ImportError` with the pip line if a package is missing."""

    def cells(self) -> list[Cell]:
        """Every cell, in the order in which they are run."""

    def work(self, cell: Cell) -> float:
        """Cost of a cell relative to the others, from which the time it needs is estimated."""

    def load(self, device: torch.device) -> None:
        """Loads data and models, once for each worker."""

    def run(self, cell: Cell, tick: Tick) -> Row:
        """Runs a cell; the row holds at least the metric and `pruned` (fraction of blocks)."""


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


class Results:
    """Finished cells and their rows, kept in a CSV file that is replaced in one piece.

    Args:
        path: of the file; what it holds already counts as finished.

    Example:
        >>> results = Results(Path("quality_lm.csv"))
        >>> results.add(cell, {"bits_per_byte": 1.17, "pruned": 0.9})
        >>> cell in results.rows
        True
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, Row] = {}
        self._read()

    def add(self, cell: Cell, row: Row) -> None:
        """Adds or replaces a row and writes the file; rows another process added are kept."""
        self._read()
        self.rows[cell] = row
        self._write()

    def forget(self, cells: Iterable[Cell]) -> None:
        """Removes rows, so that their cells are run again."""
        for cell in cells:
            self.rows.pop(cell, None)
        self._write()

    def _read(self) -> None:
        if not self.path.exists():
            return
        kinds = {"setting": str, "method": str, "block": int, "sparsity": float, "seed": int}
        with self.path.open(newline="", encoding="utf-8") as file:
            for record in csv.DictReader(file):
                try:
                    cell = Cell(**{key: kind(record.pop(key)) for key, kind in kinds.items()})
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self.path} is no file of cells ({error!r}); move it, or give this run "
                        "another --label"
                    ) from error
                self.rows[cell] = {key: _number(text) for key, text in record.items() if text}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = [field.name for field in fields(Cell)]
        columns += dict.fromkeys(key for row in self.rows.values() for key in row)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows({**asdict(cell), **row} for cell, row in self.rows.items())
        os.replace(unfinished, self.path)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
