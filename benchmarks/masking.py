"""What does learning a block mask cost? A training step with masks against the same step without.

    python benchmarks/masking.py                              # CUDA if there is a GPU, else the CPU
    python benchmarks/masking.py --device cuda --output-dir DIR
    python benchmarks/masking.py --quick                      # fewer cells, smaller batches

A step is all of it: forward, backward, AdamW, and with masks `sparsifier.step()`, for every kind of
mask. Both sides run in
eager mode on random inputs and do the same products, so the ratio is the price of the masks alone.
torchao's SupermaskLinear is measured beside ours where torchao is installed; it has no step of its
own.

Sections
    mlp   the two linears of ViT-B/16's MLP (one layer on the CPU, twelve on CUDA)
    vit   CUDA: the whole torchvision vit_b_16, MLP layers masked, bfloat16 autocast
    host  a model so small that the host is the limit, also while the level rises and once frozen
"""

from __future__ import annotations

import argparse
import collections
import copy
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.measure.host import measure_host
from benchmarks.measure.interleaved import measure
from benchmarks.measure.kernels import count_kernels
from benchmarks.measure.quiet import quiet
from benchmarks.measure.timings import Measurements
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device
from benchmarks.report.picture import pyplot
from benchmarks.report.progress import Progress
from torchao_superblock.pruning import (
    BlockSparsifier,
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
)

Row = dict[str, Any]
Step = Callable[[], object]

SPARSITY = 0.8
TOKENS = 197  # of one 224 x 224 image in ViT-B/16
PEER = "torchao SupermaskLinear"
NEVER = 10**9
SECTIONS = ("mlp", "vit", "host")
KINDS: dict[str, Callable[[int], BlockSparsifier]] = {
    "supermask": lambda b: SupermaskSparsifier(SPARSITY, b),
    "supermask on a ramp": lambda b: SupermaskSparsifier(SPARSITY, b, ramp_steps=1),
    "magnitude": lambda b: MagnitudeSparsifier(SPARSITY, b, ramp_steps=1),
    "magnitude, weighted": lambda b: MagnitudeSparsifier(
        SPARSITY, b, ramp_steps=1, gradient_weighted=True
    ),
    # Ten times as often as by default, so that a few rounds see all of its work: an upper bound.
    "RigL, update_every=10": lambda b: RigLSparsifier(
        SPARSITY, b, freeze_step=NEVER, update_every=10
    ),
    "Spartan": lambda b: SpartanSparsifier(SPARSITY, b, ramp_steps=1, freeze_step=NEVER),
}
"""What is measured, past its ramp; not all steps of a kind are alike, so means count."""
PHASES: dict[str, Callable[[int], BlockSparsifier]] = {
    "supermask on a ramp, rising": lambda b: SupermaskSparsifier(SPARSITY, b, ramp_steps=NEVER),
    "supermask on a ramp, frozen": lambda b: SupermaskSparsifier(
        SPARSITY, b, ramp_steps=1, freeze_step=1
    ),
    "magnitude, frozen": lambda b: MagnitudeSparsifier(SPARSITY, b, ramp_steps=1, freeze_step=1),
    "Spartan, frozen": lambda b: SpartanSparsifier(SPARSITY, b, ramp_steps=1, freeze_step=1),
}
"""The same before and after, where that takes the host another time."""


class MLP(nn.Module):
    """One encoder layer's MLP with its residual, at ViT-B's width."""

    def __init__(self, width: int = 768, hidden: int = 3072) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """As ViT-B's: x and the MLP of its norm, `(..., width)`."""
        return x + self.linear_2(nn.functional.gelu(self.linear_1(self.norm(x))))


def mask_with_ours(
    model: nn.Module, fqn: str, blocksize: int, kind: str
) -> tuple[BlockSparsifier, list]:
    """Prepares the model; returns the sparsifier and what the optimizer is given."""
    sparsifier = {**KINDS, **PHASES}[kind](blocksize)
    sparsifier.prepare(model, [{"tensor_fqn": fqn}])
    return sparsifier, sparsifier.param_groups(model, weight_decay=0.05)


def mask_with_torchao(model: nn.Module, fqn: str, blocksize: int) -> list[nn.Parameter]:
    """Puts torchao's module in the place of the same linears."""
    import fnmatch

    from torchao.sparsity import SupermaskLinear

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and fnmatch.fnmatchcase(f"{path}.weight", fqn):
            parent, _, name = path.rpartition(".")
            masked = SupermaskLinear.from_linear(module, SPARSITY, blocksize)
            setattr(model.get_submodule(parent), name, masked.to(module.weight.device))
    return list(model.parameters())


