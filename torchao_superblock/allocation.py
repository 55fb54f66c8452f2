"""Sparsity levels for each layer of a model, under a budget of blocks or of time."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import swap_to_bsr
from torchao_superblock.common.blocks import block_grid
from torchao_superblock.common.calls import call_model, median_seconds
from torchao_superblock.pruning import Sensitivity
from torchao_superblock.pruning.masks.base import kept_blocks
from torchao_superblock.pruning.one_shot.capture import Call, LinearCalls, Target, plain_linear
from torchao_superblock.pruning.one_shot.levels import Choice, entry, levels_for_blocks, spend

Timer = Callable[[Callable[[], object]], float]

_TOLERANCE = 0.05
_ATTEMPTS = 5


class Allocation(list):
    """A config: entries for `prepare` or `prune_one_shot`, layers that stay dense left out.

    Attributes:
        loss: what it is expected to add to the loss, as the sum over layers.
        speedup: measured on the whole model, dense time over sparse time; None where no speedup was
            asked for.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], loss: float, speedup: float | None):
        super().__init__(entries)
        self.loss = loss
        self.speedup = speedup


def allocate(
    sensitivity: Sensitivity,
    *,
    sparsity_level: float | None = None,
    model: nn.Module | None = None,
    example_input: Any = None,
    speedup: float | None = None,
    timer: Timer | None = None,
) -> Allocation:
    """Chooses a sparsity level for each layer so that the loss suffers least.

    Either under a budget of blocks (`sparsity_level`), or for a promised speedup on this machine
    (`model`, `example_input`, `speedup`): then each layer is timed at each level, as `swap_to_bsr`
    would leave it, and what comes out is checked on a copy of the whole model and corrected until
    it holds. Losses of layers are taken to add up. For a speedup a layer is either dense or at least
    at the lowest level that was measured, since below some sparsity it gains no time; a small speedup
    may come out larger for it.

    Args:
        sensitivity: from :func:`torchao_superblock.sensitivity`.
        sparsity_level: fraction of all blocks to prune, in `(0, 1)`.
        model: the dense model; not changed, but copied.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, as large as
            they are in use.
        speedup: dense time over sparse time, above 1.
        timer: takes a function without arguments and returns the seconds of a call. None: the median
            of `torch.utils.benchmark`.

    Returns:
        A config for `prune_one_shot` or a sparsifier's `prepare`.

    Raises:
        ValueError: if not exactly one budget is given, or it is below what is possible; the message
            says what can be had.

    Example:
        >>> config = allocate(table, model=model, example_input=x, speedup=1.5)  # doctest: +SKIP
        >>> prune_one_shot(model, batches, 0.5, 32, config)  # doctest: +SKIP
        >>> swap_to_bsr(model)  # doctest: +SKIP
    """
    if (sparsity_level is None) == (speedup is None):
        raise ValueError(
            "allocate: give either sparsity_level, a budget of blocks, or speedup with model and "
            f"example_input; got sparsity_level={sparsity_level} and speedup={speedup}"
        )
    if not sensitivity.layers:
        raise ValueError("allocate: the sensitivity has no layers")
    if sparsity_level is not None:
        choices = levels_for_blocks(sensitivity, sparsity_level)
        if not any(choice.level for choice in choices):
            raise ValueError(f"allocate: sparsity_level={sparsity_level} prunes no block at all")
        return _allocation(sensitivity, choices, None)
    if model is None or example_input is None:
        raise ValueError("allocate: speedup needs model and example_input, to measure with")
    if isinstance(speedup, bool) or not isinstance(speedup, numbers.Real):
        raise TypeError(f"allocate: speedup={speedup!r} must be a number above 1, such as 1.5")
    if not 1 < speedup < math.inf:
        raise ValueError(f"allocate: speedup={speedup} must be above 1, such as 1.5")
    with torch.inference_mode():
        return _for_speedup(
            sensitivity,
            model,
            example_input,
            float(speedup),
            timer or (lambda call: median_seconds(call, at_least=0.2)[0]),
        )


def _for_speedup(
    sensitivity: Sensitivity, model: nn.Module, example_input: Any, speedup: float, timer: Timer
) -> Allocation:
    dense = copy.deepcopy(model).eval()
    deepest = [Choice(0.0, 0.0, sensitivity.levels[-1])] * len(sensitivity.layers)
    swapped = _swapped(dense, sensitivity, deepest)[1]
    choices = _time_layers(sensitivity, dense, example_input, swapped, timer)

    def measure(levels: Sequence[Choice]) -> tuple[float, float]:
        sparse = _swapped(dense, sensitivity, levels)[0]
        before = timer(lambda: call_model(dense, example_input))
        after = timer(lambda: call_model(sparse, example_input))
        return before, after

    whole = timer(lambda: call_model(dense, example_input))
    asked = whole - whole / speedup  # seconds that the layers have to save, as timed alone
    best: Allocation | None = None
    most, at = 0.0, ""
    for _ in range(_ATTEMPTS):
        found = spend(choices, asked, whole_start=True)
        last = found is None  # no layer can give more
        found = found or [max(its, key=lambda c: (c.gain, -c.loss)) for its in choices]
        before, after = measure(found)
        reached = before / after
        if reached > most:
            most = reached
            at = ", ".join(
                f"{layer.fqn} {choice.level:.0%}"
                for layer, choice in zip(sensitivity.layers, found, strict=True)
                if choice.level
            )
        if reached >= speedup * (1 - _TOLERANCE):
            candidate = _allocation(sensitivity, found, reached)
            if best is None or candidate.loss < best.loss:
                best = candidate
            if reached <= speedup * (1 + _TOLERANCE):
                break
        elif last:
            break
        # Layers in a model are not as fast as alone: ask for more, or for less.
        saved, wanted = before - after, before - before / speedup
        asked *= wanted / saved if saved > 0.1 * wanted else 10.0
    if best is None:
        raise ValueError(
            f"allocate: a speedup of {speedup:.2f} cannot be had with these layers, this input and "
            f"levels up to {sensitivity.levels[-1]}; the best that was measured on the whole model is "
            f"{most:.2f}" + (f", at {at}" if at else "")
        )
    return best


