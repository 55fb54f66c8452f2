"""SupermaskSparsifier: training, schedules, freezing, and calls in the wrong order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.pruning.text_model import Model, assert_unchanged, prepared, snapshot, train, zero_blocks
from torchao_superblock.pruning import CubicSL, LambdaSL, Supermask, SupermaskSparsifier


def test_training_moves_masks_and_step_records_them() -> None:
    model, sparsifier = prepared([{"tensor_fqn": "*"}], blocksize=8)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.1), lr=1e-2)
    before = {fqn: entry["mask"] for fqn, entry in sparsifier.state.items()}
    train(model, optimizer, sparsifier, None, range(10))
    changed = 0
    for group in sparsifier.groups:
        fqn = group["tensor_fqn"]
        mask = sparsifier.state[fqn]["mask"]
        supermask = group["module"].parametrizations[group["tensor_name"]][0]
        assert mask.dtype == torch.bool and torch.equal(mask, supermask.block_mask())
        assert int(mask.sum()) == max(1, round(mask.numel() * 0.5))
        changed += not torch.equal(mask, before[fqn])
    assert changed


def test_param_groups_keep_scores_out_of_weight_decay() -> None:
    model, sparsifier = prepared()
    rest, scores = sparsifier.param_groups(model, weight_decay=0.1)
    assert (rest["weight_decay"], scores["weight_decay"]) == (0.1, 0.0)
    masks = [module for module in model.modules() if isinstance(module, Supermask)]
    assert {id(p) for p in scores["params"]} == {id(mask.scores) for mask in masks}
    everything = [id(p) for p in rest["params"] + scores["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    with pytest.raises(RuntimeError, match="call prepare"):
        sparsifier.param_groups(Model())


def test_schedulers_take_effect_at_the_next_step() -> None:
    model, sparsifier = prepared(sparsity_level=0.8, blocksize=8)
    scheduler = CubicSL(sparsifier, total_t=5, delta_t=1)
    weight = next(m for m in model.modules() if isinstance(m, Supermask))
    levels = []
    for _ in range(7):
        sparsifier.step()
        levels.append(1 - int(weight.n_kept) / weight.scores.numel())
        scheduler.step()
        assert 1 - int(weight.n_kept) / weight.scores.numel() == levels[-1]
    assert levels == pytest.approx(
        [0.8 * (1 - (1 - t / 5) ** 3) for t in range(5)] + [0.8] * 2, abs=0.02
    )

    _, sparsifier = prepared(sparsity_level=0.6)
    scheduler = LambdaSL(sparsifier, lambda epoch: epoch / 2)
    for expected in (0.0, 0.3, 0.6):
        assert sparsifier.groups[0]["sparsity_level"] == pytest.approx(expected)
        sparsifier.step()
        scheduler.step()
    before = snapshot(sparsifier.model)
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.mlp\.0\.weight' has sparsity_level=1\.5.*\[0, 1\)"
    ):
        scheduler.step()
        scheduler.step()
        sparsifier.step()
    assert_unchanged(sparsifier.model, before)


def test_enable_mask_update_gates_step() -> None:
    model, sparsifier = prepared()
    sparsifier.enable_mask_update = False
    sparsifier.groups[0]["sparsity_level"] = 0.9
    before = snapshot(model)
    sparsifier.step()
    assert_unchanged(model, before)
    LambdaSL(sparsifier, lambda epoch: 1.0)  # torch's schedulers switch it back on
    assert sparsifier.enable_mask_update


def test_freeze_holds_masks_against_momentum_and_schedules() -> None:
    model, sparsifier = prepared(blocksize=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.5)
    train(model, optimizer, sparsifier, None, range(3))
    held = {fqn: entry["mask"].clone() for fqn, entry in sparsifier.state.items()}
    sparsifier.freeze()
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.9
    train(model, optimizer, sparsifier, None, range(3, 8))
    assert all(torch.equal(held[fqn], entry["mask"]) for fqn, entry in sparsifier.state.items())
    sparsifier.unfreeze()
    sparsifier.step()
    assert all(
        int(e["mask"].sum()) == max(1, round(e["mask"].numel() * 0.1))
        for e in sparsifier.state.values()
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sparsity_level": 1}, ValueError, r"SupermaskSparsifier: sparsity_level=1.0 is outside"),
        ({"blocksize": 0}, ValueError, r"SupermaskSparsifier: blocksize=0 must be at least 1"),
        ({"blocksize": "64"}, TypeError, r"blocksize='64' must be an int"),
        ({"blocksize": (1, 2, 3)}, TypeError, r"blocksize=\(1, 2, 3\) must be an int, or a pair"),
        ({"scores_init": None}, ValueError, r"scores_init=None is unknown"),
    ],
)
def test_bad_constructor_arguments(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SupermaskSparsifier(**kwargs)


@pytest.mark.parametrize("config", [None, [{"tensor_fqn": "*"}], [{"tensor_fqn": "head.weight"}]])
def test_preparing_twice_is_refused(config: Any) -> None:
    model, sparsifier = prepared([{"tensor_fqn": "head.weight"}])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="this sparsifier has already prepared a model"):
        sparsifier.prepare(model, config)
    with pytest.raises(RuntimeError, match=r"'head.weight' is already prepared.*squash"):
        SupermaskSparsifier(0.5, 16).prepare(model, config)
    assert_unchanged(model, before)


def test_an_error_half_way_through_prepare_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = snapshot(model)
    register, count = parametrize.register_parametrization, []

    def failing(*args: Any, **kwargs: Any) -> None:
        count.append(1)
        if len(count) == 4:
            raise MemoryError
        register(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", failing)
    with pytest.raises(MemoryError):
        prepared([{"tensor_fqn": "*"}], model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["step", "squash_mask", "freeze", "unfreeze"])
def test_methods_before_prepare_and_after_squash(method: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{method}: no model is prepared; call prepare"):
        getattr(SupermaskSparsifier(), method)()
    model, sparsifier = prepared()
    sparsifier.squash_mask()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=rf"{method}: the masks are squashed already"):
        getattr(sparsifier, method)()
    assert_unchanged(model, before)


def test_nan_weights_have_no_norm_to_start_from() -> None:
    model = Model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'head.weight' contains NaN"):
        prepared(model=model, scores_init="weight_norm")
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["", "blocks.1", "blocks.1.mlp.0"])
def test_a_dense_checkpoint_after_prepare_is_refused_before_anything_is_written(
    part: str, strict: bool
) -> None:
    dense = Model()
    model, sparsifier = prepared([{"tensor_fqn": "blocks.*.mlp.*"}])
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"(?s)dense '.*weight'.*before prepare\(\).*Nothing was loaded"
    ):
        model.get_submodule(part).load_state_dict(
            dense.get_submodule(part).state_dict(), strict=strict
        )
    assert_unchanged(model, before)
    sparsifier.squash_mask()
    model.load_state_dict(dense.state_dict())


def test_assigning_a_parameter_sets_the_weight_under_the_mask() -> None:
    linear = nn.Linear(16, 16)
    SupermaskSparsifier(0.5, 8).prepare(linear)
    linear.weight = nn.Parameter(torch.full((16, 16), 2.0))
    assert linear.parametrizations.weight.original.eq(2).all()
    assert zero_blocks(linear.weight, 8) == 2
    linear.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert "gain" in dict(linear.named_parameters())


def test_a_failed_prepare_does_not_move_the_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'1\.weight' contains NaN"):
        SupermaskSparsifier(0.5, 8).prepare(
            model,
            [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.weight", "scores_init": "weight_norm"}],
        )
    assert torch.equal(torch.get_rng_state(), state)
