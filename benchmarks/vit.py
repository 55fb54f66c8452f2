"""How fast is a whole model? torchvision's vit_b_16 with block-sparse MLP layers, dense against BSR.

    python benchmarks/vit.py                              # CUDA if there is a GPU, else the CPU
    python benchmarks/vit.py --device cpu --blocksizes 32 --sections headline
    python benchmarks/vit.py --device cuda --quick        # about three minutes; says what it left out

Weights are random (speed does not depend on their values), random blocks of the 24 MLP weights are
zero, and both models compute the same function. Each side is the best of eager and torch.compile
(default mode, and max-autotune on CUDA); CUDA graphs are used on neither.

Sections
    headline  one configuration, every way of running each side, and torch's own BSR; "narrow" sides
              lack the hidden features that the zero blocks leave without a use
    sparsity  speedup over sparsity for each block size (batch 256 on CUDA, 1 on the CPU)
    batch     speedup over batch size for each block size at sparsity 0.9

In the two sweeps torch.compile is applied to the encoder layer that repeats twelve times, which
costs seconds instead of a minute for every configuration; the headline compiles the whole model.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.measure.budget import Budget
from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.precision import precision
from benchmarks.measure.quiet import quiet
from benchmarks.measure.timings import Measurements
from benchmarks.model.compare import fastest
from benchmarks.model.vit import (
    build_vit,
    compile_layers,
    hidden_features,
    swapped,
    unswapped,
    with_torch_bsr,
    zero_blocks,
)
from benchmarks.report.files import RESULTS, Report
from benchmarks.report.options import add_common_arguments, pick_device
from benchmarks.report.picture import BLOCK_COLORS, pyplot
from benchmarks.report.progress import Progress

Row = dict[str, Any]

HEADLINE_SPARSITY = 0.9
COMPARED = (("dense", "ours"), ("dense", "ours narrow"), ("dense narrow", "ours narrow"))
PUBLISHED = {16: 1.24, 32: 1.37, 64: 1.65}  # speedups at 0.9, batch 256: A100, float32


class Bench:
    """Builds and times models for one run.

    Args:
        arguments: parsed command line.
        device: where.
        report: where tables go.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device, report: Report) -> None:
        self.arguments, self.device, self.report = arguments, device, report
        limit = arguments.budget
        if limit is None and arguments.quick:
            limit = 170.0
        self.budget = Budget(limit)
        self.overrides: Mapping[str, Any] = {}

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"

    def dense_model(self, blocksize: int, sparsity: float, dtype: torch.dtype) -> nn.Module:
        """The dense model with zero blocks, on the device."""
        model = build_vit(**self.overrides).to(self.device, dtype)
        return zero_blocks(model, blocksize, sparsity)

    def images(self, model: nn.Module, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """Random images, (batch, 3, H, W)."""
        generator = torch.Generator(self.device).manual_seed(7)
        size = (batch, 3, model.image_size, model.image_size)
        return torch.randn(size, device=self.device, generator=generator).to(dtype)

    def compiled(self, model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], object] | None:
        """A call of the compiled model, warmed up; None if it cannot be compiled here."""
        wrapped = torch.compile(copy.deepcopy(model), mode=mode, dynamic=False)
        # Every model of a headline is a recompilation of the same code, and the limit is 8.
        with torch._dynamo.config.patch(recompile_limit=16):
            return self.warm(lambda: wrapped(x), f"torch.compile ({mode})")

    def by_layer(self, model: nn.Module, x: torch.Tensor) -> Callable[[], object] | None:
        """A call of the model with compiled encoder layers, warmed up."""
        wrapped = compile_layers(model, self.device)
        return self.warm(lambda: wrapped(x), "torch.compile of the encoder layers")

    def warm(self, call: Callable[[], object], what: str) -> Callable[[], object] | None:
        """Runs `call` twice; notes what failed and returns None."""
        try:
            with quiet():
                call()
                call()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.budget.left_out.append({"left out": what, "because": reason[0][:160]})
            return None
        return call

    def time(self, candidates: Mapping[str, Callable[[], object] | None]) -> Measurements:
        """Interleaved timing of the candidates that exist."""
        present = {name: call for name, call in candidates.items() if call is not None}
        quick = self.arguments.quick
        seconds = (0.6 if quick else 1.5) if self.cuda else (2.0 if quick else 5.0)
        return measure(present, self.device, seconds=seconds, min_rounds=5)

    # -- sections ---------------------------------------------------------------------------------

    def headline(self, mode: str) -> None:
        """One configuration, every way to run both sides."""
        batch = self.arguments.batch
        block = 32 if (self.device.type, mode) == ("cpu", "float32") else 64
        title = f"{mode}, batch {batch}, block {block}, sparsity {HEADLINE_SPARSITY}"
        ways = [("compiled", "default", 45)] if self.arguments.compile else []
        if ways and self.cuda and not self.arguments.no_max_autotune:
            ways.append(("max-autotune", "max-autotune-no-cudagraphs", 110))
        progress = Progress(1 + 4 * len(ways), "headline")
        with precision(mode) as dtype, torch.no_grad():
            dense = self.dense_model(block, HEADLINE_SPARSITY, dtype)
            narrow = swapped(dense, block, narrow=True)
            sides = {
                "dense": dense,
                "ours": swapped(dense, block),
                "ours narrow": narrow,
                "dense narrow": unswapped(narrow),
            }
            x = self.images(dense, batch, dtype)
            errors = self.errors(sides)
            candidates: dict[str, Callable[[], object] | None] = {
                f"{side}, eager": partial(model, x) for side, model in sides.items()
            }
            torch_bsr = with_torch_bsr(dense, block)
            candidates["torch BSR, eager"] = self.warm(lambda: torch_bsr(x), "torch BSR")
            for name, settings, seconds in ways:
                for side, model in sides.items():
                    progress.step(f"torch.compile, {side}, {name}, {mode}")
                    if (side, name) == ("dense narrow", "max-autotune"):
                        because = "every layer has another shape, each of which tunes for 20 s"
                        self.budget.left_out.append(
                            {"left out": f"{side}, {name}", "because": because}
                        )
                        continue
                    if self.budget.allows(f"headline, {mode}: {side}, {name}", seconds):
                        candidates[f"{side}, {name}"] = self.compiled(model, x, settings)
            progress.step(f"measuring, {mode}")
            measured = self.time(candidates)
        progress.close()
        best = {side: fastest(measured, side) for side in sides}
        rows = []
        for name in candidates:
            timing = measured.timing(name)
            if timing is None:
                continue
            rows.append(
                {
                    "how": name,
                    "ms": timing.median * 1e3,
                    "images/s": batch / timing.median,
                    "over the best dense x": measured.speedup_value(best["dense"], name),
                    "error": errors.get(name.split(",")[0]),
                }
            )
        self.report.table(
            title,
            rows,
            note="Error: logits of four images against float64, relative. Narrow: without the hidden features that the "
            f"zero blocks leave without a use; {hidden_features(narrow)} of {hidden_features(dense)} are left.",
        )
        rows = [
            {
                "dense": best[slow],
                "ours": best[fast],
                "speedup": measured.speedup_value(best[slow], best[fast]),
            }
            for slow, fast in COMPARED
        ]
        self.report.table(f"Best against best, {title}", rows)
        torch._dynamo.reset()

    def errors(self, sides: Mapping[str, nn.Module]) -> dict[str, float]:
        """Relative error of the logits of four images against the dense model in float64."""
        dense = sides["dense"]
        dtype = next(dense.parameters()).dtype
        x = self.images(dense, 4, dtype)
        reference = copy.deepcopy(dense).double()(x.double())
        return {side: relative_error(model(x), reference) for side, model in sides.items()}

    def point(
        self,
        mode: str,
        block: int,
        sparsity: float,
        batch: int,
        dense_compiled: Callable[[], object] | None,
        compile_ours: bool,
    ) -> Row:
        """One point of a sweep: the best of eager and compiled layers on both sides."""
        with precision(mode) as dtype, torch.no_grad():
            dense = self.dense_model(block, sparsity, dtype)
            ours = swapped(dense, block)
            x = self.images(dense, batch, dtype)
            candidates = {
                "dense, eager": lambda: dense(x),
                "dense, compiled": dense_compiled,
                "ours, eager": lambda: ours(x),
                "ours, compiled": self.by_layer(ours, x) if compile_ours else None,
            }
            measured = self.time(candidates)
        best = {side: fastest(measured, side) for side in ("dense", "ours")}
        return {
            "dtype": mode,
            "block": block,
            "sparsity": sparsity,
            "batch": batch,
            "dense ms": measured.milliseconds(best["dense"]),
            "dense is": best["dense"].partition(", ")[2],
            "ours ms": measured.milliseconds(best["ours"]),
            "ours is": best["ours"].partition(", ")[2],
            "speedup": measured.speedup_value(best["dense"], best["ours"]),
            "eager over eager": measured.speedup_value("dense, eager", "ours, eager"),
        }

    def dense_by_layer(self, mode: str, batch: int) -> Callable[[], object] | None:
        """The compiled dense model of a sweep; it serves every block size and sparsity."""
        with precision(mode) as dtype, torch.no_grad():
            # Zeros even here: products with many zeros draw less power, which dense may profit from.
            dense = self.dense_model(min(self.arguments.blocksizes), HEADLINE_SPARSITY, dtype)
            return self.by_layer(dense, self.images(dense, batch, dtype))

    def sweep(self, name: str, mode: str, points: Sequence[tuple[int, float, int]]) -> list[Row]:
        """Measures (block, sparsity, batch) points; compiles the dense model once a batch size."""
        progress = Progress(len(points), f"{name}, {mode}")
        rows: list[Row] = []
        compiled: dict[int, Callable[[], object] | None] = {}
        needs = 3.0 if self.cuda else 12.0
        for block, sparsity, batch in points:
            what = f"block {block}, sparsity {sparsity}, batch {batch}"
            progress.step(what)
            if not self.budget.allows(f"{name}, {mode}: {what}", needs):
                continue
            start = time.monotonic()
            if batch not in compiled:
                compiled[batch] = (
                    self.dense_by_layer(mode, batch) if self.arguments.compile else None
                )
            with_compile = self.arguments.compile
            try:
                row = self.point(mode, block, sparsity, batch, compiled[batch], with_compile)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:160]
                self.budget.left_out.append(
                    {"left out": f"{name}, {mode}: {what}", "because": reason}
                )
                continue
            rows.append(row)
            needs = max(needs, time.monotonic() - start)
        progress.close()
        torch._dynamo.reset()
        return rows

    def sparsity(self, mode: str) -> None:
        """Speedup over sparsity for each block size."""
        batch = self.arguments.batch
        points = [
            (block, sparsity, batch)
            for block in self.arguments.blocksizes
            for sparsity in self.arguments.sparsities
        ]
        rows = self.sweep("sparsity", mode, points)
        note = f"Batch {batch}."
        if self.cuda:
            published = ", ".join(f"block {b}: {s}x" for b, s in PUBLISHED.items())
            note += f" Published at 0.9 (A100, float32): {published}."
        self.report.table(f"Speedup over sparsity, {mode}", rows, note=note)
        self.draw(rows, "sparsity", mode, f"batch {batch}")

    def batch(self, mode: str) -> None:
        """Speedup over batch size for each block size at 0.9."""
        points = [
            (block, HEADLINE_SPARSITY, batch)
            for batch in self.arguments.batches
            for block in self.arguments.blocksizes
        ]
        rows = self.sweep("batch", mode, points)
        self.report.table(
            f"Speedup over batch size, {mode}", rows, note=f"Sparsity {HEADLINE_SPARSITY}."
        )
        self.draw(rows, "batch", mode, f"sparsity {HEADLINE_SPARSITY}")

    def draw(self, rows: Sequence[Row], axis: str, mode: str, rest: str) -> None:
        """Saves the picture of a sweep."""
        if rows and not self.arguments.no_pictures:
            where = self.report.facts["device"].split(" (")[0]
            title = f"ViT-B/16, MLP layers block-sparse, {rest}\n{where}, {mode}"
            figure = draw_speedups(rows, axis, title)
            self.report.figure(figure, f"{axis}_{mode}", title.replace("\n", ", "))