def _allocation(
    sensitivity: Sensitivity, choices: Sequence[Choice], speedup: float | None
) -> Allocation:
    entries = []
    for layer, choice in zip(sensitivity.layers, choices, strict=True):
        pruned = layer.n_blocks - kept_blocks(layer.n_blocks, choice.level)
        if pruned:
            entries.append(entry(layer, pruned / layer.n_blocks))
    return Allocation(entries, sum(choice.loss for choice in choices), speedup)


def _swapped(
    dense: nn.Module, sensitivity: Sensitivity, choices: Sequence[Choice]
) -> tuple[nn.Module, set[str]]:
    """A copy with zero blocks at these levels, swapped, and the tensors that were."""
    sparse = copy.deepcopy(dense)
    for layer, choice in zip(sensitivity.layers, choices, strict=True):
        _zero_blocks(_parameter(sparse, layer.fqn), layer.blocksize, choice.level)
    modules = [entry.fqn for entry in swap_to_bsr(sparse).swapped]
    fqns = {
        layer.fqn
        for layer in sensitivity.layers
        if any(layer.fqn.startswith(f"{module}.") for module in modules)
    }
    return sparse, fqns


def _time_layers(
    sensitivity: Sensitivity,
    dense: nn.Module,
    example_input: Any,
    swapped: set[str],
    timer: Timer,
) -> list[list[Choice]]:
    """What each level of each layer saves of the layer's own time."""
    inputs = _inputs(sensitivity, dense, example_input)
    times: dict[tuple, float] = {}

    def time_of(x: Tensor, weight: Tensor, blocksize: tuple[int, int], level: float) -> float:
        kind = (x.shape, x.stride(), x.dtype, weight.shape, weight.dtype, blocksize, level)
        if kind not in times:
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="cpu").to(weight)
            module = nn.Sequential(linear)
            if level:
                _zero_blocks(linear.weight, blocksize, level)
                swap_to_bsr(module)
            times[kind] = timer(lambda: module(x))
        return times[kind]

    choices = []
    for layer in sensitivity.layers:
        its_choices = [Choice(0.0, 0.0, 0.0)]
        weight = _parameter(dense, layer.fqn)
        for level, change in zip(sensitivity.levels, layer.changes, strict=True):
            if layer.fqn in swapped and inputs.get(layer.fqn):
                gain = sum(
                    time_of(x, weight, layer.blocksize, 0.0)
                    - time_of(x, weight, layer.blocksize, level)
                    for x in inputs[layer.fqn]
                )
                its_choices.append(Choice(gain, change, level))
        choices.append(its_choices)
    return choices


def _inputs(
    sensitivity: Sensitivity, dense: nn.Module, example_input: Any
) -> dict[str, list[Tensor]]:
    """What each layer is called with, for each call in one forward."""
    seen: dict[str, list[Tensor]] = {}

    def look(call: Call) -> Tensor:
        seen.setdefault(call.target.fqn, []).append(call.x.clone())
        return plain_linear(call.x, call.weight, call.bias)

    targets = [
        Target(layer.fqn, _parameter(dense, layer.fqn), layer.blocksize, 0.0)
        for layer in sensitivity.layers
    ]
    with LinearCalls(targets, look):
        call_model(dense, example_input)
    return seen


def _parameter(model: nn.Module, fqn: str) -> nn.Parameter:
    try:
        return model.get_parameter(fqn)
    except AttributeError as error:
        raise ValueError(
            f"allocate: the model has no parameter {fqn!r}; give the model, unwrapped, whose "
            "sensitivity was measured"
        ) from error


def _zero_blocks(weight: Tensor, blocksize: tuple[int, int], level: float) -> None:
    """Zeroes blocks drawn at random, the same ones each time: times depend on how many."""
    rows, cols = blocksize
    grid = block_grid(tuple(weight.shape), blocksize)
    n_blocks = grid[0] * grid[1]
    order = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0), device="cpu")
    kept = torch.zeros(n_blocks, dtype=torch.bool, device="cpu")
    kept[order[: kept_blocks(n_blocks, level)]] = True
    full = kept.view(grid).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    weight.masked_fill_(~full[: weight.shape[0], : weight.shape[1]].to(weight.device), 0.0)
