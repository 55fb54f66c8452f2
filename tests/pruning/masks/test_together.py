"""Work done for all masks at once: the masks of one after the other, and few calls whatever the number of layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pruning.masks.test_common import KINDS, assert_equal_states, kept, make, masks, train
from torchao_superblock.pruning import (
    BlockSparsifier,
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
)
from torchao_superblock.pruning.masks.together import carried

RECIPES: dict[str, Callable[[], BlockSparsifier]] = {
    "supermask": lambda: SupermaskSparsifier(0.75, 8),
    "supermask_ramp": lambda: SupermaskSparsifier(0.75, 8, ramp_steps=6, freeze_step=9),
    "magnitude": lambda: MagnitudeSparsifier(0.75, 8, ramp_steps=6, update_every=2, freeze_step=9),
    "magnitude_weighted": lambda: MagnitudeSparsifier(
        0.75, 8, ramp_steps=6, update_every=3, gradient_weighted=True
    ),
    "rigl": lambda: RigLSparsifier(0.75, 8, freeze_step=10, update_every=3),
    "spartan": lambda: SpartanSparsifier(0.75, 8, ramp_steps=5, freeze_step=9, update_every=2),
}
# Of version 0.2, where each mask was renewed and each level written by itself: rows of bits in hex.
PINNED: dict[str, list[str]] = {
    "supermask": ["4009148c", "e43000"],
    "supermask_ramp": ["44002ba0", "6c00c"],
    "magnitude": ["46283008", "969000"],
    "magnitude_weighted": ["2688428", "3a4400"],
    "rigl": ["1242c810", "812814"],
    "spartan": ["c0080d88", "978000"],
}


class Calls(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def after_training(recipe: str) -> list[str]:
    """In float64, so that no machine's rounding turns two blocks round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 20)).double()
    sparsifier = RECIPES[recipe]()
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.1), lr=1e-2)
    for i in range(12):
        x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x[:, :20]).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    found = [mask.block_mask().flatten().tolist() for mask in masks(model)]
    return [f"{int(''.join(str(int(bit)) for bit in bits), 2):x}" for bits in found]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_masks_are_those_of_one_mask_after_the_other(recipe: str) -> None:
    assert after_training(recipe) == PINNED[recipe]


