"""What becomes of an attention at a swap, on the way back, in files and state dicts, and what is refused."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from expecttest import assert_expected_inline
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations

from tests.bsr.common import assert_unchanged, prune_all, rewrite, snapshot
from tests.bsr.test_attention import E, H, pair, prune_attention, prune_weight, tokens
from tests.injection import each_interruption
from tests.reference import relative_error
from torchao_superblock import (
    MagnitudeSparsifier,
    SupermaskSparsifier,
    load_bsr,
    save_bsr,
    squash,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.bsr import BSRLinear, BSRMultiheadAttention
from torchao_superblock.bsr.attention_swap import lost_time
from torchao_superblock.bsr.packed_linear import PackedBSRLinear
from torchao_superblock.common.swappable import type_obstacle
from torchao_superblock.model_file import read_model, write_dense
from torchao_superblock.ops.break_even import break_even

OLD_FILE = Path(__file__).parent / "data" / "attention_version_1.safetensors"


class Model(nn.Module):
    def __init__(self, E: int = E, H: int = H, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, **options)
        self.up = nn.Linear(E, E)

    def forward(self, x):
        return self.up(self.attention(x, x, x, need_weights=False)[0])


def codes(report):
    return {entry.fqn: entry.code for entry in [*report.swapped, *report.skipped]}


class TestSwap:
    def test_report_has_a_row_for_each_projection(self):
        model = nn.ModuleDict(
            {
                "one": prune_attention(nn.MultiheadAttention(E, H)),
                "two": prune_attention(nn.MultiheadAttention(E, H, kdim=16, vdim=16)),
                "dense": nn.MultiheadAttention(E, H),
            }
        )
        assert_expected_inline(
            str(swap_to_bsr(model, 8, min_sparsity=0.5)),
            """\
