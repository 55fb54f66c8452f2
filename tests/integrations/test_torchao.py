"""torchao's calls on our layers, and int8 weights beside them."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.bsr.common import prune, prune_all
from torchao_superblock import save_bsr, swap_to_bsr
from torchao_superblock.bsr import BSRLinear

pytest.importorskip("torchao", reason="needs torchao (the `torchao` extra)")

from torchao.quantization import Int8WeightOnlyConfig, quantize_

from torchao_superblock.integrations.torchao import (
    BlockSparseWeightConfig,
    block_sparse_weight,
    sparsify_,
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return prune_all(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), 16, 0.9)


def test_sparsify_is_torchaos_call():
    dense = model()
    expected = dense(torch.ones(2, 64))
    sparse = sparsify_(dense, block_sparse_weight(blocksize=16))
    assert sparse is dense and isinstance(sparse[0], BSRLinear) and isinstance(sparse[2], BSRLinear)
    torch.testing.assert_close(sparse(torch.ones(2, 64)), expected)


def test_sparsify_filters_and_says_what_stays_dense():
    dense = nn.Sequential(*model(), nn.Linear(64, 30))
    with pytest.warns(UserWarning, match=r"3: its shape \(30, 64\) is not a multiple"):
        sparsify_(dense, block_sparse_weight(16), lambda module, fqn: fqn != "0")
    assert type(dense[0]) is nn.Linear and isinstance(dense[2], BSRLinear)


def test_layers_that_blocks_do_not_fit_are_padded_if_the_config_says_so():
    linear = nn.Linear(50, 100)
    with torch.no_grad():
        linear.weight[16:].zero_()
    config = block_sparse_weight(16, 0.5, pad=True)
    around = nn.Sequential(linear), nn.Sequential(copy.deepcopy(linear))
    sparsify_(around[0], config)
    quantize_(around[1], config)
    for layer in (around[0][0], around[1][0], sparsify_(linear, config)):
        assert isinstance(layer, BSRLinear) and layer.out_features == 100


def test_sparsify_takes_a_lone_layer_and_other_configs():
    layer = sparsify_(prune(nn.Linear(64, 64), 16, 0.75), block_sparse_weight(16))
    assert isinstance(layer, BSRLinear)
    from torchao.sparsity import semi_sparse_weight

    untouched = model()
    sparsify_(untouched, semi_sparse_weight(), lambda module, fqn: False)  # torchao's own
    assert type(untouched[0]) is nn.Linear


def test_the_default_block_size_is_torchaos():
    assert block_sparse_weight() == BlockSparseWeightConfig(blocksize=64)


def test_tied_weights_stay():
    tied = nn.Sequential(nn.Embedding(64, 64), prune(nn.Linear(64, 64), 16, 0.9))
    tied[0].weight = tied[1].weight
    with pytest.warns(UserWarning, match="1: its weight is shared with 0.weight"):
        sparsify_(tied, block_sparse_weight(16))
    assert tied[1].weight is tied[0].weight


def test_quantize_knows_the_config():
    dense = model()
    handles = [dense[0].register_forward_hook(lambda *_: None)]
    expected = dense(torch.ones(2, 64))
    quantize_(dense, BlockSparseWeightConfig(16), lambda module, fqn: fqn in ("0", "2"))
    assert isinstance(dense[0], BSRLinear) and dense[0]._forward_hooks
    torch.testing.assert_close(dense(torch.ones(2, 64)), expected)
    handles[0].remove()


def test_quantize_leaves_dense_what_is_not_worth_it_and_says_so():
    layers = nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"a layer of shape \(64, 64\) stays dense: no block"):
        quantize_(layers, BlockSparseWeightConfig(16))
    assert type(layers[0]) is nn.Linear


def test_quantize_refuses_what_it_can_see():
    attention = nn.MultiheadAttention(64, 4)
    with pytest.raises(ValueError, match="output projection of an nn.MultiheadAttention"):
        quantize_(
            attention, BlockSparseWeightConfig(16), lambda module, _: isinstance(module, nn.Linear)
        )
    odd = nn.Sequential(nn.Linear(64, 30))
    with pytest.raises(ValueError, match=r"shape \(30, 64\) cannot be stored as blocks"):
        quantize_(odd, BlockSparseWeightConfig(16))
    assert type(odd[0]) is nn.Linear
    tied = model()
    tied = nn.Sequential(tied[0], nn.Linear(64, 128))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shared with one that was converted already"):
        quantize_(tied, BlockSparseWeightConfig(16))


@pytest.mark.parametrize("int8_first", [True, False])
def test_int8_on_what_stays_dense(int8_first, tmp_path):
    torch.manual_seed(0)
    mixed = nn.Sequential(prune(nn.Linear(64, 64), 16, 0.9), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(3, 64)
    expected = mixed(x)

    def int8() -> None:
        quantize_(mixed, Int8WeightOnlyConfig(version=2), lambda module, fqn: fqn == "2")

    if int8_first:
        int8()
    report = swap_to_bsr(mixed)
    if not int8_first:
        int8()
    assert [entry.fqn for entry in report.swapped] == ["0"]
    assert type(mixed[2].weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        out = mixed(x)
        assert (out - expected).norm() < 0.02 * expected.norm()
        compiled = torch.compile(mixed, fullgraph=True)
        torch.testing.assert_close(compiled(x), out, rtol=1e-5, atol=1e-5)
    path = tmp_path / "mixed.safetensors"
    with pytest.raises(TypeError, match="'2.weight' is a Int8Tensor"):
        save_bsr(mixed, path)
    assert not path.exists()


def test_int8_and_blocks_through_torchaos_safetensors_support(tmp_path):
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    mixed = nn.Sequential(prune(nn.Linear(64, 64), 16, 0.9), nn.GELU(), nn.Linear(64, 64))
    fresh = copy.deepcopy(mixed)
    swap_to_bsr(mixed)
    swap_to_bsr(fresh)
    with torch.no_grad():
        fresh[0].values.zero_()
        fresh[2].weight.zero_()
    quantize_(mixed, Int8WeightOnlyConfig(version=2), lambda module, fqn: fqn == "2")
    tensors, metadata = support.flatten_tensor_state_dict(mixed.state_dict())
    safetensors.save_file(tensors, str(tmp_path / "mixed.safetensors"), metadata=metadata)
    loaded = safetensors.load_file(str(tmp_path / "mixed.safetensors"))
    state, _left = support.unflatten_tensor_state_dict(loaded, metadata)
    fresh.load_state_dict(state, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), mixed(x))


def test_the_package_does_not_import_it():
    code = (
        "import sys, torchao_superblock; assert 'torchao_superblock.integrations.torchao' not in sys.modules\n"
        "sys.modules['torchao.core.config'] = None\n"
        "try:\n    import torchao_superblock.integrations.torchao\n"
        "except ImportError as error:\n    assert \"pip install 'torchao_superblock[torchao]'\" in str(error)\n"
        "else:\n    raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
