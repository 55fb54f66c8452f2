"""What a config reaches, what is skipped, and every error in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils import parametrizations

from tests.pruning.text_model import Model, assert_unchanged, fqns, prepared, snapshot, tokens
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.pruning import Supermask, SupermaskSparsifier, squash

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
1 tensor of use at a swap with pad=True:
  ragged.weight: its shape (50, 40) is not a multiple of any block size from 8 to 256 (40.8% of its elements are pruned)
6 tensors skipped:
  table 32x32: Model is no nn.Linear: name it exactly to mask it
  embedding.weight 48x32: an embedding is not reached in passing: name it exactly to mask it
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
        "embedding.weight": "embedding",
        "table": "not_linear",
    }
    sparsifier.freeze()
    assert all(entry.frozen for entry in sparsifier.summary().groups)
    assert str(SupermaskSparsifier().summary()) == "no block masks: call prepare() first"


@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_csc", "to_sparse"])
def test_tensors_with_a_sparse_layout_are_skipped_or_left_alone(layout: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.register_buffer("graph", getattr(torch.eye(32), layout)())
    model.free = nn.Parameter(getattr(torch.eye(32), layout)())
    model[0].weight = nn.Parameter(getattr(model[0].weight.detach(), layout)())
    sparsifier = SupermaskSparsifier(blocksize=16)
    sparsifier.prepare(model, config=None)
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["1.weight"]
    skipped = {entry.fqn: entry.code for entry in sparsifier.summary().skipped}
    assert skipped == {"0.weight": "layout", "free": "not_linear"}
    with pytest.raises(ValueError, match="cannot mask 'free': it has the layout torch.sparse_"):
        SupermaskSparsifier(blocksize=16).prepare(model, config=[{"tensor_fqn": "free"}])


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
    skipped = {s.fqn: s.code for s in sparsifier.summary().skipped}
    assert skipped["head.weight"] == "shared"


def test_memory_shared_under_another_shape_is_shared() -> None:
    a, b = nn.Linear(32, 64), nn.Linear(64, 32)
    b.weight = nn.Parameter(a.weight.detach().t())
    model = nn.Sequential(a, b)
    with pytest.raises(ValueError, match=r"shared with '1\.weight'"):
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "0.weight"}])


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}])
def test_embeddings_that_write_past_the_mask_are_refused(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(16, 16, **option))
    with pytest.raises(ValueError, match="'0.weight'.*sparse=True or max_norm"):
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "0.weight"}])
