"""Masks are found where they are, by the name of the tensor they are on."""

from torch import nn

from torchao_superblock.pruning import SupermaskSparsifier
from torchao_superblock.pruning.finding import find_mask, has_mask, masks_of, named_masks


def test_masks_are_found_by_module_and_by_model() -> None:
    attention = nn.MultiheadAttention(32, 4)
    model = nn.ModuleDict({"attention": attention, "norm": nn.LayerNorm(32)})
    assert not has_mask(model) and find_mask(attention, "in_proj_weight") is None
    SupermaskSparsifier(0.5, 16).prepare(model, [{"tensor_fqn": "attention.*"}])
    nn.utils.parametrizations.weight_norm(model["norm"])  # is no mask

    assert list(masks_of(attention)) == ["in_proj_weight"]
    mask = find_mask(attention, "in_proj_weight")
    assert mask is attention.parametrizations.in_proj_weight[0]
    assert find_mask(model["norm"], "weight") is None and not has_mask(model["norm"])

    found = list(named_masks(model))
    assert [fqn for fqn, *_ in found] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert found[0][1:] == (attention, "in_proj_weight", mask)
    assert has_mask(model) and has_mask(attention)


def test_a_masked_root_has_no_path() -> None:
    linear = nn.Linear(32, 32)
    SupermaskSparsifier(0.5, 16).prepare(linear)
    assert [fqn for fqn, *_ in named_masks(linear)] == ["weight"]
