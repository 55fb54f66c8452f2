"""What a layer's sparsity costs is measured as said, and a budget is spent where it costs least."""

import copy
import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from torchao_superblock import prune_one_shot, sensitivity
from torchao_superblock.pruning import Sensitivity
from torchao_superblock.pruning.one_shot import LayerSensitivity
from torchao_superblock.pruning.one_shot.levels import Choice, levels_for_blocks, spend


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8))


def measured(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor, **options) -> Sensitivity:
    batches = list(zip(x.split(50), strict=True))
    targets = dict(zip(map(id, batches), wanted.split(50), strict=True))

    def loss(output, batch):
        return F.mse_loss(output, targets[id(batch)])

    levels = options.pop("levels", [0.75, 0.5])
    return sensitivity(model, batches, loss, levels, 4, progress=False, **options)


def test_each_change_is_that_of_pruning_this_layer_alone():
    model, x, wanted = small_model(), torch.randn(200, 16), torch.randn(200, 8)
    before = copy.deepcopy(model.state_dict())
    table = measured(model, x, wanted)
    assert table.levels == (0.5, 0.75)
    assert [layer.fqn for layer in table.layers] == ["0.weight", "2.weight", "3.weight"]
    assert [layer.n_blocks for layer in table.layers] == [32, 32, 8]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        assert table.loss == pytest.approx(F.mse_loss(model(x), wanted).item(), rel=1e-5)
        for layer, (i, level) in itertools.product(table.layers, enumerate(table.levels)):
            alone = copy.deepcopy(model)
            config = [{"tensor_fqn": layer.fqn}]
            prune_one_shot(alone, x.split(50), level, 4, config, progress=False)
            change = F.mse_loss(alone(x), wanted).item() - table.loss
            assert layer.changes[i] == pytest.approx(change, abs=1e-5)


def test_the_table():
    table = Sensitivity(
        0.25,
        (0.5, 0.75),
        [
            LayerSensitivity("layers.0.weight", (16, 32), (4, 4), 32, (0.00125, 0.5)),
            LayerSensitivity("head.weight", (8, 16), (4, 4), 8, (-0.001, 1.75)),
        ],
    )
    assert_expected_inline(
        str(table),
        """\
tensor           shape  blocks       50%    75%
---------------  -----  ------  --------  -----
layers.0.weight  16x32      32  +0.00125   +0.5
head.weight       8x16       8    -0.001  +1.75
change of the loss, 0.25 dense, when one tensor alone is pruned that far""",
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": []}, "levels is empty"),
        ({"levels": [0.5, 1.0]}, r"sparsity_level=1.0 is outside \[0, 1\)"),
        ({"config": [{"tensor_fqn": "nope"}]}, "no parameter is called 'nope'"),
        ({"damping": -1.0}, "damping=-1.0 must be above 0"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        measured(small_model(), torch.randn(50, 16), torch.randn(50, 8), **options)


def test_a_loss_that_is_not_finite_is_refused():
    wanted = torch.full((100, 8), float("inf"))
    with pytest.raises(ValueError, match="loss_fn returned inf for batch 0"):
        measured(small_model(), torch.randn(100, 16), wanted)


def brute_force(choices, needed):
    """The least loss over a grid of points on each layer's broken line."""
    lines = []
    for its_choices in choices:
        points = [Choice(0, 0, 0), *its_choices]
        lines.append(
            [
                (a.gain + t * (b.gain - a.gain), a.loss + t * (b.loss - a.loss))
                for a, b in itertools.combinations(points, 2)
                for t in torch.linspace(0, 1, 21).tolist()
            ]
        )
    return min(
        sum(loss for _, loss in found)
        for found in itertools.product(*lines)
        if sum(gain for gain, _ in found) >= needed - 1e-9
    )


@pytest.mark.parametrize("needed", [1.0, 7.0, 13.0])
def test_nothing_cheaper_brings_as_much(needed):
    choices = [
        [Choice(2, 1.0, 0.2), Choice(4, 5.0, 0.4), Choice(6, 5.5, 0.6)],  # a bump
        [Choice(3, 0.5, 0.3), Choice(5, 3.0, 0.5), Choice(5, 9.0, 0.6), Choice(-1, 0.1, 0.1)],
        [Choice(2, 2.0, 0.2), Choice(3, 6.0, 0.3)],
    ]
    found = spend(choices, needed)
    assert found is not None
    assert sum(choice.gain for choice in found) == pytest.approx(needed)
    assert sum(choice.loss for choice in found) <= brute_force(choices, needed) + 1e-9


def test_a_layer_that_starts_as_a_whole_is_taken_whole_or_not_at_all():
    choices = [
        [Choice(4, 0.1, 0.5), Choice(8, 0.4, 0.9)],
        [Choice(4, 1.0, 0.5), Choice(8, 3.0, 0.9)],
    ]
    assert spend(choices, 9)[1] == Choice(1, 0.25, 0.125)
    # The second layer starts at 4, and the first one gives back.
    first, second = spend(choices, 9, whole_start=True)
    assert second == Choice(4, 1.0, 0.5) and first.gain == pytest.approx(5)
    # Where nothing needs it, it stays dense.
    assert spend(choices, 8, whole_start=True)[1].level == 0
    # A start of 4 is more than is needed, and nobody can give back.
    assert [choice.gain for choice in spend(choices, 1, whole_start=True)] == [4, 0]
    assert spend(choices, 16.5, whole_start=True) is None


def test_what_cannot_be_had_is_none():
    assert spend([[Choice(2, 1, 0.5)], [Choice(3, 1, 0.5)]], 5.1) is None
    assert spend([[Choice(2, 1, 0.5)], [Choice(3, 1, 0.5)]], 5.0) is not None


@pytest.mark.parametrize("level", [0.1, 0.33, 0.5, 0.74])
def test_levels_add_up_to_the_budget_block_for_block(level):
    table = measured(small_model(), torch.randn(200, 16), torch.randn(200, 8))
    found = levels_for_blocks(table, level)
    pruned = sum(
        layer.n_blocks - max(1, round(layer.n_blocks * (1 - choice.level)))
        for layer, choice in zip(table.layers, found, strict=True)
    )
    assert pruned == 72 - round(72 * (1 - level))
