"""The Gluon kernel: compiled for sm_90 everywhere, its numerics on a Hopper GPU.

Compiling needs no GPU, so what a GPU would refuse (too much shared memory, spilled registers, a product that is not on
the tensor cores) fails here first.
"""

import math
import os
import re
import subprocess

import pytest
import torch

from tests.ops.cuda.common import H200, problem
from tests.reference import EXTREMES, assert_replays, block_mask, random_bsr, relative_error
from torchao_superblock.ops import build_plan, direct
from torchao_superblock.ops.cuda import backend, choose, tiles
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.device import device_at, gluon_problem
from torchao_superblock.ops.cuda.problem import NATIVE, TF32, TF32X3
from torchao_superblock.ops.plan import is_mixed

triton = pytest.importorskip("triton", reason="needs Triton")
gluon = pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
hopper = pytest.importorskip(
    "torchao_superblock.ops.cuda.hopper", reason=str(gluon_problem()), exc_type=Exception
)
kernels = hopper.kernels

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_LIMIT = 232448  # bytes of shared memory a program may have
PROGRAM_PAIR_LIMIT = 115712  # when two share a multiprocessor

needs_clusters = pytest.mark.skipif(
    not kernels.CLUSTERS, reason="this Triton cannot copy to both programs of a cluster"
)


def _compile(
    tile,
    rows,
    columns,
    r,
    c,
    dtype=torch.bfloat16,
    exact=False,
    order=True,
    activation="none",
    bias=True,
    turn=1,
    mixed=False,
):
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    bytes_ = dtype.itemsize
    name = NAMES[dtype]
    constants = hopper.constants(tile, rows, columns, r, c, bytes_, exact, order, bias, activation)
    signature = {}
    boxes = hopper.boxes(tile, r, c, bytes_, mixed)
    layouts = hopper.layouts(tile, r, c, bytes_, mixed)
    for argument, box, layout in zip(("x_desc", "w_desc", "y_desc"), boxes, layouts, strict=True):
        signature[argument] = f"tensordesc<{name}{box},{layout!r}>"
    pointers = {"w_ptr": f"*{name}", "bias_ptr": f"*{name}", "crow_ptr": "*i32", "col_ptr": "*i32"}
    pointers |= {"order_ptr": "*i32", "counter_ptr": "*i32"}
    signature |= pointers
    # As specialized for ones; None is any other number.
    if turn == 1 and tile.schedule == "static":
        constants["turn"] = 1
    if not tile.halves:
        constants["halves"] = 1
    numbers = ("tiles", "halves", "groups", "turn", "rows", "columns", "nnz")
    signature |= dict.fromkeys(numbers, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(list(signature).index(p),): [["tt.divisibility", 16]] for p in pointers}
    source = GluonASTSource(kernels.bsr_linear_strips, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=hopper.options(tile))


