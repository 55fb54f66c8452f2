"""`convert`: squashed linears become modules of another type, hooks and all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.pruning.text_model import Model, assert_unchanged, prepared, snapshot, tokens
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.pruning import SupermaskSparsifier, squash


@pytest.mark.parametrize("inplace", [False, True])
def test_convert_takes_squashed_linears_and_their_hooks(inplace: bool) -> None:
    model, sparsifier = prepared([{"tensor_fqn": "blocks.*"}])
    model.alias = model.blocks[0].mlp[0]
    calls: list[str] = []
    linear = model.blocks[0].mlp[0]
    linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    handle = linear.register_forward_hook(
        lambda _m, _args, kwargs, _out: calls.append(f"post {sorted(kwargs)}"), with_kwargs=True
    )
    model.eval()
    sparsifier.squash_mask()
    expected = model(tokens())
    calls.clear()
    converted = sparsifier.convert(model, inplace=inplace)
    assert (converted is model) == inplace
    assert isinstance(converted.blocks[0].mlp[0], BSRLinear)
    assert converted.alias is converted.blocks[0].mlp[0]
    assert type(converted.head) is nn.Linear  # never masked
    assert type(converted.blocks[0].attention.out_proj) is not BSRLinear  # not in the mapping
    torch.testing.assert_close(converted(tokens()), expected, rtol=1e-5, atol=1e-6)
    assert calls == ["pre", "post []"]
    assert not converted.blocks[0].mlp[0].training
    if inplace:
        handle.remove()
        converted(tokens())
        assert calls == ["pre", "post []", "pre"]
    else:
        assert type(model.blocks[0].mlp[0]) is nn.Linear
        assert torch.equal(model(tokens()), expected)


def test_convert_with_a_mapping_of_ones_own_is_atomic() -> None:
    model, sparsifier = prepared([{"tensor_fqn": "blocks.*.mlp.*"}])
    sparsifier.squash_mask()

    class Dense(nn.Linear):
        made = 0

        @classmethod
        def from_dense(cls, linear: nn.Linear) -> Dense:
            cls.made += 1
            if cls.made == 3:
                raise ValueError("cannot convert the third")
            return cls(linear.in_features, linear.out_features)

    before = snapshot(model)
    with pytest.raises(ValueError, match="the third"):
        sparsifier.convert(model, {nn.Linear: Dense}, inplace=True)
    assert_unchanged(model, before)
    root = sparsifier.convert(model.blocks[0].mlp[0], {nn.Linear: Dense})
    assert type(root) is Dense
    with pytest.raises(ValueError, match=r"no module among .* type in mapping \(Conv2d\)"):
        sparsifier.convert(model, {nn.Conv2d: Dense})


@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel])
def test_convert_finds_the_squashed_linears_of_a_copy(wrap: Callable[..., nn.Module]) -> None:
    model, sparsifier = prepared([{"tensor_fqn": "blocks.*.mlp.*"}])
    copied = squash(wrap(copy.deepcopy(model)))
    sparsifier.squash_mask()
    converted = sparsifier.convert(copied)
    assert sum(isinstance(module, BSRLinear) for module in converted.modules()) == 4
    torch.testing.assert_close(converted(tokens()), model(tokens()), rtol=1e-5, atol=1e-6)


def test_squashed_by_function_then_converted() -> None:
    model, sparsifier = prepared([{"tensor_fqn": "blocks.*.mlp.*"}])
    squash(model)
    assert isinstance(sparsifier.convert(model).blocks[1].mlp[2], BSRLinear)
    with pytest.raises(RuntimeError, match="squashed already"):
        sparsifier.squash_mask()


def test_convert_before_squash_is_refused() -> None:
    model, sparsifier = prepared()
    with pytest.raises(RuntimeError, match=r"'blocks.0.mlp.0.weight' is not squashed yet"):
        sparsifier.convert(model)
    with pytest.raises(RuntimeError, match="has squashed nothing"):
        SupermaskSparsifier().convert(Model())


def test_a_child_called_module_keeps_its_name() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.module(x)

    model = nn.Sequential(Residual(), Residual())
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    assert [g["tensor_fqn"] for g in sparsifier.groups] == ["0.module.weight", "1.module.weight"]
    sparsifier.load_state_dict(sparsifier.state_dict())
    copied = copy.deepcopy(model)
    squash(copied)
    sparsifier.squash_mask(params_to_keep_per_layer={"0.module": ("sparsity_level",)})
    assert model[0].module.sparse_params == {"sparsity_level": 0.5}
    sparsifier.convert(copied, {nn.Linear: _Dense}, inplace=True)
    assert type(copied[1].module) is _Dense


class _Dense(nn.Linear):
    @classmethod
    def from_dense(cls, linear: nn.Linear) -> _Dense:
        return cls(linear.in_features, linear.out_features)


def test_convert_names_the_layer_that_cannot_be_converted_and_keeps_sparse_params() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 60))
    sparsifier = SupermaskSparsifier(0.5, 16)
    sparsifier.prepare(model)
    sparsifier.squash_mask(params_to_keep=("blocksize",))
    with pytest.raises(ValueError, match=r"convert: '1': .*60, 64"):
        sparsifier.convert(model)
    converted = sparsifier.convert(model[:1])
    assert converted[0].sparse_params == {"blocksize": 16}
