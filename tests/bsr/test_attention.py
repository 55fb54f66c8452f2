"""`BSRMultiheadAttention` against `nn.MultiheadAttention`: alone, and inside of torch's and torchvision's models."""

import copy
import io
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bsr.common import CountCalls, prune_all
from tests.reference import assert_replays, block_mask, expand_mask, relative_error
from torchao_superblock import (
    swap_to_bsr,
)
from torchao_superblock.bsr import BSRLinear, BSRMultiheadAttention, BSRWeight

E, H = 32, 4
IN = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prune_weight(weight: nn.Parameter, blocksize: int = 8, sparsity: float = 0.75) -> None:
    N, K = weight.shape
    mask = expand_mask(block_mask(N // blocksize, K // blocksize, sparsity), (blocksize, blocksize))
    with torch.no_grad():
        weight.mul_(mask)


def prune_attention(
    module: nn.Module,
    sparsity: float = 0.75,
    which: tuple[str, ...] = ("in", "out"),
    blocksize: int = 8,
) -> nn.Module:
    """Zero blocks in the projections of every attention in a module; biases get values."""
    for attention in module.modules():
        if not isinstance(attention, nn.MultiheadAttention):
            continue
        for name, parameter in attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
            elif ("out" if name == "out_proj.weight" else "in") in which:
                prune_weight(parameter, blocksize, sparsity)
    return module


def pair(which=("in", "out"), sparsity=0.75, **options):
    """A dense attention and its block-sparse twin."""
    dense = prune_attention(nn.MultiheadAttention(E, H, **options), sparsity, which)
    swapped = copy.deepcopy(dense)
    report = swap_to_bsr(swapped, 8, min_sparsity=sparsity)
    assert type(swapped) is BSRMultiheadAttention and report.swapped
    return dense, swapped


def tokens(B: int | None, length: int, features: int = E, batch_first: bool = True):
    if B is None:
        return torch.randn(length, features)
    return torch.randn(*((B, length) if batch_first else (length, B)), features)


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "both more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim, vdim": {"kdim": 16, "vdim": 24},
    "vdim, no bias": {"vdim": 16, "bias": False},
}
INPUTS = ("self", "cross", "all different", "query is key", "key and value of query's content")
# Where sizes differ, so do the tensors.
CASES = [
    (options, kind)
    for options in OPTIONS
    for kind in (("all different",) if "dim" in options else INPUTS)
]


def inputs(kind: str, B: int | None, batch_first: bool, kdim: int = E, vdim: int = E, E: int = E):
    L, S = 5, 7
    query = tokens(B, L, E, batch_first)
    if kind == "self":
        return query, query, query
    if kind == "query is key":
        return query, query, tokens(B, L, vdim, batch_first)
    if kind == "key and value of query's content":
        return query, query.clone(), query.clone()
    key = tokens(B, S, kdim, batch_first)
    return query, key, key if kind == "cross" else tokens(B, S, vdim, batch_first)


def masks(B: int | None, L: int, S: int):
    """Keyword arguments for each kind of mask; nobody is masked out altogether."""
    n = 1 if B is None else B
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    each = torch.rand(n * H, L, S) > 0.7
    each[..., 0] = False
    padding = torch.zeros(n, S, dtype=torch.bool)
    padding[0, -2:] = True
    padding = padding[0] if B is None else padding
    yield {}
    yield {"attn_mask": causal}
    yield {"attn_mask": torch.randn(L, S)}
    yield {"attn_mask": each}
    yield {"attn_mask": torch.randn(n * H, L, S)}
    yield {"key_padding_mask": padding}
    yield {"key_padding_mask": torch.randn(padding.shape)}
    yield {"key_padding_mask": padding, "attn_mask": causal}
    yield {"key_padding_mask": torch.randn(padding.shape), "attn_mask": torch.randn(L, S)}
    yield {"attn_mask": causal, "is_causal": True}
    yield {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}


class TestNumbers:
    @pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "unbatched"])
    @pytest.mark.parametrize(("options", "kind"), CASES)
    def test_as_dense_attention(self, options, kind, layout):
        options = OPTIONS[options]
        batch_first, B = layout == "batch_first", None if layout == "unbatched" else 3
        dense, swapped = pair(batch_first=batch_first, **options)
        dense = dense.double()
        q, k, v = inputs(kind, B, batch_first, dense.kdim, dense.vdim)
        sequence = 0 if B is None or not batch_first else 1
        wanted_calls = {"self": 1, "cross": 2, "query is key": 2}.get(kind, 3)
        for need, average in ((False, True), (True, True), (True, False)):
            for mask in masks(B, q.shape[sequence], k.shape[sequence]):
                kwargs = {**mask, "need_weights": need, "average_attn_weights": average}
                in_double = {
                    name: value.double()
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                    else value
                    for name, value in kwargs.items()
                }
                # The same tensors where they are the same, so that torch takes the same way.
                doubles = {id(x): x.double() for x in (q, k, v)}
                expected = dense(*(doubles[id(x)] for x in (q, k, v)), **in_double)
                with CountCalls() as calls:
                    y, weights = swapped(q, k, v, **kwargs)
                assert calls.count == wanted_calls + 1
                assert y.shape == expected[0].shape and y.dtype == torch.float32
                assert relative_error(y, expected[0]) <= 1e-5, mask.keys()
                assert (weights is None) == (not need)
                if need:
                    assert relative_error(weights, expected[1]) <= 1e-5, mask.keys()

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_dropout_draws_what_dense_attention_draws(self, batch_first, need_weights):
        dense, swapped = pair(batch_first=batch_first, dropout=0.4)
        x = tokens(3, 6, E, batch_first)
        results = []
        for attention in (dense, swapped):
            torch.manual_seed(7)
            results.append(attention(x, x, x, need_weights=need_weights))
        assert relative_error(results[1][0], results[0][0]) <= 1e-5
        if need_weights:
            assert relative_error(results[1][1], results[0][1]) <= 1e-5
        swapped.eval()
        assert torch.equal(swapped(x, x, x)[0], swapped(x, x, x)[0])

    @pytest.mark.parametrize("kind", ["self", "cross", "query is key", "all different"])
    @pytest.mark.parametrize("options", ["plain", "both more keys"])
    def test_gradients(self, options, kind):
        dense, swapped = pair(batch_first=True, **OPTIONS[options])
        q, k, v = inputs(kind, 3, True)
        leaves = {id(x): x for x in (q, k, v)}
        for x in leaves.values():
            x.requires_grad_()
        grads = []
        for attention in (dense, swapped):
            y, weights = attention(q, k, v)
            (y.square().sum() + weights.square().sum()).backward()
            grads.append([x.grad for x in leaves.values()])
            for x in leaves.values():
                x.grad = None
        for own, expected in zip(grads[1], grads[0], strict=True):
            assert relative_error(own, expected) <= 1e-5
        for name in ("in_proj_bias", "out_proj.bias", "bias_k", "bias_v"):
            if options == "both more keys" or not name.startswith("bias_"):
                own, expected = swapped.get_parameter(name), dense.get_parameter(name)
                assert relative_error(own.grad, expected.grad) <= 1e-5, name
        for name, weight in (
            ("in_proj", dense.in_proj_weight),
            ("out_proj", dense.out_proj.weight),
        ):
            layer = swapped.get_submodule(name)
            values = layer.values.grad
            layer = copy.deepcopy(layer)
            with torch.no_grad():
                layer.values.copy_(values)
                kept = layer.to_dense() != 0
                assert relative_error(layer.to_dense()[kept], weight.grad[kept]) <= 1e-5

    @pytest.mark.parametrize("which", [("in",), ("out",)])
    @pytest.mark.parametrize("kind", INPUTS)
    def test_the_other_projection_dense(self, kind, which):
        dense, swapped = pair(which, batch_first=True)
        q, k, v = inputs(kind, 2, True)
        assert relative_error(swapped(q, k, v)[0], dense(q, k, v)[0]) <= 1e-5
        assert isinstance(swapped.in_proj_weight, BSRWeight if which == ("in",) else nn.Parameter)
        assert isinstance(swapped.out_proj, BSRLinear) == (which == ("out",))

    def test_x_is_not_copied(self):
        class Inputs(TorchDispatchMode):
            seen = ()

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.torchao_superblock.bsr_linear.default:
                    self.seen += ((args[0].data_ptr(), args[0].shape, args[0].stride()),)
                return func(*args, **(kwargs or {}))

        for batch_first in (True, False):
            _, swapped = pair(batch_first=batch_first)
            x = tokens(3, 6, E, batch_first)
            with Inputs() as mode, torch.no_grad():
                swapped(x, x, x, need_weights=False)
            assert mode.seen[0] == (x.data_ptr(), x.shape, x.stride())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_dtypes(self, dtype):
        dense, swapped = pair(batch_first=True)
        dense, swapped = dense.to(dtype), swapped.to(dtype)
        x, y = tokens(2, 5).to(dtype), tokens(2, 7).to(dtype)
        for key in (x, y):
            error = relative_error(swapped(x, key, key)[0], dense(x, key, key)[0])
            assert error <= {torch.float64: 1e-12}.get(dtype, 2e-2)

    def test_autocast(self):
        dense, swapped = pair(batch_first=True)
        x = tokens(2, 5)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[:, 4] = True
        with torch.autocast("cpu", torch.bfloat16):
            for need_weights in (True, False):
                kwargs = {"need_weights": need_weights, "key_padding_mask": padding}
                own = swapped.train()(x, x, x, **kwargs)[0]
                assert own.dtype == torch.bfloat16
                assert relative_error(own, dense.train()(x, x, x, **kwargs)[0]) <= 2e-2

    def test_empty_batch_and_one_token(self):
        dense, swapped = pair(batch_first=True)
        for shape in ((0, 4), (2, 1)):
            x = torch.randn(*shape, E)
            own, expected = swapped(x, x, x)[0], dense(x, x, x)[0]
            assert own.shape == expected.shape
            assert relative_error(own, expected) <= 1e-5