def _spilled(kernel, tmp_path) -> int:
    """Bytes of local memory a thread needs: what did not fit in registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    usage = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, timeout=60
    )
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found, usage.stdout + usage.stderr
    return int(found.group(1))


def _problem(M, N, K, r, c, density, dtype=torch.bfloat16, *, exact=False, **kwargs):
    device = H200._replace(clusters=kwargs.pop("pairs", False))
    if kwargs.pop("slow_memory", False):
        device = device._replace(memory_rate=3352)
    precision = (TF32X3 if exact else TF32) if dtype == torch.float32 else NATIVE
    asked = problem(M, N, K, (r, c), density, dtype, precision=precision, device=device, **kwargs)
    return choose.hopper_tile(asked), asked.R, asked.C, r, c


def candidates(rows, columns, r, c, dtype, *, exact=False):
    precision = (TF32X3 if exact else TF32) if dtype == torch.float32 else NATIVE
    N, K = rows * r, columns * c
    device = H200._replace(clusters=kernels.CLUSTERS)
    return choose.hopper_candidates(
        problem(2048, N, K, (r, c), 1, dtype, precision=precision, device=device)
    )


def shared_bytes(tile, rows, columns, r, c, bytes_):
    return tile.stages(rows, columns, c, bytes_, tile.strips == 1).shared_bytes


def forward(x, crow, col, values, bias, activation, plan, *, tile=None):
    """The Gluon kernel, also where another would be chosen."""
    asked = backend.forward_problem(x, crow, values, bias, activation, plan)
    asked = asked._replace(M=x.shape[0])
    choice = Choice("hopper", tile or choose.hopper_tile(asked))
    shape = (x.shape[0], asked.R * asked.r)
    return backend.run(asked, choice, x, crow, col, values, bias, plan, shape)


TILES = {
    "THREE_STRIPS": tiles.THREE,
    "THREE_STRIPS_DYNAMIC": tiles.THREE.dynamic(),
    "THREE_STRIPS_HALVES": tiles.THREE_HALVES,
    "TWO_STRIPS": tiles.TWO,
    "TWO_STRIPS_DYNAMIC": tiles.TWO_DYNAMIC,
    "TWO_DRAWN": tiles.TWO_GROUPED.dynamic(),
    "TWO_PROGRAMS": tiles.TWO_PROGRAMS,
    "TWO_PROGRAMS_DYNAMIC": tiles.TWO_PROGRAMS.dynamic(),
    "SHORT_TILES": tiles.SHORT_THREE,
    "TWO_SHORT": tiles.SHORT_TWO,
    "TWO_SHORT_DYNAMIC": tiles.SHORT_TWO.dynamic(),
    "PAIRS": tiles.CLUSTER_THREE,
    "PAIRS_TALL": tiles.CLUSTER_TWO,
    "STACKED": tiles.THREE,
    "COPIED_16": tiles.COPIED,
    "COPIED_16_LONG": tiles.COPIED,
    "COPIED_32": tiles.COPIED,
    "COPIED_32_DYNAMIC": tiles.COPIED.dynamic(),
    "COPIED_32_SHORT": tiles.COPIED_SHORT,
    "PACKED": tiles.FLAT_THREE,
    "PACKED_TWO": tiles.FLAT_TWO,
    "PACKED_TWO_DRAWN": tiles.FLAT_TWO._replace(grouped=True).dynamic(),
    "PACKED_SHORT": tiles.FLAT_SHORT,
    "TF32": tiles.SHORT_TWO,
    "TF32_DYNAMIC": tiles.SHORT_TWO.dynamic(),
    "TF32_DRAWN": tiles.SHORT_TWO._replace(grouped=True).dynamic(),
    "TF32_THREE": tiles.TF32_THREE,
    "TF32_THREE_DYNAMIC": tiles.TF32_THREE.dynamic(),
    "EXACT": tiles.TF32X3_ONE,
}


# One problem for each rule of the table, named after its tile; the last number bounds the spilled bytes.
RULES = {
    "THREE_STRIPS": (_problem(50432, 3072, 768, 64, 64, 0.3), {}, 0),
    "THREE_STRIPS_DYNAMIC": (_problem(8192, 14336, 4096, 64, 64, 0.1), {}, 0),
    "THREE_STRIPS_HALVES": (_problem(8192, 4096, 14336, 64, 64, 0.1), {}, 0),
    "TWO_STRIPS": (_problem(50432, 768, 3072, 128, 128, 0.3), {}, 0),
    "TWO_STRIPS_DYNAMIC": (_problem(8192, 14336, 14336, 128, 128, 0.1), {}, 0),
    "TWO_DRAWN": (_problem(8192, 5120, 13824, 64, 64, 0.1), {}, 0),
    "TWO_PROGRAMS": (
        _problem(50432, 3072, 768, 64, 64, 0.1, activation="gelu"),
        {"activation": "gelu"},
        0,
    ),
    "SHORT_TILES": (_problem(50432, 3072, 768, 64, 64, 0.1), {}, 0),
    "TWO_SHORT": (_problem(50432, 3072, 768, 64, 64, 0.2, slow_memory=True), {}, 0),
    "TWO_SHORT_DYNAMIC": (_problem(50432, 3072, 768, 64, 64, 0.1, slow_memory=True), {}, 0),
    "TWO_PROGRAMS_DYNAMIC": (
        _problem(50432, 1280, 768, 64, 64, 0.14, activation="gelu", slow_memory=True),
        {"activation": "gelu"},
        0,
    ),
    "STACKED": (_problem(50432, 3072, 768, 32, 16, 0.1), {}, 64),
    "COPIED_16": (_problem(50432, 3072, 768, 16, 16, 0.1), {}, 64),
    "COPIED_16_LONG": (_problem(50432, 1536, 6144, 16, 16, 0.1), {}, 64),
    "COPIED_32": (_problem(50432, 768, 3072, 32, 32, 0.1), {}, 64),
    "COPIED_32_DYNAMIC": (_problem(8192, 4096, 14336, 32, 32, 0.1), {}, 64),
    "COPIED_32_SHORT": (_problem(50432, 3072, 768, 32, 32, 0.05, slow_memory=True), {}, 64),
    "PACKED": (_problem(50432, 3072, 768, 64, 16, 0.1), {}, 64),
    "PACKED_TWO": (_problem(50432, 8192, 4096, 16, 16, 0.1), {}, 128),
    "PACKED_TWO_DRAWN": (_problem(8192, 5120, 13824, 32, 32, 0.1), {}, 128),
    "PACKED_SHORT": (_problem(50432, 3072, 768, 128, 32, 0.1, slow_memory=True), {}, 64),
    "TF32": (_problem(50432, 3072, 768, 64, 64, 0.1, torch.float32), {"dtype": torch.float32}, 0),
    "TF32_DYNAMIC": (
        _problem(50432, 3072, 768, 64, 64, 0.1, torch.float32, slow_memory=True),
        {"dtype": torch.float32},
        0,
    ),
    "TF32_DRAWN": (
        _problem(8192, 5120, 13824, 64, 64, 0.1, torch.float32),
        {"dtype": torch.float32},
        0,
    ),
    "TF32_THREE": (
        _problem(50432, 3072, 768, 32, 32, 0.1, torch.float32),
        {"dtype": torch.float32},
        0,
    ),
    "TF32_THREE_DYNAMIC": (
        _problem(8192, 4096, 14336, 64, 64, 0.1, torch.float32),
        {"dtype": torch.float32},
        0,
    ),
    "EXACT": (
        _problem(50432, 3072, 768, 64, 64, 0.1, torch.float32, exact=True),
        {"dtype": torch.float32, "exact": True},
        16,  # Triton 3.9; 0 with 3.6
    ),
}


PAIRED = {
    "PAIRS": (_problem(8192, 8192, 28672, 64, 64, 0.1, pairs=True), {}, 0),
    "PAIRS_TALL": (_problem(8192, 4096, 14336, 128, 128, 0.1, pairs=True), {}, 0),
}
if kernels.CLUSTERS:
    RULES |= PAIRED


@pytest.mark.parametrize("name", RULES)
def test_every_tile_of_the_rules_compiles_for_hopper(name, tmp_path):
    problem, settings, spill_bound = RULES[name]
    tile = problem[0]
    assert tile == TILES[name]
    kernel = _compile(*problem, **settings)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.bulk.tensor.2d.global" in ptx
    # Drawn tiles: the counter is being zeroed until the wait is over.
    assert (
        ptx.count("griddepcontrol.wait")
        == ptx.count("atom.global.add")
        == (tile.schedule == "dynamic")
    )
    assert ptx.find("griddepcontrol.wait") <= ptx.find("atom.global.add")
    limit = SHARED_LIMIT if tile.programs == 1 else PROGRAM_PAIR_LIMIT
    assert kernel.metadata.shared <= limit
    estimate = shared_bytes(tile, *problem[1:], settings.get("dtype", torch.half).itemsize)
    assert kernel.metadata.shared <= estimate <= kernel.metadata.shared + 1024
    assert kernel.metadata.global_scratch_size == 0, "a call would allocate a workspace"
    assert _spilled(kernel, tmp_path) <= spill_bound


@pytest.mark.parametrize(
    ("r", "tile", "spill_bound"),
    [
        (64, "THREE_STRIPS_HALVES", 0),
        (64, "THREE_STRIPS_DYNAMIC", 0),
        (64, "TWO_DRAWN", 0),
        pytest.param(64, "PAIRS", 0, marks=needs_clusters),
        (128, "TWO_STRIPS_DYNAMIC", 0),
        pytest.param(128, "PAIRS_TALL", 0, marks=needs_clusters),
    ],
)
def test_activations_of_long_rows_fit_in_registers(r, tile, spill_bound, tmp_path):
    kernel = _compile(TILES[tile], 4096 // r, 14336 // r, r, r, activation="gelu")
    assert _spilled(kernel, tmp_path) <= spill_bound


@needs_clusters
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_copy_blocks_once_for_both(name, dynamic):
    tile, *grid = PAIRED[name][0]
    ptx = _compile(tile._replace(schedule="dynamic" if dynamic else "static"), *grid).asm["ptx"]
    assert ".reqnctapercluster 2" in ptx
    chunks = grid[3] // 64
    copies = re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared\S*", ptx)
    assert sum("multicast::cluster" in copy for copy in copies) == tile.strips * chunks
    assert sum("multicast::cluster" not in copy for copy in copies) == chunks  # of x, unrolled
    # Nobody arrives at barriers that are not made yet.
    made = ptx.find("fence.mbarrier_init.release.cluster")
    assert 0 < made < ptx.find("barrier.cluster.arrive.relaxed", made)
    # The other program arrives at barriers of the first, which must outlive that.
    assert "mbarrier.arrive.shared::cluster" in ptx
    assert ptx.rfind("mbarrier.arrive") < ptx.rfind("barrier.cluster.wait")


@pytest.mark.parametrize(
    "name", ["THREE_STRIPS", "THREE_STRIPS_HALVES", "COPIED_16", "COPIED_32", "TF32_THREE"]
)
def test_tiles_dealt_out_in_longer_turns_compile(name, tmp_path):
    problem, settings, _spill_bound = RULES[name]
    kernel = _compile(*problem, **settings, turn=None)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert _spilled(kernel, tmp_path) <= 96


@pytest.mark.parametrize(
    ("name", "c", "activation"),
    [
        ("THREE_STRIPS_HALVES", 64, "none"),
        ("COPIED_32", 32, "none"),
        ("COPIED_32", 32, "gelu"),
        ("STACKED", 16, "none"),
        ("THREE_STRIPS", 64, "none"),
        ("TF32_THREE", 32, "none"),
        ("EXACT", 32, "gelu"),
    ],
)
def test_strips_of_block_rows_that_lie_apart_compile(name, c, activation, tmp_path):
    dtype = torch.float32 if name in ("TF32_THREE", "EXACT") else torch.bfloat16
    kernel, whole = (
        _compile(
            TILES[name],
            *(96, 768 // c, 32, c),
            dtype=dtype,
            exact=name == "EXACT",
            activation=activation,
            mixed=mixed,
        )
        for mixed in (True, False)
    )
    ptx = kernel.asm["ptx"]
    store = "cp.async.bulk.commit_group"
    assert ptx.count(store) == 2 * whole.asm["ptx"].count(store) > 0
    assert "wgmma.mma_async" in ptx
    assert ("stmatrix.sync.aligned.m8n8.x4.trans" in ptx) == (dtype == torch.bfloat16)
    limit = PROGRAM_PAIR_LIMIT if name == "EXACT" else SHARED_LIMIT
    assert kernel.metadata.shared <= limit
    assert _spilled(kernel, tmp_path) <= 16


@pytest.mark.parametrize(
    ("name", "rows", "limit"),
    [
        ("EXACT", 1024, PROGRAM_PAIR_LIMIT),
        ("TF32_THREE", 256, SHARED_LIMIT),
        ("TF32_DRAWN", 2048, SHARED_LIMIT),
    ],
)
def test_the_largest_table_for_float32_fits(name, rows, limit):
    kernel = _compile(TILES[name], rows, 64, 64, 64, dtype=torch.float32, exact=name == "EXACT")
    assert kernel.metadata.shared <= limit


def test_the_output_leaves_through_transposing_matrix_stores():
    kernel = _compile(*RULES["THREE_STRIPS"][0])
    assert "stmatrix.sync.aligned.m8n8.x4.trans" in kernel.asm["ptx"]


@pytest.mark.parametrize("name", ["COPIED_16", "COPIED_16_LONG", "COPIED_32", "COPIED_32_SHORT"])
def test_copied_blocks_travel_16_bytes_a_thread(name):
    ptx = _compile(*RULES[name][0]).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx and "0x10" in ptx
    assert "cp.async.mbarrier.arrive.noinc" in ptx


def _variants():
    """Pairs of a block size and a tile that tuning tries and no rule's problem above has."""
    compiled = {(problem[0], *problem[3:]) for problem, _settings, _bound in RULES.values()}
    for r, c, dtype, exact in (
        (64, 64, torch.bfloat16, False),
        (16, 16, torch.bfloat16, False),
        (32, 32, torch.bfloat16, False),
        (64, 32, torch.bfloat16, False),
        (64, 64, torch.float32, False),
        (64, 64, torch.float32, True),
    ):
        rows, columns = 3072 // r, 768 // c
        for tile in candidates(rows, columns, r, c, dtype, exact=exact):
            if (tile, r, c) not in compiled:
                problem = (tile, rows, columns, r, c)
                yield pytest.param(problem, dtype, exact, id=f"{r}x{c}-{NAMES[dtype]}-{tile}")


