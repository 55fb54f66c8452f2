"""SupermaskSparsifier: what a config reaches, schedules, resuming, squashing, and every error."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchao_superblock.bsr import BSRLinear
from torchao_superblock.pruning import (
    CubicSL,
    LambdaSL,
    Supermask,
    SupermaskSparsifier,
    squash,
)


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """A small text model with a bit of everything that a config can meet."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.Parameter(torch.randn(32, 32) * 0.1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 48, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) @ self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens() -> torch.Tensor:
    return torch.randint(48, (2, 6), generator=torch.Generator().manual_seed(0))


def fqns(sparsifier: SupermaskSparsifier) -> list[str]:
    return [group["tensor_fqn"] for group in sparsifier.groups]


def prepared(config: Any = None, model: nn.Module | None = None, **kwargs: Any) -> tuple[Any, Any]:
    model = Model() if model is None else model
    sparsifier = SupermaskSparsifier(**{"sparsity_level": 0.5, "blocksize": 16, **kwargs})
    sparsifier.prepare(model, config)
    return model, sparsifier


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything an error must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": {name: id(parameter) for name, parameter in model.named_parameters()},
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, state_before = after.pop("state"), before["state"]
    assert list(state) == list(state_before)
    assert all(torch.equal(state[key], state_before[key]) for key in state)
    assert after == {key: value for key, value in before.items() if key != "state"}


# -------------------------------------------------------------------------------------------------
# What a config reaches
# -------------------------------------------------------------------------------------------------

MLP = [f"blocks.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)]


def test_no_config_is_every_exact_linear() -> None:
    model, sparsifier = prepared()
    assert fqns(sparsifier) == [*MLP, "head.weight"]  # not the MHA's out_proj, a subclass
    assert type(model.blocks[0].attention.out_proj) is type(nn.MultiheadAttention(4, 1).out_proj)


def test_a_root_linear_counts() -> None:
    linear, sparsifier = prepared(model=nn.Linear(32, 48))
    assert fqns(sparsifier) == ["weight"] and sparsifier.groups[0]["module_fqn"] == ""
    sparsifier.squash_mask()
    assert type(linear) is nn.Linear


def test_a_glob_crosses_dots_and_reaches_projections_but_no_embedding() -> None:
    _, sparsifier = prepared([{"tensor_fqn": "*"}])
    assert sorted(fqns(sparsifier)) == sorted(
        [*MLP, "head.weight"]
        + [
            f"blocks.{i}.attention.{n}"
            for i in (0, 1)
            for n in ("in_proj_weight", "out_proj.weight")
        ]
    )
    _, sparsifier = prepared([{"tensor_fqn": "blocks.?.mlp.[02].weight"}])
    assert fqns(sparsifier) == MLP


def test_an_exact_name_reaches_any_2d_floating_parameter() -> None:
    model, sparsifier = prepared(
        [{"tensor_fqn": "embedding.weight"}, {"tensor_fqn": "table"}, {"tensor_fqn": "head.weight"}]
    )
    assert fqns(sparsifier) == ["embedding.weight", "table", "head.weight"]
    out = model(tokens())
    out.sum().backward()
    masks = [module for module in model.modules() if isinstance(module, Supermask)]
    assert len(masks) == 3 and all(mask.scores.grad.any() for mask in masks)
    assert torch.equal(squash(copy.deepcopy(model))(tokens()), out)


def test_separate_projections_of_attention_with_other_key_sizes() -> None:
    attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=48, batch_first=True)
    _, sparsifier = prepared([{"tensor_fqn": "*"}], attention)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert fqns(sparsifier) == names
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 16), torch.randn(2, 7, 48)
    out = attention(q, k, v)[0]
    sparsifier.squash_mask()
    torch.testing.assert_close(attention(q, k, v)[0], out)


