"""The parametrization: which blocks are kept, what the gradients are, what it survives."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.reference import relative_error
from torchao_superblock.ops import block_mask as arithmetic
from torchao_superblock.pruning import Supermask, SupermaskSparsifier, squash
from torchao_superblock.pruning.attach import attach

SHAPES = [
    ((64, 48), (16, 16)),
    ((64, 48), (32, 8)),
    ((50, 40), (16, 16)),  # ragged rows and columns: four slices
    ((64, 40), (16, 16)),  # ragged columns
    ((50, 48), (16, 16)),  # ragged rows
    ((7, 5), (1, 1)),
    ((7, 5), (3, 2)),
    ((5, 9), (8, 4)),  # taller than the weight: every block row is ragged
]


def element_mask(mask: Tensor, shape: tuple[int, int], blocksize: tuple[int, int]) -> Tensor:
    """The mask of every element, by looking each one up."""
    rows = torch.arange(shape[0]) // blocksize[0]
    cols = torch.arange(shape[1]) // blocksize[1]
    return mask[rows][:, cols]


def ranked_mask(scores: Tensor, n_kept: int) -> Tensor:
    """The definition, spelled out: best scores first, the earlier of equals, NaN last."""
    flat = scores.flatten().tolist()

    def place(i: int) -> tuple[bool, float, int]:
        return (True, 0.0, i) if math.isnan(flat[i]) else (False, -flat[i], i)

    order = sorted(range(len(flat)), key=place)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:n_kept]] = True
    return mask.view(scores.shape)


def masked_linear(
    in_features: int = 48,
    out_features: int = 64,
    blocksize: object = 16,
    level: float = 0.5,
    **kwargs,
) -> tuple[nn.Linear, Supermask]:
    linear = nn.Linear(in_features, out_features, **kwargs)
    mask = Supermask(linear.weight, blocksize, level)
    attach(linear, "weight", mask)
    return linear, mask


# -------------------------------------------------------------------------------------------------
# Which blocks are kept
# -------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(
        # few distinct values: ties everywhere
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, math.inf, -math.inf, math.nan]),
        min_size=1,
        max_size=40,
    ),
    level=st.floats(0, 1, exclude_max=True),
)
def test_keeps_exactly_the_best_blocks_whatever_the_ties(values: list[float], level: float) -> None:
    weight = torch.ones(len(values), 4)
    mask = Supermask(weight, (1, 4), level)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor(values)[:, None])
    kept = max(1, round(len(values) * (1 - level)))
    assert int(mask.n_kept) == kept
    assert int(mask.block_mask().sum()) == kept
    assert torch.equal(mask.block_mask(), ranked_mask(mask.scores.detach(), kept))


@pytest.mark.parametrize(("shape", "blocksize"), SHAPES)
def test_masked_weight_is_the_weight_times_the_mask(
    shape: tuple[int, int], blocksize: tuple[int, int]
) -> None:
    weight = torch.randn(shape)
    mask = Supermask(weight, blocksize, 0.5)
    grid = (math.ceil(shape[0] / blocksize[0]), math.ceil(shape[1] / blocksize[1]))
    assert mask.scores.shape == mask.block_mask().shape == grid
    expected = weight * element_mask(mask.block_mask(), shape, blocksize)
    assert torch.equal(mask(weight), expected)
    transposed = weight.t().contiguous().t()
    assert torch.equal(mask(transposed), expected)


def test_same_scores_give_the_same_mask_after_a_change_of_level_and_back() -> None:
    _, mask = masked_linear()
    before = mask.block_mask()
    mask.set_sparsity_level(0.9)
    assert int(mask.block_mask().sum()) == 1
    mask.set_sparsity_level(0.5)
    assert torch.equal(mask.block_mask(), before)


def test_weight_norm_keeps_the_blocks_of_the_largest_norm() -> None:
    for shape, blocksize in SHAPES:
        weight = torch.randn(shape).to(torch.bfloat16)
        mask = Supermask(weight, blocksize, 0.5, "weight_norm")
        norms = torch.zeros(mask.scores.shape, dtype=torch.float64)
        for i in range(norms.shape[0]):
            for j in range(norms.shape[1]):
                r, c = blocksize
                norms[i, j] = weight[i * r : (i + 1) * r, j * c : (j + 1) * c].double().norm()
        torch.testing.assert_close(mask.scores.detach().double(), norms, rtol=1e-6, atol=0)
        assert torch.equal(mask.block_mask(), ranked_mask(norms.float(), int(mask.n_kept)))


def test_frozen_mask_does_not_follow_scores_or_level() -> None:
    linear, mask = masked_linear()
    mask.freeze()
    before = mask.block_mask()
    with torch.no_grad():
        mask.scores.neg_()
    mask.set_sparsity_level(0.9)
    assert torch.equal(mask.block_mask(), before)
    linear(torch.randn(3, 48)).sum().backward()
    assert mask.scores.grad is not None and not mask.scores.grad.any()
    assert linear.parametrizations.weight.original.grad.any()
    copied, _ = masked_linear()
    copied.load_state_dict(linear.state_dict())
    assert torch.equal(copied.weight, linear.weight)
    mask.unfreeze()
    assert int(mask.block_mask().sum()) == 1


# -------------------------------------------------------------------------------------------------
# Gradients
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "blocksize"), SHAPES)
def test_gradients_against_a_float64_reference(
    shape: tuple[int, int], blocksize: tuple[int, int]
) -> None:
    weight = torch.randn(shape, requires_grad=True)
    mask = Supermask(weight, blocksize, 0.5)
    grad = torch.randn(shape)
    mask(weight).backward(grad)
    # grad_weight = g * mask; grad_scores = sum over the block of g * weight
    assert torch.equal(weight.grad, grad * element_mask(mask.block_mask(), shape, blocksize))
    products = grad.double() * weight.detach().double()
    expected = torch.zeros(mask.scores.shape, dtype=torch.float64)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i // blocksize[0], j // blocksize[1]] += products[i, j]
    assert mask.scores.grad.dtype == torch.float32
    assert relative_error(mask.scores.grad, expected) < 1e-6


@pytest.mark.parametrize(("shape", "blocksize"), [SHAPES[5], SHAPES[6]])
def test_gradcheck_of_the_weight(shape: tuple[int, int], blocksize: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = Supermask(weight, blocksize, 0.5)
    mask.scores.requires_grad_(False)
    assert torch.autograd.gradcheck(mask, weight)
    assert torch.autograd.gradgradcheck(mask, weight)


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    linear, mask = masked_linear()
    original = linear.parametrizations.weight.original
    original.requires_grad_(False)
    linear(torch.randn(3, 48)).sum().backward()
    assert original.grad is None and mask.scores.grad.any()
    mask.scores.grad = None
    original.requires_grad_(True)
    mask.scores.requires_grad_(False)
    linear(torch.randn(3, 48)).sum().backward()
    assert original.grad.any() and mask.scores.grad is None


def test_bfloat16_block_sums_are_accumulated_in_float32() -> None:
    weight = torch.randn(128, 128).to(torch.bfloat16).requires_grad_()
    mask = Supermask(weight, 64, 0.5)
    grad = torch.randn(128, 128).to(torch.bfloat16)
    mask(weight).backward(grad)
    expected = (grad.double() * weight.detach().double()).view(2, 64, 2, 64).sum((1, 3))
    assert relative_error(mask.scores.grad, expected) < 1e-6


# -------------------------------------------------------------------------------------------------
# What it survives
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "to"])
def test_scores_stay_float32_bit_for_bit(convert: str) -> None:
    linear, mask = masked_linear()
    linear(torch.randn(2, 48)).sum().backward()
    before = mask.scores.detach().clone()
    state = mask.block_mask()
    linear.to(torch.bfloat16) if convert == "to" else getattr(linear, convert)()
    assert mask.scores.dtype == torch.float32 and torch.equal(mask.scores.detach(), before)
    assert mask.scores.grad.dtype == torch.float32
    assert mask.n_kept.dtype == torch.int64 and mask.held_mask.dtype == torch.int8
    assert linear.weight.dtype == linear.parametrizations.weight.original.dtype != torch.float32
    assert torch.equal(mask.block_mask(), state)
    x = torch.randn(2, 48, dtype=linear.weight.dtype)
    linear(x).sum().backward()
    assert mask.scores.grad.dtype == torch.float32


def test_scores_cast_by_hand_are_an_error() -> None:
    linear, mask = masked_linear()
    mask.scores.data = mask.scores.data.half()
    with pytest.raises(RuntimeError, match=r"torch\.float16 and must be float32"):
        linear(torch.randn(2, 48))


def test_assigning_a_weight_sets_what_is_under_the_mask() -> None:
    linear, mask = masked_linear()
    original = linear.parametrizations.weight.original
    value = torch.randn(64, 48)
    linear.weight = value
    assert linear.parametrizations.weight.original is original
    assert torch.equal(original, value) and original.data_ptr() != value.data_ptr()
    assert torch.equal(linear.weight != 0, element_mask(mask.block_mask(), (64, 48), (16, 16)))
    with pytest.raises(
        ValueError, match=r"shape \(48, 64\) to a masked weight of shape \(64, 48\)"
    ):
        linear.weight = value.t()


@pytest.mark.parametrize("init", ["kaiming_uniform", "weight_norm"])
def test_reset_parameters_reaches_the_weight_and_the_scores(init: str) -> None:
    linear = nn.Linear(48, 64)
    mask = Supermask(linear.weight, 16, 0.5, init)
    attach(linear, "weight", mask)
    original = linear.parametrizations.weight.original
    weight, scores = original.detach().clone(), mask.scores.detach().clone()
    linear.reset_parameters()
    assert not torch.equal(original, weight) and (original != 0).all()
    assert not torch.equal(mask.scores, scores)
    if init == "weight_norm":
        norms = arithmetic.block_sum(original.double(), original.double(), (16, 16)).sqrt()
        torch.testing.assert_close(mask.scores.detach(), norms.float().detach())


@pytest.mark.parametrize("init", ["kaiming_uniform", "weight_norm"])
def test_construction_on_the_meta_device(init: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    sparsifier = SupermaskSparsifier(0.5, 16, scores_init=init)
    sparsifier.prepare(model)
    assert sparsifier.summary().groups[0].kept == 6
    with pytest.raises(RuntimeError, match=r"'0\.weight' is on the meta device"):
        squash(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model(torch.randn(2, 48)).sum().backward()
    sparsifier.step()
    assert [int(entry["mask"].sum()) for entry in sparsifier.state.values()] == [6, 4]


def test_autocast_changes_the_product_and_not_the_mask() -> None:
    linear, mask = masked_linear()
    x = torch.randn(8, 48)
    before = mask.block_mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x)
        expected = nn.functional.linear(x, linear.weight.detach(), linear.bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.float().sum().backward()
    assert (
        mask.scores.grad.dtype
        == linear.parametrizations.weight.original.grad.dtype
        == torch.float32
    )
    assert torch.equal(mask.block_mask(), before)


def test_deepcopy_and_pickle_are_independent_and_squash_alone() -> None:
    model = nn.Sequential(nn.Linear(48, 64), nn.MultiheadAttention(64, 4))
    SupermaskSparsifier(0.5, 16).prepare(
        model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.in_proj_weight"}]
    )
    weights = [model[0].weight.clone(), model[1].in_proj_weight.clone()]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone[0].weight, weights[0])
        with torch.no_grad():
            for module in clone.modules():
                if isinstance(module, Supermask):
                    module.scores.neg_()
        assert not torch.equal(clone[0].weight, weights[0])
        squash(clone)
        assert type(clone[0]) is nn.Linear and type(clone[1]) is nn.MultiheadAttention
        # the original is untouched although copies share its class
        assert torch.equal(model[0].weight, weights[0])
        assert torch.equal(model[1].in_proj_weight, weights[1])
    assert pickle.loads(pickle.dumps(squash(model)))[0].weight.equal(weights[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_a_module_used_twice(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    SupermaskSparsifier(0.5, 16).prepare(model)
    x = torch.randn(4, 32, requires_grad=True)

    def gradients(run) -> list[Tensor]:
        model.zero_grad()
        run(model, run(model, x)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(lambda module, x: module(x))
    replayed = gradients(lambda module, x: checkpoint(module, x, use_reentrant=reentrant))
    for a, b in zip(plain, replayed, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_attention_is_replayed_with_the_same_tensors() -> None:
    from torch.utils.checkpoint import checkpoint

    attention = nn.MultiheadAttention(32, 4)
    SupermaskSparsifier(0.5, 16).prepare(attention, [{"tensor_fqn": "*"}])
    x = torch.randn(5, 2, 32)
    checkpoint(lambda x: attention(x, x, x)[0], x, use_reentrant=False).sum().backward()
    assert attention.parametrizations.in_proj_weight[0].scores.grad.any()
    assert attention.out_proj.parametrizations.weight[0].scores.grad.any()


# -------------------------------------------------------------------------------------------------
# torch.compile
# -------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A masked MLP called twice, each time under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.mlp, x, use_reentrant=False)
        return checkpoint(self.mlp, x, use_reentrant=False)


def make_compilable(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(32, 50), nn.GELU(), nn.Linear(50, 32))  # ragged
        x = torch.randn(4, 32)
    elif kind == "checkpointed":
        model, x = Checkpointed(), torch.randn(4, 32)
    else:
        model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        x = torch.randn(2, 5, 32)
    SupermaskSparsifier(0.5, 16).prepare(model, [{"tensor_fqn": "*"}])
    return model, x


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["mlp", "checkpointed", "attention"])
def test_compiles_without_graph_breaks(kind: str, mode: str) -> None:
    torch._dynamo.reset()
    model, x = make_compilable(kind)
    model.train(mode == "train")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    out = compiled(x)
    torch.testing.assert_close(out, model(x))
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("train", [True, False])
def test_the_compiler_merges_the_reads_of_one_forward(train: bool) -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(train)
    SupermaskSparsifier(0.5, 16).prepare(attention, [{"tensor_fqn": "*"}])
    sorts = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
        sorts.append(sum("sort" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(train):
        out = torch.compile(attention, fullgraph=True, backend=backend)(x, x, x)[0]
        if train:
            out.sum().backward()
    assert sum(sorts) == 2  # in_proj_weight, which is read three times, and out_proj.weight


def test_inductor_gives_the_same_numbers() -> None:
    torch._dynamo.reset()
    model, x = make_compilable("mlp")
    compiled = torch.compile(model, fullgraph=True)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_ramp_of_50_levels_and_freezing_compile_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    sparsifier = SupermaskSparsifier(0.0, 8)
    sparsifier.prepare(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 64)
    for i in range(50):
        for group in sparsifier.groups:
            group["sparsity_level"] = i / 50
        sparsifier.step()
        if i == 40:
            sparsifier.freeze()
        if i == 45:
            sparsifier.unfreeze()
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


# -------------------------------------------------------------------------------------------------
# Modules of torch.nn that read their children's weights, and their fast paths
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["*"], ["in_proj_weight"], ["out_proj.weight"]])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_attention_equals_its_squashed_self(names: list[str], mode: str) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    SupermaskSparsifier(0.5, 16).prepare(attention, [{"tensor_fqn": name} for name in names])
    dense = squash(copy.deepcopy(attention))
    attention.train(mode == "train")
    dense.train(mode == "train")
    x = torch.randn(2, 5, 32)
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode(mode == "inference"):
        out = attention(x, x, x)[0]
        torch.testing.assert_close(out, dense(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_transformer_encoder_equals_its_squashed_self(
    mode: str, padding: bool, norm_first: bool
) -> None:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    SupermaskSparsifier(0.5, 16).prepare(encoder, [{"tensor_fqn": "*"}])
    dense = squash(copy.deepcopy(encoder))
    assert type(dense) is nn.TransformerEncoder
    assert {type(m).__module__.split(".")[0] for m in dense.modules()} == {"torch"}
    encoder.train(mode == "train")
    dense.train(mode == "train")
    x = torch.randn(3, 5, 32)
    mask = torch.arange(5) >= torch.tensor([5, 4, 2])[:, None] if padding else None
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode(mode == "inference"):
        out = encoder(x, src_key_padding_mask=mask)
        expected = dense(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out, expected)
    if mode == "train":
        loss_weights = torch.randn_like(out)
        (out * loss_weights).sum().backward()
        (expected * loss_weights).sum().backward()
        for name, parameter in dense.named_parameters():
            masked = encoder.get_parameter(original_name(name))
            # Pruned blocks have no gradient under the mask; in the squashed twin they have one.
            kept = (parameter != 0) if name != original_name(name) else torch.ones(())
            torch.testing.assert_close(masked.grad, parameter.grad * kept)


def original_name(name: str) -> str:
    masked = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    if not name.endswith(masked):
        return name
    path, _, tensor = name.rpartition(".")
    return f"{path}.parametrizations.{tensor}.original"


def test_the_encoder_layer_keeps_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    SupermaskSparsifier(0.5, 16).prepare(layer, [{"tensor_fqn": "*"}])
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args)
    )
    with torch.no_grad():
        layer(torch.randn(2, 5, 32))
    assert calls == [1]


def test_a_forward_that_raises_leaves_no_stale_weight() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    SupermaskSparsifier(0.5, 16).prepare(attention, [{"tensor_fqn": "*"}])
    x = torch.randn(2, 5, 32)
    with pytest.raises(AssertionError):
        attention(x, x, torch.randn(2, 5, 31))
    with torch.no_grad():
        attention.parametrizations.in_proj_weight.original.mul_(2)
    expected = squash(copy.deepcopy(attention))(x, x, x)[0]
    torch.testing.assert_close(attention(x, x, x)[0], expected)


def test_a_weight_read_outside_a_forward_is_always_fresh() -> None:
    linear, mask = masked_linear()
    with torch.no_grad():
        before = linear.weight
        mask.scores.data.copy_(-mask.scores)  # `.data` hides the write from version counters
        assert not torch.equal(linear.weight, before)


def test_parametrize_cached_still_works() -> None:
    linear, _ = masked_linear()
    with parametrize.cached():
        assert linear.weight is linear.weight
    assert linear.weight is not linear.weight


# -------------------------------------------------------------------------------------------------
# CUDA
# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "blocksize"), [*SHAPES, ((3072, 768), (64, 64)), ((1000, 760), (32, 48))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cuda_agrees_with_the_cpu(
    shape: tuple[int, int], blocksize: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    grad = torch.randn(shape).to(dtype)
    mask = Supermask(weight, blocksize, 0.7)
    results = []
    for device in ("cpu", "cuda"):
        one = copy.deepcopy(mask).to(device)
        leaf = weight.to(device, copy=True).requires_grad_()
        out = one(leaf)
        out.backward(grad.to(device))
        results.append([t.cpu() for t in (one.block_mask(), out, leaf.grad, one.scores.grad)])
    for a, b in zip(*(r[:3] for r in results), strict=True):
        assert torch.equal(a, b)
    assert relative_error(results[1][3], results[0][3]) < 1e-5


@pytest.mark.gpu
def test_cuda_forward_does_not_synchronise() -> None:
    linear, mask = masked_linear(768, 3072, 64, device="cuda")
    x = torch.randn(8, 768, device="cuda")
    linear(x).sum().backward()  # compiles the kernels
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear(x).sum().backward()
        mask.set_sparsity_level(0.7)
        mask.block_mask()
    finally:
        torch.cuda.set_sync_debug_mode(previous)
