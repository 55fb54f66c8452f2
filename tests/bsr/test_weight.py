import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from tests.bsr.common import CountCalls, prune
from tests.reference import relative_error
from torchao_superblock.bsr import BSRLinear, BSRWeight
from torchao_superblock.bsr.weight import TracedBSRWeight


@pytest.fixture
def pair():
    linear = prune(nn.Linear(64, 32), 16)
    return linear, BSRLinear.from_dense(linear, 16)


def test_knows_what_a_weight_is_asked(pair):
    linear, layer = pair
    weight = layer.weight
    assert isinstance(weight, BSRWeight)
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == linear.weight.shape
    assert weight.size(1) == 64
    assert weight.dim() == weight.ndim == 2
    assert weight.numel() == 64 * 32
    assert len(weight) == 32
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert not weight.is_cuda
    assert weight.requires_grad
    assert not weight.is_meta
    assert weight.layout == torch.strided
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert layer.half().weight.dtype == torch.float16
    assert torch.overrides.has_torch_function((weight,))
    assert repr(layer.weight).startswith("BSRWeight(shape=(32, 64), blocksize=(16, 16), nnz=")


def test_to_dense_gives_the_dense_weight(pair):
    linear, layer = pair
    assert torch.equal(layer.weight.to_dense(), linear.weight)


def test_linear_runs_the_op_and_reaches_the_parameters(pair):
    linear, layer = pair
    x = torch.randn(2, 5, 64, requires_grad=True)
    with CountCalls() as calls:
        y = F.linear(x, layer.weight, layer.bias)
    assert calls.count == 1
    assert torch.equal(y, layer(x))
    y.square().sum().backward()
    dense_x = x.detach().clone().requires_grad_()
    linear(dense_x).square().sum().backward()
    assert relative_error(x.grad, dense_x.grad) <= 1e-6
    assert relative_error(layer.bias.grad, linear.bias.grad) <= 1e-6
    assert layer.values.grad is not None
    assert F.linear(x, weight=layer.weight, bias=None).shape == (2, 5, 32)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.t(),
        lambda w: torch.ones(3, 32) @ w,
        lambda w: F.linear(w, torch.ones(3, 64)),
        lambda w: w.detach(),
        lambda w: w.clone(),
        lambda w: w[0],
        lambda w: w.sum(),
        lambda w: torch.nn.init.zeros_(w),
        lambda w: w.data_ptr(),
        lambda w: torch.cat([w, w]),
        lambda w: torch.from_dlpack(w),
        lambda w: np.asarray(w),
        lambda w: torch.optim.SGD([w], lr=0.1),
        lambda w: torch.optim.AdamW([{"params": [w]}]),
        lambda w: w.grad,
        lambda w: w.retains_grad,
    ],
)
def test_everything_else_raises_with_advice(pair, use):
    with pytest.raises(NotImplementedError, match=r"stored as blocks.*layer\.values.*to_dense\(\)"):
        use(pair[1].weight)


TO_DLPACK = """
import torch
from tests.bsr.common import prune
from torchao_superblock.bsr import BSRLinear
layer = BSRLinear.from_dense(prune(torch.nn.Linear(64, 32), 16), 16)
try:
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(layer.weight)).sum()
except RuntimeError as error:
    print(error)
"""


def test_what_reads_memory_without_asking_is_refused():
    """In a process of its own: without a refusal it ends in a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-c", TO_DLPACK],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "no memory of its own" in done.stdout and "to_dense()" in done.stdout, done


def test_wrong_width_is_named(pair):
    with pytest.raises(ValueError, match="x has 63 features.*32, 64"):
        F.linear(torch.randn(2, 63), pair[1].weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_runs_its_projection_through_the_op(training, grad, need_weights):
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    prune(attention.out_proj, 16)
    x = torch.randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    with grad():
        expected, expected_weights = attention(
            x, x, x, key_padding_mask=padding, need_weights=need_weights
        )
        attention.out_proj = BSRLinear.from_dense(attention.out_proj, 16)
        with CountCalls() as calls:
            y, weights = attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert calls.count == 1
    assert relative_error(y, expected) <= 1e-6
    if need_weights:
        assert relative_error(weights, expected_weights) <= 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_compiles_without_a_graph_break(training):
    torch._dynamo.reset()
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    prune(attention.out_proj, 16)
    x = torch.randn(2, 7, 32)
    expected = attention(x, x, x)[0]
    attention.out_proj = BSRLinear.from_dense(attention.out_proj, 16)
    backend = torch._dynamo.testing.EagerAndRecordGraphs()
    y = torch.compile(attention, fullgraph=True, backend=backend)(x, x, x)[0]
    assert "torchao_superblock.bsr_linear" in backend.graphs[0].code
    assert relative_error(y, expected) <= 1e-6
    y.sum().backward()
    assert attention.out_proj.values.grad is not None


def test_the_traced_stand_in_answers_the_same_questions(pair):
    weight = pair[1].weight
    traced = TracedBSRWeight(
        tuple(weight.shape),
        *(getattr(weight, n) for n in ("crow_indices", "col_indices", "values", "plan")),
    )
    for name in ("shape", "dtype", "device", "requires_grad", "is_cuda", "is_meta", "ndim"):
        assert getattr(traced, name) == getattr(weight, name), name
    for name in ("dim", "size", "numel", "element_size", "is_floating_point", "__len__"):
        assert getattr(traced, name)() == getattr(weight, name)(), name
    assert f"{weight}" == repr(weight)


def test_assigning_a_weight_says_what_to_do_instead(pair):
    with pytest.raises(AttributeError, match=r"layer\.values.*to_bsr_linear"):
        pair[1].weight = nn.Parameter(torch.zeros(32, 64))
