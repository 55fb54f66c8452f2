import copy
import math

import pytest
import torch
from torch import nn

from tests.bsr.common import assert_unchanged, prune, prune_all, snapshot
from tests.reference import relative_error
from torchao_superblock.bsr import BSRLinear, swap_to_bsr
from torchao_superblock.bsr.dead_features import DETERMINISTIC
from torchao_superblock.bsr.folded_activation import FoldedActivation


class TestFuseActivations:
    @pytest.mark.parametrize(
        ("activation", "name"),
        [
            (nn.ReLU(), "relu"),
            (nn.ReLU(inplace=True), "relu"),
            (nn.GELU(), "gelu"),
            (nn.GELU(approximate="tanh"), "gelu_tanh"),
            (nn.SiLU(), "silu"),
        ],
    )
    def test_folds_what_directly_follows(self, activation, name):
        model = nn.Sequential(
            prune(nn.Linear(64, 64), 16), activation, nn.Dropout(0.5), prune(nn.Linear(64, 64), 16)
        ).eval()
        x = torch.randn(5, 64)
        expected, keys = model(x), len(model)
        report = swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        assert model[0].activation == name
        assert model[3].activation == "none"
        assert len(model) == keys
        assert f"note: 0: applies the {type(activation).__name__} behind it itself" in str(report)
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-6
        y = model(x)  # with gradients
        assert relative_error(y, expected) <= 1e-6
        y.sum().backward()
        assert model[0].values.grad is not None

    def test_off_by_default(self):
        model = nn.Sequential(prune(nn.Linear(64, 64), 16), nn.GELU())
        swap_to_bsr(model, min_sparsity=0.25)
        assert model[0].activation == "none"
        assert isinstance(model[1], nn.GELU)

    def test_nothing_is_folded_where_the_result_would_differ(self):
        class Reversed(nn.Sequential):
            def forward(self, x):
                return self[0](self[1](x))

        class Special(nn.GELU):
            pass

        def linear():
            return prune(nn.Linear(32, 32), 16)

        twice, watched, gelu = linear(), linear(), nn.GELU()
        patched, own = linear(), nn.GELU()
        own.forward = lambda x: -x
        seen = []
        watched.register_forward_hook(lambda module, args, y: seen.append(y))
        gelu.register_forward_pre_hook(lambda module, args: seen.append(args))
        model = nn.ModuleDict(
            {
                "own forward": Reversed(linear(), nn.ReLU()),
                "subclass": nn.Sequential(linear(), Special()),
                "used twice": nn.Sequential(twice, nn.ReLU(), twice),
                "hook on the layer": nn.Sequential(watched, nn.ReLU()),
                "hook on the activation": nn.Sequential(linear(), gelu),
                "forward of an instance": nn.Sequential(patched, own),
                "something between": nn.Sequential(linear(), nn.Dropout(0.1), nn.ReLU()),
                "other activation": nn.Sequential(linear(), nn.Tanh()),
                "no sequential": nn.ModuleList([linear(), nn.ReLU()]),
                "not swapped": nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
            }
        ).eval()
        x = torch.randn(3, 32)
        callable_ = {name: m for name, m in model.items() if not isinstance(m, nn.ModuleList)}
        expected = {name: module(x) for name, module in callable_.items()}
        report = swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        assert len(report.swapped) == 9
        assert sorted(report.notes) == [
            "forward of an instance.0: the GELU behind it runs on its own, since forward of an instance.1 has a "
            "forward of its own",
            "hook on the activation.0: the GELU behind it runs on its own, since hooks watch hook on the activation.1",
            "hook on the layer.0: the ReLU behind it runs on its own, since hooks watch hook on the layer.0",
            "used twice.0: the ReLU behind it runs on its own, since used twice.0 has another place in the model",
        ]
        for module in model.modules():
            assert not isinstance(module, BSRLinear) or module.activation == "none"
        seen.clear()
        for name, module in callable_.items():
            assert relative_error(module(x), expected[name]) <= 1e-6, name
        assert len(seen) == 2

    def test_an_activation_shared_by_two_layers_is_folded_into_each(self):
        relu = nn.ReLU()
        model = nn.Sequential(
            prune(nn.Linear(32, 32), 16), relu, prune(nn.Linear(32, 32), 16), relu
        )
        x = torch.randn(3, 32)
        expected = model(x)
        swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        assert model[0].activation == model[2].activation == "relu"
        assert relative_error(model(x), expected) <= 1e-6

    def test_torchvision_mlps_are_folded(self):
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
        ).eval()
        prune_all(model, 16)
        swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        assert [m.activation for m in model.modules() if isinstance(m, BSRLinear)].count(
            "gelu"
        ) == 2

    def test_a_failure_puts_the_activations_back(self, monkeypatch):
        model = nn.Sequential(
            prune(nn.Linear(32, 32), 16), nn.ReLU(), prune(nn.Linear(32, 32), 16), nn.GELU()
        )
        before = snapshot(model)
        real, calls = FoldedActivation.__init__, []

        def failing(self, *args):
            calls.append(self)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            real(self, *args)

        monkeypatch.setattr(FoldedActivation, "__init__", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        assert_unchanged(model, before)


def pruned(
    out_features: int, in_features: int, blocksize, empty_rows=(), empty_columns=(), **kwargs
):
    """A linear layer with random zero blocks, and zeros in whole units of 16 outputs or inputs."""
    linear = prune(nn.Linear(in_features, out_features, **kwargs), blocksize)
    with torch.no_grad():
        linear.weight[:, :16] = linear.weight[:16] = 0.1  # every other row and column has a block
        for unit in empty_rows:
            linear.weight[16 * unit : 16 * unit + 16] = 0
        for unit in empty_columns:
            linear.weight[:, 16 * unit : 16 * unit + 16] = 0
    return linear


def drop(model: nn.Module, blocksize=16, **kwargs):
    return swap_to_bsr(model, blocksize, min_sparsity=0.0, drop_dead_features=True, **kwargs)


def hidden(model: nn.Sequential) -> list[int]:
    return [module.out_features for module in model if isinstance(module, BSRLinear)][:-1]


class TestDropDeadFeatures:
    @staticmethod
    def mlp(activation=None, *, first_bias=True, second_bias=True, dropout=0.0) -> nn.Sequential:
        """Of the hidden features, 96 in 6 units, the second layer reads all but unit 1; 1 and 4 are constant."""
        torch.manual_seed(0)
        return nn.Sequential(
            pruned(96, 64, 16, empty_rows=(1, 4), bias=first_bias),
            activation or nn.GELU(),
            nn.Dropout(dropout),
            pruned(48, 96, 16, empty_columns=(1,), bias=second_bias),
        ).eval()

    @pytest.mark.parametrize("fuse", [False, True])
    @pytest.mark.parametrize(
        "activation",
        [kind() for kind in DETERMINISTIC if kind is not FoldedActivation]
        + [nn.GELU(approximate="tanh"), nn.ReLU(inplace=True)],
        ids=repr,
    )
    def test_the_result_is_the_same(self, activation, fuse):
        model = self.mlp(activation).double()
        x = torch.randn(5, 64, dtype=torch.float64)
        expected = model(x)
        report = drop(model, fuse_activations=fuse)
        assert hidden(model) == [64]
        assert model[0].is_narrowed and model[0].dense_shape == (96, 64)
        assert model[3].is_narrowed and model[3].dense_shape == (48, 96)
        assert "dense_shape=(48, 96)" in repr(model[3])
        assert (
            "note: 0: 32 of its features are dropped: 16 that 3 does not read, 16 that are the same for every input"
            in str(report)
        )
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-12

    def test_off_by_default(self):
        model = self.mlp()
        swap_to_bsr(model, 16, min_sparsity=0.0)
        assert hidden(model) == [96] and not model[0].is_narrowed
        assert "dense_shape" not in repr(model)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(
        ("first", "second", "features"),
        [
            (16, 16, 192),
            (8, 16, 80),
            (16, 8, 144),
            ((32, 8), (8, 16), 160),
            (64, 32, 256),
            (24, 16, 96),
        ],
    )
    def test_random_masks(self, first, second, features, seed):
        torch.manual_seed(seed)
        sizes = {"0": first, "2": second}
        model = nn.Sequential(
            prune(nn.Linear(192, features), first, 0.9),
            nn.SiLU(),
            prune(nn.Linear(features, 192), second, 0.9),
        ).double()
        # By single features: written to by the first layer and read by the second, in units of both block sizes.
        unit = math.lcm(
            *(size if isinstance(size, int) else size[i] for i, size in enumerate((first, second)))
        )
        written = model[0].weight.view(-1, unit, 192).any(2).any(1)
        read = model[2].weight.view(192, -1, unit).any(2).any(0)
        together = math.lcm(unit, 64) if features % 64 == 0 else unit
        live = max(1, -(-int((written & read).sum()) * unit // together)) * together
        x = torch.randn(7, 192, dtype=torch.float64)
        expected, before = model(x), copy.deepcopy(model)
        for name, size in sizes.items():
            swap_to_bsr(
                before, size, min_sparsity=0.0, filter_fn=lambda _, fqn, name=name: fqn == name
            )
        narrow = copy.deepcopy(before)
        drop(narrow)
        assert relative_error(narrow(x), expected) <= 1e-12
        assert hidden(narrow) == [live]
        assert narrow[0].nnz <= before[0].nnz and narrow[2].nnz <= before[2].nnz

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision_loses_nothing(self, dtype):
        model = self.mlp().to(dtype)
        x = torch.randn(64, 64, dtype=dtype)
        expected = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model)
        swap_to_bsr(plain, 16, min_sparsity=0.0)
        drop(model)
        assert model[0].values.dtype == model[3].bias.dtype == dtype
        limit = 1.5 * relative_error(plain(x), expected)
        assert relative_error(model(x), expected) <= limit

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_folded_bias_is_rounded_once(self, dtype):
        model = self.mlp(nn.Sigmoid()).to(dtype)
        model.insert(2, nn.Tanh())
        layer, last = copy.deepcopy(model[0]), copy.deepcopy(model[4])
        drop(model)
        # Unit 4, rounded after each module like the model's own hidden features.
        value = layer.bias[64:80].double().sigmoid().to(dtype).double().tanh().to(dtype).double()
        exact = last.bias.double() + last.weight[:, 64:80].double() @ value
        assert torch.equal(model[4].bias, exact.to(dtype))

    def test_what_the_bias_cannot_hold_stays(self):
        first, last = pruned(96, 64, 16, empty_rows=(4,)), pruned(48, 96, 16, empty_columns=(1,))
        with torch.no_grad():
            first.bias.fill_(300.0)
            last.weight[:, 64:80] = 16.0  # 76800 in all, of which others take a half
            last.weight[:, :16] = -8.0
        model = nn.Sequential(first, nn.ReLU(), last).half()
        x = torch.zeros(3, 64, dtype=torch.float16)
        expected = copy.deepcopy(model).double()(x.double())
        drop(model)
        assert hidden(model) == [80]
        assert relative_error(model(x), expected) <= 1e-3

    def test_a_second_layer_with_an_activation(self):
        model = self.mlp().append(nn.SiLU())
        x = torch.randn(3, 64)
        expected = model(x)
        swap_to_bsr(model, 16, min_sparsity=0.0, fuse_activations=True)
        drop(model)
        assert hidden(model) == [64] and model[3].activation == "silu"
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-6

    def test_notes_name_layers_as_the_model_does(self):
        report = drop(nn.ModuleDict({"mlp": torch.compile(self.mlp())}))
        assert "note: mlp.0: 32 of its features are dropped: 16 that mlp.3 does not read" in str(
            report
        )

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        model = self.mlp().cuda()
        x = torch.randn(64, 64, device="cuda")
        expected = copy.deepcopy(model).double()(x.double())
        drop(model, fuse_activations=True)
        assert hidden(model) == [64]
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-6

    def test_whole_strips_of_64_stay_whole(self):
        def build(unread):
            return nn.Sequential(
                pruned(128, 64, 16), nn.ReLU(), pruned(32, 128, 16, empty_columns=unread)
            )

        x = torch.randn(3, 64)
        for unread, kept in (((1, 2, 5), 128), ((1, 2, 5, 7), 64), ((0, 1, 2, 3, 5, 7), 64)):
            model = build(unread)
            expected = model(x)
            drop(model)
            assert hidden(model) == [kept], unread
            assert relative_error(model(x), expected) <= 1e-6

    def test_of_dead_features_those_with_the_fewest_blocks_stay(self):
        first = pruned(128, 64, 16)
        with torch.no_grad():
            first.weight[16:32, 16:] = 0  # unit 1: one block
            for unit in (0, 2, 3, 4, 5):
                first.weight[16 * unit : 16 * unit + 16] = 0.5
        model = nn.Sequential(first, nn.ReLU(), pruned(32, 128, 16, empty_columns=(0, 1, 2, 3, 5)))
        drop(model)
        assert hidden(model) == [64]  # units 4, 6 and 7 are read, and one more
        assert model[0].crow_indices.diff()[0] == 1

    def test_what_all_depends_on_nothing_keeps_one_strip(self):
        model = nn.Sequential(
            prune(nn.Linear(64, 128), 16, 1.0), nn.GELU(), prune(nn.Linear(128, 32), 16)
        )
        x = torch.randn(3, 64)
        expected = model(x)
        drop(model)
        assert hidden(model) == [64]
        assert relative_error(model(x), expected) <= 1e-6

    @pytest.mark.parametrize(
        ("activation", "first_bias", "kept"),
        [(nn.GELU(), False, 64), (nn.GELU(), True, 80), (nn.Sigmoid(), False, 80)],
    )
    def test_without_a_second_bias_only_zeros_go(self, activation, first_bias, kept):
        model = self.mlp(activation, first_bias=first_bias, second_bias=False)
        if first_bias:
            with torch.no_grad():
                model[0].bias[64:79] = 0  # all of a unit but one
        x = torch.randn(3, 64)
        expected = model(x)
        drop(model)
        assert hidden(model) == [kept] and model[3].bias is None
        assert relative_error(model(x), expected) <= 1e-6

    @pytest.mark.parametrize(
        ("dropout", "training", "kept"), [(0.5, True, 80), (0.5, False, 64), (0.0, True, 64)]
    )
    def test_an_active_dropout_keeps_constants(self, dropout, training, kept):
        model = self.mlp(dropout=dropout).train(training)
        drop(model)
        assert hidden(model) == [kept]
        assert all(module.training == training for module in model.modules())

    def test_gradients_are_those_of_the_plain_swap(self):
        plain, narrow = self.mlp(), self.mlp()
        swap_to_bsr(plain, 16, min_sparsity=0.0)
        drop(narrow)
        x = torch.randn(5, 64)
        for model in (plain, narrow):
            model(x).square().sum().backward()
        assert relative_error(narrow[3].bias.grad, plain[3].bias.grad) <= 1e-5
        read = torch.isin(plain[3].col_indices, torch.tensor([0, 2, 3, 5]))
        assert relative_error(narrow[3].values.grad, plain[3].values.grad[read]) <= 1e-5
        assert relative_error(narrow[0].values.grad, plain[0].values.grad) <= 1e-5

    def test_frozen_layers_stay_frozen(self):
        model = self.mlp().requires_grad_(False)
        drop(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_the_callers_bias_is_left_alone(self):
        model = self.mlp()
        biases = [model[0].bias, model[3].bias]
        before = [bias.clone() for bias in biases]
        drop(model)
        assert model[3].bias is not biases[1]
        assert all(torch.equal(a, b) for a, b in zip(biases, before, strict=True))

    def test_layers_swapped_before_are_served_too(self):
        model = self.mlp()
        x = torch.randn(3, 64)
        expected = model(x)
        swap_to_bsr(model, 16, min_sparsity=0.0, fuse_activations=True)
        report = drop(model)
        assert not report.swapped and hidden(model) == [64]
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-6

    def test_in_inference_mode(self):
        model = self.mlp()
        with torch.inference_mode():
            drop(model)
        model(torch.randn(3, 64)).sum().backward()
        assert model[0].values.grad is not None

    def test_a_chain_is_followed_to_its_ends(self):
        # The last layer reads none of unit 2 of the second, which alone reads unit 3 of the first.
        first, last = pruned(96, 64, 16), pruned(32, 96, 16, empty_columns=(2,))
        second = pruned(96, 96, 16)
        with torch.no_grad():
            second.weight[:, 48:64] = 0
            second.weight[32:48, 48:64] = 1
        model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        x = torch.randn(3, 64)
        expected = model(x)
        report = drop(model)
        assert hidden(model) == [80, 80]
        assert len(report.notes) == 2
        assert relative_error(model(x), expected) <= 1e-6

    def test_nothing_is_dropped_where_somebody_could_tell(self):
        class Twofold(nn.Sequential):
            def forward(self, x):
                y = self[1](self[0](x))
                return y.mean() + self[2](y)

        def first(**kwargs):
            return pruned(96, 96, 16, empty_rows=(1, 4), **kwargs)

        def second(**kwargs):
            return pruned(96, 96, 16, empty_columns=(1,), **kwargs)

        seen = []

        def watched(module):
            module.register_forward_hook(lambda module, args, y: seen.append(y.shape))
            return module

        class Special(BSRLinear):
            pass

        class Parameter(nn.Parameter):
            pass

        def swapped(linear):
            return BSRLinear.from_dense(linear, 16)

        twice, tied, other = first(), first(), second()
        other.bias = tied.bias
        views = first(), second()
        views[1].bias = nn.Parameter(views[0].bias.detach())
        rolled, patched, extra, special, sharded = nn.ReLU(), *(swapped(first()) for _ in range(4))
        rolled.forward = lambda x: x.roll(16, -1)
        patched.forward = lambda x: BSRLinear.forward(patched, x) + 1
        extra.register_buffer("scale", torch.ones(1))
        special.__class__ = Special
        sharded.bias = Parameter(sharded.bias.detach())
        model = nn.ModuleDict(
            {
                "own forward": Twofold(first(), nn.ReLU(), second()),
                "used twice": nn.Sequential(twice, nn.ReLU(), twice),
                "tied biases": nn.Sequential(tied, nn.ReLU(), other),
                "biases in one memory": nn.Sequential(views[0], nn.ReLU(), views[1]),
                "hook on the first": nn.Sequential(watched(first()), nn.ReLU(), second()),
                "hook on the second": nn.Sequential(first(), nn.ReLU(), watched(second())),
                "hook between": nn.Sequential(first(), watched(nn.ReLU()), second()),
                "forward of an activation": nn.Sequential(first(), rolled, second()),
                "forward of a layer": nn.Sequential(patched, nn.ReLU(), second()),
                "buffer of a layer": nn.Sequential(extra, nn.ReLU(), second()),
                "subclass of a layer": nn.Sequential(special, nn.ReLU(), second()),
                "subclass of a parameter": nn.Sequential(sharded, nn.ReLU(), second()),
                "features are mixed": nn.Sequential(first(), nn.LayerNorm(96), second()),
                "parameters for each feature": nn.Sequential(first(), nn.PReLU(96), second()),
                "random": nn.Sequential(first(), nn.RReLU(), second()),
                "no sequential": nn.ModuleList([first(), nn.ReLU(), second()]),
                "one is dense": nn.Sequential(first(), nn.ReLU(), nn.Linear(96, 96)),
                "shapes do not meet": nn.Sequential(first(), nn.ReLU(), pruned(32, 32, 16)),
            }
        )
        x = torch.randn(3, 96)
        callable_ = {
            name: module.eval()
            for name, module in model.items()
            if name not in ("no sequential", "shapes do not meet")
        }
        expected = {name: module(x) for name, module in callable_.items()}
        report = drop(model, filter_fn=lambda module, fqn: fqn != "one is dense.2")
        assert len(report.swapped) == 30
        assert all("none of its features are dropped, since" in note for note in report.notes)
        assert len(report.notes) == 6
        for module in model.modules():
            assert not isinstance(module, BSRLinear) or not module.is_narrowed
        for name, module in callable_.items():
            assert relative_error(module(x), expected[name]) <= 1e-6, name

    def test_layers_without_content_are_left_alone(self):
        model = self.mlp()
        swap_to_bsr(model, 16, min_sparsity=0.0)
        assert not drop(model.to("meta")).notes

    def test_torchvision_mlps_become_narrower(self):
        torchvision = pytest.importorskip("torchvision")
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=256
        ).eval()
        nn.init.normal_(model.heads.head.weight)
        prune_all(model, 16, 0.8)
        x = torch.randn(2, 3, 16, 16)
        expected = model(x)
        report = drop(model, fuse_activations=True)
        assert sum("features are dropped" in note for note in report.notes) == 2
        assert all(layer.mlp[0].is_narrowed for layer in model.encoder.layers)
        with torch.no_grad():
            assert relative_error(model(x), expected) <= 1e-6

    def test_a_failure_puts_everything_back(self, monkeypatch):
        real, calls, fail_at = BSRLinear.__init__, [], [0]

        def failing(self, *args, **kwargs):
            calls.append(self)
            if len(calls) == fail_at[0]:
                raise RuntimeError("out of memory")
            real(self, *args, **kwargs)

        monkeypatch.setattr(BSRLinear, "__init__", failing)
        drop(nn.Sequential(self.mlp(), self.mlp()))
        assert len(calls) > 4  # four layers, then narrower ones
        for fail_at[0] in range(1, len(calls) + 1):
            model = nn.Sequential(self.mlp(), self.mlp())
            before = snapshot(model)
            calls.clear()
            with pytest.raises(RuntimeError, match="out of memory"):
                drop(model)
            assert_unchanged(model, before)