@pytest.mark.parametrize(("problem", "dtype", "exact"), list(_variants()))
def test_what_only_tuning_tries_compiles(problem, dtype, exact):
    kernel = _compile(*problem, dtype=dtype, exact=exact)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    limit = SHARED_LIMIT if problem[0].programs == 1 else PROGRAM_PAIR_LIMIT
    assert kernel.metadata.shared <= limit


@pytest.fixture
def set_precision():
    """Sets torch's switch for float32 products; restores it afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda precision: setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    torch.backends.cuda.matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------------------------------
# On a Hopper GPU.


def _hopper_or_skip():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not device_at(torch.cuda.current_device()).gluon:
        pytest.skip("the Gluon kernel needs a Hopper GPU (sm_90)")


ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _check(
    M,
    N,
    K,
    blocksize,
    dtype,
    bound,
    *,
    sparsity=0.8,
    activation="none",
    bias=True,
    tile=None,
    mask=None,
):
    dense, crow, col, values = random_bsr(N, K, blocksize, sparsity, dtype, "cuda", mask=mask)
    # Rows of a wider tensor, and an output poisoned by what the allocator hands out again.
    x = torch.randn(M, K + 64, device="cuda").to(dtype)[:, :K]
    b = torch.randn(N, device="cuda").to(dtype) if bias else None
    plan = build_plan(crow, col, K // values.shape[2], tuple(values.shape[1:]))
    torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
    y = forward(x, crow, col, values, b, activation, plan, tile=tile)
    z = x.double() @ dense.double().t() + (0 if b is None else b.double())
    assert y.shape == (M, N) and y.is_contiguous() and y.dtype == dtype
    error = relative_error(y, ACTIVATIONS[activation](z))
    assert error <= bound, error
    again = forward(x, crow, col, values, b, activation, plan, tile=tile)
    assert torch.equal(y, again), "the same inputs gave other bits"
    ungrouped = forward(x, crow, col, values, b, activation, None, tile=tile)
    assert torch.equal(y, ungrouped), "the order of the rows changed the sums"


SIZES = [64, 32, 16, 128, (64, 16), (64, 32), (128, 64), (128, 32), (32, 64), (16, 32), (32, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("M", [2048, 3001])
@pytest.mark.parametrize("N, K", [(768, 768), (128, 4224), (3072, 768)])
@pytest.mark.parametrize(
    ("blocksize", "dtype"),
    [(size, torch.bfloat16) for size in SIZES] + [(64, torch.float16), (16, torch.float16)],
)
def test_products_match_float64(blocksize, N, K, M, dtype):
    _hopper_or_skip()
    _check(M, N, K, blocksize, dtype, BOUNDS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tile", "blocksize"),
    [
        ("THREE_STRIPS", 64),
        ("TWO_STRIPS", 64),
        ("TWO_PROGRAMS", 64),
        ("TWO_PROGRAMS_DYNAMIC", 64),
        ("SHORT_TILES", 64),
        ("TWO_SHORT", 64),
        ("TWO_SHORT_DYNAMIC", 128),
        ("PACKED_SHORT", (128, 32)),
        ("COPIED_16", 16),
        ("COPIED_16_LONG", 16),
        ("COPIED_32", 32),
        ("COPIED_32_SHORT", 32),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_float64(activation, tile, blocksize):
    _hopper_or_skip()
    tile = TILES[tile]
    _check(3001, 768, 768, blocksize, torch.float16, 5e-4, activation=activation, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [64, 32, 128, (64, 32)])
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 3e-7), ("tf32", 2e-3)])
def test_float32_has_the_accuracy_that_torch_asks_for(set_precision, blocksize, precision, bound):
    _hopper_or_skip()
    set_precision(precision)
    for N, K in ((768, 768), (128, 4224)):
        _check(2100, N, K, blocksize, torch.float32, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", SIZES)
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.bfloat16, "ieee", 4e-3),
        (torch.float32, "ieee", 3e-7),
        (torch.float32, "tf32", 2e-3),
    ],
)
def test_every_tile_that_tuning_tries_matches_float64(
    set_precision, blocksize, dtype, precision, bound
):
    _hopper_or_skip()
    set_precision(precision)
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    exact = dtype == torch.float32 and precision == "ieee"
    tried = candidates(768 // r, 768 // c, r, c, dtype, exact=exact)
    assert tried or (dtype == torch.float32 and c == 16)
    for tile in tried:
        _check(2100, 768, 768, blocksize, dtype, bound, tile=tile)


@pytest.mark.gpu
def test_repeated_calls_launch_at_once_and_agree():
    _hopper_or_skip()
    _dense, crow, col, values = random_bsr(768, 704, 64, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(768, device="cuda").bfloat16()
    plan = build_plan(crow, col, 11, (64, 64))
    weight = (crow, col, values, bias, None, "gelu", plan)
    call = torch.ops.torchao_superblock.bsr_linear
    backend.forget()
    with torch.inference_mode():
        for shape in ((50432, 704), (256, 197, 704)):
            for _ in range(4):
                x = torch.randn(shape, device="cuda").bfloat16()
                y = call(x, *weight)
                expected = forward(x.view(-1, 704), crow, col, values, bias, "gelu", plan)
                assert torch.equal(y, expected.view(*shape[:-1], 768))
            run = direct.find(x, *weight)
            assert run is not None and torch.equal(run(x, *weight), y)
            # Other tensors in the same place, and one that TMA cannot read.
            assert torch.equal(run(x + 1, *weight), call(x + 1, *weight))
            moved = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(shape)
            assert run(moved.copy_(x), *weight) is None
    backend.forget()


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 3e-7), ("tf32", 2e-3)])
def test_float32_activations_match_float64(set_precision, activation, precision, bound, blocksize):
    _hopper_or_skip()
    set_precision(precision)
    _check(9000, 832, 768, blocksize, torch.float32, bound, activation=activation)


@pytest.mark.gpu
def test_a_gradient_by_the_plan_of_another_index_is_nan():
    """Where the Gluon kernel computes it. A forward takes no more than its order of work from the plan."""
    _hopper_or_skip()
    _, crow, col, values = random_bsr(768, 768, 64, 0.8, torch.bfloat16, "cuda")
    # As many blocks, in other columns: every row from right to left.
    lengths = crow.diff()
    rows = torch.repeat_interleave(torch.arange(12, device="cuda"), lengths)
    flipped = (rows * 12 + 11 - col).sort().values
    own, other = (
        build_plan(crow, index, 12, (64, 64)) for index in (col, (flipped % 12).to(torch.int32))
    )
    assert not torch.equal(own, other)
    x = torch.randn(50432, 768, device="cuda").to(torch.bfloat16)
    gradient = backend.grad_x_problem(x, crow, values, 12)
    assert choose.choose(gradient).kernel == "hopper"
    right = backend.grad_x(x, crow, col, values, own, 12)
    assert right.isfinite().all()
    assert backend.grad_x(x, crow, col, values, other, 12).isnan().all()
    y = backend.forward(x, crow, col, values, None, "none", own)
    assert torch.equal(y, backend.forward(x, crow, col, values, None, "none", other))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_extremes_are_torch_s(activation, dtype):
    _hopper_or_skip()
    _, crow, col, values = random_bsr(768, 768, 64, 0.8, dtype, "cuda")
    bias = torch.tensor(EXTREMES, device="cuda").repeat(768)[:768].to(dtype)
    x = torch.zeros(9000, 768, device="cuda", dtype=dtype)
    y = forward(x, crow, col, values, bias, activation, None)
    expected = ACTIVATIONS[activation](bias.double()).to(dtype)
    if dtype != torch.float32 and activation == "gelu":
        expected = torch.where(bias == -torch.inf, 0, expected)
    torch.testing.assert_close(y, expected.expand(9000, -1), equal_nan=True, atol=6e-5, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", ["COPIED_32", "COPIED_32_DYNAMIC", "COPIED_32_SHORT", "STACKED", "PACKED_TWO_DRAWN"]
)
@pytest.mark.parametrize(("M", "N"), [(3001, 768), (50432, 320)])
def test_strips_of_neighbours_and_of_rows_that_lie_apart_match_float64(M, N, tile):
    """By turns, because what is compiled for the one is wrong for the other."""
    _hopper_or_skip()
    tile = TILES[tile]
    for sparsity, mixed in ((0.5, True), (0.95, False), (0.6, True)):
        mask = block_mask(N // 32, 24, sparsity)
        _dense, crow, col, _values = random_bsr(N, 768, 32, mask=mask)
        plan = build_plan(crow, col, 24, (32, 32))
        assert is_mixed(plan, *mask.shape, col.numel()) is mixed
        _check(M, N, 768, 32, torch.bfloat16, 4e-3, tile=tile, mask=mask, activation="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SHORT_TILES", "THREE_STRIPS", "TWO_PROGRAMS"])
@pytest.mark.parametrize("N", [1024, 320])
def test_strips_past_the_end_leave_the_output_of_the_others_alone(name, N):
    """Many tiles a program, and a last group that is not full: its strips must not touch buffers in use."""
    _hopper_or_skip()
    for _ in range(3):
        tile = TILES[name]
        _check(50432, N, 1024, 64, torch.bfloat16, 4e-3, sparsity=0.9, tile=tile)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("r", "c"), [(64, 64), (128, 128), (128, 64), (64, 128), (256, 64)])
@pytest.mark.parametrize(("M", "N"), [(2048, 4096), (8111, 4096), (2048, 768), (300, 256)])
def test_pairs_of_programs_give_the_bits_of_single_ones(M, N, r, c, dynamic):
    """Rows of very different lengths, half of them empty; fewer tiles than pairs, and many more."""
    _hopper_or_skip()
    R, C = N // r, 2048 // c
    for power in (2, 20):  # hardly any blocks: numbers are drawn faster than anything is copied
        mask = torch.rand(R, C) < torch.linspace(0, 1, R)[torch.randperm(R), None] ** power
        mask[: R // 2] = False
        mask[-1, 0] = True
        dense, crow, col, values = random_bsr(
            N, 2048, (r, c), dtype=torch.float16, device="cuda", mask=mask
        )
        plan = build_plan(crow, col, C, (r, c))
        x = torch.randn(M, 2048, device="cuda").half()
        bias = torch.randn(N, device="cuda").half()
        call = (x, crow, col, values, bias, "gelu", plan)
        expected = forward(*call, tile=TILES["TWO_STRIPS"])
        z = torch.nn.functional.gelu(x.double() @ dense.double().t() + bias.double())
        assert relative_error(expected, z) <= 5e-4
        for tile in (TILES["PAIRS"], TILES["PAIRS_TALL"]):
            for _ in range(5):
                y = forward(*call, tile=tile._replace(schedule="dynamic" if dynamic else "static"))
                assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "r", "c"),
    [("THREE_STRIPS", 64, 64), ("TWO_STRIPS", 128, 128), ("THREE_STRIPS", 32, 64)],
)
@pytest.mark.parametrize("M", [2048, 8000])
@pytest.mark.parametrize(
    "change",
    [{"schedule": "dynamic"}, {"halves": True}, {"schedule": "dynamic", "halves": True}],
)
def test_every_schedule_gives_the_same_bits(name, r, c, M, change):
    """Rows of very different lengths, empty ones among them; fewer tiles than programs, and many more."""
    _hopper_or_skip()
    R, C = 4096 // r, 2048 // c
    mask = torch.rand(R, C) < torch.linspace(0, 1, R)[torch.randperm(R), None] ** 2
    mask[:2] = False
    tile = TILES[name]
    changed = tile._replace(**change)
    for N in (4096, 128):
        for _ in range(3):
            some = mask[-(N // r) :]
            _check(M, N, 2048, (r, c), torch.bfloat16, 4e-3, mask=some, tile=changed)
    _dense, crow, col, values = random_bsr(4096, 2048, (r, c), 0, torch.bfloat16, "cuda", mask=mask)
    x = torch.randn(M, 2048, device="cuda").bfloat16()
    plan = build_plan(crow, col, C, (r, c))
    arguments = (x, crow, col, values, None, "none", plan)
    dealt = forward(*arguments, tile=tile)
    assert torch.equal(dealt, forward(*arguments, tile=changed))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 6, 11, 16, 22, 112, 300])
@pytest.mark.parametrize("m_tiles", [1, 5, 32, 394])
@pytest.mark.parametrize("cut", [False, True])
def test_every_tile_is_worked_on_once(monkeypatch, m_tiles, groups, dynamic, cut):
    """The kernel's own arithmetic, with numbers for its scalars."""
    programs = min(132, m_tiles * groups)

    class Numbers:
        where = staticmethod(lambda condition, a, b: a if condition else b)
        minimum = staticmethod(min)

    monkeypatch.setattr(kernels, "gl", Numbers)
    whole = m_tiles * groups
    tile = tiles.THREE._replace(halves=cut, schedule="dynamic" if dynamic else "static")
    count, halves = tile.cut_last(whole, 132)
    assert halves == (2 * (whole % 132) if cut and whole % 132 <= 66 else 0)
    assert halves <= 132, "more than a round"
    tile_of = kernels._tile.fn
    turn = hopper._turn(tile, programs, groups, 8192)
    assert turn == 4 or not dynamic
    found = [tile_of(t, count, halves, groups, turn, 256, dynamic, cut) for t in range(count)]
    assert all(half == (t >= count - halves) for t, (_m, _group, half) in enumerate(found))
    parts = [(m + 128 * p, group) for m, group, half in found for p in range(1 if half else 2)]
    assert sorted(parts) == [
        (m * 128, group) for m in range(2 * m_tiles) for group in range(groups)
    ]
    if not dynamic and not halves and count >= programs * groups:
        for program in range(programs):
            assert {group for _m, group, _half in found[program::programs]} == set(range(groups))


