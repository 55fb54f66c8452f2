"""1x1 convolutions in blocks: numbers, memory formats, the swap and back, files, masks, and what is refused."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bsr.common import CountCalls, assert_unchanged, snapshot
from tests.reference import block_mask, expand_mask, relative_error
from torchao_superblock import (
    MagnitudeSparsifier,
    SupermaskSparsifier,
    load_bsr,
    save_bsr,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.bsr import BSRConv1x1, BSRLinear
from torchao_superblock.bsr.format import gather_blocks
from torchao_superblock.bsr.layers import twin_of

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAST = torch.channels_last


def prune(conv: nn.Conv2d, blocksize: int = 8, sparsity: float = 0.75) -> nn.Conv2d:
    """Zero random blocks of a convolution in place, as a squashed mask would leave it."""
    N, K = conv.weight.flatten(1).shape
    mask = expand_mask(block_mask(N // blocksize, K // blocksize, sparsity), (blocksize, blocksize))
    with torch.no_grad():
        conv.weight.mul_(mask.view_as(conv.weight))
    return conv


def pruned(K: int = 32, N: int = 48, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return prune(nn.Conv2d(K, N, 1, **options))


def same_format(y: torch.Tensor, other: torch.Tensor) -> bool:
    """Both in the same order in memory; of a single pixel there is only one."""
    return all(
        y.is_contiguous(memory_format=order) == other.is_contiguous(memory_format=order)
        for order in FORMATS.values()
    )


class Model(nn.Module):
    """A bottleneck of a ResNet, in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = prune(nn.Conv2d(32, 16, 1, bias=False))
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.conv3 = prune(nn.Conv2d(16, 64, 1))
        self.short = prune(nn.Conv2d(32, 64, 1, stride=2))
        self.to(memory_format=LAST)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        return self.conv3(y.relu()) + self.short(x)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
def test_the_same_numbers_gradients_and_memory_format(stride, weight_format):
    conv = pruned(stride=stride).to(memory_format=FORMATS[weight_format])
    layer, exact = BSRConv1x1.from_dense(conv, 8), copy.deepcopy(conv).double()
    for shape, memory_format in itertools.product([(2, 32, 7, 5), (1, 32, 1, 1)], FORMATS.values()):
        x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
        x64 = x.detach().double().requires_grad_()
        y, y64 = layer(x), exact(x64)
        dense = conv(x)
        assert relative_error(y, y64) < 1e-5
        assert same_format(y, dense)
        grad = torch.randn_like(y)
        wanted = torch.autograd.grad(y64, [x64, exact.weight, exact.bias], grad.double())
        found = torch.autograd.grad(y, [x, layer.values, layer.bias], grad)
        blocks = gather_blocks(
            wanted[1].flatten(1), layer.crow_indices, layer.col_indices, layer.blocksize
        )
        assert relative_error(found[0], wanted[0]) < 1e-5
        assert relative_error(found[1], blocks) < 1e-5
        assert relative_error(found[2], wanted[2]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype):
    conv = pruned()
    x = torch.randn(2, 32, 5, 5)
    limit = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    layer = BSRConv1x1.from_dense(conv.to(dtype), 8)
    assert layer(x.to(dtype)).dtype == dtype
    exact = copy.deepcopy(conv).double()
    assert relative_error(layer(x.to(dtype)), exact(x.to(dtype).double())) < limit
    if dtype != torch.float64:
        layer = BSRConv1x1.from_dense(conv.float(), 8)
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == dtype


def test_slices_of_images_and_images_without_a_batch():
    conv = pruned()
    layer = BSRConv1x1.from_dense(conv, 8)
    wide = torch.randn(3, 64, 9, 9).to(memory_format=LAST)
    for x in (wide[:, :32], wide[:, 32:, 1:, 2:], torch.randn(32, 4, 6), torch.randn(0, 32, 3, 3)):
        y, dense = layer(x), conv(x)
        torch.testing.assert_close(y, dense)
        assert 0 in x.shape or x.dim() == 3 or same_format(y, dense)
    torch.testing.assert_close(layer(wide[::2, :32, ::3, ::2]), conv(wide[::2, :32, ::3, ::2]))


