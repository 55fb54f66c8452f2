import copy
import math
import re
import warnings

import pytest
import torch
import torch.nn.utils.prune
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils import parametrize

from tests.bsr.common import CountCalls, assert_unchanged, prune, prune_all, snapshot
from tests.injection import each_interruption
from tests.reference import relative_error
from torchao_superblock.bsr import BSRLinear, swap_to_bsr, to_bsr_linear
from torchao_superblock.bsr.folded_activation import FoldedActivation
from torchao_superblock.ops.break_even import break_even


def mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return prune_all(model, 16, 0.75)


@pytest.mark.parametrize("blocksize", [None, 16, (16, 16), (8, 16)])
def test_swaps_in_place_and_computes_the_same(blocksize):
    model = mlp()
    x = torch.randn(2, 9, 64)
    expected = model(x)
    report = swap_to_bsr(model, blocksize, min_sparsity=0.5)
    assert [entry.fqn for entry in report.swapped] == ["0", "2"]
    assert not report.skipped
    assert all(isinstance(model[index], BSRLinear) for index in (0, 2))
    with CountCalls() as calls:
        assert relative_error(model(x), expected) <= 1e-6
    assert calls.count == 2


def test_report_accounts_for_every_linear_and_prints_as_a_table():
    class Special(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.mlp = prune(nn.Linear(64, 64), 16, 0.75)
            self.dense = nn.Linear(64, 64)
            self.odd = nn.Linear(30, 64)
            self.special = prune(Special(64, 64), 16)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
            self.head = nn.Linear(32, 64)
            self.head.weight = self.embedding.weight
            self.kept = prune(nn.Linear(64, 64), 16)
            self.thin = prune(nn.Linear(64, 64), 16, 0.25)
            self.integer = nn.Linear(64, 64, dtype=torch.complex64)

    model = Model()
    untouched = {name: module for name, module in model.named_children() if name != "mlp"}
    report = swap_to_bsr(model, filter_fn=lambda module, fqn: fqn != "kept", min_sparsity=0.5)
    assert_expected_inline(
        str(report),
        """\
1 of 9 weights swapped to BSR
layer    shape  block  sparsity  result
mlp      64x64  16x16  75.0%     swapped
dense    64x64  64x64  0.0%      skipped: 0.0% of its blocks are zero, min_sparsity is 50.0%
odd      64x30  -      -         skipped: its shape (64, 30) is not a multiple of any block size from 8 to 256
special  64x64  -      -         skipped: it is a Special, whose own methods (forward) the layer in its place would \
not have; if it computes x @ weight.T + bias, register_twin(Special, BSRLinear, 'weight') of \
torchao_superblock.bsr.layers lets it be swapped
normed   64x64  -      -         skipped: it has another parametrization (of weight); remove it first
head     64x32  -      -         skipped: its weight is shared with embedding.weight
kept     64x64  -      -         skipped: filter_fn returned False for it
thin     64x64  16x16  25.0%     skipped: 25.0% of its blocks are zero, min_sparsity is 50.0%
integer  64x64  -      -         skipped: its dtype is torch.complex64""",
    )
    assert {entry.fqn: entry.code for entry in report.skipped} == {
        "dense": "too_few_zero_blocks",
        "odd": "shape_not_multiple",
        "special": "linear_subclass",
        "normed": "parametrized",
        "head": "tied_weight",
        "kept": "filtered_out",
        "thin": "too_few_zero_blocks",
        "integer": "unsupported_dtype",
    }
    entry = report.swapped[0]
    assert (entry.shape, entry.blocksize, entry.sparsity, entry.code) == (
        (64, 64),
        (16, 16),
        0.75,
        "swapped",
    )
    assert all(getattr(model, name) is module for name, module in untouched.items())


class Conv1D(nn.Module):
    """As in transformers: a linear layer with its weight transposed, and no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 32))
        self.gate = nn.Parameter(torch.randn(4, 2))


def test_report_accounts_for_weights_outside_of_linear_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4)
            self.position = nn.Parameter(torch.randn(1, 9, 64))
            self.words = nn.Embedding(64, 32)
            self.masked_words = nn.Embedding(64, 32)
            self.attention = nn.MultiheadAttention(32, 4)
            self.fused = Conv1D()
            self.experts = Experts()
            self.pruned = nn.utils.prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5)
            self.old_norm = nn.utils.weight_norm(nn.Linear(32, 32))
            self.ragged = nn.Linear(30, 32)
            self.norm = nn.LayerNorm(32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
        model = Model()
    with torch.no_grad():
        model.masked_words.weight[16:32] = 0
        model.fused.weight[:16] = 0
        model.experts.up[1] = 0
        model.ragged.weight[:16] = 0
    before = snapshot(model)
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert_unchanged(model, before)
    assert str(report).startswith("0 of 9 weights swapped to BSR\n")
    assert {entry.fqn: (entry.code, entry.sparsity) for entry in report.skipped} == {
        "patches.weight": ("no_twin", 0.0),
        "masked_words.weight": ("no_twin", 0.25),
        "attention.in_proj_weight": ("too_few_zero_blocks", 0.0),
        "attention.out_proj": ("too_few_zero_blocks", 0.0),
        "fused.weight": ("no_twin", 0.5),
        "experts.up": ("no_twin", 0.25),
        "pruned": ("parametrized", None),
        "old_norm": ("parametrized", None),
        "ragged": ("shape_not_multiple", None),
    }
    reasons = {entry.fqn: entry.reason for entry in report.skipped}
    assert reasons["fused.weight"] == "Conv1D has no block-sparse twin"
    assert reasons["ragged"].endswith(
        "from 8 to 256; 50.0% of its elements are zero, and pad=True pads its last blocks"
    )


def test_an_explicit_block_size_that_does_not_divide_is_a_skip():
    model = mlp()
    report = swap_to_bsr(model, 48, min_sparsity=0.0)
    assert {entry.code for entry in report.skipped} == {"shape_not_multiple"}
    assert "(128, 64) is not a multiple of the block size 48x48" in report.skipped[0].reason


def test_without_min_sparsity_the_break_even_table_decides():
    needed = break_even("cpu", (16, 16), torch.float32).sparsity
    above = math.ceil(needed * 64) / 64  # of 64 blocks
    model = nn.Sequential(
        prune(nn.Linear(128, 128), 16, above),
        prune(nn.Linear(128, 128), 16, above - 1 / 64),
        nn.Linear(128, 128),
    )
    report = swap_to_bsr(model, 16)
    assert [entry.code for entry in [*report.swapped, *report.skipped]] == [
        "swapped",
        "slower_than_dense",
        "too_few_zero_blocks",
    ]
    assert f"break even at {needed:.1%}" in report.skipped[0].reason


def test_a_guess_is_not_stated_as_a_fact():
    assert not break_even("cpu", (8, 8), torch.float32).measured
    report = swap_to_bsr(nn.Sequential(prune(nn.Linear(64, 64), 8, 0.5)), 8)
    (entry,) = report.skipped
    assert entry.code == "slower_than_dense"
    assert "break even" not in entry.reason
    for words in ("nobody has measured", "float32", "cpu", "guess", "min_sparsity", "measure="):
        assert words in entry.reason, entry.reason


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_a_report_says_that_a_guess_was_made(sparsity):
    def swap(**options):
        return swap_to_bsr(nn.Sequential(prune(nn.Linear(64, 64), 8, sparsity)), 8, **options)

    (note,) = swap().notes
    assert "float32 on cpu" in note and "cautious" in note and "measure=" in note
    assert not swap(min_sparsity=0.5).notes and not swap(measure=torch.ones(1, 64)).notes


def test_what_a_module_has_carries_over():
    model = mlp().eval()
    model[0].weight.requires_grad_(False)
    model.to(torch.float64)
    seen = []
    post = model[0].register_forward_hook(
        lambda module, args, kwargs, y: seen.append("post"), with_kwargs=True
    )
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[2].register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    bias = model[0].bias
    swap_to_bsr(model, min_sparsity=0.5)
    assert not model[0].training
    assert not model[0].values.requires_grad
    assert model[2].values.requires_grad
    assert model[0].values.dtype == torch.float64
    assert model[0].bias is bias
    x = torch.randn(1, 64, dtype=torch.float64)
    model(x).sum().backward()
    assert seen == ["pre", "post", "backward"]
    post.remove()  # a handle from before the swap
    seen.clear()
    model(x)
    assert seen == ["pre"]


def test_a_module_registered_twice_stays_one_module():
    shared = prune(nn.Linear(32, 32), 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = swap_to_bsr(model, min_sparsity=0.25)
    assert [entry.fqn for entry in report.swapped] == ["a"]
    assert isinstance(model["a"], BSRLinear)
    assert model["a"] is model["b"][0]


def test_weights_that_share_memory_are_tied():
    a, b = prune(nn.Linear(32, 32), 16), nn.Linear(32, 32)
    b.weight = nn.Parameter(a.weight.data)
    report = swap_to_bsr(nn.ModuleDict({"a": a, "b": b}), min_sparsity=0.0)
    assert [entry.code for entry in report.skipped] == ["tied_weight", "tied_weight"]


def test_an_unsquashed_mask_is_an_error_before_anything_is_touched():
    class Mask(nn.Module):
        _is_block_mask = True

        def forward(self, weight):
            return weight * 0

    model = mlp()
    model.append(nn.Linear(64, 64))
    parametrize.register_parametrization(model[3], "weight", Mask())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"'3' is not squashed yet.*squash_mask\(\)"):
        swap_to_bsr(model, min_sparsity=0.0)
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="not squashed yet"):
        to_bsr_linear(model[3])


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_failure_half_way_leaves_the_model_as_it_was(fail_at, monkeypatch):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=True
    )
    model = prune_all(nn.Sequential(encoder, nn.Linear(32, 32)), 16, 0.75).eval()
    before = snapshot(model)
    real, calls = nn.Module.__setattr__, 0

    def failing(self, name, value):
        nonlocal calls
        if isinstance(value, BSRLinear):
            calls += 1
            if calls == fail_at:
                raise RuntimeError("out of memory")
        real(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        swap_to_bsr(model, min_sparsity=0.5)
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert encoder.use_nested_tensor


def test_a_failing_filter_leaves_the_model_as_it_was():
    model = mlp()
    before = snapshot(model)

    def filter_fn(module, fqn):
        if fqn == "2":
            raise KeyError(fqn)
        return True

    with pytest.raises(KeyError):
        swap_to_bsr(model, min_sparsity=0.0, filter_fn=filter_fn)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_sparsity": 1.5}, ValueError, r"min_sparsity must lie in \[0, 1\], got 1.5"),
        ({"min_sparsity": -0.1}, ValueError, "got -0.1"),
        ({"min_sparsity": "0.5"}, TypeError, "must be a number, got '0.5'"),
        ({"filter_fn": "mlp"}, TypeError, "must be callable, got 'mlp'"),
        ({"blocksize": 0}, ValueError, "at least 1, got 0"),
        ({"blocksize": "16"}, TypeError, "got '16'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        swap_to_bsr(model, **arguments)
    assert_unchanged(model, before)


def test_linears_with_something_of_their_own_are_left_alone():
    def make():
        return prune(nn.Linear(64, 64), 16, 0.75)

    forward, child, buffer, parameter, bias, lazy = (make() for _ in range(6))
    forward.forward = lambda x: nn.Linear.forward(forward, x) * 100
    child.adapter = nn.Linear(64, 64)
    buffer.register_buffer("scale", torch.ones(1))
    parameter.gate = nn.Parameter(torch.ones(1))
    bias.bias = nn.Parameter(bias.bias.data.double())
    sliced = make()
    sliced.weight = nn.Parameter(sliced.weight.data[:32])
    lazy = nn.LazyLinear(3)
    model = nn.ModuleList([forward, child, buffer, parameter, bias, sliced, lazy, make()])
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert [entry.fqn for entry in report.swapped] == ["7"]
    assert {entry.fqn: entry.code for entry in report.skipped} == {
        "0": "customised",
        "1": "customised",
        "1.adapter": "too_few_zero_blocks",
        "2": "customised",
        "3": "customised",
        "4": "unsupported_dtype",
        "5": "odd_shape",
        "6": "uninitialized",
    }
    assert "it has adapter of its own" in report.skipped[1].reason


def test_a_model_in_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(ValueError, match=r"swap ddp\.module and wrap it again"):
            swap_to_bsr(model, min_sparsity=0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_a_swap_in_inference_mode_can_be_trained_and_loaded_afterwards():
    model = mlp()
    with torch.inference_mode():
        swap_to_bsr(model, min_sparsity=0.5)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    model(torch.randn(2, 64)).sum().backward()
    model.load_state_dict(copy.deepcopy(model).state_dict())


def test_a_default_device_does_not_get_in_the_way():
    model = mlp()
    with torch.device("meta"):
        swap_to_bsr(model, min_sparsity=0.5)
        model.load_state_dict(model.state_dict())
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_swapped_models_can_be_traced_by_fx():
    model = mlp()
    swap_to_bsr(model, min_sparsity=0.5)
    x = torch.randn(3, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_root_linear_and_a_non_module_are_refused():
    with pytest.raises(ValueError, match="to_bsr_linear"):
        swap_to_bsr(prune(nn.Linear(32, 32), 16))
    with pytest.raises(TypeError, match="got dict"):
        swap_to_bsr({})


def test_swapping_twice_does_nothing_more():
    model = mlp()
    swap_to_bsr(model, min_sparsity=0.5)
    before = snapshot(model)
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert not report.swapped
    assert not report.skipped
    assert_unchanged(model, before)


def test_compiled_models_show_their_own_names():
    model = torch.compile(mlp(), backend="eager")
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert [entry.fqn for entry in report.swapped] == ["0", "2"]
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_to_bsr_linear_leaves_the_linear_alone():
    linear = prune(nn.Linear(64, 64), 16)
    weight = linear.weight.clone()
    layer = to_bsr_linear(linear)
    with torch.no_grad():
        layer.values.zero_()
    assert torch.equal(linear.weight, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Models whose parents read a child's weight instead of calling the child.


def encoder_model(norm_first: bool, batch_first: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors with norm_first
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)
    for index, sublayer in enumerate(encoder.layers):
        torch.manual_seed(index)
        prune_all(sublayer, 16, 0.5)
    return encoder


MODES = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    "which", ["all", "first only", "all but the first", "one linear of the last"]
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_gives_the_same_output(norm_first, which, padding, mode):
    training, grad = MODES[mode]
    encoder = encoder_model(norm_first).train(training)
    x = torch.randn(3, 7, 32)
    mask = None
    if padding:
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 5:] = mask[2, 2:] = True
    chosen = {
        "all": lambda fqn: True,
        "first only": lambda fqn: fqn.startswith("layers.0"),
        "all but the first": lambda fqn: not fqn.startswith("layers.0"),
        "one linear of the last": lambda fqn: fqn == "layers.2.linear2",
    }[which]
    kept = torch.ones(3, 7, dtype=torch.bool) if mask is None else ~mask
    with grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        expected = encoder(x, src_key_padding_mask=mask)
        had_nested = encoder.use_nested_tensor
        report = swap_to_bsr(encoder, filter_fn=lambda _, fqn: chosen(fqn), min_sparsity=0.25)
        with CountCalls() as calls:
            y = encoder(x, src_key_padding_mask=mask)
    assert calls.count == len(report.swapped) > 0
    assert relative_error(y[kept], expected[kept]) <= 1e-6
    assert not encoder.use_nested_tensor
    assert bool(report.notes) == had_nested


def test_encoder_notes_are_printed():
    encoder = encoder_model(norm_first=False)
    report = swap_to_bsr(nn.ModuleDict({"body": encoder}), min_sparsity=0.25)
    assert "note: body: use_nested_tensor is False now" in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_swin_gives_the_same_output(training):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.swin_t().train(training)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    prune_all(model, 16, 0.5)
    x = torch.randn(1, 3, 64, 64)
    dense = copy.deepcopy(model)
    report = swap_to_bsr(model, min_sparsity=0.25)
    assert len(report.swapped) > 40
    with torch.no_grad(), CountCalls() as calls:
        assert relative_error(model(x), dense(x)) <= 1e-6
    assert calls.count == len(report.swapped)


def test_vit_gives_the_same_output():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    ).eval()
    prune_all(model, 16, 0.75)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.heads.head.weight.normal_()
        expected = model(x)
        report = swap_to_bsr(model, min_sparsity=0.5)
        assert sorted(entry.fqn.rpartition(".")[2] for entry in report.swapped) == sorted(
            ["0", "3", "out_proj"] * 2
        )
        with CountCalls() as calls:
            assert relative_error(model(x), expected) <= 1e-6
    assert calls.count == len(report.swapped)


class TestSparseLayouts:
    """Weights with a layout of torch's own."""

    LAYOUTS = {  # noqa: RUF012
        "csr": lambda weight: weight.to_sparse_csr(),
        "csc": lambda weight: weight.to_sparse_csc(),
        "coo": lambda weight: weight.to_sparse(),
        "bsc": lambda weight: weight.to_sparse_bsc((16, 16)),
    }

    @staticmethod
    def with_weight(change):
        model = mlp()
        model[0].weight = nn.Parameter(change(model[0].weight.detach()))
        return model

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_others_than_bsr_are_skipped(self, layout):
        model = self.with_weight(self.LAYOUTS[layout])
        report = swap_to_bsr(model, min_sparsity=0.5)
        assert [(entry.fqn, entry.code) for entry in report.skipped] == [("0", "sparse_layout")]
        assert f"layout torch.sparse_{layout}" in report.skipped[0].reason
        assert [entry.fqn for entry in report.swapped] == ["2"]
        with pytest.raises(TypeError, match="to_sparse_bsr"):
            to_bsr_linear(model[0])

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_elsewhere_in_the_model_they_are_in_nobodys_way(self, layout):
        model = mlp()
        model.register_buffer("graph", self.LAYOUTS[layout](torch.eye(32)))
        model.free = nn.Parameter(self.LAYOUTS[layout](torch.eye(32)))
        assert len(swap_to_bsr(model, min_sparsity=0.5).swapped) == 2

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_bsr_is_taken_as_it_is(self, dtype):
        def stored(weight):
            bsr = weight.to_sparse_bsr((16, 16))
            return torch.sparse_bsr_tensor(
                bsr.crow_indices().to(dtype),
                bsr.col_indices().to(dtype),
                torch.cat([bsr.values()[:1] * 0, bsr.values()[1:]]),  # a stored block of zeros
                weight.shape,
            )

        model = self.with_weight(stored)
        model[0].weight.requires_grad_(False)
        weight = model[0].weight
        report = swap_to_bsr(model)
        assert report.swapped[0].fqn == "0"
        layer = model[0]
        assert report.swapped[0].blocksize == layer.blocksize == (16, 16)
        assert layer.nnz == weight.values().shape[0]
        assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
        assert torch.equal(layer.values, weight.values())
        assert layer.values.data_ptr() != weight.values().data_ptr()
        assert not layer.values.requires_grad
        x = torch.randn(3, 64)
        expected = nn.functional.linear(x, weight.to_dense(), layer.bias)
        assert relative_error(layer(x), expected.double()) <= 1e-6
        assert to_bsr_linear(self.with_weight(stored)[0]).nnz == layer.nnz

    def test_bsr_of_another_block_size_or_too_dense_is_skipped(self):
        for options, code in (
            ({"blocksize": 32}, "other_blocksize"),
            ({"min_sparsity": 0.99}, "too_few_zero_blocks"),
        ):
            model = self.with_weight(lambda weight: weight.to_sparse_bsr((16, 16)))
            report = swap_to_bsr(model, **options)
            assert report.skipped[0].code == code
            assert type(model[0]) is nn.Linear
        with pytest.raises(ValueError, match=r"stored in blocks of \(16, 16\), not of 32"):
            to_bsr_linear(model[0], 32)

    @pytest.mark.parametrize(
        ("column", "words"), [(99, r"must lie in \[0, 4\)"), (2**32, "do not fit into int32")]
    )
    def test_bsr_with_indices_that_are_no_pattern_is_skipped(self, column, words):
        def broken(weight):
            bsr = weight.to_sparse_bsr((16, 16))
            bsr.col_indices()[-1] = column
            return bsr

        model = self.with_weight(broken)
        report = swap_to_bsr(model, min_sparsity=0.5)
        assert report.skipped[0].code == "invalid_indices"
        assert re.search(words, report.skipped[0].reason)


def test_weights_that_accelerate_moves_are_named():
    accelerate = pytest.importorskip("accelerate")
    model = mlp()
    accelerate.cpu_offload(model, execution_device="cpu")
    report = swap_to_bsr(model, min_sparsity=0.5)
    assert [entry.code for entry in report.skipped] == ["customised", "customised"]
    assert "accelerate.hooks.remove_hook_from_module(model, recurse=True)" in str(report)
    # The advice, word for word.
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert len(swap_to_bsr(model, min_sparsity=0.5).swapped) == 2


def test_an_exception_anywhere_leaves_the_dense_model_or_the_swapped():
    x = torch.randn(2, 64)
    model = expected = None

    def prepare():
        nonlocal model, expected
        torch.manual_seed(0)
        model = mlp().eval()
        expected = model(x)
        return lambda: swap_to_bsr(model, 16, min_sparsity=0.5, fuse_activations=True)

    kinds = set()
    for at in each_interruption(prepare, 37, MemoryError):
        assert torch.allclose(model(x), expected, atol=1e-6), at
        kinds.add(tuple(type(module) for module in model))
    assert kinds <= {
        (nn.Linear, nn.GELU, nn.Linear),
        (BSRLinear, FoldedActivation, BSRLinear),
    }
    assert len(kinds) >= 1
