"""The figures of "Speeding up ViTs using Block Sparsity", measured again: one figure is one command.

    python benchmarks/figures.py 2 --device cuda --budget 540    # goes on where it stopped when called again
    python benchmarks/figures.py 2 --device cpu --threads 2      # batch 1
    python benchmarks/figures.py 5                               # from the files of quality.py; measures nothing
    python benchmarks/figures.py 3 --quick                       # tiny models, on any device

Figures
    1  one linear layer in the shapes of ViT-B/16, over sparsity: ours, torch's BSR and torchao over dense
    2  ViT-B/16 at batch 256 over sparsity, MLPs and all linears of the encoder, and where it breaks even
    3  the same at 0.9 over batch sizes, without and with CUDA graphs
    4  memory: peak of a forward, size of the file, bytes of the swapped weights
    5  accuracy over sparsity and block size, with published points beside it
    6  ViT-H/14 at batch 256 in bfloat16 with blocks of 64

Whole models run eagerly, with and without CUDA graphs on both sides: compiling each of these points
would take hours (models.py compiles). Times are wall clock of a stream of calls. The CSV file has a row
for each finished point and is what a later call goes on from; a new `--label` begins anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.cells.question import Row
from benchmarks.cells.results import go_on
from benchmarks.cells.workers import CLOSING_SECONDS, run_cells
from benchmarks.figure import accuracy, published
from benchmarks.figure.linear import SHAPES, TINY_SHAPES, LinearLayer
from benchmarks.figure.memory import Memory
from benchmarks.figure.picture import draw_lines
from benchmarks.figure.points import Point, Sweep
from benchmarks.figure.vits import WholeModel
from benchmarks.report.crossing import break_even_text
from benchmarks.report.files import RESULTS, Report
from benchmarks.report.options import add_common_arguments, pick_device

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BLOCKS = (16, 32, 64)
TITLES = {
    1: "Figure 1. One linear layer in the shapes of ViT-B/16: speedup over sparsity",
    2: "Figure 2. ViT-B/16: speedup over sparsity",
    3: "Figure 3. ViT-B/16: speedup over batch size",
    4: "Figure 4. ViT-B/16: memory, swapped over dense",
    5: "Figure 5. Accuracy over sparsity and block size",
    6: "Figure 6. ViT-H/14: speedup over sparsity",
}
COLUMNS = {
    1: {"ours x": "o-", "torch BSR x": "s--", "torchao x": "^:"},
    2: {"ours x": "o-", "ours narrow x": "d-.", "torch BSR x": "s--"},
    3: {"graph x": "o-", "eager x": "s--"},
    4: {"weights": "o-", "file": "s--", "peak": "^:"},
    6: {"ours x": "o-", "ours narrow x": "d-.", "published x (A100)": "*:"},
}
"""What a picture draws, in matplotlib's styles."""
NOTES = {
    1: "Dense time over the candidate's, in one interleaved run; a layer's bias included. Batch: of 197 tokens.",
    2: "Ours x: the faster of eager and CUDA graphs of the dense model over the faster of ours; then both in the same "
    "way. Narrow: without the hidden features that random blocks leave without a use. Peers: eager. "
    "Error: of our logits, relative to the dense model's in the same dtype.",
    4: "Swapped over dense. Weights: of the swapped layers, indices included. File: save_bsr over torch.save. Peak: "
    "the most that a forward has allocated at once on a GPU, model and images included; a CPU does not count it.",
}
NOTES[3] = NOTES[6] = NOTES[2]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", type=int, choices=tuple(TITLES), metavar="FIGURE", help="1 to 6")
    add_common_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=("bfloat16", "float32", "tf32", "float16"))
    parser.add_argument("--blocks", type=int, nargs="+", help="block sizes")
    parser.add_argument("--sparsities", type=float, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="dense and ours")
    parser.add_argument("--budget", type=float, help="seconds after which the run has ended")
    parser.add_argument(
        "--quality-dir", type=Path, default=RESULTS, help="5: where quality.py left its files"
    )
    return parser.parse_args(arguments)


def ask(options: argparse.Namespace, device: torch.device) -> Sweep:
    """The grid of a figure.

    Raises:
        SystemExit: the figure is about a GPU.
    """
    number, tiny, cuda = options.figure, options.quick, device.type == "cuda"
    if number in (3, 4, 6) and not (cuda or tiny):
        raise SystemExit(f"figure {number} is about a GPU: pass --device cuda, or --quick")
    both = ("bfloat16", "float32")
    modes = ("float32",) if tiny or not cuda else both if number in (1, 2) else both[:1]
    whats: tuple[str, ...] = ("mlp", "all")
    if number == 1:
        whats = TINY_SHAPES if tiny else SHAPES
    blocks = (16, 32) if tiny else (64,) if number == 6 else BLOCKS
    sparsities: tuple[float, ...] = (0.9,) if number == 3 else SPARSITIES
    if tiny and number != 3:
        sparsities = (0.5, 0.9)
    elif number in (4, 6):
        sparsities = (0.5, 0.8, 0.9)
    batches = {3: BATCHES, 4: (1, 256)}.get(number, (256,) if cuda else (1,))
    if tiny:
        batches = (1, 2) if number == 3 else (2,)
    settings: dict[str, Any] = {
        "name": f"figure{number}",
        "title": TITLES[number],
        "modes": tuple(options.modes or modes),
        "whats": whats,
        "blocks": tuple(options.blocks or blocks),
        "sparsities": tuple(options.sparsities or sparsities),
        "batches": tuple(options.batches or batches),
        "tiny": tiny,
        "peers": options.peers,
    }
    if tiny:
        settings["seconds"] = 0.01
    if number == 1:
        return LinearLayer(**settings | ({} if tiny else {"seconds": 0.12 if cuda else 0.5}))
    if number == 4:
        return Memory(**settings)
    return WholeModel(**settings, huge=number == 6)


