"""The settings that a squash leaves on its modules."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pruning.text_model import assert_unchanged, prepared, snapshot


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