class Operands(TorchDispatchMode):
    """Where x of each call of the op lies, and how many tensors were copied."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torchao_superblock.bsr_linear.default:
            self.places.append(args[0].data_ptr())
        self.copies += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def test_channels_last_images_are_not_copied():
    layer = BSRConv1x1.from_dense(pruned(), 8)
    x = torch.randn(4, 32, 6, 5)
    last = x.to(memory_format=LAST)
    with torch.no_grad(), Operands() as seen:
        layer(last)
    assert seen.places == [last.data_ptr()] and seen.copies == 0
    with torch.no_grad(), Operands() as seen:  # the count sees copies where there are some
        layer(x)
    assert seen.copies


def test_it_looks_like_a_convolution():
    conv = pruned(stride=2)
    layer = BSRConv1x1.from_dense(conv, 8)
    assert repr(layer) == (
        "BSRConv1x1(32, 48, stride=(2, 2), bias=True, blocksize=(8, 8), sparsity=0.7500)"
    )
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
    assert all(getattr(layer, name) == getattr(conv, name) for name in (*names, "padding_mode"))
    assert layer.bias is conv.bias
    assert torch.equal(layer.to_dense(), conv.weight)
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]


def test_copies_pickles_and_state_dicts():
    layer = BSRConv1x1.from_dense(pruned(stride=2), 8)
    x = torch.randn(2, 32, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    torch.manual_seed(1)
    other = BSRConv1x1.from_dense(prune(nn.Conv2d(32, 48, 1, stride=2), sparsity=0.5), 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="holds a dense weight"):
        layer.load_state_dict(pruned(stride=2).state_dict())
    assert_unchanged(layer, before)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_compiled_without_a_break(memory_format):
    model = Model().eval()
    swap_to_bsr(model, 8, min_sparsity=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 32, 6, 6).to(memory_format=memory_format)
    for train in (False, True):
        model.train(train)
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        assert y.stride() == model(x).stride()


def test_exported():
    model, x = Model().eval(), torch.randn(2, 32, 6, 6)
    swap_to_bsr(model, 8, min_sparsity=0.5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.gpu
def test_on_a_gpu():
    conv = prune(nn.Conv2d(64, 128, 1, stride=2), 16).to("cuda", torch.bfloat16)
    layer, exact = BSRConv1x1.from_dense(conv, 16), copy.deepcopy(conv).double()
    for memory_format in FORMATS.values():
        x = torch.randn(4, 64, 9, 9, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=memory_format).requires_grad_()
        y = layer(x)
        assert relative_error(y, exact(x.double())) < 1e-2 and same_format(y, conv(x))
        y.sum().backward()
        assert x.grad.isfinite().all() and layer.values.grad.isfinite().all()
    (entry,) = swap_to_bsr(nn.Sequential(conv), 16).skipped
    assert entry.code == "slower_than_dense" and "nobody has measured" in entry.reason
    assert swap_to_bsr(nn.Sequential(conv), 16, min_sparsity=0.5).swapped


def test_there_and_back():
    model, x = Model().train(), torch.randn(2, 32, 6, 6)
    dense = copy.deepcopy(model)
    bias, weight = model.conv3.bias, model.conv3.weight.detach().clone()
    model.short.weight.requires_grad_(False)
    seen = []
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    report = swap_to_bsr(model, 8, min_sparsity=0.5)
    assert [entry.fqn for entry in report.swapped] == ["conv1", "conv3", "short"]
    assert report.swapped[0].shape == (16, 32)
    with CountCalls() as calls:
        y = model(x)
    assert calls.count == 3 and seen
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert model.conv3.values.grad is not None and model.short.values.grad is None
    assert swap_to_dense(model) == ["conv1", "conv3", "short"]
    assert type(model.conv3) is nn.Conv2d and model.conv3.bias is bias and model.conv3.training
    assert torch.equal(model.conv3.weight, weight)
    assert model.conv3.weight.stride() == weight.stride()
    assert model.short.stride == (2, 2) and not model.short.weight.requires_grad
    torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_activation_behind_it_is_fused_and_unfused():
    model = nn.Sequential(pruned(), nn.ReLU()).eval()
    x = torch.randn(2, 32, 4, 4)
    y = model(x)
    swap_to_bsr(model, 8, min_sparsity=0.5, fuse_activations=True)
    assert model[0].activation == "relu"
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
    swap_to_dense(model)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is nn.ReLU


def test_features_between_a_convolution_and_a_linear_layer_are_not_its_channels():
    # The linear layer takes the last dimension, pixels; that it has as many as there are channels means nothing.
    linear = nn.Linear(48, 16)
    with torch.no_grad():
        linear.weight[:, 8:] = 0
    model = nn.Sequential(pruned(), nn.ReLU(), linear).eval()
    x = torch.randn(2, 32, 3, 48)
    y = model(x)
    swap_to_bsr(model, 8, min_sparsity=0.5, drop_dead_features=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


def test_files(tmp_path):
    model, x = Model().eval(), torch.randn(2, 32, 6, 6)
    swap_to_bsr(model, 8, min_sparsity=0.5)
    save_bsr(model, tmp_path / "m.safetensors")
    y = model(x)
    with torch.device("meta"):
        empty = Model().eval()
    swapped = Model().eval()
    swap_to_bsr(swapped, 8, min_sparsity=0.5)
    for other in (Model().eval(), swapped, empty):
        load_bsr(other, tmp_path / "m.safetensors")
        assert type(other.short) is BSRConv1x1 and other.short.stride == (2, 2)
        assert torch.equal(other(x), y)
    for change, words in (
        (lambda m: setattr(m, "conv1", nn.Linear(32, 16, bias=False)), "plain nn.Conv2d or a BSRC"),
        (lambda m: setattr(m, "conv1", nn.Conv2d(32, 16, 3, bias=False)), "but a Conv2d in the m"),
        (lambda m: setattr(m, "conv1", nn.Conv2d(16, 16, 1, bias=False)), r"but \(16, 16\) in"),
    ):
        other = Model()
        change(other)
        before = snapshot(other)
        with pytest.raises(ValueError, match=f"'conv1'.*{words}"):
            load_bsr(other, tmp_path / "m.safetensors")
        assert_unchanged(other, before)
    linear = nn.ModuleDict({"conv1": nn.Linear(32, 16)})
    with torch.no_grad():
        linear.conv1.weight[8:] = 0
    swap_to_bsr(linear, 8, min_sparsity=0.5)
    save_bsr(linear, tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="'conv1'.*but a Conv2d.*plain nn.Linear or a BSRLinear"):
        load_bsr(nn.ModuleDict({"conv1": nn.Conv2d(32, 16, 1)}), tmp_path / "linear.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# What is swapped, and what is not
# ---------------------------------------------------------------------------------------------------------------------


def test_a_convolution_is_swapped_where_it_gets_faster():
    contiguous = nn.Sequential(pruned())
    (entry,) = swap_to_bsr(contiguous, 8).skipped
    assert entry.code == "slower_than_dense" and "memory_format=torch.channels_last" in entry.reason
    assert swap_to_bsr(contiguous, 8, min_sparsity=0.5).swapped
    few = nn.Sequential(prune(nn.Conv2d(64, 64, 1), 32, 0.25)).to(memory_format=LAST)
    (entry,) = swap_to_bsr(few, 32).skipped
    assert "25.0% of its blocks are zero" in entry.reason
    many = nn.Sequential(prune(nn.Conv2d(640, 640, 1), 32, 0.96)).to(memory_format=LAST)
    assert swap_to_bsr(many, 32).swapped


def test_measured_convolutions():
    report = swap_to_bsr(Model().eval(), 8, measure=torch.randn(2, 32, 6, 6))
    entries = [*report.swapped, *(entry for entry in report.skipped if entry.dense_ms)]
    assert sorted(entry.fqn for entry in entries) == ["conv1", "conv3", "short"]
    assert all(entry.bsr_ms > 0 for entry in entries)


def other_convolutions() -> dict[str, tuple[nn.Module, str, str]]:
    class Mine(nn.Conv2d):
        pass

    class Quantized(torch.Tensor):
        pass

    quantized = pruned()
    quantized.weight = nn.Parameter(quantized.weight.detach().as_subclass(Quantized))
    own_forward = pruned()
    own_forward.forward = lambda x: x
    odd = pruned()
    odd.weight = nn.Parameter(torch.zeros(48, 32))
    return {
        "grouped": (nn.Conv2d(32, 48, 1, groups=2), "no_twin", "groups=2"),
        "padded": (nn.Conv2d(32, 48, 1, padding=1), "no_twin", r"padding=\(1, 1\)"),
        "dilated": (nn.Conv2d(32, 48, 1, dilation=2), "no_twin", r"dilation=\(2, 2\)"),
        "wide": (nn.Conv2d(32, 48, (1, 3)), "no_twin", r"kernel_size=\(1, 3\)"),
        "transposed": (nn.ConvTranspose2d(32, 48, 1), "no_twin", "ConvTranspose2d has no"),
        "one dimension": (nn.Conv1d(32, 48, 1), "no_twin", "Conv1d has no"),
        "subclass": (Mine(32, 48, 1), "no_twin", "Mine has no"),
        "parametrized": (
            nn.utils.parametrizations.weight_norm(pruned()),
            "parametrized",
            "another parametrization",
        ),
        "pruned by torch": (
            torch_prune.random_unstructured(pruned(), "weight", 0.5),
            "parametrized",
            "not a Parameter",
        ),
        "lazy": (nn.LazyConv2d(48, 1), "uninitialized", "no shape yet"),
        "quantized": (quantized, "weight_subclass", "Quantized, not a plain tensor"),
        "patched": (own_forward, "customised", "a forward of its own"),
        "odd": (odd, "odd_shape", r"\(48, 32\) where its features say \(48, 32, 1, 1\)"),
        "meta": (nn.Conv2d(32, 48, 1, device="meta"), "meta_device", "no zeros to look at"),
        "small": (nn.Conv2d(3, 48, 1), "shape_not_multiple", r"\(48, 3\) is not a multiple"),
    }


@pytest.mark.parametrize("case", other_convolutions())
def test_others_are_named_and_left_alone(case):
    conv, code, words = other_convolutions()[case]
    model = nn.ModuleDict({"conv": conv})
    report = swap_to_bsr(model, 8, min_sparsity=0.0)
    entry = next(entry for entry in report.skipped if entry.fqn.startswith("conv"))
    assert entry.code == code and not report.swapped
    assert re.search(words, entry.reason)
    assert model["conv"] is conv
    if code != "shape_not_multiple":
        with pytest.raises((TypeError, ValueError), match=words if code != "no_twin" else None):
            BSRConv1x1.from_dense(conv, 8)


def test_shared_weights_and_shared_modules():
    model = nn.ModuleDict({"one": pruned(), "two": pruned()})
    model["two"].weight = model["one"].weight
    report = swap_to_bsr(model, 8, min_sparsity=0.5)
    assert [entry.code for entry in report.skipped] == ["tied_weight"] * 2
    conv = pruned()
    model = nn.ModuleDict({"one": conv, "two": conv})
    swap_to_bsr(model, 8, min_sparsity=0.5)
    assert type(model["one"]) is BSRConv1x1 and model["two"] is model["one"]


def test_a_model_that_is_one_convolution_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"itself an nn.Conv2d.*BSRConv1x1.from_dense"):
        swap_to_bsr(pruned())
    assert len(swap_to_bsr(nn.Conv2d(8, 8, 3)).skipped) == 1  # there is nothing to replace
    save_bsr(nn.Sequential(pruned()), tmp_path / "m")
    with pytest.raises(ValueError, match="itself a linear layer"):
        load_bsr(pruned(), tmp_path / "m")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(2, 31, 4, 4), r"\(images, 32, height, width\).*\(2, 31, 4, 4\)"),
        (torch.randn(32, 4), r".*\(32, 4\)"),
        (torch.randn(1, 2, 32, 4, 4), r".*\(1, 2, 32, 4, 4\)"),
    ],
)
def test_bad_images(x, words):
    with pytest.raises(ValueError, match=f"BSRConv1x1: x must have shape {words}"):
        BSRConv1x1.from_dense(pruned(), 8)(x)


def test_bad_arguments():
    layer = BSRConv1x1.from_dense(pruned(), 8)
    parts = 32, 48, 8, layer.crow_indices, layer.col_indices, layer.values
    for stride in ((0, 1), (1,), (1.0, 1)):
        with pytest.raises(ValueError, match="stride must be a pair of positive ints"):
            BSRConv1x1(*parts, stride=stride)
    for other in (nn.Linear(32, 48), nn.Conv1d(32, 48, 1)):
        with pytest.raises(TypeError, match=f"expected an nn.Conv2d, got {type(other).__name__}"):
            BSRConv1x1.from_dense(other, 8)
    assert twin_of(nn.Conv2d).bsr is BSRConv1x1


# ---------------------------------------------------------------------------------------------------------------------
# From the mask to the blocks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_summary_says_which_convolutions_can_be_swapped():
    model = nn.Sequential(
        nn.Conv2d(32, 64, 1, stride=2),
        nn.Conv2d(64, 64, 1, padding=1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1, groups=1, padding="same"),
        nn.Conv2d(64, 36, 1),
    )
    sparsifier = MagnitudeSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "*", "types": (nn.Conv2d,)}])
    obstacles = {group.fqn: group.swap_obstacle for group in sparsifier.summary().groups}
    assert obstacles["0.weight"] is None and obstacles["3.weight"] is None
    assert "padding=(1, 1)" in obstacles["1.weight"]
    assert "kernel_size=(3, 3)" in obstacles["2.weight"]
    assert obstacles["4.weight"] is None
    assert "(36, 64) is not a multiple" in sparsifier.summary().groups[-1].swap_needs_pad


def test_an_optimizer_goes_on_with_the_blocks():
    def train(swap: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1, stride=2))
        model.to(memory_format=LAST)
        sparsifier = MagnitudeSparsifier(0.5, 8)
        sparsifier.prepare(model, [{"tensor_fqn": "*", "types": (nn.Conv2d,)}])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for i in range(8):
            x = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(i))
            if i == 3:
                sparsifier.freeze()
            if i == 4 and swap:
                sparsifier.squash_mask()
                report = swap_to_bsr(model, 8, min_sparsity=0.0, optimizer=optimizer)
                assert len(report.swapped) == 2
                assert optimizer.state[model[0].values]["exp_avg"].shape == model[0].values.shape
            optimizer.zero_grad()
            loss = (model(x) - x[:, :8, ::2, ::2]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(True) == pytest.approx(train(False), rel=1e-5)


def test_a_resnet_50_from_masks_to_blocks():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet50(num_classes=8, width_per_group=64).to(memory_format=LAST)
    sparsifier = SupermaskSparsifier(0.9, 32)
    sparsifier.prepare(model, [{"tensor_fqn": "layer*", "types": (nn.Conv2d,)}])
    groups = sparsifier.summary().groups
    usable = [group.fqn for group in groups if group.swap_obstacle is None]
    assert len(groups) == 52 and len(usable) == 36
    optimizer = torch.optim.SGD(sparsifier.param_groups(model), lr=1e-3)
    x = torch.randn(2, 3, 32, 32).to(memory_format=LAST)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([1, 5])).backward()
        optimizer.step()
        sparsifier.step()
    sparsifier.squash_mask()
    model.eval()
    with torch.no_grad():
        y = model(x)
        report = swap_to_bsr(model, 32)
        assert len(report.swapped) == 36
        assert sum(type(module) is BSRConv1x1 for module in model.modules()) == 36
        with CountCalls() as calls:
            assert relative_error(model(x), y) < 1e-5
        assert calls.count == 36
    assert not any(type(module) is BSRLinear for module in model.modules())