def test_a_later_entry_overrides_an_earlier_glob() -> None:
    _, sparsifier = prepared(
        [
            {"tensor_fqn": "*.mlp.*", "blocksize": 8, "sparsity_level": 0.9},
            {"tensor_fqn": "blocks.1.*", "blocksize": (8, 16)},
            {"tensor_fqn": "blocks.1.mlp.0.weight", "scores_init": "weight_norm"},
        ]
    )
    settings = {
        g["tensor_fqn"]: (g["sparsity_level"], g["blocksize"], g["scores_init"])
        for g in sparsifier.groups
    }
    assert settings["blocks.0.mlp.0.weight"] == (0.9, 8, "kaiming_uniform")
    assert settings["blocks.1.mlp.2.weight"] == (0.5, (8, 16), "kaiming_uniform")
    assert settings["blocks.1.mlp.0.weight"] == (0.5, 16, "weight_norm")
    assert len(settings) == len(sparsifier.groups) == 6


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda m: torch.compile(Wrapper(m))])
@pytest.mark.parametrize(
    "name", ["head.weight", "module.head.weight", "_orig_mod.module.head.weight", "h*", "module.h*"]
)
def test_wrapper_prefixes_are_transparent(wrap: Callable[..., nn.Module], name: str) -> None:
    model = Model()
    _, sparsifier = prepared([{"tensor_fqn": name}], wrap(model))
    assert fqns(sparsifier) == ["head.weight"]
    _, plain = prepared([{"tensor_fqn": name}])
    plain.load_state_dict(sparsifier.state_dict())
    sparsifier.squash_mask()
    assert type(model.head) is nn.Linear


def test_a_part_that_is_called_module_is_not_taken_for_a_wrapper() -> None:
    model = nn.Module()
    model.module, model.linear = nn.Sequential(nn.Linear(32, 48)), nn.Linear(32, 48)
    model.module.linear = nn.Linear(32, 48)
    _, sparsifier = prepared([{"tensor_fqn": "module.linear.weight"}], model)
    assert fqns(sparsifier) == ["module.linear.weight"]
    state = sparsifier.state_dict()
    sparsifier.load_state_dict(state)
    sparsifier.squash_mask(params_to_keep_per_layer={"module.linear": ("blocksize",)})
    assert model.module.linear.sparse_params == {"blocksize": 16}
    converted = sparsifier.convert(model)
    assert isinstance(converted.module.linear, BSRLinear) and type(converted.linear) is nn.Linear


def test_a_module_registered_twice_is_one_group() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(32, 48)
    for config in (None, [{"tensor_fqn": "*"}], [{"tensor_fqn": "second.weight"}]):
        _, sparsifier = prepared(config, model)
        assert fqns(sparsifier) == ["first.weight"]
        sparsifier.squash_mask()
        assert type(model.first) is nn.Linear and model.first is model.second
    with pytest.raises(ValueError, match=r"'first\.weight' is configured twice"):
        prepared([{"tensor_fqn": "first.weight"}, {"tensor_fqn": "second.weight"}], model)


def test_summary_is_a_table() -> None:
    model = Model(tied=True)
    model.tiny = nn.Linear(8, 64)
    model.single = nn.Linear(16, 16)
    model.ragged = nn.Linear(40, 50)
    model.normed = parametrizations.weight_norm(nn.Linear(32, 32))
    _, sparsifier = prepared(
        [
            {"tensor_fqn": "*"},
            {"tensor_fqn": "blocks.1.mlp.*", "sparsity_level": 0.9, "blocksize": (8, 16)},
        ],
        model,
    )
    sparsifier.groups[0]["sparsity_level"] = 0.75
    assert_expected_inline(
        str(sparsifier.summary()),
        """\
tensor                              shape  block  grid  target  actual
----------------------------------  -----  -----  ----  ------  ------
blocks.0.attention.in_proj_weight   96x32  16x16   6x2   75.0%   50.0%
blocks.0.attention.out_proj.weight  32x32  16x16   2x2   50.0%   50.0%
blocks.0.mlp.0.weight               64x32  16x16   4x2   50.0%   50.0%
blocks.0.mlp.2.weight               32x64  16x16   2x4   50.0%   50.0%
blocks.1.attention.in_proj_weight   96x32  16x16   6x2   50.0%   50.0%
blocks.1.attention.out_proj.weight  32x32  16x16   2x2   50.0%   50.0%
ragged.weight                       50x40  16x16   4x3   50.0%   50.0%
blocks.1.mlp.0.weight               64x32   8x16   8x2   90.0%   87.5%
blocks.1.mlp.2.weight               32x64   8x16   4x4   90.0%   87.5%
9 tensors masked: 34 of 92 blocks kept, 63.0% pruned
4 tensors skipped:
  head.weight 48x32: it is shared with 'embedding.weight'
  tiny.weight 64x8: a 16x16 block is larger than its shape (64, 8)
  single.weight 16x16: its shape (16, 16) is a single 16x16 block, which is always kept
  normed.weight 32x32: another parametrization (_WeightNorm) computes it""",
    )
    entry = sparsifier.summary().groups[-1]
    assert (entry.fqn, entry.grid, entry.kept, entry.frozen) == (
        "blocks.1.mlp.2.weight",
        (4, 4),
        2,
        False,
    )
    assert {s.fqn: s.code for s in sparsifier.summary().skipped} == {
        "head.weight": "shared",
        "tiny.weight": "smaller_than_block",
        "single.weight": "one_block",
        "normed.weight": "parametrized",
    }
    sparsifier.freeze()
    assert all(entry.frozen for entry in sparsifier.summary().groups)
    assert str(SupermaskSparsifier().summary()) == "no block masks: call prepare() first"


# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: Any, sparsifier: Any, scheduler: Any, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        batch = torch.randint(48, (4, 6))
        nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        if scheduler is not None:
            scheduler.step()


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


def test_the_state_dict_of_the_model_alone_reproduces_its_output() -> None:
    model, sparsifier = prepared([{"tensor_fqn": "*"}])
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.7
    sparsifier.step()
    other, _ = prepared([{"tensor_fqn": "*"}])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), model(tokens()))


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


# -------------------------------------------------------------------------------------------------
# Squashing and converting
# -------------------------------------------------------------------------------------------------


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


def test_params_to_keep() -> None:
    model, sparsifier = prepared()
    sparsifier.squash_mask(
        params_to_keep=("sparsity_level",),
        params_to_keep_per_layer={"head": ("blocksize",), "module.blocks.0.mlp.0": ("tensor_fqn",)},
    )
    assert model.head.sparse_params == {"sparsity_level": 0.5, "blocksize": 16}
    assert model.blocks[0].mlp[0].sparse_params == {
        "sparsity_level": 0.5,
        "tensor_fqn": "blocks.0.mlp.0.weight",
    }
    assert model.blocks[1].mlp[0].sparse_params == {"sparsity_level": 0.5}


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


# -------------------------------------------------------------------------------------------------
# Saving and resuming
# -------------------------------------------------------------------------------------------------

