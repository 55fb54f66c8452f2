"""Writes into a weight that a mask computed are lost, and said to be."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchao_superblock.pruning import SupermaskSparsifier, squash

LOST = r"the 'weight' of a Linear was written in place, and the write is lost"


def prepared() -> tuple[nn.Sequential, SupermaskSparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    return model, sparsifier


@torch.no_grad()
def init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    model[0].weight.fill_(1.0)


@torch.no_grad()
def write_through_a_view(model: nn.Module) -> None:
    rows = model[0].weight.view(-1)[:3]
    rows.zero_()


def write_with_gradient(model: nn.Module) -> None:
    model[0].weight.mul_(2.0)


@torch.no_grad()
def write_later(model: nn.Module) -> None:
    weight = model[0].weight
    model(torch.randn(2, 16))
    weight.zero_()


WRITES: list[Callable[[nn.Module], object]] = [
    lambda model: model.apply(init),
    fill,
    write_through_a_view,
    write_with_gradient,
    write_later,
]


@pytest.mark.parametrize("write", WRITES)
def test_the_next_read_step_or_squash_says_so(write: Callable[[nn.Module], object]) -> None:
    model, sparsifier = prepared()
    write(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=LOST):
            model(torch.randn(2, 16))
    with pytest.raises(RuntimeError, match=rf"step: '0\.weight': {LOST}"):
        sparsifier.step()
    for fold in (sparsifier.squash_mask, lambda: squash(model)):
        with pytest.raises(RuntimeError, match=rf"squash: '0\.weight': {LOST}"):
            fold()
    with pytest.raises(RuntimeError, match=LOST):
        copy.deepcopy(model)(torch.randn(2, 16))
    with pytest.raises(RuntimeError, match=LOST):
        pickle.loads(pickle.dumps(model))(torch.randn(2, 16))


@pytest.mark.parametrize(
    "way_out",
    [
        lambda linear: setattr(linear, "weight", torch.ones(16, 16)),
        lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(16, 16))),
        lambda linear: linear.reset_parameters(),
        lambda linear: setattr(linear, "weight", linear.parametrizations.weight.original),
    ],
)
def test_the_ways_out_work(way_out: Callable[[nn.Module], None]) -> None:
    model, sparsifier = prepared()
    fill(model)
    way_out(model[0])
    model(torch.randn(2, 16)).sum().backward()
    sparsifier.step()
    sparsifier.squash_mask()
    assert not [name for name in vars(model[0]) if "lost" in name]


def test_reads_that_write_nothing_pass() -> None:
    model, sparsifier = prepared()
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), lr=0.1)
    held = model[0].weight
    for _ in range(3):
        model(torch.randn(2, 16)).square().sum().backward()
        held.detach().clone().zero_()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        with torch.inference_mode():
            model(torch.randn(2, 16))
    model.to(torch.float64)(torch.randn(2, 16, dtype=torch.float64))
    sparsifier.squash_mask()


def test_inference_mode_and_compiling_are_left_alone() -> None:
    model, _ = prepared()
    with torch.inference_mode():
        model[0].weight.zero_()
        model(torch.randn(2, 16))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.randn(2, 16)).sum().backward()


def test_nothing_is_kept_alive() -> None:
    model = prepared()[0]
    weight = model[0].weight
    tensor, module = weakref.ref(weight), weakref.ref(model[0])
    loss = model(torch.randn(2, 16)).square().sum()
    loss.backward()
    del model, loss
    gc.collect()
    assert module() is None
    del weight
    gc.collect()
    assert tensor() is None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_their_weights_in_a_buffer_of_their_own(
    kind: type[nn.RNNBase],
) -> None:
    model = kind(16, 16)
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "weight_hh_l0"}])
    for _ in range(2):
        model(torch.randn(3, 2, 16))[0].sum().backward()
        sparsifier.step()
