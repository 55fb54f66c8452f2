"""The Gluon kernel: compiled for sm_90 everywhere, its numerics on a Hopper GPU.

Compiling needs no GPU, so what a GPU would refuse (too much shared memory, spilled registers, a product that is not on
the tensor cores) fails here first.
"""

import itertools
import math
import os
import re
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.reference import EXTREMES, assert_replays, block_mask, random_bsr, relative_error
from torchao_superblock.ops import build_plan, cuda, hopper
from torchao_superblock.ops.plan import is_mixed

triton = pytest.importorskip("triton", reason="needs Triton")
gluon = pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_LIMIT = 232448  # bytes of shared memory a program may have
PROGRAM_PAIR_LIMIT = 115712  # when two share a multiprocessor

needs_compiler = pytest.mark.skipif(
    hopper._import_error is not None, reason=str(hopper._import_error)
)
needs_clusters = pytest.mark.skipif(
    not hopper._CLUSTERS, reason="this Triton cannot copy to both programs of a cluster"
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

    from torchao_superblock.ops import hopper_kernels

    bytes_ = dtype.itemsize
    name = NAMES[dtype]
    call = hopper.Call(
        *(2048, columns * c, columns * c, rows, r, c, rows, dtype),
        *(exact, bias, activation, order, mixed),
    )
    constants = hopper.constants(call, tile, order)
    signature = {}
    boxes = hopper.boxes(tile, r, c, bytes_, mixed)
    layouts = hopper.layouts(tile, r, c, bytes_, mixed)
    for argument, box, layout in zip(("x_desc", "w_desc", "y_desc"), boxes, layouts, strict=True):
        signature[argument] = f"tensordesc<{name}{box},{layout!r}>"
    pointers = {"w_ptr": f"*{name}", "bias_ptr": f"*{name}", "crow_ptr": "*i32", "col_ptr": "*i32"}
    pointers |= {"order_ptr": "*i32", "counter_ptr": "*i32"}
    signature |= pointers
    # As specialized for ones; None is any other number.
    if turn == 1 and not tile.dynamic:
        constants["turn"] = 1
    if not tile.halves:
        constants["halves"] = 1
    numbers = ("tiles", "halves", "groups", "turn", "rows", "columns", "nnz")
    signature |= dict.fromkeys(numbers, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(list(signature).index(p),): [["tt.divisibility", 16]] for p in pointers}
    source = GluonASTSource(hopper_kernels.bsr_linear_strips, signature, constants, aligned)
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


def _problem(M, N, K, r, c, density, dtype=torch.bfloat16, **kwargs):
    rows, columns = N // r, K // c
    nnz = max(1, round(rows * columns * density))
    tile = hopper.choose(M, rows, columns, r, c, nnz, dtype, **kwargs)
    return tile, rows, columns, r, c


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
if hopper._CLUSTERS:
    RULES |= PAIRED


@needs_compiler
@pytest.mark.parametrize("name", RULES)
def test_every_tile_of_the_rules_compiles_for_hopper(name, tmp_path):
    problem, settings, spill_bound = RULES[name]
    tile = problem[0]
    assert tile == getattr(hopper, name)
    kernel = _compile(*problem, **settings)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.bulk.tensor.2d.global" in ptx
    # Drawn tiles: the counter is being zeroed until the wait is over.
    assert ptx.count("griddepcontrol.wait") == ptx.count("atom.global.add") == tile.dynamic
    assert ptx.find("griddepcontrol.wait") <= ptx.find("atom.global.add")
    limit = SHARED_LIMIT if tile.programs == 1 else PROGRAM_PAIR_LIMIT
    assert kernel.metadata.shared <= limit
    estimate = hopper.shared_bytes(tile, *problem[1:], settings.get("dtype", torch.half).itemsize)
    assert kernel.metadata.shared <= estimate <= kernel.metadata.shared + 1024
    assert kernel.metadata.global_scratch_size == 0, "a call would allocate a workspace"
    assert _spilled(kernel, tmp_path) <= spill_bound


@needs_compiler
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
    kernel = _compile(getattr(hopper, tile), 4096 // r, 14336 // r, r, r, activation="gelu")
    assert _spilled(kernel, tmp_path) <= spill_bound


@needs_clusters
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_copy_blocks_once_for_both(name, dynamic):
    tile, *grid = PAIRED[name][0]
    ptx = _compile(tile._replace(dynamic=dynamic), *grid).asm["ptx"]
    assert ".reqnctapercluster 2" in ptx
    chunks = grid[3] // 64
    copies = re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared\S*", ptx)
    assert sum("multicast::cluster" in copy for copy in copies) == tile.group * chunks
    assert sum("multicast::cluster" not in copy for copy in copies) == chunks  # of x, unrolled
    # Nobody arrives at barriers that are not made yet.
    made = ptx.find("fence.mbarrier_init.release.cluster")
    assert 0 < made < ptx.find("barrier.cluster.arrive.relaxed", made)
    # The other program arrives at barriers of the first, which must outlive that.
    assert "mbarrier.arrive.shared::cluster" in ptx
    assert ptx.rfind("mbarrier.arrive") < ptx.rfind("barrier.cluster.wait")


@pytest.mark.parametrize("slow_memory", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "share", "tile"),
    [
        (8192, 4096, 14336, 128, 0.1, "PAIRS_TALL"),
        (2048, 8192, 28672, 128, 0.2, "PAIRS_TALL"),
        (8192, 2048, 8192, 128, 0.1, "PAIRS_TALL"),
        (2048, 2048, 8192, 128, 0.1, None),  # two rounds
        (8192, 4096, 14336, 128, 0.4, None),
        (8192, 2048, 5120, 128, 0.1, None),  # not long enough
        (8192, 14336, 8192, 128, 0.1, None),  # fits in L2
        (8192, 16384, 73728, 128, 0.1, None),  # the table leaves no room
        (8192, 8192, 28672, 64, 0.4, "PAIRS"),
        (4096, 5120, 13824, 64, 0.1, "PAIRS"),
        (8192, 28672, 8192, 64, 0.2, "PAIRS"),
        (8192, 4096, 14336, 64, 0.1, None),
        (8192, 8192, 28672, 64, 0.6, None),
        (1024, 5120, 13824, 64, 0.1, None),  # not two rounds
        (8192, 16384, 28672, 64, 0.1, None),  # the table leaves no room
    ],
)
def test_programs_are_paired_where_x_is_too_much_for_l2(M, N, K, r, share, tile, slow_memory):
    single, chosen = (
        _problem(M, N, K, r, r, share, slow_memory=slow_memory, pairs=pairs)[0]
        for pairs in (False, True)
    )
    assert not single.pair
    assert chosen == (single if tile is None else getattr(hopper, tile))


@pytest.mark.parametrize(
    ("M", "N", "K", "r", "c", "share", "dtype", "slow", "fast"),
    [
        (8192, 5120, 13824, 64, 64, 0.1, torch.bfloat16, "TWO_DRAWN", "TWO_DRAWN"),
        (8192, 5120, 13824, 64, 64, 0.6, torch.bfloat16, "TWO_STRIPS", "TWO_STRIPS"),
        (8192, 17408, 3072, 64, 64, 0.3, torch.bfloat16, "TWO_STRIPS", "TWO_STRIPS"),
        (8192, 5120, 13824, 32, 64, 0.1, torch.bfloat16, "TWO_STRIPS", "TWO_STRIPS"),
        (8192, 5120, 13824, 32, 32, 0.1, torch.bfloat16, "PACKED_TWO_DRAWN", "PACKED_TWO_DRAWN"),
        (8192, 12288, 3072, 32, 32, 0.1, torch.bfloat16, "COPIED_32", "COPIED_32"),
        (8192, 24576, 3072, 32, 32, 0.1, torch.bfloat16, "PACKED_TWO", "PACKED_TWO"),
        (8192, 5120, 13824, 64, 64, 0.1, torch.float32, "TF32_DRAWN", "TF32_DRAWN"),
        (1024, 5120, 13824, 64, 64, 0.1, torch.float32, "TF32", "TF32"),  # less than four rounds
        (8192, 17408, 3072, 64, 64, 0.3, torch.float32, "TF32", "TF32"),
        (8192, 5120, 13824, 32, 64, 0.1, torch.float32, "TF32", "TF32"),
        (8192, 4096, 14336, 128, 128, 0.1, torch.float32, "TF32_THREE", "TF32_THREE_DYNAMIC"),
        (8192, 14336, 4096, 128, 128, 0.1, torch.float32, *2 * ("TF32_THREE_DYNAMIC",)),
    ],
)
def test_tiles_are_drawn_in_long_rows(M, N, K, r, c, share, dtype, slow, fast):
    for slow_memory, tile in ((True, slow), (False, fast)):
        chosen = _problem(M, N, K, r, c, share, dtype, slow_memory=slow_memory)[0]
        assert chosen == getattr(hopper, tile)


@needs_clusters
@pytest.mark.parametrize(("M", "clusters"), [(16384, 66), (300, 4)])
def test_a_cluster_is_launched_for_two_multiprocessors(M, clusters):
    call = hopper.Call(M, 28672, 0, 6, 64, 64, 54, torch.bfloat16)
    launch = hopper.launch(call, hopper.PAIRS, processors=133)
    assert launch.programs == clusters
    assert launch.numbers[:4] == (-(-M // 256) * 2, 1, 2, int(30e6 / (28672 * 2)) // 256)
    assert [box for *_, box, _layout in launch.descriptors] == [[256, 64], [64, 64], [256, 64]]
    assert launch.counters == hopper.kernels.CLUSTER_NUMBERS.value * (1 + clusters)


@needs_clusters
def test_calls_are_given_pairs_where_triton_has_them(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    x = torch.empty(8192, 28672, device="meta", dtype=torch.bfloat16)
    crow = torch.empty(129, device="meta", dtype=torch.int32)
    values = torch.empty(5734, 64, 64, device="meta", dtype=torch.bfloat16)
    assert hopper._choose(x, crow, values, "none") == hopper.PAIRS
    monkeypatch.setattr(hopper, "_CLUSTERS", False)
    assert hopper._choose(x, crow, values, "none") == hopper.TWO_DRAWN


@needs_compiler
@pytest.mark.parametrize(
    "name", ["THREE_STRIPS", "THREE_STRIPS_HALVES", "COPIED_16", "COPIED_32", "TF32_THREE"]
)
def test_tiles_dealt_out_in_longer_turns_compile(name, tmp_path):
    problem, settings, _spill_bound = RULES[name]
    kernel = _compile(*problem, **settings, turn=None)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert _spilled(kernel, tmp_path) <= 96


@needs_compiler
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
            getattr(hopper, name),
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


@needs_compiler
@pytest.mark.parametrize(
    ("K", "c", "share", "gluon"),
    [
        (768, 64, 0.1, True),
        (3072, 64, 0.1, True),
        (768, 32, 0.1, True),
        (3072, 32, 0.1, False),
        (3072, 32, 0.5, True),
    ],
)
def test_plain_triton_serves_float32_only_with_few_narrow_blocks_in_long_rows(
    monkeypatch, K, c, share, gluon
):
    from torchao_superblock.ops import cuda

    monkeypatch.setattr(cuda, "INTERPRET", False)
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_tuned_devices", {0})
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    nnz = round(768 // c * (K // c) * share)
    x = torch.empty(50432, K, device="meta")
    crow = torch.empty(768 // c + 1, device="meta", dtype=torch.int32)
    col = torch.empty(nnz, device="meta", dtype=torch.int32)
    values = torch.empty(nnz, c, c, device="meta")
    served = cuda.hopper_kernel(x, crow, col, values, None, "none", None, 0)
    assert served is (hopper.forward if gluon else None)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rows", "limit"),
    [
        ("EXACT", 1024, PROGRAM_PAIR_LIMIT),
        ("TF32_THREE", 256, SHARED_LIMIT),
        ("TF32_DRAWN", 2048, SHARED_LIMIT),
    ],
)
def test_the_largest_table_for_float32_fits(name, rows, limit):
    kernel = _compile(
        getattr(hopper, name), rows, 64, 64, 64, dtype=torch.float32, exact=name == "EXACT"
    )
    assert kernel.metadata.shared <= limit


@needs_compiler
def test_the_output_leaves_through_transposing_matrix_stores():
    kernel = _compile(*RULES["THREE_STRIPS"][0])
    assert "stmatrix.sync.aligned.m8n8.x4.trans" in kernel.asm["ptx"]


@needs_compiler
@pytest.mark.parametrize("name", ["COPIED_16", "COPIED_16_LONG", "COPIED_32", "COPIED_32_SHORT"])
def test_copied_blocks_travel_16_bytes_a_thread(name):
    ptx = _compile(*RULES[name][0]).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx and "0x10" in ptx
    assert "cp.async.mbarrier.arrive.noinc" in ptx


@needs_compiler
@pytest.mark.parametrize(
    ("tile", "blocksize", "entries"),
    [
        ("THREE_STRIPS", 64, 256),
        ("THREE_STRIPS_DYNAMIC", 64, 256),
        ("THREE_STRIPS_HALVES", 64, 256),
        ("TWO_STRIPS", 64, 2048),
        ("TWO_STRIPS_DYNAMIC", 64, 2048),
        ("TWO_DRAWN", 64, 2048),
        ("TWO_PROGRAMS", 64, 1024),
        ("TWO_PROGRAMS_DYNAMIC", 64, 1024),
        ("SHORT_TILES", 64, 1024),
        ("TWO_SHORT", 64, 1024),
        ("TWO_SHORT_DYNAMIC", 64, 1024),
        ("PAIRS", 64, 1024),
        ("PAIRS_TALL", 128, 1024),
        ("STACKED", 32, 1024),
        ("COPIED_16", 16, 256),
        ("COPIED_16_LONG", 16, 1024),
        ("COPIED_32", 32, 1024),
        ("COPIED_32_SHORT", 32, 1024),
        ("PACKED", 32, 1024),
        ("PACKED_TWO", 32, 2048),
        ("PACKED_TWO_DRAWN", 32, 2048),
        ("PACKED_SHORT", 32, 256),
    ],
)
def test_the_largest_table_of_masks_that_the_rules_allow_fits(tile, blocksize, entries):
    """Shared memory is counted from the parts, without compiling: slots, output buffers, table, barriers."""
    tile = getattr(hopper, tile)
    limit = SHARED_LIMIT if tile.programs == 1 else PROGRAM_PAIR_LIMIT
    assert hopper.shared_bytes(tile, entries, 64, blocksize, blocksize, 2) <= limit


SLOW_MEMORY = pytest.mark.parametrize("slow_memory", [False, True])
SETTINGS = [
    (torch.bfloat16, False, "none"),
    (torch.float16, False, "gelu"),
    (torch.float32, False, "none"),
    (torch.float32, True, "none"),
]


@needs_compiler
@SLOW_MEMORY
@pytest.mark.parametrize(("dtype", "exact", "activation"), SETTINGS)
def test_what_the_rules_choose_fits_and_is_among_what_tuning_tries(
    dtype, exact, activation, slow_memory
):
    chosen = set()
    grids = [(N, K) for N in (256, 768, 3072, 8192, 14336) for K in (256, 768, 3072, 14336)]
    for (N, K), r, c in itertools.product(grids, (16, 32, 64, 128), (16, 32, 64, 128)):
        rows, columns = N // r, K // c
        tiles = hopper.candidates(rows, columns, r, c, dtype, exact=exact)
        for M, share in itertools.product((2048, 8192, 50432), (0.05, 0.2, 0.3, 0.9)):
            nnz = max(1, round(rows * columns * share))
            tile = hopper.choose(
                M,
                rows,
                columns,
                r,
                c,
                nnz,
                dtype,
                exact=exact,
                activation=activation,
                slow_memory=slow_memory,
                pairs=hopper._CLUSTERS,
            )
            assert tile is None or tile in tiles
            chosen.add(tile)
    assert None in chosen and len(chosen) > 1


@pytest.mark.parametrize(
    ("M", "N", "K", "share", "slow", "fast"),
    [
        (50432, 3072, 768, 0.1, "TWO_SHORT_DYNAMIC", "TWO_SHORT_DYNAMIC"),
        (50432, 3072, 768, 0.2, "TWO_SHORT_DYNAMIC", "TWO_STRIPS_DYNAMIC"),
        (50432, 3072, 768, 0.3, "TWO_STRIPS_DYNAMIC", "TWO_STRIPS_DYNAMIC"),
        (50432, 3072, 768, 0.6, "TWO_STRIPS", "TWO_STRIPS"),
        (50432, 768, 3072, 0.1, "TWO_SHORT", "TWO_SHORT"),
        (50432, 768, 3072, 0.3, "TWO_SHORT_DYNAMIC", "TWO_STRIPS"),
        (12608, 768, 3072, 0.2, "TWO_SHORT", "TWO_STRIPS"),  # too few rounds to draw tiles
        (16384, 2048, 2048, 0.2, "TWO_SHORT", "TWO_STRIPS"),
        (16384, 2048, 2048, 0.3, "TWO_STRIPS", "TWO_STRIPS"),
        (25216, 1024, 4096, 0.1, "TWO_STRIPS_DYNAMIC", "TWO_SHORT"),
        (25216, 1024, 4096, 0.4, "TWO_STRIPS_DYNAMIC", "TWO_STRIPS"),
        (8192, 4096, 14336, 0.1, "TWO_STRIPS_DYNAMIC", "TWO_STRIPS_DYNAMIC"),
    ],
)
def test_tiles_for_tall_blocks(M, N, K, share, slow, fast):
    assert _problem(M, N, K, 128, 128, share, slow_memory=True)[0] == getattr(hopper, slow)
    assert _problem(M, N, K, 128, 128, share)[0] == getattr(hopper, fast)


@pytest.mark.parametrize(
    ("M", "N", "K", "r", "share", "small"),
    [
        (50432, 3072, 768, 64, 0.1, True),
        (50432, 768, 3072, 128, 0.2, True),
        (8192, 1024, 4096, 64, 0.2, True),
        (8192, 4096, 14336, 64, 0.1, False),
        (8192, 14336, 4096, 64, 0.1, False),
        (2048, 14336, 4096, 64, 0.1, True),
        (2048, 14336, 4096, 64, 0.2, False),
        (8192, 4096, 14336, 128, 0.1, False),
        (8192, 14336, 4096, 128, 0.1, True),
        (8192, 14336, 4096, 128, 0.2, False),
        (2048, 14336, 4096, 128, 0.2, True),
        (8192, 2048, 8192, 128, 0.1, True),
        (8192, 4096, 14336, 32, 0.1, True),
        (8192, 57344, 8192, 64, 0.01, False),  # the table leaves no room
    ],
)
def test_two_programs_hide_activations_in_short_rows(M, N, K, r, share, small):
    tile = _problem(M, N, K, r, max(r, 64), share, activation="gelu")[0]
    plain = _problem(M, N, K, r, max(r, 64), share)[0]
    assert tile == hopper.TWO_PROGRAMS if small else tile == plain != hopper.TWO_PROGRAMS


@pytest.mark.parametrize(
    ("r", "share", "slow", "fast"),
    [
        (64, 0.1, "TWO_SHORT_DYNAMIC", "SHORT_TILES"),
        (32, 0.05, "SHORT_TILES", "SHORT_TILES"),
        (32, 0.1, "SHORT_TILES", "THREE_STRIPS"),
        (32, 0.2, "THREE_STRIPS", "THREE_STRIPS"),
        (16, 0.05, "SHORT_TILES", "THREE_STRIPS"),
    ],
)
def test_low_blocks_get_short_tiles_where_there_are_few_or_memory_is_slow(r, share, slow, fast):
    assert _problem(50432, 3072, 768, r, 64, share, slow_memory=True)[0] == getattr(hopper, slow)
    assert _problem(50432, 3072, 768, r, 64, share)[0] == getattr(hopper, fast)


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
        for tile in hopper.candidates(rows, columns, r, c, dtype, exact=exact):
            if (tile, r, c) not in compiled:
                problem = (tile, rows, columns, r, c)
                yield pytest.param(problem, dtype, exact, id=f"{r}x{c}-{NAMES[dtype]}-{tile}")


@needs_compiler
@pytest.mark.parametrize(("problem", "dtype", "exact"), list(_variants()))
def test_what_only_tuning_tries_compiles(problem, dtype, exact):
    kernel = _compile(*problem, dtype=dtype, exact=exact)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    limit = SHARED_LIMIT if problem[0].programs == 1 else PROGRAM_PAIR_LIMIT
    assert kernel.metadata.shared <= limit


@needs_compiler
def test_a_tuned_tile_of_the_gluon_kernel_is_used_in_the_next_process(monkeypatch, tmp_path):
    """Also where no plain kernel is ever prepared."""
    from torchao_superblock.ops import cuda, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "INTERPRET", False)
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a Hopper")
    monkeypatch.setattr(cuda, "_tuned", {})
    x = torch.empty(50432, 768, device="meta", dtype=torch.bfloat16)
    crow = torch.empty(49, device="meta", dtype=torch.int32)
    col = torch.empty(58, device="meta", dtype=torch.int32)
    values = torch.empty(58, 64, 64, device="meta", dtype=torch.bfloat16)

    def served(activation="none"):
        return cuda.hopper_kernel(x, crow, col, values, None, activation, None, 0)

    problem = cuda._forward_problem(x, crow, values, "none", 65536, 0)
    found = cuda.Found(cuda.matmul_tile(problem), False, hopper.TWO_STRIPS)

    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served() is hopper.forward
    tuning._save({problem: found}, 0)
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served().keywords == {"tile": hopper.TWO_STRIPS}
    assert served("gelu") is hopper.forward
    # What was found for a forward says nothing about a gradient of the same shape.
    gradient = cuda.hopper_kernel(x, crow, col, values, None, "none", None, 0, tuned=False)
    assert gradient is hopper.forward
    tuning._save({problem: found._replace(plain=True, strips=None)}, 0)
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served() is None
    # A tile that this problem cannot have is passed over; other finds stay.
    other = problem._replace(activation="relu")
    tuning._save({problem: found._replace(strips=hopper.COPIED_16), other: found}, 0)
    monkeypatch.setattr(cuda, "_tuned", {})
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    with pytest.warns(UserWarning, match="passed over.*is not a tile of this version"):
        assert served() is hopper.forward
    assert served("relu").keywords == {"tile": hopper.TWO_STRIPS}


@needs_compiler
@pytest.mark.parametrize(
    ("plain_us", "gluon_us", "right", "rule_is_plain", "expected"),
    [
        (100, {}, True, False, "rule"),
        (100, {"TWO_STRIPS": 90}, True, False, "TWO_STRIPS"),
        (100, {"TWO_STRIPS": 98.5}, True, False, "rule"),  # a draw
        (90, {}, True, False, "plain"),
        (98.5, {}, True, False, "rule"),
        (98.5, {}, True, True, "plain"),
        (100.5, {}, True, True, "plain"),
        (110, {}, True, True, "rule"),
        (100, {"TWO_STRIPS": 1}, False, False, "plain"),  # wrong numbers are no candidates
    ],
)
def test_tuning_chooses_between_the_kernels(
    monkeypatch, plain_us, gluon_us, right, rule_is_plain, expected
):
    from torchao_superblock.ops import cuda, tuning

    x = torch.randn(4096, 256).bfloat16()
    _dense, crow, col, values = random_bsr(128, 256, 64, dtype=torch.bfloat16)
    y = torch.randn(4096, 128)
    times = {getattr(hopper, name): us for name, us in gluon_us.items()}

    def microseconds(run):
        assert run().shape == y.shape
        tile = getattr(run, "keywords", {}).get("tile")
        return plain_us if tile is None else times.get(tile, 100)

    monkeypatch.setattr(tuning, "INTERPRET", True)
    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "candidates", lambda problem: [cuda.matmul_tile(problem)])
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    monkeypatch.setattr(cuda, "forward", lambda *call: y)
    monkeypatch.setattr(cuda, "_plain_forward", lambda *call: y)
    served = None if rule_is_plain else hopper.forward
    monkeypatch.setattr(cuda, "hopper_kernel", lambda *call: served)
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(hopper, "_choose", lambda *call: hopper.THREE_STRIPS)
    monkeypatch.setattr(hopper, "forward", lambda *call, tile: y if right else y + 1)
    monkeypatch.setattr(cuda, "_tuned", {})
    problem = cuda._forward_problem(x, crow, values, "none", 4096, 0)
    arguments = (x, crow, col, values, None, "none", None)
    found = tuning._tune_call(arguments, problem, 0)
    strips = {"plain": None, "rule": hopper.THREE_STRIPS}.get(expected)
    if expected == "TWO_STRIPS":
        strips = hopper.TWO_STRIPS
    assert (found.strips, found.plain) == (strips, expected == "plain")
    assert cuda._tuned == {problem: cuda.Found(found.tile, found.plain, strips)}
    y[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        tuning._tune_call(arguments, problem, 0)


@pytest.mark.parametrize(
    ("r", "c", "dtype"),
    [
        (8, 64, torch.bfloat16),  # below what a matrix instruction reads
        (48, 64, torch.bfloat16),  # neither a part nor a multiple of a strip
        (64, 48, torch.bfloat16),  # neither a part nor a multiple of a slice of x
        (64, 16, torch.float32),
        (64, 64, torch.float64),
    ],
)
def test_block_sizes_that_the_kernel_cannot_cut_are_declined(r, c, dtype):
    assert hopper.choose(50432, 16, 16, r, c, 64, dtype) is None


def test_a_grid_with_too_many_masks_for_shared_memory_is_declined():
    assert hopper.choose(50432, 14336 // 16, 14336 // 16, 16, 16, 1000, torch.bfloat16) is None


def test_supports_says_no_without_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 0)
    _dense, crow, col, values = random_bsr(128, 128, 64, dtype=torch.bfloat16)
    x = torch.zeros(4096, 128, dtype=torch.bfloat16)
    assert not hopper.supports(x, crow, col, values, None, "none", None)
    reason = hopper.unavailable_reason(0)
    assert reason is not None and ("sm_90" in reason or "Gluon" in reason)


def _refused(name):
    """x and values that break one precondition of the kernel."""
    _dense, crow, col, values = random_bsr(128, 128, 64, dtype=torch.bfloat16)
    x = torch.zeros(4096, 128, dtype=torch.bfloat16)
    if name == "few tokens":
        x = x[:100]
    if name == "column-major x":
        x = torch.zeros(128, 4096, dtype=torch.bfloat16).t()
    if name == "expanded x":
        x = x[:1].expand(4096, 128)
    if name == "unaligned rows":
        x = torch.zeros(4096, 132, dtype=torch.bfloat16)[:, :128]
    if name == "unaligned start":
        x = torch.zeros(4096, 136, dtype=torch.bfloat16)[:, 1:129]
    if name == "no stored block":
        _dense, crow, col, values = random_bsr(
            128, 128, 64, dtype=torch.bfloat16, mask=torch.zeros(2, 2, dtype=torch.bool)
        )
    return x, crow, col, values


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "few tokens",
        "column-major x",
        "expanded x",
        "unaligned rows",
        "unaligned start",
        "no stored block",
    ],
)
def test_supports_declines_what_tma_cannot_read(monkeypatch, name):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    monkeypatch.setattr(hopper, "_MIN_MICROSECONDS", 0)
    x, crow, col, values = _refused("nothing")
    assert hopper.supports(x, crow, col, values, None, "none", None)
    x, crow, col, values = _refused(name)
    assert not hopper.supports(x, crow, col, values, None, "none", None)


@pytest.fixture
def set_precision():
    """Sets torch's switch for float32 products; restores it afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda precision: setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    torch.backends.cuda.matmul.fp32_precision = before


@needs_compiler
def test_supports_leaves_short_calls_to_the_kernels_that_launch_faster(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    for speed, blocksize, M, served in (
        (4800, 64, 50432, True),
        (4800, 64, 28000, False),
        (3350, 64, 28000, True),
        (3350, 64, 14000, False),
        (3350, 16, 14000, True),
        (3350, 16, 4096, False),
    ):
        monkeypatch.setattr(hopper, "_memory_speed", lambda index, speed=speed: speed)
        _dense, crow, col, values = random_bsr(768, 768, blocksize, dtype=torch.bfloat16)
        x = torch.empty(M, 768, dtype=torch.bfloat16)
        assert hopper.supports(x, crow, col, values, None, "none", None) is served


@needs_compiler
def test_a_launcher_serves_tensors_with_leading_dimensions(monkeypatch):
    launches = []

    def kernel(grid, index, tensors, *numbers, descriptors):
        shapes = [(d.shape, d.strides, d.block_shape) for d in descriptors]
        bases = [d.base.data_ptr() for d in descriptors[:2]]
        launches.append((grid, [t.data_ptr() for t in tensors[:-1]], numbers, shapes, bases))

    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    monkeypatch.setattr(hopper, "_kernel", lambda *settings: kernel)
    hopper._launcher.cache_clear()
    _dense, crow, col, values = random_bsr(768, 704, 64, dtype=torch.bfloat16)
    bias = torch.zeros(768, dtype=torch.bfloat16)
    plan = build_plan(crow, col, 11, (64, 64))
    x = torch.empty(4200, 720, dtype=torch.bfloat16)[:, :704]
    y = hopper.forward(x, crow, col, values, bias, "relu", plan)
    run = hopper.launcher(x, crow, values, bias, "relu", plan)
    again = run(x.unflatten(0, (6, 700)), crow, col, values, bias, plan, (6, 700, 768))
    hopper._launcher.cache_clear()
    assert y.shape == (4200, 768) and again.shape == (6, 700, 768)
    first, second = launches
    assert first == second
    assert first[3][0][:2] == ([4200, 704], [720, 1]) and first[3][2][:2] == ([4200, 768], [768, 1])


@needs_compiler
def test_layers_whose_output_is_stored_in_other_pieces_have_other_kernels(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, function, constants, **options):
            made.append(self)
            self.boxes = set()

        def __call__(self, *arguments, descriptors):
            self.boxes.add(tuple(tuple(d.block_shape) for d in descriptors))

    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    monkeypatch.setattr(hopper, "Kernel", Recorded)
    hopper._launcher.cache_clear()
    hopper._kernel.cache_clear()
    x = torch.empty(4096, 768, dtype=torch.bfloat16)
    for sparsity in (0.5, 0.9, 0.6, 0.95):
        _dense, crow, col, values = random_bsr(768, 768, 32, sparsity, torch.bfloat16)
        plan = build_plan(crow, col, 24, (32, 32))
        hopper.forward(x, crow, col, values, None, "none", plan, tile=hopper.COPIED_32)
        hopper.forward(x, crow, col, values, None, "none", None, tile=hopper.COPIED_32)
    hopper._launcher.cache_clear()
    hopper._kernel.cache_clear()
    assert len(made) == 3  # two with a plan, one without
    assert all(len(kernel.boxes) == 1 for kernel in made)
    assert {boxes[2][1] for kernel in made for boxes in kernel.boxes} == {32, 64}


@pytest.mark.parametrize("dynamic", [False, True])
def test_only_dynamic_schedules_overlap_what_is_before_them(dynamic):
    options = hopper.options(hopper.TWO_STRIPS._replace(dynamic=dynamic), overlap=True)
    assert options.get("launch_pdl", False) is dynamic


def test_exact_float32_follows_torchs_switch(set_precision):
    set_precision("tf32")
    assert not hopper._exact(torch.float32)
    set_precision("ieee")
    assert hopper._exact(torch.float32)
    assert not hopper._exact(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# On a Hopper GPU.


def _hopper_or_skip():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    reason = hopper.unavailable_reason(torch.cuda.current_device())
    if reason is not None:
        pytest.skip(reason)


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
    y = hopper.forward(x, crow, col, values, b, activation, plan, tile=tile)
    z = x.double() @ dense.double().t() + (0 if b is None else b.double())
    assert y.shape == (M, N) and y.is_contiguous() and y.dtype == dtype
    error = relative_error(y, ACTIVATIONS[activation](z))
    assert error <= bound, error
    again = hopper.forward(x, crow, col, values, b, activation, plan, tile=tile)
    assert torch.equal(y, again), "the same inputs gave other bits"
    ungrouped = hopper.forward(x, crow, col, values, b, activation, None, tile=tile)
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
    tile = getattr(hopper, tile)
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
    tiles = hopper.candidates(768 // r, 768 // c, r, c, dtype, exact=exact)
    assert tiles or (dtype == torch.float32 and c == 16)
    for tile in tiles:
        _check(2100, 768, 768, blocksize, dtype, bound, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_repeated_calls_launch_at_once_and_agree(monkeypatch, dynamic):
    _hopper_or_skip()
    from torchao_superblock.ops import cuda, direct

    tile = hopper.SHORT_TILES._replace(dynamic=dynamic, grouped=True)
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(cuda, "hopper_kernel", lambda *call: partial(hopper.forward, tile=tile))
    _dense, crow, col, values = random_bsr(768, 704, 64, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(768, device="cuda").bfloat16()
    plan = build_plan(crow, col, 11, (64, 64))
    weight = (crow, col, values, bias, None, "gelu", plan)
    call = torch.ops.torchao_superblock.bsr_linear
    direct.forget()
    with torch.inference_mode():
        for shape in ((2100, 704), (3, 700, 704)):
            for _ in range(4):
                x = torch.randn(shape, device="cuda").bfloat16()
                y = call(x, *weight)
                flat = x.view(-1, 704)
                expected = hopper.forward(flat, crow, col, values, bias, "gelu", plan, tile=tile)
                assert torch.equal(y, expected.view(*shape[:-1], 768))
            run = direct.find(x, *weight)
            assert run is not None and torch.equal(run(x, *weight), y)
            # Other tensors in the same place, and one that TMA cannot read.
            assert torch.equal(run(x + 1, *weight), call(x + 1, *weight))
            moved = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(shape)
            assert run(moved.copy_(x), *weight) is None
    direct.forget()


@pytest.mark.gpu
def test_slow_memory_is_an_h100_s():
    _hopper_or_skip()
    name = torch.cuda.get_device_name()
    if "H200" not in name and "H100" not in name:
        pytest.skip(f"neither an H100 nor an H200: {name}")
    assert hopper._slow_memory(0) is ("H100" in name)


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
    assert cuda.hopper_kernel(x, crow, col, values, None, "none", own, 0) is not None
    right = cuda.grad_x(x, crow, col, values, own, 12)
    assert right.isfinite().all()
    assert cuda.grad_x(x, crow, col, values, other, 12).isnan().all()
    y = cuda.forward(x, crow, col, values, None, "none", own)
    assert torch.equal(y, cuda.forward(x, crow, col, values, None, "none", other))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_extremes_are_torch_s(activation, dtype):
    _hopper_or_skip()
    _, crow, col, values = random_bsr(768, 768, 64, 0.8, dtype, "cuda")
    bias = torch.tensor(EXTREMES, device="cuda").repeat(768)[:768].to(dtype)
    x = torch.zeros(9000, 768, device="cuda", dtype=dtype)
    y = hopper.forward(x, crow, col, values, bias, activation, None)
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
    tile = getattr(hopper, tile)
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
        tile = getattr(hopper, name)
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
        expected = hopper.forward(*call, tile=hopper.TWO_STRIPS)
        z = torch.nn.functional.gelu(x.double() @ dense.double().t() + bias.double())
        assert relative_error(expected, z) <= 5e-4
        for tile in (hopper.PAIRS, hopper.PAIRS_TALL):
            for _ in range(5):
                y = hopper.forward(*call, tile=tile._replace(dynamic=dynamic))
                assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "r", "c"),
    [("THREE_STRIPS", 64, 64), ("TWO_STRIPS", 128, 128), ("THREE_STRIPS", 32, 64)],
)
@pytest.mark.parametrize("M", [2048, 8000])
@pytest.mark.parametrize(
    "change", [{"dynamic": True}, {"halves": True}, {"dynamic": True, "halves": True}]
)
def test_every_schedule_gives_the_same_bits(name, r, c, M, change):
    """Rows of very different lengths, empty ones among them; fewer tiles than programs, and many more."""
    _hopper_or_skip()
    R, C = 4096 // r, 2048 // c
    mask = torch.rand(R, C) < torch.linspace(0, 1, R)[torch.randperm(R), None] ** 2
    mask[:2] = False
    tile = getattr(hopper, name)
    changed = tile._replace(**change)
    for N in (4096, 128):
        for _ in range(3):
            some = mask[-(N // r) :]
            _check(M, N, 2048, (r, c), torch.bfloat16, 4e-3, mask=some, tile=changed)
    _dense, crow, col, values = random_bsr(4096, 2048, (r, c), 0, torch.bfloat16, "cuda", mask=mask)
    x = torch.randn(M, 2048, device="cuda").bfloat16()
    plan = build_plan(crow, col, C, (r, c))
    arguments = (x, crow, col, values, None, "none", plan)
    dealt = hopper.forward(*arguments, tile=tile)
    assert torch.equal(dealt, hopper.forward(*arguments, tile=changed))


@needs_compiler
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

    monkeypatch.setattr(hopper.kernels, "gl", Numbers)
    whole = m_tiles * groups
    tile = hopper.THREE_STRIPS._replace(halves=cut, dynamic=dynamic)
    tiles, halves = hopper._split_last(whole, tile, 132)
    assert halves == (2 * (whole % 132) if cut and whole % 132 <= 66 else 0)
    assert halves <= 132, "more than a round"
    turn = hopper._turn(tile, programs, groups, 8192)
    assert turn == 4 or not dynamic
    program = SimpleNamespace(
        **{"tiles": tiles, "halves": halves, "groups": groups, "turn": turn},
        **{"DYNAMIC": dynamic, "HALVES": cut},
    )
    found = [hopper.kernels.tile_at.fn(program, t, 256) for t in range(tiles)]
    assert all(half == (t >= tiles - halves) for t, (_m, _group, half) in enumerate(found))
    parts = [(m + 128 * p, group) for m, group, half in found for p in range(1 if half else 2)]
    assert sorted(parts) == [
        (m * 128, group) for m in range(2 * m_tiles) for group in range(groups)
    ]
    if not dynamic and not halves and tiles >= programs * groups:
        for program in range(programs):
            assert {group for _m, group, _half in found[program::programs]} == set(range(groups))


@pytest.mark.parametrize(
    ("name", "token_bytes", "last"),
    [
        ("THREE_STRIPS_DYNAMIC", 4096 * 2, 4),
        ("EXACT", 768 * 4, 8),
        ("TF32_THREE_DYNAMIC", 14336 * 4, 4),
        ("TWO_STRIPS_DYNAMIC", 10**6, 1),
    ],
)
def test_tiles_drawn_last_are_few_and_fit_the_l2_cache(name, token_bytes, last):
    tile = getattr(hopper, name)
    assert hopper._turn(tile, 132, 22, token_bytes) == last
    assert last == 1 or last * tile.tokens * token_bytes <= 30e6


@pytest.fixture
def activate(monkeypatch):
    """The kernel's own arithmetic of an activation, in float32 on the CPU."""

    class Tensors:
        abs = staticmethod(torch.abs)
        minimum = staticmethod(lambda a, b: a.clamp(max=b))

    monkeypatch.setattr(hopper.kernels, "gl", Tensors)
    monkeypatch.setattr(hopper.kernels, "_positive", torch.relu)
    monkeypatch.setattr(hopper.kernels, "_exp2", torch.exp2)
    monkeypatch.setattr(hopper.kernels, "_reciprocal", torch.reciprocal)
    return hopper.kernels.activate.fn


@needs_compiler
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 4.0])
def test_activations_of_float32_have_float32_accuracy(activate, scale, activation):
    z = torch.randn(100_000) * scale
    expected = ACTIVATIONS[activation](z.double())
    assert relative_error(activate(z, True, activation), expected) <= 1e-7


