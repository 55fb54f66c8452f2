"""Draws speedup.png, the first picture of the README, from the newest results of an H200.

python docs/speedup.py

What a line shows is the MLP of ViT-B/16: its two linear layers one after the other, dense time / sparse time. Torch's
BSR has points where the benchmark measured it.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.cells import DOWN, UP
from benchmarks.report.files import RESULTS
from benchmarks.report.picture import BLOCK_COLORS, pyplot

INK, FAINT, RIVAL, SLOWER = "#22303c", "#5f6b78", "#c26a1b", "#f7ece3"
QUOTED = 0.9  # the sparsity whose speedups are written out
PEER_BLOCK = 64  # the block size that torch's BSR is fastest with
SWEEP, PEERS = (
    "sweep",
    "ViT-B/16 shapes",
)  # what the sections begin with: ours over sparsity, all peers
SHAPES = tuple(f"{n} x {k}" for n, k in (UP, DOWN))

Row = Mapping[str, str]
Curve = list[tuple[float, float]]


def newest_run(section: str, results: Path = RESULTS) -> tuple[Path, list[Row]]:
    """The newest results on an H200 that hold a section about one linear layer.

    Sweeps come from `benchmarks/break_even.py` (until 2026-11-30 from `benchmarks/bsr_linear.py`, as the peers do).

    Args:
        section: start of the section's name.
        results: folder of the CSV files.

    Returns:
        The file and its rows.

    Raises:
        FileNotFoundError: if there is none.
    """
    scripts = ("break_even", "bsr_linear")
    paths = [p for s in scripts for p in results.glob(f"*_{s}_cuda_nvidia-h200*.csv")]
    for path in sorted(paths, key=lambda path: path.name, reverse=True):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if any(row["section"].startswith(section) for row in rows):
            return path, rows
    commands = " and ".join(f"`python benchmarks/{s}.py --device cuda`" for s in scripts)
    raise FileNotFoundError(
        f"no results of an H200 with {section!r} in {results}; make some with {commands}"
    )


def curve(rows: Sequence[Row], block: int, column: str = "ours x", section: str = SWEEP) -> Curve:
    """Speedup over sparsity of both layers of the MLP together.

    Args:
        rows: of a result file.
        block: block size.
        column: whose speedup over dense.
        section: start of the section's name.

    Returns:
        `(sparsity, sum of the dense times / sum of the candidate's times)`, where both layers were measured.
    """
    times: dict[float, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if (
            row["section"].startswith(section)
            and row["block"] == str(block)
            and row["N x K"] in SHAPES
        ):
            try:
                dense, speedup = float(row["dense ms"]), float(row[column])
            except ValueError:  # not measured, or it failed
                continue
            times.setdefault(float(row["sparsity"]), {})[row["N x K"]] = dense, dense / speedup
    return [
        (
            sparsity,
            sum(dense for dense, _ in both.values()) / sum(ours for _, ours in both.values()),
        )
        for sparsity, both in sorted(times.items())
        if len(both) == len(SHAPES)
    ]


def draw(rows: Sequence[Row], peers: Sequence[Row]) -> Any:
    """The figure: a line for each block size, torch's BSR dashed, dense = 1.

    Args:
        rows: of a result file with the sweep.
        peers: of one with the peers.
    """
    plt = pyplot()
    sweep = next(row for row in rows if row["section"] == SWEEP)
    figure, axes = plt.subplots(figsize=(8.6, 4.6))
    axes.axhspan(0, 1, color=SLOWER, zorder=0)
    axes.axhline(1, color=INK, linewidth=1.4)
    axes.text(0.105, 0.64, "slower than dense", fontsize=11, color=FAINT, va="center")
    write(axes, (0.95, 1), "dense", up=10)

    for block, color in BLOCK_COLORS.items():
        points = curve(rows, block)
        axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=2.8, markersize=5)
        write(axes, points[-1], f"block {block}")
        speedup = dict(points)[QUOTED]
        # Below each line, where the next one is far enough away; above the highest.
        offset, side = ((-4, 4), "right") if block == max(BLOCK_COLORS) else ((4, -13), "left")
        axes.annotate(
            f"{speedup:.1f}x", (QUOTED, speedup), offset, textcoords="offset points", fontsize=11,
            ha=side, color=INK,
        )  # fmt: skip
    peer = curve(peers, PEER_BLOCK, "torch BSR x", PEERS)
    axes.plot(*zip(*peer, strict=True), "s--", color=RIVAL, linewidth=2.2, markersize=5)
    text = f"torch's BSR, block {PEER_BLOCK}: {dict(peer)[QUOTED]:.1f}x at {QUOTED:.0%}"
    write(axes, peer[0], text, up=-12, color=RIVAL)

    top = int(axes.get_ylim()[1])
    axes.set(xlim=(0.085, 1.075), xticks=[0.1, 0.3, 0.5, 0.7, 0.8, QUOTED])
    axes.set(ylim=(0.3, top + 0.6), yticks=range(1, top + 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(labelsize=11.5, colors=INK)
    axes.set_xlabel("blocks pruned", fontsize=12, color=INK)
    axes.set_title(
        f"Speedup over dense: both linear layers of a ViT-B/16 MLP\n"
        f"{sweep['dtype']}, {sweep['M']} tokens, NVIDIA H200",
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
    source, rows = newest_run(SWEEP)
    path = Path(__file__).with_suffix(".png")
    draw(rows, newest_run(PEERS)[1]).savefig(
        path, dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.12
    )
    print(f"{path} from {source.name}")


if __name__ == "__main__":
    main()
