"""Published checkpoints: files as that project writes them, against a float64 reference of its rule."""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchao_superblock import squash
from torchao_superblock.integrations.superblock import load_superblock_checkpoint, superblock_mask
from torchao_superblock.pruning import Supermask, SupermaskSparsifier

LEVELS = (0.70, 0.80, 0.81, 0.82, 0.83, 0.84, 0.85, 0.86, 0.87, 0.88, 0.89, 0.90)
VIT_B = {"mlp.0": (3072, 768), "mlp.3": (768, 3072), "heads.head": (1000, 768)}


def reference_kept(scores: np.ndarray, level: float) -> np.ndarray:
    """The rule, in Python's floats and numpy's sort."""
    n = scores.size
    level = min(level, 1 - 1 / n)
    k = 1 + round(0.01 * float(level * 100) * (n - 1))
    clamped = np.minimum(scores.astype(np.float64), 9e9)
    return clamped >= np.sort(clamped, axis=None)[k - 1]


def reference_weight(layer: dict[str, torch.Tensor], level: float, tile: int) -> torch.Tensor:
    """float64: each element looks up the block that it lies in."""
    weight = layer["weight"].double()
    kept = reference_kept(layer["scores"].numpy(), level)
    index = np.indices(tuple(weight.shape)) // tile
    transformed = weight * layer["scale"].double() + layer["shift"].double()
    return transformed * torch.from_numpy(kept[tuple(index)])


class Attention(nn.Module):
    """A transformer layer in little, whose attention reads `out_proj.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 72), nn.GELU(), nn.Dropout(0.0), nn.Linear(72, 32))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Attention()
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.encoder(x).mean(1))


MASKED = ("encoder.mlp.0", "encoder.mlp.3", "heads.head")
ARGS = {
    "sparsity_linear": 0.8,
    "sp_linear_tile_size": 8,
    "sparsity_conv1x1": 0.0,
    "sparsity_conv": 0.0,
    "model": "vit_b_16",
    "lr": 0.003,
    "weights": None,
}


def make_state(model: nn.Module, names: tuple[str, ...], tile: int, seed: int = 0) -> dict:
    """What `state_dict()` gives once these layers are SupermaskLinear or SupermaskConv2d."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        draw = torch.randn(tensor.shape, generator=generator) * 0.2
        state[name] = draw if tensor.is_floating_point() else tensor.clone()
    if "encoder.norm.running_var" in state:
        state["encoder.norm.running_var"].abs_().add_(0.5)
    for name in names:
        grid = [math.ceil(size / tile) for size in state[f"{name}.weight"].shape]
        state[f"{name}.scores"] = torch.randn(grid, generator=generator)
        state[f"{name}.shift"] = torch.tensor([0.03])
        state[f"{name}.scale"] = torch.tensor([1.7])
    return state


def dense_reference(state: dict, names: tuple[str, ...], level: float, tile: int) -> dict:
    """float64, without what does not belong to a dense model."""
    extras = (".scores", ".shift", ".scale")
    dense = {name: value for name, value in state.items() if not name.endswith(extras)}
    for name in names:
        layer = {key: state[f"{name}.{key}"] for key in ("weight", "scores", "shift", "scale")}
        dense[f"{name}.weight"] = reference_weight(layer, level, tile)
    return {n: v.double() if v.is_floating_point() else v for n, v in dense.items()}


def save(path: Path, state: dict, args: dict[str, Any] | None = None, **more: Any) -> Path:
    content = {"model": state, "epoch": 299, **more}
    if args is not None:
        content["args"] = argparse.Namespace(**args)
    torch.save(content, path)
    return path


def output_error(model: nn.Module, dense: dict, x: torch.Tensor) -> float:
    twin = copy.deepcopy(model).double()
    for module in list(twin.modules()):
        if nn.utils.parametrize.is_parametrized(module):
            squash(twin)
            break
    twin.load_state_dict(dense)
    return (model(x).double() - twin(x.double())).abs().max().item()


X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("as_masks", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_outputs_are_those_of_the_float64_reference(tmp_path, as_masks, ema):
    model = Model().eval()
    names = (*MASKED, "encoder.self_attention.out_proj")
    state = make_state(model, names, 8)
    other = make_state(model, names, 8, seed=1)
    average = {f"module.{name}": value for name, value in other.items()}
    average = {"n_averaged": torch.tensor(7), **average}
    path = save(tmp_path / "c.pth", state, ARGS, model_ema=average, optimizer={"state": {}})
    result = load_superblock_checkpoint(model, path, ema=ema, as_masks=as_masks)
    assert result is model
    dense = dense_reference(other if ema else state, MASKED, 0.8, 8)
    assert output_error(model, dense, X) <= 1e-6
    if as_masks:
        squash(model)
    assert type(model.encoder.mlp[0]) is nn.Linear
    for name in MASKED:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, dense[f"{name}.weight"] == 0)
        assert not torch.signbit(weight[weight == 0]).any()
    # Scores of out_proj never acted, and neither did its scale.
    assert torch.equal(
        model.encoder.self_attention.out_proj.weight,
        (other if ema else state)["encoder.self_attention.out_proj.weight"],
    )