@needs_compiler
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
    y = hopper.forward(x, crow, col, values, bias, activation, None)
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
    y = hopper.forward(x, crow, col, values, None, "none", None)
    assert torch.isnan(y[7]).all() and torch.isnan(y).sum() == 128
    x[7, 70] = 0
    values[1, 3, 5] = nan  # block row 0, block column 1: output 3
    y = hopper.forward(x, crow, col, values, None, "none", None)
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
            hopper.forward(x, crow, broken, values, None, "none", None)
        broken = crow.clone()
        broken[3:7] = 2**30
        broken[7] = -9
        hopper.forward(x, broken, col, values, None, "none", None)
        plan = build_plan(crow, col, 768 // blocksize)
        for bad in (-5, 2**30):
            tile = hopper.THREE_STRIPS if blocksize == 64 else None
            hopper.forward(x, crow, col, values, None, "none", plan * 0 + bad, tile=tile)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_call_can_be_captured_in_a_cuda_graph():
    _hopper_or_skip()
    dense, crow, col, values = random_bsr(768, 768, 64, 0.8, torch.bfloat16, "cuda")
    x = torch.randn(2048, 768, device="cuda", dtype=torch.bfloat16)
    hopper.forward(x, crow, col, values, None, "none", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hopper.forward(x, crow, col, values, None, "none", None)
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
    drawn, dealt = hopper.THREE_STRIPS_DYNAMIC, hopper.THREE_STRIPS

    def chain(tile):
        # The allocator hands these out again: outputs that were never written, and a counter that ends all drawing.
        freed = [torch.full_like(start, float("nan")) for _ in range(4)]
        freed += [torch.full((1,), 2**30, device="cuda", dtype=torch.int32) for _ in range(4)]
        del freed
        y = start
        for _ in range(10):
            y = hopper.forward(y, crow, col, values, None, "none", plan, tile=tile)
        return y

    expected = chain(dealt)
    assert all(torch.equal(chain(drawn), expected) for _ in range(3))
    assert_replays(lambda: chain(drawn), expected)
    first = hopper.forward(start, crow, col, values, None, "none", plan, tile=drawn)
    assert relative_error(first, start.double() @ dense.double().t()) <= 4e-3
