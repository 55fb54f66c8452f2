"""The schedules of the Gluon kernel: which tile a program works on when, and that no schedule changes a result."""

from types import SimpleNamespace

import pytest
import torch

from tests.ops.cuda.hopper_cases import (
    Product,
    arithmetic,
    by_epilogue,
    check,
    forward,
    hopper,
    hopper_or_skip,
    needs_clusters,
)
from tests.reference import assert_replays, random_bsr, relative_error
from torchao_superblock.ops import build_plan
from torchao_superblock.ops.cuda.tiles import HopperTile

PROCESSORS = 132  # of the H200 that Product.launch() asks for


def _work(launch: hopper.Launch, tile: HopperTile) -> list[tuple[int, int, bool]]:
    """The kernel's own arithmetic: the first token, the group and whether it is half, of each of a launch's tiles."""
    tile_at = arithmetic(
        hopper.kernels.tile_at,
        {"where": lambda condition, a, b: a if condition else b, "minimum": min},
    )
    tiles, halves, groups, turn = launch.numbers[:4]
    program = SimpleNamespace(
        tiles=tiles,
        halves=halves,
        groups=groups,
        turn=turn,
        DYNAMIC=launch.constants["DYNAMIC"],
        HALVES=launch.constants["HALVES"],
    )
    tokens = (2 if tile.cluster else 1) * tile.tokens
    return [tile_at(program, t, tokens) for t in range(tiles)]


def _schedules(problem: Product) -> list[HopperTile]:
    """Tiles that tuning tries, each with every schedule that it can have."""
    found = []
    for tile in problem.tiles():
        for schedule in ("static", "dynamic"):
            found.append(tile._replace(schedule=schedule, halves=False))
            if tile.parts == 2 and tile.y_stages == 1:
                found.append(tile._replace(schedule=schedule, halves=True))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("M", [200, 1200, 8192, 50432])
@pytest.mark.parametrize("N", [128, 768, 1152, 2304, 4096])
def test_every_output_is_worked_on_once(M, N):
    problem = Product(M, N, 4096, 64, 64)
    for tile in _schedules(problem):
        launch = problem.launch(tile)
        work = _work(launch, tile)
        step = (2 if tile.cluster else 1) * tile.tokens // 2
        halves = [(m + i * step, group) for m, group, half in work for i in range(1 if half else 2)]
        groups = -(-N // (64 * tile.strips))
        tokens = range(0, -(-M // (2 * step)) * 2 * step, step)
        assert sorted(halves) == [(m, group) for m in tokens for group in range(groups)], tile
        assert launch.programs <= len(work)


@pytest.mark.parametrize("M", [1200, 8192, 50432])
@pytest.mark.parametrize("N", [768, 2304, 4096])
def test_only_a_last_round_that_half_of_the_programs_would_sit_out_is_cut_in_halves(M, N):
    problem = Product(M, N, 4096, 64, 64)
    for tile in _schedules(problem):
        work = _work(problem.launch(tile), tile)
        cut = [half for _m, _group, half in work]
        running = tile.programs * PROCESSORS
        left = problem.launch(tile._replace(halves=False)).numbers[0] % running
        assert sum(cut) == (2 * left if tile.halves and 2 * left <= running else 0)
        assert cut == sorted(cut), "halves come last"


@pytest.mark.parametrize("groups", [1, 4, 6, 11, 16, 22])
def test_by_a_static_schedule_every_program_meets_all_groups(groups):
    problem = Product(394 * 256, groups * 192, 4096, 64, 64)
    static = [
        t for t in problem.tiles() if t.strips == 3 and t.schedule == "static" and not t.halves
    ]
    assert static
    for tile in static:
        launch = problem.launch(tile)
        work = _work(launch, tile)
        assert len(work) >= launch.programs * groups
        for program in range(launch.programs):
            assert {g for _m, g, _half in work[program :: launch.programs]} == set(range(groups))


@pytest.mark.parametrize("K", [768, 4096, 14336, 57344])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_taken_last_are_few_and_fit_the_l2_cache(dtype, K):
    problem = Product(50432, 4096, K, 128, 128, dtype=dtype)
    dynamic = [tile for tile in problem.tiles() if tile.schedule == "dynamic"]
    assert dynamic
    for tile in dynamic:
        tokens = (2 if tile.cluster else 1) * tile.tokens
        turn = problem.launch(tile).numbers[3]
        assert turn >= 1
        assert turn == 1 or (turn * tokens <= 1024 and turn * tokens * K * dtype.itemsize <= 30e6)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1024, 320])
def test_strips_past_the_end_leave_the_output_of_the_others_alone(N):
    """Many tiles a program, and a last group that is not full: its strips must not touch buffers in use."""
    hopper_or_skip()
    for tile in by_epilogue(Product(50432, N, 1024, 64, 64).tiles()):
        for _ in range(3):
            check(50432, N, 1024, 64, torch.bfloat16, 4e-3, sparsity=0.9, tile=tile)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("r", "c"), [(64, 64), (128, 128), (128, 64), (64, 128), (256, 64)])
