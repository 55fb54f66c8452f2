"""Timing parts of a model, dense and block-sparse, on the inputs that the model itself gives them.

What is timed is the smallest part whose speed a swap decides: a linear layer, layers that would be fused, or a module
around several of them that computes faster as long as all of it is dense.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchao_superblock.bsr.finish import Finish
from torchao_superblock.bsr.parts import Part, is_whole
from torchao_superblock.common.calls import call_model, eval_mode, median_seconds, shown
from torchao_superblock.common.names import without_compile_prefix

SECONDS = 0.1
"""How long one side is timed at least."""


@dataclass(frozen=True)
class Timing:
    """What one part of a model takes in a forward (and backward, if it is trained), all its calls together.

    Attributes:
        dense_ms: as it is.
        bsr_ms: swapped.
    """

    dense_ms: float
    bsr_ms: float


def time_parts(
    model: nn.Module,
    parts: Sequence[Part],
    example_input: object,
    finish: Finish | None = None,
    *,
    train: bool,
    progress: bool = True,
) -> dict[Part, Timing | None]:
    """Times each part dense and swapped, once for each kind of part and input.

    Args:
        model: dense; it runs once, in eval mode.
        parts: of the model.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments of the model.
        finish: what the swap does once the new layers are in place; None for nothing.
        train: time a forward and a backward, not a forward alone.
        progress: show a bar, if tqdm is installed.

    Returns:
        For each part its time, or None if the model did not call it.

    Raises:
        ValueError: the model does not take the example.
    """
    finish = finish or Finish()
    inputs = _record(model, parts, example_input)
    kinds = {part: part.kind(finish) for part in parts}
    times: dict[Any, tuple[float, float]] = {}
    work = {(kinds[part], call): part for part in parts for call in part.calls}
    for key, part in shown(list(work.items()), "swap_to_bsr: measuring", progress):
        args, kwargs = inputs[key[1]]
        with eval_mode(part.module):
            try:
                pair = part.module, part.swapped(finish).eval()
                times[key] = _milliseconds(pair, args, kwargs, train)
            except Exception as error:
                error.add_note(f"while timing {' and '.join(map(repr, part.fqns))}")
                raise
    result: dict[Part, Timing | None] = {}
    for part in parts:
        found = [(times[kinds[part], call], count) for call, count in part.calls.items()]
        dense, bsr = (sum(pair[side] * count for pair, count in found) for side in (0, 1))
        result[part] = Timing(dense, bsr) if found else None
    return result


def _record(
    model: nn.Module, parts: Sequence[Part], example_input: object
) -> dict[Any, tuple[tuple, dict[str, Any]]]:
    """Runs the model once and notes what each part is called with; the first input of each kind is kept."""
    inputs: dict[Any, tuple[tuple, dict[str, Any]]] = {}
    part_of = {part.entry: part for part in parts}
    running: list[str] = []  # FQNs, the innermost last

    def watch(fqn: str, module: nn.Module) -> Iterator[RemovableHandle]:
        depths: list[int] = []

        def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            depths.append(len(running))
            running.append(fqn)
            part = part_of.get(module)
            if part is None:
                return
            kind = _kind_of((args, kwargs))
            part.calls[kind] += 1
            if kind not in inputs:
                inputs[kind] = pytree.tree_map(
                    lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf,
                    (args, kwargs),
                )

        def leave(*_: object) -> None:
            del running[depths.pop() :]

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    handles: list[RemovableHandle] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:  # seconds to import, and nothing is compiled without
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for fqn, module in _outside_of_fused_paths(model):
                handles += watch(fqn, module)
            call_model(model, example_input)
    except Exception as error:
        where = without_compile_prefix(running[-1]) if running else ""
        raise ValueError(
            f"swap_to_bsr: the model does not take the example given as measure ({type(error).__name__} in "
            f"{where or 'the model'}: {error}); give a tensor, a tuple of arguments or a dict of keyword arguments "
            "that it does, on its device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _outside_of_fused_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that can be watched; a hook further inside would turn the fused path off."""
    inside: set[nn.Module] = set()
    for fqn, module in model.named_modules():
        if module not in inside:
            yield fqn, module
            if is_whole(module):
                inside.update(module.modules())


def _kind_of(tree: object) -> Any:
    """Shapes, strides and dtypes of the tensors in a structure, and its other leaves by their text."""
    leaves, spec = pytree.tree_flatten(tree)
    described = tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    )
    return str(spec), described


def _milliseconds(
    modules: Sequence[nn.Module], args: tuple, kwargs: dict[str, Any], train: bool
) -> tuple[float, ...]:
    """What a forward of each takes, or a forward and backward."""

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(*args, **kwargs)

    def forward_and_backward(module: nn.Module) -> None:
        with torch.enable_grad():
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(module(*args, **kwargs))
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
        trained = [p for p in module.parameters() if p.requires_grad]
        inputs = [
            leaf
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        torch.autograd.grad(
            outputs, trained + inputs, outputs, allow_unused=True
        )  # no .grad written

    if train:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.requires_grad_()
    call = forward_and_backward if train else forward
    seconds = median_seconds(*(partial(call, module) for module in modules), at_least=SECONDS)
    return tuple(second * 1e3 for second in seconds)