@pytest.fixture
def activate(monkeypatch):
    """The kernel's own arithmetic of an activation, in float32 on the CPU."""

    class Tensors:
        abs = staticmethod(torch.abs)
        minimum = staticmethod(lambda a, b: a.clamp(max=b))

    monkeypatch.setattr(kernels, "gl", Tensors)
    monkeypatch.setattr(kernels, "_positive", torch.relu)
    monkeypatch.setattr(kernels, "_exp2", torch.exp2)
    monkeypatch.setattr(kernels, "_reciprocal", torch.reciprocal)
    return kernels._activate.fn


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 4.0])
def test_activations_of_float32_have_float32_accuracy(activate, scale, activation):
    z = torch.randn(100_000) * scale
    expected = ACTIVATIONS[activation](z.double())
    assert relative_error(activate(z, True, activation), expected) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_polynomial_of_gelu_for_16_bits_is_within_their_rounding(activate, dtype):
    z = torch.linspace(-6, 30, 720_001)
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    expected = expected.detach()
    error = (activate(z, False, "gelu") - expected).abs()
    # Half a unit in the last place, of the result or, as it comes out of gelu, of z.
    info = torch.finfo(dtype)
    half = expected.abs().clamp(min=info.smallest_normal) * (info.eps / 2)
    assert (error <= torch.maximum(half, (slope * exact).abs() * (info.eps / 2))).all()
    assert error.max() <= 6e-5
    assert (error <= 4e-4 * expected.abs())[z >= -1].all()
    assert (error <= 3e-3 * expected.abs())[z >= -4].all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_infinity_and_nan_are_torchs(activation, dtype):
    _hopper_or_skip()
    _dense, crow, col, values = random_bsr(128, 768, 64, 0.5, dtype, "cuda")
    x = torch.zeros(2048, 768, device="cuda", dtype=dtype)
    bias = torch.zeros(128, device="cuda", dtype=dtype)
    bias[:4] = torch.tensor([math.inf, math.nan, -30.0, 30.0])
    y = forward(x, crow, col, values, bias, activation, None)
    expected = ACTIVATIONS[activation](bias.float()).to(dtype).expand_as(y)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
