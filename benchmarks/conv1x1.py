"""What do block-sparse 1x1 convolutions gain, and the ResNet-50 around them?

    python benchmarks/conv1x1.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/conv1x1.py --device cpu --quick

The 1x1 convolutions of a ResNet-50 at 224 x 224 pixels, in inference, dense and swapped, with images that are
contiguous and channels-last; all of a cell in one interleaved run. Dense is timed in the memory format of the images.

Sections
    layers      single convolutions
    sparsity    one convolution of each stage, from few zero blocks to many: what the swap's rule rests on
    model       a whole ResNet-50, eager and compiled
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
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

# (in channels, out channels, pixels a side, stride)
SHAPES = [
    (256, 64, 56, 1),
    (64, 256, 56, 1),
    (512, 128, 28, 1),
    (256, 512, 56, 2),
    (1024, 256, 14, 1),
    (256, 1024, 14, 1),
    (2048, 512, 7, 1),
    (512, 2048, 7, 1),
]
STAGES = [(256, 64, 56, 1), (512, 128, 28, 1), (1024, 256, 14, 1), (512, 2048, 7, 1)]
BLOCKS, SPARSITY = (16, 32), 0.9
SPARSITIES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
BATCHES = (1, 32)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PIXELS = 224


def pruned(module: nn.Module, blocksize: int, sparsity: float, device: torch.device) -> nn.Module:
    """A module in eval mode whose 1x1 convolutions have random blocks of zeros; bfloat16 on a GPU."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    with torch.no_grad():
        for seed, conv in enumerate(convs):
            shape = conv.out_channels, conv.in_channels
            blocks = random_block_sparse(*shape, blocksize, sparsity, seed=seed)
            conv.weight.copy_(blocks.dense[:, :, None, None])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return module.to(device, dtype).eval()


def swapped(module: nn.Module, blocksize: int) -> nn.Module:
    """A copy with all 1x1 convolutions swapped, whatever that brings."""
    new = copy.deepcopy(module)
    if not swap_to_bsr(new, blocksize, min_sparsity=0.0).swapped:
        raise RuntimeError("nothing was swapped")
    return new


def compare(
    context: Context, module: nn.Module, x: Tensor, blocksize: int, *, compiled: bool
) -> Iterable[dict[str, Any]]:
    """A row for each memory format."""
    with torch.inference_mode():
        expected = copy.deepcopy(module).double()(x[:1].double())
    for name, memory_format in FORMATS.items():
        dense = copy.deepcopy(module).to(memory_format=memory_format)
        ours = swapped(dense, blocksize)
        images = x.to(memory_format=memory_format)
        calls: dict[str, Callable[[], object]] = {}
        for side, one in (("dense", dense), ("ours", ours)):
            calls[side] = lambda m=one, x=images: m(x)
            if compiled:
                torch.compiler.reset()
                fast = torch.compile(one, dynamic=False)
                calls[f"{side} compiled"] = lambda m=fast, x=images: m(x)
        with torch.inference_mode():
            measured = measure(calls, context.device, seconds=context.seconds * len(calls) / 2)
            error = relative_error(ours(images[:1]), expected)
        best = {
            side: min(measured.milliseconds(call) for call in calls if call.startswith(side))
            for side in ("dense", "ours")
        }
        yield {
            "memory": name,
            **{f"{call} ms": measured.milliseconds(call) for call in calls},
            "eager x": measured.speedup_value("dense", "ours"),
            **({"best of both x": best["dense"] / best["ours"]} if compiled else {}),
            "error": error,
        }


def layer_rows(
    context: Context,
    shapes: Sequence[tuple[int, int, int, int]],
    sparsities: Sequence[float],
    batches: Sequence[int],
) -> list[dict[str, Any]]:
    """Single convolutions: a row for each shape, block size, sparsity, batch and memory format."""
    rows = []
    quick = 1 if context.quick else None
    for K, N, pixels, stride in shapes[:quick]:
        for blocksize in BLOCKS[:quick]:
            for sparsity in sparsities[:quick]:
                conv = nn.Sequential(nn.Conv2d(K, N, 1, stride, bias=False))
                conv = pruned(conv, blocksize, sparsity, context.device)
                for batch in batches[:quick]:
                    x = torch.randn(
                        *(batch, K, pixels, pixels),
                        device=context.device,
                        dtype=conv[0].weight.dtype,
                    )
                    cell = {"in": K, "out": N, "pixels": pixels, "stride": stride}
                    cell |= {"block": blocksize, "sparsity": sparsity, "batch": batch}
                    rows += [
                        cell | row for row in compare(context, conv, x, blocksize, compiled=False)
                    ]
    return rows


def section_layers(context: Context) -> None:
    """Single convolutions."""
    rows = layer_rows(context, SHAPES, [SPARSITY], BATCHES)
    context.report.table("1x1 convolutions of a ResNet-50", rows)


def section_sparsity(context: Context) -> None:
    """From few zero blocks to many."""
    rows = layer_rows(context, STAGES, SPARSITIES, BATCHES)
    context.report.table("1x1 convolutions by sparsity", rows)


def section_model(context: Context) -> None:
    """A whole ResNet-50: its 3x3 convolutions stay dense."""
    from torchvision.models import resnet50

    rows = []
    quick = 1 if context.quick else None
    for blocksize in BLOCKS[:quick]:
        model = pruned(resnet50(), blocksize, SPARSITY, context.device)
        for batch in BATCHES[:quick]:
            dtype = next(model.parameters()).dtype
            x = torch.randn(batch, 3, PIXELS, PIXELS, device=context.device, dtype=dtype)
            cell = {"block": blocksize, "sparsity": SPARSITY, "batch": batch}
            rows += [cell | row for row in compare(context, model, x, blocksize, compiled=True)]
    context.report.table("ResNet-50, all 1x1 convolutions", rows)


SECTIONS: Sections = {
    device: {"layers": section_layers, "sparsity": section_sparsity, "model": section_model}
    for device in ("cuda", "cpu")
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script("conv1x1", "1x1 convolutions", __doc__, SECTIONS, argv)


if __name__ == "__main__":
    main()
