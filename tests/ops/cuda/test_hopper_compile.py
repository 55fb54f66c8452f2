"""The Gluon kernel, compiled for sm_90.

That needs no GPU, so what a GPU would refuse (too much shared memory, spilled registers, a product that is not on the
tensor cores) fails here first.
"""

import pytest
import torch

from tests.ops.cuda.hopper_cases import (
    Product,
    compiled,
    needs_clusters,
    one_for_each_choice,
    shared_limit,
    spilled,
)

CHOSEN = one_for_each_choice()


def _spill_bound(problem: Product) -> int:
    """Bytes that a thread may spill; narrow and low blocks leave it few registers besides the accumulators."""
    if problem.exact:
        return 16  # Triton 3.9; 0 with 3.6
    return 0 if min(problem.r, problem.c) >= 64 or problem.dtype == torch.float32 else 128


@pytest.mark.parametrize("problem", list(CHOSEN.values()), ids=str)
def test_every_tile_of_the_rules_compiles_for_hopper(problem, tmp_path):
    tile = problem.tile()
    launch = problem.launch(tile)
    kernel = compiled(problem, tile)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.bulk.tensor.2d.global" in ptx
    # Of 16 bits, the output leaves through transposing matrix stores.
    assert ("stmatrix.sync.aligned.m8n8.x4.trans" in ptx) == (problem.dtype == torch.bfloat16)
    if launch.constants["LOAD"] == "cp_async":
        assert "cp.async.cg.shared.global" in ptx and "cp.async.mbarrier.arrive.noinc" in ptx
    # A dynamic schedule: the counter is being zeroed until the wait is over.
    assert (
        ptx.count("griddepcontrol.wait")
        == ptx.count("atom.global.add")
        == (tile.schedule == "dynamic")
    )
    assert ptx.find("griddepcontrol.wait") <= ptx.find("atom.global.add")
    assert kernel.metadata.shared <= shared_limit(tile)
    assert kernel.metadata.shared <= problem.shared_bytes(tile) <= kernel.metadata.shared + 1024
    assert kernel.metadata.global_scratch_size == 0, "a call would allocate a workspace"
    assert spilled(kernel, tmp_path) <= _spill_bound(problem)


@pytest.mark.parametrize("problem", list(CHOSEN.values()), ids=str)
def test_padding_of_the_last_blocks_costs_whole_ones_nothing(problem):
    """It is a constant, so kernels for whole blocks are not compiled with it, and boxes are the same."""
    tile = problem.tile()
    whole, padded = (problem._replace(N=N).launch(tile) for N in (problem.N, problem.N - 8))
    assert whole.constants["PADDING"] == 0 and padded.constants["PADDING"] == 8
    assert whole.constants | {"PADDING": 8} == padded.constants
    assert whole.numbers == padded.numbers and whole.options == padded.options
    of_x, of_values, of_y = padded.descriptors
    assert (of_x, of_values) == whole.descriptors[:2] and of_y[2:] == whole.descriptors[2][2:]
    assert of_y[:2] == ([problem.M, problem.N - 8], [problem.N - 8, 1])


def _padded():
    """One problem for each way in which outputs leave a program, and a cluster's."""
    found = {}
    for tile, problem in CHOSEN.items():
        way = (tile.load, problem.r < 64, problem.exact, problem.dtype, tile.cluster)
        found.setdefault(way, problem._replace(N=problem.N - 8, K=problem.K - 8))
    return list(found.values())


@pytest.mark.parametrize("problem", _padded(), ids=str)
def test_padded_blocks_compile_for_hopper(problem, tmp_path):
    tile = problem.tile()
    launch = problem.launch(tile)
    assert launch.constants["PADDING"] == 8
    kernel = compiled(problem, tile)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= shared_limit(tile)
    assert spilled(kernel, tmp_path) <= _spill_bound(problem)


def _variants():
    """Problems of every kind with tiles that tuning tries and no rule has for them."""
    known = {(tile, problem.r, problem.c) for tile, problem in CHOSEN.items()}
    for r, c, dtype, exact in (
        (64, 64, torch.bfloat16, False),
        (16, 16, torch.bfloat16, False),
        (32, 32, torch.bfloat16, False),
        (64, 32, torch.bfloat16, False),
        (64, 64, torch.float32, False),
        (64, 64, torch.float32, True),
    ):
        problem = Product(50432, 3072, 768, r, c, dtype=dtype, exact=exact)
        for tile in problem.tiles():
            if (tile, r, c) not in known:
                yield pytest.param(problem, tile, id=f"{problem}-{tile}")


