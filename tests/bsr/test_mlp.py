"""MLPs with a forward of their own: what `fuse_activations` and `drop_dead_features` reach, and what they do not."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.bsr.common import prune_all
from tests.reference import relative_error
from torchao_superblock.bsr import (
    BSRLinear,
    load_bsr,
    register_activation,
    register_mlp,
    save_bsr,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.bsr.folded_activation import (
    FoldedActivation,
    activation_module,
    activation_name,
)
from torchao_superblock.ops import ACTIVATIONS


class MLP(nn.Module):
    """With the activation in front, as many have it."""

    def __init__(self, activation=None, dropout: float = 0.0):
        super().__init__()
        self.act = activation or nn.GELU()
        self.fc1 = nn.Linear(64, 96)
        self.fc2 = nn.Linear(96, 64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.dropout(self.act(self.fc1(x))))


def with_dead_features(model: nn.Module, first: str, second: str) -> nn.Module:
    """Blocks of 16: of the hidden features, one unit is the same for every input, and another is not read."""
    with torch.no_grad():
        for weight in (model.get_submodule(path).weight for path in (first, second)):
            weight[:, :16] = weight[:16] = 0.1
        model.get_submodule(first).weight[32:48] = 0
        model.get_submodule(second).weight[:, 64:80] = 0
    return model


def build(cls=MLP, first="fc1", second="fc2", **options) -> nn.Module:
    torch.manual_seed(0)
    return with_dead_features(prune_all(cls(**options), 16), first, second).eval()


def swap(model, **options):
    return swap_to_bsr(
        model,
        16,
        min_sparsity=0,
        **{"fuse_activations": True, "drop_dead_features": True} | options,
    )


def bert_layer(**options):
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertLayer

    config = transformers.BertConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=96, **options
    )
    config._attn_implementation = "eager"
    return BertLayer(config)


def transformers_mlp(folder, name, config, **options):
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(module, name)(getattr(transformers, config)(**options))


SIZES = {"hidden_size": 64, "intermediate_size": 96}
# What builds it, the layers, the activation's place, its name, and the shape of the input.
ARCHITECTURES = {
    "activation in front": (MLP, "fc1", "fc2", "act", "gelu"),
    "an attribute that is a function": (lambda: MLP(F.silu), "fc1", "fc2", "act", "silu"),
    "timm Mlp": (
        lambda: pytest.importorskip("timm").layers.Mlp(64, 96),
        *("fc1", "fc2", "act", "gelu"),
    ),
    "transformers ViTMLP": (
        lambda: transformers_mlp("vit", "ViTMLP", "ViTConfig", **SIZES),
        *("fc1", "fc2", "activation_fn", "gelu"),
    ),
    "transformers CLIPMLP": (
        lambda: transformers_mlp(
            "clip",
            *("CLIPMLP", "CLIPVisionConfig"),
            hidden_act="gelu_new",
            num_attention_heads=4,
            **SIZES,
        ),
        *("fc1", "fc2", "activation_fn", "gelu_tanh"),
    ),
    "transformers CLIPMLP, as CLIP has it": (
        lambda: transformers_mlp(
            "clip", "CLIPMLP", "CLIPVisionConfig", num_attention_heads=4, **SIZES
        ),
        *("fc1", "fc2", "activation_fn", "quick_gelu"),
    ),
    "transformers T5DenseActDense": (
        lambda: transformers_mlp("t5", "T5DenseActDense", "T5Config", d_model=64, d_ff=96),
        *("wi", "wo", "act", "relu"),
    ),
    "transformers DistilBERT FFN": (
        lambda: transformers_mlp("distilbert", "FFN", "DistilBertConfig", dim=64, hidden_dim=96),
        *("lin1", "lin2", "activation", "gelu"),
    ),
    "transformers BertLayer": (
        bert_layer,
        *("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", "gelu"),
    ),
    "transformers BertLayer, chunks": (
        lambda: bert_layer(chunk_size_feed_forward=2),
        *("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", "gelu"),
    ),
    "nn.TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, activation="gelu"),
        *("linear1", "linear2", "activation", "gelu"),
    ),
    "nn.TransformerEncoderLayer, relu module": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, activation=nn.ReLU()),
        *("linear1", "linear2", "activation", "relu"),
    ),
}


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def at(model: nn.Module, path: str):
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, tmp_path):
    make, first, second, act, activation = ARCHITECTURES[name]
    model = build(make, first, second)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 4, 64)
    expected = run(model, x)
    report = swap(model)
    layers = at(model, first), at(model, second)
    assert layers[0].activation == activation and layers[1].activation == "none"
    assert isinstance(at(model, act), FoldedActivation)
    assert (layers[0].out_features, layers[1].in_features) == (64, 64)
    assert any(note.startswith(f"{first}: applies the ") for note in report.notes)
    assert any(note.startswith(f"{first}: 32 of its features are dropped") for note in report.notes)
    assert relative_error(run(model, x), expected) <= 1e-5
    with torch.no_grad():
        assert relative_error(run(model, x), expected) <= 1e-5
        saved = tmp_path / "model.safetensors"
        save_bsr(model, saved)
        for other in (
            load_bsr(copy.deepcopy(dense), saved),
            load_bsr(copy.deepcopy(model), saved),
            copy.deepcopy(model),
        ):
            assert at(other, first).activation == activation
            assert at(other, first).place[0] is at(other, act)
            assert at(other, act).in_front() is at(other, first)
            assert torch.equal(run(other, x), run(model, x))
        swap_to_dense(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
        assert type(at(model, act)) is type(at(dense, act))
        assert relative_error(run(model, x), expected) <= 1e-5


@pytest.mark.parametrize("name", ["activation in front", "nn.TransformerEncoderLayer"])
def test_compiled(name):
    make, first, second, *_ = ARCHITECTURES[name]
    model = build(make, first, second)
    x = torch.randn(2, 4, 64)
    expected = model(x)
    swap(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) <= 1e-5


def test_pickle_keeps_layer_and_place_together():
    model = build()
    swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert other.fc1.place[0] is other.act and other.act.in_front() is other.fc1
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


class TestWhatIsAddedLater:
    """activation(Wx) + BAx is not activation(Wx + BAx)."""

    def test_hooks_on_the_layer_see_what_they_saw_before(self):
        model, x = build(), torch.randn(3, 64)
        expected = model(x)
        swap(model, drop_dead_features=False)
        seen = []
        with torch.no_grad():
            before = F.linear(x, model.fc1.to_dense(), model.fc1.bias)
            handle = model.fc1.register_forward_hook(lambda module, args, y: seen.append(y))
            assert relative_error(model(x), expected) <= 1e-5
            assert relative_error(seen[0], before) <= 1e-5
            assert model.fc1.applied_activation == "none"
            handle.remove()
            assert model.fc1.applied_activation == "gelu"
            assert relative_error(model(x), expected) <= 1e-5

    def test_a_hook_may_change_what_comes_out(self):
        model, x = build(), torch.randn(3, 64)
        swap(model, drop_dead_features=False)
        dense = swap_to_dense(other := copy.deepcopy(model)) and other
        for one in (model, dense):
            one.fc1.register_forward_hook(lambda module, args, y: y + args[0].sum())
        with torch.no_grad():
            assert relative_error(model(x), dense(x)) <= 1e-5

    @pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_hook"])
    def test_hooks_on_the_place_see_what_they_saw_before(self, kind):
        model, x = build(), torch.randn(3, 64)
        dense = copy.deepcopy(model)
        swap(model, drop_dead_features=False)
        seen = {}
        for name, one in (("bsr", model), ("dense", dense)):
            hook = lambda module, *args, name=name: seen.__setitem__(name, args[0][0])
            getattr(one.act, kind)(hook)
            one(x).sum().backward()
        assert relative_error(seen["bsr"], seen["dense"]) <= 1e-5

    def test_an_adapter_around_the_layer_is_refused(self):
        class LoRA(nn.Module):
            def __init__(self, base_layer):
                super().__init__()
                self.base_layer = base_layer
                self.a = nn.Linear(64, 4, bias=False)
                self.b = nn.Linear(4, 96, bias=False)

            def forward(self, x):
                return self.base_layer(x) + self.b(self.a(x))

        model, x = build(), torch.randn(3, 64)
        dense = copy.deepcopy(model)
        swap(model, drop_dead_features=False)
        for one in (model, dense):
            torch.manual_seed(1)
            one.fc1 = LoRA(one.fc1)
        with pytest.raises(RuntimeError, match=r"'fc1' applies gelu itself, and a LoRA was put"):
            model(x)
        model.fc1.base_layer.activation = "none"  # the way out that the message names
        assert relative_error(model(x), dense(x)) <= 1e-5

    def test_wrappers_that_only_call_the_layer_are_fine(self):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model, x = build(), torch.randn(3, 64)
        expected = model(x)
        swap(model)
        model.fc1 = checkpoint_wrapper(model.fc1)
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-5
        assert model.act.layer().applied_activation == "gelu"

    def test_another_layer_in_its_place_has_its_activation_applied(self):
        model, x = build(), torch.randn(3, 64)
        swap(model, drop_dead_features=False)
        model.fc1 = nn.Linear(64, 96)
        expected = model.fc2(F.gelu(model.fc1(x)))
        assert relative_error(model(x), expected) <= 1e-6

    def test_an_unfused_model_is_saved_as_one(self, tmp_path):
        model, x = build(), torch.randn(3, 64)
        dense = copy.deepcopy(model)
        expected = model(x)
        swap(model, drop_dead_features=False)
        model.fc1.activation = "none"
        save_bsr(model, tmp_path / "m.safetensors")
        load_bsr(dense, tmp_path / "m.safetensors")
        assert type(dense.act) is nn.GELU
        for one in (model, dense):
            assert relative_error(one(x), expected) <= 1e-5


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_every_activation_of_the_op_has_a_module_that_computes_it(name):
    module, x = activation_module(name), torch.randn(100)
    assert activation_name(module) == activation_name(ACTIVATIONS[name]) == name
    assert torch.equal(module(x), ACTIVATIONS[name](x))


def test_reentrant_checkpointing_recomputes_within_rounding():
    from torch.utils.checkpoint import checkpoint

    model = build()
    plain = copy.deepcopy(model)
    swap(model, drop_dead_features=False)
    x = torch.randn(3, 64, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    gradient, x.grad = x.grad, None
    plain(x).sum().backward()
    assert relative_error(gradient, x.grad) <= 1e-5


class TestLeftAlone:
    """Where the dataflow does not allow it, or nobody can see that it does."""

    @staticmethod
    def check(model: nn.Module, *calls, note: str | None = None) -> None:
        prune_all(model, 16).eval()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for layer in layers:
                layer.weight[16:32] = 0  # always the same, were nobody else to see it
        expected = [call(model) for call in calls]
        report = swap(model)
        for module in model.modules():
            assert not isinstance(module, FoldedActivation)
            assert not isinstance(module, BSRLinear) or not module.is_narrowed
        for call, before in zip(calls, expected, strict=True):
            assert relative_error(call(model), before) <= 1e-5
        if note is None:
            assert not report.notes
        else:
            assert any(note in text for text in report.notes), report.notes

    def test_a_second_reader(self):
        class Residual(MLP):
            def forward(self, x):
                y = self.fc1(x)
                return self.fc2(self.act(y)) + y[..., :64]

        x = torch.randn(3, 64)
        self.check(Residual(), lambda model: model(x))

    def test_a_second_reader_in_training_only(self):
        class Noisy(MLP):
            def forward(self, x):
                y = self.fc1(x)
                z = self.act(y)
                return self.fc2(z) + (y[..., :64] + z[..., 32:] if self.training else 0)

        x = torch.randn(3, 64)
        self.check(Noisy(), lambda model: model.eval()(x), lambda model: model.train()(x))

    def test_a_second_reader_that_an_argument_asks_for(self):
        class Hidden(MLP):
            def forward(self, x, residual=None, pre: bool = False):
                y = self.fc1(x)
                if pre:
                    return y
                z = self.act(y)
                return self.fc2(z) if residual is None else self.fc2(z) + z[..., 32:]

        x = torch.randn(3, 64)
        self.check(
            Hidden(),
            lambda model: model(x),
            lambda model: model(x, pre=True),
            lambda model: model(x, x),
        )

    @pytest.mark.parametrize("is_tensor", [True, False])
    def test_a_second_reader_that_asks_for_tensors(self, is_tensor):
        class Asks(MLP):
            def forward(self, x):
                y = self.fc1(x)
                z = self.act(y)
                if isinstance(y, torch.Tensor) == is_tensor:
                    return self.fc2(z) + y[..., :64] + z[..., 32:]
                return self.fc2(z)

        x = torch.randn(3, 64)
        self.check(Asks(), lambda model: model(x))

    def test_a_layer_that_runs_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.act = nn.Linear(64, 64), nn.ReLU()
                self.out = nn.Linear(64, 64)

            def forward(self, x):
                return self.out(self.fc(self.act(self.fc(x))))

        x = torch.randn(3, 64)
        self.check(Twice(), lambda model: model(x))

    def test_an_activation_that_runs_twice(self):
        class Twice(MLP):
            def forward(self, x):
                return self.act(self.fc2(self.dropout(self.act(self.fc1(x)))))

        x = torch.randn(3, 64)
        self.check(Twice(), lambda model: model(x))
        self.check(Twice(F.gelu), lambda model: model(x))

    @pytest.mark.parametrize("piece", ["fc1", "act"])
    def test_hooks_between_the_pieces(self, piece):
        model, seen = MLP(), []
        model.get_submodule(piece).register_forward_hook(lambda module, args, y: seen.append(y))
        x = torch.randn(3, 64)
        self.check(model, lambda model: model(x), note=f"since hooks watch {piece}")
        assert relative_error(seen[1], seen[0]) <= 1e-5

    def test_hooks_on_an_opened_child(self):
        model, seen = bert_layer(), []
        model.intermediate.register_forward_hook(lambda module, args, y: seen.append(y))
        build(lambda: model, "intermediate.dense", "output.dense")
        x = torch.randn(2, 4, 64)
        expected = run(model, x)
        report = swap(model)
        assert not model.intermediate.dense.is_narrowed  # the hook would see that
        assert model.intermediate.dense.activation == "gelu"  # but not this
        assert (
            "intermediate.dense: none of its features are dropped, since hooks watch intermediate"
            in report.notes
        )
        assert relative_error(run(model, x), expected) <= 1e-5
        assert relative_error(seen[1], seen[0]) <= 1e-5

    def test_shared_layers(self):
        model = nn.ModuleDict({"one": MLP(), "other": MLP()})
        model["other"].fc1 = model["one"].fc1
        model["other"].act = nn.Tanh()
        x = torch.randn(3, 64)
        self.check(
            model,
            lambda model: model["one"](x),
            lambda model: model["other"](x),
            note="one.fc1: the GELU behind it runs on its own, since one.fc1 has another place in the model",
        )

    def test_a_forward_on_the_instance(self):
        model = MLP()
        model.forward = lambda x: model.fc2(x.new_zeros(96) + model.fc1(x))
        x = torch.randn(3, 64)
        self.check(model, lambda model: model(x), note="the model: its activation runs on its own")

    def test_what_does_not_trace(self):
        class Clamped(MLP):
            def forward(self, x):
                y = self.act(self.fc1(x))
                if y.isinf().any():
                    y = y.clamp(-1, 1)
                return self.fc2(y)

        x = torch.randn(3, 64)
        self.check(
            nn.ModuleDict({"mlp": Clamped()}),
            lambda model: model["mlp"](x),
            note="mlp: its activation runs on its own and it keeps all its features, since it cannot be seen what "
            "follows what in it: TraceError",
        )

    def test_any_number_of_arguments(self):
        class Any(MLP):
            def forward(self, x, **kwargs):
                return super().forward(x) if not kwargs else self.fc1(x)

        x = torch.randn(3, 64)
        self.check(Any(), lambda model: model(x), note="it takes any number of arguments")

    def test_activations_that_are_not_torchs(self):
        transformers = pytest.importorskip("transformers")
        gelu = transformers.activations.GELUActivation(use_gelu_python=True)
        x = torch.randn(3, 64)
        model = MLP(gelu)
        prune_all(model, 16).eval()
        swap(model, drop_dead_features=False)
        assert model.fc1.activation == "none" and model.act is gelu
        assert model(x).shape == (3, 64)

    def test_tracing_leaves_no_trace(self):
        class Writes(MLP):
            def forward(self, x):
                self.last = x
                self.count = getattr(self, "count", 0) + 1
                torch.rand(3)
                return super().forward(x)

        model = build(Writes)
        model.count = 5
        model.dropout = nn.Sequential(nn.Dropout())
        model.eval()
        before, state = dict(vars(model)), torch.get_rng_state()
        swap(model)
        assert vars(model) == before and not hasattr(model, "last")
        assert not any(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)


def test_an_activation_that_the_code_names_stays_but_features_go():
    class Written(MLP):
        def forward(self, x):
            return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.1, self.training))

    model, x = build(Written), torch.randn(3, 64)
    del model.act
    expected = model(x)
    report = swap(model)
    assert model.fc1.activation == "none" and model.fc1.out_features == 64
    assert (
        "fc1: the gelu behind it runs on its own, since the code of Written names it"
        in report.notes
    )
    assert relative_error(model(x), expected) <= 1e-5
    training = build(Written).train()
    swap(training)
    assert training.fc1.out_features == 80  # a dropout does not leave constants as they are


def test_containers_are_looked_into():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleList([nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)])

        def forward(self, x):
            for module in self.net:
                x = module(x)
            return x

    model, x = build(Net, "net.0", "net.2"), torch.randn(3, 64)
    expected = model(x)
    swap(model)
    assert model.net[0].activation == "silu" and model.net[0].out_features == 64
    with torch.no_grad():
        assert relative_error(model(x), expected) <= 1e-5


def test_reports_say_what_equals_to_rounding():
    transformers = pytest.importorskip("transformers")
    model, x = build(activation=transformers.activations.FastGELUActivation()), torch.randn(3, 64)
    expected = model(x)
    report = swap(model)
    assert (
        "fc1: applies the FastGELUActivation behind it itself as 'gelu_tanh', which equals it to rounding"
        in report.notes
    )
    with torch.no_grad():
        assert relative_error(model(x), expected) <= 1e-5


def test_a_forward_that_takes_tensors_only():
    class Strict(MLP):
        def forward(self, x):
            if not isinstance(x, torch.Tensor):
                raise TypeError("not a tensor")
            return super().forward(x)

    model = build(Strict)
    swap(model)
    assert model.fc1.activation == "gelu"


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Block(MLP):
    def forward(self, *args):
        return self.feed_forward(args[0]) + args[0]

    def feed_forward(self, x):
        return MLP.forward(self, x)


def test_a_line_of_the_user():
    x = torch.randn(3, 64)
    model = build(Block, activation=Swish())
    expected = model(x)
    swap(plain := copy.deepcopy(model))
    assert plain.fc1.activation == "none" and not plain.fc1.is_narrowed
    register_activation(Swish, "silu")
    register_mlp(f"{Block.__module__}.Block", method="feed_forward")
    swap(model)
    assert model.fc1.activation == "silu" and model.fc1.is_narrowed
    with torch.no_grad():
        assert relative_error(model(x), expected) <= 1e-5


def test_an_unknown_activation_cannot_be_registered():
    for name in ("none", "swish"):
        with pytest.raises(
            ValueError, match=f"register_activation: the op has no activation '{name}'"
        ):
            register_activation(Swish, name)
