"""Float64 references and random block-sparse problems shared by the tests.

Legend: N out features, K in features, R x C the block grid, r x c the block size.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def block_mask(R: int, C: int, sparsity: float, generator: torch.Generator | None = None) -> Tensor:
    """A random boolean `(R, C)` mask that keeps `max(1, round(R * C * (1 - sparsity)))` blocks."""
    n_blocks = R * C
    n_kept = max(1, round(n_blocks * (1 - sparsity)))
    mask = torch.zeros(n_blocks, dtype=torch.bool)
    mask[torch.randperm(n_blocks, generator=generator)[:n_kept]] = True
    return mask.view(R, C)


def expand_mask(mask: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """The element mask `(R * r, C * c)` of a block mask."""
    return mask.repeat_interleave(blocksize[0], 0).repeat_interleave(blocksize[1], 1)


def random_bsr(
    N: int,
    K: int,
    blocksize: int | tuple[int, int],
    sparsity: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random block-sparse weight as `(dense, crow_indices, col_indices, values)`.

    `mask` (`(R, C)` bool) overrides `sparsity`; an all-False mask gives `nnz = 0`.
    """
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    R, C = N // r, K // c
    assert (R * r, C * c) == (N, K), "random_bsr makes whole blocks only"
    generator = torch.Generator().manual_seed(seed)
    if mask is None:
        mask = block_mask(R, C, sparsity, generator)
    dense = torch.randn(N, K, generator=generator, dtype=torch.float64) / max(1.0, K**0.5)
    dense = (dense * expand_mask(mask, (r, c))).to(dtype)
    blocks = dense.view(R, r, C, c).transpose(1, 2)
    values = blocks[mask].contiguous()
    crow = torch.zeros(R + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.int32)
    return dense.to(device), crow.to(device), col.to(device), values.to(device)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """`||out - ref|| / ||ref||` in float64; plain `||out||` where the reference is zero."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, (out.shape, ref.shape)
    norm = ref.norm().item()
    error = (out - ref).norm().item()
    return error / norm if norm > 0 else error


# Largest relative error that rounding explains, for results accumulated in at least float32.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


# Where formulas of activations overflow, cancel or meet 0 * infinity.
EXTREMES = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, -1e20, 1e13, -1e13, 100.0]
EXTREMES += [-100.0, -90.0, -88.7, -87.4, -87.3, -30.0, -14.0, 1e-30, -1e-30, 0.0, -0.0]


def assert_replays(function: Callable[[], Tensor], expected: Tensor) -> None:
    """Captured in a CUDA graph, `function` returns `expected` at every replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function()
    for _ in range(5):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
