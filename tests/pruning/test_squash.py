"""Squashing: a plain model with exact zeros, or an error that folds nothing."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.pruning.text_model import Model, prepared, snapshot, tokens, train, zero_blocks
from torchao_superblock.pruning import Supermask, SupermaskSparsifier, squash


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averaged_model_can_be_squashed_by_itself(use_buffers: bool, average: Any) -> None:
    model, sparsifier = prepared([{"tensor_fqn": "*"}], blocksize=8, sparsity_level=0.75)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), lr=1e-2)
    kept = 0.25
    if not use_buffers:  # else torch averages the number of kept blocks too
        kept = 0.5
        for group in sparsifier.groups:
            group["sparsity_level"] = 0.5
    for i in range(3):
        train(model, optimizer, sparsifier, None, range(i, i + 1))
        ema.update_parameters(model)
    masks = [m for m in ema.modules() if isinstance(m, Supermask)]
    assert all(int(m.block_mask().sum()) == round(m.scores.numel() * kept) for m in masks)
    out, trained = ema(tokens()), model(tokens())
    squash(ema)
    torch.testing.assert_close(ema(tokens()), out, rtol=0, atol=0)
    assert type(ema.module.head) is nn.Linear
    assert torch.equal(model(tokens()), trained)  # the trained model still has its masks
    sparsifier.squash_mask()
    torch.testing.assert_close(model(tokens()), trained, rtol=0, atol=0)


def test_squash_leaves_a_plain_model_with_exact_zeros() -> None:
    model = Model()
    before = snapshot(model)
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    _, sparsifier = prepared([{"tensor_fqn": "*"}], model, blocksize=(16, 12))  # ragged columns
    masked = model.blocks[0].mlp[0].weight.detach().clone()
    out = model(tokens())
    groups = list(sparsifier.groups)
    sparsifier.squash_mask()
    assert torch.equal(model(tokens()), out)
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    after = snapshot(model)
    assert [after[key] for key in ("types", "hooks", "attributes")] == [
        before[key] for key in ("types", "hooks", "attributes")
    ]
    weight = model.blocks[0].mlp[0].weight
    assert torch.equal(weight, masked)
    assert not torch.signbit(weight[weight == 0]).any()  # 0.0 and never -0.0
    assert sparsifier.groups == [] and sparsifier.state == {} and len(groups) == 9
    pickle.loads(pickle.dumps(model))
    sparsifier.prepare(model, [{"tensor_fqn": "*"}])  # again is allowed
    assert len(sparsifier.groups) == 9


def test_squash_mask_folds_its_own_masks_only() -> None:
    model, first = prepared([{"tensor_fqn": "blocks.*"}])
    _, second = prepared([{"tensor_fqn": "head.weight"}], model)
    first.squash_mask()
    assert parametrize.is_parametrized(model.head) and type(model.blocks[0].mlp[0]) is nn.Linear
    second.squash_mask()
    assert type(model.head) is nn.Linear


def test_squash_without_masks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the model carries no block mask"):
        squash(Model())


def test_nan_scores_are_refused_at_squash() -> None:
    model, sparsifier = prepared()
    with torch.no_grad():
        model.head.parametrizations.weight[0].scores[1, 0] = float("nan")
    before = model.blocks[0].mlp[0].parametrizations.weight.original.clone()
    for fold in (sparsifier.squash_mask, lambda: squash(model)):
        with pytest.raises(ValueError, match=r"scores of 'head.weight' contain NaN.*diverged"):
            fold()
    assert torch.equal(model.blocks[0].mlp[0].parametrizations.weight.original, before)
    assert len([m for m in model.modules() if isinstance(m, Supermask)]) == 5


def test_another_parametrization_on_top_is_refused_at_squash() -> None:
    model, sparsifier = prepared()
    parametrize.register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(
        RuntimeError, match=r"'head.weight' carries Identity besides its block mask"
    ):
        sparsifier.squash_mask()
    assert parametrize.is_parametrized(model.blocks[0].mlp[0])


def test_squashing_a_part_leaves_the_rest_to_the_sparsifier() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    squash(model[1])
    sparsifier.groups[0]["sparsity_level"] = 0.75
    sparsifier.step()
    assert [entry.fqn for entry in sparsifier.summary().groups] == ["0.weight"]
    sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear
    assert zero_blocks(model[0].weight, 8) == 12
    assert not sparsifier.groups
