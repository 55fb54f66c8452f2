"""Gated MLPs: their gate, its activation and the product computed at once, and their dead features dropped."""

import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.bsr.common import CountCalls, prune, prune_all
from tests.bsr.test_mlp import SIZES, swap, transformers_mlp
from tests.reference import relative_error
from torchao_superblock.bsr import BSRLinear, load_bsr, save_bsr, swap_to_bsr, swap_to_dense
from torchao_superblock.bsr.gated_mlp import GatedMLP


class Gated(nn.Module):
    """As Llama has it."""

    def __init__(self, activation=None, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(64, 96, bias=bias)
        self.up_proj = nn.Linear(64, 96, bias=bias)
        self.down_proj = nn.Linear(96, 64, bias=bias)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Packed(nn.Module):
    def __init__(self, is_first: bool = True, bias: bool = False):
        super().__init__()
        self.gate_up = nn.Linear(64, 192, bias=bias)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=bias)
        self.is_first = is_first

    def forward(self, x):
        a, b = self.gate_up(x).chunk(2, dim=-1)
        y = self.act(a) * b if self.is_first else a * self.act(b)
        return self.down(self.norm(y))


def timm_mlp(name: str, **options):
    layers = pytest.importorskip("timm").layers
    return getattr(layers, name)(64, 96, **options)


T5_GATED = {"d_model": 64, "d_ff": 96, "feed_forward_proj": "gated-gelu"}
GATED = {
    "Llama's way": Gated,
    "with biases": lambda: Gated(nn.ReLU(), bias=True),
    "with an attribute that is a function": lambda: Gated(F.gelu),
    "packed": Packed,
    "packed, gate last, with biases": lambda: Packed(False, bias=True),
    "timm SwiGLU": lambda: timm_mlp("SwiGLU"),
    "timm GluMlp": lambda: pytest.importorskip("timm").layers.GluMlp(64, 192, act_layer=nn.SiLU),
    "timm GluMlp, gate first": lambda: pytest.importorskip("timm").layers.GluMlp(
        64, 192, act_layer=nn.GELU, gate_last=False
    ),
    "transformers LlamaMLP": lambda: transformers_mlp("llama", "LlamaMLP", "LlamaConfig", **SIZES),
    "transformers Phi3MLP": lambda: transformers_mlp(
        "phi3", "Phi3MLP", "Phi3Config", pad_token_id=0, **SIZES
    ),
    "transformers T5DenseGatedActDense": lambda: transformers_mlp(
        "t5", "T5DenseGatedActDense", "T5Config", **T5_GATED
    ),
}


def gated(make=Gated, sparsity: float = 0.5):
    torch.manual_seed(0)
    model = prune_all(make(), 16, sparsity).eval()
    dense = copy.deepcopy(model)
    report = swap_to_bsr(model, 16, min_sparsity=0, fuse_activations=True)
    return dense, model, report


@pytest.mark.parametrize("name", GATED)
def test_gated(name, tmp_path):
    dense, model, report = gated(GATED[name])
    x = torch.randn(2, 4, 64)
    expected = dense(x)
    assert isinstance(model, GatedMLP) and isinstance(model, type(dense))
    assert "computed at once with the" in report.notes[0]
    with torch.no_grad(), CountCalls() as calls:
        assert relative_error(model(x), expected) <= 1e-5
    # One layer that computes both takes a kernel of its own.
    is_packed = "acked" in name or "GluMlp" in name or "Phi3" in name
    assert calls.count == (2 if is_packed else 3)
    assert calls.activations == ({"none"} if is_packed else {model.fused_activation, "none"})
    (argument,) = inspect.signature(type(dense).forward).parameters.keys() - {"self"}
    with torch.no_grad():
        assert torch.equal(model(**{argument: x}), model(x))
    y = model(x)  # with gradients
    assert relative_error(y, expected) <= 1e-5
    y.sum().backward()
    dense(x).sum().backward()
    save_bsr(model, tmp_path / "m.safetensors")
    others = [load_bsr(copy.deepcopy(dense), tmp_path / "m.safetensors"), copy.deepcopy(model)]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    others.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    with torch.no_grad():
        for other in others:
            assert type(other) is type(model)
            assert torch.equal(other(x), model(x))
    # A second swap changes nothing.
    assert not swap(model, drop_dead_features=False).notes and type(others[0]) is type(model)
    swap_to_dense(model)
    assert type(model) is type(dense)
    assert model.__dict__.keys() == dense.__dict__.keys()
    assert relative_error(model(x), expected) <= 1e-5


