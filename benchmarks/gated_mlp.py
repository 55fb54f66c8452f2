"""How fast is a gated MLP? Dense, swapped, with the gate composed of two products, and with both in one kernel.

    python benchmarks/gated_mlp.py                 # a GPU, or the CPU with fewer tokens
    python benchmarks/gated_mlp.py --quick

The gate of a model, `silu(gate(x)) * up(x)`, and its whole MLP, at sparsity 0.9: Llama-2-7B (11008 x 4096, blocks of
128 and 64, 8192 tokens), a language model of half its width, and timm's SwiGLU of a ViT-L (2730 rounded to 2752
features, blocks of 64, 25088 tokens). Candidates for the gate:

    dense           two `nn.Linear`, as a model calls them
    separate        two `BSRLinear`, then the activation and the product
    composed        the activation in the first product's kernel, the second multiplied into it in place
    at once         both products and their product in one plain Triton kernel (CUDA only)

`at once` is timed whether or not `ops/cuda/gated.py` would choose it: that rule rests on
what this prints. Errors are ||out - reference|| / ||reference|| against float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.weights import random_block_sparse
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device
from torchao_superblock import swap_to_bsr
from torchao_superblock.ops import Operands, bsr_gated_linear

# Name, hidden features, features, block size, tokens on a GPU.
CELLS = [
    ("Llama-2-7B", 11008, 4096, 128, 8192),
    ("Llama-2-7B", 11008, 4096, 64, 8192),
    ("half of it", 5504, 2048, 64, 8192),
    ("ViT-L, SwiGLU", 2752, 1024, 64, 25088),
    ("Llama-2-7B", 11008, 4096, 128, 256),
    ("Llama-2-7B", 11008, 4096, 128, 1),
]
SPARSITY = 0.9


class GatedMLP(nn.Module):
    """As transformers' LlamaMLP and timm's SwiGLU have it."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(features, hidden, bias=False)
        self.up_proj = nn.Linear(features, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, features, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def build(features: int, hidden: int, blocksize: int, sparsity: float = SPARSITY) -> GatedMLP:
    """The MLP with random blocks at zero."""
    with torch.device("meta"):
        model = GatedMLP(features, hidden)
    for seed, layer in enumerate(model.children()):
        if isinstance(layer, nn.Linear):
            shape = (layer.out_features, layer.in_features)
            layer.weight = nn.Parameter(
                random_block_sparse(*shape, blocksize, sparsity, seed=seed).dense
            )
    return model.eval()


@torch.no_grad()
def cell(
    name: str,
    hidden: int,
    features: int,
    blocksize: int,
    tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float | None = None,
) -> tuple[dict, dict]:
    """All candidates of one shape, timed in one interleaved run; returns the rows of the gate and of the MLP."""
    dense = build(features, hidden, blocksize).to(device, dtype)
    separate, fused = copy.deepcopy(dense), copy.deepcopy(dense)
    swap_to_bsr(separate, blocksize, min_sparsity=0)
    swap_to_bsr(fused, blocksize, min_sparsity=0, fuse_activations=True)
    x = torch.randn(tokens, features, device=device, dtype=dtype)
    gate, up = (Operands(*layer.operands()) for layer in (separate.gate_proj, separate.up_proj))
    gates = {
        "dense": lambda: F.silu(dense.gate_proj(x)) * dense.up_proj(x),
        "separate": lambda: F.silu(separate.gate_proj(x)) * separate.up_proj(x),
        "composed": lambda: bsr_gated_linear(x, gate, up, "silu", at_once=False),
    }
    if device.type == "cuda":
        gates["at once"] = lambda: bsr_gated_linear(x, gate, up, "silu", at_once=True)
    models = {"dense": dense, "separate": separate, "as swapped": fused}
    whole = {key: (lambda model=model: model(x)) for key, model in models.items()}

    few = x[:64].double()
    g, u = (layer.weight.double() for layer in (dense.gate_proj, dense.up_proj))
    reference = F.silu(few @ g.T) * (few @ u.T)
    rows = []
    for candidates in (gates, whole):
        row = {
            "model": name,
            "shape": f"{hidden} x {features}",
            "block": blocksize,
            "tokens": tokens,
        }
        measured = measure(candidates, device, seconds=seconds)
        for key in candidates:
            row[f"{key} ms"] = measured.milliseconds(key)
            if key != "dense":
                row[f"{key} speedup"] = measured.speedup_value("dense", key)
        if candidates is gates:
            for key in list(gates)[1:]:
                row[f"{key} error"] = relative_error(gates[key]()[:64], reference)
        rows.append(row)
    return tuple(rows)


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    device = pick_device(options)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = Report(
        "gated_mlp",
        "Gated MLPs",
        device,
        directory=options.output_dir,
        label=options.label,
    )
    cells = CELLS[:1] if options.quick else CELLS
    gates, models = [], []
    for name, *sizes, tokens in cells:
        if device.type == "cpu":
            tokens = min(tokens, 128)
        gate, model = cell(name, *sizes, tokens, device=device, dtype=dtype)
        gates.append(gate)
        models.append(model)
    where = f"{str(dtype).removeprefix('torch.')}, sparsity {SPARSITY}"
    report.table(f"The gate: silu(gate(x)) * up(x), {where}", gates)
    report.table(f"The whole MLP, {where}", models)
    print(f"\nwritten to {report.write()}")


if __name__ == "__main__":
    main()
