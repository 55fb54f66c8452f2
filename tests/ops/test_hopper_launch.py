"""How a call of the Gluon kernel becomes a launch: programs, boxes, and what is compiled once for many."""

import pytest
import torch

from tests.ops.hopper_cases import Problem, needs_clusters, needs_compiler
from tests.reference import random_bsr
from torchao_superblock.ops import build_plan, hopper
from torchao_superblock.ops.plan import is_mixed

pytestmark = needs_compiler


@needs_clusters
@pytest.mark.parametrize(("M", "clusters"), [(16384, 66), (300, 4)])
def test_a_cluster_is_launched_for_two_multiprocessors(M, clusters):
    problem = Problem(M, 384, 28672, 64, 64, 0.02)
    tile = next(tile for tile in problem.tiles() if tile.pair and tile.group == 3)
    call = hopper.Call(M, 28672, 0, 6, 64, 64, 50, torch.bfloat16)
    launch = hopper.launch(call, tile, processors=133)
    assert launch.programs == clusters and launch.options["num_ctas"] == 2
    assert launch.numbers[:3] == (-(-M // 256) * 2, 1, 2)
    assert [box for *_, box, _layout in launch.descriptors] == [[256, 64], [64, 64], [256, 64]]
    # Each cluster has numbers of its own, after the counter.
    assert launch.counters == hopper.kernels.CLUSTER_NUMBERS.value * (1 + clusters)


@pytest.mark.parametrize("overlap", [False, True])
def test_only_dynamic_schedules_have_a_counter_and_overlap_what_is_before_them(overlap):
    problem = Problem(8192, 4096, 14336, 64, 64)
    call = hopper.Call(8192, 14336, 14336, 64, 64, 64, 1000, torch.bfloat16)
    for tile in problem.tiles():
        launch = hopper.launch(call, tile, overlap=overlap)
        assert (launch.counters > 0) is tile.dynamic
        assert launch.options.get("launch_pdl", False) is (tile.dynamic and overlap)


def test_a_launcher_serves_tensors_with_leading_dimensions():
    launches = []

    def kernel(grid, index, tensors, *numbers, descriptors):
        shapes = [(d.shape, d.strides, d.block_shape) for d in descriptors]
        bases = [d.base.data_ptr() for d in descriptors[:2]]
        launches.append((grid, [t.data_ptr() for t in tensors[:-1]], numbers, shapes, bases))

    _dense, crow, col, values = random_bsr(768, 704, 64, dtype=torch.bfloat16)
    bias = torch.zeros(768, dtype=torch.bfloat16)
    plan = build_plan(crow, col, 11, (64, 64))
    x = torch.empty(4200, 720, dtype=torch.bfloat16)[:, :704]
    shape = (12, 64, 64, values.shape[0], torch.bfloat16)
    call = hopper.Call(4200, 704, 720, *shape, False, True, "relu", True)
    for tile in Problem(4200, 768, 704, 64, 64, activation="relu").tiles():
        run = hopper.runner(call, hopper.launch(call, tile), kernel, None)
        y = run(x, crow, col, values, bias, plan, (4200, 768))
        again = run(x.unflatten(0, (6, 700)), crow, col, values, bias, plan, (6, 700, 768))
        assert y.shape == (4200, 768) and again.shape == (6, 700, 768)
        assert y.is_contiguous() and again.is_contiguous()
        first, second = launches[-2:]
        assert first == second
        of_x, _of_values, of_y = first[3]
        assert of_x[:2] == ([4200, 704], [720, 1]) and of_y[:2] == ([4200, 768], [768, 1])


def test_layers_whose_output_is_stored_in_other_pieces_have_other_kernels():
    kernels = {}
    tile = next(tile for tile in Problem(4096, 768, 768, 32, 32).tiles() if tile.grouped)
    for sparsity in (0.5, 0.9, 0.6, 0.95):
        _dense, crow, col, values = random_bsr(768, 768, 32, sparsity, torch.bfloat16)
        plan = build_plan(crow, col, 24, (32, 32))
        call = hopper.Call(4096, 768, 768, 24, 32, 32, values.shape[0], torch.bfloat16)
        planned = call._replace(has_plan=True, mixed=is_mixed(plan, 24, 24, values.shape[0]))
        for launch in (hopper.launch(call, tile), hopper.launch(planned, tile)):
            _shape, _strides, box, _layout = launch.descriptors[2]
            kernels.setdefault(launch.compiled_for, set()).add(tuple(box))
    assert len(kernels) == 3  # two with a plan, one without
    assert all(len(boxes) == 1 for boxes in kernels.values())
    assert {width for boxes in kernels.values() for _tokens, width in boxes} == {32, 64}


def test_numbers_that_triton_makes_constants_of_have_other_kernels():
    """`turn` is 1 where the groups do not divide the programs."""
    tile = next(t for t in Problem(50432, 768, 768, 64, 64).tiles() if not t.dynamic)
    launches = [Problem(50432, N, 768, 64, 64).launch(tile) for N in (768, 3072, 1344, 960)]
    turns = [launch.numbers[3] for launch in launches]
    constants = {launch.compiled_for[2:] for launch in launches}
    assert 1 in turns and max(turns) > 1 and len(constants) == 1
    for a in launches:
        for b in launches:
            same = (a.numbers[3] == 1) == (b.numbers[3] == 1)
            assert (a.compiled_for == b.compiled_for) == same