def test_gated_gradients():
    dense, model, _ = gated(lambda: Gated(bias=True))
    x = torch.randn(5, 64, requires_grad=True)
    for one in (model, dense):
        one(x).square().sum().backward()
    gradient = x.grad.clone()
    x.grad = None
    dense(x).square().sum().backward()
    assert relative_error(gradient - x.grad, x.grad) <= 1e-5
    assert relative_error(model.up_proj.bias.grad, dense.up_proj.bias.grad / 2) <= 1e-5


def test_gated_compiled_and_exported():
    dense, model, _ = gated()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = dense(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) <= 1e-5
        program = torch.export.export(model, (x,))
        assert relative_error(program.module()(x), expected) <= 1e-5


def test_gated_by_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    dense, model, _ = gated()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    x = torch.randn(3, 64)
    with torch.no_grad(), CountCalls() as calls:
        assert relative_error(model(x), dense(x)) <= 1e-5
    assert "silu" in calls.activations


class TestGatedLeavesTheOldForward:
    @staticmethod
    def check(change):
        dense, model, _ = gated()
        for one in (model, dense):
            torch.manual_seed(1)
            change(one)
        x = torch.randn(3, 64)
        with torch.no_grad(), CountCalls() as calls:
            assert relative_error(model(x), dense(x)) <= 1e-5
        assert calls.activations == {"none"}

    def test_with_an_adapter(self):
        class LoRA(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.a = base, nn.Linear(64, 96)

            def forward(self, x):
                return self.base(x) + self.a(x)

        self.check(lambda model: setattr(model, "gate_proj", LoRA(model.gate_proj)))

    def test_with_a_hook(self):
        for path in ("gate_proj", "up_proj", "act_fn"):
            self.check(
                lambda model, path=path: model.get_submodule(path).register_forward_hook(
                    lambda module, args, y: y * 2
                )
            )

    def test_with_a_hook_on_what_comes_in(self):
        for path in ("gate_proj", "up_proj", "act_fn"):
            self.check(
                lambda model, path=path: model.get_submodule(path).register_forward_pre_hook(
                    lambda module, args: (args[0] * 2,)
                )
            )

    def test_with_another_activation(self):
        self.check(lambda model: setattr(model, "act_fn", nn.Tanh()))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_gated_reads_blocks_that_were_pruned_or_frozen_later(name):
    from torch.nn.utils import prune as torch_prune

    _, model, _ = gated()
    layer = model.get_submodule(name).requires_grad_(False)
    keep = torch.ones_like(layer.values)
    keep[0] = 0
    torch_prune.custom_from_mask(layer, "values", keep)
    x = torch.randn(3, 64)
    with torch.no_grad():
        gate, up = (
            F.linear(x, one.to_dense(), one.bias) for one in (model.gate_proj, model.up_proj)
        )
        hidden = F.silu(gate) * up
        assert relative_error(model(x), model.down_proj(hidden)) <= 1e-5


class TestGatedIsNotFused:
    @staticmethod
    def check(model, reason: str):
        prune_all(model, 16).eval()
        x = torch.randn(3, 64)
        expected = model(x)
        report = swap_to_bsr(model, 16, min_sparsity=0, fuse_activations=True)
        assert not isinstance(model, GatedMLP)
        assert any(reason in note for note in report.notes), report.notes
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-5

    def test_where_more_is_returned(self):
        class More(Gated):
            def forward(self, x):
                y = super().forward(x)
                return y + x

        self.check(More(), "since it does more than that")
        # Half of it is done all the same.
        self.check(More(), "gate_proj: applies the SiLU behind it itself")

    def test_where_something_is_kept(self):
        class Keeps(Gated):
            def forward(self, x):
                self.last = x
                return super().forward(x)

        model = Keeps()
        x = torch.randn(3, 64)
        swap(model)
        with torch.no_grad():
            model(x)
        assert model.last is x

    def test_where_hooks_watch(self):
        model = Gated()
        model.up_proj.register_forward_hook(lambda module, args, y: None)
        self.check(model, "since hooks watch up_proj")

    def test_where_blocks_differ(self):
        model = Gated()
        prune(model.gate_proj, 16)
        prune(model.up_proj, 32)
        report = swap_to_bsr(model, None, min_sparsity=0, fuse_activations=True)
        assert (
            "gate_proj and up_proj: the silu and the product behind them run on their own, since the two layers differ "
            "in their shapes or block sizes" in report.notes
        )

    def test_where_a_block_lies_in_both_halves(self):
        class Odd(Packed):
            def __init__(self):
                super().__init__()
                self.gate_up = nn.Linear(64, 48)
                self.norm, self.down = nn.LayerNorm(24), nn.Linear(24, 64)

        self.check(Odd(), "since a block would lie in both halves of the layer")

    def test_off_by_default(self):
        model = prune_all(Gated(), 16)
        assert not swap_to_bsr(model, 16, min_sparsity=0).notes
        assert type(model) is Gated


class TestGatedDeadFeatures:
    """Hidden features in 6 units of 16; whole strips of 64 are not in the way."""

    @staticmethod
    def build(packed: bool, bias: bool, is_first: bool = True):
        torch.manual_seed(0)
        model = Packed(is_first, bias) if packed else Gated(bias=bias)
        if packed:
            model.norm = nn.Dropout(0.5)
        prune_all(model.double(), 16).eval()
        layers = [m for m in model.children() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            for layer in layers:
                layer.weight[:, :16] = 0.1  # every row has a block
            layers[-1].weight[:16] = 0.1
            layers[-1].weight[:, 64:80] = 0  # unit 4 is not read
            weights = layers[0].weight.chunk(2) if packed else [one.weight for one in layers[:2]]
            weights[0][16:32] = 0  # unit 1 of the first factor is constant
            weights[1][32:48] = 0  # unit 2 of the other
            for weight in weights:
                weight[48:64] = 0  # unit 3 of both
        return model

    # Without a bias, what is constant in one factor is zero, and so is the product.
    @pytest.mark.parametrize(("bias", "kept"), [(False, 32), (True, 64)])
    @pytest.mark.parametrize("kind", ["separate", "packed", "packed, gate last"])
    @pytest.mark.parametrize("fuse", [False, True])
    def test_the_result_is_the_same(self, kind, bias, kept, fuse):
        model = self.build("packed" in kind, bias, "last" not in kind)
        dense = copy.deepcopy(model)
        x = torch.randn(5, 64, dtype=torch.float64)
        expected = model(x)
        report = swap(model, fuse_activations=fuse)
        layers = [m for m in model.children() if isinstance(m, BSRLinear)]
        assert layers[-1].in_features == kept
        assert {layer.out_features for layer in layers[:-1]} == {kept * (1 + ("packed" in kind))}
        first = "gate_up" if "packed" in kind else "gate_proj and up_proj"
        assert any(
            note.startswith(f"{first}: {96 - kept} of its features are dropped: 16 that")
            for note in report.notes
        )
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-12
        swap_to_dense(model)
        for name, weight in dense.named_parameters():
            assert model.get_parameter(name).shape == weight.shape
        assert relative_error(model(x), expected) <= 1e-12

    def test_files(self, tmp_path):
        model = self.build(True, True)
        dense = copy.deepcopy(model)
        swap(model)
        save_bsr(model, tmp_path / "m.safetensors")
        load_bsr(dense, tmp_path / "m.safetensors")
        x = torch.randn(5, 64, dtype=torch.float64)
        with torch.no_grad():
            assert torch.equal(dense(x), model(x))

    def test_an_active_dropout_keeps_constants(self):
        model = self.build(True, True).train()
        swap(model)
        assert model.down.in_features == 80


def test_reports_say_what_equals_to_rounding():
    transformers = pytest.importorskip("transformers")
    _, _, report = gated(lambda: Gated(transformers.activations.FastGELUActivation()))
    assert report.notes == [
        "gate_proj and up_proj: computed at once with the gelu_tanh and the product behind them, which equals the "
        "model's own to rounding"
    ]
