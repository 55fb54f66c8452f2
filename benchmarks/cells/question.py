"""What a script asks, cell by cell, so that a run can stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

Row = dict[str, Any]
Tick = Callable[[str], None]
"""Called now and then while a cell runs, with a few words on how far it is."""


class Cell(Protocol):
    """What one result belongs to: a frozen dataclass of strings and numbers, the first columns of its row.

    Attributes:
        setting: cells of one setting take a time that is proportional to their work.
    """

    @property
    def setting(self) -> str: ...


class Question(Protocol):
    """What a script asks; one class for each, pickled to the workers.

    Attributes:
        name: in the names of the result files.
        title: heading of the report.
        metric: CSV column of the number that the progress line shows.
        unit: of that number.
    """

    name: str
    title: str
    metric: str
    unit: str

    def check(self) -> None:
        """Raises `ImportError` with the pip line if a package is missing."""

    def cells(self) -> list[Any]:
        """Every cell, in the order in which they are run."""

    def work(self, cell: Any) -> float:
        """Cost of a cell relative to the others, from which the time it needs is estimated."""

    def load(self, device: torch.device) -> None:
        """Loads what all cells need, once for each worker."""

    def run(self, cell: Any, tick: Tick) -> Row:
        """Runs a cell; the row holds at least the metric."""