def records(number: int, rows: dict[Point, Row]) -> list[Row]:
    """Points and what was measured of them, sorted, with what is published of the very point."""
    found = []
    for point in sorted(rows, key=lambda p: (p.mode, p.what, p.batch, p.block, p.sparsity)):
        row: Row = {
            "mode": point.mode,
            "what": point.what,
            "batch": point.batch,
            "block": point.block,
            "sparsity": point.sparsity,
            **rows[point],
        }
        if (
            number == 6
            and point.sparsity in published.VIT_H_MS
            and not point.what.startswith("tiny")
        ):
            row["published x (A100)"] = published.VIT_H_MS[0.0] / published.VIT_H_MS[point.sparsity]
        found.append(row)
    return found


def break_even_rows(rows: Sequence[Row]) -> list[Row]:
    """Where each curve over sparsity crosses 1, with what is published of it."""
    table = []
    curves = dict.fromkeys((r["mode"], r["what"], r["batch"], r["block"]) for r in rows)
    for mode, what, batch, block in curves:
        line = [
            (r["sparsity"], r["ours x"])
            for r in rows
            if (r["mode"], r["what"], r["batch"], r["block"]) == (mode, what, batch, block)
        ]
        row: Row = {"mode": mode, "what": what, "batch": batch, "block": block}
        row["break-even sparsity"] = break_even_text(line)
        row["speedup at 0.9"] = dict(line).get(0.9)
        if (mode, what, batch) == ("float32", "mlp", 256):
            row["published break-even (A100)"] = published.VIT_B_BREAK_EVEN.get(block)
            row["published at 0.9 (A100)"] = published.VIT_B_SPEEDUP.get(block)
        table.append(row)
    return table


def write(
    report: Report, number: int, rows: dict[Point, Row], left: list[Row], pictures: bool
) -> Path:
    """The tables and the picture of every finished point."""
    found = records(number, rows)
    hidden = {"mode", "what", "failures", "device", "torch", "seconds"}
    for mode, what in dict.fromkeys((row["mode"], row["what"]) for row in found):
        here = [row for row in found if (row["mode"], row["what"]) == (mode, what)]
        columns = [c for c in dict.fromkeys(k for row in here for k in row) if c not in hidden]
        report.table(f"{what}, {mode}", here, columns=columns, note=NOTES[number], to_csv=False)
    if number == 2 and found:
        report.table("Break-even", break_even_rows(found), to_csv=False)
    failures: dict[str, list[Row]] = {}
    for row in found:
        for reason in filter(None, str(row.get("failures") or "").split("; ")):
            failures.setdefault(reason, []).append(row)
    if failures:
        table = [{"what it said": r, "points": len(points)} for r, points in failures.items()]
        report.table("Failures", table, to_csv=False)
    if left:
        report.table(f"Left over: {len(left)} points", left, to_csv=False)
    if pictures and found:
        where = report.facts["device"].split(" (")[0]
        batches = sorted({row["batch"] for row in found})
        axis = "batch" if number == 3 else "sparsity"
        if number == 4:  # a line is of one batch; the larger holds more of what is no weight
            found = [row for row in found if row["batch"] == batches[-1]]
        title = f"{TITLES[number]}\n{where}"
        if axis == "sparsity":
            title += f", batch {batches[-1]}"
        label = "swapped over dense" if number == 4 else "speedup over dense"
        try:
            report.figure(
                draw_lines(found, axis, COLUMNS[number], title, label),
                axis,
                title.replace("\n", ", "),
            )
        except ImportError as error:
            report.text(str(error))
    return report.write()


def write_accuracy(report: Report, folder: Path, pictures: bool) -> Path:
    """Figure 5: what quality.py's newest files hold, and what others have published.

    Raises:
        SystemExit: there are none.
    """
    files = accuracy.newest_files(folder)
    if not files:
        raise SystemExit(
            f"no file of benchmarks/quality.py (*_quality_*.csv) in {folder}; run it, or pass --quality-dir"
        )
    report.fact("from", ", ".join(path.name for path in files))
    for path, question in files.items():
        for title, rows in accuracy.tables(path, question):
            report.table(title, rows)
    report.table(
        "ViT-B/16 on ImageNet, published by others",
        accuracy.published_rows(),
        note="No gap is given for the log: its dense model is another training.",
    )
    if pictures:
        try:
            report.figure(accuracy.draw(files), "accuracy", TITLES[5])
        except ImportError as error:
            report.text(str(error))
    return report.write()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is not finished of a figure, and returns the path of the Markdown report."""
    options = parse(arguments)
    number = options.figure
    device = torch.device("cpu") if number == 5 else pick_device(options)
    label = options.label or ("quick" if options.quick else None)
    report = Report(
        f"figure{number}", TITLES[number], device, directory=options.output_dir, label=label
    )
    if number == 5:
        path = write_accuracy(report, options.quality_dir, not options.no_pictures)
        print(f"\nwritten to {path}")
        return path
    question = ask(options, device)
    results = go_on(report, Point)
    left = run_cells(
        question,
        results,
        devices=["cuda:0" if device.type == "cuda" else "cpu"],
        threads=torch.get_num_threads(),
        budget=None if options.budget is None else max(0.0, options.budget - CLOSING_SECONDS),
    )
    path = write(report, number, results.rows, left, not options.no_pictures)
    print(f"\n{len(results.rows)} points finished, {len(left)} left; written to {path}")
    return path


if __name__ == "__main__":
    main()
