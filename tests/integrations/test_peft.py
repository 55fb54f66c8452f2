"""peft (0.21): LoRA on block-sparse layers: trained, saved, merged where that loses nothing, refused where it does."""

import pytest
import torch
from torch import nn

from tests.bsr.common import prune
from torchao_superblock import BSRLinear, SupermaskSparsifier, swap_to_bsr

peft = pytest.importorskip("peft", reason="needs the `peft` extra")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from torchao_superblock.integrations.peft import (  # noqa: E402
    BlockSparseLoraLinear,
    load_adapter,
    lost_by_merging,
)

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(32, hidden)
        self.down = nn.Linear(hidden, 32, bias=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).relu()))


def swapped(hidden: int = 64) -> Block:
    """`up` and `down` block-sparse, in blocks of 8; `head` dense."""
    torch.manual_seed(0)
    model = Block(hidden)
    for linear in (model.up, model.down):
        prune(linear, 8, 0.5)
    report = swap_to_bsr(model, 8, min_sparsity=0.3, filter_fn=lambda _, fqn: fqn != "head")
    assert len(report.swapped) == 2
    return model


def config(*targets: str, **more: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets or ("up", "down", "head")), **more)


def train(model: nn.Module, steps: int = 3) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def fits(model: nn.Module, name: str = "default") -> None:
    """Make what the adapters add lie in the stored blocks: in the first block row of a layer, and no other."""
    for module in model.modules():
        if isinstance(module, BlockSparseLoraLinear):
            layer = module.get_base_layer()
            stored = layer.col_indices[: layer.crow_indices[1]].tolist()
            assert stored
            with torch.no_grad():
                A, B = module.lora_A[name].weight, module.lora_B[name].weight
                B.normal_()[8:] = 0
                for column in set(range(A.shape[1] // 8)) - set(stored):
                    A[:, 8 * column : 8 * column + 8] = 0


def test_lora_trains_on_block_sparse_layers_and_beside_them():
    base = swapped()
    dense_delta = {}
    before = tensors(base)
    model = get_peft_model(base, config())
    assert isinstance(base.up, BlockSparseLoraLinear) and isinstance(base.up.base_layer, BSRLinear)
    assert isinstance(base.head, peft.tuners.lora.Linear)
    train(model)
    for fqn in ("up", "down"):
        layer = base.get_submodule(fqn).base_layer
        assert torch.equal(layer.values, before[f"{fqn}.values"])
        assert not layer.values.requires_grad
        dense_delta[fqn] = base.get_submodule(fqn).get_delta_weight("default")
        assert dense_delta[fqn].abs().sum() > 0
    x = X.double()
    weight = base.up.base_layer.to_dense().double() + dense_delta["up"].double()
    expected = x @ weight.T + base.up.base_layer.bias.double()
    torch.testing.assert_close(base.up(X).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loader", [PeftModel.from_pretrained, load_adapter])
def test_an_adapter_is_saved_and_loaded(loader, tmp_path):
    model = get_peft_model(swapped(), config())
    train(model)
    model.save_pretrained(tmp_path)
    loaded = loader(swapped(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert isinstance(loaded.base_model.model.up, BlockSparseLoraLinear)


def test_several_adapters_and_dropout_and_low_precision():
    base = swapped().to(torch.bfloat16)
    model = get_peft_model(base, config(lora_dropout=0.1))
    model.add_adapter("other", config("up"))
    model.set_adapter("other")
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    with model.disable_adapter():
        assert torch.equal(model(X.bfloat16()), swapped().to(torch.bfloat16)(X.bfloat16()))


def test_merging_what_fits_loses_nothing():
    model = get_peft_model(swapped(), config(lora_bias=False))
    fits(model)
    assert lost_by_merging(model) == {}
    said = model(X)
    nnz = model.base_model.model.up.base_layer.nnz
    model.merge_adapter()
    torch.testing.assert_close(model(X), said, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), said, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.up) is BSRLinear and merged.up.nnz == nnz
    torch.testing.assert_close(merged(X), said, rtol=1e-4, atol=1e-5)


def test_padded_layers_take_adapters_and_merge_them():
    torch.manual_seed(0)
    base = Block(50)
    with torch.no_grad():
        base.up.weight[8:48].zero_()  # in blocks of 8, the last one of 2 rows
    swap_to_bsr(base, 8, min_sparsity=0.3, pad=True, filter_fn=lambda _, fqn: fqn == "up")
    assert base.up.values.shape[0] == 8 and base.up.out_features == 50
    model = get_peft_model(base, config("up", lora_bias=False))
    adapter = base.up
    with torch.no_grad():
        adapter.lora_B["default"].weight.normal_()[8:48] = 0
    assert lost_by_merging(model) == {}
    said = model(X)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(X), said, rtol=1e-4, atol=1e-5)
    assert not merged.up.values[4:, 2:].any()  # the padding


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_what_does_not_fit_is_refused_and_changes_nothing(method):
    model = get_peft_model(swapped(), config("head", "down"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before, kind = tensors(model), type(model.base_model.model.head)
    rule = r"of what is added to down is outside the stored blocks.*project=True"
    with pytest.raises(ValueError, match=rule):
        getattr(model, method)()
    assert type(model.base_model.model.head) is kind and not model.base_model.model.head.merged
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(model).items())
    with pytest.raises(ValueError, match="of what is added to the layer is outside"):
        model.base_model.model.down.merge()


def test_projecting_keeps_what_fits_and_reports_the_rest():
    model = get_peft_model(swapped(), config("down"))
    layer = model.base_model.model.down
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    (fraction,) = lost_by_merging(model).values()
    delta, before = layer.get_delta_weight("default").detach(), layer.base_layer.to_dense().detach()
    pattern = layer.base_layer.to_dense() != 0
    assert fraction == pytest.approx(float((delta * ~pattern).norm() / delta.norm()), rel=1e-4)
    with pytest.warns(
        UserWarning, match=rf"merge: {fraction:.1%} of what is added to down is .*lost"
    ):
        merged = model.merge_and_unload(project=True)
    torch.testing.assert_close(merged.down.to_dense(), before + delta * pattern)
    assert not layer.project


def test_a_bias_is_merged_and_one_without_place_is_refused():
    model = get_peft_model(swapped(), config("up", lora_bias=True))
    fits(model)
    with torch.no_grad():
        model.base_model.model.up.lora_B["default"].bias.fill_(0.5)
    said = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), said, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="no bias"):
        model = get_peft_model(swapped(), config("down", lora_bias=True))
    fits(model)
    before = model.base_model.model.down.base_layer.values.clone()
    with pytest.raises(ValueError, match="the layer has none to add it to"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.down.base_layer.values, before)


def test_what_is_not_finite_is_not_merged():
    model = get_peft_model(swapped(), config("up"))
    fits(model)
    with torch.no_grad():
        model.base_model.model.up.lora_B["default"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError):
        model.merge_and_unload(safe_merge=True)


def test_variants_that_need_the_whole_weight_are_refused():
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(swapped(), config("up", use_dora=True))
    with pytest.raises(NotImplementedError, match="weight of a BSRLinear is stored as blocks"):
        get_peft_model(swapped(), config("up", init_lora_weights="olora"))


def test_all_linear_names_what_it_would_leave_out():
    model = swapped()
    with pytest.raises(ValueError, match=r"finds no block-sparse layers.*\['down', 'up'\]"):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert type(model.up) is BSRLinear and model.up.values.requires_grad


def test_an_adapter_for_another_model_is_refused(tmp_path):
    model = get_peft_model(swapped(96), config("up"))
    model.save_pretrained(tmp_path)
    base = swapped()
    with pytest.raises(ValueError, match="'up' has 64 out_features, and the adapter is for 96"):
        load_adapter(base, tmp_path)
    other = nn.Sequential(base)
    with pytest.raises(ValueError, match="'up' is not in the model"):
        load_adapter(other, tmp_path)
    assert type(base.up) is BSRLinear and base.up.values.requires_grad
    with pytest.raises(FileNotFoundError, match="there is no .*adapter_model.safetensors"):
        load_adapter(base, tmp_path / "nowhere")


def test_on_a_prepared_model_the_scores_are_said_to_be_frozen():
    model = Block()
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "up.weight"}])
    with pytest.warns(UserWarning, match="scores of 1 block masks are frozen now.*requires_grad_"):
        adapted = get_peft_model(model, config("down"))
    (scores,) = (p for name, p in model.named_parameters() if name.endswith("scores"))
    assert not scores.requires_grad
    scores.requires_grad_(True)  # the way out
    before = scores.clone()
    train(adapted)
    sparsifier.step()
    assert not torch.equal(scores, before)


