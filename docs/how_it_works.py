"""Draws how_it_works.png, the picture in how_it_works.md.

python docs/how_it_works.py
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, FAINT, KEPT, EMPTY = "#22303c", "#5f6b78", "#1d4e89", "#edf1f5"
TRAIN, INFER = "#e9f2fb", "#fdf3e3"
HEAT = LinearSegmentedColormap.from_list("heat", ["#f3f6f9", "#8ecae6", "#1d4e89"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#c26a1b", "#f7f9fb", "#1d4e89"])

GRID = 6  # blocks along each side of the weight
FINE = 5  # elements along each side of a block, as drawn
KEEP = 7
SIDE = 1.8  # of a drawn matrix


def main() -> None:
    """Draws and saves the picture."""
    rng = np.random.default_rng(4)
    scores = rng.random((GRID, GRID))
    mask = scores >= np.sort(scores.ravel())[-KEEP]
    weight = rng.normal(size=(GRID * FINE, GRID * FINE))
    fine_mask = np.kron(mask, np.ones((FINE, FINE)))

    figure, axes = plt.subplots(figsize=(13.9, 4.1))
    axes.set(xlim=(0, 13.9), autoscale_on=False, ylim=(0, 4.1))
    axes.axis("off")
    panel(axes, 0.15, 6.2, TRAIN, "Training finds the mask", "pruning/")
    panel(axes, 9.65, 4.1, INFER, "Inference uses it", "bsr/  ops/")

    bottom = 1.15
    places = [0.4, 3.0, 7.2, 9.95, 12.05]
    matrix(axes, places[0], bottom, scores, HEAT, lines=GRID)
    caption(axes, places[0], "scores", "one trainable number\nfor each block")
    arrow(axes, places[0] + SIDE + 0.1, places[1] - 0.1, "top 20 %")
    x = places[1]
    matrix(axes, x, bottom, mask.astype(float), HEAT, lines=GRID)
    caption(axes, x, "block mask", "recomputed in every forward;\ngradients pass straight through")
    axes.text(x + SIDE + 0.11, bottom + SIDE / 2, "×", fontsize=17, ha="center", va="center")
    small = 1.0
    axes.imshow(
        weight, cmap=SIGNED, zorder=2, vmin=-3, vmax=3, aspect="auto",
        extent=(x + SIDE + 0.24, x + SIDE + 0.24 + small, bottom + 0.4, bottom + 0.4 + small),
    )  # fmt: skip
    axes.text(x + SIDE + 0.24 + small / 2, bottom + 0.25, "weight", ha="center", va="top",
              fontsize=9, color=FAINT)  # fmt: skip

    x = places[2]
    axes.text(x + SIDE / 2, 3.58, "The handoff", fontsize=11.5, fontweight="bold", color=INK, ha="center",
              va="center")  # fmt: skip
    arrow(axes, 6.42, x - 0.1, "squash")
    matrix(axes, x, bottom, weight * fine_mask, SIGNED, lines=GRID, signed=True)
    caption(axes, x, "dense weight", "an ordinary nn.Linear\nwhose pruned blocks are zero")
    arrow(axes, x + SIDE + 0.1, places[3] - 0.38, "swap")

    draw_bsr(axes, places[3], bottom, weight, mask)
    arrow(axes, places[3] + 1.4, places[4] - 0.12, "kernel")
    draw_product(axes, places[4], bottom, mask)
    caption(axes, places[4], "y = x Wᵀ", "multiplies the stored\nblocks, skips the rest", width=1.3)

    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    print(path)


def panel(axes: Any, x: float, width: float, color: str, title: str, folder: str) -> None:
    """A coloured area with a heading."""
    box = FancyBboxPatch(
        (x, 0.12), width, 3.72, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec="none"
    )
    axes.add_patch(box)
    axes.text(x + 0.25, 3.58, title, fontsize=11.5, fontweight="bold", color=INK, va="center")
    axes.text(
        x + width - 0.2, 3.58, folder, fontsize=9.5, color=FAINT, va="center", ha="right",
        family="monospace",
    )  # fmt: skip


def matrix(
    axes: Any, x: float, y: float, values: Any, cmap: Any, lines: int, signed: bool = False
) -> None:
    """A matrix as an image, with lines between its blocks."""
    low, high = (-3, 3) if signed else (0, 1)
    axes.imshow(values, cmap=cmap, zorder=2, vmin=low, vmax=high, aspect="auto",
                extent=(x, x + SIDE, y, y + SIDE))  # fmt: skip
    for i in range(lines + 1):
        at = i * SIDE / lines
        axes.plot([x, x + SIDE], [y + at, y + at], color="white", linewidth=1.2, zorder=3)
        axes.plot([x + at, x + at], [y, y + SIDE], color="white", linewidth=1.2, zorder=3)


def caption(axes: Any, x: float, name: str, text: str, width: float = SIDE) -> None:
    """Name and explanation under a matrix."""
    axes.text(x + width / 2, 0.98, name, fontsize=10.5, ha="center", va="center", color=INK,
              fontweight="bold")  # fmt: skip
    axes.text(x + width / 2, 0.54, text, fontsize=8.5, ha="center", va="center", color=FAINT)


def arrow(axes: Any, start: float, end: float, text: str, y: float = 2.05) -> None:
    """An arrow to the right with a word above it."""
    axes.add_patch(
        FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=13, color=INK)
    )
    axes.text((start + end) / 2, y + 0.13, text, fontsize=8.5, ha="center", color=INK)


def draw_bsr(axes: Any, x: float, y: float, weight: Any, mask: Any) -> None:
    """The three arrays of the BSR format: the stored blocks, their columns, and where rows begin."""
    rows, columns = np.nonzero(mask)
    size = SIDE / KEEP
    for i, (r, c) in enumerate(zip(rows, columns, strict=True)):
        top = y + SIDE - (i + 1) * size
        block = weight[r * FINE : (r + 1) * FINE, c * FINE : (c + 1) * FINE]
        axes.imshow(block, cmap=SIGNED, zorder=2, vmin=-3, vmax=3, aspect="auto",
                    extent=(x, x + size * 0.9, top + size * 0.05, top + size * 0.95))  # fmt: skip
        axes.text(x + 0.55, top + size / 2, str(c), fontsize=8, ha="center", va="center", color=INK)
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    for i, start in enumerate(starts):
        top = y + SIDE - (i + 0.5) * SIDE / len(starts)
        axes.text(x + 1.05, top, str(start), fontsize=8, ha="center", va="center", color=INK)
    heads = (("values", 0.1), ("col", 0.55), ("crow", 1.05))
    for text, at in heads:
        axes.text(x + at, y + SIDE + 0.1, text, fontsize=7.5, ha="center", color=FAINT,
                  family="monospace")  # fmt: skip
    caption(axes, x, "BSR", "stores the kept blocks\nand where they are", width=1.3)


def draw_product(axes: Any, x: float, y: float, mask: Any) -> None:
    """The weight's blocks; those multiplied are filled."""
    size = 1.3 / GRID
    for r in range(GRID):
        for c in range(GRID):
            color = KEPT if mask[r, c] else "white"
            axes.add_patch(
                Rectangle(
                    (x + c * size, y + 0.25 + (GRID - 1 - r) * size),
                    size * 0.9,
                    size * 0.9,
                    fc=color,
                    ec="#d9cdb8",
                    linewidth=0.5,
                )
            )


if __name__ == "__main__":
    main()