@pytest.mark.parametrize("blocksize", [16, 32, 64])
def test_vit_b_keeps_the_blocks_of_the_rule(blocksize):
    generator = torch.Generator().manual_seed(blocksize)
    for shape in VIT_B.values():
        grid = [math.ceil(size / blocksize) for size in shape]
        scores = torch.randn(grid, generator=generator)
        scores[0] = scores[1]  # ties
        for level in LEVELS:
            mask = superblock_mask(scores, level)
            assert torch.equal(mask, torch.from_numpy(reference_kept(scores.numpy(), level)))


@pytest.mark.parametrize(
    ("n", "level", "kept"), [(576, 0.70, 173), (2304, 0.90, 231), (1, 0.9, 1), (3, 1.0, 2)]
)
def test_published_counts(n, level, kept):
    # At 0.70 and 576, round(level * (n - 1)) would keep 174.
    assert int(superblock_mask(torch.randperm(n).float(), level).sum()) == kept


def test_scores_above_the_clamp_tie_and_ties_are_kept(tmp_path):
    scores = torch.arange(20.0).view(4, 5)
    scores[0] = torch.tensor([9.1e9, 1e10, torch.inf, 2e10, 9.5e9])
    assert int(superblock_mask(scores, 0.9).sum()) == 5
    assert int(superblock_mask(torch.ones(4, 5), 0.9).sum()) == 20
    model = nn.Sequential(nn.Linear(40, 32))
    state = make_state(model, ("0",), 8)
    state["0.scores"] = scores
    path = save(tmp_path / "c.pth", state, {**ARGS, "sparsity_linear": 0.9})
    load_superblock_checkpoint(model, path, as_masks=True)
    x = torch.randn(4, 40)
    assert output_error(model, dense_reference(state, ("0",), 0.9, 8), x) <= 1e-6


def test_vit_b_s_mlp_at_070_in_blocks_of_64_keeps_173(tmp_path):
    model = nn.Sequential(nn.Linear(768, 3072))
    state = {**model.state_dict(), "0.scores": torch.randn(48, 12)}
    args = {"sparsity_linear": 0.70, "sp_linear_tile_size": 64}
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, args))
    blocks = model[0].weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).abs().amax((1, 3))
    assert int((blocks > 0).sum()) == 173


def test_layers_that_are_smaller_than_a_block_have_masks_too(tmp_path):
    model = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 5))
    state = make_state(model, ("0", "1"), 8)
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, ARGS), as_masks=True)
    x = torch.randn(4, 40)
    assert output_error(model, dense_reference(state, ("0", "1"), 0.8, 8), x) <= 1e-6
    assert isinstance(model[0].parametrizations.weight[0], Supermask)
    assert type(model[1]) is nn.Linear  # a single block, which always stays


def conv_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(12, 20, 1), nn.Conv2d(20, 16, 3, padding=1), nn.Conv2d(16, 24, (1, 3))
    )


@pytest.mark.parametrize("as_masks", [False, True])
@pytest.mark.parametrize("tile", [2, 4, 8])  # smaller and larger than the kernel
def test_scores_of_convolutions_have_four_dimensions(tmp_path, tile, as_masks):
    model = conv_model()
    state = make_state(model, ("0", "1", "2"), tile)
    args = {"sparsity_conv1x1": 0.7, "sp_conv1x1_tile_size": tile}
    args |= {"sparsity_conv": 0.8, "sp_conv_tile_size": tile}
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, args), as_masks=as_masks)
    dense = dense_reference(state, ("1", "2"), 0.8, tile)
    dense["0.weight"] = dense_reference(state, ("0",), 0.7, tile)["0.weight"]
    for name in ("0.scores", "0.scale", "0.shift"):
        dense.pop(name, None)
    x = 0.1 * torch.randn(2, 12, 6, 6)
    assert output_error(model, dense, x) <= 1e-6


def test_a_1x1_convolution_without_a_level_of_its_own_is_one_of_the_others(tmp_path):
    model = nn.Sequential(nn.Conv2d(12, 20, 1))
    state = make_state(model, ("0",), 4)
    args = {"sparsity_conv1x1": 0.0, "sp_conv1x1_tile_size": 1}
    args |= {"sparsity_conv": 0.6, "sp_conv_tile_size": 4}
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, args))
    dense = dense_reference(state, ("0",), 0.6, 4)
    torch.testing.assert_close(model[0].weight.double(), dense["0.weight"])


