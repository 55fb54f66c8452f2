"""How a call of the Gluon kernel becomes a launch: programs, boxes, and what is compiled once for many."""

import pytest
import torch

from tests.ops.cuda.hopper_cases import Product, hopper, needs_clusters, with_plan
from tests.reference import random_bsr
from torchao_superblock.ops import build_plan
from torchao_superblock.ops.plan import is_mixed


@needs_clusters
@pytest.mark.parametrize(("M", "clusters"), [(16384, 66), (300, 4)])
def test_a_cluster_is_launched_for_two_multiprocessors(M, clusters):
    product = Product(M, 384, 28672, 64, 64, 0.02)
    tile = next(tile for tile in product.tiles() if tile.cluster and tile.strips == 3)
    asked = product.asked()
    launch = hopper.launch(asked._replace(device=asked.device._replace(processors=133)), tile)
    assert launch.programs == clusters and launch.options["num_ctas"] == 2
    assert launch.numbers[:3] == (-(-M // 256) * 2, 1, 2)
    assert [box for *_, box, _layout in launch.descriptors] == [[256, 64], [64, 64], [256, 64]]
    # Each cluster has numbers of its own, after the counter.
    assert launch.counters == hopper.kernels.CLUSTER_NUMBERS.value * (1 + clusters)


@pytest.mark.parametrize("overlap", [False, True])
def test_only_dynamic_schedules_have_a_counter_and_overlap_what_is_before_them(overlap):
    problem = Product(8192, 4096, 14336, 64, 64)
    asked = problem.asked()
    asked = asked._replace(device=asked.device._replace(overlaps=overlap))
    for tile in problem.tiles():
        launch = hopper.launch(asked, tile)
        assert (launch.counters > 0) is (tile.schedule == "dynamic")
        assert launch.options.get("launch_pdl", False) is (tile.schedule == "dynamic" and overlap)


def test_a_launcher_serves_tensors_with_leading_dimensions():
    launches = []

    def kernel(grid, index, tensors, *numbers, described, of):
        descriptors = described.describe(*of)
        shapes = [(d.shape, d.strides, d.block_shape) for d in descriptors]
        bases = [d.base.data_ptr() for d in descriptors[:2]]
        launches.append((grid, [t.data_ptr() for t in tensors[:-1]], numbers, shapes, bases))

    kernel.empty = lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    _dense, crow, col, values = random_bsr(768, 704, 64, dtype=torch.bfloat16)
    bias = torch.zeros(768, dtype=torch.bfloat16)
    plan = build_plan(crow, col, 11, (64, 64))
    x = torch.empty(4200, 720, dtype=torch.bfloat16)[:, :704]
    product = Product(4200, 768, 704, 64, 64, activation="relu")
    asked = product.asked()._replace(nnz=values.shape[0], strides=(720, 1))
    asked = asked._replace(plan_entries=plan.shape[0])
    for tile in product.tiles():
        run = hopper.runner(asked, hopper.launch(asked, tile), kernel)
        y = run(x, crow, col, values, bias, plan, (4200, 768))
        again = run(x.unflatten(0, (6, 700)), crow, col, values, bias, plan, (6, 700, 768))
        assert y.shape == (4200, 768) and again.shape == (6, 700, 768)
        assert y.is_contiguous() and again.is_contiguous()
        first, second = launches[-2:]
        assert first == second
        of_x, _of_values, of_y = first[3]
        assert of_x[:2] == ([4200, 704], [720, 1]) and of_y[:2] == ([4200, 768], [768, 1])


def test_boxes_beyond_the_last_features_are_left_to_tma():
    """Tiles cover whole blocks, also where the plan puts the last block row elsewhere; descriptors end with x and y."""
    for r, N, K in ((64, 1000, 776), (32, 1000, 776), (128, 1040, 776), (16, 1016, 776)):
        padded = Product(8192, N, K, r, 64)
        R, C = padded.grid
        whole = padded._replace(N=R * r, K=C * 64)
        for tile in padded.tiles():
            launch = padded.launch(tile)
            assert launch.numbers == whole.launch(tile).numbers
            of_x, of_values, of_y = launch.descriptors
            assert of_x[:2] == ([8192, K], [K, 1]) and of_y[:2] == ([8192, N], [N, 1])
            assert of_values == whole.launch(tile).descriptors[1]


def test_layers_whose_output_is_stored_in_other_pieces_have_other_kernels():
    kernels = {}
    tile = next(tile for tile in Product(4096, 768, 768, 32, 32).tiles() if tile.grouped)
    for sparsity in (0.5, 0.9, 0.6, 0.95):
        _dense, crow, col, values = random_bsr(768, 768, 32, sparsity, torch.bfloat16)
        plan = build_plan(crow, col, 24, (32, 32))
        asked = Product(4096, 768, 768, 32, 32).asked()._replace(nnz=values.shape[0])
        planned = with_plan(asked, is_mixed(plan, 24, 24, values.shape[0]))
        for launch in (hopper.launch(asked, tile), hopper.launch(planned, tile)):
            _shape, _strides, box, _layout = launch.descriptors[2]
            kernels.setdefault(launch.compiled_for, set()).add(tuple(box))
    assert len(kernels) == 3  # two with a plan, one without
    assert all(len(boxes) == 1 for boxes in kernels.values())
    assert {width for boxes in kernels.values() for _tokens, width in boxes} == {32, 64}


def test_numbers_that_triton_makes_constants_of_have_other_kernels():
    """`turn` is 1 where the groups do not divide the programs."""
    tile = next(t for t in Product(50432, 768, 768, 64, 64).tiles() if t.schedule == "static")
    launches = [Product(50432, N, 768, 64, 64).launch(tile) for N in (768, 3072, 1344, 960)]
    turns = [launch.numbers[3] for launch in launches]
    constants = {launch.compiled_for[2:] for launch in launches}
    assert 1 in turns and max(turns) > 1 and len(constants) == 1
    for a in launches:
        for b in launches:
            same = (a.numbers[3] == 1) == (b.numbers[3] == 1)
            assert (a.compiled_for == b.compiled_for) == same