@pytest.mark.parametrize(("problem", "tile"), list(_variants()))
def test_what_only_tuning_tries_compiles(problem, tile):
    kernel = compiled(problem, tile)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= shared_limit(tile)


def _long_rows():
    """Problems with long rows and an activation, one for each tile that the rules choose for them."""
    found = {}
    for r, share, slow in ((r, s, slow) for r in (64, 128) for s in (0.1, 0.3) for slow in (0, 1)):
        for N in (4096, 14336):
            problem = Product(
                *(8192, N, 14336, r, r, share), activation="gelu", slow_memory=bool(slow)
            )
            found.setdefault(problem.tile(), problem)
    return list(found.values())


@pytest.mark.parametrize("problem", _long_rows(), ids=str)
def test_activations_of_long_rows_fit_in_registers(problem, tmp_path):
    assert spilled(compiled(problem, problem.tile()), tmp_path) == 0


@pytest.mark.parametrize(
    ("r", "dtype"), [(64, torch.bfloat16), (16, torch.bfloat16), (32, torch.float32)]
)
def test_static_schedules_in_longer_turns_compile(r, dtype, tmp_path):
    """Where the groups divide the programs, `turn` is no constant."""
    problem = Product(50432, 768, 3072, r, r, 0.3, dtype)
    tile = next(tile for tile in problem.tiles() if tile.schedule == "static" and tile.strips == 3)
    launch = problem.launch(tile)
    assert launch.programs == 132 and launch.numbers[2:4] == (4, 33)
    kernel = compiled(problem, tile)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert spilled(kernel, tmp_path) <= 96


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("R", [256, 1024, 2048])
def test_the_largest_table_for_float32_fits(R, exact):
    problem = Product(8192, R * 64, 64 * 64, 64, 64, 0.1, torch.float32, exact)
    tile = problem.tile()
    assert (tile is None) == (not problem.tiles()) == (exact and R == 2048)
    if tile is not None:
        assert compiled(problem, tile).metadata.shared <= shared_limit(tile)


@needs_clusters
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("problem", [p for tile, p in CHOSEN.items() if tile.cluster], ids=str)
def test_clusters_copy_blocks_once_for_both(problem, dynamic):
    tile = problem.tile()._replace(schedule="dynamic" if dynamic else "static")
    launch = problem.launch(tile)
    ptx = compiled(problem, tile).asm["ptx"]
    assert ".reqnctapercluster 2" in ptx
    slices = launch.constants["SLICES_PER_COLUMN"]
    of_both = ptx.count(".multicast::cluster")
    assert of_both == tile.strips * slices
    # The others copy x, unrolled.
    assert ptx.count("cp.async.bulk.tensor.2d.shared") - of_both == slices
    # Nobody arrives at barriers that are not made yet.
    made = ptx.find("fence.mbarrier_init.release.cluster")
    assert 0 < made < ptx.find("barrier.cluster.arrive.relaxed", made)
    # The other program arrives at barriers of the first, which must outlive that.
    assert "mbarrier.arrive.shared::cluster" in ptx
    assert ptx.rfind("mbarrier.arrive") < ptx.rfind("barrier.cluster.wait")


@pytest.mark.parametrize(
    ("c", "dtype", "exact", "activation", "halves"),
    [
        (64, torch.bfloat16, False, "none", True),
        (64, torch.bfloat16, False, "none", False),
        (32, torch.bfloat16, False, "none", False),
        (32, torch.bfloat16, False, "gelu", False),
        (16, torch.bfloat16, False, "none", False),
        (32, torch.float32, False, "none", False),
        (32, torch.float32, True, "gelu", False),
    ],
)
def test_strips_of_block_rows_that_lie_apart_compile(c, dtype, exact, activation, halves, tmp_path):
    problem = Product(50432, 3072, 768, 32, c, 0.3, dtype, exact, activation)
    tile = next(tile for tile in problem.tiles() if tile.grouped and tile.halves == halves)
    apart, whole = (compiled(problem, tile, mixed=mixed) for mixed in (True, False))
    store = "cp.async.bulk.commit_group"
    ptx = apart.asm["ptx"]
    assert ptx.count(store) == 2 * whole.asm["ptx"].count(store) > 0
    assert "wgmma.mma_async" in ptx
    assert ("stmatrix.sync.aligned.m8n8.x4.trans" in ptx) == (dtype == torch.bfloat16)
    assert apart.metadata.shared <= shared_limit(tile)
    assert spilled(apart, tmp_path) <= 16
