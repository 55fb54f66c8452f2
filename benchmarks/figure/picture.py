"""The pictures of figures 1 to 4 and 6: a panel a setting, a colour a block size, a style a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cells.question import Row
from benchmarks.report.picture import BLOCK_COLORS, pyplot


def draw_lines(
    rows: Sequence[Row], axis: str, columns: Mapping[str, str], title: str, label: str
) -> Any:
    """Lines over `axis`, one for each block size and column.

    Args:
        rows: with `mode`, `what`, `block` and the axis; what is no number in a column is left out.
        axis: `"sparsity"` or `"batch"`, which is drawn by powers of two.
        columns: matplotlib's style of each.
        title: of the picture.
        label: of the vertical axis, where 1 is dense.
    """
    plt = pyplot()
    panels = list(dict.fromkeys((row["mode"], row["what"]) for row in rows))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(2.4 + 4.2 * across, 0.8 + 3.4 * down),
        squeeze=False,
        layout="constrained",
    )
    for plot, (mode, what) in zip(axes.flat, panels, strict=False):
        here = [row for row in rows if (row["mode"], row["what"]) == (mode, what)]
        for block in sorted({row["block"] for row in here}):
            color = BLOCK_COLORS.get(block, "#555555")
            for column, style in columns.items():
                line = sorted(
                    (row[axis], row[column])
                    for row in here
                    if row["block"] == block and isinstance(row.get(column), int | float)
                )
                if line:
                    name = column.removesuffix(" x")
                    plot.plot(
                        *zip(*line, strict=True), style, color=color, markersize=4,
                        label=f"block {block}" if name == "ours" else f"block {block}, {name}",
                    )  # fmt: skip
        plot.axhline(1, color="#c1121f", linewidth=1)
        if axis == "batch":
            plot.set_xscale("log", base=2)
            values = sorted({row["batch"] for row in here})
            plot.set_xticks(values, [str(value) for value in values])
            plot.minorticks_off()
        plot.set_xlabel("batch size" if axis == "batch" else "fraction of blocks that are zero")
        plot.set_title(f"{what}, {mode}")
    for plot in axes.flat[len(panels) :]:
        plot.set_axis_off()
    for plot in axes[:, 0]:
        plot.set_ylabel(label)
    lines = {
        name: line
        for plot in axes.flat
        for line, name in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=11)
    return figure
