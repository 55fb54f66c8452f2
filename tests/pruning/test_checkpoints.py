"""Checkpoints of other models: refused before anything is written, with advice that works."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from torchao_superblock.pruning import SupermaskSparsifier, squash

LEVEL = 0.4  # where torchao's rounding of 6 blocks agrees: it keeps 4


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def prepared(config: object = None, seed: int = 0) -> tuple[nn.Sequential, SupermaskSparsifier]:
    model = make(seed)
    sparsifier = SupermaskSparsifier(LEVEL, 8, scores_init="kaiming_uniform")
    sparsifier.prepare(model, config)
    return model, sparsifier


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def renamed(state: dict[str, Tensor], message: str) -> dict[str, Tensor]:
    """Does for every layer what the message says of the first."""
    pairs = re.findall(r"'(\S+)' to '(\S+)'", message)
    assert pairs
    result = {}
    for key, value in state.items():
        layer, _, name = key.partition(".")
        for old, new in pairs:
            if old.partition(".")[2] == name:
                key = f"{layer}.{new.partition('.')[2]}"
        result[key] = value
    return result


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_checkpoint_and_what_the_error_advises(strict: bool) -> None:
    dense = make(1).state_dict()
    model, _ = prepared()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"(?s)dense '0\.weight'.*before prep.*Nothing was loaded"
    ) as e:
        model.load_state_dict(dense, strict=strict)
    assert_equal(model.state_dict(), before)
    assert "squash" not in str(e.value)  # would end the training of the scores
    model.load_state_dict(renamed(dense, str(e.value)), strict=False)
    for i in (0, 2):
        assert torch.equal(model[i].parametrizations.weight.original, dense[f"{i}.weight"])
        scores = f"{i}.parametrizations.weight.0.scores"
        assert torch.equal(model.state_dict()[scores], before[scores])


def supermask_linears() -> nn.Sequential:
    module = pytest.importorskip("torchao.sparsity.supermask")
    return nn.Sequential(
        *(
            module.SupermaskLinear.from_linear(layer, LEVEL, 8)
            if isinstance(layer, nn.Linear)
            else layer
            for layer in make(1)
        )
    )


def test_a_checkpoint_of_torchao_supermasks_and_what_the_error_advises() -> None:
    theirs = supermask_linears()
    model, _ = prepared()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"dense '0\.weight'.*torchao's SupermaskLinear") as e:
        model.load_state_dict(theirs.state_dict())
    assert_equal(model.state_dict(), before)
    model.load_state_dict(renamed(theirs.state_dict(), str(e.value)), strict=False)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["", "2"])
def test_masks_for_a_layer_that_has_none_here(part: str, strict: bool) -> None:
    model, _ = prepared([{"tensor_fqn": "0.weight"}])
    saved, _ = prepared(seed=1)
    before = copy.deepcopy(model.state_dict())
    message = r"holds a block mask for '2\.weight', which is not masked.*squash\(model\)"
    if part:
        model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Sequential(model))
        saved = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Sequential(saved))
        message = message.replace(r"2\.", r"2\.0\.2\.")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(saved.state_dict(), strict=strict)
    assert_equal((model[2][0] if part else model).state_dict(), before)
    squash(saved)


def test_what_is_not_there_at_all_is_left_to_torch() -> None:
    model, _ = prepared()
    saved = nn.Sequential(*model, nn.Linear(16, 16))
    SupermaskSparsifier(0.5, 8).prepare(saved, [{"tensor_fqn": "3.weight"}])
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        model.load_state_dict(saved.state_dict())
    model.load_state_dict(saved.state_dict(), strict=False)


def test_a_module_of_two_names_loads_its_own_checkpoint() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(16, 16)
    SupermaskSparsifier(0.5, 8).prepare(model)
    model.load_state_dict(model.state_dict())