@pytest.mark.parametrize(("M", "N"), [(2048, 4096), (8111, 4096), (2048, 768), (300, 256)])
def test_clusters_give_the_bits_of_single_programs(M, N, r, c, dynamic):
    """Rows of very different lengths, half of them empty; fewer tiles than clusters, and many more."""
    hopper_or_skip()
    R, C = N // r, 2048 // c
    tiles = Product(M, N, 2048, r, c, dtype=torch.float16).tiles()
    single = next(tile for tile in tiles if not tile.cluster)
    clusters = [tile for tile in tiles if tile.cluster]
    assert clusters
    for power in (2, 20):  # hardly any blocks: tiles are taken faster than anything is copied
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
        expected = forward(*call, tile=single)
        z = torch.nn.functional.gelu(x.double() @ dense.double().t() + bias.double())
        assert relative_error(expected, z) <= 5e-4
        for tile in clusters:
            for _ in range(5):
                y = forward(*call, tile=tile._replace(schedule="dynamic" if dynamic else "static"))
                assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("r", "c"), [(64, 64), (128, 128), (32, 64)])
@pytest.mark.parametrize("M", [2048, 8000])
@pytest.mark.parametrize(
    "change", [{"schedule": "dynamic"}, {"halves": True}, {"schedule": "dynamic", "halves": True}]
)
def test_every_schedule_gives_the_same_bits(r, c, M, change):
    """Rows of very different lengths, empty ones among them; fewer tiles than programs, and many more."""
    hopper_or_skip()
    R, C = 4096 // r, 2048 // c
    mask = torch.rand(R, C) < torch.linspace(0, 1, R)[torch.randperm(R), None] ** 2
    mask[:2] = False
    # Those that can be cut in halves.
    static = [
        tile
        for tile in Product(M, 4096, 2048, r, c).tiles()
        if tile.parts == 2 and tile.y_stages == tile.programs == 1
        if tile.schedule == "static" and not tile.halves
    ]
    assert {tile.strips for tile in static} == {2, 3}
    for tile in static:
        changed = tile._replace(**change)
        for N in (4096, 128):
            for _ in range(3):
                some = mask[-(N // r) :]
                check(M, N, 2048, (r, c), torch.bfloat16, 4e-3, mask=some, tile=changed)
        _dense, crow, col, values = random_bsr(
            4096, 2048, (r, c), 0, torch.bfloat16, "cuda", mask=mask
        )
        x = torch.randn(M, 2048, device="cuda").bfloat16()
        plan = build_plan(crow, col, C, (r, c))
        call = (x, crow, col, values, None, "none", plan)
        expected = forward(*call, tile=tile)
        assert torch.equal(expected, forward(*call, tile=changed))


@pytest.mark.gpu
def test_tiles_of_a_dynamic_schedule_follow_what_was_launched_before():
    """The kernel may start while its counter is still being zeroed: neither that nor its x is read too early."""
    hopper_or_skip()
    dense, crow, col, values = random_bsr(1024, 1024, 64, 0.9, torch.bfloat16, "cuda")
    plan = build_plan(crow, col, 16, (64, 64))
    start = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16)  # three tiles a program
    tiles = Product(16384, 1024, 1024, 64, 64).tiles()
    dynamic = next(
        tile for tile in tiles if tile.schedule == "dynamic" and tile.grouped and not tile.cluster
    )
    static = dynamic._replace(schedule="static")

    def chain(tile):
        # The allocator hands these out again: outputs that were never written, and a counter that ends all work.
        freed = [torch.full_like(start, float("nan")) for _ in range(4)]
        freed += [torch.full((1,), 2**30, device="cuda", dtype=torch.int32) for _ in range(4)]
        del freed
        y = start
        for _ in range(10):
            y = forward(y, crow, col, values, None, "none", plan, tile=tile)
        return y

    expected = chain(static)
    assert all(torch.equal(chain(dynamic), expected) for _ in range(3))
    assert_replays(lambda: chain(dynamic), expected)
    first = forward(start, crow, col, values, None, "none", plan, tile=dynamic)
    assert relative_error(first, start.double() @ dense.double().t()) <= 4e-3