RESUME = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.pruning.test_sparsifier import Model, make_run, train

    model, sparsifier, optimizer, scheduler = make_run(seed=1)
    saved = torch.load({path!r}, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    sparsifier.load_state_dict(saved["sparsifier"])
    train(model, optimizer, sparsifier, scheduler, range(4, 8))
    torch.save({{"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}}, {path!r} + ".out")
"""


def make_run(seed: int = 0) -> tuple[Model, SupermaskSparsifier, torch.optim.Optimizer, CubicSL]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Model()
    sparsifier = SupermaskSparsifier(0.8, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "*"}])
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.05), lr=1e-2)
    return model, sparsifier, optimizer, CubicSL(sparsifier, total_t=6, delta_t=1)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_run_resumed_in_a_new_process_continues_bit_for_bit(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        model, sparsifier, optimizer, scheduler = make_run()
        train(model, optimizer, sparsifier, scheduler, range(4))
        path = str(tmp_path / "run.pt")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "sparsifier": sparsifier.state_dict(),
            },
            path,
        )
        train(model, optimizer, sparsifier, scheduler, range(4, 8))
    finally:
        torch.set_num_threads(threads)
    root = str(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(RESUME).format(root=root, path=path)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    resumed = torch.load(path + ".out", weights_only=True)
    assert_same(dict(resumed["model"]), dict(model.state_dict()))
    assert_same(resumed["sparsifier"], sparsifier.state_dict())


def test_state_dict_is_plain_and_loading_does_not_change_it() -> None:
    _, sparsifier = prepared()
    sparsifier.enable_mask_update = False
    state = sparsifier.state_dict()
    assert type(state) is dict and type(state["state"]) is dict
    assert set(state["groups"][0]) == {"tensor_fqn", "sparsity_level", "blocksize", "scores_init"}
    frozen = copy.deepcopy(state)
    _, other = prepared(sparsity_level=0.7)
    other.load_state_dict(state)
    assert_same(state, frozen)
    assert_same(other.state_dict(), frozen)
    other.step()
    other.groups[0]["sparsity_level"] = 0.1
    other.enable_mask_update = True
    other.step()
    assert_same(state, frozen)


def test_a_sparsifier_and_its_model_can_be_copied_together() -> None:
    model, sparsifier = prepared()
    CubicSL(sparsifier)  # replaces sparsifier.step by a wrapper around this very object
    for model_2, sparsifier_2 in (
        copy.deepcopy((model, sparsifier)),
        pickle.loads(pickle.dumps((model, sparsifier))),
    ):
        for group in sparsifier_2.groups:
            group["sparsity_level"] = 0.9
        sparsifier_2.step()
        mask, mask_2 = (m.head.parametrizations.weight[0] for m in (model, model_2))
        assert int(mask.n_kept) != int(mask_2.n_kept) == max(1, round(mask.scores.numel() * 0.1))
        sparsifier_2.squash_mask()
        assert type(model_2.head) is nn.Linear and parametrize.is_parametrized(model.head)


# -------------------------------------------------------------------------------------------------
# Bad input: a clear error, nothing changed
# -------------------------------------------------------------------------------------------------


class Awkward(Model):
    def __init__(self) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(32, 32, dtype=torch.int64), requires_grad=False)
        self.tied_a, self.tied_b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied_b.weight = self.tied_a.weight
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))


BAD_CONFIGS: list[tuple[Any, type[Exception], str]] = [
    ("head.weight", TypeError, r"config must be a list of dicts .* got str"),
    ({"tensor_fqn": "head.weight"}, TypeError, r"got dict: put it in a list"),
    (["head.weight"], TypeError, r"config\[0\]='head.weight' must be a dict"),
    ([{"fqn": "head.weight"}], ValueError, r"config\[0\] needs a 'tensor_fqn'.* it has \['fqn'\]"),
    (
        [{"tensor_fqn": "head.weight", "level": 1}],
        ValueError,
        r"'head.weight'\): unknown key 'level'",
    ),
    (
        [{"tensor_fqn": "haed.weight"}],
        ValueError,
        r"no parameter is called 'haed.weight'; nearest: 'head.weight'",
    ),
    (
        [{"tensor_fqn": "head"}],
        ValueError,
        r"no parameter is called 'head'; nearest: .*'head.weight'",
    ),
    ([{"tensor_fqn": "decoder.*"}], ValueError, r"glob 'decoder.\*' matches no weight"),
    ([{"tensor_fqn": "embedding.*"}], ValueError, r"glob 'embedding.\*' matches no weight"),
    (
        [{"tensor_fqn": "table"}, {"tensor_fqn": "table"}],
        ValueError,
        r"'table' is configured twice",
    ),
    (
        [{"tensor_fqn": "table"}, {"tensor_fqn": "module.table"}],
        ValueError,
        r"'table' is configured twice",
    ),
    (
        [{"tensor_fqn": "head.weight"}, {"tensor_fqn": "h*"}],
        ValueError,
        r"'head.weight' is configured twice: 'h\*'.*put the glob before",
    ),
    (
        [{"tensor_fqn": "norm.weight"}],
        ValueError,
        r"'norm.weight': it has shape \(32,\), and only 2-D",
    ),
    ([{"tensor_fqn": "counts"}], ValueError, r"'counts': it is torch.int64"),
    ([{"tensor_fqn": "tied_b.weight"}], ValueError, r"it is shared with 'tied_a.weight'.*untie"),
    ([{"tensor_fqn": "normed.weight"}], ValueError, r"another parametrization \(_WeightNorm\)"),
    ([{"tensor_fqn": "lazy.weight"}], ValueError, r"shape is not known yet; run one forward"),
    (
        [{"tensor_fqn": "table", "blocksize": 64}],
        ValueError,
        r"'table': a 64x64 block is larger than its shape \(32, 32\); choose a smaller",
    ),
    (
        [{"tensor_fqn": "table", "blocksize": 32}],
        ValueError,
        r"'table': its shape \(32, 32\) is a single 32x32 block",
    ),
    (
        [{"tensor_fqn": "table", "blocksize": 0}],
        ValueError,
        r"config\[0\] \('table'\): blocksize=0 must be at least 1",
    ),
    (
        [{"tensor_fqn": "table", "blocksize": (16, -1)}],
        ValueError,
        r"blocksize=\(16, -1\) must be at least 1",
    ),
    (
        [{"tensor_fqn": "table", "blocksize": 16.0}],
        TypeError,
        r"blocksize=16.0 must be an int, or a pair",
    ),
    ([{"tensor_fqn": "table", "blocksize": True}], TypeError, r"blocksize=True must be an int"),
    (
        [{"tensor_fqn": "table", "sparsity_level": 1.0}],
        ValueError,
        r"\('table'\): sparsity_level=1.0 is outside \[0, 1\)",
    ),
    (
        [{"tensor_fqn": "table", "sparsity_level": -0.1}],
        ValueError,
        r"sparsity_level=-0.1 is outside",
    ),
    (
        [{"tensor_fqn": "table", "sparsity_level": float("nan")}],
        ValueError,
        r"sparsity_level=nan is outside",
    ),
    (
        [{"tensor_fqn": "table", "sparsity_level": "0.5"}],
        TypeError,
        r"sparsity_level='0.5' is a str",
    ),
    (
        [{"tensor_fqn": "table", "scores_init": "ones"}],
        ValueError,
        r"scores_init='ones' is unknown; use 'kaiming_uniform'",
    ),
    (
        [{"tensor_fqn": "*", "blocksize": 512}],
        ValueError,
        r"nothing to prune: the config reaches no weight that can be",
    ),
]


@pytest.mark.parametrize(("config", "error", "message"), BAD_CONFIGS)
def test_bad_configs_leave_the_model_unchanged(
    config: Any, error: type[Exception], message: str
) -> None:
    model = Awkward()
    before = snapshot(model)
    model.lazy = nn.LazyLinear(32)  # has no values to compare
    sparsifier = SupermaskSparsifier(0.5, 16)
    with pytest.raises(error, match=message):
        sparsifier.prepare(model, config)
    assert sparsifier.groups == [] and sparsifier.state == {}
    del model.lazy
    assert_unchanged(model, before)
    assert model(tokens()).shape == (2, 6, 48)


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


def test_nothing_to_prune_without_a_config() -> None:
    with pytest.raises(ValueError, match=r"nothing to prune: LayerNorm has no nn.Linear"):
        prepared(model=nn.LayerNorm(4))
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        SupermaskSparsifier().prepare([], None)


def test_a_shared_head_is_skipped_by_globs_and_refused_by_name() -> None:
    model = Model(tied=True)
    with pytest.raises(ValueError, match=r"'head.weight': it is shared with 'embedding.weight'"):
        prepared([{"tensor_fqn": "head.weight"}], model)
    _, sparsifier = prepared(model=model)
    assert "head.weight" not in fqns(sparsifier)
    assert [s.code for s in sparsifier.summary().skipped] == ["shared"]


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


def test_squash_without_masks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the model carries no block mask"):
        squash(Model())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"params_to_keep": ("level",)},
            ValueError,
            r"params_to_keep names 'level', which a group does not have; it has .*'sparsity_level'",
        ),
        ({"params_to_keep": "sparsity_level"}, TypeError, r"must be a tuple of setting names"),
        (
            {"params_to_keep_per_layer": {"haed": ("blocksize",)}},
            ValueError,
            r"names 'haed', which has no mask; nearest: 'head'",
        ),
        ({"params_to_keep_per_layer": {"head": ("size",)}}, ValueError, r"\['head'\] names 'size'"),
    ],
)
def test_squash_mask_validates_before_it_folds(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, sparsifier = prepared()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sparsifier.squash_mask(**arguments)
    assert_unchanged(model, before)
    assert len(sparsifier.groups) == 5


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


def test_nan_weights_have_no_norm_to_start_from() -> None:
    model = Model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'head.weight' contains NaN"):
        prepared(model=model, scores_init="weight_norm")
    assert type(model.head) is nn.Linear


def test_another_parametrization_on_top_is_refused_at_squash() -> None:
    model, sparsifier = prepared()
    parametrize.register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(
        RuntimeError, match=r"'head.weight' carries Identity besides its block mask"
    ):
        sparsifier.squash_mask()
    assert parametrize.is_parametrized(model.blocks[0].mlp[0])


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


def test_load_state_dict_refuses_other_models_and_shapes() -> None:
    _, sparsifier = prepared()
    state = sparsifier.state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict: no model is prepared"):
        SupermaskSparsifier().load_state_dict(state)

    def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        copied = copy.deepcopy(state)
        change(copied)
        return copied

    cases = [
        (broken(lambda s: s.pop("groups")), r"needs 'state' and 'groups' \(KeyError: 'groups'\)"),
        (broken(lambda s: s["groups"].pop()), r"'head.weight' is masked here and not in the state"),
        (
            broken(lambda s: s["groups"].append({**s["groups"][0], "tensor_fqn": "tail.weight"})),
            r"'tail.weight' is not masked here",
        ),
        (
            broken(lambda s: s["groups"][4].update(blocksize=8)),
            r"'head.weight': saved with blocksize \(8, 8\)",
        ),
        (
            broken(lambda s: s["state"]["head.weight"].update(mask=torch.ones(2, 2).bool())),
            r"'head.weight': the saved mask has \(2, 2\) blocks and the weight here has \(3, 2\)",
        ),
        (
            broken(lambda s: s["groups"][4].update(sparsity_level=1.5)),
            r"'head.weight': sparsity_level=1.5",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            sparsifier.load_state_dict(wrong)
        assert_same(sparsifier.state_dict(), state)
    smaller = broken(lambda s: s["groups"].pop())
    smaller["groups"][0]["sparsity_level"] = 0.25
    sparsifier.load_state_dict(smaller, strict=False)
    assert sparsifier.groups[0]["sparsity_level"] == 0.25


def test_convert_before_squash_is_refused() -> None:
    model, sparsifier = prepared()
    with pytest.raises(RuntimeError, match=r"'blocks.0.mlp.0.weight' is not squashed yet"):
        sparsifier.convert(model)
    with pytest.raises(RuntimeError, match="has squashed nothing"):
        SupermaskSparsifier().convert(Model())


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


def test_memory_shared_under_another_shape_is_shared() -> None:
    a, b = nn.Linear(32, 64), nn.Linear(64, 32)
    b.weight = nn.Parameter(a.weight.detach().t())
    model = nn.Sequential(a, b)
    with pytest.raises(ValueError, match=r"shared with '1\.weight'"):
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "0.weight"}])


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


def test_assigning_a_parameter_sets_the_weight_under_the_mask() -> None:
    linear = nn.Linear(16, 16)
    SupermaskSparsifier(0.5, 8).prepare(linear)
    linear.weight = nn.Parameter(torch.full((16, 16), 2.0))
    assert linear.parametrizations.weight.original.eq(2).all()
    assert zero_blocks(linear.weight, 8) == 2
    linear.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert "gain" in dict(linear.named_parameters())


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}])
def test_embeddings_that_write_past_the_mask_are_refused(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(16, 16, **option))
    with pytest.raises(ValueError, match="'0.weight'.*sparse=True or max_norm"):
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "0.weight"}])


def test_convert_names_the_layer_that_cannot_be_converted_and_keeps_sparse_params() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 60))
    sparsifier = SupermaskSparsifier(0.5, 16)
    sparsifier.prepare(model)
    sparsifier.squash_mask(params_to_keep=("blocksize",))
    with pytest.raises(ValueError, match=r"convert: '1': .*60, 64"):
        sparsifier.convert(model)
    converted = sparsifier.convert(model[:1])
    assert converted[0].sparse_params == {"blocksize": 16}


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


@pytest.mark.parametrize("entry", [[1], {"mask": torch.full((2, 2), 0.3)}])
def test_a_state_that_is_none_is_refused(entry: object) -> None:
    model = nn.Linear(16, 16)
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    saved = sparsifier.state_dict()
    before = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(ValueError, match="'weight': its state must be a dict with a bool tensor"):
        sparsifier.load_state_dict({**saved, "state": {"weight": entry}})
    assert sparsifier.state_dict().keys() == before.keys()
    assert torch.equal(sparsifier.state["weight"]["mask"], before["state"]["weight"]["mask"])


def zero_blocks(weight: torch.Tensor, size: int) -> int:
    """How many blocks of a weight are all zeros."""
    rows, cols = (n // size for n in weight.shape)
    return int((weight.detach().view(rows, size, cols, size) == 0).all(3).all(1).sum())