def test_with_masks_it_trains_on_weights_and_scores(tmp_path):
    model = Model()
    path = save(tmp_path / "c.pth", make_state(model, MASKED, 8), ARGS)
    load_superblock_checkpoint(model, path, as_masks=True)
    before = copy.deepcopy(model.state_dict())
    groups = SupermaskSparsifier().param_groups(model, weight_decay=0.05)
    assert len(groups[1]["params"]) == 3
    optimizer = torch.optim.SGD(groups, lr=0.3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(X), torch.tensor([1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for name in ("original", "0.scores"):
        key = f"encoder.mlp.0.parametrizations.weight.{name}"
        assert not torch.equal(model.state_dict()[key], before[key])
    model.eval()
    out = model(X)
    squash(model)
    torch.testing.assert_close(model(X), out)
    kept = int((model.encoder.mlp[0].weight != 0).sum())
    assert kept == int((reference_kept(np.arange(36), 0.8)).sum()) * 64


def test_layers_without_scores_are_dense(tmp_path):
    model = Model().eval()
    state = make_state(model, MASKED[:1], 8)
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, ARGS))
    assert (model.encoder.mlp[3].weight != 0).all()
    assert output_error(model, dense_reference(state, MASKED[:1], 0.8, 8), X) <= 1e-6


def test_an_argument_wins_over_what_the_file_recorded(tmp_path):
    model = Model().eval()
    state = make_state(model, MASKED, 8)
    path = save(tmp_path / "c.pth", state, {**ARGS, "sp_linear_tile_size": 16})
    load_superblock_checkpoint(model, path, 0.5, 8)
    assert output_error(model, dense_reference(state, MASKED, 0.5, 8), X) <= 1e-6


def test_torchaos_linears_and_plain_state_dicts(tmp_path):
    supermask = pytest.importorskip("torchao.sparsity.supermask").SupermaskLinear
    model = Model().eval()
    theirs = copy.deepcopy(model)
    theirs.encoder.mlp[0] = supermask.from_linear(theirs.encoder.mlp[0], 0.75, 8)
    theirs.heads.head = supermask.from_linear(theirs.heads.head, 0.75, 8)
    torch.save(theirs.state_dict(), tmp_path / "c.pth")
    load_superblock_checkpoint(model, tmp_path / "c.pth", 0.75, 8)
    torch.testing.assert_close(model(X), theirs(X), rtol=0, atol=1e-6)


def bsr_state(model: nn.Module) -> dict:
    state = make_state(model, MASKED, 8)
    dense = dense_reference(state, MASKED, 0.8, 8)
    weight = dense["encoder.mlp.0.weight"].float()
    projection = dense["encoder.self_attention.in_proj_weight"].float()
    projection[:48] = 0
    # After sparsify_offline the scores stay beside a weight that is folded already.
    state["encoder.mlp.0.weight"] = weight.to_sparse_bsr((8, 8))
    state["encoder.self_attention.in_proj_weight"] = projection.to_sparse_bsr((16, 8))
    return state


@pytest.mark.parametrize("as_masks", [False, True])
def test_stored_blocks_are_the_mask(tmp_path, as_masks):
    model = Model().eval()
    dense = dense_reference(make_state(model, MASKED, 8), MASKED, 0.8, 8)
    dense["encoder.self_attention.in_proj_weight"][:48] = 0
    path = save(tmp_path / "c.pth", bsr_state(model), ARGS)
    load_superblock_checkpoint(model, path, as_masks=as_masks)
    assert output_error(model, dense, X) <= 1e-6
    assert nn.utils.parametrize.is_parametrized(model.encoder.self_attention) == as_masks


def test_stored_blocks_contradict_arguments(tmp_path):
    model = Model()
    state = {k: v for k, v in bsr_state(model).items() if not k.startswith("encoder.mlp.0.s")}
    state["encoder.self_attention.in_proj_weight"] = torch.zeros(96, 32)
    for name in MASKED[1:]:
        for key in ("scores", "shift", "scale"):
            del state[f"{name}.{key}"]
    path = save(tmp_path / "c.pth", state)
    with pytest.raises(
        ValueError, match=r"blocksize=16.*mlp\.0\.weight' stores blocks of \(8, 8\)"
    ):
        load_superblock_checkpoint(model, path, blocksize=16)
    with pytest.raises(ValueError, match=r"sparsity_level=0.5 keeps 18 blocks.*stores 8 of 36"):
        load_superblock_checkpoint(model, path, 0.5)
    load_superblock_checkpoint(model, path, 0.8, 8)


# ------------------------------------------------------------------------------------------------
# What cannot be loaded leaves the model as it was
# ------------------------------------------------------------------------------------------------


def refused(
    model: nn.Module, path: Path, match: str, *args: Any, kind=ValueError, **kwargs
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=match):
        load_superblock_checkpoint(model, path, *args, **kwargs)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def files(tmp_path):
    model = Model()
    state = make_state(model, MASKED, 8)
    return model, state, lambda args=ARGS, **more: save(tmp_path / "c.pth", state, args, **more)


def test_a_block_size_that_the_scores_contradict_is_named_with_them(files):
    model, _, write = files
    match = (
        r"'encoder\.mlp\.0'.*blocksize=16 cuts.*\(72, 32\) into \(5, 2\).*\(9, 4\).*tile_size is 8"
    )
    refused(model, write(), match, blocksize=16)
    match = r"args\.sp_linear_tile_size=16 cuts.*\(5, 2\) blocks, and its scores are \(9, 4\)"
    refused(model, write({**ARGS, "sp_linear_tile_size": 16}), match)


def test_an_unknown_level_or_block_size_is_asked_for(files):
    model, _, write = files
    for args in (None, {}, {**ARGS, "sparsity_linear": 0.0}):
        refused(model, write(args), r"mlp\.0'.*args\.sparsity_linear is .*sparsity_level=")
    refused(model, write({"sparsity_linear": 0.8}), "sp_linear_tile_size is None: say blocksize=")
    refused(model, write(), "level=1.5 must be in", 1.5)
    refused(model, write(), "must be an int", None, 8.0, kind=TypeError)
    refused(model, write(), "must be at least 1", None, 0)


def test_another_architecture_is_named(files):
    path = files[-1]()
    other = Model()
    other.heads.head = nn.Linear(32, 7)
    refused(other, path, r"'heads\.head\.weight' has shape \(10, 32\) in the file and \(7, 32\)")
    other = Model()
    other.encoder.extra = nn.Linear(4, 4)
    refused(other, path, r"it has no 'encoder\.extra\.weight'.*0 shapes differ, 2 tensors")
    other = Model()
    del other.encoder.mlp[3]
    refused(other, path, r"the model has no 'encoder\.mlp\.3\.")


def test_a_truncated_file_is_no_checkpoint(files):
    model, _, write = files
    path = write()
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        refused(model, path, r"c\.pth: cannot be read as a checkpoint")
    refused(model, path.with_name("none.pth"), "none.pth", kind=FileNotFoundError)


class Anything:
    """No tensor."""


def test_other_objects_are_not_unpickled(files):
    model, _, write = files
    refused(model, write(extra=Anything()), "cannot be read as a checkpoint of tensors")
    path = write()
    torch.save([1, 2], path)
    refused(model, path, "holds a list")
    torch.save({"model": {"a": 3}}, path)
    refused(model, path, "'a' is a int, not a tensor")
    torch.save({"weights": {}}, path)
    refused(model, path, r"has no 'model'; it has \['weights'\]")


def test_a_file_without_an_average_says_so(files):
    model, _, write = files
    refused(model, write(), "has no 'model_ema'", ema=True)


def test_nan_scores_mean_nothing(files):
    model, state, write = files
    state["encoder.mlp.3.scores"][0, 0] = torch.nan
    refused(model, write(), r"'encoder\.mlp\.3': the scores are NaN in places")


def test_a_prepared_model_and_one_without_values_are_refused(files):
    model, _, write = files
    path = write()
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        load_superblock_checkpoint(copy.deepcopy(model).to("meta"), path)
    SupermaskSparsifier(0.5, 8).prepare(model)
    refused(model, path, "'encoder.*' is parametrized", kind=RuntimeError)


def test_what_cannot_be_a_mask_changes_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 1, groups=2))
    path = save(tmp_path / "c.pth", make_state(model, ("0",), 4))
    refused(model, path, "as_masks=True.*groups", 0.5, 4, kind=RuntimeError, as_masks=True)
    load_superblock_checkpoint(model, path, 0.5, 4)
    model = nn.Sequential(nn.Linear(8, 8))
    path = save(tmp_path / "c.pth", make_state(model, (), 4))
    refused(model, path, "nothing can be a mask", as_masks=True)


def test_projections_that_swins_attention_reads_itself_were_never_masked(tmp_path):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    model = nn.Sequential()
    model.add_module("attn", swin.ShiftedWindowAttention(16, [2, 2], [0, 0], 2))
    state = make_state(model, ("attn.qkv", "attn.proj"), 4)
    load_superblock_checkpoint(model, save(tmp_path / "c.pth", state, ARGS))
    assert torch.equal(model.attn.qkv.weight, state["attn.qkv.weight"])