def calls_of_a_step(layers: int, kind: str) -> Counter[str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    sparsifier = RECIPES[kind]()
    sparsifier.prepare(model)
    x = torch.randn(4, 16)
    for _ in range(6):
        model(x).square().mean().backward()
        sparsifier.step()
    model(x).square().mean().backward()
    with Calls() as calls:
        sparsifier.step()
    return calls.names


def test_between_its_looks_a_step_takes_as_few_calls_for_many_layers_as_for_one() -> None:
    few, many = calls_of_a_step(1, "magnitude"), calls_of_a_step(7, "magnitude")
    assert few == many and 0 < many.total() < 7


def test_a_held_mask_is_not_ranked_again() -> None:
    model, sparsifier, _ = make("magnitude")
    x = torch.randn(2, 5, 32)
    with Calls() as free:
        model(x)
    sparsifier.freeze()
    with Calls() as held:
        model(x).square().mean().backward()
    assert free.names["sort"] == len(masks(model)) and not held.names["sort"]


@pytest.mark.parametrize("copied", [False, True])
def test_a_level_that_stays_is_written_again_at_each_step(copied: bool) -> None:
    model, sparsifier, optimizer = make("magnitude")
    train(model, sparsifier, optimizer, range(3))  # the third writes what the second wrote
    expected = [int(mask.n_kept) for mask in masks(model)]
    if copied:
        model, sparsifier = copy.deepcopy((model, sparsifier))
    for mask in masks(model):
        mask.n_kept.data.fill_(1)  # past the version counter
    sparsifier.step()
    assert [int(mask.n_kept) for mask in masks(model)] == expected
    assert not any(mask.is_broken for mask in masks(model))


@pytest.mark.parametrize("replaced", ["n_kept", "checksums", "moments"])
@pytest.mark.parametrize("assign", [False, True])
def test_levels_are_written_into_the_buffers_that_are_there(replaced: str, assign: bool) -> None:
    one, other = make("magnitude"), make("magnitude")
    for model, sparsifier, optimizer in (one, other):
        train(model, sparsifier, optimizer, range(3))
        if model is one[0] and not assign:
            for mask in masks(model):
                buffer = mask.get_buffer(replaced)
                buffer.data = buffer.clone()
        elif model is one[0]:
            state = model.state_dict()
            for key in state:
                if key.endswith(replaced):
                    state[key] = state[key].clone()
            model.load_state_dict(state, assign=True)
        for group in sparsifier.groups:
            group["sparsity_level"] = 0.5
        sparsifier.step()
    # All of the state: what two of the three say would put the third right in a forward.
    assert_equal_states(one[0], other[0])
    assert [int(m.n_kept) for m in masks(one[0])] == [kept(m, 0.5) for m in masks(one[0])]


def test_update_mask_is_a_step_of_one_group() -> None:
    one, other = make("magnitude"), make("magnitude")
    for _, sparsifier, _ in (one, other):
        for group in sparsifier.groups:
            group["sparsity_level"] = 0.5
            with torch.no_grad():
                group["module"].parametrizations[group["tensor_name"]].original.mul_(-1)
                group["module"].parametrizations[group["tensor_name"]].original[0].add_(1)
    before = {key: value.clone() for key, value in one[0].state_dict().items()}
    for group in one[1].groups:
        one[1].update_mask(**group)
    other[1].step()
    assert_equal_states(one[0], other[0])
    assert any(not torch.equal(value, before[key]) for key, value in one[0].state_dict().items())


@pytest.mark.parametrize("where", ["subclass", "instance", "base"])
def test_a_step_calls_update_mask_where_somebody_has_his_own(monkeypatch, where) -> None:
    """As torch's own sparsifiers do: it is where a subclass has its say."""
    one, other = make("magnitude"), make("magnitude")
    sparsifier = one[1]
    own, seen = type(sparsifier).update_mask, []

    def update_mask(self, module, tensor_name, tensor_fqn, sparsity_level, **kwargs) -> None:
        seen.append(tensor_fqn)
        own(self, module, tensor_name, tensor_fqn, 0.5 * sparsity_level, **kwargs)

    if where == "base":
        monkeypatch.setattr(BlockSparsifier, "update_mask", update_mask)
        other[1].update_mask = partial(own, other[1])
    elif where == "instance":
        monkeypatch.setattr(sparsifier, "update_mask", partial(update_mask, sparsifier))
    else:
        named = {"update_mask": update_mask}
        sparsifier.__class__ = type("Halved", (type(sparsifier),), named)
    for _, each, _ in (one, other):
        for group in each.groups:
            group["sparsity_level"] = 0.5 if each is sparsifier else 0.25
        each.step()
    assert seen == [group["tensor_fqn"] for group in sparsifier.groups]
    assert_equal_states(one[0], other[0])


@pytest.mark.parametrize("kind", ["supermask_ramp", "magnitude_weighted", "rigl"])
def test_a_mask_finds_by_itself_what_its_carrier_has(kind: str) -> None:
    """As kinds of version 0.2 do."""
    model, _, _ = make(kind)
    found = masks(model)
    assert [mask.carried() for mask in found] == [None] * len(found) and not carried(found)
    model(torch.randn(4, 5, 32)).square().mean().backward()
    found[0].carrier.grad[0, 0] = torch.inf
    together = carried(found)
    assert list(together) == found and not together[found[0]].any()
    for mask in found:
        assert torch.equal(mask.carried(), together[mask])


@pytest.mark.parametrize("kind", ["magnitude", "spartan"])
def test_a_held_mask_keeps_what_it_ranks_by(kind: str) -> None:
    model, sparsifier, optimizer = make(kind)
    sparsifier.freeze()
    before = [mask.scores.clone() for mask in masks(model)]
    train(model, sparsifier, optimizer, range(2))
    assert all(torch.equal(a, mask.scores) for a, mask in zip(before, masks(model), strict=True))
    values = {"scores": torch.full_like(before[0], 7.0)}
    masks(model)[0].write_unless_frozen(values)
    assert torch.equal(masks(model)[0].scores, before[0])
    sparsifier.unfreeze()
    masks(model)[0].write_unless_frozen(values)
    assert torch.equal(masks(model)[0].scores, values["scores"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("rigl", "example")])
@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_gpu_no_step_waits_for_the_device(kind: str, frozen: bool) -> None:
    model, sparsifier, _ = make(kind)
    model.cuda()
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), foreach=True)
    if frozen:
        sparsifier.freeze()

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        sparsifier.step()

    x = torch.randn(4, 5, 32, device="cuda")
    step(x)  # compiles
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS))
def test_on_a_gpu_levels_are_those_of_a_cpu(kind: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model, sparsifier, _ = make(kind)
        model.to(device)
        for _ in range(3):
            model(torch.ones(2, 5, 32, device=device)).square().mean().backward()
            sparsifier.step()
        assert not any(mask.is_broken for mask in masks(model))
        found.append([(m.n_kept.cpu(), m.checksums.cpu(), m.moments.cpu()) for m in masks(model)])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
