import copy
import pickle
import re

import pytest
import torch
import torch.nn.utils.prune
from expecttest import assert_expected_inline
from torch import nn

from tests.bsr.common import CountCalls, prune
from tests.injection import each_interruption
from tests.reference import TOLERANCE, relative_error
from torchao_superblock.bsr import BSRLinear

INDEX = {
    "crow_indices": torch.tensor([0, 1, 3], dtype=torch.int32),
    "col_indices": torch.tensor([1, 0, 2], dtype=torch.int32),
}


def small(**changes) -> BSRLinear:
    """A 4x6 layer in blocks of 2x2."""
    arguments = {
        "in_features": 6,
        "out_features": 4,
        "blocksize": 2,
        **{key: index.clone() for key, index in INDEX.items()},
        "values": torch.arange(12.0).view(3, 2, 2) + 1,
        "bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    return BSRLinear(**(arguments | changes))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("blocksize", [16, (32, 8), (8, 64), 4, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_computes_the_same(blocksize, bias, dtype):
    linear = prune(nn.Linear(64, 96, bias=bias), blocksize, 0.7).to(dtype)
    layer = BSRLinear.from_dense(linear, blocksize)
    assert torch.equal(layer.to_dense(), linear.weight)
    assert (layer.in_features, layer.out_features) == (64, 96)
    assert layer.bias is linear.bias
    x = torch.randn(2, 7, 64).to(dtype)
    expected = nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    with CountCalls() as calls:
        assert relative_error(layer(x), expected) <= TOLERANCE[dtype]
    assert calls.count == 1


def test_from_dense_reads_the_block_size_off_the_zeros():
    assert BSRLinear.from_dense(prune(nn.Linear(256, 128), 32)).blocksize == (32, 32)


def test_from_dense_carries_over_what_a_module_has():
    linear = prune(nn.Linear(32, 32), 16).eval()
    linear.weight.requires_grad_(False)
    seen = []
    linear.register_forward_hook(
        lambda module, args, kwargs, y: seen.append("post"), with_kwargs=True
    )
    linear.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer = BSRLinear.from_dense(linear, 16)
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    layer(torch.randn(1, 32))
    assert seen == ["pre", "post"]
    layer.register_forward_hook(lambda *_: seen.append("new"))
    linear(torch.randn(1, 32))
    assert seen == ["pre", "post"] * 2, "the layer that was converted keeps its own hooks"


def test_repr():
    layer = prune(nn.Linear(64, 32), 16, 0.75)
    assert_expected_inline(
        repr(BSRLinear.from_dense(layer, 16)),
        """BSRLinear(in_features=64, out_features=32, bias=True, blocksize=(16, 16), sparsity=0.7500)""",
    )
    assert_expected_inline(
        repr(small(activation="gelu", bias=None)),
        """BSRLinear(in_features=6, out_features=4, bias=False, blocksize=(2, 2), sparsity=0.5000, activation='gelu')""",  # noqa: E501
    )


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_activation_is_the_same_with_and_without_grad(activation):
    layer = small(activation=activation)
    x = torch.randn(5, 6)
    with torch.no_grad():
        fused = layer(x)
    y = layer(x)
    torch.testing.assert_close(fused, y)
    y.sum().backward()
    assert layer.values.grad is not None


def test_fine_tuning_trains_the_stored_blocks_only():
    torch.manual_seed(0)
    layer = BSRLinear.from_dense(prune(nn.Linear(64, 64), 16), 16)
    zero = layer.to_dense() == 0
    target, x = torch.randn(32, 64), torch.randn(32, 64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(layer.to_dense() == 0, zero)


def test_half_to_deepcopy_and_pickle_keep_the_layer():
    layer = small()
    x = torch.randn(3, 6)
    half = copy.deepcopy(layer).half()
    assert half.values.dtype == torch.float16
    assert half.crow_indices.dtype == half.plan.dtype == torch.int32
    assert layer.values.dtype == torch.float32
    assert relative_error(half(x.half()), layer(x)) <= 2e-3
    for clone in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer.to(torch.float64).float(),
    ):
        assert torch.equal(clone(x), layer.float()(x))


def test_a_layer_that_has_been_called_can_still_be_changed():
    layer = small()
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        for clone in copies:
            clone.values.mul_(2)
            clone.bias.zero_()
            assert relative_error(clone(x), 2 * (layer(x) - layer.bias).double()) <= 1e-6
        layer.values.data = layer.values.data * 2
        layer.bias.zero_()
        assert relative_error(layer(x), copies[0](x).double()) <= 1e-6
        assert relative_error(layer.double()(x.double()), copies[0](x).double()) <= 1e-6
        with pytest.raises(TypeError, match="one dtype"):
            layer(x)
        assert layer.float().to("meta")(x.to("meta")).is_meta


def test_a_layer_whose_tensors_are_kept_elsewhere():
    layer, x = small(), torch.randn(3, 6)
    expected = layer(x)
    changed = {"values": layer.values * 2, "bias": layer.bias * 2}
    torch.testing.assert_close(torch.func.functional_call(layer, changed, (x,)), 2 * expected)

    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    torch.testing.assert_close(layer(x), expected + layer.bias / 2)
    layer = small()
    plain = layer.values.detach()
    del layer.values
    layer.values = plain  # as a model replica holds it
    assert torch.equal(layer(x), expected)


def test_state_dict_round_trip():
    layer = small()
    state = layer.state_dict()
    assert sorted(state) == ["bias", "col_indices", "crow_indices", "values"]
    other = small(values=torch.zeros(3, 2, 2), bias=torch.zeros(4))
    values = other.values
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.values is values, "the optimizer's reference stays valid"
    x = torch.randn(3, 6)
    assert torch.equal(other(x), layer(x))


def test_loading_another_number_of_blocks_replaces_values_and_plan():
    layer = small()
    other = small(
        crow_indices=torch.tensor([0, 2, 2]).int(),
        col_indices=torch.tensor([0, 2]).int(),
        values=torch.randn(2, 2, 2),
    )
    other.values.requires_grad_(False)
    other.load_state_dict(layer.state_dict())
    assert not other.values.requires_grad
    x = torch.randn(3, 6, requires_grad=True)
    y = other(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()  # the backward reads the plan
    assert relative_error(x.grad, torch.ones(3, 4).double() @ layer.to_dense().double()) <= 1e-6


def test_loading_casts_values_to_the_layers_dtype_and_assign_takes_them_as_they_are():
    state = small().double().state_dict()
    layer = small()
    layer.load_state_dict(state)
    assert layer.values.dtype == torch.float32
    layer.load_state_dict(state, assign=True)
    assert layer.values.dtype == layer.bias.dtype == torch.float64
    assert layer.values.data_ptr() == state["values"].data_ptr()


def test_a_state_dict_on_the_meta_device_has_nothing_to_copy():
    layer = small()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    empty = {key: tensor.to("meta") for key, tensor in before.items()}
    with pytest.raises(RuntimeError, match=r"(?s)BSRLinear: .* is on the meta device.*assign=True"):
        layer.load_state_dict(empty)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_a_meta_layer_is_filled_by_assign_and_refuses_a_copy():
    layer = small()
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.randn(5, 6, device="meta")).shape == (5, 4)
    with pytest.raises(RuntimeError, match="assign=True"):
        meta.load_state_dict(layer.state_dict())
    meta.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(5, 6, requires_grad=True)
    y = meta(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()


BAD_STATES = {
    "unsorted": ({"col_indices": torch.tensor([1, 2, 0]).int()}, "sorted and unique"),
    "repeated": ({"col_indices": torch.tensor([1, 2, 2]).int()}, "sorted and unique"),
    "out of range": ({"col_indices": torch.tensor([1, 0, 3]).int()}, r"\[0, 3\)"),
    "negative": ({"col_indices": torch.tensor([-1, 0, 2]).int()}, r"\[0, 3\)"),
    "crow start": ({"crow_indices": torch.tensor([1, 1, 3]).int()}, "start with 0"),
    "crow end": ({"crow_indices": torch.tensor([0, 1, 2]).int()}, "end with nnz"),
    "crow decreases": ({"crow_indices": torch.tensor([0, 4, 3]).int()}, "must not decrease"),
    "crow length": ({"crow_indices": torch.tensor([0, 3]).int()}, "must have 3 entries"),
    "crow dtype": ({"crow_indices": torch.tensor([0, 1, 3])}, "must be int32"),
    "col dtype": ({"col_indices": torch.tensor([1, 0, 2])}, "must be int32"),
    "col length": ({"col_indices": torch.tensor([1, 0]).int()}, "values must have shape"),
    "values block": ({"values": torch.randn(3, 2, 3)}, "values must have shape"),
    "crow float": ({"crow_indices": torch.tensor([0.0, 1, 3])}, "must be int32"),
    "col float": ({"col_indices": torch.tensor([1.0, 0, 2])}, "must be int32"),
    "values dtype": ({"values": torch.ones(3, 2, 2).long()}, "floating point"),
    "bias shape": ({"bias": torch.randn(5)}, r"\(4,\), got \(5,\)"),
}


@pytest.mark.parametrize(("change", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_the_constructor_checks_every_invariant(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        small(**change)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("change", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_loading_checks_every_invariant_and_changes_nothing(change, words, assign):
    model = nn.ModuleDict({"mlp": small()})
    good = model.state_dict()
    before = {key: tensor.clone() for key, tensor in good.items()}
    bad = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in good.items()}
    bad |= {f"mlp.{key}": tensor for key, tensor in change.items()}
    with pytest.raises(RuntimeError, match=f"mlp.*{words}"):
        model.load_state_dict(bad, assign=assign)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_loading_names_missing_and_unexpected_keys():
    state = small().state_dict()
    del state["values"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Missing key.*"values"[\s\S]*Unexpected key.*"extra"'):
        small().load_state_dict(state)
    result = small().load_state_dict(state, strict=False)
    assert result.missing_keys == ["values"]
    assert result.unexpected_keys == ["extra"]


OTHER_PATTERN = {
    "crow_indices": torch.tensor([0, 2, 2]).int(),
    "col_indices": torch.tensor([0, 2]).int(),
    "values": torch.full((2, 2, 2), 5.0),
    "bias": torch.full((4,), 5.0),
}


def remember(layer):
    return dict(vars(layer)["_parameters"]), {
        key: (tensor, tensor.clone())
        for key, tensor in {**layer._parameters, **layer._buffers}.items()
    }


def assert_as_before(layer, before):
    for key, (tensor, content) in before[1].items():
        assert getattr(layer, key) is tensor and torch.equal(tensor, content), key


@pytest.mark.parametrize("missing", ["values", "bias", "crow_indices", "col_indices"])
def test_a_missing_key_changes_nothing(missing):
    layer = small()
    before = remember(layer)
    state = {key: tensor for key, tensor in OTHER_PATTERN.items() if key != missing}
    for strict in (True, False):  # torch does not say which, and nothing may be left out in silence
        with pytest.raises(
            RuntimeError, match=f"but not {missing}, and a layer is loaded as a whole"
        ):
            layer.load_state_dict(state, strict=strict)
        assert_as_before(layer, before)


def test_a_part_is_loaded_with_the_rest_filled_in():
    layer = small()
    state = {"bias": OTHER_PATTERN["bias"]}
    with pytest.raises(RuntimeError, match=re.escape("model.state_dict() | state_dict")):
        layer.load_state_dict(state, strict=False)
    layer.load_state_dict(layer.state_dict() | state)
    assert torch.equal(layer.bias, state["bias"])


def test_a_state_dict_of_the_rest_of_a_model_leaves_the_layer_alone():
    model = nn.ModuleDict({"bsr": small(), "head": nn.Linear(4, 2)})
    before = remember(model["bsr"])
    state = {"head.weight": torch.zeros(2, 4), "head.bias": torch.zeros(2)}
    result = model.load_state_dict(state, strict=False)
    assert len(result.missing_keys) == 4 and not result.unexpected_keys
    assert_as_before(model["bsr"], before)


def test_a_tensor_that_cannot_be_written_changes_nothing():
    layer = small(bias=torch.zeros(1).expand(4))
    layer.bias = nn.Parameter(torch.zeros(1).expand(4))
    before = remember(layer)
    with pytest.raises(RuntimeError, match='copying the parameter named "bias"'):
        layer.load_state_dict(OTHER_PATTERN)
    assert_as_before(layer, before)


def test_what_would_become_infinite_is_not_loaded():
    state = small().double().state_dict()
    state["values"][1, 0, 1] = -1e39
    state["values"][1, 0, 0] = float("inf")
    layer = small()
    before = remember(layer)
    with pytest.raises(RuntimeError, match=r"values holds -1e\+39, which torch.float32 cannot"):
        layer.load_state_dict(state)
    assert_as_before(layer, before)


def test_a_layer_made_in_inference_mode_is_loaded_in_it():
    with torch.inference_mode():
        layer = small(bias=torch.zeros(4))
        assert layer.bias.is_inference()
        layer.load_state_dict(OTHER_PATTERN)
        assert torch.equal(layer.bias, OTHER_PATTERN["bias"])
    assert not layer.values.is_inference()


def test_assigned_values_are_made_contiguous():
    layer = small()
    state = layer.state_dict() | {"values": layer.values.detach().transpose(1, 2)}
    layer.load_state_dict(state, assign=True)
    assert layer.values.is_contiguous()
    assert torch.equal(layer.values, state["values"])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("assign", [False, True])
def test_an_exception_while_loading_leaves_the_old_layer_or_the_new(error, assign):
    x = torch.randn(3, 6)
    old, new = small()(x), small(**OTHER_PATTERN)(x)
    layer = None

    def prepare():
        nonlocal layer
        layer = small()
        state = {key: tensor.clone() for key, tensor in OTHER_PATTERN.items()}
        return lambda: layer.load_state_dict(state, assign=assign)

    outcomes = []
    for at in each_interruption(prepare, 3, error):
        out = layer(x.requires_grad_())
        assert torch.equal(out, old) or torch.equal(out, new), at
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert (
            relative_error(gradient, torch.ones(3, 4).double() @ layer.to_dense().double()) < 1e-6
        )
        outcomes.append(torch.equal(out, old))
    assert any(outcomes)


def test_a_state_dict_with_a_mask_is_refused_with_the_way_out():
    state = {"parametrizations.weight.original": torch.zeros(4, 6), "bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match="block mask.*load it into the prepared model"):
        small().load_state_dict(state)


def test_blocks_under_the_name_weight_are_values():
    layer, other = small(), small()
    with torch.no_grad():
        layer.values.add_(1)
    state = layer.state_dict()
    state["weight"] = state.pop("values")  # as folders of transformers have it
    nn.Sequential(other).load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
    assert torch.equal(other.values, layer.values)
    assert "weight" in state


def test_a_dense_checkpoint_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match="dense weight.*load it into the dense model and swap"):
        small().load_state_dict(nn.Linear(6, 4).state_dict())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"blocksize": 0}, ValueError, "at least 1"),
        ({"blocksize": "2"}, TypeError, "blocksize must be"),
        ({"blocksize": 4}, ValueError, r"values must have shape .*\(3, 4, 4\)"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
        ({"bias": torch.zeros(4).double()}, ValueError, "dtype and device"),
        (
            {"values": torch.zeros(3, 2, 2).to(torch.float8_e4m3fn), "bias": None},
            TypeError,
            "float8",
        ),
    ],
)
def test_the_constructor_checks_its_other_arguments(change, error, words):
    with pytest.raises(error, match=words):
        small(**change)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(2, 5), ValueError, r"6 features.*\(2, 5\)"),
        (torch.randn(2, 4), ValueError, r"6 features.*\(2, 4\)"),
        (torch.tensor(1.0), ValueError, "6 features"),
        (torch.randn(2, 6).double(), TypeError, r"float64.*float32.*x\.to\(dtype\)"),
        (torch.ones(2, 6).long(), TypeError, "int64"),
        (torch.randn(2, 6, device="meta"), RuntimeError, "one device.*meta and cpu"),
    ],
)
def test_bad_input_is_named(x, error, words):
    with pytest.raises(error, match=words):
        small()(x)


