"""How fast is a ViT's MLP in onnxruntime? Dense, and exported with its blocks.

    python benchmarks/onnx_mlp.py                 # the CPU, onnxruntime's own threads
    python benchmarks/onnx_mlp.py --threads 2 --quick

The MLP of ViT-B/16 (768 -> 3072 -> 768, GELU) for one image of 197 tokens, in float32. Every candidate is an ONNX file
of the same pruned weights: dense as torch exports it, and swapped, with the activation fused. Errors are
||out - reference|| / ||reference|| against float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.weights import random_block_sparse
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device
from torchao_superblock import swap_to_bsr
from torchao_superblock.integrations import onnx

TOKENS, WIDTH, HIDDEN = 197, 768, 3072
CELLS = [(64, 0.9), (64, 0.8), (32, 0.9), (16, 0.9)]


def mlp(blocksize: int, sparsity: float, width: int = WIDTH, hidden: int = HIDDEN) -> nn.Sequential:
    """The MLP with random blocks at zero."""
    model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).eval()
    with torch.no_grad():
        for seed, linear in enumerate((model[0], model[2])):
            shape = (linear.out_features, linear.in_features)
            linear.weight.copy_(random_block_sparse(*shape, blocksize, sparsity, seed=seed).dense)
    return model


def cell(
    blocksize: int, sparsity: float, *, threads: int | None, seconds: float, **sizes: int
) -> dict[str, float | int]:
    """Both files of one block size and sparsity, timed in one interleaved run.

    Returns:
        A row: milliseconds, speedup, file sizes in MB and errors.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    model = mlp(blocksize, sparsity, **sizes)
    x = torch.randn(1, TOKENS, model[0].in_features)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
    row: dict[str, float | int] = {"block": blocksize, "sparsity": sparsity}
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dense", "BSR"):
            path = Path(folder, f"{name}.onnx")
            if name == "BSR":
                swap_to_bsr(model, blocksize, min_sparsity=0, fuse_activations=True)
            shapes = ({0: "batch"},)
            onnx.export(
                model, (x,), path, dynamic_shapes=shapes, verbose=False, external_data=False
            )
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            feeds = {session.get_inputs()[0].name: x.numpy()}
            calls[name] = lambda session=session, feeds=feeds: session.run(None, feeds)
            row[f"{name} MB"] = path.stat().st_size / 1e6
            row[f"{name} error"] = relative_error(torch.from_numpy(calls[name]()[0]), reference)
    measured = measure(calls, seconds=seconds)
    for name in calls:
        row[f"{name} ms"] = measured.milliseconds(name)
    row["speedup"] = measured.speedup_value("dense", "BSR")
    return row


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    device = pick_device(options)
    if device.type != "cpu":
        parser.error("this benchmark is about onnxruntime on the CPU: pass --device cpu")
    import onnxruntime

    report = Report(
        "onnx_mlp",
        "A ViT's MLP in onnxruntime",
        device,
        directory=options.output_dir,
        label=options.label,
    )
    report.fact("onnxruntime", onnxruntime.__version__)
    cells = CELLS[:1] if options.quick else CELLS
    rows = [
        cell(*cell_, threads=options.threads, seconds=2.0 if options.quick else 8.0)
        for cell_ in cells
    ]
    report.table(f"{WIDTH} -> {HIDDEN} -> {WIDTH}, {TOKENS} tokens, float32", rows)
    print(f"\nwritten to {report.write()}")


if __name__ == "__main__":
    main()
