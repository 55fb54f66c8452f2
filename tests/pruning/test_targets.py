"""Which tensors a config means: names as they stand, globs, entries that exclude."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torchao_superblock.pruning import SupermaskSparsifier


def make() -> nn.ModuleDict:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})

    return nn.ModuleDict({"a": block(), "b": block(), "head": nn.Linear(16, 16)})


def prepared(config: Any, model: nn.Module | None = None) -> SupermaskSparsifier:
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(make() if model is None else model, config)
    return sparsifier


def fqns(sparsifier: SupermaskSparsifier) -> list[str]:
    return [group["tensor_fqn"] for group in sparsifier.groups]


@pytest.mark.parametrize("name", ["a[0]", "what?", "all*", "[ab]"])
def test_a_name_that_exists_is_meant_as_it_stands(name: str) -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16), "a": nn.Linear(16, 16), "a0": nn.Linear(16, 16)}
    )
    assert fqns(prepared([{"tensor_fqn": f"{name}.weight"}], model)) == [f"{name}.weight"]
    with pytest.raises(ValueError, match="is configured twice"):
        prepared([{"tensor_fqn": f"{name}.weight"}] * 2, model=make_with(name))


def make_with(name: str) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(16, 16)})


def test_brackets_that_are_no_name_are_a_glob() -> None:
    assert fqns(prepared([{"tensor_fqn": "[ab].up.weight"}])) == ["a.up.weight", "b.up.weight"]


def test_entries_that_exclude() -> None:
    sparsifier = prepared(
        [{"tensor_fqn": "*"}, {"tensor_fqn": "b.*", "exclude": True}, {"tensor_fqn": "b.up.weight"}]
    )
    assert fqns(sparsifier) == ["a.up.weight", "a.down.weight", "head.weight", "b.up.weight"]
    skipped = sparsifier.summary().skipped
    assert [(s.fqn, s.code, s.reason) for s in skipped] == [
        ("b.down.weight", "excluded", "the entry 'b.*' excludes it")
    ]


def test_entries_that_only_exclude_start_from_every_linear() -> None:
    config = [
        {"tensor_fqn": "head.weight", "exclude": True},
        {"tensor_fqn": "*.down.*", "exclude": True},
    ]
    assert fqns(prepared(config)) == ["a.up.weight", "b.up.weight"]


def test_exclude_false_is_an_ordinary_entry() -> None:
    assert fqns(prepared([{"tensor_fqn": "head.weight", "exclude": False}])) == ["head.weight"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            [{"tensor_fqn": "head.weight", "exclude": 1}],
            TypeError,
            r"config\[0\] \('head.weight'\): exclude=1 must be True or False",
        ),
        (
            [{"tensor_fqn": "head.weight", "exclude": True, "blocksize": 8}],
            ValueError,
            r"an entry that excludes has no use for 'blocksize'",
        ),
        (
            [{"tensor_fqn": "*"}, {"tensor_fqn": "tail.*", "exclude": True}],
            ValueError,
            r"the glob 'tail.\*' matches no",
        ),
        (
            [{"tensor_fqn": "b.*", "exclude": True}, {"tensor_fqn": "*"}],
            ValueError,
            r"'b.up.weight' is excluded by 'b.\*' and reached by the later entry '\*'.*Put the one",
        ),
        (
            [{"tensor_fqn": "head.weight"}, {"tensor_fqn": "head.*", "exclude": True}],
            ValueError,
            r"'head.weight' is configured twice",
        ),
        (
            [{"tensor_fqn": "*", "exclude": True}],
            ValueError,
            r"nothing to prune: the config reaches no weight .*'\*' excludes it",
        ),
    ],
)
def test_entries_that_exclude_nothing_or_too_much(
    config: Any, error: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(error, match=message):
        prepared(config, model)
    assert all(type(child) in (nn.Linear, nn.ModuleDict) for child in model.children())


class Odd(nn.Module):
    """What a reader of a summary looks for, and no glob can mask."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4)
        self.words = nn.Embedding(16, 16)
        self.attention = nn.MultiheadAttention(16, 4)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.row = nn.Parameter(torch.randn(1, 16))
        self.pruned = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
        self.old_norm = nn.utils.weight_norm(nn.Linear(16, 16))
        self.plain = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)


@pytest.mark.parametrize("config", [None, [{"tensor_fqn": "*"}]])
def test_summary_names_every_weight_that_was_left_alone(config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
        model = Odd()
    sparsifier = prepared(config, model)
    codes = {entry.fqn: entry.code for entry in sparsifier.summary().skipped}
    attention = dict.fromkeys(
        ("attention.in_proj_weight", "attention.out_proj.weight"), "not_plain_linear"
    )
    assert codes == {
        "patches.weight": "not_linear",
        "words.weight": "embedding",
        "experts": "not_2d",
        "matrix": "not_linear",
        "pruned.weight": "not_a_parameter",
        "old_norm.weight": "not_a_parameter",
        **(attention if config is None else {}),
    }
    text = str(sparsifier.summary())
    assert "  experts 4x16x16: Odd holds it with 3 dimensions, and a mask takes 2" in text
    assert "  words.weight 16x16: an embedding is not reached in passing: name it exactly" in text


def test_a_weight_that_is_no_parameter_is_refused_by_name() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5))
    with pytest.raises(ValueError, match=r"'0.weight': it is no Parameter.*prune\.remove"):
        prepared([{"tensor_fqn": "0.weight"}], model)
    with pytest.raises(
        ValueError, match=r"reaches no weight that can be \('0.weight': it is no Para"
    ):
        prepared(None, model)
    prune.remove(model[0], "weight")
    assert fqns(prepared(None, model)) == ["0.weight"]


def test_a_glob_does_not_override_the_name_of_what_it_could_not_mask() -> None:
    config = [{"tensor_fqn": "0.weight", "sparsity_level": 0.25}, {"tensor_fqn": "*"}]
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16))
    sparsifier = prepared(config, model)
    assert {g["tensor_fqn"]: g["sparsity_level"] for g in sparsifier.groups} == {
        "0.weight": 0.25,
        "1.weight": 0.5,
    }
