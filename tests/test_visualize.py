"""Pictures show the same mask at every stage of a model, and say what is missing."""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from torchao_superblock import SupermaskSparsifier, SwapReport, swap_to_bsr
from torchao_superblock.bsr import swap
from torchao_superblock.pruning import Sensitivity
from torchao_superblock.pruning.one_shot import LayerSensitivity
from torchao_superblock.visualize import (
    block_masks,
    plot_block_masks,
    plot_sensitivity,
    plot_swap_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))


def prepared(model: nn.Module, blocksize: int = 16) -> SupermaskSparsifier:
    sparsifier = SupermaskSparsifier(sparsity_level=0.75, blocksize=blocksize)
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    return sparsifier


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


def test_prepared_squashed_and_swapped_show_the_same_masks():
    model = small_model()
    sparsifier = prepared(model)
    stages = [block_masks(model)]
    sparsifier.squash_mask()
    stages.append(block_masks(model, blocksize=16))
    swap_to_bsr(model, blocksize=16, min_sparsity=0.1)
    stages.append(block_masks(model))
    for stage in stages:
        assert [entry.fqn for entry in stage] == ["0.weight", "2.weight"]
        assert [entry.shape for entry in stage] == [(128, 64), (64, 128)]
        assert {entry.blocksize for entry in stage} == {(16, 16)}
        assert {entry.sparsity for entry in stage} == {0.75}
        for entry, first in zip(stage, stages[0], strict=True):
            assert torch.equal(entry.mask, first.mask)


def test_the_mask_is_true_exactly_where_blocks_are_kept():
    linear = nn.Linear(48, 32)
    with torch.no_grad():
        linear.weight[:16, 16:32] = 0
        linear.weight[16:, :16] = 0
    (entry,) = block_masks(linear, blocksize=16)
    assert entry.mask.tolist() == [[True, False, True], [False, True, True]]
    assert entry.fqn == "weight"


def test_ragged_blocks_count_as_blocks():
    model = nn.Sequential(nn.Linear(40, 40))
    sparsifier = SupermaskSparsifier(sparsity_level=0.5, blocksize=16)
    sparsifier.prepare(model, config=None)
    before = block_masks(model)[0]
    assert tuple(before.mask.shape) == (3, 3)
    sparsifier.squash_mask()
    assert torch.equal(block_masks(model, blocksize=16)[0].mask, before.mask)


def test_the_projection_of_attention_is_shown():
    attention = nn.MultiheadAttention(32, 2)
    SupermaskSparsifier(sparsity_level=0.5, blocksize=16).prepare(
        attention, config=[{"tensor_fqn": "in_proj_weight"}]
    )
    (entry,) = block_masks(attention)
    assert (entry.fqn, entry.shape) == ("in_proj_weight", (96, 32))


def test_dense_and_all_zero_weights_are_left_out():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.zeros_(model[1].weight)
    assert block_masks(model, blocksize=16) == []


def test_pictures_of_every_stage_are_drawn():
    model = small_model()
    sparsifier = prepared(model)
    assert png(plot_block_masks(model)).startswith(PNG)
    sparsifier.squash_mask()
    assert png(plot_block_masks(model, 16, title="mine")).startswith(PNG)
    report = swap_to_bsr(model, blocksize=16, min_sparsity=0.1)
    assert png(plot_block_masks(model)).startswith(PNG)
    assert png(plot_swap_report(report)).startswith(PNG)


def test_layers_of_one_role_share_a_heading():
    layers = nn.ModuleDict({f"layer_{i}": nn.Linear(32, 64) for i in range(12)})
    SupermaskSparsifier(sparsity_level=0.5, blocksize=16).prepare(layers, config=None)
    texts = [text.get_text() for text in plot_block_masks(layers).texts]
    assert "layer_*.weight" in texts
    assert "64 × 32, blocks of 16 × 16" in texts
    assert texts.count("layer_*.weight") == 1
    assert {"0  50%", "10  50%", "11  50%"} <= set(texts)


@pytest.mark.filterwarnings("error")
def test_the_users_layout_settings_do_not_move_the_panels():
    import matplotlib

    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
    SupermaskSparsifier(sparsity_level=0.5, blocksize=16).prepare(layers, config=None)
    plain = png(plot_block_masks(layers))
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        assert png(plot_block_masks(layers)) == plain


def test_a_panel_stays_inside_the_picture():
    layers = nn.ModuleList([nn.Linear(512, 16) for _ in range(9)] + [nn.Linear(16, 512)] * 1)
    SupermaskSparsifier(sparsity_level=0.5, blocksize=8).prepare(layers, config=None)
    figure = plot_block_masks(layers, width=5.0)
    assert len(figure.axes) == 10
    for axes in figure.axes:
        box = axes.get_position()
        assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1


def test_a_model_without_masks_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="prepare the model first"):
        plot_block_masks(nn.Linear(32, 32))


def test_an_empty_report_is_an_error():
    with pytest.raises(ValueError, match="no linear layer"):
        plot_swap_report(SwapReport())


def test_a_swap_report_names_what_was_skipped_and_why():
    entry = swap.SwapEntry("head", (10, 64), None, None, "its shape does not fit", "shape")
    texts = [text.get_text() for text in plot_swap_report(SwapReport([], [entry])).axes[0].texts]
    assert "10 × 64: its shape does not fit" in texts


def test_a_sensitivity_is_a_row_a_layer_and_a_column_a_level():
    layers = [
        LayerSensitivity("0.weight", (64, 64), (16, 16), 16, (0.001, 0.25)),
        LayerSensitivity("2.weight", (64, 64), (16, 16), 16, (-0.002, 0.5)),
    ]
    figure = plot_sensitivity(Sensitivity(1.5, (0.5, 0.8), layers))
    assert png(figure).startswith(PNG)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.weight", "2.weight"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50%", "80%"]
    assert [text.get_text() for text in axes.texts] == ["+0.001", "+0.25", "-0.002", "+0.5"]
    shades = axes.images[0].get_array()
    assert shades[1, 1] == 1 and shades[1, 0] == 0 and 0 < shades[0, 0] < shades[0, 1] < 1


def test_a_sensitivity_without_layers_is_an_error():
    with pytest.raises(ValueError, match="has no layers"):
        plot_sensitivity(Sensitivity(1.5, (0.5,), []))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torchao_superblock\[examples\]'"):
        plot_block_masks(nn.Linear(32, 32))


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, torchao_superblock.visualize; print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "False"
