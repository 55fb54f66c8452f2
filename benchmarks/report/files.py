"""The files that a run leaves, with the hardware and versions beside its numbers."""

from __future__ import annotations

import csv
import datetime
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report.facts import device_name, environment
from benchmarks.report.table import markdown_table

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Report:
    """Collects tables and pictures and writes them as one Markdown file, one CSV file and PNGs.

    The files are rewritten after every table, so an interrupted run leaves what it measured. They
    are called `<date>_<name>_<device>[_<label>]`.

    Args:
        name: of the benchmark, e.g. `"bsr_linear"`.
        title: first heading of the Markdown file.
        device: where it ran.
        directory: where the files go; `benchmarks/results` by default.
        label: appended to the file names, to keep two runs of a day apart.

    Example:
        >>> report = Report("bsr_linear", "One linear layer", "cpu")
        >>> report.table("Forward", [{"M": 1, "speedup": 6.1}])
    """

    def __init__(
        self,
        name: str,
        title: str,
        device: str | torch.device,
        *,
        directory: str | Path | None = None,
        label: str | None = None,
    ) -> None:
        device = torch.device(device)
        self.directory = Path(directory) if directory is not None else RESULTS
        hardware = device_name(device).split(" (")[0]
        parts = [datetime.date.today().isoformat(), name, device.type, hardware, label or ""]
        slugs = [re.sub(r"[^a-z0-9_-]+", "-", part.lower()).strip("-") for part in parts]
        self.stem = "_".join(slug for slug in slugs if slug)
        self.title = title
        self.facts = environment(device)
        self.facts["command"] = "python " + " ".join(
            [os.path.relpath(sys.argv[0]) if sys.argv[0] else "-c", *sys.argv[1:]]
        )
        self.records: list[dict[str, Any]] = []
        self._blocks: list[str] = []

    def fact(self, name: str, value: str) -> None:
        """Adds a line to the header."""
        self.facts[name] = value

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._blocks.append(paragraph.strip())
        print("\n" + paragraph.strip(), flush=True)

    def table(
        self,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        columns: Sequence[str] | None = None,
        note: str = "",
        to_csv: bool = True,
    ) -> None:
        """Adds, prints and saves a table.

        Args:
            title: heading.
            rows: the CSV gets every key, whatever `columns` shows.
            columns: which keys to show.
            note: a paragraph above the table.
            to_csv: False for a digest of numbers that a CSV file holds already.
        """
        if to_csv:
            self.records.extend({"section": title, **row} for row in rows)
        block = f"## {title}\n\n"
        if note:
            block += note.strip() + "\n\n"
        block += markdown_table(rows, columns) if rows else "Nothing was measured."
        self._blocks.append(block)
        print("\n" + block, flush=True)
        self.write()

    def figure(self, figure: Any, name: str, caption: str) -> Path:
        """Saves a matplotlib figure as `<stem>_<name>.png` and shows it in the Markdown file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.stem}_{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
        self._blocks.append(f"![{caption}]({path.name})\n\n*{caption}*")
        self.write()
        return path

    def write(self) -> Path:
        """Writes the Markdown and the CSV file and returns the path of the first."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.stem}.md"
        head = f"# {self.title}\n\n" + markdown_table(
            [{"": key, "this run": value} for key, value in self.facts.items()]
        )
        path.write_text("\n\n".join([head, *self._blocks]) + "\n", encoding="utf-8")
        if self.records:
            columns = list(dict.fromkeys(key for record in self.records for key in record))
            with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(self.records)
        return path
