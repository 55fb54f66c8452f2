"""Draws speedup.png, the first picture of the README, from the newest figure 2 of an H200.

python docs/speedup.py

What a line shows is the whole ViT-B/16: dense time / sparse time, each in the faster of eager mode and CUDA graphs.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.report.files import RESULTS
from benchmarks.report.picture import BLOCK_COLORS, pyplot

INK, FAINT, RIVAL, SLOWER = "#22303c", "#5f6b78", "#c26a1b", "#f7ece3"
QUOTED = 0.9  # the sparsity whose speedups are written out
BEST = 64  # the block size that loses its dead features as well
PEER_BLOCK = 32  # torch's BSR was measured at every sparsity with these, in the MLPs: attention fails with its tensors
OURS, NARROW, PEER = "ours x", "ours narrow x", "torch BSR x"

Row = Mapping[str, str]
Curve = list[tuple[float, float]]


def newest_run(results: Path = RESULTS) -> tuple[Path, list[Row]]:
    """The newest figure 2 of an H200, and its rows.

    Args:
        results: folder of the CSV files.

    Raises:
        FileNotFoundError: if there is none.
    """
    paths = sorted(results.glob("*_figure2_cuda_nvidia-h200.csv"), key=lambda path: path.name)
    if not paths:
        raise FileNotFoundError(
            f"no figure 2 of an H200 in {results}; make one with `python benchmarks/figures.py 2 --device cuda`"
        )
    with paths[-1].open(newline="", encoding="utf-8") as file:
        return paths[-1], list(csv.DictReader(file))


def curve(rows: Sequence[Row], block: int, column: str = OURS, what: str = "all") -> Curve:
    """`(sparsity, speedup)` of the whole model in bfloat16, where it was measured.

    Args:
        rows: of figure 2.
        block: block size.
        column: whose speedup over dense.
        what: `"all"`, every linear layer of the encoder, or `"mlp"`.
    """
    wanted = {"mode": "bfloat16", "what": what, "block": str(block)}
    points = []
    for row in rows:
        if wanted.items() <= row.items():
            try:
                points.append((float(row["sparsity"]), float(row[column])))
            except ValueError:  # not measured, or it failed
                continue
    return sorted(points)


def draw(rows: Sequence[Row]) -> Any:
    """The figure: a line for each block size, without dead features and torch's BSR dashed, dense = 1.

    Args:
        rows: of figure 2.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8.6, 4.6))
    axes.axhspan(0, 1, color=SLOWER, zorder=0)
    axes.axhline(1, color=INK, linewidth=1.4)
    write(axes, (0.945, 1), "dense", up=10)

    for block in (16, 32, BEST):
        points = curve(rows, block)
        axes.plot(*zip(*points, strict=True), "o-", color=BLOCK_COLORS[block], linewidth=2.8)
        write(axes, points[-1], f"block {block}: {dict(points)[QUOTED]:.2f}x")
    narrow = curve(rows, BEST, NARROW)
    axes.plot(*zip(*narrow, strict=True), "d-.", color=BLOCK_COLORS[BEST], linewidth=2)
    write(axes, narrow[-1], f"without dead\nfeatures: {dict(narrow)[QUOTED]:.2f}x", up=4)
    peer = curve(rows, PEER_BLOCK, PEER, "mlp")
    axes.plot(*zip(*peer, strict=True), "s--", color=RIVAL, linewidth=2.2, markersize=5)
    write(axes, peer[-1], f"torch's BSR,\nblock {PEER_BLOCK},\nMLPs only", up=-9, color=RIVAL)

    axes.text(0.485, 0.96, "slower than dense", fontsize=11, color=FAINT, va="top")
    axes.set(xlim=(0.48, 1.06), xticks=[0.5, 0.6, 0.7, 0.8, QUOTED])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(labelsize=11.5, colors=INK)
    axes.set_ylim(bottom=min(y for _, y in peer) - 0.05)
    axes.set_xlabel("blocks pruned, in all linear layers of the encoder", fontsize=12, color=INK)
    axes.set_title(
        f"Speedup of a whole ViT-B/16\nbfloat16, {rows[0]['batch']} images, NVIDIA H200",
        fontsize=12.5, color=INK, loc="left", pad=10,
    )  # fmt: skip
    return figure


def write(
    axes: Any, point: tuple[float, float], text: str, up: float = 0, color: str = INK
) -> None:
    """Writes behind a point, or `up` points above that."""
    axes.annotate(
        text, point, (10, up), textcoords="offset points", fontsize=11.5, va="center", color=color,
        fontweight="bold",
    )  # fmt: skip


def main() -> None:
    """Draws and saves the picture."""
    source, rows = newest_run()
    path = Path(__file__).with_suffix(".png")
    draw(rows).savefig(path, dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    print(f"{path} from {source.name}")


if __name__ == "__main__":
    main()
