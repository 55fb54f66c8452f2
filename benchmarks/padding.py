"""What does it cost that the last blocks of a weight are padded?

    python benchmarks/padding.py                    # CUDA if there is a GPU, else the CPU
    python benchmarks/padding.py --device cpu --quick

Four layers whose features are no multiple of the block size, at sparsity 0.9: a head of 1000 classes, 37 x 53, GPT-2's
vocabulary and the up and down projections of an MLP with 2730 hidden features. Candidates, with the same stored blocks:

    dense           `F.linear` with the weight as it is
    rounded up      the op with a weight and an input of whole blocks: what one would have to build without padding
    padded          the op with the real features

`padded x` is the time of `padded` in units of `rounded up`. Errors are ||out - reference|| / ||reference|| against
float64.

Sections
    forward     the product with its bias
    step        forward and all three gradients
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.layer.runs import Context
from benchmarks.layer.script import Sections, run_script
from benchmarks.measure.error import relative_error
from benchmarks.measure.interleaved import measure
from benchmarks.measure.weights import random_block_sparse
from torchao_superblock.ops import bsr_linear, build_plan

# Out features, in features, block size.
SHAPES = [
    (1000, 768, 32),
    (1000, 768, 64),
    (37, 53, 16),
    (37, 53, 32),
    (50257, 64, 64),
    (2730, 1024, 64),
    (1024, 2730, 64),
]
SPARSITY = 0.9
TOKENS = {"cuda": (1, 64, 8192, 50432), "cpu": (1, 32, 512)}
MOST_OUTPUTS = {"cuda": 1 << 29, "cpu": 1 << 24}


def candidates(
    N: int, K: int, blocksize: int, tokens: int, device: torch.device, *, train: bool
) -> tuple[dict[str, Callable[[], object]], float]:
    """What is timed for a layer, and the error of the padded one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = [-(-size // blocksize) * blocksize for size in (N, K)]
    weight = random_block_sparse(*whole, blocksize, SPARSITY, dtype=dtype, device=device)
    plan = build_plan(weight.crow, weight.col, whole[1] // blocksize, (blocksize, blocksize))
    dense = weight.dense[:N, :K].contiguous()

    def operands(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(
            torch.randn(*shape, device=device).to(dtype)
            for shape in ((tokens, k), (n,), (tokens, n))
        )

    def sparse(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        n = len(bias)
        return bsr_linear(x, weight.crow, weight.col, values, bias, n, "none", plan)

    def call(
        function: Callable[[Tensor, Tensor, Tensor], Tensor], n: int, k: int, stored: Tensor
    ) -> Callable[[], object]:
        x, bias, grad = operands(n, k)
        inputs = [tensor.clone().requires_grad_(train) for tensor in (x, stored, bias)]
        if not train:
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    calls = {
        "dense": call(F.linear, N, K, dense),
        "rounded up": call(sparse, *whole, weight.values),
        "padded": call(sparse, N, K, weight.values),
    }
    x, bias, _ = operands(N, K)
    few = x[:64]
    reference = F.linear(few.double(), dense.double(), bias.double())
    return calls, relative_error(sparse(few, weight.values, bias), reference)


def rows(context: Context, *, train: bool) -> list[dict[str, Any]]:
    """A row for each shape and number of tokens."""
    found = []
    kind = context.device.type
    for N, K, blocksize in SHAPES[: 1 if context.quick else None]:
        for tokens in TOKENS[kind][: 1 if context.quick else None]:
            if tokens * N > MOST_OUTPUTS[kind]:
                continue
            calls, error = candidates(N, K, blocksize, tokens, context.device, train=train)
            with torch.set_grad_enabled(train):
                measured = measure(
                    calls,
                    context.device,
                    seconds=2 * context.seconds,
                    min_rounds=context.min_rounds,
                )
            found.append(
                {
                    "N x K": f"{N} x {K}",
                    "block": blocksize,
                    "tokens": tokens,
                    **{f"{name} ms": measured.milliseconds(name) for name in calls},
                    "over dense x": measured.speedup_value("dense", "padded"),
                    "padded x": measured.speedup_value("padded", "rounded up"),
                    "error": error,
                }
            )
    return found


def section_forward(context: Context) -> None:
    """The product with its bias."""
    context.report.table(f"Forward, sparsity {SPARSITY}", rows(context, train=False))


def section_step(context: Context) -> None:
    """Forward and all three gradients."""
    context.report.table(f"Forward and backward, sparsity {SPARSITY}", rows(context, train=True))


SECTIONS: Sections = {
    device: {"forward": section_forward, "step": section_step} for device in ("cuda", "cpu")
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark and returns the path of the Markdown report."""
    return run_script("padding", "Padded blocks", __doc__, SECTIONS, argv)


if __name__ == "__main__":
    main()