class TestAttributes:
    def test_are_those_of_a_dense_one(self):
        dense, swapped = pair(batch_first=True, dropout=0.1, add_bias_kv=True)
        assert isinstance(swapped, nn.MultiheadAttention)
        for name in (
            "embed_dim",
            "kdim",
            "vdim",
            "num_heads",
            "head_dim",
            "dropout",
            "batch_first",
        ):
            assert getattr(swapped, name) == getattr(dense, name)
        for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
            own, expected = getattr(swapped, name), getattr(dense, name)
            assert (own.shape, own.dtype) == (expected.shape, expected.dtype), name
        assert swapped.q_proj_weight is None and swapped._qkv_same_embed_dim
        assert torch.equal(swapped.in_proj_weight.to_dense(), dense.in_proj_weight)
        x = tokens(2, 3)
        own = F.linear(x, swapped.in_proj_weight, swapped.in_proj_bias)
        assert relative_error(own, F.linear(x, dense.in_proj_weight, dense.in_proj_bias)) <= 1e-6

    def test_separate_projections(self):
        dense, swapped = pair(kdim=16, vdim=24)
        assert swapped.in_proj_weight is None and not swapped._qkv_same_embed_dim
        for name in IN[1:]:
            assert torch.equal(getattr(swapped, name).to_dense(), getattr(dense, name))

    def test_the_constructor_says_how(self):
        with pytest.raises(TypeError, match=r"from_dense\(attention\), or swap_to_bsr"):
            BSRMultiheadAttention(32, 4)

    def test_is_the_same_object_with_the_same_hooks_and_biases(self):
        attention = prune_attention(nn.MultiheadAttention(E, H, batch_first=True))
        model = nn.ModuleDict({"one": attention, "again": attention})
        bias, out_bias, seen = attention.in_proj_bias, attention.out_proj.bias, []
        handle = attention.register_forward_hook(lambda *_: seen.append(1))
        out_handle = attention.out_proj.register_forward_hook(lambda *_: seen.append("out"))
        swap_to_bsr(model, 8, min_sparsity=0.5)
        assert model["one"] is model["again"] is attention
        assert attention.in_proj_bias is bias and attention.out_proj.bias is out_bias
        x = tokens(2, 3)
        attention(x, x, x)
        assert seen == [1]  # as in dense attention, which never calls out_proj
        attention.out_proj(x)
        assert seen == [1, "out"]
        handle.remove()
        out_handle.remove()
        attention(x, x, x)
        attention.out_proj(x)
        assert seen == [1, "out"]

    @pytest.mark.parametrize(("name", "sizes"), [("in_proj", {}), ("k_proj", {"kdim": 16})])
    def test_an_adapter_around_an_input_projection_is_refused(self, name, sizes):
        _, swapped = pair(batch_first=True, **sizes)
        setattr(swapped, name, nn.Sequential(getattr(swapped, name)))
        q = torch.randn(2, 3, E)
        with pytest.raises(TypeError, match=f"{name} is a Sequential, but its blocks are read"):
            swapped(q, q[..., : sizes.get("kdim", E)], q)

    def test_copies_pickles_and_moves(self):
        _, swapped = pair(batch_first=True)
        q, k, v = inputs("query is key", 2, True)
        expected = swapped(q, k, v)[0]
        file = io.BytesIO()
        torch.save(swapped, file)
        file.seek(0)
        for other in (
            copy.deepcopy(swapped),
            torch.load(file, weights_only=False),
            swapped.double().float(),
        ):
            assert torch.equal(other(q, k, v)[0], expected)
            assert type(other) is BSRMultiheadAttention

    def test_functional_call_with_other_blocks(self):
        """Other indices than those that were set: parts are worked out anew."""
        _, swapped = pair(batch_first=True)
        other_dense, other = pair(batch_first=True, sparsity=0.5)
        q, k, v = inputs("all different", 2, True)
        state = dict(other.state_dict())
        y = torch.func.functional_call(swapped, state, (q, k, v))[0]
        assert relative_error(y, other_dense(q, k, v)[0]) <= 1e-5

    def test_is_a_leaf_of_a_traced_graph(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = prune_attention(nn.MultiheadAttention(E, H, batch_first=True))

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0] + x

        model = Model()
        swap_to_bsr(model, 8, min_sparsity=0.5)
        traced = torch.fx.symbolic_trace(model)
        x = tokens(2, 4)
        assert torch.equal(traced(x), model(x))
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
            "attention"
        ]


