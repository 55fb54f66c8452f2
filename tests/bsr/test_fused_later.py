"""What is put on the pieces of a fused form after the swap: all is as on the dense model, or refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from tests.bsr.common import prune_all
from torchao_superblock import swap_to_bsr


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


PIECES = [(Mlp, "fc1"), (Mlp, "act"), (Mlp, "fc2")]
PIECES += [(Gated, name) for name in ("gate", "up", "act", "down")]
LAYERS = [(cls, name) for cls, name in PIECES if name != "act"] + [(Attention, "attn.out_proj")]
PIECES += [(Attention, "attn"), (Attention, "attn.out_proj")]
X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def pair(cls):
    """The dense model, and the swapped one with what can be fused in it."""
    torch.manual_seed(0)
    dense = prune_all(cls(), 8).eval()
    with torch.no_grad():
        if cls is Attention:
            dense.attn.in_proj_weight[:, :16] = 0
    swapped = copy.deepcopy(dense)
    report = swap_to_bsr(swapped, 8, min_sparsity=0.0, fuse_activations=True)
    assert not report.skipped and bool(report.notes) == (cls is not Attention)
    return dense, swapped


def check(dense, swapped):
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(swapped(X.to(dtype(dense))), dense(X.to(dtype(dense))))


def dtype(model):
    return next(model.parameters()).dtype


def twice(value):
    return 2 * value + 1 if isinstance(value, torch.Tensor) else value


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda _m, _args, y: twice(y)),
    "pre": lambda m: m.register_forward_pre_hook(lambda _m, args: (twice(args[0]), *args[1:])),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(
        lambda _m, args, kwargs: ((twice(args[0]), *args[1:]), kwargs), with_kwargs=True
    ),
}


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("cls", "piece"), PIECES)
def test_hooks(cls, piece, kind, copied):
    dense, swapped = pair(cls)
    if copied is not None:
        swapped = copied(swapped)
    for model in (dense, swapped):
        HOOKS[kind](model.get_submodule(piece))
    check(dense, swapped)


@pytest.mark.parametrize(
    "method", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize(("cls", "piece"), PIECES)
def test_backward_hooks_see_the_gradients_of_the_dense_model(cls, piece, method):
    seen = []
    for model in pair(cls):
        gradients = []
        hook = lambda _module, *grads, to=gradients: to.extend(
            g.clone() for grad in grads for g in grad if g is not None
        )
        getattr(model.get_submodule(piece), method)(hook)
        model(X.clone().requires_grad_()).square().sum().backward()
        seen.append(gradients)
    torch.testing.assert_close(*seen)


class Double(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize(("cls", "piece"), LAYERS)
def test_parametrized_and_pruned_tensors(cls, piece):
    models = pair(cls)
    for model in models:
        parametrize.register_parametrization(model.get_submodule(piece), "bias", Double())
    check(*models)
    models = pair(cls)
    for model, name in zip(models, ("weight", "values"), strict=True):
        layer = model.get_submodule(piece)
        torch_prune.custom_from_mask(layer, name, torch.zeros_like(getattr(layer, name)))
    check(*models)


@pytest.mark.parametrize(("cls", "piece"), LAYERS)
def test_a_frozen_layer(cls, piece):
    gradients = []
    for model in pair(cls):
        model.get_submodule(piece).requires_grad_(False)
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        biases = {n: p.grad for n, p in model.named_parameters() if n.endswith("bias")}
        assert biases[f"{piece}.bias"] is None and sum(g is None for g in biases.values()) == 1
        gradients.append((x.grad, {n: g for n, g in biases.items() if g is not None}))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cls", [Mlp, Gated, Attention])
def test_another_dtype(cls):
    dense, swapped = pair(cls)
    check(dense.double(), swapped.double())


@pytest.mark.parametrize(("cls", "piece"), LAYERS)
def test_another_layer_in_its_place(cls, piece):
    models = pair(cls)
    other = copy.deepcopy(models[0].get_submodule(piece))
    nn.init.normal_(other.weight)
    for model in models:
        owner, _, name = piece.rpartition(".")
        setattr(model.get_submodule(owner), name, other)
    check(*models)


class Adapter(nn.Module):
    def __init__(self, base_layer, delta):
        super().__init__()
        self.base_layer, self.delta = base_layer, delta

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)


@pytest.mark.parametrize(("cls", "piece"), [one for one in LAYERS if one[0] is not Attention])
def test_an_adapter_counts_or_is_refused(cls, piece):
    dense, swapped = pair(cls)
    layer = dense.get_submodule(piece)
    delta = nn.Linear(layer.in_features, layer.out_features)
    for model in (dense, swapped):
        setattr(model, piece, Adapter(model.get_submodule(piece), delta))
    if piece == "fc1":
        with pytest.raises(RuntimeError, match="'fc1' applies gelu itself, and a Adapter"):
            swapped(X)
    else:
        check(dense, swapped)