class TestFromDenseErrors:
    def test_not_a_linear(self):
        with pytest.raises(TypeError, match="expected an nn.Linear, got Conv2d"):
            BSRLinear.from_dense(nn.Conv2d(3, 3, 1))

    def test_a_subclass(self):
        class Special(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        with pytest.raises(
            TypeError, match="it is a Special, whose own methods .forward. .*register_twin"
        ):
            BSRLinear.from_dense(Special(32, 32), 16)

    def test_parametrized_and_pruned(self):
        linear = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        with pytest.raises(TypeError, match="another parametrization"):
            BSRLinear.from_dense(linear, 16)
        linear = torch.nn.utils.prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5)
        with pytest.raises(TypeError, match="not a Parameter"):
            BSRLinear.from_dense(linear, 16)

    def test_shape_dtype_zeros_and_meta(self):
        with pytest.raises(
            ValueError, match=r"\(32, 30\) is not a multiple of the block size 16x16"
        ):
            BSRLinear.from_dense(nn.Linear(30, 32), 16)
        with pytest.raises(ValueError, match="not a multiple of 8; pass a blocksize"):
            BSRLinear.from_dense(nn.Linear(30, 32))
        with pytest.raises(ValueError, match="no block of zeros.*pass blocksize"):
            BSRLinear.from_dense(nn.Linear(32, 32))
        with pytest.raises(ValueError, match="meta device"):
            BSRLinear.from_dense(nn.Linear(32, 32, device="meta"))
        with pytest.raises(TypeError, match="complex64"):
            BSRLinear.from_dense(nn.Linear(32, 32, dtype=torch.complex64), 16)


