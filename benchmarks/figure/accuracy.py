"""Figure 5: accuracy over sparsity and block size, from the files of benchmarks/quality.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells.results import Results
from benchmarks.figure.published import IMAGENET, README
from benchmarks.judge.cells import DENSE, FLOOR, Cell, Question, Row
from benchmarks.judge.digest import Point, compare, loss_against, points
from benchmarks.judge.lm import LanguageModel
from benchmarks.judge.methods import RIVALS
from benchmarks.judge.minilm import Distilled, OneShot
from benchmarks.judge.mnist import Mnist
from benchmarks.report.picture import BLOCK_COLORS, pyplot

QUESTIONS: dict[str, Any] = {
    "lm": LanguageModel,
    "mnist": Mnist,
    "minilm": OneShot,
    "minilm-distilled": Distilled,
}
"""By the name in their files; the classes say what the score is."""


def newest_files(folder: Path) -> dict[Path, Any]:
    """The newest file of each question, device and label, and its question."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*_quality_*.csv")):
        newest[path.name[len("2026-11-30_") :]] = path
    found = {}
    for rest, path in newest.items():
        match = re.match(r"quality_([^_]+)_", rest)
        if match is not None and match[1] in QUESTIONS:
            found[path] = QUESTIONS[match[1]]
    return found


def scores(path: Path, question: Question) -> list[Point]:
    """The points of a file."""
    return points(question, Results(path, Cell).rows)


def tables(path: Path, question: Question) -> list[tuple[str, list[Row]]]:
    """Title and rows of a table for each setting of a file."""
    found = scores(path, question)
    settings = dict.fromkeys(p.setting for p in found)
    return [(f"{question.title}: {s}, {path.stem}", compare(question, found, s)) for s in settings]


def published_rows() -> list[Row]:
    """The published points as a table."""
    dense = next(p.top1 for p in IMAGENET if p.source == README and not p.block)
    return [
        {
            "source": p.source,
            "block": p.block or None,
            "sparsity": p.sparsity if p.block else None,
            "top-1 %": f"{p.top1:.2f}",
            "gap to dense": f"{dense - p.top1:+.2f}" if p.block and p.source == README else None,
        }
        for p in IMAGENET
    ]


def best_of_ours(question: Question, found: Sequence[Point]) -> list[Point]:
    """The best method that is no rival, for each block size and sparsity."""
    best: dict[tuple[int, float], Point] = {}
    for p in found:
        if p.method in RIVALS or p.method in (DENSE, FLOOR):
            continue
        key = (p.block, p.sparsity)
        if key not in best or loss_against(question, best[key], p) < 0:
            best[key] = p
    return list(best.values())


def draw(files: dict[Path, Any]) -> Any:
    """A panel for each setting of each file, then one of the published points.

    In a panel: the dense model as a line, the best of our methods (named) and random blocks, by block size.
    """
    plt = pyplot()
    panels = [
        (question, setting, [p for p in found if p.setting == setting])
        for path, question in files.items()
        for found in [scores(path, question)]
        for setting in dict.fromkeys(p.setting for p in found)
    ]
    columns = min(3, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.7 * lines), squeeze=False)
    for axis in axes.flat[len(panels) + 1 :]:
        axis.set_axis_off()
    for axis, (question, setting, found) in zip(axes.flat, panels, strict=False):
        best = best_of_ours(question, found)
        for p in found:
            if p.method == DENSE:
                axis.axhline(p.mean, color="black", linewidth=1, label=DENSE)
        curves(axis, [(p.block, p.sparsity, p.mean) for p in best], "o-", "block {}")
        random = [(p.block, p.sparsity, p.mean) for p in found if p.method == "random"]
        curves(axis, random, "x:", "block {}, random")
        for p in best:
            axis.annotate(
                p.method, (p.sparsity, p.mean), (5, 5), textcoords="offset points", fontsize=7
            )
        better = "higher" if question.higher_is_better else "lower"
        axis.set_ylabel(f"{question.unit} ({better} is better)")
        axis.set_title("\n".join([*textwrap.wrap(question.title, 44), setting]), fontsize=9)
    axis = axes.flat[len(panels)]
    for source, marker in zip(dict.fromkeys(p.source for p in IMAGENET), "s^", strict=True):
        mine = [p for p in IMAGENET if p.source == source]
        masked = [(p.block, p.sparsity, p.top1) for p in mine if p.block]
        curves(axis, masked, f"{marker}-", f"block {{}}: {source}")
        for p in mine:
            if not p.block:
                axis.axhline(
                    p.top1, color="black", linewidth=1, label=f"dense: {source}",
                    linestyle="-" if marker == "s" else ":",
                )  # fmt: skip
    axis.set_ylabel("ImageNet top-1, %")
    axis.set_title("ViT-B/16 on ImageNet, as published by others", fontsize=9)
    for axis in axes.flat[: len(panels) + 1]:
        axis.set_xlabel("fraction of blocks that are zero")
        axis.margins(x=0.15, y=0.15)
        axis.legend(fontsize=6.5, loc="best")
    return figure


def curves(axis: Any, found: Sequence[tuple[int, float, float]], style: str, label: str) -> None:
    """A line for each block size through (block, sparsity, score) points."""
    for block in sorted({b for b, _, _ in found}):
        line = sorted((s, score) for b, s, score in found if b == block)
        axis.plot(
            *zip(*line, strict=True), style, color=BLOCK_COLORS.get(block, "#555555"), markersize=5,
            label=label.format(block),
        )  # fmt: skip
