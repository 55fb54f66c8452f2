"""Whole models, dense against swapped: does a model get what its layers get?

    python benchmarks/models.py --device cuda --budget 540     # goes on where it stopped when called again
    python benchmarks/models.py --rows bert-all llama-token
    python benchmarks/models.py --device cpu --threads 2       # the row about CPU cores
    python benchmarks/models.py --quick                        # tiny models; all rows, on any device

Models of torch, torchvision, timm and transformers, built from their configurations with random
weights; random blocks of the named weights are zero, and `swap_to_bsr` does what it can with them:
activations fused, dead features dropped (not in training). Both sides compute the same function. The
ratio is the best of the dense model's ways over the best of ours, in one interleaved run by the wall
clock. Columns say what the swap's report counts.

The CSV file has a row for each finished cell and is what a later call goes on from; `--redo` runs rows
again, a new `--label` begins anew.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.cells.question import Row, Tick
from benchmarks.cells.results import Results, go_on
from benchmarks.cells.workers import CLOSING_SECONDS, run_cells
from benchmarks.measure.error import relative_error
from benchmarks.measure.precision import precision
from benchmarks.model.catalogue import ENTRIES, TINY_BLOCK, Entry
from benchmarks.model.compare import LARGEST_ERROR, WAYS, Step, measure_models, row_of, ways_on
from benchmarks.model.forms import counts, swapped
from benchmarks.model.masks import zero_blocks_of
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device
from benchmarks.report.picture import BLOCK_COLORS, pyplot

COLUMNS = [
    "row", "model", "block", "sparsity", "dense ms", "dense is", "ours ms", "ours is", "ours x", "eager x",
    "compiled x", "graph x", "compiled graph x", "error", "sparse weights", "swapped", "left dense", "notes",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A row of the table at one level.

    Attributes:
        setting: name of the row, `"tiny "` before it in quick runs.
        block: edge of the square blocks.
        sparsity: fraction of blocks that are zero.
    """

    setting: str
    block: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.setting}, block {self.block} at {self.sparsity:g}"


@dataclass
class Models:
    """Whole models: dense against swapped.

    Args:
        rows: names of the rows.
        sparsity: fraction of blocks that are zero.
        tiny: the tiny forms; compilation traces them and generates no code.
        seconds: that a row is timed for.
        ways: of running both sides; those of each row by default.
    """

    rows: tuple[str, ...]
    sparsity: float = 0.9
    tiny: bool = False
    seconds: float = 4.0
    ways: tuple[str, ...] = ()
    name: str = "models"
    title: str = "Whole models: dense against swapped"
    metric: str = "ours x"
    unit: str = "x"

    def check(self) -> None:
        """Raises `ImportError` with the pip line if a package is missing."""
        for row in self.rows:
            ENTRIES[row].check()

    def cells(self) -> list[Cell]:
        """A cell for each row."""
        prefix = "tiny " if self.tiny else ""
        return [
            Cell(prefix + row, TINY_BLOCK if self.tiny else ENTRIES[row].blocksize, self.sparsity)
            for row in self.rows
        ]

    def work(self, cell: Cell) -> float:
        """Most of the time goes into compiling, forward and backward where it trains."""
        entry = ENTRIES[cell.setting.removeprefix("tiny ")]
        return (1.0 + sum("compiled" in way for way in entry.ways)) * (2 if entry.trains else 1)

    def load(self, device: torch.device) -> None:
        """Remembers the device."""
        self.device = device

    def run(self, cell: Cell, tick: Tick) -> Row:
        """Measures a row."""
        entry = ENTRIES[cell.setting.removeprefix("tiny ")]
        try:
            with precision("float32"):
                return {"model": entry.title, **self._row(entry, cell, tick)}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _row(self, entry: Entry, cell: Cell, tick: Tick) -> Row:
        tick("building")
        dtype = torch.float32 if self.tiny else entry.dtype
        torch.manual_seed(0)
        with torch.device(self.device):
            dense = entry.build(self.tiny).to(dtype).requires_grad_(bool(entry.trains))
            inputs = entry.inputs(self.tiny, dtype)
        weights = zero_blocks_of(dense.eval(), entry.pattern, cell.block, cell.sparsity)
        names = list(weights)
        tick("swapping")
        if entry.trains:
            sides, step, report = training_sides(dense, inputs, cell, entry.trains)
        else:
            ours, report = swapped(dense, cell.block, cell.sparsity, narrow=True)
            sides, step = {"dense": dense, "ours": ours}, lambda side, runs: runs(*inputs)
        with torch.no_grad():
            few = tuple(x[:2] for x in inputs)
            error = relative_error(sides["ours"](*few), sides["dense"](*few))
        if not error <= LARGEST_ERROR:
            raise ArithmeticError(f"the swapped model's output is {error:.1e} off the dense one's")
        ways = ways_on(self.device, self.ways or entry.ways)
        for model in sides.values():
            model.train(bool(entry.trains))
        with torch.set_grad_enabled(bool(entry.trains)):
            measured = measure_models(
                sides, step, ways, self.device, seconds=self.seconds, tick=tick,
                backend="eager" if self.tiny else "inductor",
            )  # fmt: skip
        row = row_of(measured, list(sides), ways)
        failures = row.pop("failures")
        return {**row, "error": error, **counts(report, names), "failures": failures}