class TestRefusedCalls:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda q, m: ((q, q[0], q[0]), {}), ValueError, "3-D.*2-D"),
            (lambda q, m: ((q[None], q[None], q[None]), {}), ValueError, "3-D.*2-D"),
            (lambda q, m: ((q, q, q[:, :3]), {}), ValueError, "one length"),
            (lambda q, m: ((q, q[:1], q[:1]), {}), ValueError, "batch of query"),
            (lambda q, m: ((q[..., :16],) * 3, {}), ValueError, "in_features=32"),
            (lambda q, m: ((q,) * 3, {"attn_mask": m[:4]}), ValueError, r"attn_mask.*\(5, 5\)"),
            (lambda q, m: ((q,) * 3, {"attn_mask": m.int()}), TypeError, "attn_mask.*int32"),
            (
                lambda q, m: ((q,) * 3, {"key_padding_mask": m}),
                ValueError,
                r"key_padding_mask.*\(2, 5\)",
            ),
            (lambda q, m: ((q,) * 3, {"is_causal": True}), RuntimeError, "attn_mask is needed"),
        ],
    )
    def test_are_named(self, change, error, words):
        _, swapped = pair(batch_first=True)
        args, kwargs = change(tokens(2, 5), torch.zeros(5, 5, dtype=torch.bool))
        with pytest.raises(error, match=words):
            swapped(*args, **kwargs)

    def test_nested_tensors(self):
        dense, swapped = pair(batch_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prototype
            nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        with pytest.raises(AssertionError, match="NestedTensor"):
            dense.train()(nested, nested, nested)
        with pytest.raises(AssertionError, match=r"NestedTensor.*key_padding_mask"):
            swapped(nested, nested, nested)


class Encoder(nn.Module):
    """torch's encoder around attention, with padding."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested tensors
            self.encoder = nn.TransformerEncoder(layer, 2)
        self.batch_first = options.get("batch_first", False)

    def forward(self, x):
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        y = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        y = y if self.batch_first else y.transpose(0, 1)
        return y.masked_fill(padding[..., None], 0)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x):
        causal = nn.Transformer.generate_square_subsequent_mask(4)
        return self.decoder(x[:, :4], x, tgt_mask=causal, tgt_is_causal=True)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested tensors
            self.both = nn.Transformer(E, H, 1, 1, 64, dropout=0.0)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.both(x, x[:3], tgt_mask=nn.Transformer.generate_square_subsequent_mask(3))


def vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=4, hidden_dim=E, mlp_dim=64
    )
    model.heads.head.weight.data.normal_()
    return model


MODELS = {
    "encoder, batch_first": lambda: Encoder(batch_first=True),
    "encoder, norm_first, gelu": lambda: Encoder(
        batch_first=True, norm_first=True, activation="gelu"
    ),
    "encoder, sequence first": Encoder,
    "encoder, no bias": lambda: Encoder(batch_first=True, bias=False),
    "decoder": Decoder,
    "transformer": Both,
    "torchvision vit": vit,
}
MODES = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


def model_pair(name):
    dense = prune_attention(MODELS[name]())
    swapped = copy.deepcopy(dense)
    report = swap_to_bsr(swapped, 8, min_sparsity=0.5)
    return dense, swapped, len(report.swapped)


def model_input(name):
    return torch.randn(2, 3, 16, 16) if "torchvision" in name else tokens(2, 6)


class TestModels:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", MODELS)
    def test_compute_the_same(self, name, mode):
        dense, swapped, count = model_pair(name)
        assert count == 2 * sum(isinstance(m, nn.MultiheadAttention) for m in dense.modules())
        training, grad = MODES[mode]
        x = model_input(name)
        dense.train(training), swapped.train(training)
        with grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            expected = dense(x)
            with CountCalls() as calls:
                y = swapped(x)
        # Self-attention twice, cross-attention of a decoder three times.
        crosses = sum("multihead_attn" in path for path, _ in swapped.named_modules()) > 0
        assert calls.count >= count + crosses
        assert relative_error(y, expected) <= 1e-5
        if training:
            y.sum().backward()
            for attention in swapped.modules():
                if isinstance(attention, BSRMultiheadAttention):
                    assert attention.in_proj.values.grad is not None

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", MODELS)
    def test_compile_without_a_graph_break(self, name, training):
        torch._dynamo.reset()
        dense, swapped, count = model_pair(name)
        dense.train(training), swapped.train(training)
        x = model_input(name)
        backend = torch._dynamo.testing.EagerAndRecordGraphs()
        compiled = torch.compile(swapped, fullgraph=True, backend=backend)
        with torch.set_grad_enabled(training), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert relative_error(compiled(x), dense(x)) <= 1e-5
        (graph,) = backend.graphs
        assert graph.code.count("torchao_superblock.bsr_linear") >= count

    def test_compile_with_inductor(self):
        torch._dynamo.reset()
        dense, swapped, _ = model_pair("torchvision vit")
        x = model_input("torchvision")
        y = torch.compile(swapped, fullgraph=True)(x)
        assert relative_error(y, dense(x)) <= 1e-5
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in swapped.parameters())

    def test_export(self):
        dense, swapped, _ = model_pair("decoder")
        x = model_input("decoder")
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(swapped.eval(), (x,), dynamic_shapes=({0: batch},))
        x = tokens(5, 6)
        assert relative_error(program.module()(x), dense.eval()(x)) <= 1e-5

    @pytest.mark.parametrize("which", [("in",), ("out",)])
    def test_the_fused_path_of_an_encoder_layer_is_off(self, which):
        """It would read weights that are not there, or be right by reading dense ones next to them."""
        layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True).eval()
        prune_attention(layer, which=which)
        x = tokens(2, 6)
        with torch.inference_mode():
            expected = layer(x)
            swap_to_bsr(layer, 8, min_sparsity=0.5)
            with CountCalls() as calls:
                assert relative_error(layer(x), expected) <= 1e-5
        assert calls.count == 1

    @pytest.mark.parametrize("name", ["swin_t", "maxvit_t"])
    def test_attention_made_of_linear_layers(self, name):
        torchvision = pytest.importorskip("torchvision")
        cls = {
            "swin_t": lambda: torchvision.models.SwinTransformer(
                [4, 4], 32, [1, 1], [2, 4], [4, 4]
            ),
            "maxvit_t": lambda: torchvision.models.MaxVit(
                (64, 64), 32, 4, [32, 64], [1, 1], 32, 0.0
            ),
        }[name]
        model = prune_all(cls().eval(), 8, 0.75)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = model(x)
            report = swap_to_bsr(model, 8, min_sparsity=0.5)
            names = " ".join(entry.fqn for entry in report.swapped)
            assert ("attn.qkv" if name == "swin_t" else "to_qkv") in names
            with CountCalls() as calls:
                assert relative_error(model(x), expected) <= 1e-5
            assert calls.count >= len(report.swapped)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert relative_error(compiled(x), expected) <= 1e-5


@pytest.mark.gpu
class TestGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", INPUTS)
    def test_computes_the_same(self, kind, dtype):
        dense = nn.MultiheadAttention(256, 4, batch_first=True)
        prune_attention(dense, 0.75, blocksize=32)
        swapped = copy.deepcopy(dense).cuda().to(dtype).eval()
        swap_to_bsr(swapped, 32, min_sparsity=0.5)
        dense = dense.double().eval()
        x = inputs(kind, 3, True, 256, 256, E=256)
        on_gpu = {id(t): t.cuda().to(dtype) for t in x}
        doubles = {id(t): t.double() for t in x}
        with torch.inference_mode():
            y = swapped(*(on_gpu[id(t)] for t in x), need_weights=False)[0]
            expected = dense(*(doubles[id(t)] for t in x))[0]
        assert relative_error(y, expected) <= {torch.float32: 1e-5}.get(dtype, 2e-2)

    def test_parts_need_no_look_at_the_device(self):
        """Cross-attention slices the blocks by numbers that were read when the indices were set; graphs can hold it."""
        attention = prune_attention(nn.MultiheadAttention(256, 4, batch_first=True), blocksize=32)
        attention = attention.cuda().eval()
        swap_to_bsr(attention, 32, min_sparsity=0.5)
        q, k = (torch.randn(2, n, 256, device="cuda") for n in (5, 7))

        def run() -> torch.Tensor:
            return attention(q, k, k, need_weights=False)[0]

        with torch.inference_mode():
            for _ in range(3):
                expected = run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_replays(run, expected)
        moved = attention.cpu()
        assert relative_error(moved(q.cpu(), k.cpu(), k.cpu())[0], expected) <= 1e-3

    def test_compiled(self):
        torch._dynamo.reset()
        layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, dropout=0.0)
        prune_attention(layer, blocksize=32)
        swapped = copy.deepcopy(layer).cuda()
        swap_to_bsr(swapped, 32, min_sparsity=0.5)
        x = torch.randn(2, 9, 256)
        y = torch.compile(swapped, fullgraph=True)(x.cuda())
        assert relative_error(y, layer.double()(x.double())) <= 1e-3
        y.sum().backward()
        assert swapped.self_attn.in_proj.values.grad is not None
