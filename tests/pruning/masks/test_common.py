"""What every kind of mask owes, whatever chooses its blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from tests.pruning.masks.kinds import KINDS
from torchao_superblock.pruning import BlockMask, squash

CONFIG = [{"tensor_fqn": "*"}]
pytestmark = pytest.mark.parametrize("kind", list(KINDS))


class Model(nn.Module):
    """Linears, attention and a ragged shape: 20 x 44 in blocks of 8 has smaller blocks at both edges."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.wide = nn.Linear(32, 44)
        self.ragged = nn.Linear(44, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.ragged(nn.functional.gelu(self.wide(x)))


def make(kind: str, level: float = 0.75, blocksize: Any = 8) -> tuple[Model, Any, Any]:
    torch.manual_seed(0)
    model = Model()
    sparsifier = KINDS[kind](level, blocksize)
    sparsifier.prepare(model, CONFIG)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.1), lr=1e-2)
    return model, sparsifier, optimizer


def batch(i: int) -> Tensor:
    return torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(i))


def train(
    model: nn.Module,
    sparsifier: Any,
    optimizer: Any,
    steps: range,
    run: Callable[..., Tensor] | None = None,
) -> None:
    for i in steps:
        optimizer.zero_grad()
        (model if run is None else run)(batch(i)).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def masks(model: nn.Module) -> list[BlockMask]:
    return [module for module in model.modules() if isinstance(module, BlockMask)]


def kept(mask: BlockMask | Tensor, level: float) -> int:
    blocks = mask if isinstance(mask, Tensor) else mask.held_mask
    return max(1, round(blocks.numel() * (1 - level)))


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", [0.0, 0.75, 0.97])
@pytest.mark.parametrize("blocksize", [8, (4, 16)])
def test_squash_leaves_the_last_forward_and_exactly_the_kept_blocks(
    kind: str, level: float, blocksize: Any
) -> None:
    model, sparsifier, optimizer = make(kind, level, blocksize)
    train(model, sparsifier, optimizer, range(3))
    found = {fqn: entry["mask"] for fqn, entry in sparsifier.state.items()}
    sizes = {
        group["tensor_fqn"]: group["module"].parametrizations[group["tensor_name"]][0].blocksize
        for group in sparsifier.groups
    }
    assert len(found) == 6
    assert all(int(mask.sum()) == kept(mask, level) for mask in found.values())
    ids = {id(parameter) for parameter in model.parameters()}
    model.eval()
    out = model(batch(9)).detach()
    sparsifier.squash_mask()
    torch.testing.assert_close(model(batch(9)), out)
    assert {id(parameter) for parameter in model.parameters()} <= ids
    assert type(model.up) is nn.Linear and sparsifier.groups == []
    for fqn, mask in found.items():
        weight, (r, c) = model.get_parameter(fqn), sizes[fqn]
        full = mask.repeat_interleave(r, 0).repeat_interleave(c, 1)
        full = full[: weight.shape[0], : weight.shape[1]]
        assert not weight[~full].any() and weight[full].any()
        assert not torch.signbit(weight[~full]).any()


def test_the_state_dict_alone_reproduces_the_output(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(3))
    sparsifier.groups[0]["sparsity_level"] = 0.5
    sparsifier.step()
    torch.manual_seed(1)
    other = Model()
    KINDS[kind](0.75, 8).prepare(other, CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch(9)), model(batch(9)))


def test_a_resumed_run_continues_bit_for_bit(kind: str) -> None:
    straight = make(kind)
    train(*straight, range(6))
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(3))
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, sparsifier)])
    model, sparsifier, optimizer = make(kind, 0.5)
    for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
        part.load_state_dict(state)
    train(model, sparsifier, optimizer, range(3, 6))
    assert_equal_states(model, straight[0])
    assert sparsifier.state_dict()["groups"] == straight[1].state_dict()["groups"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_independent(kind: str, way: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(2))
    out = model(batch(9))
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(batch(9)), out)
    train(model, sparsifier, optimizer, range(2, 4))
    assert torch.equal(copied(batch(9)), out) and not torch.equal(model(batch(9)), out)
    squash(copied)
    torch.testing.assert_close(copied(batch(9)), out)
    assert len(masks(model)) == 6


