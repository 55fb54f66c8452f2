"""GPT-2's `Conv1D` in blocks: swapped, saved in every way, loaded, dense again."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torchao_superblock import MagnitudeSparsifier, load_bsr, save_bsr, swap_to_bsr, swap_to_dense
from torchao_superblock.model_file import read_model

transformers = pytest.importorskip("transformers", reason="needs the `transformers` extra")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests.integrations.transformer_models import build, inputs_of, train_and_squash  # noqa: E402
from torchao_superblock.integrations.transformers import BlockSparseConfig, BSRConv1D  # noqa: E402


def logits(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(name)).logits


CONV1D = [
    f"transformer.h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def test_conv1d_is_swapped_saved_and_dense_again(tmp_path):
    model = build("gpt2")
    train_and_squash("gpt2", model, blocksize=(8, 16))  # of the weight as it lies: (in, out)
    said, dense = logits("gpt2", model), copy.deepcopy(model)
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert {entry.fqn for entry in report.swapped} >= {*CONV1D}
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is BSRConv1D and (layer.nx, layer.nf) == (64, 256)
    assert layer.blocksize == (16, 8) and layer.sparsity == pytest.approx(0.8, abs=0.02)
    assert torch.equal(layer.to_dense(), dense.transformer.h[0].mlp.c_fc.weight)
    torch.testing.assert_close(logits("gpt2", model), said, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "swapped")
    loaded = type(model).from_pretrained(tmp_path / "swapped")
    assert all(type(loaded.get_submodule(fqn)) is BSRConv1D for fqn in CONV1D)
    assert torch.equal(logits("gpt2", loaded), logits("gpt2", model))
    save_bsr(model, tmp_path / "model.bsr")
    loaded = load_bsr(build("gpt2"), tmp_path / "model.bsr")
    assert torch.equal(logits("gpt2", loaded), logits("gpt2", model))

    swap_to_dense(model)
    for fqn in CONV1D:
        module = model.get_submodule(fqn)
        assert type(module) is Conv1D and module.weight.is_contiguous()
        assert torch.equal(module.weight, dense.get_submodule(fqn).weight)
    assert torch.equal(logits("gpt2", model), said)


def test_conv1d_is_swapped_while_it_is_loaded(tmp_path):
    model = build("gpt2")
    train_and_squash("gpt2", model)
    model.save_pretrained(tmp_path)
    config = BlockSparseConfig(8, 0.5)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    swapped = {entry.fqn: entry.shape for entry in loaded.hf_quantizer.report.swapped}
    assert swapped.keys() == {*CONV1D, "lm_head"}
    assert swapped["transformer.h.0.mlp.c_fc"] == (256, 64)
    assert all(type(loaded.get_submodule(fqn)) is BSRConv1D for fqn in CONV1D)
    torch.testing.assert_close(logits("gpt2", loaded), logits("gpt2", model), rtol=1e-4, atol=1e-5)


def test_an_optimizer_goes_on_with_the_blocks_of_a_conv1d():
    def train(swap: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(64, 32), nn.GELU(), Conv1D(32, 64))
        sparsifier = MagnitudeSparsifier(0.5, (8, 16))
        sparsifier.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in (0, 2)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for i in range(8):
            x = torch.randn(6, 32, generator=torch.Generator().manual_seed(i))
            if i == 3:
                sparsifier.step()
                sparsifier.freeze()
            if i == 5 and swap:
                sparsifier.squash_mask()
                report = swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
                assert [entry.blocksize for entry in report.swapped] == [(16, 8)] * 2
            optimizer.zero_grad()
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(True) == pytest.approx(train(False), rel=1e-5)


def test_a_conv1d_is_no_linear_layer_in_files(tmp_path):
    def pruned(layer: nn.Module) -> nn.Sequential:
        with torch.no_grad():
            layer.weight[:16] = 0
        return nn.Sequential(layer)

    conv, linear = pruned(Conv1D(32, 32)), pruned(nn.Linear(32, 32))
    for model in (conv, linear):
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / type(model[0]).__name__)
    assert torch.equal(
        load_bsr(nn.Sequential(Conv1D(32, 32)), tmp_path / "BSRConv1D")[0].values, conv[0].values
    )
    with pytest.raises(
        ValueError, match="but a Linear in the model; it must be a plain transformers Conv1D"
    ):
        load_bsr(nn.Sequential(nn.Linear(32, 32)), tmp_path / "BSRConv1D")
    with pytest.raises(ValueError, match="but a Conv1D in the model; it must be a plain nn.Linear"):
        load_bsr(nn.Sequential(Conv1D(32, 32)), tmp_path / "BSRLinear")
    with pytest.raises(ValueError, match="stands for a transformers Conv1D"):
        read_model(tmp_path / "BSRConv1D")
    with pytest.raises(ValueError, match=r"itself an? transformers Conv1D.*BSRConv1D.from_dense"):
        swap_to_bsr(Conv1D(32, 32))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(conv)))
    x = torch.randn(2, 3, 32).transpose(0, 1)
    assert torch.equal(copied(x), conv(x))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv(x))
