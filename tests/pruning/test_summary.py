"""What `summary()` says beyond the table: masks that no swap can use, zeros at ragged edges, frozen scores."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from torchao_superblock.bsr import swap_to_bsr
from torchao_superblock.pruning import SupermaskSparsifier


def prepared(model: nn.Module, blocksize: int = 16) -> SupermaskSparsifier:
    torch.manual_seed(0)
    sparsifier = SupermaskSparsifier(0.5, blocksize, scores_init="kaiming_uniform")
    sparsifier.prepare(
        model, [{"tensor_fqn": f"{name}.weight"} for name, _ in model.named_children()]
    )
    return sparsifier


def test_masks_that_no_swap_can_use_are_listed_with_the_reason() -> None:
    class Special(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(32, 32),
            "smaller_blocks": nn.Linear(40, 40),
            "ragged": nn.Linear(40, 50),
            "special": Special(32, 32),
            "words": nn.Embedding(32, 32),
        }
    )
    sparsifier = prepared(model)
    summary = sparsifier.summary()
    assert_expected_inline(
        "\n".join(str(summary).splitlines()[8:]),
        """\
2 tensors masked to no use at a swap:
  special.weight: Special has no block-sparse twin
  words.weight: Embedding has no block-sparse twin
1 tensor of use at a swap with pad=True:
  ragged.weight: its shape (50, 40) is not a multiple of any block size from 8 to 256 (47.2% of its elements are pruned)""",  # noqa: E501
    )
    sparsifier.squash_mask()
    unused = {entry.fqn for entry in summary.groups if entry.swap_obstacle is not None}
    assert unused == {f"{name}.weight" for name in ("special", "words")}
    report = swap_to_bsr(model, min_sparsity=0.0)
    assert {entry.fqn for entry in report.swapped} == {"plain", "smaller_blocks"}
    assert [entry.fqn for entry in summary.groups if entry.swap_needs_pad] == ["ragged.weight"]
    (entry,) = swap_to_bsr(model, min_sparsity=0.0, pad=True).swapped
    assert (entry.fqn, entry.blocksize, entry.padded) == ("ragged", (16, 8), (64, 40))


@pytest.mark.parametrize("shape", [(50, 40), (33, 16), (16, 17), (32, 32)])
def test_zeros_are_those_of_the_squashed_weight(shape: tuple[int, int]) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0])})
    sparsifier = prepared(model, 8)
    (entry,) = sparsifier.summary().groups
    sparsifier.squash_mask()
    zeros = (model["layer"].weight == 0).double().mean().item()
    assert entry.zeros == pytest.approx(zeros, abs=1e-12)


def test_scores_that_take_no_gradient_are_frozen() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    sparsifier = prepared(model)
    model["a"].requires_grad_(False)
    frozen = {entry.fqn: entry.scores_frozen for entry in sparsifier.summary().groups}
    assert frozen == {"a.weight": True, "b.weight": False}
    assert [line for line in str(sparsifier.summary()).splitlines() if "scores frozen" in line]
    sparsifier.freeze()
    assert "scores frozen" not in str(sparsifier.summary())
