"""What the tests of the Gluon kernel share: problems, compiling without a GPU, and checks on one.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size.
"""

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.cuda.common import H100, H200
from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import build_plan
from torchao_superblock.ops.cuda import choose
from torchao_superblock.ops.cuda.problem import NATIVE, TF32, TF32X3, Problem
from torchao_superblock.ops.cuda.tiles import HopperTile
from torchao_superblock.ops.plan import plan_length

pytest.importorskip("triton", reason="Triton is not installed here")

import triton

from torchao_superblock.ops.cuda import backend
from torchao_superblock.ops.cuda.device import device_at

# It rests on an experimental part of Triton, which may fail in any way.
hopper = pytest.importorskip("torchao_superblock.ops.cuda.hopper", exc_type=Exception)

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_LIMIT = 232448  # bytes of shared memory a program may have
PROGRAM_PAIR_LIMIT = 115712  # when two share a multiprocessor

needs_clusters = pytest.mark.skipif(
    not hopper.kernels.CLUSTERS, reason="this Triton cannot copy to both programs of a cluster"
)


class Product(NamedTuple):
    """A product, and what the choice of a tile depends on besides."""

    M: int
    N: int
    K: int
    r: int
    c: int
    share: float = 0.2  # of the blocks that are stored
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    activation: str = "none"
    slow_memory: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.N // self.r), -(-self.K // self.c)

    @property
    def nnz(self) -> int:
        return max(1, round(self.grid[0] * self.grid[1] * self.share))

    def asked(self, clusters: bool = hopper.kernels.CLUSTERS) -> Problem:
        """What a call with a bias asks of a card with an H200's memory, or an H100's."""
        device = (H100 if self.slow_memory else H200)._replace(clusters=clusters, overlaps=False)
        precision = NATIVE
        if self.dtype == torch.float32:
            precision = TF32X3 if self.exact else TF32
        R, C = self.grid
        return Problem(
            *("forward", self.M, R, C, self.r, self.c, self.nnz),
            *(self.dtype, precision, (self.K, 1), (True, True), device, self.activation, True),
            row_padding=R * self.r - self.N,
            col_padding=C * self.c - self.K,
        )

    def tile(self, clusters: bool = hopper.kernels.CLUSTERS) -> HopperTile | None:
        """What the rules choose."""
        return choose.hopper_tile(self.asked(clusters))

    def tiles(self) -> list[HopperTile]:
        """What tuning tries."""
        return choose.hopper_candidates(self.asked())

    def shared_bytes(self, tile: HopperTile) -> int:
        """Shared memory of a program, as it is counted without compiling."""
        stages = tile.stages(*self.grid, self.c, self.dtype.itemsize, self.exact)
        assert stages is not None
        return stages.shared_bytes

    def launch(self, tile: HopperTile, *, mixed: bool = False) -> hopper.Launch:
        """How it is launched, with a plan."""
        return hopper.launch(with_plan(self.asked(), mixed), tile)

    def __str__(self) -> str:
        names = [f"{self.M}x{self.N}x{self.K}", f"{self.r}x{self.c}", f"{self.share}"]
        names += [NAMES[self.dtype] + "x3" * self.exact, self.activation, "slow" * self.slow_memory]
        return "-".join(name for name in names if name)


def with_plan(asked: Problem, mixed: bool = False) -> Problem:
    """The same call with a plan."""
    entries = plan_length(asked.R, asked.C, asked.nnz) + mixed
    return asked._replace(plan_entries=entries)


def candidates(
    R: int, C: int, r: int, c: int, dtype: torch.dtype, *, exact: bool = False
) -> list[HopperTile]:
    """What tuning tries for a block grid."""
    return Product(2048, R * r, C * c, r, c, dtype=dtype, exact=exact).tiles()


def forward(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
    out_features: int | None = None,
    *,
    tile: HopperTile | None = None,
) -> Tensor:
    """The Gluon kernel, also where another would be chosen."""
    asked = backend.forward_problem(x, crow, values, bias, activation, plan, out_features)
    asked = asked._replace(M=x.shape[0])
    choice = choose.Choice("hopper", tile or choose.hopper_tile(asked))
    shape = (x.shape[0], asked.N)
    return backend.run(asked, choice, x, crow, col, values, bias, plan, shape)


