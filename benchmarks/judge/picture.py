"""The picture of a question: score over sparsity, a line a method, a panel a setting and block size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.judge.cells import DENSE, FLOOR, Question
from benchmarks.judge.digest import Point
from benchmarks.judge.methods import RIVALS
from benchmarks.report.picture import pyplot

COLORS = ("#1d4e89", "#219ebc", "#bb3e03", "#2a9d8f", "#7b2cbf", "#e09f3e", "#0b2545", "#d81159")
RIVAL_STYLES = {
    "random": ("#9a9a9a", ":", "x"),
    "gradual": ("#4a4a4a", "--", "s"),
    "block-norm": ("#4a4a4a", "--", "s"),
    "torch-weight-norm": ("#7d7d7d", "-.", "^"),
}


def draw(question: Question, found: Sequence[Point], where: str) -> Any:
    """A figure; bars span the seeds' lowest and highest score, points of a level lie side by side.

    Args:
        question: what was asked.
        found: see :func:`benchmarks.judge.digest.points`.
        where: hardware, for the title.
    """
    plt = pyplot()
    masked = [p for p in found if p.method not in (DENSE, FLOOR)]
    settings = list(dict.fromkeys(p.setting for p in masked))
    blocks = sorted({p.block for p in masked})
    panels = [(setting, block) for setting in settings for block in blocks]
    methods = list(dict.fromkeys(p.method for p in masked))
    ours = [m for m in methods if m not in RIVALS]
    columns = len(blocks) if len(blocks) > 1 else min(4, len(settings))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 3.9 * columns, 1 + 3.2 * lines), squeeze=False
    )
    for axis, (setting, block) in zip(axes.flat, panels, strict=False):
        here = [p for p in masked if (p.setting, p.block) == (setting, block)]
        if not here:
            axis.set_axis_off()
            continue
        levels = sorted({p.sparsity for p in here})
        # What one level's points are spread over: less than half the way to the next.
        gaps = [b - a for a, b in itertools.pairwise(levels)]
        width = 0.3 * min(gaps) if gaps else 0.03
        for i, method in enumerate(methods):
            line = sorted((p for p in here if p.method == method), key=lambda p: p.sparsity)
            if not line:
                continue
            shift = width * (i / max(1, len(methods) - 1) - 0.5)
            if method in RIVAL_STYLES:
                color, style, marker = RIVAL_STYLES[method]
            else:
                color, style, marker = COLORS[ours.index(method) % len(COLORS)], "-", "o"
            means = [p.mean for p in line]
            axis.errorbar(
                [p.sparsity + shift for p in line],
                means,
                yerr=[
                    [mean - p.low for mean, p in zip(means, line, strict=True)],
                    [p.high - mean for mean, p in zip(means, line, strict=True)],
                ],
                color=color, linestyle=style, marker=marker, markersize=5, capsize=3, label=method,
            )  # fmt: skip
        for baseline, style in ((DENSE, "-"), (FLOOR, ":")):
            for p in found:
                if (p.setting, p.method) == (setting, baseline):
                    axis.axhline(p.mean, color="black", linewidth=1, linestyle=style)
                    axis.annotate(
                        f"{baseline} {p.mean:.{question.decimals}f}", (0.01, p.mean), fontsize=8, va="bottom",
                        xycoords=("axes fraction", "data"),
                    )  # fmt: skip
        axis.set_xticks(levels, [f"{level:g}" for level in levels])
        axis.margins(x=0.15, y=0.12)
        if len(levels) == 1:
            axis.set_xlim(levels[0] - 0.1, levels[0] + 0.1)
        axis.set_title(f"{setting}, block {block}")
        axis.set_xlabel("sparsity")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        better = "higher" if question.higher_is_better else "lower"
        axis.set_ylabel(f"{question.unit} ({better} is better)")
    handles = {}
    for axis in axes.flat:
        handles.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    shown = [m for m in methods if m in handles]
    figure.legend(
        [handles[m] for m in shown], shown, loc="outside lower center", ncols=min(5, len(shown))
    )
    figure.suptitle(f"{question.title}\n{where}", fontsize=11)
    return figure
