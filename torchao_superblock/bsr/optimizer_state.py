"""An optimizer goes on with the stored blocks of a weight in the place of the dense one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
ELEMENTWISE: dict[type[Optimizer], dict[str, int]] = {
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: _ADAM,
    RAdam: _ADAM,
    Adamax: {"exp_avg": 1, "exp_inf": 1},
    RMSprop: {"square_avg": 2, "grad_avg": 1},
    SGD: {"momentum_buffer": 1},
    Adagrad: {"sum": 2},
    Adadelta: {"square_avg": 2, "acc_delta": -2},
    ASGD: {"ax": -1},
    Rprop: {"prev": 1, "step_size": -1},
}
"""Optimizers that move each element by its own gradient and state alone, so that a block can do without the others.

For each the power of the gradient's unit in an entry of its state (0 if not named): weights that were multiplied by a
gain have gradients that are as much smaller.
"""

WAY_OUT = "swap without optimizer= and build a new one over the swapped model's parameters"


@dataclass(frozen=True)
class Move:
    """One dense weight and what takes its place.

    Attributes:
        fqn: the weight's name.
        new_fqn: the name of its stored blocks.
        weight: `(N, K)`.
        values: `(nnz, r, c)`.
        gather: picks the stored blocks out of any tensor of the weight's shape.
        gain: what the weight was multiplied by when its mask was folded in.
    """

    fqn: str
    new_fqn: str
    weight: nn.Parameter
    values: nn.Parameter
    gather: Callable[[Tensor], Tensor]
    gain: float = 1.0


def check_optimizer(optimizer: Any) -> type[Optimizer]:
    """Refuses what cannot go on with a part of a weight; returns the class of :data:`ELEMENTWISE` that it steps as.

    Raises:
        TypeError: it is no optimizer, or one whose steps mix elements or are not known.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"swap_to_bsr: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    for cls in type(optimizer).__mro__:
        if cls in ELEMENTWISE:
            return cls
        # Optimizer.__init__ puts a profiled form of an inherited `step` into the class: only another function counts.
        own = vars(cls).get("step")
        inherited = getattr(super(cls, optimizer), "step", None)
        if own is not None and _unwrapped(own) is not _unwrapped(inherited):
            break
    raise TypeError(
        f"swap_to_bsr: {type(optimizer).__name__} cannot go on with the stored blocks alone: only optimizers that step "
        f"each element by itself can ({', '.join(cls.__name__ for cls in ELEMENTWISE)}); {WAY_OUT}"
    )


def _unwrapped(function: Any) -> Any:
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@contextmanager
def stored_blocks_in(optimizer: Optimizer, moves: Sequence[Move]) -> Iterator[None]:
    """Puts stored blocks into the optimizer, at the place and with the state of their weights; takes them out again
    if what the context holds fails.

    Args:
        optimizer: one that :func:`check_optimizer` accepts.
        moves: the weights that are swapped. One that is not trained may be missing from the optimizer.

    Raises:
        ValueError: a trained weight is not in the optimizer, or has state of another shape. Nothing is changed.
    """
    moves = [move for move in moves if _is_held(optimizer, move)]
    units = ELEMENTWISE[check_optimizer(optimizer)]
    states = {
        move.weight: {
            key: _moved(move, key, value, units.get(key, 0)) for key, value in state.items()
        }
        for move in moves
        if (state := optimizer.state.get(move.weight)) is not None
    }
    by_weight = {move.weight: move for move in moves}
    groups_before = [
        (group, key, list(group[key]))
        for group in optimizer.param_groups
        for key in ("params", "param_names")
        if key in group
    ]
    state_before = dict(optimizer.state)
    try:
        for group in optimizer.param_groups:
            names = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                move = by_weight.get(parameter)
                if move is None:
                    continue
                group["params"][position] = move.values
                if names is not None:
                    # Named while the mask was on, perhaps.
                    name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", names[position])
                    if name.endswith(move.fqn):
                        names[position] = name.removesuffix(move.fqn) + move.new_fqn
        for weight, state in states.items():
            del optimizer.state[weight]
            optimizer.state[by_weight[weight].values] = state
        yield
    except BaseException:
        for group, key, before in groups_before:
            group[key][:] = before
        optimizer.state.clear()
        optimizer.state.update(state_before)
        raise


def notes(optimizer: Optimizer, moves: Sequence[Move]) -> list[str]:
    """What to tell about the moves."""
    trained = [move for move in moves if move.weight.requires_grad]
    said = [
        f"the optimizer ({type(optimizer).__name__}) goes on with the stored blocks of {len(trained)} weights"
    ]
    if gains := sorted({move.gain for move in trained} - {1.0}):
        count = sum(move.gain != 1.0 for move in trained)
        said.append(
            f"{count} of them were multiplied by a gain of {', '.join(f'{gain:g}' for gain in gains)} when their masks "
            "were folded in, and Adam takes no larger steps for it: to go on as before, multiply the learning rate of "
            "these weights by it (by its square for SGD) and divide their weight decay by that"
        )
    return said


def _is_held(optimizer: Optimizer, move: Move) -> bool:
    """Whether the optimizer holds this weight; an error where it has to and does not."""
    if any(move.weight is p for group in optimizer.param_groups for p in group["params"]):
        return True
    if not move.weight.requires_grad:
        return False
    raise ValueError(
        f"swap_to_bsr: the optimizer ({type(optimizer).__name__}) does not hold {move.fqn!r}, which is trained and "
        "would be swapped: give the optimizer of this very model (not of a copy), or freeze the weight with "
        f"requires_grad_(False), or {WAY_OUT}"
    )


def _moved(move: Move, key: str, value: Any, unit: int) -> Any:
    """One entry of a weight's state: a tensor of the weight's shape becomes that of its blocks, in their unit."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape == move.weight.shape and value.layout is torch.strided:
        return move.gather(value).div_(move.gain**unit)
    raise ValueError(
        f"swap_to_bsr: the optimizer's {key!r} of {move.fqn!r} has shape {tuple(value.shape)}, the weight "
        f"{tuple(move.weight.shape)}: blocks cannot be picked out of it; {WAY_OUT}"
    )