def test_float32_keeps_every_nan(set_precision, bits):
    """A GPU's own NaN has every bit of the mantissa set: rounding it must not carry into its sign."""
    _hopper_or_skip()
    set_precision("ieee")
    nan = torch.tensor(bits, dtype=torch.int32, device="cuda").view(torch.float32)
    _dense, crow, col, values = random_bsr(128, 256, 64, 0.0, torch.float32, "cuda")
    x = torch.randn(2048, 256, device="cuda")
    x[7, 70] = nan
    y = forward(x, crow, col, values, None, "none", None)
    assert torch.isnan(y[7]).all() and torch.isnan(y).sum() == 128
    x[7, 70] = 0
    values[1, 3, 5] = nan  # block row 0, block column 1: output 3
    y = forward(x, crow, col, values, None, "none", None)
    assert torch.isnan(y[:, 3]).all() and torch.isnan(y).sum() == 2048


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [64, 16])
def test_empty_and_full_rows(blocksize):
    _hopper_or_skip()
    R, C = 768 // blocksize, 768 // blocksize
    mask = block_mask(R, C, 0.9)
    mask[::3] = False
    mask[1] = True
    mask[-1] = False
    for bias in (False, True):
        _check(2048, 768, 768, blocksize, torch.bfloat16, 4e-3, mask=mask, bias=bias)


