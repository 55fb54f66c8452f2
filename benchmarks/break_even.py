"""From which sparsity on is a block-sparse linear layer faster than a dense one?

    python benchmarks/break_even.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/break_even.py --device cpu --quick

Sweeps the sparsity for each block size at the two MLP shapes of ViT-B/16: 50432 tokens in bfloat16 on CUDA,
197 in float32 on the CPU. Speedups are dense time / our time within the run; how they are measured:
bsr_linear.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.cells import DOWN, UP, VIT_TOKENS, Cell
from benchmarks.layer.runs import Context, run_cells
from benchmarks.layer.script import Sections, is_wrong, run_script
from benchmarks.report.crossing import break_even
from benchmarks.report.files import Report
from benchmarks.report.picture import BLOCK_COLORS, pyplot

Row = dict[str, Any]

REFERENCE_BREAK_EVEN = {16: 0.86, 32: 0.82, 64: 0.70}  # published: A100, float32, whole ViT-B/16


def section_sweep(context: Context) -> None:
    """Speedup over sparsity for each block size; where it crosses 1."""
    cuda = context.device.type == "cuda"
    m, mode = (VIT_TOKENS, "bfloat16") if cuda else (197, "float32")
    sparsities = (
        (0.3, 0.5, 0.7, 0.8, 0.9)
        if context.quick
        else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    )
    blocks = (16, 32, 64, 128) if cuda else (16, 32, 64)
    cells = [
        Cell(m, shape, block, sparsity, mode, peers=False)
        for block in blocks
        for shape in (UP, DOWN)
        for sparsity in sparsities
    ]
    # A sweep's neighbours confirm each other, so that each takes less time.
    rows = run_cells(cells, replace(context, share=0.4), "sweep")
    context.report.table(
        f"Speedup over sparsity, M = {m}, {mode}",
        pivot(rows),
        note="Ours against dense; a row for each block size and shape.",
    )
    context.report.records.extend({"section": "sweep", **row} for row in rows)
    context.report.table(
        "Break-even sparsity",
        break_even_rows(rows),
        note="The lowest sparsity from which ours is faster than dense, interpolated; the worse of "
        "the two shapes counts. Published reference: A100, float32, whole ViT-B/16.",
    )
    if context.pictures:
        draw(context.report)


def pivot(rows: Sequence[Row]) -> list[Row]:
    """One row for each block size and shape, one column for each sparsity."""
    table: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["block"], row["N x K"])
        line = table.setdefault(key, {"block": row["block"], "N x K": row["N x K"]})
        line[f"{row['sparsity']:g}"] = row["ours x"]
    return list(table.values())


def break_even_rows(rows: Sequence[Row]) -> list[Row]:
    """The worse shape's break-even sparsity of each block size."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ours x"] is not None:
            curves[row["block"]][row["N x K"]].append((row["sparsity"], row["ours x"]))
    table: list[Row] = []
    for block, shapes in curves.items():
        found = {shape: break_even(points) for shape, points in shapes.items()}
        lowest = min(s for points in shapes.values() for s, _ in points)
        crossings = list(found.values())
        worst = None if None in crossings else max(c for c in crossings if c is not None)

        def text(value: float | None, lowest: float = lowest) -> str:
            if value is None:
                return "never"
            return f"below {lowest:g}" if value == 0 else f"{value:.2f}"

        table.append(
            {
                "block": block,
                **{shape: text(value) for shape, value in found.items()},
                "worse of them": text(worst),
                "reference (A100, float32)": REFERENCE_BREAK_EVEN.get(
                    int(block) if block.isdigit() else -1
                ),
            }
        )
    return table


def draw_bars(rows: Sequence[Row], title: str) -> Any:
    """Speedup of each block size at each sparsity, one panel a shape.

    Args:
        rows: rows of the sweep section.
        title: of the figure.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys(row["N x K"] for row in rows))
    blocks = sorted({int(row["block"]) for row in rows})
    wanted = [s for s in (0.5, 0.7, 0.8, 0.9, 0.95) if any(r["sparsity"] == s for r in rows)]
    speed = {(r["N x K"], int(r["block"]), r["sparsity"]): r["ours x"] for r in rows}
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.2 * len(shapes), 3.8), sharey=True, squeeze=False
    )
    width = 0.8 / len(blocks)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for i, block in enumerate(blocks):
            heights = [speed.get((shape, block, s)) or 0.0 for s in wanted]
            places = [j + (i - (len(blocks) - 1) / 2) * width for j in range(len(wanted))]
            bars = axis.bar(
                places, heights, width * 0.92, color=BLOCK_COLORS[block], label=f"block {block}"
            )
            axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=7, padding=1)
        axis.axhline(1, color="#c1121f", linewidth=1)
        axis.set_xticks(range(len(wanted)), [f"{s:.0%}" for s in wanted])
        axis.set_xlabel("blocks that are zero")
        axis.set_title(f"{shape} (out x in)")
    axes[0][0].set_ylabel("speedup over dense")
    axes[0][0].legend(loc="upper left")
    figure.suptitle(title)
    return figure


def draw_curves(rows: Sequence[Row], title: str) -> Any:
    """Speedup over sparsity, one line a block size, break-even marked where it crosses 1.

    Args:
        rows: rows of the sweep section.
        title: of the figure.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys(row["N x K"] for row in rows))
    blocks = sorted({int(row["block"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.2 * len(shapes), 3.8), sharey=True, squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for block in blocks:
            points = sorted(
                (r["sparsity"], r["ours x"])
                for r in rows
                if r["N x K"] == shape and int(r["block"]) == block and r["ours x"] is not None
            )
            if not points:
                continue
            crossing = break_even(points)
            label = f"block {block}"
            if crossing:
                label += f", even at {crossing:.2f}"
            elif crossing == 0:
                label += f", faster from {points[0][0]:g} on"
            color = BLOCK_COLORS[block]
            axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=3.5, label=label)
            if crossing:
                axis.plot(crossing, 1, "o", color="white", markeredgecolor=color, markersize=8)
        axis.axhline(1, color="#c1121f", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel("fraction of blocks that are zero")
        axis.set_title(f"{shape} (out x in)")
        axis.legend(loc="upper left")
    axes[0][0].set_ylabel("speedup over dense")
    figure.suptitle(title)
    return figure


def draw(report: Report) -> None:
    """Both pictures, from the sweep's rows."""
    rows = [
        record
        for record in report.records
        if record["section"] == "sweep" and record["ours x"] is not None and not is_wrong(record)
    ]
    if not rows:
        return
    where = report.facts["device"].split(" (")[0]
    what = f"{where}, {rows[0]['dtype']}, M = {rows[0]['M']}"
    report.figure(draw_bars(rows, what), "speedup", f"Speedup of one linear layer, {what}")
    report.figure(draw_curves(rows, what), "break_even", f"Where it pays, {what}")


SECTIONS: Sections = {"cuda": {"sweep": section_sweep}, "cpu": {"sweep": section_sweep}}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script(
        "break_even",
        "One linear layer: from which sparsity it is faster than dense",
        __doc__,
        SECTIONS,
        argv,
    )


if __name__ == "__main__":
    main()