def test_masked_weights_take_no_adapters():
    model = Block()
    SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "up.weight"}])
    with pytest.raises(RuntimeError, match="'up' is a target and has a block mask.*squash first"):
        get_peft_model(model, config("up", "down"))
    assert type(model.down) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_prompts_freeze_scores_too():
    pytest.importorskip("transformers", reason="needs the `transformers` extra")
    from tests.integrations.transformer_models import build, targets

    model = build("llama")
    SupermaskSparsifier(0.5, 8).prepare(model, targets("llama"))
    with pytest.warns(UserWarning, match="scores of 14 block masks are frozen now"):
        get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the `transformers` extra")
    from tests.integrations.transformer_models import inputs_of, sparse

    model = sparse()
    model.save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = get_peft_model(
        load(tmp_path / "base"), config("q_proj", "up_proj", task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs_of("llama")).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        said = adapted.eval()(**inputs_of("llama")).logits
        assert torch.equal(again(**inputs_of("llama")).logits, said)
    # What `model.add_adapter` of transformers calls.
    model = peft.inject_adapter_in_model(config("q_proj"), load(tmp_path / "base"))
    assert isinstance(model.model.layers[0].self_attn.q_proj, BlockSparseLoraLinear)


def test_a_block_sparse_convolution_has_no_adapter():
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 16, 1), "up": nn.Linear(16, 16)})
    with torch.no_grad():
        model["conv"].weight[:8] = 0
    assert swap_to_bsr(model, 8, min_sparsity=0.5).swapped
    with pytest.raises(ValueError, match="'conv' is a target and a BSRConv1x1.*swap_to_dense"):
        get_peft_model(model, config("conv", "up"))
    assert type(model["up"]) is nn.Linear
    get_peft_model(model, config("up"))


def test_lora_on_a_conv1d_in_blocks():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict({"up": Conv1D(32, 32)})
    with torch.no_grad():
        model["up"].weight[:16] = 0
    dense = model["up"].weight.detach().clone()
    swap_to_bsr(model, 8, min_sparsity=0.5)
    # As peft wants it for a Conv1D, whose weight lies transposed; blocks do not.
    adapted = get_peft_model(model, config("up", fan_in_fan_out=True, init_lora_weights=False))
    layer = adapted.base_model.model["up"]
    assert type(layer) is BlockSparseLoraLinear
    x = torch.randn(3, 32)
    added = layer.get_delta_weight("default")
    wanted = x @ (dense + added.T) + layer.base_layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    layer.project = True
    layer.merge()
    kept = dense.clone()
    kept[16:] += added.T[16:]
    torch.testing.assert_close(layer.base_layer.to_dense(), kept)
