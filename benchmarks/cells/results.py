"""A file of cells is what a run resumes from."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.cells.question import Row
from benchmarks.report.files import Report


class Results:
    """Finished cells and their rows, kept in a CSV file that is replaced in one piece.

    Args:
        path: of the file; what it holds already counts as finished.
        kind: dataclass of the cells; its fields are the first columns.

    Example:
        >>> results = Results(Path("quality_lm.csv"), Cell)
        >>> results.add(cell, {"bits_per_byte": 1.17, "pruned": 0.9})
        >>> cell in results.rows
        True
    """

    def __init__(self, path: Path, kind: type) -> None:
        self.path, self.kind = path, kind
        self.rows: dict[Any, Row] = {}
        self._read()

    def add(self, cell: Any, row: Row) -> None:
        """Adds or replaces a row and writes the file; rows another process added are kept."""
        self._read()
        self.rows[cell] = row
        self._write()

    def forget(self, cells: Iterable[Any]) -> None:
        """Removes rows, so that their cells are run again."""
        for cell in cells:
            self.rows.pop(cell, None)
        self._write()

    def _read(self) -> None:
        if not self.path.exists():
            return
        kinds = get_type_hints(self.kind)
        with self.path.open(newline="", encoding="utf-8") as file:
            for record in csv.DictReader(file):
                try:
                    cell = self.kind(**{key: kind(record.pop(key)) for key, kind in kinds.items()})
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self.path} is no file of cells ({error!r}); move it, or give this run "
                        "another --label"
                    ) from error
                self.rows[cell] = {key: _number(text) for key, text in record.items() if text}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = [field.name for field in fields(self.kind)]
        columns += dict.fromkeys(key for row in self.rows.values() for key in row)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows({**asdict(cell), **row} for cell, row in self.rows.items())
        os.replace(unfinished, self.path)


def go_on(report: Report, kind: type) -> Results:
    """The cells of the newest run of this question, device and label; from now on the report goes by its file name.

    Args:
        report: of this run.
        kind: see :class:`Results`.
    """
    _, _, rest = report.stem.partition("_")
    date = "[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]"
    found = sorted(report.directory.glob(f"{date}_{rest}.csv"))
    if found:
        report.stem = found[-1].stem
    return Results(report.directory / f"{report.stem}.csv", kind)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