def make_step(
    model: nn.Module,
    parameters: list,
    loss: Callable[[nn.Module], Tensor],
    after: Callable[[], None] | None = None,
) -> Step:
    """One training step as a function without arguments."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if after is not None:
            after()

    return step


def make_steps(
    dense: nn.Module,
    fqn: str,
    blocksizes: list[int],
    loss: Callable[[nn.Module], Tensor],
    kinds: Iterable[str] = tuple(KINDS),
) -> dict[str, Step]:
    """Steps to compare, by name; "dense" is the one without masks."""
    steps = {}
    for kind in kinds:
        for blocksize in blocksizes:
            model = copy.deepcopy(dense)
            sparsifier, parameters = mask_with_ours(model, fqn, blocksize, kind)
            name = f"{kind}, block {blocksize}"
            steps[name] = make_step(model, parameters, loss, sparsifier.step)
    model = copy.deepcopy(dense)
    try:
        with quiet():
            parameters = mask_with_torchao(model, fqn, blocksizes[0])
        steps[f"{PEER}, block {blocksizes[0]}"] = make_step(model, parameters, loss)
    except ImportError as error:
        print(f"torchao is not measured: {error}", file=sys.stderr)
    return {"dense": make_step(dense, list(dense.parameters()), loss), **steps}


def overhead(results: Measurements, name: str) -> tuple[float, float, float] | None:
    """Time with masks / time without: ratio of the means, and quartiles of the rounds' ratios."""
    dense, masked = results.timing("dense"), results.timing(name)
    if dense is None or masked is None:
        return None
    ratios = [m / d for m, d in zip(masked.samples, dense.samples, strict=False)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    rounds = len(ratios)
    mean = sum(masked.samples[:rounds]) / sum(dense.samples[:rounds])
    return mean, low, high


def rows_of(
    results: Measurements, base: Mapping[str, Any], kernels: Mapping[str, int | None]
) -> list[Row]:
    """A table row for each candidate."""
    rows = []
    for name in results:
        timing, ratio = results.timing(name), overhead(results, name)
        row: Row = {**base, "candidate": name}
        row["ms"] = None if timing is None else timing.median * 1e3
        row["ratio"] = None if ratio is None else f"{ratio[0]:.3f}x"
        row["quartiles"] = None if ratio is None else f"{ratio[1]:.3f} - {ratio[2]:.3f}"
        # On a machine that others use too, the fastest rounds are the least disturbed ones.
        base_timing = results.timing("dense")
        undisturbed = timing is not None and base_timing is not None
        row["of the fastest"] = (
            f"{timing.minimum / base_timing.minimum:.3f}x" if undisturbed else None
        )
        row["rounds"] = None if timing is None else len(timing.samples)
        if kernels:
            row["kernels"] = kernels.get(name)
            extra = (kernels.get(name) or 0) - (kernels.get("dense") or 0)
            row["more kernels"] = extra if kernels.get(name) is not None else None
        if results.failure(name):
            row["failed"] = results.failure(name)
        rows.append(row)
    return rows


def section_mlp(report: Report, device: torch.device, quick: bool, seconds: float) -> list[Row]:
    """The MLP's linears alone, where the masks weigh most."""
    layers = 12 if device.type == "cuda" else 1
    batches = ([32] if quick else [128]) if device.type == "cuda" else ([4] if quick else [8, 32])
    blocksizes = [64] if quick else [64, 32]
    rows: list[Row] = []
    progress = Progress(len(batches), "masking: mlp")
    for batch in batches:
        progress.step(f"batch {batch}")
        torch.manual_seed(0)
        dense = nn.Sequential(*(MLP() for _ in range(layers))).to(device)
        x = torch.randn(batch, TOKENS, 768, device=device)

        def loss(model: nn.Module, x: Tensor = x) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(x)
            return out.float().square().mean()

        steps = make_steps(dense, "*.linear_*.weight", blocksizes, loss)
        results = measure(steps, device, seconds=seconds, max_rounds=40)
        kernels = count_kernels(steps)[0] if device.type == "cuda" else {}
        rows += rows_of(results, {"batch": batch, "tokens": batch * TOKENS}, kernels)
    progress.close()
    dtype = "bfloat16 autocast" if device.type == "cuda" else "float32"
    report.table(
        f"ViT-B MLP, {layers} layer{'s' * (layers > 1)} of 768 - 3072 - 768, {dtype}",
        rows,
        note=f"Sparsity {SPARSITY}. Ratio: step with masks / step without, of the means; "
        "'of the fastest': the fastest round of each.",
    )
    return rows


def section_vit(report: Report, device: torch.device, quick: bool, seconds: float) -> list[Row]:
    """The whole vision transformer."""
    from torchvision.models import vit_b_16

    batch = 32 if quick else 128
    torch.manual_seed(0)
    dense = vit_b_16(weights=None).to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return nn.functional.cross_entropy(model(images), labels)

    steps = make_steps(dense, "encoder.layers.*.mlp.*.weight", [64] if quick else [64, 32], loss)
    progress = Progress(2, "masking: vit_b_16")
    progress.step(f"batch {batch}")
    results = measure(steps, device, seconds=seconds, max_rounds=40)
    progress.step("counting kernels")
    kernels, names = count_kernels(steps)
    progress.close()
    rows = rows_of(results, {"batch": batch}, kernels)
    report.table(
        f"torchvision vit_b_16 training step, batch {batch}, bfloat16 autocast, eager",
        rows,
        note=f"Sparsity {SPARSITY}, the 24 MLP weights masked. Kernels: CUDA kernels of one step.",
    )
    more = names.get("supermask, block 64", collections.Counter()) - names.get(
        "dense", collections.Counter()
    )
    if more:
        report.table(
            "Kernels that supermasks of block 64 add to a step",
            [{"kernel": name[:100], "launches": n} for name, n in more.most_common(12)],
        )
    return rows


def section_host(report: Report, device: torch.device, quick: bool) -> list[Row]:
    """What a step takes the host: the model is too small to keep any device busy."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(MLP(64, 128) for _ in range(2 if quick else 12))).to(device)
    x = torch.randn(4, 64, device=device)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(x)
        return out.float().square().mean()

    steps = make_steps(dense, "*.linear_*.weight", [16], loss, (*KINDS, *PHASES))
    progress = Progress(1, "masking: host")
    progress.step(f"{2 * len(dense)} masked linears")
    # Ten calls: some kinds look at their blocks every tenth step only.
    results = measure_host(steps, calls=10, rounds=3 if quick else 20, wait=True)
    kernels = count_kernels(steps)[0] if device.type == "cuda" else {}
    progress.close()
    rows = rows_of(results, {"batch": len(x), "masked linears": 2 * len(dense)}, kernels)
    report.table(
        "A step that the host limits",
        rows,
        note=f"Sparsity {SPARSITY}, {len(dense)} layers of 64 - 128 - 64, eager. Ratio: as above; "
        "wall time of a stream of steps.",
    )
    return rows


def picture(report: Report, sections: Mapping[str, list[Row]]) -> None:
    """Ratio of every candidate, with its quartiles."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(sections), figsize=(7.5 * len(sections), 4.2), squeeze=False)
    for axis, (title, rows) in zip(axes[0], sections.items(), strict=True):
        shown = [row for row in rows if row["ratio"] and row["candidate"] != "dense"]
        values = [float(row["ratio"].rstrip("x")) for row in shown]
        bounds = [tuple(map(float, row["quartiles"].split(" - "))) for row in shown]
        # Quartiles of single rounds need not enclose the mean.
        errors = [
            [max(0.0, v - low) for v, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        colors = ["#999999" if PEER in row["candidate"] else "#219ebc" for row in shown]
        labels = [f"{row['candidate']}, batch {row['batch']}" for row in shown]
        bars = axis.barh(range(len(shown)), values, color=colors, xerr=errors, capsize=2)
        axis.bar_label(bars, [f" {value:.3f}x" for value in values], padding=4, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(shown)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0.9, max([1.1, *values]) + 0.05)
        axis.set_title(title)
        axis.set_xlabel("step with masks / step without")
    report.figure(figure, "ratio", "Cost of learning masks")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the sections and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--seconds", type=float, help="per cell (default: 8 on CUDA, 25 on the CPU)"
    )
    options = parser.parse_args(arguments)
    device = pick_device(options)
    seconds = options.seconds or (1.0 if options.quick else 8.0 if device.type == "cuda" else 25.0)
    report = Report(
        "masking",
        "What learning a block mask costs",
        device,
        directory=options.output_dir,
        label=options.label,
    )
    sections: dict[str, list[Row]] = {}
    if "mlp" in options.sections:
        sections["MLP layers"] = section_mlp(report, device, options.quick, seconds)
    if "vit" in options.sections and device.type == "cuda":
        torch.cuda.empty_cache()
        sections["vit_b_16"] = section_vit(report, device, options.quick, seconds)
    if "host" in options.sections:
        sections["Host"] = section_host(report, device, options.quick)
    if sections and not options.no_pictures:
        try:
            picture(report, sections)
        except ImportError as error:
            report.text(str(error))
    print(f"\nwritten to {report.write()}")


if __name__ == "__main__":
    main()
