"""Copies, pickles and transforms of masked modules."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from torchao_superblock.pruning import SupermaskSparsifier, squash

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


def prepared(model: nn.Module, names: list[str]) -> tuple[nn.Module, SupermaskSparsifier]:
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in names])
    return model, sparsifier


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["weight_ih_l0", "weight_hh_l0_reverse"]])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_copied_after_a_forward(
    kind: type[nn.RNNBase], way: str, names: list[str]
) -> None:
    torch.manual_seed(0)
    model, sparsifier = prepared(kind(16, 16, bidirectional=True), names)
    x = torch.randn(5, 2, 16)
    model(x)[0].sum().backward()
    copied = WAYS[way](model)
    expected = model(x)[0]
    assert torch.equal(copied(x)[0], expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(copied(x)[0], expected)
    squash(copied)
    torch.testing.assert_close(copied(x)[0], expected)
    assert type(copied) is kind and type(pickle.loads(pickle.dumps(copied))) is kind
    sparsifier.squash_mask()
    assert torch.equal(copy.deepcopy(model)(x)[0], model(x)[0])


class Guarded(nn.Linear):
    """Holds what cannot be pickled, and says how to do without it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.lock = threading.Lock()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.last = self.weight
            return nn.functional.linear(x, self.last, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("way", list(WAYS))
def test_a_class_with_a_state_of_its_own_is_copied(way: str) -> None:
    model, _ = prepared(nn.Sequential(Guarded(16, 16), nn.Linear(16, 16)), ["0.weight"])
    x = torch.randn(2, 16)
    expected = model(x)
    copied = WAYS[way](model)
    assert torch.equal(copied(x), expected)
    assert copied[0].lock is not model[0].lock
    assert torch.equal(copied[0].last, model[0].last)
    squash(copied)
    assert type(copied[0]) is Guarded
    torch.testing.assert_close(copied(x), expected)
    torch.testing.assert_close(WAYS[way](copied)(x), expected)


def test_another_parametrization_survives_the_squash_and_is_copied() -> None:
    model, sparsifier = prepared(nn.Linear(16, 16), ["weight"])
    nn.utils.parametrize.register_parametrization(model, "bias", nn.Identity())
    copy.deepcopy(model)
    sparsifier.squash_mask()
    copied = copy.deepcopy(model)
    assert torch.equal(copied.weight, model.weight) and torch.equal(copied.bias, model.bias)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)


# -------------------------------------------------------------------------------------------------
# torch.func
# -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(32, 24), (20, 44)], ids=["whole", "ragged"])
def ensemble(request: pytest.FixtureRequest) -> list[nn.Module]:
    torch.manual_seed(0)
    rows, cols = request.param
    return [prepared(nn.Sequential(nn.Linear(cols, rows)), ["0.weight"])[0] for _ in range(3)]


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    return loss


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_of_each_sample(ensemble: list[nn.Module]) -> None:
    model = ensemble[0]
    x = torch.randn(4, model[0].in_features)
    torch.testing.assert_close(vmap(model)(x), model(x))
    state = dict(model.named_parameters()), dict(model.named_buffers())
    found = vmap(grad(loss_of(model)), (None, None, 0))(*state, x)
    for i in range(4):
        for name, expected in gradients(model, x[i]).items():
            torch.testing.assert_close(found[name][i], expected)


def test_gradients_of_several_models_at_once(ensemble: list[nn.Module]) -> None:
    x = torch.randn(4, ensemble[0][0].in_features)
    skeleton = copy.deepcopy(ensemble[0]).to("meta")
    found = vmap(grad(loss_of(skeleton)), (0, 0, None))(*stack_module_state(ensemble), x)
    for i, model in enumerate(ensemble):
        for name, expected in gradients(model, x).items():
            torch.testing.assert_close(found[name][i], expected)
