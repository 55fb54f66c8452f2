"""Ramps, freezes and the gain: what `step()` counts, and what a rising level leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchao_superblock.pruning import (
    BlockMask,
    CubicSL,
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
)

RAMPED = {
    "supermask": SupermaskSparsifier,
    "magnitude": lambda *args, **kwargs: MagnitudeSparsifier(*args, update_every=1, **kwargs),
    "rigl": lambda *args, **kwargs: RigLSparsifier(*args, update_every=2, **kwargs),
    "spartan": lambda *args, **kwargs: SpartanSparsifier(*args, update_every=1, **kwargs),
}
kinds = pytest.mark.parametrize("kind", list(RAMPED))


def make(kind: str, level: float = 0.75, **kwargs: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    sparsifier = RAMPED[kind](level, 8, **{"ramp_steps": 6, "freeze_step": 8, **kwargs})
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.1), lr=1e-2)
    return model, sparsifier, optimizer


def train(model: nn.Module, sparsifier: Any, optimizer: Any, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def masks(model: nn.Module) -> list[BlockMask]:
    return [module for module in model.modules() if isinstance(module, BlockMask)]


def kept(level: float) -> int:
    return max(1, round(32 * (1 - level)))


@kinds
def test_the_level_rises_cubically_and_freezes_in_time(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    assert all(bool(mask.block_mask().all()) for mask in masks(model))
    for i in range(8):
        train(model, sparsifier, optimizer, range(i, i + 1))
        level = 0.75 * (1 - (1 - min(1, (i + 1) / 6)) ** 3)
        assert [int(mask.block_mask().sum()) for mask in masks(model)] == [kept(level)] * 2
        assert [mask.is_frozen for mask in masks(model)] == [i == 7] * 2
    frozen = [mask.block_mask() for mask in masks(model)]
    train(model, sparsifier, optimizer, range(8, 12))
    assert all(torch.equal(a, m.block_mask()) for a, m in zip(frozen, masks(model), strict=True))
    sparsifier.unfreeze()  # the freeze was an event, not a state
    train(model, sparsifier, optimizer, range(12, 14))
    assert not any(mask.is_frozen for mask in masks(model))


@pytest.mark.parametrize("kind", ["supermask", "magnitude"])  # the others move blocks on purpose
def test_on_a_ramp_a_pruned_block_never_returns(kind: str) -> None:
    model, sparsifier, optimizer = make(kind, ramp_steps=12, freeze_step=20)
    before = [mask.block_mask() for mask in masks(model)]
    for i in range(16):
        train(model, sparsifier, optimizer, range(i, i + 1))
        with torch.no_grad():  # what is under the mask may look as good as it likes
            for module in (model[0], model[2]):
                weight = module.parametrizations.weight.original
                mask = module.parametrizations.weight[0].block_mask()
                weight[~mask.repeat_interleave(8, 0).repeat_interleave(8, 1)] = 1e3
        after = [mask.block_mask() for mask in masks(model)]
        assert all(not (b & ~a).any() for a, b in zip(before, after, strict=True))
        before = after


@kinds
def test_a_resumed_ramp_continues_bit_for_bit(kind: str) -> None:
    straight = make(kind)
    train(*straight, range(10))
    for stop in (3, 8):
        model, sparsifier, optimizer = make(kind)
        train(model, sparsifier, optimizer, range(stop))
        saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, sparsifier)])
        model, sparsifier, optimizer = make(kind)
        for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
            part.load_state_dict(state)
        train(model, sparsifier, optimizer, range(stop, 10))
        state = straight[0].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert sparsifier.state_dict()["step"] == straight[1].state_dict()["step"] == 10


@kinds
def test_steps_do_not_count_while_updates_are_off(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(3))
    sparsifier.enable_mask_update = False
    train(model, sparsifier, optimizer, range(3, 9))
    assert sparsifier.state_dict()["step"] == 3 and not masks(model)[0].is_frozen
    assert int(masks(model)[0].block_mask().sum()) == kept(0.75 * (1 - 0.5**3))


def test_a_scheduler_sets_the_target_that_the_ramp_scales() -> None:
    model, sparsifier, optimizer = make("magnitude")
    scheduler = CubicSL(sparsifier, total_t=4)
    for i in range(6):
        train(model, sparsifier, optimizer, range(i, i + 1))
        level = sparsifier.groups[0]["sparsity_level"] * (1 - (1 - (i + 1) / 6) ** 3)
        assert int(masks(model)[0].n_kept) == kept(level)
        scheduler.step()


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_grows_without_changing_the_function(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).to(dtype)
    sparsifier = RAMPED[kind](0.9, 8, ramp_steps=4, freeze_step=9, gain=0.5)
    sparsifier.prepare(linear)
    mask, weight = masks(linear)[0], linear.parametrizations.weight.original
    assert float(mask.factor) == 1.0 and bool(mask.block_mask().all())
    before = linear.weight.detach().clone()
    mask.apply_level(0.9, weight)
    assert float(mask.factor) == 4.0  # 0.1 ** -0.5 = 3.2
    after = linear.weight.detach()
    assert torch.equal(after[after != 0], before[after != 0])
    sparsifier.squash_mask()
    assert torch.equal(linear.weight, after)


def test_the_gain_of_a_held_mask_stays() -> None:
    model, sparsifier, optimizer = make("magnitude")
    train(model, sparsifier, optimizer, range(8))
    out = model(torch.ones(2, 32))
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.1
    sparsifier.step()
    assert torch.equal(model(torch.ones(2, 32)), out)


def test_without_a_recipe_there_is_no_gain_and_no_other_state() -> None:
    linear = nn.Linear(32, 32)
    SupermaskSparsifier(0.5, 8).prepare(linear)
    assert set(linear.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        *(
            f"parametrizations.weight.0.{name}"
            for name in (
                *("scores", "n_kept", "frozen", "held_mask"),
                *("checksums", "moments", "held_mean"),  # what averages are told by
            )
        ),
    }


def test_scores_are_summed_up_whatever_the_optimizer_does_to_parameters() -> None:
    results = []
    for weight_decay, lr in ((0.0, 0.0), (10.0, 0.1)):
        torch.manual_seed(0)
        linear = nn.Linear(32, 64)
        sparsifier = SupermaskSparsifier(0.75, 8, ramp_steps=4, freeze_step=9)
        sparsifier.prepare(linear)
        carrier = linear.parametrizations.weight[0].carrier
        optimizer = torch.optim.AdamW([carrier], lr=lr, weight_decay=weight_decay)
        for i in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(i))
            linear(x).square().mean().backward()
            optimizer.step()
            sparsifier.step()
        results.append(linear.parametrizations.weight[0].scores.clone())
    assert torch.equal(*results)
    assert int(results[0].isinf().sum()) == 32 - kept(
        0.75 * (1 - 0.25**3)
    )  # gone before the last step


def test_scores_are_sums_of_gradients_of_one_size() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    sparsifier = SupermaskSparsifier(0.75, 8, ramp_steps=1000, gain=0.0)
    sparsifier.prepare(linear)
    expected = torch.zeros(8, 4, dtype=torch.float64)
    for i, scale in enumerate((1.0, 1e-6, 1e4)):  # of the loss: a GradScaler's, say
        linear.zero_grad()
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(i))
        (scale * linear(x).square().mean()).backward()
        grad = linear.parametrizations.weight.original.grad.double()
        score = (grad * linear.parametrizations.weight.original.double()).detach()
        score = score.view(8, 8, 4, 8).sum((1, 3))
        expected -= score / score.square().mean().sqrt()
        sparsifier.step()
    found = linear.parametrizations.weight[0].scores.double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_overflowed_are_dropped(bad: float) -> None:
    model, sparsifier, optimizer = make("supermask")
    train(model, sparsifier, optimizer, range(2))
    mask = masks(model)[0]
    before = mask.scores.clone()
    mask.carrier.grad[0, 0] = bad
    sparsifier.step()
    finite = mask.scores.isfinite()
    assert torch.equal(mask.scores[finite], before[finite])


@pytest.mark.parametrize("kind", ["supermask", "rigl"])
def test_a_step_after_zero_grad_is_refused(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    train(model, sparsifier, optimizer, range(2))
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)finds no gradient.*before.*zero_grad"):
        sparsifier.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert sparsifier.state_dict()["step"] == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"ramp_steps": 9, "freeze_step": 8},
            ValueError,
            "freeze_step=8 comes before ramp_steps=9",
        ),
        ({"ramp_steps": 0}, ValueError, "ramp_steps=0 must be at least 1"),
        ({"ramp_steps": 2.5}, TypeError, "ramp_steps=2.5 must be a number of calls"),
        ({"freeze_step": True}, TypeError, "freeze_step=True must be"),
        ({"gain": 2}, ValueError, r"gain=2 is outside \[0, 1\]"),
        ({"gain": "half"}, TypeError, "gain='half' must be a number"),
        ({"scores_init": "zeros"}, ValueError, "scores_init='zeros' needs ramp_steps"),
    ],
)
def test_numbers_that_contradict_each_other(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    linear = nn.Linear(32, 32)
    with pytest.raises(error, match=message):
        SupermaskSparsifier(0.5, 8, **settings).prepare(linear)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("cls", [RigLSparsifier, SpartanSparsifier])
def test_kinds_that_need_to_know_when_the_masks_freeze(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: freeze_step is needed"):
        cls(0.5, 8)
