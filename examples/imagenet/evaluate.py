"""Evaluate a checkpoint as it was trained, squashed, and swapped: accuracy, loss, speed, size.

    python evaluate.py output/imagenet                              # best.pth of that folder, else last.pth
    python evaluate.py best.pth --data-path imagenet --swap measured
    python evaluate.py vit_b_16_0.9_32.pth --superblock --model vit_b_16 --data-path imagenet
    python evaluate.py output/imagenet --profile trace.json --export weights/

Model, sizes and data are those that the checkpoint was trained with, unless the command line says otherwise. Of a
checkpoint with an average, the average is what is evaluated.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recipe import arguments, checkpoint, data, models, sparsity
from recipe.parallel import World
from recipe.testing import autocast, test
from torch import nn

from torchao_superblock import backends, save_bsr, squash, swap_to_bsr
from torchao_superblock.integrations.superblock import load_superblock_checkpoint


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and what is left for those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="any option of train.py: changes what the checkpoint was trained with, such as --data-path",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a file, or the output folder of train.py")
    add("--no-ema", action="store_true", help="the model itself, where there is an average too")
    add(
        "--superblock",
        nargs="?",
        const="model",
        choices=("model", "model_ema"),
        help="it is a file of the superblock project or of torchao; the part of it to load",
    )
    add("--sparsity", type=float, help="of --superblock, where the file does not say")
    add("--blocksize", type=int, help="of --superblock, where the file does not say")
    add("--swap", choices=("measured", "table", "all"), default="measured", help="which layers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    add("--seconds", type=float, default=3.0, help="of timing, for all models (%(default)s)")
    add("--profile", type=Path, metavar="JSON", help="write a trace of the swapped model")
    add("--export", type=Path, metavar="FOLDER", help="write weights named by their hash")
    return parser.parse_known_args(argv)


def options_of(trained: dict[str, Any], changes: list[str]) -> argparse.Namespace:
    """The options of a training as saved, and as the command line changes them."""
    if trained.get("data_path") is not None:
        trained = {**trained, "data_path": Path(trained["data_path"])}
    weights = {"weights": None, "weights_path": None}  # what they held is in the checkpoint
    return arguments.parse(changes, argparse.Namespace(**{**trained, **weights}))


def load(
    given: argparse.Namespace, changes: list[str], path: Path
) -> tuple[nn.Module, data.Images, argparse.Namespace, dict[str, Any]]:
    """The model as it was trained, with its masks, the images to test it on, the options, and the plan of the masks.

    Raises:
        SystemExit: for a file or a folder of images that will not do.
    """
    if given.superblock:
        args = options_of({}, changes)
        images = data.load(args)
        model = models.build(args, len(images.classes))
        ema = given.superblock == "model_ema"
        try:
            load_superblock_checkpoint(
                model, path, given.sparsity, given.blocksize, ema=ema, as_masks=True
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise SystemExit(str(error)) from error
        return model, images, args, {"sparsifier": "supermask"}
    saved = checkpoint.read(path)
    args = options_of(saved["options"], changes)
    images = data.load(args)
    model = models.build(args, len(images.classes))
    sparsifier = sparsity.build(saved["plan"])
    if sparsifier is not None:
        sparsity.prepare(sparsifier, model, saved["plan"])
    checkpoint.check_model(model, saved["model"], path)
    average = "model_ema" in saved and not given.no_ema
    model.load_state_dict(saved["model_ema" if average else "model"])
    return model, images, args, saved["plan"]


def swap(model: nn.Module, how: str, example: torch.Tensor) -> Any:
    """Swaps what is faster: as timed here, as the table of break-even points says, or whatever has zeros."""
    options: dict[str, Any] = {"fuse_activations": True, "drop_dead_features": True}
    if how == "all":
        return swap_to_bsr(model, min_sparsity=0.01, **options)
    if how == "measured":
        options["measure"] = example
    return swap_to_bsr(model, **options)


@torch.no_grad()
def latencies(
    candidates: dict[str, nn.Module], x: torch.Tensor, amp: str | None, seconds: float
) -> dict[str, float]:
    """Median seconds of a forward, in turns, so that a noisy machine is fair."""

    def once(model: nn.Module) -> float:
        _wait(x)
        start = time.perf_counter()
        with autocast(amp, x.device):
            model(x)
        _wait(x)
        return time.perf_counter() - start

    for model in candidates.values():
        once(model.eval())
        once(model)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, model in candidates.items():
            times[name].append(once(model))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def megabytes(model: nn.Module) -> float:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20


@torch.no_grad()
def profile(model: nn.Module, x: torch.Tensor, amp: str | None, path: Path) -> None:
    """Writes a trace of three forwards that chrome://tracing and Perfetto open."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if x.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profiler, autocast(amp, x.device):
        for _ in range(3):
            model(x)
        _wait(x)
    profiler.export_chrome_trace(str(path))


def export(squashed: nn.Module, swapped: nn.Module, name: str, folder: Path) -> list[Path]:
    """Weights only: `NAME-HASH.pth`, dense with blocks of zeros, and `NAME-HASH.bsr.safetensors`, blocks alone."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in squashed.state_dict().items()}, buffer)
    stem = f"{name}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}"
    path = folder / f"{stem}.pth"
    draft = folder / f".{stem}.draft"
    draft.write_bytes(buffer.getvalue())
    draft.replace(path)
    blocks = folder / f"{stem}.bsr.safetensors"
    save_bsr(swapped, str(blocks))
    return [path, blocks]


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Evaluates, prints a table, and returns it: accuracy, loss, images/s and size of each model."""
    given, changes = parse(argv)
    path = given.checkpoint
    if path.is_dir():
        found = [path / name for name in (checkpoint.BEST, checkpoint.LAST)]
        path = next((one for one in found if one.exists()), found[0])
    model, images, args, plan = load(given, changes, path)
    world = World(0, 1, torch.device(given.device), False)
    model.to(world.device).eval()
    loader = data.val_loader(images, args, 0, 1, world.device.type == "cuda")
    example = next(iter(loader))[0].to(world.device)

    candidates = {"trained": model, "squashed": copy.deepcopy(model)}
    if plan["sparsifier"] != "none":
        squash(candidates["squashed"])
    candidates["swapped"] = copy.deepcopy(candidates["squashed"])
    report = swap(candidates["swapped"], given.swap, example)
    print(report)
    seconds = latencies(candidates, example, args.amp, given.seconds)
    results = {}
    print(
        f"\n{path}, {len(images.val)} images, batch {len(example)}, {world.device}; kernels: "  # type: ignore[arg-type]
        f"{backends()[world.device.type]['name']}"
    )
    print(f"{'':10}{'top-1':>9}{'top-5':>9}{'loss':>9}{'images/s':>11}{'ms':>9}{'MiB':>9}")
    for name, candidate in candidates.items():
        tested = test(candidate, loader, world, args.amp)
        tested |= {"images_per_second": len(example) / seconds[name], "mib": megabytes(candidate)}
        print(
            f"{name:10}{tested['acc1']:8.2f}%{tested['acc5']:8.2f}%{tested['loss']:9.4f}"
            f"{tested['images_per_second']:11.1f}{1000 * seconds[name]:9.2f}{tested['mib']:9.1f}"
        )
        results[name] = tested
    if given.profile is not None:
        profile(candidates["swapped"], example, args.amp, given.profile)
        print(f"trace: {given.profile}")
    if given.export is not None:
        for one in export(candidates["squashed"], candidates["swapped"], args.model, given.export):
            print(f"weights: {one}")
    return results


if __name__ == "__main__":
    main()