def test_levels_take_effect_at_the_next_step_and_are_exact(kind: str) -> None:
    model, sparsifier, optimizer = make(kind, 0.0)
    for level in (0.3, 0.55, 0.8, 0.9):
        for group in sparsifier.groups:
            group["sparsity_level"] = level
        before = [mask.block_mask() for mask in masks(model)]
        assert all(
            torch.equal(a, mask.block_mask()) for a, mask in zip(before, masks(model), strict=True)
        )
        train(model, sparsifier, optimizer, range(1))
        assert all(int(mask.block_mask().sum()) == kept(mask, level) for mask in masks(model))
    assert sparsifier.summary().groups[0].kept == kept(masks(model)[0], 0.9)


def test_frozen_masks_stay_and_their_scores_get_zero_gradients(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(2))
    sparsifier.freeze()
    held = [mask.block_mask() for mask in masks(model)]
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.5
    train(model, sparsifier, optimizer, range(2, 6))
    assert all(
        torch.equal(a, mask.block_mask()) for a, mask in zip(held, masks(model), strict=True)
    )
    for mask in masks(model):
        for parameter in mask.parameters():
            assert parameter.grad is not None and not parameter.grad.any()
    assert all(entry.frozen for entry in sparsifier.summary().groups)
    sparsifier.unfreeze()
    sparsifier.step()
    assert all(int(mask.block_mask().sum()) == kept(mask, 0.5) for mask in masks(model))


def test_no_step_while_updates_are_off(kind: str) -> None:
    model, sparsifier, _ = make(kind)
    sparsifier.enable_mask_update = False
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.1
    before = copy.deepcopy(model)
    sparsifier.step()
    assert_equal_states(model, before)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to", "double"])
def test_casting_the_model_keeps_scores_and_mask(kind: str, convert: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(2))
    before = [mask.block_mask() for mask in masks(model)]
    model = model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    for mask, expected in zip(masks(model), before, strict=True):
        assert mask.scores.dtype == torch.float32
        assert torch.equal(mask.block_mask(), expected)
    assert model.up.weight.dtype != torch.float32


def test_every_parameter_is_in_one_group_and_those_of_masks_do_not_decay(kind: str) -> None:
    model, sparsifier, _ = make(kind)
    rest, scores = sparsifier.param_groups(model, weight_decay=0.1)
    own = {id(parameter) for mask in masks(model) for parameter in mask.parameters()}
    assert {id(parameter) for parameter in scores["params"]} == own and scores["weight_decay"] == 0
    everything = [id(parameter) for parameter in rest["params"] + scores["params"]]
    assert sorted(everything) == sorted(map(id, model.parameters()))


def test_checkpointing_and_accumulation_change_nothing(kind: str) -> None:
    plain, other = make(kind), make(kind)
    train(*plain, range(3))
    model = other[0]
    train(*other, range(3), run=lambda x: checkpoint(model, x, use_reentrant=False))
    assert_equal_states(plain[0], model)

    # The same batch twice, half of its loss each time: gradients and their statistics are the same.
    whole, halves = make(kind), make(kind)
    for (model, sparsifier, optimizer), parts in ((whole, 1), (halves, 2)):
        for i in range(3):
            optimizer.zero_grad()
            for _ in range(parts):
                (model(batch(i)).square().mean() / parts).backward()
            optimizer.step()
            sparsifier.step()
    for a, b in zip(masks(whole[0]), masks(halves[0]), strict=True):
        assert torch.equal(a.block_mask(), b.block_mask())


