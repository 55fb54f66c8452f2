import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from tests.bsr.common import Model, assert_unchanged, prune, prune_all, snapshot
from tests.injection import each_interruption
from tests.reference import relative_error
from torchao_superblock import BSRLinear, load_bsr, save_bsr, swap_to_bsr, swap_to_dense


def no_bsr_left(model: nn.Module) -> bool:
    return not any("torchao_superblock" in type(module).__module__ for module in model.modules())


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), activation or nn.GELU(), nn.Linear(64, 32))


def swapped(activation: nn.Module | None = None, **options) -> nn.Sequential:
    model = prune_all(mlp(activation), 16)
    swap_to_bsr(model, 16, min_sparsity=0, **options)
    assert isinstance(model[0], BSRLinear) and isinstance(model[2], BSRLinear)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_is_what_it_was(dtype):
    model = prune_all(Model(), 16).to(dtype).eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bias = model.up.bias
    assert len(swap_to_bsr(model, 16, min_sparsity=0).swapped) == 2
    assert swap_to_dense(model) == ["up", "down"]
    assert no_bsr_left(model) and model.head.weight is model.embedding.weight
    assert model.up.bias is bias and not model.up.training and type(model.up) is nn.Linear
    assert list(model.state_dict()) == list(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_what_a_layer_has_carries_over():
    model = swapped()
    model[0].values.requires_grad_(False)
    model[2].eval()
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    generator = torch.get_rng_state()
    swap_to_dense(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert model[0].training and not model[2].training and model[2].weight.is_contiguous()
    model(torch.ones(1, 32)).sum().backward()
    handle.remove()
    model(torch.ones(1, 32))
    assert seen == [1] and model[2].weight.grad is not None


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_a_fused_activation_goes_back_to_its_place(activation):
    model = prune_all(mlp(activation), 16).eval()
    x = torch.randn(5, 32)
    before, kinds = model(x), [repr(module) for module in model]
    swap_to_bsr(model, 16, min_sparsity=0, fuse_activations=True)
    assert model[0].activation != "none"
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    swap_to_dense(model)
    assert [repr(module) for module in model] == kinds and not model[1].training
    assert torch.equal(model(x), before) and seen == [1]


def test_a_fused_activation_without_a_place_is_refused():
    for change in (
        lambda model: setattr(model, "1", nn.Dropout()),
        lambda model: setattr(model, "1", nn.Identity()),
        lambda model: model.insert(1, nn.Dropout()),
    ):
        model = swapped(fuse_activations=True)
        change(model)
        before = snapshot(model)
        with pytest.raises(
            ValueError, match="swap_to_dense: cannot make dense '0': it applies gelu.*'none'"
        ):
            swap_to_dense(model)
        assert_unchanged(model, before)


def test_a_single_layer_with_its_activation():
    model = nn.Sequential(prune(nn.Linear(32, 64), 16), nn.ReLU())
    swap_to_bsr(model, 16, min_sparsity=0, fuse_activations=True)
    assert model[0].activation == "relu"
    swap_to_dense(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU]


def test_a_place_whose_layer_is_gone_applies_the_activation_itself():
    model = swapped(fuse_activations=True)
    model[0] = prune(nn.Linear(32, 64), 16)
    x = torch.randn(3, 32)
    expected = model[2](nn.functional.gelu(model[0](x)))
    assert relative_error(model(x), expected) <= 1e-6
    swap_to_dense(model)
    assert type(model[1]) is nn.GELU
    assert relative_error(model(x), expected) <= 1e-6


def test_a_place_of_an_earlier_release_whose_layer_is_gone_is_refused():
    model = swapped(fuse_activations=True)
    del model[1]._front, model[1]._original  # as in its pickles
    model[0] = prune(nn.Linear(32, 64), 16)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'1': no layer right before it applies the gelu"):
        swap_to_dense(model)
    assert_unchanged(model, before)


def narrowed(between: list[nn.Module], **options) -> tuple[nn.Sequential, nn.Sequential]:
    """A chain of three layers with dead features between them: as it was, and swapped."""
    model = nn.Sequential(
        nn.Linear(32, 128),
        *copy.deepcopy(between),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
    )
    prune_all(model.eval(), 16, sparsity=0.6)
    second = model[1 + len(between)]
    with torch.no_grad():
        model[0].weight[:48] = 0  # constant
        second.weight[:, 64:96] = 0  # unread
        model[-1].weight[:, :32] = 0
    dense = copy.deepcopy(model)
    swap_to_bsr(model, 16, min_sparsity=0, drop_dead_features=True, **options)
    assert model[0].is_narrowed and model[1 + len(between)].is_narrowed
    return dense, model


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("between", [[nn.GELU()], [nn.ReLU(), nn.Dropout()], [nn.SiLU()], []])
def test_dropped_features_come_back_as_zeros(between, fuse):
    dense, model = narrowed(between, fuse_activations=fuse)
    x = torch.randn(7, 32)
    kept = model[0].out_features
    narrow = model[0].to_dense()
    swap_to_dense(model)
    assert [repr(module) for module in model] == [repr(module) for module in dense]
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in dense.state_dict().items()
    }
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(model[0].weight[:kept], narrow) and not model[0].weight[kept:].any()
    assert not model[0].bias[kept:].any()


def test_a_narrowed_layer_without_its_other_half_is_refused():
    _, model = narrowed([nn.GELU()])
    for change, words in (
        (lambda m: m.__delitem__(2), "'0': features were dropped"),
        (
            lambda m: m.insert(1, nn.LayerNorm(m[0].out_features)),
            "'0': .*'3': features were dropped",
        ),
        (lambda m: m[2].register_forward_hook(lambda *_: None), "'0': .*hooks.*'2': features"),
    ):
        part = copy.deepcopy(model)
        change(part)
        before = snapshot(part)
        with pytest.raises(ValueError, match=words):
            swap_to_dense(part)
        assert_unchanged(part, before)


def refused(model: nn.Module, words: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        swap_to_dense(model)
    assert_unchanged(model, before)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_what_would_be_lost_is_refused():
    model = swapped()
    model[0].register_buffer("scale", torch.ones(1))
    refused(model, "'0': it has scale of its own, which the layer in its place would lose")

    model = swapped()
    parametrize.register_parametrization(model[2], "bias", Twice())
    refused(model, "'2': it is a ParametrizedBSRLinear .parametrized")

    model = nn.Sequential(*(prune(nn.Linear(32, 32), 16) for _ in range(2)))
    model[1].weight.data.copy_(model[0].weight)
    swap_to_bsr(model, 16, min_sparsity=0)
    model[1].values = model[0].values
    refused(model, "'0': its blocks are shared: 0.values, 1.values are one tensor")

    model = swapped()
    with torch.no_grad():
        model[0].col_indices.add_(7)
    refused(model, "'0': the layer: col_indices must lie in")


def test_every_layer_that_is_refused_is_named():
    model = swapped(fuse_activations=True)
    model[1] = nn.Dropout()
    model[2].extra = nn.Identity()
    refused(model, "'0': it applies gelu.*'2': it has extra of its own")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(TypeError, match="must be an nn.Module, got str"):
        swap_to_dense("model")
    with pytest.raises(ValueError, match="itself a BSRLinear"):
        swap_to_dense(swapped()[0])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.ModuleDict({"a": nn.parallel.DistributedDataParallel(swapped())})
        with pytest.raises(ValueError, match="'a' is wrapped in DistributedDataParallel"):
            swap_to_dense(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_registered_twice_and_a_compiled_model():
    model = swapped()
    pair = nn.ModuleDict({"one": model, "other": model})
    assert swap_to_dense(pair) == ["one.0", "one.2"]
    assert pair["one"][0] is pair["other"][0] and no_bsr_left(pair)
    assert swap_to_dense(torch.compile(swapped())) == ["0", "2"]
    assert swap_to_dense(nn.Sequential(nn.ReLU())) == []


def test_a_meta_model():
    model = swapped().to("meta")
    swap_to_dense(model)
    assert model[0].weight.is_meta and model[0].weight.shape == (64, 32)


def test_after_inference_mode_it_can_be_trained():
    model = swapped()
    with torch.inference_mode():
        swap_to_dense(model)
    model(torch.ones(1, 32)).sum().backward()
    assert model[0].weight.grad is not None


def test_encoders_have_their_attention_and_nested_tensors_back():
    def make(**options):
        layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, **options)
        return nn.TransformerEncoder(layer, 2)

    model = prune_all(make(), 16).eval()
    x, padding = torch.randn(3, 5, 64), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    before = model(x, src_key_padding_mask=padding)
    report = swap_to_bsr(model, 16, min_sparsity=0)
    assert report.notes and not model.use_nested_tensor
    swap_to_dense(model)
    assert model.use_nested_tensor
    assert type(model.layers[1].self_attn.out_proj) is NonDynamicallyQuantizableLinear
    assert type(model.layers[1].linear1) is nn.Linear
    assert torch.equal(model(x, src_key_padding_mask=padding), before)

    with pytest.warns(UserWarning, match="norm_first"):
        never = prune_all(make(norm_first=True), 16)
    swap_to_bsr(never, 16, min_sparsity=0)
    swap_to_dense(never)
    assert not never.use_nested_tensor


def test_a_loaded_model_can_leave_too(tmp_path):
    dense, model = narrowed([nn.GELU()], fuse_activations=True)
    x = torch.randn(7, 32)
    save_bsr(model, tmp_path / "m.safetensors")
    other = load_bsr(copy.deepcopy(dense), tmp_path / "m.safetensors")
    swap_to_dense(other)
    torch.testing.assert_close(other(x), dense(x), atol=1e-5, rtol=1e-5)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    dense.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(dense(x), other(x))


def test_an_exception_anywhere_leaves_the_swapped_model_or_the_dense():
    def prepare():
        nonlocal model, before
        _, model = narrowed([nn.GELU()], fuse_activations=True)
        before = snapshot(model)
        return lambda: swap_to_dense(model)

    model, before = None, None
    for _ in each_interruption(prepare, step=29):
        if not no_bsr_left(model):
            assert_unchanged(model, before)


@pytest.mark.gpu
def test_on_a_gpu():
    model = prune_all(mlp(), 16).cuda()
    before = model[0].weight.clone()
    swap_to_bsr(model, 16, min_sparsity=0)
    swap_to_dense(model)
    assert torch.equal(model[0].weight, before) and model[0].weight.is_cuda