def training_sides(
    dense: nn.Module, inputs: Sequence[torch.Tensor], cell: Cell, kind: str
) -> tuple[dict[str, nn.Module], Step, Any]:
    """A dense model and its swapped copy, both to be trained.

    Args:
        dense: with zero blocks; its gradients are on.
        inputs: of a forward.
        cell: says the blocks.
        kind: `"backward"`: forward and backward of an output's product with random numbers, `inputs` included;
            `"step"`: of a cross entropy under autocast to bfloat16, and a step of AdamW.

    Returns:
        The models by side, a step of each, and the report of the swap.
    """
    from torchao_superblock import swap_to_bsr

    ours = copy.deepcopy(dense)
    sides = {"dense": dense, "ours": ours}
    cuda = inputs[0].is_cuda
    options: dict[str, Any] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if kind == "step":
        optimizers = {
            side: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
            for side, model in sides.items()
        }
        options["optimizer"] = optimizers["ours"]
    report = swap_to_bsr(
        ours, cell.block, min_sparsity=cell.sparsity / 2, fuse_activations=True, **options
    )
    if kind == "step":
        return sides, partial(_training_step, inputs[0], optimizers), report
    x = inputs[0].requires_grad_()
    upstream = torch.randn_like(x)

    def step(side: str, runs: Callable[..., Any]) -> None:
        runs(x).backward(upstream)
        for tensor in (x, *sides[side].parameters()):
            tensor.grad = None

    return sides, step, report


def _training_step(
    images: torch.Tensor,
    optimizers: dict[str, torch.optim.Optimizer],
    side: str,
    runs: Callable[..., Any],
) -> None:
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = runs(images)
        labels = torch.arange(images.shape[0], device=images.device) % logits.shape[1]
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizers[side].step()
    optimizers[side].zero_grad()


def draw(rows: Sequence[Row], title: str) -> Any:
    """A bar for each row: how many times as fast as dense it is, from 1 on."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(rows)))
    for place, row in enumerate(rows):
        color = BLOCK_COLORS.get(row["block"], "#888888")
        axes.barh(place, row["ours x"] - 1, left=1, color=color)
        text = f" {row['ours x']:.2f}x, block {row['block']}"
        axes.text(max(row["ours x"], 1), place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.2)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def write(report: Report, results: Results, left: list[Row], pictures: bool) -> Path:
    """The tables of every finished cell, and a picture."""
    rows = [
        {"row": cell.setting, "block": cell.block, "sparsity": cell.sparsity, **row}
        for cell, row in results.rows.items()
    ]
    used = [column for column in COLUMNS if any(column in row for row in rows)]
    if pictures and rows:
        sparsities = ", ".join(
            f"{sparsity:g}" for sparsity in sorted({r["sparsity"] for r in rows})
        )
        title = f"Times as fast as dense at sparsity {sparsities}, the faster way of each side"
        report.figure(draw(rows, title), "speedup", title)
    report.table(
        "Dense against swapped",
        rows,
        columns=used,
        note="Ours x: the best of the dense ways over the best of ours; then both in the same way. Error: of our "
        "output, relative to the dense model's in the same dtype. Sparse weights: those with zero blocks; left dense: "
        "those of them that no swap took, by the reason's code; notes: what else the swap's report says it changed.",
        to_csv=False,
    )
    failed = [
        {"row": row["row"], "what it said": row["failures"]} for row in rows if row.get("failures")
    ]
    if failed:
        report.table("Failures", failed, to_csv=False)
    if left:
        report.table(f"Left over: {len(left)} cells", left, to_csv=False)
    return report.write()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    names = {"choices": tuple(ENTRIES), "nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--rows", **names, help=f"default: all of the device, of {', '.join(ENTRIES)}"
    )
    parser.add_argument("--redo", default=[], **names, help="run these rows again")
    parser.add_argument("--sparsity", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=(),
        help="of running both sides; default: the row's",
    )
    parser.add_argument("--budget", type=float, help="seconds after which the run has ended")
    options = parser.parse_args(arguments)
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity {options.sparsity} is not between 0 and 1")
    return options


def ask(options: argparse.Namespace, device: torch.device) -> Models:
    """The question of the command line.

    Raises:
        SystemExit: for a row about another device.
    """
    here = [row for row, e in ENTRIES.items() if options.quick or e.device_type == device.type]
    rows = tuple(dict.fromkeys(options.rows or here))
    if elsewhere := [row for row in rows if row not in here]:
        raise SystemExit(
            f"the row {elsewhere[0]} is about {ENTRIES[elsewhere[0]].device_type}: pass --device "
            f"{ENTRIES[elsewhere[0]].device_type}, or --quick for its tiny form"
        )
    seconds = 0.1 if options.quick else 4.0
    return Models(rows, options.sparsity, options.quick, seconds, tuple(options.ways))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is not finished, and returns the path of the Markdown report."""
    options = parse(arguments)
    device = pick_device(options)
    question = ask(options, device)
    try:
        question.check()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    label = options.label or ("quick" if options.quick else None)
    report = Report(
        question.name, question.title, device, directory=options.output_dir, label=label
    )
    results = go_on(report, Cell)
    if options.redo:
        results.forget([c for c in results.rows if c.setting.removeprefix("tiny ") in options.redo])
    left = run_cells(
        question,
        results,
        devices=["cuda:0" if device.type == "cuda" else "cpu"],
        threads=torch.get_num_threads(),
        budget=None if options.budget is None else max(0.0, options.budget - CLOSING_SECONDS),
    )
    path = write(report, results, left, not options.no_pictures)
    print(f"\n{len(results.rows)} cells finished, {len(left)} left; written to {path}")
    return path


if __name__ == "__main__":
    main()
