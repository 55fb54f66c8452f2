"""Timing parts of a model, dense and block-sparse, on the inputs that the model itself gives them.

What is timed is the smallest part whose speed a swap decides: a linear layer, or a module around
several of them that computes faster as long as all of it is dense.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.common.calls import call_model, eval_mode, median_seconds, shown

# Two parts whose shares of stored blocks round to the same multiple of this take the same time.
DENSITY_STEP = 0.05
SECONDS = 0.1
"""How long one side is timed at least."""

WHOLE: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules with a fused path of their own, which any swapped layer inside turns off: they are timed whole."""


@dataclass(frozen=True)
class Timing:
    """What one part of a model takes in a forward (and backward, if it is trained), all its calls together.

    Attributes:
        dense_ms: as it is.
        bsr_ms: swapped.
    """

    dense_ms: float
    bsr_ms: float


@dataclass(eq=False)
class Part:
    """A part that is swapped as a whole or not at all.

    Attributes:
        fqn: its name.
        module: as it is.
        replacements: the modules in it that a swap replaces (itself, or some inside), and by what.
        calls: what it was called with: a description of the input, and how often.
    """

    fqn: str
    module: nn.Module
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    calls: Counter[Any] = field(default_factory=Counter)

    def swapped(self) -> nn.Module:
        """The part as a swap would leave it; a copy that shares everything but what is replaced."""
        if self.module in self.replacements:
            return self.replacements[self.module]
        memo: dict[int, Any] = {id(old): new for old, new in self.replacements.items()}
        memo |= {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return copy.deepcopy(self.module, memo)

    def kind(self) -> tuple[Any, ...]:
        """Parts of one kind take the same time on inputs of one kind."""
        names = {module: name for name, module in self.module.named_modules()}
        return (
            type(self.module), getattr(self.module, "num_heads", None),
            tuple(
                (names[old], inside, type(new), getattr(new, "stride", None), tuple(new.weight.shape),
                 new.blocksize, new.values.dtype, new.bias is None, round((1.0 - new.sparsity) / DENSITY_STEP))
                for old, replacement in self.replacements.items()
                for inside, new in replacement.named_modules()
                if isinstance(new, BSRLinear)
            ),
        )  # fmt: skip


def find_parts(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> list[Part]:
    """The parts to time, outermost first where they nest."""
    parts: list[Part] = []
    part_of: dict[nn.Module, Part] = {}
    for fqn, module in model.named_modules():
        if module in part_of:
            inside = part_of[module]
        elif isinstance(module, WHOLE) or module in replacements:
            inside = Part(fqn, module)
            part_of |= dict.fromkeys(module.modules(), inside)
        else:
            continue
        if module in replacements:
            if not inside.replacements:
                parts.append(inside)
            inside.replacements[module] = replacements[module]
    return parts


def time_parts(
    model: nn.Module,
    parts: Sequence[Part],
    example_input: object,
    *,
    train: bool,
    progress: bool = True,
) -> dict[Part, Timing | None]:
    """Times each part dense and swapped, once for each kind of part and input.

    Args:
        model: dense; it runs once, in eval mode.
        parts: of the model.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments of the model.
        train: time a forward and a backward, not a forward alone.
        progress: show a bar, if tqdm is installed.

    Returns:
        For each part its time, or None if the model did not call it.

    Raises:
        ValueError: the model does not take the example.
    """
    inputs = _record(model, parts, example_input)
    times: dict[Any, tuple[float, float]] = {}
    work = {(part.kind(), call): part for part in parts for call in part.calls}
    for key, part in shown(list(work.items()), "swap_to_bsr: measuring", progress):
        args, kwargs = inputs[key[1]]
        with eval_mode(part.module):
            pair = part.module, part.swapped().eval()
            times[key] = tuple(_milliseconds(module, args, kwargs, train) for module in pair)
    result: dict[Part, Timing | None] = {}
    for part in parts:
        found = [(times[part.kind(), call], count) for call, count in part.calls.items()]
        dense, bsr = (sum(pair[side] * count for pair, count in found) for side in (0, 1))
        result[part] = Timing(dense, bsr) if found else None
    return result


def _record(
    model: nn.Module, parts: Sequence[Part], example_input: object
) -> dict[Any, tuple[tuple, dict[str, Any]]]:
    """Runs the model once and notes what each part is called with; the first input of each kind is kept."""
    inputs: dict[Any, tuple[tuple, dict[str, Any]]] = {}

    def watch(part: Part) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kind = _kind_of((args, kwargs))
            part.calls[kind] += 1
            if kind not in inputs:
                inputs[kind] = pytree.tree_map(
                    lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf,
                    (args, kwargs),
                )

        return look

    handles = [
        part.module.register_forward_pre_hook(watch(part), with_kwargs=True) for part in parts
    ]
    try:
        with ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:  # seconds to import, and nothing is compiled without
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            call_model(model, example_input)
    except Exception as error:
        raise ValueError(
            f"swap_to_bsr: the model does not take the example given as measure ({type(error).__name__}: {error}); "
            "give a tensor, a tuple of arguments or a dict of keyword arguments that it does, on its device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return inputs


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


def _milliseconds(module: nn.Module, args: tuple, kwargs: dict[str, Any], train: bool) -> float:
    """What a forward takes, or a forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            module(*args, **kwargs)

    def forward_and_backward() -> None:
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
    return median_seconds(forward_and_backward if train else forward, SECONDS) * 1e3
