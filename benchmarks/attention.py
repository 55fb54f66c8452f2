"""What does a swapped attention gain as a module, with torch's fused path on the other side?

    python benchmarks/attention.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/attention.py --device cpu --quick

`nn.MultiheadAttention` of a ViT-B/16 in inference, self-attention without weights, and an
`nn.TransformerEncoderLayer` around it, each dense and with both, one or the other of its projections swapped; eager and
compiled, all in one interleaved run. "lost" is what the module loses beside what its layers gain, in units of the time
of a dense out_proj: what the swap's rule must weigh.

Sections
    attention   the module alone
    encoder     an encoder layer whose MLP stays dense
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.weights import random_block_sparse
from torchao_superblock import swap_to_bsr

WIDTH, HEADS, TOKENS = 768, 12, 197
SWAPPED = {
    "both": lambda fqn: True,
    "in_proj": lambda fqn: "in_proj" in fqn,
    "out_proj": lambda fqn: "out_proj" in fqn,
}
# (images, block, sparsity)
CELLS = {
    "cuda": [(256, 64, 0.9), (256, 64, 0.8), (256, 32, 0.9), (8, 64, 0.9)],
    "cpu": [(1, 32, 0.9), (8, 32, 0.9), (8, 16, 0.9)],
}


class Attention(nn.Module):
    """Self-attention, batch first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, E)` -> `(B, L, E)`."""
        return self.attention(x, x, x, need_weights=False)[0]


def pruned(module: nn.Module, blocksize: int, sparsity: float, device: torch.device) -> nn.Module:
    """A module in eval mode with random blocks of its attention at zero; bfloat16 on a GPU."""
    with torch.no_grad():
        for seed, (name, weight) in enumerate(module.named_parameters()):
            if name.endswith(("in_proj_weight", "out_proj.weight")):
                blocks = random_block_sparse(*weight.shape, blocksize, sparsity, seed=seed)
                weight.copy_(blocks.dense)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return module.to(device, dtype).eval()


def swapped(module: nn.Module, choose: Callable[[str], bool]) -> nn.Module:
    """A copy with the chosen projections swapped, whatever that brings."""
    new = copy.deepcopy(module)
    swap_to_bsr(new, min_sparsity=0.5, filter_fn=lambda _, fqn: choose(fqn))
    return new


def run_cell(
    context: Context, build: Callable[[], nn.Module], images: int, blocksize: int, sparsity: float
) -> list[dict[str, Any]]:
    """Dense and swapped modules of one size, eager and compiled: a row for each choice of projections."""
    device = context.device
    dense = pruned(build(), blocksize, sparsity, device)
    modules = {"dense": dense} | {
        name: swapped(dense, choose)
        for name, choose in list(SWAPPED.items())[: 1 if context.quick else None]
    }
    out_proj = next(m for name, m in dense.named_modules() if name.endswith("out_proj"))
    width = out_proj.in_features
    x = torch.randn(images, TOKENS, width, device=device, dtype=out_proj.weight.dtype)
    reference = copy.deepcopy(dense).double()
    with torch.inference_mode():
        expected = reference(x[:1].double())
    calls: dict[str, Callable[[], object]] = {}
    for name, module in modules.items():
        calls[name] = lambda m=module: m(x)
        torch.compiler.reset()
        compiled = torch.compile(module, dynamic=False)
        calls[f"{name} compiled"] = lambda m=compiled: m(x)
    for name, module in modules.items():  # the layers alone, for what is lost beside them
        for fqn, layer in module.named_modules():
            if fqn.endswith("out_proj") and name in ("dense", "both"):
                calls[f"{name} layer"] = lambda m=layer: m(x)
    with torch.inference_mode():
        measured = measure(calls, device, seconds=context.seconds * len(calls) / 2)
    rows = []
    for name, module in list(modules.items())[1:]:
        with torch.inference_mode():
            error = relative_error(module(x[:1]), expected)
        best = min(measured.milliseconds(n) for n in ("dense", "dense compiled"))
        ours = min(measured.milliseconds(n) for n in (name, f"{name} compiled"))
        row = {
            "images": images,
            "block": blocksize,
            "sparsity": sparsity,
            "swapped": name,
            "dense ms": measured.milliseconds("dense"),
            "dense compiled ms": measured.milliseconds("dense compiled"),
            "ours ms": measured.milliseconds(name),
            "ours compiled ms": measured.milliseconds(f"{name} compiled"),
            "eager x": measured.speedup_value("dense", name),
            "best of both x": best / ours,
            "error": error,
        }
        if name == "out_proj":
            unit = measured.milliseconds("dense layer")
            gained = unit - measured.milliseconds("both layer")
            row["lost"] = (row["ours ms"] - row["dense ms"] + gained) / unit
        rows.append(row)
    return rows


def section(context: Context, title: str, build: Callable[[], nn.Module]) -> None:
    """All cells of the device in one table."""
    cells = CELLS[context.device.type][: 1 if context.quick else None]
    rows = [row for cell in cells for row in run_cell(context, build, *cell)]
    columns = dict.fromkeys(name for row in rows for name in row)
    context.report.table(title, [{name: row.get(name) for name in columns} for row in rows])


def section_attention(context: Context) -> None:
    """`nn.MultiheadAttention` alone."""
    title = f"nn.MultiheadAttention({WIDTH}, {HEADS}), {TOKENS} tokens an image"
    section(context, title, lambda: Attention(WIDTH, HEADS))


def section_encoder(context: Context) -> None:
    """`nn.TransformerEncoderLayer`, MLP dense."""
    section(
        context,
        f"nn.TransformerEncoderLayer({WIDTH}, {HEADS}, {4 * WIDTH}, gelu), {TOKENS} tokens an image, MLP dense",
        lambda: nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True
        ),
    )


SECTIONS: Sections = {
    device: {"attention": section_attention, "encoder": section_encoder}
    for device in ("cuda", "cpu")
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script("attention", "Attention as a module", __doc__, SECTIONS, argv)


if __name__ == "__main__":
    main()