6 of 8 weights swapped to BSR
layer                 shape  block  sparsity  result
one.in_proj_weight    96x32  8x8    75.0%     swapped
one.out_proj          32x32  8x8    75.0%     swapped
two.q_proj_weight     32x32  8x8    75.0%     swapped
two.k_proj_weight     32x16  8x8    75.0%     swapped
two.v_proj_weight     32x16  8x8    75.0%     swapped
two.out_proj          32x32  8x8    75.0%     swapped
dense.in_proj_weight  96x32  8x8    0.0%      skipped: 0.0% of its blocks are zero, min_sparsity is 50.0%
dense.out_proj        32x32  8x8    0.0%      skipped: 0.0% of its blocks are zero, min_sparsity is 50.0%""",
        )

    def test_reads_each_block_size_off_the_zeros(self):
        model = Model()
        prune_weight(model.attention.in_proj_weight, 16)
        prune_weight(model.attention.out_proj.weight, 8)
        swap_to_bsr(model, min_sparsity=0.5)
        assert model.attention.in_proj.blocksize == (16, 16)
        assert model.attention.out_proj.blocksize == (8, 8)
        assert type(model.attention.in_proj) is PackedBSRLinear

    def test_filter_sees_projections_as_linear_layers(self):
        model, seen = prune_attention(Model()), {}

        def choose(linear, fqn):
            seen[fqn] = (linear.out_features, linear.in_features)
            return "in_proj" in fqn

        report = swap_to_bsr(model, 8, min_sparsity=0.5, filter_fn=choose)
        assert seen == {
            "attention.in_proj_weight": (96, 32),
            "attention.out_proj": (32, 32),
            "up": (32, 32),
        }
        assert codes(report)["attention.out_proj"] == "filtered_out"
        assert isinstance(model.attention.out_proj, nn.Linear)
        again = swap_to_bsr(model, 8, min_sparsity=0.5)
        assert [entry.fqn for entry in again.swapped] == ["attention.out_proj"]
        assert isinstance(model.attention.out_proj, BSRLinear)

    def test_a_model_that_is_an_attention_itself(self):
        dense, swapped = pair(batch_first=True)
        assert swap_to_dense(swapped) == ["out_proj", "in_proj_weight"]
        assert type(swapped) is nn.MultiheadAttention
        assert torch.equal(swapped.in_proj_weight, dense.in_proj_weight)

    def test_trains_on_with_its_optimizer(self):
        torch.manual_seed(0)
        masked = Model()
        sparsifier = MagnitudeSparsifier(0.75, 8)
        sparsifier.prepare(masked, [{"tensor_fqn": "attention.*"}])
        sparsifier.freeze()
        optimizer = torch.optim.AdamW(masked.parameters(), lr=1e-2)
        x = tokens(2, 6)

        def steps(model, optimizer):
            losses = []
            for _ in range(4):
                loss = model(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return torch.tensor(losses)

        steps(masked, optimizer)
        swapped, other = copy.deepcopy((masked, optimizer))
        torch.manual_seed(0)
        expected = steps(masked, optimizer)
        squash(swapped)
        report = swap_to_bsr(swapped, 8, min_sparsity=0.5, optimizer=other)
        assert len(report.swapped) == 2
        assert relative_error(steps(swapped, other), expected) <= 1e-5

    def test_an_interruption_leaves_it_as_it_was(self):
        made = []

        def prepare():
            model = prune_attention(Model())
            made[:] = [model, snapshot(model)]
            return lambda: swap_to_bsr(model, 8, min_sparsity=0.5)

        for _ in each_interruption(prepare, 97):
            model, before = made
            if type(model.attention) is nn.MultiheadAttention:
                assert_unchanged(model, before)
            else:
                assert isinstance(model.attention.in_proj, PackedBSRLinear)
                assert isinstance(model.attention.out_proj, BSRLinear)


class TestSpeed:
    """What is swapped without being told to."""

    def attention(self, which, sparsity, **options):
        module = nn.MultiheadAttention(128, 4, **options)
        for name, weight in (("in", module.in_proj_weight), ("out", module.out_proj.weight)):
            if name in which:
                prune_weight(weight, 32, sparsity)
        return module

    def test_both_at_ninety_percent(self):
        module = self.attention(("in", "out"), 0.9, batch_first=True)
        report = swap_to_bsr(module)
        assert set(codes(report).values()) == {"swapped"}

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_what_gains_less_than_the_fused_path_stays_dense(self, batch_first):
        even = break_even("cpu", (32, 32), torch.float32).sparsity
        blocks = 16  # of 32x32 in the out_proj
        sparsity = min((int(even * blocks) + 1) / blocks, 1 - 1 / blocks)
        module = self.attention(("out",), sparsity, batch_first=batch_first)
        before = snapshot(module)
        report = swap_to_bsr(module)
        if batch_first:
            assert codes(report)["out_proj"] == "slower_than_dense"
            (entry,) = [entry for entry in report.skipped if entry.fqn == "out_proj"]
            assert "the module would be slower" in entry.reason and "fused path" in entry.reason
            assert_unchanged(module, before)
            assert codes(swap_to_bsr(module, min_sparsity=0.05))["out_proj"] == "swapped"
        else:  # it has no fused path
            assert codes(report)["out_proj"] == "swapped"

    def test_half_of_a_fused_projection_is_judged_as_a_whole(self):
        module = nn.MultiheadAttention(128, 4, batch_first=True)
        with torch.no_grad():
            module.in_proj_weight[:32, :32] = 0  # one block of the query
        report = swap_to_bsr(module, 32)
        (entry,) = [entry for entry in report.skipped if entry.fqn == "in_proj_weight"]
        assert entry.code == "slower_than_dense"
        assert "query 6.2%, key 0.0%, value 0.0%" in entry.reason

    def test_subclasses_keep_their_fused_path(self):
        class Mine(nn.MultiheadAttention):
            pass

        model = nn.ModuleDict({"mine": Mine(128, H, batch_first=True)})
        prune_attention(model, 0.9, blocksize=32)
        report = swap_to_bsr(copy.deepcopy(model), 32)
        assert codes(report) == {
            "mine.in_proj_weight": "no_twin",
            "mine.out_proj": "slower_than_dense",
        }
        told = copy.deepcopy(model)
        assert codes(swap_to_bsr(told, 32, min_sparsity=0.5))["mine.out_proj"] == "swapped"
        x = tokens(2, 4, 128)
        assert relative_error(told.mine(x, x, x)[0], model.mine(x, x, x)[0]) <= 1e-5

    def test_an_encoder_layer_whose_mlp_is_dense_counts(self):
        attention = nn.MultiheadAttention(E, H, batch_first=True)
        layer = nn.TransformerEncoderLayer(E, H, 4 * E, batch_first=True)
        alone = lost_time(attention, None, "cuda")
        assert lost_time(attention, layer, "cuda") > alone
        prune_all(layer, 8, 0.75)
        assert lost_time(attention, layer, "cuda") == alone


def meta(model):
    model.to("meta")


def shared_weight(model):
    model.other = nn.Linear(128, 3 * 128)
    model.other.weight = model.attention.in_proj_weight


def shared_out_proj(model):
    model.again = nn.ModuleList([model.attention.out_proj])


def lazy(model):
    model.attention._parameters["in_proj_weight"] = nn.UninitializedParameter()


def quantized(model):
    quantization = pytest.importorskip("torchao.quantization")
    out_proj = model.attention.out_proj
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda m, _: m is out_proj)


def own_forward(model):
    model.attention.forward = lambda *args, **kwargs: (args[0], None)


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.attention, "in_proj_weight", 0.5)


BAD = {
    "parametrized": (
        lambda model: parametrizations.weight_norm(model.attention, "in_proj_weight"),
        {"in_proj_weight": "parametrized", "out_proj": "slower_than_dense"},
    ),
    "parametrized out_proj": (
        lambda model: parametrizations.weight_norm(model.attention.out_proj),
        {"in_proj_weight": "swapped", "out_proj": "parametrized"},
    ),
    "torch's pruning": (pruned, {"in_proj_weight": "parametrized", "out_proj": "swapped"}),
    "shared weight": (shared_weight, {"in_proj_weight": "tied_weight", "out_proj": "swapped"}),
    "shared out_proj": (shared_out_proj, {"in_proj_weight": "swapped", "out_proj": "tied_weight"}),
    "lazy": (lazy, {"in_proj_weight": "uninitialized", "out_proj": "swapped"}),
    "quantized": (quantized, {"in_proj_weight": "swapped", "out_proj": "weight_subclass"}),
    "own forward": (
        own_forward,
        {"in_proj_weight": "customised", "out_proj": "slower_than_dense"},
    ),
    "meta": (meta, {"in_proj_weight": "meta_device", "out_proj": "meta_device"}),
    "another dtype": (
        lambda model: setattr(
            model.attention, "in_proj_bias", nn.Parameter(model.attention.in_proj_bias.double())
        ),
        {"in_proj_weight": "unsupported_dtype", "out_proj": "swapped"},
    ),
}


class TestMeasured:
    def test_an_attention_is_timed_and_decided_as_a_whole(self):
        model = prune_attention(Model(), 0.75).train()
        x = tokens(2, 4)
        report = swap_to_bsr(model, 8, measure=x)
        rows = [entry for entry in [*report.swapped, *report.skipped] if "attention" in entry.fqn]
        assert [entry.fqn for entry in rows] == [
            "attention.in_proj_weight",
            "attention.out_proj",
        ]
        assert len({(entry.code, entry.dense_ms, entry.bsr_ms) for entry in rows}) == 1
        assert rows[0].dense_ms > 0 and rows[0].bsr_ms > 0
        is_swapped = type(model.attention) is BSRMultiheadAttention
        assert is_swapped == (rows[0].bsr_ms < rows[0].dense_ms)
        assert all(module.training for module in model.modules())

    def test_inside_of_an_encoder_layer_it_is_a_part_of_that(self):
        layer = prune_attention(nn.TransformerEncoderLayer(E, H, 64, batch_first=True), 0.75)
        model = nn.Sequential(prune_all(layer, 8, 0.75))
        before = copy.deepcopy(model).eval()
        report = swap_to_bsr(model.eval(), 8, measure=tokens(2, 4))
        rows = [*report.swapped, *report.skipped]
        assert len({(entry.code, entry.dense_ms, entry.bsr_ms) for entry in rows}) == 1
        x = tokens(2, 4)
        assert relative_error(model(x), before(x)) <= 1e-5


class TestBadInput:
    @pytest.mark.parametrize("name", BAD)
    def test_is_skipped_with_the_reason(self, name):
        change, expected = BAD[name]
        model = prune_attention(Model(128), 0.9, blocksize=32)
        change(model)
        report = swap_to_bsr(model, 32)
        found = codes(report)
        assert {key: found[f"attention.{key}"] for key in expected} == expected
        for entry in report.skipped:
            assert entry.reason

    def test_blocks_across_the_borders_of_query_key_and_value(self):
        model = Model()
        with torch.no_grad():
            model.attention.in_proj_weight[:48, :8] = 0
        report = swap_to_bsr(model, (48, 8), min_sparsity=0.05)
        (entry,) = [e for e in report.skipped if e.fqn == "attention.in_proj_weight"]
        assert entry.code == "shape_not_multiple"
        assert "48 rows" in entry.reason and "cross-attention" in entry.reason
        with pytest.raises(ValueError, match="32, which is not a multiple of the 48 rows"):
            PackedBSRLinear.from_dense(nn.Linear(32, 96), (48, 8))

    def test_masks_that_are_not_squashed(self):
        model = Model()
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "attention.in_proj_weight"}])
        with pytest.raises(RuntimeError, match="'attention' is not squashed"):
            swap_to_bsr(model)
        with pytest.raises(RuntimeError, match="not squashed"):
            BSRMultiheadAttention.from_dense(model.attention)

    def test_from_dense_names_each_reason(self):
        attention = nn.MultiheadAttention(E, H)
        with pytest.raises(ValueError, match=r"in_proj_weight: no block.*out_proj: no block"):
            BSRMultiheadAttention.from_dense(attention)
        with pytest.raises(TypeError, match="expected an nn.MultiheadAttention, got Linear"):
            BSRMultiheadAttention.from_dense(nn.Linear(3, 3))

    def test_a_sharded_attention(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/init", rank=0, world_size=1
            )
            try:
                model = prune_attention(Model(), 0.9)
                mesh = init_device_mesh("cpu", (1,))
                weight = distribute_tensor(model.attention.in_proj_weight.detach(), mesh)
                model.attention.in_proj_weight = nn.Parameter(weight)
                report = swap_to_bsr(model, 8)
            finally:
                dist.destroy_process_group()
        assert codes(report)["attention.in_proj_weight"] == "sharded"


class TestWayBack:
    @pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 24}, {"bias": False}])
    @pytest.mark.parametrize("which", [("in", "out"), ("in",), ("out",)])
    def test_is_what_it_was(self, which, options):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, H, **options)})
        prune_attention(model, which=which)
        before, attention = copy.deepcopy(model), model.attention
        keys = list(model.state_dict())
        attention.in_proj_bias is None or attention.in_proj_bias.requires_grad_(False)
        report = swap_to_bsr(model, 8, min_sparsity=0.5)
        assert sorted(swap_to_dense(model)) == sorted(entry.fqn for entry in report.swapped)
        assert model.attention is attention and type(attention) is nn.MultiheadAttention
        assert type(attention.out_proj) is NonDynamicallyQuantizableLinear
        assert list(model.state_dict()) == keys
        assert not any(isinstance(module, BSRLinear) for module in model.modules())
        for key, tensor in before.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key
        x = tokens(2, 4)
        k, v = tokens(2, 4, attention.kdim), tokens(2, 4, attention.vdim)
        assert torch.equal(attention(x, k, v)[0], before.attention(x, k, v)[0])

    def test_parametrized_is_refused(self):
        _, swapped = pair()
        model = nn.ModuleDict({"attention": swapped})
        torch.nn.utils.parametrize.register_parametrization(swapped, "in_proj_bias", nn.Identity())
        with pytest.raises(ValueError, match=r"'attention': it is a Parametrized.*not exactly"):
            swap_to_dense(model)


class TestStateDict:
    def test_holds_blocks_under_names_of_projections(self):
        _, swapped = pair()
        index = ("values", "crow_indices", "col_indices")
        assert set(swapped.state_dict()) == {
            "in_proj_bias",
            "out_proj.bias",
            *(f"{name}.{part}" for name in ("in_proj", "out_proj") for part in index),
        }

    def test_loads_another_pattern_parts_included(self):
        _, swapped = pair(batch_first=True)
        dense, other = pair(batch_first=True, sparsity=0.5)
        swapped.load_state_dict(other.state_dict())
        x, y, z = tokens(2, 4), tokens(2, 4), tokens(2, 4)
        for q, k, v in ((x, x, x), (x, y, y), (x, x, y), (x, y, z)):
            assert relative_error(swapped(q, k, v)[0], dense(q, k, v)[0]) <= 1e-5

    @pytest.mark.parametrize("strict", [True, False])
    def test_dense_weights_are_refused(self, strict):
        dense, swapped = pair(("in",))
        before = snapshot(swapped)
        with pytest.raises(RuntimeError, match=r"holds a dense in_proj_weight.*swap it"):
            swapped.load_state_dict(dense.state_dict(), strict=strict)
        assert torch.equal(swapped.in_proj_bias, before[0]["in_proj_bias"])
        assert torch.equal(swapped.in_proj.values, before[0]["in_proj.values"])

    def test_blocks_do_not_go_into_a_dense_attention(self):
        dense, swapped = pair()
        with pytest.raises(
            RuntimeError, match=r"(?s)Missing.*in_proj_weight.*Unexpected.*in_proj\.values"
        ):
            dense.load_state_dict(swapped.state_dict())

    def test_a_bad_index_changes_nothing(self):
        _, swapped = pair()
        state = {key: tensor.clone() for key, tensor in swapped.state_dict().items()}
        state["in_proj.col_indices"][0] = 99
        before = snapshot(swapped)
        with pytest.raises(RuntimeError, match="in_proj: col_indices"):
            swapped.load_state_dict(state)
        assert_unchanged(swapped, before)


class TestFiles:
    @pytest.mark.parametrize("options", [{}, {"kdim": E, "vdim": E, "add_bias_kv": True}])
    @pytest.mark.parametrize("into", ["dense", "swapped", "meta"])
    @pytest.mark.parametrize("which", [("in", "out"), ("in",), ("out",)])
    def test_round_trip(self, which, into, options, tmp_path):
        model = prune_attention(Model(**options), which=which).eval()
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / "model.safetensors")
        with torch.device("meta" if into == "meta" else "cpu"):
            fresh = Model(**options).eval()
        if into == "swapped":
            torch.manual_seed(9)
            prune_attention(fresh, which=which, sparsity=0.5)
            swap_to_bsr(fresh, 8, min_sparsity=0.5)
        attention, bias = fresh.attention, fresh.attention.in_proj_bias
        load_bsr(fresh, tmp_path / "model.safetensors")
        assert fresh.attention is attention and type(attention) is BSRMultiheadAttention
        assert into == "meta" or attention.in_proj_bias is bias
        x, y = tokens(2, 4), tokens(2, 5)
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(fresh.attention(x, y, y)[0], model.attention(x, y, y)[0])
        save_bsr(fresh, tmp_path / "again.safetensors")
        files = [tmp_path / name for name in ("model.safetensors", "again.safetensors")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_separate_projections_and_an_attention_alone(self, tmp_path):
        _, swapped = pair(kdim=16, vdim=24, bias=False)
        save_bsr(swapped, tmp_path / "a.safetensors")
        fresh = load_bsr(
            nn.MultiheadAttention(E, H, kdim=16, vdim=24, bias=False), tmp_path / "a.safetensors"
        )
        assert type(fresh) is BSRMultiheadAttention
        inputs = tokens(2, 4), tokens(2, 4, 16), tokens(2, 4, 24)
        assert torch.equal(fresh(*inputs)[0], swapped(*inputs)[0])

    def test_one_attention_in_two_places(self, tmp_path):
        def build():
            attention = nn.MultiheadAttention(E, H, batch_first=True)
            return nn.ModuleDict({"one": attention, "two": attention})

        model = prune_attention(build())
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / "m.safetensors")
        fresh = load_bsr(build(), tmp_path / "m.safetensors")
        assert fresh.one is fresh.two and type(fresh.one) is BSRMultiheadAttention
        x = tokens(2, 4)
        assert torch.equal(fresh.two(x, x, x)[0], model.one(x, x, x)[0])

    def test_a_file_of_version_1(self):
        """Written by 0.2.0, which swapped an attention's out_proj alone and left the attention as it was."""
        tensors = load_file(OLD_FILE)
        model = load_bsr(Model(16, 2), OLD_FILE)
        assert type(model.attention) is BSRMultiheadAttention
        assert isinstance(model.attention.in_proj_weight, nn.Parameter)
        assert isinstance(model.attention.out_proj, BSRLinear)
        dense = Model(16, 2)
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.bias"):
            dense.attention.get_parameter(name).data = tensors[f"attention.{name}"]
        blocks = tensors["attention.out_proj.values"]
        weight = torch.zeros(16, 16)
        weight[:8, :8], weight[8:, :8], weight[8:, 8:] = blocks
        dense.attention.out_proj.weight.data = weight
        x = tokens(2, 4, 16)
        assert relative_error(model.attention(x, x, x)[0], dense.attention(x, x, x)[0]) <= 1e-6
        assert read_model(OLD_FILE).is_bsr

    def test_is_as_before_where_no_attention_is_swapped(self, tmp_path):
        """An earlier release can read it."""
        model = prune_all(nn.Sequential(nn.Linear(E, E)), 8)
        swap_to_bsr(model, 8, min_sparsity=0.3)
        save_bsr(model, tmp_path / "m.safetensors")
        content = (tmp_path / "m.safetensors").read_bytes()
        assert b'"version":"1"' in content and b'"attention"' not in content

    def test_other_models_are_refused(self, tmp_path):
        model = prune_attention(Model())
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / "m.safetensors")
        own_forward_model = Model()
        own_forward(own_forward_model)
        other = Model()
        other.attention = nn.Linear(E, E)
        only_out = prune_attention(Model(), which=("out",))
        swap_to_bsr(only_out, 8, min_sparsity=0.5)
        for wrong, words in (
            (Model(E, 8), r"'attention' has num_heads=4 in the file, but 8 in the model"),
            (Model(kdim=16), r"'attention' has kdim=32 in the file, but 16"),
            (own_forward_model, "a forward of its own"),
            (other, "is an attention in the file, but a Linear"),
            (nn.Linear(E, E), "itself a linear layer"),
            (nn.ModuleDict({"up": nn.Linear(E, E)}), "no such module"),
        ):
            before = snapshot(wrong)
            with pytest.raises(ValueError, match=words):
                load_bsr(wrong, tmp_path / "m.safetensors")
            assert_unchanged(wrong, before)
        load_bsr(only_out, tmp_path / "m.safetensors")
        assert type(only_out.attention.in_proj) is PackedBSRLinear

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace('"num_heads": 4', '"num_heads": 5'),
            lambda text: text.replace('"num_heads": 4', '"num_heads": "4"'),
            lambda text: text.replace('"embed_dim": 32', '"embed_dim": 64'),
            lambda text: text.replace('"in_proj"', '"q_proj"'),
            lambda text: text.replace('"in_proj", ', ""),
            lambda text: text.replace('["in_proj", "out_proj"]', "[]"),
            lambda text: text.replace('"kdim"', '"more"'),
            lambda text: "[]",
            lambda text: '{"attention": 3}',
        ],
    )
    def test_damaged_descriptions_are_refused(self, change, tmp_path):
        model = prune_attention(Model())
        swap_to_bsr(model, 8, min_sparsity=0.5)
        path = tmp_path / "m.safetensors"
        save_bsr(model, path)

        def damage(metadata):
            changed = change(metadata["attention"])
            assert changed != metadata["attention"]
            metadata["attention"] = changed

        rewrite(path, change_metadata=damage)
        fresh = Model()
        before = snapshot(fresh)
        with pytest.raises(ValueError, match=r"damaged|belongs to another model"):
            load_bsr(fresh, path)
        assert_unchanged(fresh, before)

    def test_without_the_model(self, tmp_path):
        """The command line reads a file and makes it dense with nothing but the file."""
        model = prune_attention(Model(add_bias_kv=True))
        dense = copy.deepcopy(model)
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / "m.safetensors")
        read = read_model(tmp_path / "m.safetensors")
        swap_to_dense(read.model)
        write_dense(read.model, tmp_path / "dense.safetensors")
        tensors = load_file(tmp_path / "dense.safetensors")
        assert tensors.keys() == dense.state_dict().keys()
        for key, tensor in dense.state_dict().items():
            assert torch.equal(tensors[key], tensor), key

    def test_an_interrupted_load_leaves_the_model_as_it_was(self, tmp_path):
        model = prune_attention(Model())
        swap_to_bsr(model, 8, min_sparsity=0.5)
        save_bsr(model, tmp_path / "m.safetensors")
        made = []

        def prepare():
            fresh = Model()
            made[:] = [fresh, snapshot(fresh)]
            return lambda: load_bsr(fresh, tmp_path / "m.safetensors")

        for _ in each_interruption(prepare, 97):
            fresh, before = made
            if type(fresh.attention) is nn.MultiheadAttention:
                assert_unchanged(fresh, before)
            else:
                assert torch.equal(fresh.attention.in_proj.values, model.attention.in_proj.values)


