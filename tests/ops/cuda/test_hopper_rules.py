"""What the rules of the Gluon kernel promise: a tile for each problem that it serves, which fits, and no other."""

import pytest
import torch

from tests.ops.cuda.hopper_cases import SHAPES, Product, grid, hopper


def test_a_problem_has_a_choice_exactly_where_tuning_has_candidates():
    served = 0
    for problem in grid():
        for clusters in {False, hopper.kernels.CLUSTERS}:
            tile, tiles = problem.tile(clusters), problem.tiles()
            assert (tile is None) == (not tiles), problem
            assert tile is None or tile in tiles, problem
            served += tile is not None
    assert served > 5000


def test_what_is_chosen_or_tried_fits_in_shared_memory():
    """Also with the largest tables of masks, which long rows and many of them make."""
    per_multiprocessor, kept = 233472, 1024
    large = [(8192, 57344, 8192), (8192, 16384, 28672), (8192, 8192, 16384), (8192, 16384, 4096)]
    problems = [p for p in grid() if p.activation == "none" and not p.slow_memory]
    problems += [p._replace(M=M, N=N, K=K) for p in problems for M, N, K in large]
    for problem in dict.fromkeys(problems):
        for tile in {problem.tile(), *problem.tiles()} - {None}:
            used = tile.programs * (problem.shared_bytes(tile) + kept)
            assert used <= per_multiprocessor, (problem, tile)


def test_clusters_are_chosen_only_where_triton_has_them():
    clusters = 0
    for problem in grid():
        single, chosen = problem.tile(clusters=False), problem.tile(clusters=True)
        assert single is None or not single.cluster
        assert chosen == single or chosen.cluster
        clusters += chosen != single
        if chosen is not None and chosen.cluster:
            # They copy whole blocks, of which a strip holds one or a part of one, for long rows of x.
            assert min(problem.r, problem.c) >= 64 and problem.K >= 4096
            assert problem.dtype == torch.bfloat16
    assert clusters


@pytest.mark.parametrize("slow_memory", [False, True])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_an_activation_costs_no_choice(M, N, K, slow_memory):
    """Fusing one may take another tile, never the kernel."""
    for r in (32, 64, 128):
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu"):
            plain = Product(M, N, K, r, 64, 0.1, slow_memory=slow_memory)
            assert plain._replace(activation=activation).tile() is not None
            assert plain._replace(activation="relu").tile() == plain.tile()


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
    problem = Product(50432, 16 * r, 16 * c, r, c, dtype=dtype)
    assert problem.tile() is None and problem.tiles() == []


def test_a_grid_with_too_many_masks_for_shared_memory_is_declined():
    problem = Product(50432, 14336, 14336, 16, 16, 0.001)
    assert problem.tile() is None and problem.tiles() == []
