"""Mutated state dicts: each layer takes all of its part, or refuses and keeps what it had."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.portrait import content, differences, portrait
from benchmarks.faults.problems import error_of
from torchao_superblock import BSRLinear, swap_to_bsr
from torchao_superblock.bsr.format import bsr_to_dense, check_bsr

State = dict[str, Any]


@cache
def _model(seed: int, sparsity: float = 0.5) -> nn.Module:
    torch.default_generator.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))
    models.prune(model, seed, sparsity)
    swap_to_bsr(model, models.BLOCK, min_sparsity=0.0)
    return model


def _of(state: State, source: random.Random, *names: str) -> str | None:
    keys = [key for key in state if not names or key.rpartition(".")[2] in names]
    return source.choice(keys) if keys else None


def _change(*names: str) -> Callable[..., Callable[[State, random.Random], None]]:
    """Makes a mutation of a function that changes one tensor, one of these."""

    def wrap(
        change: Callable[[Tensor, random.Random], object],
    ) -> Callable[[State, random.Random], None]:
        def mutate(state: State, source: random.Random) -> None:
            key = _of(state, source, *names)
            if key is not None:
                state[key] = change(state[key], source)

        return mutate

    return wrap


_INDICES = ("crow_indices", "col_indices")


def _poke(index: Tensor, source: random.Random) -> Tensor:
    index = index.clone()
    index[source.randrange(len(index))] = source.choice([-1, 2**31 - 1, 0, 2, len(index), 999])
    return index


def _drop(state: State, source: random.Random) -> None:
    del state[_of(state, source)]


def _add(state: State, source: random.Random) -> None:
    state[source.choice(["0.plan", "0.weight", "2.bias", "more", "1.x"])] = torch.zeros(3)


def _exchange(state: State, source: random.Random) -> None:
    a, b = source.sample(list(state), 2)
    state[a], state[b] = state[b], state[a]


def _nothing(state: State, source: random.Random) -> None:
    return


MUTATIONS: dict[str, Callable[[State, random.Random], None]] = {
    "nothing": _nothing,
    "missing": _drop,
    "one too many": _add,
    "exchanged": _exchange,
    "another entry": _change(*_INDICES)(_poke),
    "reversed": _change(*_INDICES)(lambda t, s: t.flip(0)),
    "indices cast": _change(*_INDICES)(
        lambda t, s: t.to(s.choice([torch.float32, torch.int64, torch.int16, torch.bool]))
    ),
    "values cast": _change("values", "bias")(
        lambda t, s: t.to(s.choice([torch.float64, torch.float16, torch.int32, torch.complex64]))
    ),
    "shorter": _change()(lambda t, s: t[:-1]),
    "longer": _change()(lambda t, s: torch.cat([t, t[-1:]])),
    "another shape": _change()(lambda t, s: s.choice([t[None], t.flatten(), t.sum(), t[..., :1]])),
    "meta": _change()(lambda t, s: t.to("meta")),
    "no tensor": _change()(lambda t, s: s.choice([None, 3, [1.0], "x", t.numpy()])),
    "no memory of its own": _change()(lambda t, s: t[:1].expand(t.shape)),
}


class StateDicts(Kind):
    """One mutated state dict, loaded into one model."""

    name = "state_dicts"
    about = (
        "state dicts with entries missing, added, cast, reshaped or exchanged: each layer is as before or holds all of "
        "it, and computes and trains right"
    )
    short, long = 300, 5000

    def run(self, index: int) -> str:
        source = self.random(index)
        model = copy.deepcopy(_model(1))
        state: State = copy.copy(_model(2, source.choice([0.5, 0.5, 0.8])).state_dict())
        name = list(MUTATIONS)[index % len(MUTATIONS)]
        MUTATIONS[name](state, source)
        strict, assign = source.random() < 0.6, source.random() < 0.3
        case = f"{name}, strict={strict}, assign={assign}"
        before = {fqn: portrait(layer) for fqn, layer in models.bsr_layers(model).items()}
        refused = None
        try:
            model.load_state_dict(state, strict=strict, assign=assign)
        except Exception as error:
            refused = error
            if type(error) is not RuntimeError:
                raise Fault(f"refused with {type(error).__name__}", f"{case}: {error}") from error
        for fqn, layer in models.bsr_layers(model).items():
            now = portrait(layer)
            if now == before[fqn]:
                if refused is None and name == "nothing":
                    raise Fault("nothing was loaded", f"{case}, {fqn}")
                continue
            text = f"{case}, {fqn}: {refused or 'accepted'}"
            absent = [key for key in layer.state_dict() if f"{fqn}.{key}" not in state]
            if strict and absent:
                raise Fault("changed although entries are missing", text)
            for key, tensor in layer.state_dict().items():
                wanted = state.get(f"{fqn}.{key}", tensor)
                if not isinstance(wanted, Tensor) or wanted.is_meta:
                    raise Fault("changed by what it cannot hold", text)
                if key in _INDICES and wanted.dtype != torch.int32:
                    raise Fault("cast indices", f"{text}, {wanted.dtype}")
                if content(wanted.to(tensor.dtype)) != content(tensor):
                    raise Fault("a layer half loaded", f"{text}: {differences(now, before[fqn])}")
            _check_layer(layer, case)
        return "loaded" if refused is None else "refused"


def _check_layer(layer: BSRLinear, case: str) -> None:
    """Its format is valid, its output and its gradients are those of its weight."""
    shape = (layer.out_features, layer.in_features)
    try:
        check_bsr(layer.crow_indices, layer.col_indices, layer.values, shape, layer.blocksize)
    except (TypeError, ValueError) as error:
        raise Fault("an invalid format was loaded", f"{case}: {error}") from error
    x = torch.randn(5, layer.in_features).to(layer.values.dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, layer.values], grad)
    values, wide = (t.detach().double().requires_grad_() for t in (layer.values, x))
    weight = bsr_to_dense(layer.crow_indices, layer.col_indices, values, shape)
    bias = None if layer.bias is None else layer.bias.detach().double()
    expected = F.linear(wide, weight, bias)
    wanted = torch.autograd.grad(expected, [wide, values], grad.double())
    for what, out, right in zip(
        ("output", "gradient of x", "gradient of values"),
        (y, *gradients),
        (expected, *wanted),
        strict=True,
    ):
        error = error_of(out, right)
        if not error < 1e-2:
            raise Fault(f"wrong {what} after loading", f"{case}: error {error:.2e}")


STATE_DICTS = [StateDicts()]