def test_autocast_does_not_touch_the_mask(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [mask.block_mask() for mask in masks(model)]
        model(batch(0)).float().square().mean().backward()
    optimizer.step()
    for mask, seen in zip(masks(make(kind)[0]), inside, strict=True):
        assert torch.equal(mask.block_mask(), seen)
    assert all(parameter.grad is not None for parameter in model.up.parameters())
    sparsifier.step()


def test_a_ramp_and_a_freeze_compile_once(kind: str) -> None:
    torch._dynamo.reset()  # every kind has a class of its own, and the code of `forward` one cache
    model, sparsifier, optimizer = make(kind, 0.0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(12):
        for group in sparsifier.groups:
            group["sparsity_level"] = 0.9 * i / 12
        if i == 10:
            sparsifier.freeze()
        train(model, sparsifier, optimizer, range(i, i + 1), run=run)
    assert counter.frame_count == 1
    torch.testing.assert_close(run(batch(20)), model(batch(20)))


def test_an_averaged_copy_squashes_by_itself(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    ema = AveragedModel(model)
    for i in range(3):
        train(model, sparsifier, optimizer, range(i, i + 1))
        ema.update_parameters(model)
    out = ema(batch(9)).detach()
    squash(ema)
    torch.testing.assert_close(ema(batch(9)), out)
    assert len(masks(model)) == 6


def test_reset_parameters_starts_over(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(1))
    sparsifier.freeze()
    before = model.up.parametrizations.weight.original.clone()
    model.up.reset_parameters()
    mask = model.up.parametrizations.weight[0]
    assert not torch.equal(model.up.parametrizations.weight.original, before)
    assert not mask.is_frozen and int(mask.block_mask().sum()) == kept(mask, 0.75)


def test_the_meta_device_and_back(kind: str) -> None:
    with torch.device("meta"):
        model = Model()
        sparsifier = KINDS[kind](0.75, 8)
        sparsifier.prepare(model, CONFIG)
    sparsifier.summary()
    with pytest.raises(RuntimeError, match="on the meta device"):
        sparsifier.squash_mask()
    source, _, _ = make(kind)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(batch(0)), source(batch(0)))


def test_samples_can_be_mapped_over(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(2))
    model.eval()
    linears = nn.Sequential(model.up, nn.GELU(), model.down)
    x = batch(9)[0]
    torch.testing.assert_close(torch.func.vmap(linears)(x), linears(x))
    state = dict(linears.named_parameters()), dict(linears.named_buffers())

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(linears, (parameters, buffers), (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, None, 0))(*state, x)
    expected = torch.func.grad(loss)(*state, x)
    for name, gradient in expected.items():
        if "parametrizations.weight.0" not in name:  # squares of gradients do not add up
            torch.testing.assert_close(found[name].sum(0), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_masks_are_exact_and_forwards_wait_for_nothing(
    kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", dtype)
    sparsifier = KINDS[kind](0.75, 32)
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), lr=1e-3)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        sparsifier.step()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(x)
        out.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert all(int(mask.block_mask().sum()) == kept(mask, 0.75) for mask in masks(model))
    on_cpu = copy.deepcopy(model).cpu()
    for a, b in zip(masks(model), masks(on_cpu), strict=True):
        assert torch.equal(a.block_mask().cpu(), b.block_mask())
    weight = model[0].weight.detach()
    assert torch.equal(weight.cpu(), on_cpu[0].weight)
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), out)


def test_a_default_device_does_not_get_in_the_way(kind: str) -> None:
    states = []
    for place in ("cpu", "meta"):
        torch.manual_seed(0)
        model, sparsifier, inputs = Model(), KINDS[kind](0.75, 8), [batch(i) for i in range(3)]
        with torch.device(place):
            sparsifier.prepare(model, CONFIG)
            # Not AdamW, which makes numbers of its own where the default device is.
            optimizer = torch.optim.SGD(sparsifier.param_groups(model), lr=1e-2)
            for x in inputs:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                sparsifier.step()
            assert str(sparsifier.summary())
            states.append({key: value.clone() for key, value in model.state_dict().items()})
            sparsifier.squash_mask()
        states.append(model.state_dict())
    plain, other = states[:2], states[2:]
    for one, two in zip(plain, other, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