def test_exports_and_compiles():
    layer = BSRLinear.from_dense(prune(nn.Linear(64, 32), 16), 16)
    x = torch.randn(6, 64)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    assert "torchao_superblock.bsr_linear" in str(program.graph)
    module = program.module()
    for M in (1, 6, 50):
        x = torch.randn(M, 64)
        torch.testing.assert_close(module(x), layer(x))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize(
    ("dense_shape", "error", "words"),
    [
        ((32, 64), ValueError, r"dense_shape must be at least \(64, 64\).*got \(32, 64\)"),
        ((64, 32), ValueError, "dense_shape must be at least"),
        (64, TypeError, "dense_shape must be a pair"),
        ("ab", TypeError, "dense_shape must be a pair"),
        ((64, 64, 64), TypeError, "dense_shape must be a pair"),
        ((64.0, 64.0), TypeError, "dense_shape must be a pair .* of ints"),
    ],
)
def test_dense_shape_is_checked(dense_shape, error, words):
    layer = BSRLinear.from_dense(prune(nn.Linear(64, 64), 16), 16)
    with pytest.raises(error, match=words):
        BSRLinear(
            64, 64, 16, layer.crow_indices, layer.col_indices, layer.values, dense_shape=dense_shape
        )
    narrowed = BSRLinear(
        64, 64, 16, layer.crow_indices, layer.col_indices, layer.values, dense_shape=[128, 64]
    )
    assert narrowed.is_narrowed and narrowed.dense_shape == (128, 64)
    assert not layer.is_narrowed and layer.dense_shape == (64, 64)
