"""Spending a budget where it costs the least loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchao_superblock.pruning.masks.base import kept_blocks
from torchao_superblock.pruning.masks.settings import check_sparsity_level
from torchao_superblock.pruning.one_shot.sensitivity import LayerSensitivity, Sensitivity


class Choice(NamedTuple):
    """One way to treat a layer.

    Attributes:
        gain: what it brings, in the budget's unit (blocks, seconds).
        loss: what it costs.
        level: the sparsity level.
    """

    gain: float
    loss: float
    level: float


def spend(
    choices: Sequence[Sequence[Choice]], needed: float, *, whole_start: bool = False
) -> list[Choice] | None:
    """The choices with the least sum of losses whose gains sum up to what is needed.

    Layers count on their own, and between two measured choices losses and levels are taken to lie
    on a line: so the lower convex hull of each layer's losses over gains is walked, always along
    the flattest edge at hand.

    Args:
        choices: of each layer; to leave it dense, gain 0 at loss 0, is always one more.
        needed: the sum of gains.
        whole_start: between dense and the first choice of a layer there is nothing: below some
            sparsity a layer is not faster at all.

    Returns:
        One choice a layer, or None if all layers together cannot bring so much.
    """
    taken = [Choice(0.0, 0.0, 0.0)] * len(choices)
    edges = []
    for layer, its_choices in enumerate(choices):
        hull = _lower_hull([Choice(0.0, 0.0, 0.0), *its_choices])
        for left, right in itertools.pairwise(hull):
            slope = (right.loss - left.loss) / (right.gain - left.gain)
            edges.append((slope, layer, left, right))
    # Along one hull slopes rise, so that its edges come in order.
    edges.sort(key=lambda edge: edge[0])
    for number, (_, layer, left, right) in enumerate(edges):
        missing = needed - sum(choice.gain for choice in taken)
        if missing <= needed * 1e-9:
            break
        share = min(1.0, missing / (right.gain - left.gain))
        if share < 1 and whole_start and left.gain == 0:
            # Either this layer's start is taken whole and others give back, or it stays dense.
            without = [*choices]
            without[layer] = []
            other = spend(without, needed, whole_start=True)
            taken[layer] = right
            for _, giver, low, high in reversed(edges[:number]):
                spare = sum(choice.gain for choice in taken) - needed
                if low.gain > 0:
                    taken[giver] = _between(low, high, max(0.0, 1 - spare / (high.gain - low.gain)))
            if other is not None and _loss(other) < _loss(taken):
                return other
            return taken
        taken[layer] = _between(left, right, share)
    reached = sum(choice.gain for choice in taken)
    return taken if reached >= needed * (1 - 1e-9) else None


def _between(left: Choice, right: Choice, share: float) -> Choice:
    if share in (0.0, 1.0):
        return right if share else left
    return Choice(*(a + share * (b - a) for a, b in zip(left, right, strict=True)))


def _loss(choices: Sequence[Choice]) -> float:
    return sum(choice.loss for choice in choices)


def _lower_hull(points: Sequence[Choice]) -> list[Choice]:
    """The points of rising gain below which there is none, from gain 0 on."""
    hull: list[Choice] = []
    for point in sorted(points):
        if point.gain < 0 or (hull and point.gain <= hull[-1].gain):
            continue  # a dearer choice of the same gain, or one that loses time
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b.loss - a.loss) * (point.gain - a.gain) < (point.loss - a.loss) * (
                b.gain - a.gain
            ):
                break
            hull.pop()
        hull.append(point)
    return hull


def levels_for_blocks(sensitivity: Sensitivity, sparsity_level: float) -> list[Choice]:
    """Levels at which, over all layers, this fraction of blocks is pruned.

    Raises:
        ValueError: if the levels that were measured do not go that far.
    """
    level = check_sparsity_level(sparsity_level, "allocate: ")
    total = sum(layer.n_blocks for layer in sensitivity.layers)
    needed = total - kept_blocks(total, level)
    choices = [
        [
            Choice(layer.n_blocks - kept_blocks(layer.n_blocks, level), change, level)
            for level, change in zip(sensitivity.levels, layer.changes, strict=True)
        ]
        for layer in sensitivity.layers
    ]
    found = spend(choices, needed)
    if found is None:
        most = sum(max(choice.gain for choice in its_choices) for its_choices in choices)
        raise ValueError(
            f"allocate: sparsity_level={level} needs {needed} of {total} blocks pruned, but levels "
            f"were measured up to {sensitivity.levels[-1]} only, {most} blocks ({most / total:.1%}); "
            "measure the sensitivity at higher levels"
        )
    # Whole blocks, so that the sum is exact: all choices but the last one are whole already.
    return [
        choice._replace(level=round(choice.gain) / layer.n_blocks)
        for choice, layer in zip(found, sensitivity.layers, strict=True)
    ]


def entry(layer: LayerSensitivity, level: float) -> dict[str, Any]:
    """A config entry."""
    rows, cols = layer.blocksize
    return {
        "tensor_fqn": layer.fqn,
        "sparsity_level": level,
        "blocksize": rows if rows == cols else (rows, cols),
    }