def draw_speedups(rows: Sequence[Row], axis: str, title: str) -> Any:
    """Speedup over `axis` ("sparsity" or "batch"), one line a block size.

    Args:
        rows: rows of a sweep.
        axis: key of the horizontal axis.
        title: of the picture.
    """
    plt = pyplot()
    figure, plot = plt.subplots(figsize=(5.6, 3.8))
    ends = []
    for block in sorted({row["block"] for row in rows}):
        points = sorted((r[axis], r["speedup"]) for r in rows if r["block"] == block)
        plot.plot(
            *zip(*points, strict=True), "o-", markersize=4, label=f"block {block}",
            color=BLOCK_COLORS.get(block, "#555555"),
        )  # fmt: skip
        ends.append(points[-1])
    plot.axhline(1, color="#c1121f", linewidth=1)
    lowest, highest = plot.get_ylim()
    place = -1.0
    for x, y in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + (highest - lowest) / 18)  # so that labels keep clear of each other
        plot.annotate(
            f"{y:.2f}x", (x, place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    if axis == "batch":
        plot.set_xscale("log", base=2)
        values = sorted({row["batch"] for row in rows})
        plot.set_xticks(values, [str(v) for v in values])
        plot.minorticks_off()
        plot.set_xlabel("batch size")
    else:
        plot.set_xlabel("fraction of blocks that are zero")
    plot.set_ylabel("speedup over dense")
    plot.set_title(title)
    plot.legend(loc="upper left")
    plot.margins(x=0.1)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--sections", nargs="+", choices=("headline", "sparsity", "batch"), help="default: all"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=("bfloat16", "float32", "tf32"),
        help="default: bfloat16, float32 (IEEE) and tf32 on CUDA; float32 on the CPU",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="of headline and sparsity; 256 or, CPU, 1")
    parser.add_argument("--batches", type=int, nargs="+", help="of the batch section")
    parser.add_argument("--blocksizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--sparsities", type=float, nargs="+", help="of the sparsity section")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager only")
    parser.add_argument("--no-max-autotune", action="store_true", help="saves minutes a mode")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="leave out what would not fit, and say so (--quick: 170)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device = pick_device(arguments)
    return run(arguments, device)


def run(
    arguments: argparse.Namespace, device: torch.device, overrides: Mapping[str, Any] | None = None
) -> Path:
    """Runs the sections; `overrides` shrinks the model (tests)."""
    cuda = device.type == "cuda"
    quick = arguments.quick
    arguments.batch = arguments.batch or (256 if cuda else 1)
    arguments.modes = arguments.modes or (["bfloat16", "float32", "tf32"] if cuda else ["float32"])
    if arguments.batches is None:
        arguments.batches = [1, 4, 16, 64, 256] if cuda else [1, 2, 4] if quick else [1, 2, 4, 8]
    if arguments.sparsities is None:
        arguments.sparsities = [0.5, 0.8, 0.9] if quick else [0.5, 0.6, 0.7, 0.8, 0.9]
    report = Report(
        "vit",
        "ViT-B/16 with block-sparse MLP layers: dense against BSR",
        device,
        directory=arguments.output_dir or RESULTS,
        label=arguments.label,
    )
    bench = Bench(arguments, device, report)
    bench.overrides = overrides or {}
    sections = arguments.sections or ["headline", "sparsity", "batch"]
    broken: list[str] = []
    # The first mode completely before the next one: what a short budget drops is the least asked.
    for mode in arguments.modes:
        for section in sections:
            if quick and section != "headline" and mode != arguments.modes[0]:
                bench.budget.left_out.append(
                    {"left out": f"{section}, {mode}", "because": "--quick"}
                )
                continue
            if section == "headline" and not bench.budget.allows(f"headline, {mode}", 10):
                continue
            try:
                getattr(bench, section)(mode)
            except Exception as error:  # the other sections are still worth having
                traceback.print_exc()
                report.text(f"**{section}, {mode} failed:** {type(error).__name__}: {error}")
                broken.append(f"{section}, {mode}")
    if bench.budget.left_out:
        report.table("Left out", bench.budget.left_out)
    path = report.write()
    print(f"\nwritten: {path}")
    if broken:
        raise SystemExit(f"failed: {'; '.join(broken)}")
    return path


if __name__ == "__main__":
    main()
