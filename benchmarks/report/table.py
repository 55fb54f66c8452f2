"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def format_cell(value: Any) -> str:
    """Text of one table cell: three significant digits for numbers, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != value:
            return "nan"
        if value == 0:
            return "0"
        if abs(value) < 1e-3 or abs(value) >= 1e6:
            return f"{value:.1e}"
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned Markdown table.

    Args:
        rows: one mapping a row; a missing key is an empty cell.
        columns: which keys, in order; by default all, in order of first appearance.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_cell(row[c]) if c in row else "" for c in columns] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [
        max([3, len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(columns)
    ]
    numeric = [
        bool(rows) and all(isinstance(row.get(c), int | float | None) for row in rows)
        for c in columns
    ]

    def line(texts: Iterable[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(columns), line(rule), *(line(texts) for texts in cells)])