@pytest.mark.gpu
def test_indices_outside_the_grid_read_nothing_outside():
    """Such indices break the format; the result is unspecified, but the kernel ends and touches no foreign memory."""
    _hopper_or_skip()
    for blocksize in (64, 16):
        _dense, crow, col, values = random_bsr(768, 768, blocksize, 0.8, torch.bfloat16, "cuda")
        x = torch.randn(2048, 768, device="cuda", dtype=torch.bfloat16)
        for bad in (-5, 768 // blocksize, 2**30):
            broken = col.clone()
            broken[::2] = bad
            forward(x, crow, broken, values, None, "none", None)
        broken = crow.clone()
        broken[3:7] = 2**30
        broken[7] = -9
        forward(x, broken, col, values, None, "none", None)
        plan = build_plan(crow, col, 768 // blocksize)
        for bad in (-5, 2**30):
            tile = TILES["THREE_STRIPS"] if blocksize == 64 else None
            forward(x, crow, col, values, None, "none", plan * 0 + bad, tile=tile)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_call_can_be_captured_in_a_cuda_graph():
    _hopper_or_skip()
    dense, crow, col, values = random_bsr(768, 768, 64, 0.8, torch.bfloat16, "cuda")
    x = torch.randn(2048, 768, device="cuda", dtype=torch.bfloat16)
    forward(x, crow, col, values, None, "none", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x, crow, col, values, None, "none", None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, x.double() @ dense.double().t()) <= 4e-3


@pytest.mark.gpu
def test_drawn_tiles_follow_what_was_launched_before():
    """The kernel may start while its counter is still being zeroed: neither that nor its x is read too early."""
    _hopper_or_skip()
    dense, crow, col, values = random_bsr(1024, 1024, 64, 0.9, torch.bfloat16, "cuda")
    plan = build_plan(crow, col, 16, (64, 64))
    start = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16)  # three tiles a program
    drawn, dealt = TILES["THREE_STRIPS_DYNAMIC"], TILES["THREE_STRIPS"]

    def chain(tile):
        # The allocator hands these out again: outputs that were never written, and a counter that ends all drawing.
        freed = [torch.full_like(start, float("nan")) for _ in range(4)]
        freed += [torch.full((1,), 2**30, device="cuda", dtype=torch.int32) for _ in range(4)]
        del freed
        y = start
        for _ in range(10):
            y = forward(y, crow, col, values, None, "none", plan, tile=tile)
        return y

    expected = chain(dealt)
    assert all(torch.equal(chain(drawn), expected) for _ in range(3))
    assert_replays(lambda: chain(drawn), expected)
    first = forward(start, crow, col, values, None, "none", plan, tile=drawn)
    assert relative_error(first, start.double() @ dense.double().t()) <= 4e-3
