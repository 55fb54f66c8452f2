"""The forms of the model compute the same, and every MLP layer is swapped."""

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark needs torchvision (the `examples` extra)")

from benchmarks.measure.error import relative_error
from benchmarks.model import vit

SMALL = {"image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}


def small() -> torch.nn.Module:
    return vit.zero_blocks(vit.build_vit(**SMALL), blocksize=16, sparsity=0.9)


def test_random_blocks_of_every_mlp_weight_are_zero():
    layers = dict(vit.mlp_linears(small()))
    assert len(layers) == 4
    for linear in layers.values():
        assert 0.85 < (linear.weight == 0).float().mean() < 0.95


def test_the_swapped_model_computes_the_same_and_the_dense_one_is_untouched():
    dense = small()
    ours = vit.swapped(dense, 16)
    assert not dict(vit.mlp_linears(ours)) and len(dict(vit.mlp_linears(dense))) == 4
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(ours(x), dense(x)) < 1e-5
    assert dense(x).abs().max() > 0  # torchvision's zero classifier would hide every difference


def test_narrow_models_compute_the_same_with_fewer_features():
    dense = small()
    narrow = vit.swapped(dense, 16, narrow=True)
    assert vit.hidden_features(narrow) < vit.hidden_features(dense) == 256
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(narrow(x), dense(x)) < 1e-5
    again = vit.unswapped(narrow)
    assert len(dict(vit.mlp_linears(again))) == 4
    assert relative_error(again(x), dense(x)) < 1e-5


def test_torch_bsr_computes_the_same():
    dense = small()
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(vit.with_torch_bsr(dense, 16)(x), dense(x)) < 1e-5


def test_a_layer_that_cannot_be_swapped_is_an_error():
    with pytest.raises(RuntimeError, match="not every MLP layer was swapped"):
        vit.swapped(small(), 24)