class TestSparsifier:
    def test_masked_projections_can_be_swapped(self):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            assert type_obstacle(nn.MultiheadAttention, name) is None
        assert "in_proj_bias" in type_obstacle(nn.MultiheadAttention, "in_proj_bias")
        model = Model()
        sparsifier = SupermaskSparsifier(0.5, 8)
        sparsifier.prepare(model, [{"tensor_fqn": "attention.*"}])
        assert [group.swap_obstacle for group in sparsifier.summary().groups] == [None, None]

    @pytest.mark.parametrize(
        "pattern", ["*", "attention.in_proj_weight", "attention.out_proj.weight"]
    )
    @pytest.mark.parametrize("inplace", [True, False])
    def test_convert(self, inplace, pattern):
        model = Model()
        sparsifier = SupermaskSparsifier(0.5, 8)
        sparsifier.prepare(model, [{"tensor_fqn": pattern}])
        sparsifier.squash_mask()
        x = tokens(2, 4)
        expected = model(x)
        converted = sparsifier.convert(model, inplace=inplace)
        assert type(converted.attention) is BSRMultiheadAttention
        assert (converted is model) == inplace
        assert inplace or type(model.attention) is nn.MultiheadAttention
        assert isinstance(converted.up, BSRLinear) == (pattern == "*")
        assert isinstance(converted.attention.out_proj, BSRLinear) == ("in_proj" not in pattern)
        assert relative_error(converted(x), expected) <= 1e-5

    def test_convert_of_an_attention_itself(self):
        attention = nn.MultiheadAttention(E, H, batch_first=True)
        sparsifier = SupermaskSparsifier(0.5, 8)
        sparsifier.prepare(attention, [{"tensor_fqn": "*"}])
        sparsifier.squash_mask()
        assert type(sparsifier.convert(attention)) is BSRMultiheadAttention
