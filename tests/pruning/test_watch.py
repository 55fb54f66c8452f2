"""Scores that no optimizer trains or that decay: said once, and nothing is said where all is well."""

from __future__ import annotations

import gc
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from torchao_superblock.pruning import BlockMask, SupermaskSparsifier

UNTRAINED = r"no optimizer trains the scores of '0\.weight' and 1 more"
DECAYED = r"decays the scores of '0\.weight' and 1 more"


def prepared(model: nn.Module | None = None) -> tuple[nn.Module, SupermaskSparsifier]:
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsifier = SupermaskSparsifier(0.5, 8, scores_init="kaiming_uniform")
    sparsifier.prepare(model)
    return model, sparsifier


def train(model: nn.Module, sparsifier: Any, *optimizers: Any, steps: int = 4) -> list[str]:
    """What was warned of in so many steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(torch.randn(2, 16)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            if sparsifier is not None:
                sparsifier.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def hooks() -> set[int]:
    """Which hooks there are: the only way to see that one was removed."""
    return set(torch_optimizer._global_optimizer_post_hooks)


def one(texts: list[str], pattern: str) -> bool:
    return len(texts) == 1 and re.search(pattern, texts[0]) is not None


def test_an_optimizer_that_was_built_too_early() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    _, sparsifier = prepared(model)
    before = hooks()
    texts = train(model, sparsifier, optimizer)
    assert one(texts, UNTRAINED + r".*after prepare\(\), from sparsifier\.param_groups\(model\)")
    assert len(before - hooks()) >= 1  # with those of models that are gone
    optimizer.add_param_group(sparsifier.param_groups(model)[1])  # the way out that it names
    scores = model[0].parametrizations.weight[0].scores
    held = scores.detach().clone()
    train(model, sparsifier, optimizer)
    assert not torch.equal(scores, held)


@pytest.mark.parametrize("fused", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_that_decays_everything(fused: dict[str, bool]) -> None:
    model, sparsifier = prepared()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, **fused)
    texts = train(model, sparsifier, optimizer)
    assert one(texts, "AdamW " + DECAYED + r".*param_groups\(model, weight_decay=\.\.\.\)")


@pytest.mark.parametrize("cleared", [False, True])
def test_gradients_that_scores_are_made_of_must_be_cleared(cleared: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = SupermaskSparsifier(0.5, 8, scores_init="zeros", ramp_steps=4)
    sparsifier.prepare(model)
    if cleared:  # by other means than the optimizer's
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda: (zero_grad(), model.zero_grad())
    texts = train(model, sparsifier, optimizer)
    assert texts == [] if cleared else one(texts, UNTRAINED)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    sparsifier.squash_mask()
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert train(model, sparsifier, optimizer) == []  # nothing reads what decays here


def test_both_faults_are_told_once_each() -> None:
    model, sparsifier = prepared()
    masks = [module for module in model.modules() if isinstance(module, BlockMask)]
    rest = [p for p in model.parameters() if p is not masks[1].scores]
    texts = train(model, sparsifier, torch.optim.SGD(rest, lr=0.1, weight_decay=0.1), steps=6)
    assert len(texts) == 2
    assert one(texts[:1], r"SGD decays the scores of '0\.weight':")
    assert one(texts[1:], r"no optimizer trains the scores of '2\.weight',")


def by_param_groups(model: nn.Module, sparsifier: Any) -> list[Any]:
    return [torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.1))]


def without_decay(model: nn.Module, sparsifier: Any) -> list[Any]:
    return [torch.optim.Adam(model.parameters())]


def zero_rate(model: nn.Module, sparsifier: Any) -> list[Any]:
    rest, scores = sparsifier.param_groups(model)
    return [torch.optim.SGD([rest, {**scores, "lr": 0.0}], lr=0.1)]


def two_optimizers(model: nn.Module, sparsifier: Any) -> list[Any]:
    rest, scores = sparsifier.param_groups(model, weight_decay=0.1)
    return [torch.optim.AdamW([rest]), torch.optim.SGD([scores], lr=0.1)]


def frozen_masks(model: nn.Module, sparsifier: Any) -> list[Any]:
    sparsifier.freeze()
    rest, _ = sparsifier.param_groups(model)
    return [torch.optim.SGD([rest], lr=0.1)]


def frozen_scores(model: nn.Module, sparsifier: Any) -> list[Any]:
    for p in sparsifier.param_groups(model)[1]["params"]:
        p.requires_grad_(False)
    rest, _ = sparsifier.param_groups(model)
    return [torch.optim.SGD([rest], lr=0.1)]


def of_another_model(model: nn.Module, sparsifier: Any) -> list[Any]:
    return [torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.1)]


@pytest.mark.parametrize(
    "build",
    [
        by_param_groups,
        without_decay,
        zero_rate,
        two_optimizers,
        frozen_masks,
        frozen_scores,
        of_another_model,
    ],
)
def test_nothing_is_said_where_all_is_well(build: Callable[..., list[Any]]) -> None:
    model, sparsifier = prepared()
    assert train(model, sparsifier, *build(model, sparsifier)) == []


def test_skipped_steps_are_no_fault() -> None:
    model, sparsifier = prepared()
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()  # no gradients: nothing moves
            sparsifier.step()


def test_the_hook_goes_once_it_has_seen_enough_and_with_the_masks() -> None:
    def new(before: set[int]) -> int:
        (hook,) = hooks() - before
        return hook

    before = hooks()
    model, sparsifier = prepared()
    first = new(before)
    train(model, sparsifier, *by_param_groups(model, sparsifier), steps=2)
    assert first not in hooks()
    before = hooks()
    _, other = prepared()
    second = new(before)
    other.squash_mask()
    assert second not in hooks()
    before = hooks()
    _, gone = prepared()
    third = new(before)
    pickle.loads(pickle.dumps(gone)).step()
    del gone
    gc.collect()
    train(model, sparsifier, *by_param_groups(model, sparsifier), steps=2)
    assert third not in hooks()


def test_a_step_called_by_a_hook_of_the_optimizer() -> None:
    model, sparsifier = prepared()
    (optimizer,) = by_param_groups(model, sparsifier)
    optimizer.register_step_post_hook(lambda *_: sparsifier.step())
    assert train(model, None, optimizer) == []


def test_a_compiled_optimizer_is_left_alone() -> None:
    model, sparsifier = prepared()
    (optimizer,) = by_param_groups(model, sparsifier)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(2, 16)).square().sum().backward()
        step()
        sparsifier.step()
