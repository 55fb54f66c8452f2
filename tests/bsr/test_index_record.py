"""A plan is used with the index it was made from, and with no other; a write to an index is noticed."""

import copy
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bsr.common import prune
from tests.reference import random_bsr, relative_error
from torchao_superblock.bsr import BSRLinear


class Plans(TorchDispatchMode):
    """The plan of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torchao_superblock.bsr_linear.default:
            self.seen.append(args[7] if len(args) > 7 else None)  # defaults are left out
        return func(*args, **(kwargs or {}))


def make(seed: int = 0) -> tuple[torch.Tensor, BSRLinear]:
    dense, crow, col, values = random_bsr(96, 64, 16, 0.5, seed=seed)
    return dense, BSRLinear(64, 96, 16, crow, col, values)


def uses_its_plan(layer: BSRLinear) -> bool:
    x = torch.randn(3, 64, dtype=layer.values.dtype)
    with torch.no_grad(), Plans() as plans:
        layer(x)
        nn.functional.linear(x, layer.weight)
    assert len({plan is None for plan in plans.seen}) == 1 and len(plans.seen) == 2
    assert plans.seen[0] is None or plans.seen[0] is layer.plan
    return plans.seen[0] is not None


def assert_right(call, dense: torch.Tensor) -> None:
    """A forward and its gradient in x against a dense weight."""
    x = torch.randn(5, 64, requires_grad=True)
    y = call(x)
    assert relative_error(y, x.double() @ dense.double().t()) <= 1e-6
    g = torch.randn_like(y)
    assert relative_error(torch.autograd.grad(y, x, g)[0], g.double() @ dense.double()) <= 1e-6


def test_the_plan_is_used_with_the_index_it_was_made_from():
    dense, layer = make()
    assert uses_its_plan(layer)
    assert_right(layer, dense)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copy.copy],
    ids=["deepcopy", "pickle", "copy"],
)
def test_copies_use_theirs(copied):
    dense, layer = make()
    new = copied(layer)
    assert uses_its_plan(new) and uses_its_plan(layer)
    assert_right(new, dense)
    assert copied is copy.copy or new.crow_indices is not layer.crow_indices


def test_moved_and_converted_layers_use_theirs():
    dense, layer = make()
    for convert in (
        lambda: layer.double(),
        lambda: layer.to("cpu"),
        lambda: layer._apply(torch.clone),  # as a device that is not the same would
        lambda: layer.load_state_dict(layer.state_dict()),
        lambda: layer.load_state_dict(layer.state_dict(), assign=True),
        lambda: layer.share_memory(),
        lambda: layer.float(),
    ):
        convert()
        assert uses_its_plan(layer)
    assert_right(layer, dense)
    with torch.inference_mode():
        layer._apply(torch.clone)  # inference tensors count no writes
    with torch.inference_mode():
        assert layer.crow_indices.is_inference()
        assert torch.equal(layer(torch.eye(64)), dense.t())
    assert layer._plan_for(layer.crow_indices, layer.col_indices, layer.plan) is layer.plan


def test_another_pattern_with_as_many_blocks_comes_with_no_plan():
    dense, layer = make()
    other_dense, other = make(seed=1)
    assert other.nnz == layer.nnz and not torch.equal(other.col_indices, layer.col_indices)
    state = dict(other.state_dict())

    def call(x):
        return torch.func.functional_call(layer, state, (x,))

    assert_right(call, other_dense)
    with torch.no_grad(), Plans() as plans:
        call(torch.randn(2, 64))
    assert plans.seen == [None]
    assert_right(layer, dense)
    assert uses_its_plan(layer)
    layer.crow_indices, layer.col_indices = other.crow_indices, other.col_indices
    layer.values = other.values
    assert not uses_its_plan(layer)
    assert_right(layer, other_dense)


def test_an_index_that_was_written_to_with_the_same_content_is_as_good():
    dense, layer = make()
    for tensor in layer.state_dict().values():
        tensor.copy_(tensor.clone())
    assert uses_its_plan(layer)
    assert_right(layer, dense)


@pytest.mark.parametrize("way", ["forward", "weight", "copy", "moved", "pickled"])
def test_another_pattern_written_into_the_index_is_refused(way):
    _, layer = make()
    _, other = make(seed=1)
    for mine, theirs in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        mine.copy_(theirs)
    if way == "copy":
        layer = copy.deepcopy(layer)
    elif way == "pickled":
        layer = pickle.loads(pickle.dumps(layer))
    elif way == "moved":
        layer._apply(torch.clone)
    with pytest.raises(RuntimeError, match=r"written in place.*use_buffers=False.*load_state_dict"):
        layer.weight if way == "weight" else layer(torch.randn(2, 64))
    assert torch.equal(layer.col_indices, other.col_indices), "raised, not restored"
    layer.load_state_dict(other.state_dict())
    assert uses_its_plan(layer)
    assert_right(layer, other.to_dense().detach())


def test_an_averaged_index_is_refused_or_unchanged():
    torch.manual_seed(0)
    model = nn.Sequential(BSRLinear.from_dense(prune(nn.Linear(256, 256), 16, 0.7), 16))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    x = torch.randn(2, 256)
    expected = model(x)
    refused = False
    for _ in range(4):
        averaged.update_parameters(model)
        held = averaged.module[0].col_indices
        if torch.equal(held, model[0].col_indices):
            torch.testing.assert_close(averaged(x), expected)
        else:
            refused = True
            with pytest.raises(RuntimeError, match="cannot be averaged"):
                averaged(x)
    assert refused, "this torch averages integers exactly: find another way to damage them"
    averaged.module.load_state_dict(model.state_dict())
    torch.testing.assert_close(averaged(x), expected)


def test_a_write_between_forward_and_backward_is_torch_s_to_refuse():
    _, layer = make()
    y = layer(torch.randn(2, 64, requires_grad=True))
    layer.col_indices.copy_(layer.col_indices.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_forwards_during_loads_are_served_or_refused():
    """512 x 512, as many blocks in each: what a forward sees of a load may be torn, it must not reach out of bounds."""
    layers = []
    for seed in range(2):
        _, crow, col, values = random_bsr(512, 512, 16, 0.5, seed=seed)
        layers.append(BSRLinear(512, 512, 16, crow, col, values))
    states = [copy.deepcopy(layer.state_dict()) for layer in layers]
    layer, x = layers[0], torch.randn(256, 512)
    ended = threading.Event()
    unexpected = []

    def load() -> None:
        while not ended.is_set():
            for state in states:
                layer.load_state_dict(state)

    loader = threading.Thread(target=load)
    loader.start()
    try:
        for _ in range(60):
            try:
                with torch.no_grad():
                    layer(x)
            except (RuntimeError, ValueError) as error:
                if "written in place" not in str(error) and "crow_indices must" not in str(error):
                    unexpected.append(error)
    finally:
        ended.set()
        loader.join()
    assert not unexpected
    layer.load_state_dict(states[1])
    torch.testing.assert_close(layer(x), layers[1](x))


def test_distributed_data_parallel_s_broadcast_leaves_the_plan_in_use(tmp_path):
    dense, layer = make()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):
            assert_right(model, dense)
        assert uses_its_plan(layer)
    finally:
        dist.destroy_process_group()