# Layers of ViT-B, ViT-L, ViT-G, Llama of 8, 13 and 70 billion parameters.
SHAPES = [
    *((50432, 3072, 768), (50432, 768, 3072), (25216, 4096, 1024), (25216, 1024, 4096)),
    *((25216, 1536, 6144), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 5120, 13824)),
    (8192, 8192, 28672),
]
BLOCKS = [
    *((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (64, 32), (128, 32)),
    *((32, 16), (32, 64), (16, 64), (16, 32)),
]
KINDS = [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]


def grid() -> Iterator[Product]:
    """Problems from small to large, with few and many blocks, on both kinds of memory."""
    for (M, N, K), (r, c), (dtype, exact), activation, slow, share in itertools.product(
        SHAPES, BLOCKS, KINDS, ("none", "gelu"), (False, True), (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
    ):
        yield Product(M, N, K, r, c, share, dtype, exact, activation, slow)


def one_for_each_choice() -> dict[HopperTile, Product]:
    """Every tile that the rules choose on the grid, with the first problem that it is chosen for."""
    found: dict[HopperTile, Product] = {}
    for problem in grid():
        tile = problem.tile()
        if tile is not None:
            found.setdefault(tile, problem)
    return found


def shared_limit(tile: HopperTile) -> int:
    """Bytes of shared memory that a program of this tile may have."""
    return SHARED_LIMIT if tile.programs == 1 else PROGRAM_PAIR_LIMIT


def compiled(problem: Product, tile: HopperTile, *, mixed: bool = False) -> Any:
    """The kernel as it would be launched, compiled for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    launch = problem.launch(tile, mixed=mixed)
    name = NAMES[problem.dtype]
    signature = {
        argument: f"tensordesc<{name}{box},{layout!r}>"
        for argument, (_shape, _strides, box, layout) in zip(
            ("x_desc", "w_desc", "y_desc"), launch.descriptors, strict=True
        )
    }
    pointers = {"w_ptr": f"*{name}", "bias_ptr": f"*{name}", "crow_ptr": "*i32", "col_ptr": "*i32"}
    pointers |= {"order_ptr": "*i32", "counter_ptr": "*i32"}
    numbers = ("tiles", "halves", "groups", "turn", "rows", "columns", "nnz")
    ones = {
        number: 1
        for number, value in zip(numbers, launch.numbers, strict=True)
        if number in ("halves", "turn") and value == 1
    }
    constants = launch.constants | ones
    signature |= pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {(list(signature).index(p),): [["tt.divisibility", 16]] for p in pointers}
    source = GluonASTSource(hopper.kernels.bsr_linear_strips, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


def spilled(kernel: Any, tmp_path: Path) -> int:
    """Bytes of local memory a thread needs: what did not fit in registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    usage = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, timeout=60
    )
    _before, found, stack = usage.stdout.partition("STACK:")
    assert found, usage.stdout + usage.stderr
    return int(stack.split()[0])


def arithmetic(function: Any, gl: dict[str, Callable], **helpers: Callable) -> Callable:
    """A kernel's function as one of Python's, with `gl` and its helpers for other than a kernel's values."""
    return FunctionType(function.fn.__code__, {"gl": SimpleNamespace(**gl), **helpers})


# ---------------------------------------------------------------------------------------------------------------------
# On a Hopper GPU.


def hopper_or_skip() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not device_at(torch.cuda.current_device()).gluon:
        pytest.skip("the Gluon kernel needs a Hopper GPU (sm_90)")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def by_epilogue(tiles: list[HopperTile]) -> list[HopperTile]:
    """One tile for each way in which outputs leave a program."""
    ways = {(t.tokens, t.parts, t.strips, t.y_stages, t.programs, t.load): t for t in tiles}
    return list(ways.values())


def check(
    M: int,
    N: int,
    K: int,
    blocksize: int | tuple[int, int],
    dtype: torch.dtype,
    bound: float,
    *,
    sparsity: float = 0.8,
    activation: str = "none",
    bias: bool = True,
    tile: HopperTile | None = None,
    mask: Tensor | None = None,
) -> None:
    """Compare a product with float64, and with itself. N and K need not be made of whole blocks."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    R, C = -(-N // r), -(-K // c)
    dense, crow, col, values = random_bsr(
        R * r, C * c, blocksize, sparsity, dtype, "cuda", mask=mask
    )
    dense = dense[:N, :K]  # what the last blocks hold besides must not count
    # Rows of a wider tensor and a bias with NaN around them, and an output poisoned by what the allocator hands out
    # again.
    x = torch.full((M + 1, K + 64), float("nan"), device="cuda", dtype=dtype)[:M, :K]
    x.copy_(torch.randn(M, K, device="cuda"))
    around = torch.full((N + 128,), float("nan"), device="cuda", dtype=dtype)
    b = around[:N].copy_(torch.randn(N, device="cuda")) if bias else None
    plan = build_plan(crow, col, C, (r, c))
    torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
    y = forward(x, crow, col, values, b, activation, plan, N, tile=tile)
    z = x.double() @ dense.double().t() + (0 if b is None else b.double())
    assert y.shape == (M, N) and y.is_contiguous() and y.dtype == dtype
    error = relative_error(y, ACTIVATIONS[activation](z))
    assert error <= bound, error
    again = forward(x, crow, col, values, b, activation, plan, N, tile=tile)
    assert torch.equal(y, again), "the same inputs gave other bits"
    ungrouped = forward(x, crow, col, values, b, activation, None, N, tile=tile)
    assert torch.equal(y, ungrouped), "the order of the rows changed the sums"
