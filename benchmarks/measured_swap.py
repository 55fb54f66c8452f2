"""How long does a swap take that measures, and what does it leave dense?

    python benchmarks/measured_swap.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/measured_swap.py --device cpu --quick

`swap_to_bsr(model, measure=images)` on vision transformers of torchvision with zero blocks in all linear layers of
their encoders. The time is that of the whole call: it runs the model, makes every candidate, times each of another
shape, density and number of tokens, and swaps what wins. Slower parts stay dense, each with both times in the report.

Sections
    swap    a row for each model
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.error import relative_error
from benchmarks.model.masks import zero_blocks_of
from benchmarks.model.vit import SCOPES, build_vit
from torchao_superblock import swap_to_bsr

LARGE = {"num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096}
# Name, what it has other than vit_b_16, images, block.
MODELS: dict[str, list[tuple[str, dict[str, int], int, int]]] = {
    "cuda": [("vit_b_16", {}, 64, 64), ("vit_l_16", LARGE, 64, 64), ("vit_l_16", LARGE, 1, 64)],
    "cpu": [("vit_b_16", {}, 1, 32)],
}
SPARSITY = 0.9


def run_model(
    context: Context, name: str, settings: dict[str, int], images: int, blocksize: int
) -> dict[str, Any]:
    """The swap of one model, as a row."""
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_vit(**settings).to(device, dtype)
    zero_blocks_of(model, SCOPES["all"], blocksize, SPARSITY)
    x = torch.randn(images, 3, model.image_size, model.image_size, device=device, dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        start = time.perf_counter()
        report = swap_to_bsr(model, measure=x, fuse_activations=True, drop_dead_features=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        error = relative_error(model(x), expected)
    return {
        "model": name,
        "images": images,
        "block": blocksize,
        "seconds": seconds,
        "swapped": len(report.swapped),
        "slower": sum(entry.code == "slower_than_dense" for entry in report.skipped),
        "error": error,
    }


def section_swap(context: Context) -> None:
    """A row for each model."""
    models = MODELS[context.device.type][: 1 if context.quick else None]
    rows = [run_model(context, *model) for model in models]
    context.report.table(f"Measured swaps at sparsity {SPARSITY}", rows)


SECTIONS: Sections = {device: {"swap": section_swap} for device in ("cuda", "cpu")}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script("measured_swap", "Measured swaps", __doc__, SECTIONS, argv)


if __name__ == "__main__":
    main()
