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

from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import build_plan, hopper

triton = pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_LIMIT = 232448  # bytes of shared memory a program may have
PROGRAM_PAIR_LIMIT = 115712  # when two share a multiprocessor

needs_compiler = pytest.mark.skipif(
    hopper._import_error is not None, reason=str(hopper._import_error)
)
needs_clusters = pytest.mark.skipif(
    not hopper._CLUSTERS, reason="this Triton cannot copy to both programs of a cluster"
)


class Problem(NamedTuple):
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
    def nnz(self) -> int:
        return max(1, round((self.N // self.r) * (self.K // self.c) * self.share))

    def tile(self, clusters: bool = hopper._CLUSTERS) -> hopper.Strips | None:
        """What the rules choose."""
        return hopper.choose(
            *(self.M, self.N // self.r, self.K // self.c, self.r, self.c, self.nnz, self.dtype),
            exact=self.exact,
            activation=self.activation,
            slow_memory=self.slow_memory,
            pairs=clusters,
        )

    def tiles(self) -> list[hopper.Strips]:
        """What tuning tries."""
        rows, columns = self.N // self.r, self.K // self.c
        return hopper.candidates(rows, columns, self.r, self.c, self.dtype, exact=self.exact)

    def shared_bytes(self, tile: hopper.Strips) -> int:
        """Shared memory of a program, as it is counted without compiling."""
        rows, columns = self.N // self.r, self.K // self.c
        return hopper.shared_bytes(tile, rows, columns, self.r, self.c, self.dtype.itemsize)

    def launch(self, tile: hopper.Strips, *, mixed: bool = False) -> hopper.Launch:
        """How it is launched on an H200, with a bias and a plan."""
        call = hopper.Call(
            *(self.M, self.K, self.K, self.N // self.r, self.r, self.c, self.nnz, self.dtype),
            *(self.exact, True, self.activation, True, mixed),
        )
        return hopper.launch(call, tile)

    def __str__(self) -> str:
        names = [f"{self.M}x{self.N}x{self.K}", f"{self.r}x{self.c}", f"{self.share}"]
        names += [NAMES[self.dtype] + "x3" * self.exact, self.activation, "slow" * self.slow_memory]
        return "-".join(name for name in names if name)


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


def grid() -> Iterator[Problem]:
    """Problems from small to large, with few and many blocks, on both kinds of memory."""
    for (M, N, K), (r, c), (dtype, exact), activation, slow, share in itertools.product(
        SHAPES, BLOCKS, KINDS, ("none", "gelu"), (False, True), (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
    ):
        yield Problem(M, N, K, r, c, share, dtype, exact, activation, slow)


def one_for_each_choice() -> dict[hopper.Strips, Problem]:
    """Every tile that the rules choose on the grid, with the first problem that it is chosen for."""
    found: dict[hopper.Strips, Problem] = {}
    for problem in grid():
        tile = problem.tile()
        if tile is not None:
            found.setdefault(tile, problem)
    return found


def shared_limit(tile: hopper.Strips) -> int:
    """Bytes of shared memory that a program of this tile may have."""
    return SHARED_LIMIT if tile.programs == 1 else PROGRAM_PAIR_LIMIT


def compiled(problem: Problem, tile: hopper.Strips, *, mixed: bool = False) -> Any:
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
    reason = hopper.unavailable_reason(torch.cuda.current_device())
    if reason is not None:
        pytest.skip(reason)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def by_epilogue(tiles: list[hopper.Strips]) -> list[hopper.Strips]:
    """One tile for each way in which outputs leave a program."""
    ways = {
        (t.tokens, t.part, t.group, t.y_slots, t.programs, t.copied, t.packed): t for t in tiles
    }
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
    tile: hopper.Strips | None = None,
    mask: Tensor | None = None,
) -> None:
    """Compare a product with float64, and with itself."""
    dense, crow, col, values = random_bsr(N, K, blocksize, sparsity, dtype, "cuda", mask=mask)
    # Rows of a wider tensor, and an output poisoned by what the allocator hands out again.
    x = torch.randn(M, K + 64, device="cuda").to(dtype)[:, :K]
    b = torch.randn(N, device="cuda").to(dtype) if bias else None
    plan = build_plan(crow, col, K // values.shape[2], tuple(values.shape[1:]))
    torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
    y = hopper.forward(x, crow, col, values, b, activation, plan, tile=tile)
    z = x.double() @ dense.double().t() + (0 if b is None else b.double())
    assert y.shape == (M, N) and y.is_contiguous() and y.dtype == dtype
    error = relative_error(y, ACTIVATIONS[activation](z))
    assert error <= bound, error
    again = hopper.forward(x, crow, col, values, b, activation, plan, tile=tile)
    assert torch.equal(y, again), "the same inputs gave other bits"
    ungrouped = hopper.forward(x, crow, col, values, b, activation, None, tile=tile)
    assert torch.equal(y, ungrouped), "the order of the rows changed the sums"
